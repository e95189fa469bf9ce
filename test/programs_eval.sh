#!/bin/sh
# eval from end to end. Prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why`, and last
# `N passed, N failed`.
. "$(dirname "$0")/programs_lib.sh"
. "$programs/test/wave.sh"

"$train" $few a.jsonl --val v.jsonl --steps 20 --out one >/dev/null 2>&1
mkdir speech
for i in $(seq 10 33); do # noise, the same every time
    n=$((9000 + i * 602))
    { wave 1 1 8000 16 $n && tail -c +$((i * 997)) "$root/slam.h" | head -c $n; } >"speech/$i.wav"
done
"$tokenize" speech --fit 20 --kmeans km.npy >/dev/null 2>&1
"$tokenize" speech --fit 20 --seed 1 --kmeans other.npy >/dev/null 2>&1
"$tokenize" speech --kmeans km.npy -o speech.bin >/dev/null 2>&1
"$train" --model model.json --context 64 --batch 4 --threads 1 speech.bin --steps 1 --out spoken >/dev/null 2>&1

# refuse_all: lines NAME|STATUS|PATTERN|ARGUMENTS of eval
refuse_all() {
    while IFS='|' read -r refuse_row status pattern arguments; do
        refuses "$refuse_row" "$status" "$pattern" "$eval" $arguments
    done
}

# ---- perplexity ----

check 'ppl of a run: its validation data, n-grams of its training data' 'other data' sh -c "'$eval' one ppl --json run.json >run.out &&
    grep -q '^data .*/v.jsonl' run.out && grep -q '^n-grams .*/a.jsonl' run.out"
check 'ppl of data and n-grams of other data' 'differ' sh -c "'$eval' one ppl v.jsonl --train a.jsonl --json given.json && cmp run.json given.json"
check 'ppl: all numbers are in the JSON' 'members' grep -q '"task": "ppl", "n": [0-9]*, "nll": .*"perplexity".*"unigram".*"bigram".*"trigram".*"fourgram".*"fivegram"' run.json
"$train" $few a.jsonl --val-fraction 0.1 --seed 7 --eval-every 2 --steps 2 --out held >/dev/null 2>&1
check 'ppl of what a run held out: the loss that training found' 'differs' sh -c "'$eval' held ppl --json held.json | grep -q 'what the run held out' &&
    echo \$(sed 's/.*\"nll\": //; s/,.*//' held.json) \$(tail -n 1 held/log.jsonl | sed 's/.*\"val_loss\": //; s/[,}].*//') | awk '{ d = \$1 - \$2; exit !(NF == 2 && d < 1e-5 && d > -1e-5) }'"
"$train" $few a.jsonl --steps 2 --out unheld >/dev/null 2>&1
check 'ppl of a run that held nothing out' 'other data' sh -c "'$eval' unheld ppl | grep -q '^data .*a.jsonl (its training data'"
mkdir moved && cp -rL one a.jsonl v.jsonl moved && mv a.jsonl gone.jsonl
check 'ppl of a run that has moved with its data' 'other data' sh -c "cd moved && '$eval' one ppl --json ../moved.json && cmp ../run.json ../moved.json"
mv gone.jsonl a.jsonl
cp -rL one/latest bare && rm bare/trainer.json
check 'ppl of a model that is from no run' 'differ' sh -c "'$eval' bare ppl v.jsonl --train a.jsonl --context 64 --json bare.json && cmp run.json bare.json"

refuses 'ppl: a longer context than the model has' 1 'context 1000: one/.* has up to 256' "$eval" one ppl v.jsonl --context 1000
unwritable 'ppl: JSON' --json "$eval" one ppl v.jsonl
if [ -c /dev/full ]; then refuses 'ppl: JSON into a full device' 1 '/dev/full: cannot be written: No space' "$eval" one ppl v.jsonl --json /dev/full; fi
{ "$eval" one ppl v.jsonl --json closed.json; } 2>/dev/null | head -n 1 >/dev/null
check 'ppl: a closed stdout, but a JSON' 'no JSON' grep -q perplexity closed.json
cat >loud.json <<'J'
{"model_type": "llama", "vocab_size": 102, "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 2,
 "num_key_value_heads": 1, "intermediate_size": 8, "initializer_range": 10, "tie_word_embeddings": true}
