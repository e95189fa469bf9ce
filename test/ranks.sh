# What the tests of several ranks share; sourced by them. `on N COMMAND...` runs COMMAND as N ranks of a thread each. Without MPI the
# test that sources this is skipped. Each `ok`, `fail`, `check` counts; `end` closes.
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/test/lib.sh"
on() {
    on_ranks=$1
    shift
    # more ranks than cores here, which share them; a machine without a network; nobody needs a second to die
    OMPI_MCA_mpi_yield_when_idle=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_btl=self,vader \
        OMPI_MCA_odls_base_sigkill_timeout=0 "$MPIRUN" -np "$on_ranks" "$@"
}
# ends STATUS COMMAND...: ends so, within ten seconds; what it says goes to said.out and said.err
ends() {
    ends_status=$1 ends_began=$(date +%s)
    shift
    "$@" >said.out 2>said.err
    ends_got=$?
    ends_took=$(($(date +%s) - ends_began))
    [ $ends_got -eq "$ends_status" ] && [ $ends_took -le 10 ] && return
    echo "status $ends_got after $ends_took s: $(grep error: said.err | head -n 1)"
    return 1
}
# once PATTERN: one line of said.err is an error of a program's, and has it
once() {
    [ "$(grep -c '^[a-z]*: error:' said.err)" = 1 ] && grep -q "^[a-z]*: error: $1" said.err && return
    grep 'error:' said.err
    return 1
}
# none FILE...: there are no such files
none() {
    for none_file; do
        [ ! -e "$none_file" ] || { echo "$none_file is there" && return 1; }
    done
}
# starts N COMMAND...: by N ranks, beside this script; each leaves its process in pid.RANK
starts() {
    starts_n=$1
    shift
    rm -f pid.*
    on "$starts_n" ./each "$@" >said.out 2>said.err &
    process=$!
    for starts_i in $(seq 100); do
        [ "$(cat pid.* 2>/dev/null | wc -l)" -lt "$starts_n" ] || break
        sleep 0.05
    done
}
# stops SIGNAL RANK STATUS: that rank gets it, all end within ten seconds, with that status (any: not 0)
stops() {
    kill "-$1" "$(cat "pid.$2")" || return 1
    stops_began=$(date +%s)
    wait $process
    stops_got=$?
    if [ "$3" = any ]; then [ $stops_got -ne 0 ]; else [ $stops_got -eq "$3" ]; fi || {
        echo "status $stops_got"
        return 1
    }
    for stops_pid in $(cat pid.*); do
        while kill -0 "$stops_pid" 2>/dev/null && [ $(($(date +%s) - stops_began)) -le 10 ]; do sleep 0.1; done
    done
    [ $(($(date +%s) - stops_began)) -le 10 ] || {
        echo "took $(($(date +%s) - stops_began)) s"
        return 1
    }
}
folder=${TEST_FOLDER:-$(mktemp -d)} || exit 1
trap 'cd / && rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cd "$folder" || exit 1
# each COMMAND...: as one rank of it; leaves its process in pid.RANK, has bin.RANK first in PATH, and runs in the folder of its own in.RANK
# where there are such
cat >each <<'END'
#!/bin/sh
rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
echo $$ >pid.$rank
[ ! -d bin.$rank ] || PATH=$PWD/bin.$rank:$PATH
[ ! -d in.$rank ] || cd in.$rank
exec "$@"
END
chmod +x each
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
export CUDA_VISIBLE_DEVICES= # numbers are compared with those of the CPU
export ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" # MPI's own
if [ ! "$MPIRUN" ] || ! on 2 true >/dev/null 2>&1; then
    echo "skip ranks: no MPI"
    end
fi
