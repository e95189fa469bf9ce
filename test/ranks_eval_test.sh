#!/bin/sh
# test/ranks_eval_test.sh: eval on several ranks gives the numbers and files of one process, and an error or a signal ends all of them.

. "$(dirname "$0")/ranks.sh"
train=$root/train eval=$root/eval tokenize=$root/tokenize

# ---- data and models ----

# units SEED LINES LONGEST: of uneven lengths, as are batches and continuations then
units() {
    awk -v seed="$1" -v lines="$2" -v longest="$3" 'function draw(n) { seed = (seed * 16807) % 2147483647; return seed % n }
    BEGIN { for (i = 0; i < 5; i++) draw(2); for (l = 0; l < lines; l++) {
        printf "{\"units\": ["; n = 5 + draw(l % 10 ? longest / 4 : longest); u = draw(20)
        for (i = 0; i < n; i++) { printf "%s%d", i ? ", " : "", u; u = draw(4) ? (u * 7 + 3) % 20 : draw(20) }
        printf "], \"file_name\": \"f%d\"}\n", l } }'
}
units 1 200 200 >a.jsonl
units 2 60 200 >v.jsonl
awk 'BEGIN { print "id,filename,voice,frequency,correct"; for (i = 0; i < 60; i++) printf "%d,f%d,v%d,%d,%d\n", i / 4, i, i / 2 % 2, i, i % 2 }' >gold.csv
head -n 5 gold.csv >few.csv
cat v.jsonl v.jsonl >twice.jsonl # equal prompts
head -n 2 v.jsonl >two.jsonl
while [ "$(cat many.jsonl 2>/dev/null | wc -l)" -lt 1000 ]; do cat a.jsonl >>many.jsonl; done
awk 'BEGIN { print "id,filename,voice,correct"; for (i = 0; i < 4000; i++) printf "%d,f%d,v,%d\n", i / 2, i, i % 2 }' >many.csv
units 3 4000 200 >many-units.jsonl
cat >model.json <<'J'
{"model_type": "qwen2", "vocab_size": 22, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
 "intermediate_size": 64, "max_position_embeddings": 256, "tie_word_embeddings": true}
J
"$train" --model model.json a.jsonl --context 64 --batch 4 --lr 5e-3 --threads 1 --steps 20 --out one >/dev/null 2>&1
"$train" --model model.json a.jsonl --context 64 --batch 4 --lr 1e18 --warmup 0 --threads 1 --steps 1 --out wild >/dev/null 2>&1
sed 's/"hidden_size": 32/"hidden_size": 256/; s/"intermediate_size": 64/"intermediate_size": 1024/' model.json >slow.json
"$train" --model slow.json a.jsonl --context 64 --batch 4 --threads 1 --steps 1 --out slow >/dev/null 2>&1

# ---- helpers ----

# same_as_one ARGUMENTS...: eval on $n ranks writes some.*, the same as one.*, which one process wrote
same_as_one() {
    rm -f some.*
    ends 0 on "$n" "$eval" one "$@" || return 1
    for same_file in some.*; do cmp "one.${same_file#some.}" "$same_file" || return 1; done
    [ "$(grep -c '^device' said.out)" = 1 ] || { # one rank prints
        cat said.out
        return 1
    }
}
# begins N MARK ARGUMENTS...: starts eval of a slow model on N ranks and waits for its line MARK
begins() {
    begins_n=$1 begins_mark=$2
    shift 2
    starts "$begins_n" "$eval" slow "$@"
    for begins_i in $(seq 100); do
        ! grep -q "^$begins_mark" said.out 2>/dev/null || break
        sleep 0.05
    done
    sleep 0.3
}

# ---- the numbers of one process ----

"$eval" one ppl v.jsonl --train a.jsonl --json one.json >/dev/null
for n in 2 3; do check "ppl on $n ranks" same_as_one ppl v.jsonl --train a.jsonl --json some.json; done
n=5 && check 'ppl: more ranks than batches' same_as_one ppl v.jsonl --train a.jsonl --batch 64 --json some.json
"$eval" one swuggy gold.csv --units v.jsonl --batch 2 --context 32 --json one.json --submission one.txt >one.out
for n in 2 3; do check "swuggy on $n ranks" same_as_one swuggy gold.csv --units v.jsonl --batch 2 --context 32 --json some.json --submission some.txt; done
check 'swuggy: some sequences were scored in windows' grep -q 'scored in windows' one.out
"$eval" one swuggy few.csv --units v.jsonl --sum --json one.json --submission one.txt >/dev/null
n=5 && check 'swuggy: more ranks than rows' same_as_one swuggy few.csv --units v.jsonl --sum --json some.json --submission some.txt
said="generate twice.jsonl --prompt-units 4 --max-new 40"
"$eval" one $said -o one.jsonl --json one.json >/dev/null
for n in 2 3; do check "generate on $n ranks" same_as_one $said -o some.jsonl --json some.json; done
n=2 && check 'generate: five prompts at once' same_as_one $said --batch 5 -o some.jsonl --json some.json
"$eval" one generate two.jsonl --prompt-seconds 0 --max-new 40 -o one.jsonl --json one.json >/dev/null
n=5 && check 'generate: more ranks than prompts' same_as_one generate two.jsonl --prompt-seconds 0 --max-new 40 -o some.jsonl --json some.json

