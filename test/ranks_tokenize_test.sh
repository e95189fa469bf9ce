#!/bin/sh
# test/ranks_tokenize_test.sh: each rank of tokenize writes its part; in order the parts hold what one process writes, however they were stopped.

. "$(dirname "$0")/ranks.sh"
tokenize=$root/tokenize

# ---- audio: bytes of slam.h ----

. "$root/test/wave.sh"
# sound PATH FROM BYTES
sound() { { wave 1 1 8000 16 "$3" && tail -c +"$2" noise | head -c "$3"; } >"$1"; }
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do cat "$root/slam.h"; done >noise
mkdir speech long
for i in 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29; do sound speech/$i.wav $((i * 997)) $((i * 900)); done
: >speech/16b.wav
: >speech/25b.wav
sound long/1.wav 1 6400000
ls speech/??.wav >stories.txt
ls speech/??.wav | paste -d '\t' - - - | head -n 6 >pairs.tsv

# parts NAME N END: NAME-00001-of-0000N.END and so on, in order, are one.END
parts() { cat "$1"-*-of-0000"$2.$3" | cmp "one.$3" -; }
# shards FILE...: their tokens, without headers
shards() { for shard; do tail -c +1025 "$shard"; done; }

# ---- the parts together are what one process writes ----

cut="--max-seconds 1"
"$tokenize" speech $cut --fit 20 --kmeans one.npy -o one.jsonl >one.out 2>one.err
km="--kmeans one.npy"
check '2 ranks' ends 3 on 2 "$tokenize" speech $cut $km -o 2.jsonl
check '2 ranks: units' parts 2 2 jsonl
check '2 ranks: skipped files' parts 2 2 jsonl.failed
check '2 ranks: skipped files are reported' sh -c "grep -h skipped said.err | sort >two.err; sort -u one.err | cmp two.err -"
check '3 ranks' ends 3 on 3 "$tokenize" speech $cut $km -o 3.jsonl
check '3 ranks: units' parts 3 3 jsonl
check '--part 2/3 is rank 1 of 3' ends 0 "$tokenize" speech $cut $km --part 2/3 -o part.jsonl
check '--part 2/3: the same file' cmp part-00002-of-00003.jsonl 3-00002-of-00003.jsonl
check '--fit is for one process' ends 2 on 2 "$tokenize" speech --fit 20 --kmeans 2.npy
check '--fit: reported once' once '--fit: expected one process'
check '--part with ranks' ends 2 on 2 "$tokenize" speech $km --part 1/2 -o x.jsonl

sound 1.wav 5 9000
sound 2.wav 7 9000
"$tokenize" 1.wav 2.wav $km --shard-tokens 2 -o one.bin >/dev/null
check 'more ranks than files' ends 0 on 4 "$tokenize" 1.wav 2.wav $km --shard-tokens 2 -o few.bin
shards one-00001.bin one.bin >one.tokens
shards few-*.bin >few.tokens
check 'more ranks than files: the tokens' cmp one.tokens few.tokens
check 'more ranks than files: nothing else' none few*.bin.*
"$tokenize" --text pairs.tsv --tts 'cat {text}' --max-repetition 0 $km -o one.pairs.jsonl >/dev/null
check 'pairs of text' ends 0 on 3 "$tokenize" --text pairs.tsv --tts 'cat {text}' --max-repetition 0 $km -o 3.pairs.jsonl
check 'pairs of text: the lines' sh -c 'cat 3.pairs-*.jsonl | cmp one.pairs.jsonl -'
"$tokenize" one.jsonl --audio-repr -o one.repr.jsonl >/dev/null
check 'units to another format' ends 0 on 3 "$tokenize" one.jsonl --audio-repr -o 3.repr.jsonl
check 'units to another format: the lines' sh -c 'cat 3.repr-*.jsonl | cmp one.repr.jsonl -'
hubert="--hubert $root/test/fixtures/hubert/mhubert --layer 2"
"$tokenize" speech $hubert $cut --fit 20 --kmeans one.hubert.npy -o one.hubert.jsonl >/dev/null 2>&1
check 'HuBERT' ends 3 on 3 "$tokenize" speech $hubert $cut --kmeans one.hubert.npy -o 3.hubert.jsonl
check 'HuBERT: units' sh -c 'cat 3.hubert-*.jsonl | cmp one.hubert.jsonl -'

# ---- one rank fails ----

mkdir in.0 in.1
cp one.npy one.json in.0
cp -r speech in.0
ln -s ../speech in.1/speech
check 'a rank that does not see the centroids' ends 1 on 2 ./each "$tokenize" speech --kmeans one.npy -o x.bin
check 'its message' once 'rank 1: .*one\.'
rm -r in.0 in.1
check 'a folder that does not exist' ends 1 on 2 "$tokenize" speech $km -o nowhere/x.bin
check 'its message' grep -q 'nowhere/x-0000[12]-of-00002.bin.failed: cannot be written' said.err

# ---- kills and signals: the same call resumes ----

voice="sh -c '[ ! -f slow ] || sleep 0.35; exec cat \"\$0\"' {text}"
for i in 1 2 3 4 5 6 7 8 9 10; do cat stories.txt; done >more.txt
"$tokenize" --text more.txt --tts "$voice" $km -o one.more.bin >/dev/null
touch slow
for way in 'KILL 1 any' 'TERM 1 0' 'KILL 0 any'; do
    set -- $way
    before=$(cat 3.more-00002-of-00003.bin.journal 2>/dev/null)
    starts 3 "$tokenize" --text more.txt --tts "$voice" $km -o 3.more.bin
    for i in $(seq 200); do # until something is done
        [ "$(cat 3.more-00002-of-00003.bin.journal 2>/dev/null)" = "$before" ] || break
        sleep 0.05
    done
    if [ "$1" = TERM ]; then kill -TERM "$(cat pid.0)" "$(cat pid.2)"; fi # as mpirun does, to every rank
    check "$1 to rank $2 of 3" stops "$1" "$2" "$3"
    [ "$1" = KILL ] || check "$1: says how to resume" grep -q 'stopped  after [0-9]* of [0-9]* lines' said.out
done
rm slow
check 'the same call resumes' ends 0 on 3 "$tokenize" --text more.txt --tts "$voice" $km -o 3.more.bin
check 'from where it was' grep -q '([0-9]* of them before)' said.out
shards one.more.bin >one.tokens
shards 3.more-*.bin >more.tokens
check 'to the same tokens' cmp one.tokens more.tokens
check 'and leaves nothing else' none 3.more*.bin.*
"$tokenize" long --fit 4000 --kmeans long.npy >said.out 2>said.err &
process=$!
sleep 0.5
kill -TERM $process
wait $process
check 'TERM in a fit' grep -q 'stopped  before the centroids were found' said.out
check 'TERM in a fit: nothing is left' none long.npy* long.json*
end
