# programs_lib.sh [FOLDER]: what the scripts programs_*.sh share; FOLDER holds the programs (default: the repository). A model of
# 22,000 parameters keeps every run under a second or two.
root=$(cd "$(dirname "$0")/.." && pwd)
programs=$(cd "${1:-$root}" && pwd) || exit 1
train=$programs/train eval=$programs/eval tokenize=$programs/tokenize dpo=$programs/dpo
folder=${TEST_FOLDER:-$(mktemp -d)} || exit 1
mounted=
cleanup() {
    cd /
    for mount in $mounted; do umount "$mount"; done
    rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM
cd "$folder" || exit 1
export CUDA_VISIBLE_DEVICES= # no GPU: numbers are compared with those of the CPU
. "$root/test/lib.sh"
# check NAME WHY COMMAND...: ok where the command succeeds
check() {
    check_name=$1 check_why=$2
    shift 2
    if "$@" >check.out 2>&1; then ok "$check_name"; else fail "$check_name" "$check_why; $(tail -n 1 check.out)"; fi
}
# timeless LOG: a log without what a clock has to do with
timeless() { sed 's/, "seconds".*//' "$1"; }
same_logs() {
    timeless "$1/log.jsonl" >same.1
    timeless "$2/log.jsonl" >same.2
    cmp same.1 same.2
}
same_weights() { cmp "$1/latest/model.safetensors" "$2/latest/model.safetensors" && cmp "$1/latest/optimizer.safetensors" "$2/latest/optimizer.safetensors"; }
same_runs() { same_logs "$1" "$2" && same_weights "$1" "$2"; }
# each_step RUN N: the log has steps 1 to N, each once and in order
each_step() { grep '"loss"' "$1/log.jsonl" | awk -v n="$2" '{ gsub(",", ""); if ($2 != NR) bad = 1 } END { if (bad || NR != n) { print NR " steps"; exit 1 } }'; }
# halt_at_step PROCESS RUN N: waits until the log has N steps, then halts the process; fails where it has ended before
halt_at_step() {
    while ! grep -q "\"step\": $3," "$2/log.jsonl" 2>/dev/null; do kill -0 "$1" 2>/dev/null && sleep 0.01 || return 1; done
    kill -STOP "$1"
}

# mount_at FOLDER OPTIONS: a file system in memory, until the script ends; fails where that is not allowed
mount_at() {
    mkdir -p "$1"
    [ "$(id -u)" = 0 ] && mount -t tmpfs -o "$2" tmpfs "$1" 2>/dev/null && mounted="$mounted $folder/$1"
}
# unwritable NAME FLAG COMMAND...: FLAG with a path that cannot be written is refused before the work (no line of a plan on stdout), with the system's reason
unwritable() {
    unwritable_name=$1 unwritable_flag=$2
    shift 2
    for unwritable_case in 'a.jsonl/x|Not a directory' '/proc/x|No such file' 'readonly/x|Read-only file system' 'fulldisk/x|No space left'; do
        unwritable_path=${unwritable_case%|*}
        case $unwritable_path in readonly* | fulldisk*) [ "$may_mount" ] || continue ;; /proc*) [ -d /proc/self ] || continue ;; esac
        refuses "$unwritable_name, $unwritable_path" 1 "$unwritable_path.*cannot be written.*${unwritable_case#*|}" "$@" "$unwritable_flag" "$unwritable_path"
        check "$unwritable_name, $unwritable_path: before the work" 'work' sh -c '! grep -q "^data\|^model" refuse.out'
    done
}

# ---- data: documents of a small grammar, as unit files and as a token shard ----

# units SEED DOCUMENTS
units() {
    awk -v seed="$1" -v documents="$2" 'function draw(n) { seed = (seed * 16807) % 2147483647; return seed % n }
    BEGIN { for (i = 0; i < 5; i++) draw(2); for (d = 0; d < documents; d++) {
        printf "{\"units\": ["; n = 20 + draw(60); u = draw(100)
        for (i = 0; i < n; i++) { printf "%s%d", i ? ", " : "", u; u = draw(4) ? (u * 7 + 3) % 100 : draw(100) }
        printf "], \"file_name\": \"%d\"}\n", d } }'
}
# shard V TOKEN...: llm.c's layout, the vocabulary in header word 3
shard() {
    shard_v=$1
    shift
    shard_text=$(for word in 20240520 1 $# "$shard_v"; do printf '\\%03o\\%03o\\%03o\\%03o' $((word % 256)) $((word / 256 % 256)) $((word / 65536 % 256)) $((word / 16777216)); done)
    printf "$shard_text"
    head -c 1008 /dev/zero
    for token in "$@"; do shard_text=$(printf '\\%03o\\%03o' $((token % 256)) $((token / 256))) && printf "$shard_text"; done
}
units 1 300 >a.jsonl
may_mount=
if mount_at readonly size=1m && mount -o remount,ro "$folder/readonly" && mount_at fulldisk size=4k && head -c 4096 /dev/zero >fulldisk/all; then may_mount=1; fi
units 2 100 >b.jsonl
units 3 20 >v.jsonl
shard 102 1 5 6 7 8 9 10 1 1 11 12 13 14 15 1 >small.bin
shard 102 1 5 6 7 300 9 10 1 >stray.bin
cat >model.json <<'J'
{"model_type": "qwen2", "vocab_size": 102, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
 "intermediate_size": 64, "max_position_embeddings": 256, "tie_word_embeddings": true}
J
start="--context 64 --batch 4 --lr 5e-3 --warmup 5 --threads 1"
few="$start --model model.json"
