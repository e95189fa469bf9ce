#!/bin/sh
# tokenize from end to end. Prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why`, and last
# `N passed, N failed`.
. "$(dirname "$0")/programs_lib.sh"

# ---- tokenize: audio, hostile audio ----

. "$programs/test/wave.sh"
# noise FROM BYTES: the same every time
noise() { tail -c +"$1" "$root/slam.h" | head -c "$2"; }
mkdir -p speech/b hostile
for i in $(seq 40); do
    n=$((9000 + i * 602))
    { wave 1 1 8000 16 $n && noise $((i * 997)) $n; } >"speech/$([ $((i % 3)) -gt 0 ] || echo b/)$i.wav"
done
: >hostile/empty.wav
{ wave 1 1 16000 16 64000 && head -c 64000 /dev/zero; } >hostile/silent.wav
{ wave 1 1 16000 16 320 && noise 5 320; } >hostile/10ms.wav
{ wave 3 1 16000 32 4000 && head -c 4000 /dev/zero | tr '\000' '\377'; } >hostile/nan.wav
{ wave 1 1 96000 24 288000 && noise 7 288000; } >hostile/96k.wav
{ wave 1 8 44100 16 160000 && noise 9 160000; } >hostile/8channels.wav
{ wave 1 1 16000 16 64000 && noise 9 30000; } >hostile/short.wav
head -c 30 hostile/short.wav >hostile/header.wav
{ printf 'fLaC' && noise 11 1000; } >hostile/no.flac
{ wave 1 1 16000 16 320 && noise 5 320; } >hostile/locked.wav
ln -s . hostile/loop
ln -s ../hostile hostile/up
ln -s self hostile/self
ln -s nothing.wav hostile/gone.wav
chmod 000 hostile/locked.wav

check 'tokenize --fit' 'status' "$tokenize" speech --fit 20 --kmeans km.npy
check 'tokenize' 'status' "$tokenize" speech --kmeans km.npy -o whole.jsonl
check 'a line for each file' "$(wc -l <whole.jsonl) lines" test "$(wc -l <whole.jsonl)" = 40
check 'the same for any number of threads' 'differ' sh -c "'$tokenize' speech --kmeans km.npy --threads 1 -o single.jsonl && cmp whole.jsonl single.jsonl"
check 'parts of the list in order are the whole' 'differ' sh -c "for i in 1 2 3; do '$tokenize' speech --kmeans km.npy --part \$i/3 -o part.jsonl || exit 1; done
    cat part*-of-00003.jsonl | cmp whole.jsonl -"
check 'units into token shards without the audio' 'differ' sh -c "'$tokenize' speech --kmeans km.npy -o direct.bin && '$tokenize' whole.jsonl --kmeans km.npy -o again.bin && cmp direct.bin again.bin"
check 'and into tokens without the centroids' 'differ' sh -c "'$tokenize' whole.jsonl --audio-repr -o repr.jsonl && '$tokenize' repr.jsonl --kmeans km.npy -o third.bin && cmp direct.bin third.bin"
check 'which train reads' 'status' "$train" $few direct.bin repr.jsonl --steps 1 --out spoken
check 'a long file becomes lines with start and end' 'lines' sh -c "'$tokenize' speech --kmeans km.npy --max-seconds 1 -o parts.jsonl && grep -q '\"start\": 0, \"end\": 0\.[89]' parts.jsonl && test \$(wc -l <parts.jsonl) -gt 60"
"$tokenize" hostile --kmeans km.npy -o hostile.jsonl >hostile.out 2>hostile.err
check 'hostile files end in status 3' "status $?" test $? -eq 3
for name in empty nan short header no gone; do
    check "hostile: $name is skipped with a reason, and listed" 'not said' sh -c "grep -q 'skipped: hostile/$name\.[a-z]*: ' hostile.err && grep -q '^hostile/$name\.' hostile.jsonl.failed"