J
"$train" $start --model loud.json v.jsonl --steps 1 --out loud >/dev/null 2>&1
check 'ppl: a perplexity beyond a double is null in JSON' "$(cat loud.out)" sh -c "'$eval' loud ppl v.jsonl --json inf.json >loud.out && grep -q '\"nll\": [0-9.e+]*, \"perplexity\": null}' inf.json"

# ---- generation ----

continue="generate v.jsonl --prompt-units 4 --max-new 30"
check 'generate' 'status' "$eval" one $continue -o all.jsonl --json all.json
check 'generate: a line per prompt, of at most that many units' 'lines' test "$(grep -c '^{"file_name": "[0-9]*", "prompt": \[[0-9]*, [0-9]*, [0-9]*, [0-9]*\], "units": \[[0-9, ]*\]}$' all.jsonl)" = 20
check 'generate: JSON' 'members' grep -q '^{"task": "generate", "n": 20, "tokens": [0-9]*, "auto_bleu_2": [0-9.e-]*}$' all.json
check 'generate: one at a time gives the same' 'differ' sh -c "'$eval' one $continue -o alone.jsonl --batch 1 && cmp all.jsonl alone.jsonl"
check 'generate: another seed gives others' 'the same' sh -c "'$eval' one $continue -o other.jsonl --seed 1 && ! cmp all.jsonl other.jsonl"
check 'generate: --greedy needs no seed' 'differ' sh -c "'$eval' one $continue --greedy -o all.jsonl && '$eval' one $continue --greedy -o other.jsonl --seed 1 && cmp all.jsonl other.jsonl"
check 'generate: prompts longer than the context allows' 'not said' sh -c "'$eval' one generate v.jsonl --prompt-seconds 0 --max-new 50 | grep -q '[0-9] prompts were longer than the context'"
check 'generate: continuations as prompts' 'status' "$eval" one generate all.jsonl --max-new 2
check 'generate: token shards and audio as prompts' 'prompts' sh -c "'$eval' spoken generate speech.bin speech --kmeans km.npy --max-new 2 -o both.jsonl && test \$(wc -l <both.jsonl) = 48"
: >speech/99.wav
check 'generate: a file that cannot be decoded is skipped, with status 3' 'status or message' sh -c "'$eval' spoken generate speech --kmeans km.npy --max-new 2 -o most.jsonl 2>skipped.err; test \$? = 3 &&
    grep -q '^eval: skipped: .*99.wav' skipped.err && test \$(wc -l <most.jsonl) = 24"
rm speech/99.wav
printf 'a b a b\n\nnothing twice here\na, a, a' >texts.txt # 2/3, 0, 0, 1
check 'auto-BLEU of texts' 'number' sh -c "'$eval' generate --transcripts texts.txt | grep -q '0.4167 over 4 lines'"
: >texts.txt
check 'auto-BLEU of no text' 'number' sh -c "'$eval' generate --transcripts texts.txt | grep -q '0.0000 over 0 lines'"
echo '{"units": [700], "file_name": "x"}' >far.jsonl
refuse_all <<EOT
generate: no space for a prompt|1|64 new tokens.*context of 64|one generate v.jsonl --max-new 64
generate: a folder that is not there, before anything is generated|1|no/said.jsonl: cannot be written|one $continue -o no/said.jsonl
generate: a folder as the output|1|one: is a folder|one $continue -o one
generate: no such prompts|1|nothing.jsonl|one generate nothing.jsonl
generate: a prompt beyond the vocabulary|1|x: unit 1 is 700, expected below 100|one generate far.jsonl
auto-BLEU of texts: no such file|1|none.txt: cannot be read|generate --transcripts none.txt
generate: audio without --kmeans|1|x.wav.*--kmeans|one generate x.wav
generate: a top-p of 2|2|top-p|one $continue --top-p 2
generate: a temperature of 0|2|temperature 0: .*--greedy|one $continue --temperature 0
EOT

# ---- a vocoder: 50 units, 6 samples per frame ----

