#!/bin/sh
# slam.h keeps its structure (test/house.sh), and house.sh finds what it is for in copies with one fault each.
cd "$(dirname "$0")/.." || exit 1
. test/lib.sh
folder=${TEST_FOLDER:-$(mktemp -d)}
if said=$(sh test/house.sh 2>&1); then ok 'house: slam.h'; else fail 'house: slam.h' "$(echo "$said" | grep '^slam.h:' | head -n 5)"; fi
fault() { # fault NAME SED_SCRIPT
    sed "$2" slam.h >"$folder/fault.h"
    if cmp -s slam.h "$folder/fault.h"; then fail "house: $1" 'the fault was not planted'
    elif sh test/house.sh "$folder/fault.h" >/dev/null 2>&1; then fail "house: $1" 'not found'
    else ok "house: $1"; fi
}
fault 'CUDA in section 7' '/SECTION 7\./a static void f(void) { cudaFree(0); }'
fault 'MPI in section 8' '/SECTION 8\./a static void f(void) { MPI_Barrier(0); }'
fault 'a public name without slam_' 's/^double slam_clock(void);/double clock_now(void);/'
fault 'a function that is not static' 's/^static int fields_read(/int fields_read(/'
fault 'a long line' '5s/$/                                                                                                     x/'
end
