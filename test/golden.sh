#!/bin/sh
# test/golden.sh [FOLDER]: writes the runs of test/fixtures/golden/ anew with the programs in FOLDER (default: the
# project's folder), which is needed when the format of a checkpoint changes. test/guard_test.sh resumes them.
# Everything but run/ and dpo/ is written only if it is missing. Fails if a loss differs from losses.txt by over 1e-5.
#
#   init/            config.json and model.safetensors: a Qwen2 model of 5,584 parameters
#   units.jsonl      9 documents that make 8 rows of 64 tokens in any packing: one batch, so a step is an epoch
#   val.jsonl        3 documents to validate on
#   run/             train: the checkpoint of step 10 of 20, log.jsonl up to step 11
#   dpo/             dpo: the checkpoint of step 2 of 4, log.jsonl up to step 3, reference.safetensors
#   audio/           tokenize's input; of it km.npy, km.json, speech.jsonl, speech.bin, and from paths.jsonl pairs.jsonl
#   losses.txt       `train STEP LOSS`, `val STEP LOSS`, `dpo STEP LOSS`, `ppl NLL` of the checkpoint in run/ on val.jsonl
#   torch.txt, torch.safetensors, not_finite/    by PyTorch: see reference_golden.py
#
# Absolute paths in trainer.json begin with /golden/; a test replaces that by the folder of its copy.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
programs=$(cd "${1:-$root}" && pwd)
golden=$root/test/fixtures/golden
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CUDA_VISIBLE_DEVICES=
mkdir -p "$golden/audio"
cp -r "$golden" "$folder/golden"
cd "$folder/golden"

# units SEED LENGTH...: documents of a small grammar with some noise
units() {
    echo "$@" | awk 'function draw(n) { seed = (seed * 16807) % 2147483647; return int(seed / 65536) % n }
    { seed = $1; for (d = 2; d <= NF; d++) { printf "{\"units\": ["; u = draw(50)
        for (i = 0; i < $d; i++) { printf "%s%d", i ? ", " : "", u; u = draw(4) ? (u * 7 + 3) % 50 : draw(50) }
        printf "], \"file_name\": \"%d\"}\n", d - 1 } }'
}
# Two documents of 32 tokens (30 units and two marks) fill a row; the others leave less than 32 tokens of theirs.
[ -f units.jsonl ] || units 1 62 30 45 37 60 30 51 41 55 >units.jsonl
[ -f val.jsonl ] || units 2 40 25 50 >val.jsonl

. "$root/test/wave.sh"
# Three sounds of 1.2 seconds, 8 kHz, 8 bits: two triangle waves and noise, whose periods change every 50 ms.
for i in 1 2 3; do
    [ -f audio/$i.wav ] || {
        wave 1 1 8000 8 9600
        awk -v seed=$i 'function draw(n) { seed = (seed * 16807) % 2147483647; return int(seed / 65536) % n }
        function triangle(t, p) { t %= p; return t < p / 2 ? t / p * 100 : 100 - t / p * 100 }
        BEGIN { for (t = 0; t < 9600; t++) {
            if (t % 400 == 0) { p = 8 + draw(60); q = 4 + draw(20); noise = 1 + draw(60) }
            printf "\\%03o%s", 80 + triangle(t, p) + triangle(t, q) / 2 + draw(noise), t % 100 == 99 ? "\n" : "" } }' |
            while read -r line; do printf "$line"; done
    } >audio/$i.wav
done

quiet() { "$@" >quiet.out 2>&1 || { cat quiet.out && exit 1; }; }
rm -rf run dpo
if [ ! -f pairs.jsonl ]; then
    quiet "$programs/tokenize" audio --fit 20 --kmeans km.npy
    quiet "$programs/tokenize" audio --kmeans km.npy -o speech.jsonl
    quiet "$programs/tokenize" audio --kmeans km.npy -o speech.bin
    for order in '1 2 3' '2 3 1' '3 1 2'; do # not their mirror images: gradients of those cancel out
        printf '{"prompt_path": "audio/%s.wav", "chosen_path": "audio/%s.wav", "rejected_path": "audio/%s.wav"}\n' $order
    done >paths.jsonl
    quiet "$programs/tokenize" --pairs paths.jsonl --kmeans km.npy -o pairs.jsonl
fi

settings='--context 64 --batch 8 --threads 1 --device cpu --seed 1'
if [ ! -d init ]; then
    echo '{"model_type": "qwen2", "vocab_size": 52, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64,
    "tie_word_embeddings": true}' >config.json
    quiet "$programs/train" units.jsonl --model config.json $settings --steps 30 --warmup 0 --lr 1e-2 --out first
    mkdir init && cp first/latest/config.json first/latest/model.safetensors init
fi
quiet "$programs/train" units.jsonl --val val.jsonl --init init $settings --steps 20 --lr 2e-2 --warmup 3 --beta2 0.95 \
    --weight-decay 0.1 --clip 0.5 --eval-every 5 --save-every 10 --keep 0 --out run
quiet "$programs/dpo" pairs.jsonl --init init --batch 3 --context 64 --threads 1 --device cpu --steps 4 --lr 2e-3 \
    --warmup 0 --beta 0.5 --save-every 2 --keep 0 --out dpo
quiet "$programs/eval" run/step_000010 ppl val.jsonl --context 64 --threads 1 --json ppl.json
losses() { sed -n "s/^{\"step\": \([0-9]*\),.*\"$2\": \([^,}]*\).*/$3 \1 \2/p" "$1/log.jsonl"; }
{ losses run loss train && losses run val_loss val && losses dpo loss dpo; } >new.txt
sed 's/.*"nll": \([^,]*\),.*/ppl \1/' ppl.json >>new.txt
[ -f losses.txt ] || cp new.txt losses.txt
paste -d ' ' losses.txt new.txt | awk '{ d = $(NF / 2) - $NF
    if ($1 != $(NF / 2 + 1) || d > 1e-5 || d < -1e-5) { bad = 1; print "losses differ: " $0 } } END { exit bad }'

for keep in run/step_000010 dpo/step_000002; do
    mkdir -p kept/$keep && cp $keep/* kept/$keep
    # one step more than the checkpoint
    sed "/\"step\": $((${keep##*_0000} + 2)),/,\$d" ${keep%/*}/log.jsonl >kept/${keep%/*}/log.jsonl
    sed "s|$folder/|/|g" $keep/trainer.json >kept/$keep/trainer.json
done
cp dpo/reference.safetensors kept/dpo
rm -rf "$golden/run" "$golden/dpo"
cp -r kept/* init audio units.jsonl val.jsonl paths.jsonl pairs.jsonl km.npy km.json speech.jsonl speech.bin losses.txt \
    "$golden"
