# What the tests of several ranks share; sourced by them. `on N COMMAND...` runs COMMAND as N ranks of a thread each. Without MPI the
# test that sources this is skipped. Each `ok`, `fail`, `check` counts; `end` closes.
root=$(cd "$(dirname "$0")/.." && pwd)
passed=0 failed=0
ok() {
    echo "ok $1"
    passed=$((passed + 1))
}
fail() {
    echo "FAIL $1: $2"
    failed=$((failed + 1))
}
end() {
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
}
# check NAME COMMAND...: ok where the command succeeds
check() {
    check_name=$1
    shift
    if "$@" >check.out 2>&1; then ok "$check_name"; else fail "$check_name" "$(tail -n 3 check.out | tr '\n' ' ')"; fi
}
on() {
    on_ranks=$1
    shift
    # more ranks than cores here; each thread by itself; a machine without a network; nobody needs a second to die
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_btl=self,vader OMPI_MCA_odls_base_sigkill_timeout=0 \
        OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "$MPIRUN" -np "$on_ranks" "$@"
}
folder=${TEST_FOLDER:-$(mktemp -d)} || exit 1
trap 'cd / && rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cd "$folder" || exit 1
export CUDA_VISIBLE_DEVICES= # numbers are compared with those of the CPU
export ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" # MPI's own
if [ ! "$MPIRUN" ] || ! on 2 true >/dev/null 2>&1; then
    echo "skip ranks: no MPI"
    end
fi
