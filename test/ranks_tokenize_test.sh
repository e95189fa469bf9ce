#!/bin/sh
# test/ranks_tokenize_test.sh: tokenize on several ranks writes the bytes of one process, however it was stopped in between.
# Prints as test/programs.sh does.

. "$(dirname "$0")/ranks.sh"
tokenize=$root/tokenize

# ---- sounds: bytes of slam.h ----

. "$root/test/wave.sh"
# sound PATH FROM BYTES
sound() { { wave 1 1 8000 16 "$3" && tail -c +"$2" noise | head -c "$3"; } >"$1"; }
for i in 1 2 3 4 5 6 7 8 9; do cat "$root/slam.h"; done >noise
mkdir speech long
for i in 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29; do sound speech/$i.wav $((i * 997)) $((i * 900)); done
: >speech/16b.wav
: >speech/25b.wav
sound long/1.wav 1 6400000
ls speech/??.wav >stories.txt
ls speech/??.wav | paste -d '\t' - - - | head -n 6 >pairs.tsv

# ---- helpers ----

# same_files NAME ENDINGS: one.ENDING and NAME.ENDING are the same
same_files() {
    for same_end in $2; do cmp "one.$same_end" "$1.$same_end" || return 1; done
}

# ---- the bytes of one process ----

cut="--max-seconds 1"
"$tokenize" speech $cut --fit 20 --kmeans one.npy -o one.jsonl >one.out 2>one.err
check '2 ranks' ends 3 on 2 "$tokenize" speech $cut --fit 20 --kmeans 2.npy -o 2.jsonl
check '2 ranks: centroids, units, what was left out' same_files 2 'npy json jsonl jsonl.failed'
check '2 ranks: left out is told as by one' sh -c "grep 'left out' said.err | cmp - one.err"
check '3 ranks, and a fit that is there' ends 3 on 3 "$tokenize" speech $cut --fit 20 --kmeans 2.npy -o 3.jsonl
check '3 ranks: units, what was left out' same_files 3 'jsonl jsonl.failed'
check '3 ranks: the fit is known' grep -q 'was made by this command before' said.out

km="--kmeans one.npy"
sound 1.wav 5 9000
sound 2.wav 7 9000
"$tokenize" 1.wav 2.wav $km --shard-tokens 2 -o one.bin >/dev/null
check 'more ranks than files' ends 0 on 4 "$tokenize" 1.wav 2.wav $km --shard-tokens 2 -o few.bin
check 'more ranks than files: the shards' sh -c 'cmp one.bin few.bin && cmp one-00001.bin few-00001.bin'
check 'more ranks than files: nothing else' none few.bin.*
"$tokenize" --text pairs.tsv --tts 'cat {text}' --max-repetition 0 $km -o one.pairs.jsonl >/dev/null
check 'pairs of text' ends 0 on 3 "$tokenize" --text pairs.tsv --tts 'cat {text}' --max-repetition 0 $km -o 3.pairs.jsonl
check 'pairs of text: the lines' same_files 3 pairs.jsonl
"$tokenize" one.jsonl --audio-repr -o one.repr.jsonl >/dev/null
check 'units into another form' ends 0 on 3 "$tokenize" one.jsonl --audio-repr -o 3.repr.jsonl
check 'units into another form: the lines' same_files 3 repr.jsonl
hubert="--hubert $root/test/fixtures/hubert/mhubert --layer 2"
"$tokenize" speech $hubert $cut --fit 20 --kmeans one.hubert.npy -o one.hubert.jsonl >/dev/null 2>&1
check 'HuBERT' ends 3 on 3 "$tokenize" speech $hubert $cut --fit 20 --kmeans 3.hubert.npy -o 3.hubert.jsonl
check 'HuBERT: centroids, units' same_files 3 'hubert.npy hubert.jsonl hubert.jsonl.failed'

# ---- one rank fails ----

mkdir bin.0 bin.2
printf '#!/bin/sh\nexec cat "$1"\n' >bin.0/voice
chmod +x bin.0/voice
cp bin.0/voice bin.2/voice
PATH=$PWD/bin.0:$PATH "$tokenize" --text stories.txt --tts 'voice {text}' $km -o one.told.bin >/dev/null
check 'a rank without the voice ends all' ends 1 on 3 ./each "$tokenize" --text stories.txt --tts 'voice {text}' $km -o 3.told.bin
check 'with its sentence' once 'stories.txt:[0-9]*: voice cannot be started'
cp -r bin.0 bin.1
check 'then the same call goes on' ends 0 on 3 ./each "$tokenize" --text stories.txt --tts 'voice {text}' $km -o 3.told.bin
check 'to the same bytes' same_files 3 told.bin
mkdir in.1
ln -s ../speech in.1/speech
check 'a rank that does not see the centroids' ends 1 on 2 ./each "$tokenize" speech --kmeans one.npy -o x.bin
check 'its sentence' once 'rank 1: .*one\.'
mkdir in.0
cp one.npy one.json in.1
cp one.npy one.json in.0
cp -r speech in.0
rm in.0/speech/12.wav
check 'ranks that see different files' ends 1 on 2 ./each "$tokenize" speech --kmeans one.npy -o x.bin
check 'their sentence' once 'the ranks do not see the same files'
check 'they leave nothing' none in.0/x.bin* in.1/x.bin*
rm -r in.0 in.1
check 'rank 0 cannot write' ends 1 on 2 "$tokenize" speech $km -o nowhere/x.bin
check 'rank 0 cannot write: its sentence' once 'nowhere/x.bin: cannot be written'

# ---- kills and signals: the next call, on any number of ranks, goes on ----

voice="sh -c '[ ! -f slow ] || sleep 0.35; exec cat \"\$0\"' {text}"
for i in 1 2 3 4 5 6 7 8 9 10; do cat stories.txt; done >more.txt
"$tokenize" --text more.txt --tts "$voice" $km -o one.more.bin >/dev/null
touch slow
for way in '3 KILL 1 any' '2 TERM 1 0' '3 KILL 0 any'; do
    set -- $way
    before=$(cat 3.more.bin.journal 2>/dev/null)
    starts $1 "$tokenize" --text more.txt --tts "$voice" $km -o 3.more.bin
    for i in $(seq 200); do # something of its own is done
        [ "$(cat 3.more.bin.journal 2>/dev/null)" = "$before" ] || break
        sleep 0.05
    done
    check "$2 to rank $3 of $1" stops "$2" "$3" "$4"
    [ "$2" = KILL ] || check "$2 to rank $3 of $1: in good order" grep -q 'stopped  after [0-9]* of 200 lines' said.out
done
rm slow
check 'after them the call goes on' ends 0 on 2 "$tokenize" --text more.txt --tts "$voice" $km -o 3.more.bin
check 'from where it was' grep -q '([0-9]* of them before)' said.out
check 'to the same bytes' same_files 3 more.bin
check 'and leaves nothing else' none 3.more.bin.*
starts 2 "$tokenize" long --fit 4000 --kmeans long.npy
sleep 0.5
check 'TERM to rank 1 of a fit' stops TERM 1 0
check 'TERM to rank 1 of a fit: in good order' grep -q 'stopped  before the centroids were found' said.out
check 'TERM to rank 1 of a fit: nothing is left' none long.npy* long.json*
end