done
for name in silent 10ms 96k 8channels; do check "hostile: $name has units" 'no line' grep -q "hostile/$name.wav" hostile.jsonl; done
if [ "$(id -u)" = 0 ]; then echo 'skip a file without permission: root may read it'; else
    check 'hostile: no permission' 'not said' grep -q 'skipped: hostile/locked.wav: cannot be opened: Permission' hostile.err
fi
check 'hostile: nothing else fails, loops of links end' "$(wc -l <hostile.jsonl.failed)" test "$(cat hostile.jsonl hostile.jsonl.failed | wc -l)" = 11
chmod 600 hostile/locked.wav
check 'nothing usable' 'status or sentence' sh -c "'$tokenize' hostile/empty.wav --kmeans km.npy -o nothing.jsonl 2>nothing.err; test \$? = 1 && grep -q 'error: none of the 1 files' nothing.err"
refuses 'a folder without audio' 1 'no audio file' sh -c "mkdir -p bare && exec '$tokenize' bare --kmeans km.npy -o nothing2.jsonl"
refuses 'an output that is there' 1 'exists; remove it' "$tokenize" speech --kmeans km.npy -o whole.jsonl
refuses 'tokenize: --part 3/2' 2 'part 3/2' "$tokenize" speech --kmeans km.npy --part 3/2 -o x.bin
refuses 'tokenize: --max-seconds 0.5' 2 'max-seconds' "$tokenize" speech --kmeans km.npy --max-seconds 0.5 -o x.bin
refuses 'tokenize: units with audio' 2 'together' "$tokenize" speech whole.jsonl -o x.bin
refuses 'tokenize: --text without --tts' 2 'tts' "$tokenize" --text x.txt --kmeans km.npy -o x.bin
refuses 'tokenize: --pairs into a shard' 1 'pairs need a name' "$tokenize" --pairs whole.jsonl --kmeans km.npy -o x.bin

# ---- tokenize: lists, notes, channels ----

find speech -name '*.wav' | LC_ALL=C sort >list.txt
check 'a list on stdin' 'differ' sh -c "'$tokenize' - --kmeans km.npy -o listed.jsonl <list.txt && '$tokenize' @list.txt --kmeans km.npy -o listed2.jsonl && cmp listed.jsonl listed2.jsonl && '$tokenize' @- --kmeans km.npy -o listed3.jsonl <list.txt && cmp listed.jsonl listed3.jsonl && test \$(wc -l <listed.jsonl) = 40"
check "fairseq's manifest" 'differ' sh -c "{ echo speech; sed 's|^speech/||; s|\$|\t9000|' list.txt | head -n 9; } >train.tsv && '$tokenize' @train.tsv --kmeans km.npy -o manifest.jsonl && head -n 9 listed.jsonl | cmp manifest.jsonl -"
mkdir mixed && cp speech/1.wav mixed && : >mixed/a.m4a && : >mixed/b.m4a && : >mixed/notes.txt
check 'a note counts what is passed over' 'not said' sh -c "'$tokenize' mixed --kmeans km.npy -o mixed.jsonl 2>mixed.err && grep -q '^tokenize: note: 2 .m4a: not read' mixed.err && test \$(wc -l <mixed.jsonl) = 1"
mkdir stereo
{ wave 1 2 8000 16 64000 && noise 3 64000; } >stereo/2.wav
cp speech/1.wav stereo/1.wav
for channel in mix 1 2; do "$tokenize" stereo/2.wav --channel $channel --kmeans km.npy -o channel_$channel.jsonl >/dev/null 2>channel.err; done
check '--channel: two channels and their mean are three recordings' 'same' sh -c '! cmp -s channel_mix.jsonl channel_1.jsonl && ! cmp -s channel_1.jsonl channel_2.jsonl'
check 'without it, the mean' 'differ' sh -c "'$tokenize' stereo/2.wav --kmeans km.npy -o channel.jsonl && cmp channel.jsonl channel_mix.jsonl"
"$tokenize" stereo --channel 2 --kmeans km.npy -o second.jsonl >/dev/null 2>second.err
check 'a file without the channel is skipped and listed' "status $?" sh -c "test $? = 3 && grep -q 'skipped: stereo/1.wav: channel 2 is to be read, the file has 1' second.err && test \"\$(cat second.jsonl.failed)\" = stereo/1.wav && cmp second.jsonl channel_2.jsonl"
check 'the channel of --fit is kept in km.json' 'differ' sh -c "'$tokenize' stereo/2.wav --channel 2 --fit 4 --kmeans km2.npy && grep -q '\"channel\": 2' km2.json && '$tokenize' stereo/2.wav --kmeans km2.npy -o kept.jsonl && '$tokenize' stereo/2.wav --channel 2 --kmeans km2.npy -o kept2.jsonl && cmp kept.jsonl kept2.jsonl && '$tokenize' stereo/2.wav --channel mix --kmeans km2.npy -o kept3.jsonl && ! cmp -s kept.jsonl kept3.jsonl"
for channel in 0 -1 1.5 left 99999; do refuses "--channel $channel" 1 'expected mix, or a number from 1' "$tokenize" stereo --channel=$channel --kmeans km.npy -o x.bin; done
refuses '--pad without a model' 1 'pad: expected --hubert DIR' "$tokenize" stereo --pad 0 --fit 4 --kmeans kmx.npy

