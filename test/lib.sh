# lib.sh - what the tests that are scripts share: ok, fail and skip print a test's result; end prints the sum and ends the script.
passed=0 failed=0
ok() {
    echo "ok $1"
    passed=$((passed + 1))
}
fail() {
    echo "FAIL $1: $2"
    failed=$((failed + 1))
}
skip() { echo "skip $1: $2"; }
# check NAME COMMAND...: ok where the command succeeds
check() {
    check_name=$1
    shift
    if "$@" >check.out 2>&1; then ok "$check_name"; else fail "$check_name" "$(tail -n 3 check.out | tr '\n' ' ')"; fi
}
# refuses NAME STATUS PATTERN COMMAND...: the command ends with this status and one sentence on stderr that has the pattern
refuses() {
    refuse_name=$1 refuse_status=$2 refuse_pattern=$3
    shift 3
    "$@" >refuse.out 2>refuse.err </dev/null
    refuse_got=$?
    if [ $refuse_got -eq "$refuse_status" ] && head -n 1 refuse.err | grep -q "error: .*$refuse_pattern"; then ok "$refuse_name"; else
        fail "$refuse_name" "status $refuse_got, expected $refuse_status and '$refuse_pattern': $(head -n 1 refuse.err)"
    fi
}
end() {
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
}