# ---- audio ----

. "$root/test/wave.sh"
mkdir -p speech pairset/x
for i in 0 1 2 3 4 5 6; do
    bytes=$((8000 + 3000 * i))
    { wave 1 1 8000 16 $bytes && tail -c +$((i * 50000 + 1)) "$root/slam.h" | head -c $bytes; } >speech/$i.wav
    [ $i -gt 5 ] || cp speech/$i.wav pairset/x/${i}_x.wav
done
: >speech/2b.wav
"$tokenize" speech --fit 20 --kmeans km.npy >/dev/null 2>&1
"$eval" one storycloze pairset --kmeans km.npy --json one.json --submission one.txt >/dev/null
rm -f one.jsonl some.*
n=3 && check 'storycloze: audio' same_as_one storycloze pairset --kmeans km.npy --json some.json --submission some.txt
"$eval" one generate speech --kmeans km.npy -o one.jsonl --max-new 20 >/dev/null 2>&1
check 'generate: a file that cannot be decoded' ends 3 on 3 "$eval" one generate speech --kmeans km.npy -o some.jsonl --max-new 20
check 'generate: it is reported once, the others are continued' sh -c 'test $(grep -c "^eval: skipped" said.err) = 1 && cmp one.jsonl some.jsonl'

# ---- failures ----

check 'a wrong flag' ends 2 on 2 "$eval" one generate two.jsonl --top-p 2
check 'a wrong flag: one error' test "$(grep -c '^eval: error' said.err)" = 1
check 'all fail alike' ends 1 on 3 "$eval" one generate nothing.jsonl
check 'all fail alike: one error, of no rank' once nothing.jsonl
check 'results that cannot be written' ends 1 on 2 "$eval" one ppl v.jsonl --json no/x.json
check 'results that cannot be written: the error' once 'no/x.json: cannot be written'
check 'a full disk behind stdout' ends 1 on 2 sh -c 'exec "$0" "$@" >/dev/full' "$eval" one ppl v.jsonl
check 'a full disk behind stdout: the error' once 'stdout: cannot be written'
cp v.jsonl x.jsonl
mkdir in.1
ln -s ../one in.1/one
for task in 'ppl x.jsonl' 'swuggy gold.csv --units x.jsonl' 'generate x.jsonl --max-new 20'; do
    check "one rank has no data: ${task%% *}" ends 1 on 3 ./each "$eval" one $task
    check "one rank has no data: ${task%% *}: its sentence" once 'rank 1: .*\(x.jsonl\|gold.csv\)'
done
rm in.1/one
check 'one rank has no model' ends 1 on 2 ./each "$eval" one ppl v.jsonl
check 'one rank has no model: its error' once 'rank 1: one'
ln -s ../wild in.1/one
cp v.jsonl in.1
check 'the model of one rank is broken: generate' ends 1 on 3 ./each "$eval" one generate v.jsonl --max-new 20 -o x.out.jsonl
check 'the model of one rank is broken: its error, no file' sh -c 'grep -q "^eval: error: rank 1: f.*logits are not finite" said.err && test ! -e x.out.jsonl'
ln -s ../gold.csv in.1/gold.csv
check 'the model of one rank is broken: swuggy' ends 1 on 3 ./each "$eval" one swuggy gold.csv --units v.jsonl --context 32 --batch 2
check 'the model of one rank is broken: scores are not finite' once '.*sequence [0-9]*: the log-probability is not finite'
rm -r in.1

# ---- signals and kills ----

long="generate many.jsonl --batch 1 --max-new 60"
begins 3 prompts $long -o halted.jsonl
check 'TERM to rank 1: generate ends with status 0' stops TERM 1 0
check 'TERM to rank 1: the continuations of all ranks are kept' sh -c 'n=$(sed -n "s/^stopped  after \([0-9]*\) of 1000.*/\1/p" said.out) && test -n "$n" && test $(wc -l <halted.jsonl.partial) = "$n" -a ! -e halted.jsonl'
begins 2 set swuggy many.csv --units many-units.jsonl --batch 1
check 'TERM to rank 1: a test set ends' stops TERM 1 1
check 'TERM to rank 1: with its error' sh -c "test \$(grep -c '^eval: error' said.err) = 1 && grep -q 'stopped (score: [0-9]* of [0-9]*)' said.err"
begins 2 prompts $long -o halted.jsonl
check 'kill -9 of rank 1: all end' stops KILL 1 any
check 'kill -9 of rank 1: nothing is written' test ! -e halted.jsonl
end
