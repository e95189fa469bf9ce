# Sounds for the test scripts; sourced by them.

# word BYTES NUMBER: little-endian
word() {
    word_n=$2
    for word_i in $(seq "$1"); do
        printf "\\$(printf %03o $((word_n % 256)))"
        word_n=$((word_n / 256))
    done
}
# wave FORMAT CHANNELS RATE BITS BYTES: a WAV header for that much data
wave() {
    printf 'RIFF'
    word 4 $((36 + $5))
    printf 'WAVEfmt '
    word 4 16 && word 2 "$1" && word 2 "$2" && word 4 "$3" && word 4 $(($3 * $2 * $4 / 8)) && word 2 $(($2 * $4 / 8)) && word 2 "$4"
    printf 'data'
    word 4 "$5"
}
