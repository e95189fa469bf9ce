#!/bin/sh
# Make the bundled corpus anew: stories.py -> espeak-ng -> tokenize -> train.bin, val.bin, km.npy, km.json; and what sets.py
# makes, with those units: preference pairs and test sets.
# It needs python3 and espeak-ng (apt-get install espeak-ng), a `make tokenize`, and about 1.2 GB in the temporary folder.
#
#   sh make.sh [NAME=VALUE ...]
#
#   TRAIN=2000      training stories                 VAL=84          validation stories
#   SEED=0          other stories by another number  UNITS=100       k-means units; the vocabulary is two more
#   VOICES="..."    espeak-ng voices                 SPEEDS="..."    words a minute
#   FIT=4           every FIT-th training story is heard by the k-means fit
#   JOBS=2          programs at a time               OUT=.           where the files go (this folder)
#   ONLY=           sets: only pairs and test sets, with the km.npy that is in OUT
#   WORK=           a folder for texts and sound that is kept; none: a temporary one
#   TOKENIZE=...    the tokenizer, ../../tokenize
#
# One voice and one speed tell a story; they go round, so that each voice tells at each speed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
TRAIN=2000 VAL=84 SEED=0 UNITS=100 FIT=4 JOBS=2 OUT=$here ONLY= WORK= TOKENIZE=$here/../../tokenize
VOICES="en-us en-gb en-us+m1 en-gb+m3 en-us+f2 en-us+f4"
SPEEDS="155 165 175"
for setting in "$@"; do
    case $setting in
        TRAIN=*|VAL=*|SEED=*|UNITS=*|VOICES=*|SPEEDS=*|FIT=*|JOBS=*|OUT=*|ONLY=*|WORK=*|TOKENIZE=*) eval "${setting%%=*}=\${setting#*=}" ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

for need in python3 espeak-ng "$TOKENIZE"; do
    command -v "$need" >/dev/null || { echo "make.sh: '$need' is missing" >&2; exit 1; }
done
if [ -z "$WORK" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    trap 'exit 1' INT TERM
fi

# say LIST: .wav beside the .txt of every line "FILE voice speed" of $WORK/LIST.list, and their names in $WORK/LIST.wavs
say() {
    xargs -P "$JOBS" -n 3 sh -c 'espeak-ng -f "$0.txt" -v "$1" -s "$2" -w "$0.wav"' <"$WORK/$1.list"
    sed 's/ .*/.wav/' "$WORK/$1.list" >"$WORK/$1.wavs"
}

# speak SPLIT COUNT: $WORK/SPLIT/00001.txt and .wav, and so on
speak() {
    mkdir -p "$WORK/$1"
    python3 "$here/stories.py" --split "$1" --count "$2" --seed "$SEED" >"$WORK/$1.txt"
    awk -v folder="$WORK/$1" -v voices="$VOICES" -v speeds="$SPEEDS" '
        BEGIN { V = split(voices, voice); S = split(speeds, speed) }
        {
            file = sprintf("%s/%05d", folder, NR)
            print >(file ".txt")
            close(file ".txt")
            print file, voice[(NR - 1) % V + 1], speed[int((NR - 1) / V) % S + 1]
        }' "$WORK/$1.txt" >"$WORK/$1.list"
    say "$1"
}

rm -rf "$WORK/made" "$WORK/sets"
mkdir "$WORK/made"
if [ "$ONLY" = sets ]; then
    cp "$OUT/km.npy" "$OUT/km.json" "$WORK/made"
else
    speak train "$TRAIN"
    speak val "$VAL"
    awk -v every="$FIT" 'NR % every == 1 || every == 1' "$WORK/train.wavs" >"$WORK/fit.wavs"
    "$TOKENIZE" --rate 25 --fit "$UNITS" --kmeans "$WORK/made/km.npy" "@$WORK/fit.wavs"
    "$TOKENIZE" --kmeans "$WORK/made/km.npy" -o "$WORK/made/train.bin" "@$WORK/train.wavs"
    "$TOKENIZE" --kmeans "$WORK/made/km.npy" -o "$WORK/made/val.bin" "@$WORK/val.wavs"
fi
python3 "$here/sets.py" say "$WORK/sets" >"$WORK/sets.list"
say sets
"$TOKENIZE" --kmeans "$WORK/made/km.npy" -o "$WORK/sets/units.jsonl" "@$WORK/sets.wavs"
python3 "$here/sets.py" write "$WORK/sets/units.jsonl" "$WORK/made"
ls -lR "$WORK/made"
cp -R "$WORK/made/." "$OUT"