gan=$root/test/fixtures/vocoder
echo '{"units": [7, 49, 0], "duration": [2, 3, 4], "file_name": "a.flac"}' >spoken.jsonl
check 'resynthesize by a vocoder: 9 frames' 'length' sh -c "'$eval' resynthesize spoken.jsonl --wav gan --vocoder '$gan/speakers' --speaker 4 && test \$(wc -c <gan/a.wav) = $((44 + 2 * 9 * 6))"
check 'resynthesize by a vocoder: another speaker' 'the same' sh -c "'$eval' resynthesize spoken.jsonl --wav other_gan --vocoder '$gan/speakers' && ! cmp gan/a.wav other_gan/a.wav"
cp -r "$gan/plain_weights" cut_gan && head -c 9000 "$gan/plain_weights/model.safetensors" >cut_gan/model.safetensors
echo '{"units": [7], "duration": [2000000000], "file_name": "long"}' >long.jsonl
refuse_all <<EOT
resynthesize: a vocoder whose weights are cut off|1|cut_gan/model.safetensors: |resynthesize spoken.jsonl --wav gan --vocoder cut_gan
resynthesize: a language model as the vocoder|1|config.json: 'num_embeddings' is missing|resynthesize spoken.jsonl --wav gan --vocoder one/latest
resynthesize: units that last longer than a WAV file|1|long: lasts more than [0-9]* frames|resynthesize long.jsonl --wav gan
generate: a vocoder of other units|1|plain_weights: has 50 units, the model 100|one generate v.jsonl --wav gan --vocoder $gan/plain_weights
resynthesize: a unit that the vocoder has not|1|unit 1 is 700, expected 0 to 49|resynthesize far.jsonl --wav gan --vocoder $gan/plain_weights
resynthesize: no such speaker|1|expected number 5|resynthesize spoken.jsonl --wav gan --vocoder $gan/speakers --speaker 5
resynthesize: no such style|1|expected number 1|resynthesize spoken.jsonl --wav gan --vocoder $gan/speakers --style 1
a vocoder without --wav|2|--vocoder: expected --wav DIR|one generate v.jsonl --vocoder $gan/speakers
EOT

# ---- a signal ----

cat v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl >many.jsonl
"$eval" one generate many.jsonl --batch 1 --max-new 60 -o halted.jsonl >halted.out 2>&1 &
halted=$!
while ! grep -q '^prompts' halted.out && kill -0 $halted 2>/dev/null; do :; done
kill -INT $halted
check 'generate: a signal ends it with status 0' 'status' wait $halted
check 'generate: what was done by then is in another file' 'files' sh -c 'grep -q "^stopped  after [0-9]* of 200" halted.out && test -f halted.jsonl.partial -a ! -e halted.jsonl'

# ---- audio ----