# ---- tokenize: text that is spoken (by cat, the text being a path), pairs ----

ls speech/*.wav speech/b/*.wav >stories.txt
ls speech/*.wav | paste -d '\t' - - - | head -n 8 | awk -F '\t' 'NF == 3' >pairs.tsv
slow="sh -c 'sleep 0.05; exec cat \"\$0\"' {text}"
check '--text' 'status' "$tokenize" --text stories.txt --tts 'cat {text}' --kmeans km.npy -o told.bin
check 'a voice without {text} reads its input' 'differ' sh -c "'$tokenize' --text stories.txt --tts 'xargs cat' --kmeans km.npy -o read.bin && cmp told.bin read.bin"
check 'text that becomes pairs' 'lines' sh -c "'$tokenize' --text pairs.tsv --tts 'cat {text}' --max-repetition 0 --kmeans km.npy -o pairs.jsonl && test \$(wc -l <pairs.jsonl) = \$(wc -l <pairs.tsv)"
awk -F '\t' '{ printf "{\"prompt_path\": \"%s\", \"chosen_path\": \"%s\", \"rejected_path\": \"%s\"}\n", $1, $2, $3 }' pairs.tsv >paths.jsonl
check '--pairs gives the same units' 'differ' sh -c "'$tokenize' --pairs paths.jsonl --kmeans km.npy -o named.jsonl &&
    sed 's/.*\"prompt\": {/{/' pairs.jsonl >pairs.1 && sed 's/.*\"prompt\": {/{/' named.jsonl >pairs.2 && test -s pairs.1 && cmp pairs.1 pairs.2"
refuses 'a voice that is not there' 1 'the voice failed with status 127: .*nosuchvoice' "$tokenize" --text stories.txt --tts 'nosuchvoice {text}' --kmeans km.npy -o voice.bin
check 'leaves nothing' 'leftover' sh -c '! ls voice.bin*'

# ---- tokenize: HuBERT ----

hubert="--hubert $root/test/fixtures/hubert/mhubert --layer 2"
check 'tokenize --hubert --fit' 'status' "$tokenize" speech $hubert --fit 20 --kmeans kmh.npy
check 'km.json knows the model' 'status' "$tokenize" speech --kmeans kmh.npy -o hubert.jsonl
check 'the same for any number of threads and given the model' 'differ' sh -c "'$tokenize' speech $hubert --kmeans kmh.npy --threads 1 -o hubert1.jsonl && cmp hubert.jsonl hubert1.jsonl"
check 'HuBERT: parts of a file, and pairs' 'status' sh -c "'$tokenize' speech --kmeans kmh.npy --max-seconds 1 -o hubert.bin && '$tokenize' --pairs paths.jsonl --kmeans kmh.npy -o hubertpairs.jsonl &&
    test \$(wc -l <hubertpairs.jsonl) = \$(wc -l <pairs.tsv)"
"$tokenize" hostile --kmeans kmh.npy -o hubert_hostile.jsonl >hostile.out 2>hostile.err
check 'HuBERT: what is too short for a frame is skipped' "status $?" sh -c "test $? = 3 && grep -q '10ms.wav: 10.0 ms of audio, too short' hostile.err && grep -q silent.wav hubert_hostile.jsonl"
check '--pad 0 is kept in km.json' 'differ' sh -c "'$tokenize' speech $hubert --pad 0 --fit 20 --kmeans kmp.npy && grep -q '\"pad\": 0' kmp.json && '$tokenize' speech --kmeans kmp.npy -o pad.jsonl && '$tokenize' speech --kmeans kmp.npy --pad 0 -o pad0.jsonl && cmp pad.jsonl pad0.jsonl"
refuses 'another padding than that of the centroids' 1 'made for .*pad 0' "$tokenize" speech --pad 40 --kmeans kmp.npy -o x.bin
refuses 'another layer than that of the centroids' 1 'made for .*layer 2' "$tokenize" speech --hubert "$root/test/fixtures/hubert/mhubert" --layer 1 --kmeans kmh.npy -o x.bin
refuses 'MFCC of centroids of HuBERT' 1 'made for HuBERT features' "$tokenize" speech --features mfcc --kmeans kmh.npy -o x.bin
refuses 'HuBERT with centroids of MFCC' 1 'made for MFCC' "$tokenize" speech $hubert --kmeans km.npy -o x.bin
refuses 'HuBERT without a model' 1 'expected --hubert DIR' "$tokenize" speech --features hubert --fit 20 --kmeans kmx.npy
refuses 'a model that is not there' 1 'nowhere/config.json' "$tokenize" speech --hubert nowhere --fit 20 --kmeans kmx.npy
refuses '--layer without a model' 1 'expected --hubert DIR' "$tokenize" speech --layer 3 --fit 20 --kmeans kmx.npy

# Kills and signals at moments of chance: in the end the bytes of a call that nothing disturbed.
rounds=0 bad=
for moment in $(awk -v seed=$$ 'BEGIN { srand(seed); for (i = 0; i < 60; i++) printf "%.3f ", 0.02 + 0.2 * rand() }'); do
    [ ! -f killed.bin ] || break
    rounds=$((rounds + 1))
    "$tokenize" --text stories.txt --tts "$slow" --kmeans km.npy --threads $((1 + rounds % 2)) -o killed.bin >killed.out 2>killed.err &
    process=$!
    sleep "$moment"
    if [ $((rounds % 3)) = 0 ]; then kill -9 $process 2>/dev/null; else kill -TERM $process 2>/dev/null; fi
    wait $process 2>/dev/null
    [ ! -s killed.err ] || bad=$(head -n 1 killed.err)
done
"$tokenize" --text stories.txt --tts "$slow" --kmeans km.npy -o killed.bin >/dev/null 2>&1
check 'tokenize after kills and signals' "$rounds rounds, $bad" test -z "$bad" -a $rounds -gt 2
check 'tokenize after them: the same bytes' 'differ' cmp told.bin killed.bin
check 'tokenize leaves nothing else' 'leftover' sh -c '! ls killed.bin.*'

mkdir small
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=12k tmpfs small 2>/dev/null; then
    mounted="$mounted $folder/small"
    refuses 'tokenize: a full disk' 1 'No space left' "$tokenize" speech --kmeans km.npy --max-seconds 0 -o small/out.jsonl
    mount -o remount,size=4m "$folder/small"
    check 'tokenize: after a full disk the same call goes on' 'differ' sh -c "'$tokenize' speech --kmeans km.npy --max-seconds 0 -o small/out.jsonl && cmp whole.jsonl small/out.jsonl"
else
    echo 'skip tokenize: a full disk: no small file system can be mounted here'
fi
end
