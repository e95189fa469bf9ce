# lib.sh - what the tests that are scripts share: ok, fail and skip print a test's result, end the sum, and ends the script.
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
end() {
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
}