bundled=$programs/test/corpus
check 'generate --wav: prompt and continuation, and the prompt alone' 'files' sh -c "'$eval' one generate v.jsonl --prompt-units 4 --max-new 30 --kmeans '$bundled/km.npy' --wav said/new --wav-prompt -o said.jsonl | grep -q '^wrote    40 files into said/new: 0:' &&
    cmp alone.jsonl said.jsonl && test \$(ls said/new/*.wav | wc -l) = 20 -a \$(ls said/new/prompt/*.wav | wc -l) = 20 -a \$(wc -c <said/new/0.wav) -gt \$(wc -c <said/new/prompt/0.wav)"
check 'generate --wav: again, over the files that are there' 'differ' sh -c "cp -r said/new before && '$eval' one generate v.jsonl --prompt-units 4 --max-new 30 --kmeans '$bundled/km.npy' --wav said/new && diff -r before said/new"
printf '%s\n' '{"units": [45, 7], "duration": [1, 1], "file_name": "../../x/../e\u0007 .flac"}' '{"units": [5, 6], "file_name": ".."}' '{"units": [7], "file_name": "/a/s.wav"}' \
    '{"units": [8], "file_name": "b/s.ogg"}' '{"audio_repr": "<Un9><Un8>", "file_name": "s"}' '{"units": [3]}' >names.jsonl
check 'resynthesize: names that stay in the folder and differ' 'names' sh -c "'$eval' resynthesize names.jsonl --wav names && test \"\$(cd names && echo *)\" = '_..wav e__.wav names.jsonl_6.wav s.wav s~2.wav s~3.wav' &&
    test \$(wc -c <names/e__.wav) = \$((44 + 2 * (1024 + 640)))" # of 16 bits: a frame of 1024 samples, and another 640 later
shard 102 1 $(seq 3 99) 1 1 5 6 1 >talk.bin
check 'resynthesize: token shards, whole documents' 'files' sh -c "'$eval' resynthesize talk.bin --wav whole --threads 1 --json whole.json && test \$(ls whole | wc -l) = 2 && test \$(cat whole/*_1.wav | wc -c) -ge \$((44 + 2 * (1024 + 96 * 640)))"
check 'resynthesize: audio, and its units again' 'few of them' sh -c "'$eval' resynthesize speech --wav again && '$tokenize' speech --kmeans '$bundled/km.npy' -o first.jsonl && '$tokenize' again --kmeans '$bundled/km.npy' -o second.jsonl && test \$(wc -l <second.jsonl) = 24"
echo '{"units": [], "file_name": "empty"}' | cat - names.jsonl >holes.jsonl
check 'resynthesize: spectrograms by make plot' 'picture' sh -c "! command -v sox || { make -s -C '$root' plot WAV=\$PWD/names PLOT=\$PWD/names.png && test -s names.png; }"
check 'resynthesize: a line without units is skipped, with status 3' 'status or message' sh -c "'$eval' resynthesize holes.jsonl --wav holes 2>skipped.err; test \$? = 3 && grep -q '^eval: skipped: empty: has no units' skipped.err && test \$(ls holes | wc -l) = 6"
sed 's/, "durations": \[[^]]*\]//' "$bundled/km.json" >old.json && cp "$bundled/km.npy" old.npy
check 'resynthesize: centroids without durations' 'not said' sh -c "'$eval' resynthesize names.jsonl --kmeans old.npy --wav old | grep -q 'old.npy has no durations.*1.4 frames'"
mkdir -p taken/s.wav
echo '{"units": [3, 200], "file_name": "y"}' >beyond.jsonl
refuse_all <<EOT
resynthesize: units beyond the centroids|1|y: unit 2 is 200, expected 0 to 99|resynthesize beyond.jsonl --wav beyond
resynthesize: a folder in the way of a file, before anything is written|1|taken/s.wav: is a folder|resynthesize names.jsonl --wav taken
resynthesize: a file in the way of the folder|1|a.jsonl/*: cannot create this folder|resynthesize names.jsonl --wav a.jsonl
resynthesize: nowhere to write to|2|expected --wav DIR|resynthesize names.jsonl
resynthesize: a model|2|expected no model|one resynthesize names.jsonl --wav names
generate --wav: a model of other units than the bundled ones|1|the model was trained on units of|spoken generate speech.bin --wav names
generate --wav: fewer units than the model has|1|the model has 100 units|one generate v.jsonl --kmeans km.npy --wav names
EOT
check 'resynthesize: nothing was written where a file was in the way' 'files' test "$(ls taken)" = s.wav
mkdir small
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=64k tmpfs small 2>/dev/null; then
    mounted="$mounted $folder/small"
    refuses 'resynthesize: a full disk' 1 'No space left' "$eval" resynthesize a.jsonl --wav small
    check 'resynthesize: a full disk leaves no part of a file' 'files' sh -c '! ls small/*.part'
else
    skip 'resynthesize: a full disk' 'no small file system can be mounted here'
fi
"$eval" resynthesize "$bundled/val.bin" "$bundled/train.bin" --wav halted_wav --threads 1 >halted.out 2>&1 &
halted=$!
while [ ! -e halted_wav/val.bin_1.wav ] && kill -0 $halted 2>/dev/null; do :; done
kill -INT $halted
check 'resynthesize: a signal ends it with status 0' 'status' wait $halted
check 'resynthesize: whole files only after a signal' 'files' sh -c 'grep -q "; stopped before the end" halted.out && ! ls halted_wav/*.part'

# ---- test sets ----

mkdir -p zero/lexical/dev pairset/one pairset/two salmon/bg_alignment salmon/speaker_consistency empty_set
echo 'id,filename,voice,frequency,word,phones,length,correct' >zero/lexical/dev/gold.csv
i=0
for file in speech/*.wav; do
    cp "$file" "zero/lexical/dev/f$i.wav"
    echo "$((i / 4)),f$i,v$((i / 2 % 2)),$((i * i)),,,5,$((i % 2))" >>zero/lexical/dev/gold.csv
    [ $i -ge 8 ] || cp "$file" "pairset/$([ $i -lt 4 ] && echo one || echo two)/${i}_x.wav"
    [ $i -ge 4 ] || cp "$file" "salmon/$([ $i -lt 2 ] && echo bg_alignment || echo speaker_consistency)/sample_0_$((i % 2)).wav"
    i=$((i + 1))
done
check 'swuggy: audio' 'status or count' sh -c "'$eval' spoken swuggy zero --kmeans km.npy --json audio.json --submission audio.txt && grep -q '\"n\": 6,' audio.json && test \$(wc -l <audio.txt) = 24"
check 'swuggy: the same from units' 'differ' sh -c "'$tokenize' zero/lexical/dev --kmeans km.npy -o zero.jsonl && '$eval' spoken swuggy zero/lexical/dev --units zero.jsonl --json units.json --submission units.txt &&
    cmp audio.json units.json && cmp audio.txt units.txt"
check 'storycloze: folders of pairs' 'count' sh -c "'$eval' spoken storycloze pairset --kmeans km.npy --sum --json pairset.json && grep -q '\"of\": \"sum\", \"n\": 4,' pairset.json"
check 'storycloze: from units alone' 'differ' sh -c "'$tokenize' pairset --kmeans km.npy -o pairset.jsonl && '$eval' spoken storycloze --units pairset.jsonl --sum --json pairset2.json && cmp pairset.json pairset2.json"
check 'salmon: by part' 'parts' sh -c "'$eval' spoken salmon salmon --kmeans km.npy --json salmon.json && grep -q '\"by_part\": \[{\"part\": \"bg_alignment\", \"n\": 1' salmon.json"
check 'JSON: pairs and scores' 'members' sh -c "grep -q '\"by_vocabulary\": \[{\"vocabulary\": \"in\", \"n\": 6,' units.json && test \$(grep -c '^{\"right\": \"f' units.json) = 12 -a \$(grep -c '^{\"name\": \"f' units.json) = 24"
check 'JSON into a pipe' 'JSON' sh -c "'$eval' spoken swuggy zero --units zero.jsonl --json /dev/stdout | sed -n '/^{/,\$p' | head -n 37 | grep -q '\"task\": \"swuggy\"'"
mv zero/lexical/dev/f3.wav f3.wav
refuses 'a missing wav' 1 'f3: no such file' "$eval" spoken swuggy zero --kmeans km.npy
: >zero/lexical/dev/f3.wav
check 'a wav that cannot be decoded' 'status or message' sh -c "'$eval' spoken swuggy zero --kmeans km.npy 2>skipped.err; test \$? = 1 &&
    grep -q 'error: 1 of the set.s files cannot be decoded' skipped.err && grep -q f3.wav skipped.err"
mv f3.wav zero/lexical/dev/f3.wav
sed 's/"units": \[[0-9]*/"units": [20/' zero.jsonl >large.jsonl
cat zero.jsonl zero.jsonl >twice.jsonl
head -n 24 zero/lexical/dev/gold.csv >partner.csv
refuse_all <<'EOT'
audio without centroids|1|kmeans|spoken swuggy zero
centroids of other units than the model|1|the model was trained on units of|spoken swuggy zero --kmeans other.npy
units without one of the files|1|has no line with the name 'f0'|spoken swuggy zero --units pairset.jsonl
units beyond the vocabulary|1|large.jsonl:1: unit 1 is 20, expected below 20|spoken swuggy zero --units large.jsonl
two lines of one name|1|twice.jsonl:25: an earlier line has the name 'zero/lexical/dev/f0.wav'|spoken swuggy zero --units twice.jsonl
a row without a partner|1|partner.csv: 'f22' has no partner: .*'nothing' follows|spoken swuggy partner.csv --units zero.jsonl
an empty folder|1|empty_set|spoken sblimp empty_set --kmeans km.npy
a split that PATH contradicts|1|dev/gold.csv: is not split test|spoken swuggy zero/lexical/dev --split test --units zero.jsonl
a split that is not there|1|zero: is not split test|spoken swuggy zero --split test --units zero.jsonl
a longer context than the model has|1|context 100000: spoken/.* has up to|spoken swuggy zero --units zero.jsonl --context 100000
an output that cannot be written, before anything is scored|1|no/results.json: cannot be written|spoken swuggy zero --units zero.jsonl --json no/results.json
no such task|2|there is no such task|spoken swuggly zero
no task|2|no task after one|one
two sets|2|one test set at a time|spoken swuggy zero zero
salmon without a folder|1|expected the folder of SALMon's parts|spoken salmon
EOT
if [ -f "$programs/test/corpus/swuggy/gold.csv" ]; then
    refuses 'a model of other units than the bundled set' 1 'the bundled data has units of tokenizer' "$eval" spoken swuggy
    refuses 'a model of other units than the bundled pairs: dpo' 1 'the bundled data has units of tokenizer' "$dpo" --init spoken
fi
end
