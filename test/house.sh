#!/bin/sh
# house.sh [slam.h]: checks the structure of slam.h and prints its sections with their lines and bytes. Declare-before-use and
# -Wmissing-declarations check the order of definitions; this checks what a compiler does not.
cd "$(dirname "$0")/.." || exit 1
file=${1:-slam.h}
awk -v file="$file" '
    function wrong(text) { print file ":" NR ": " text; bad = 1 }
    { code = $0; gsub(/"([^"\\]|\\.)*"/, "\"\"", code); sub(/\/\/.*/, "", code); gsub(/\/\*[^*]*\*\//, "", code) }
    /^ +[0-9]+\. [A-Z]/ && !implementation { listed[++n_listed] = $1 + 0 }
    /^#ifdef SLAM_IMPLEMENTATION/ { implementation = 1; lines["public"] = NR }
    /^   SECTION [0-9]+\./ {
        section = $2 + 0
        title[section] = $0
        if (section <= last) wrong("section " section " after section " last)
        last = section
    }
    implementation { lines[section]++; bytes[section] += length($0) + 1 }
    !implementation { bytes["public"] += length($0) + 1 }
    length($0) > 120 { wrong(length($0) " columns, expected at most 120") }
    code ~ /[^a-z_](cuda[A-Z]|cublas)[A-Za-z]*\(|__global__|__device__/ && section != 5 { wrong("CUDA outside section 5: " $0) }
    code ~ /(MPI_[A-Z][a-z_]+|nccl[A-Z][A-Za-z]*) *\(/ && section != 6 { wrong("MPI or NCCL outside section 6: " $0) }
    !implementation && /^[a-z].*\(.*\);/ && $0 !~ /^typedef/ && $0 !~ /[ *]slam_[a-z0-9_]*\(/ { wrong("a public name without slam_: " $0) }
    implementation && /^[a-z][a-z_ ]* \**[a-z0-9_]+\(.*\{$/ && !/^static/ && !/[ *]slam_[a-z0-9_]*\(/ { wrong("neither static nor slam_: " $0) }
    END {
        for (i = 1; i <= n_listed; i++) if (listed[i] != 3 && !(listed[i] in title)) { NR = 0; wrong("section " listed[i] " is in the contents only") }
        printf "%6d lines %7d bytes   public part\n", lines["public"], bytes["public"]
        for (i = 1; i <= last; i++) if (i in title) printf "%6d lines %7d bytes %s\n", lines[i], bytes[i], title[i]
        exit bad
    }' "$file"
