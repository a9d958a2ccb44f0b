#!/usr/bin/env bash
# Tests on a CUDA device under compute-sanitizer: a process for each test, several at a time.
set -uo pipefail
usage() {
    cat <<'END'
usage: kernels/sanitize.sh [OPTION...] TOOLS PROGRAM [FILTER...]

TOOLS    memcheck (accesses out of bounds or misaligned), initcheck (reads of memory that nothing wrote,
         products computed without the library), racecheck (hazards in shared memory), synccheck (barriers
         used wrongly); several as a,b, or all
PROGRAM  a test program that cargo built; `cargo test -p ops --no-run` says where it is. It need not have
         been built on this machine.
FILTER   only tests whose names contain one of these, such as mla:: ; all where there is none

  -j JOBS     processes at a time (8)
  -s SECONDS  that a test may take (300)
  -t SECONDS  for all tests of a tool; those that get no time are counted as failed (no limit)
  -x WORDS    not tests whose names contain one of these, separated by commas
  -k WORDS    look only at kernels whose names contain one of these, separated by commas; others run at full
              speed, and what they wrote is unknown to initcheck
  -n LAUNCHES look only at so many launches of each test, the first ones. Racecheck (2025.3.1) ends with an
              illegal address where it passes over a launch of clusters, be it by -k or by -n
  -o FOLDER   keep what the tests printed in FOLDER, a file TOOL/TEST each
  -c FOLDER   cubins of the build (target/*/build/ops-*/out), to name the instruction at each place

With TOKENMILL_TEST_SMALL=1 in the environment tests that would take minutes do a part of what they do.

Prints what failed, and for each tool how many tests ran, how many reports there were, and from which places
(a kernel and an offset in it), the most frequent first. Fails where a test fails or takes too long, and where
there is a report that sanitize.known, beside this file, gives no reason for.
END
}
jobs=8 seconds=300 total=1000000 skip= folder= cubins= only=
while getopts j:s:t:x:k:n:o:c:h option; do
    case $option in
    j) jobs=$OPTARG ;;
    s) seconds=$OPTARG ;;
    t) total=$OPTARG ;;
    x) skip=$OPTARG ;;
    k) only+=" --kernel-name kns=${OPTARG//,/ --kernel-name kns=}" ;;
    n) only+=" --launch-count $OPTARG" ;;
    o) folder=$OPTARG ;;
    c) cubins=$OPTARG ;;
    h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || { usage >&2 && exit 2; }
tools=${1/all/memcheck,initcheck,racecheck,synccheck}
program=$(realpath "$2")
known=$(dirname "$0")/sanitize.known
shift 2
[ -n "$folder" ] || { folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT; }

names() { # of the tests that are wanted
    for filter in "${@:-}"; do "$program" --list --format terse "$filter" 2>/dev/null; done |
        sed -n 's/: test$//p' | sort -u | { if [ -n "$skip" ]; then grep -vE "${skip//,/|}"; else cat; fi; }
}

one() { # TOOL TEST: its output goes to a file, its status behind it
    local log=$folder/$1/${2//::/.}
    # The program looks at the result of every call itself, and provokes errors in tests of that.
    local flags=(--tool "$1" --print-limit 50 --report-api-errors no --error-exitcode 86)
    # shellcheck disable=SC2206 # words, none with a space in it
    flags+=($only)
    # What a copy in bulk from shared memory writes is unknown to initcheck, and the library for products
    # stores so: without it kernels of the program compute them. Tests of the library itself skip then.
    local how=()
    [ "$1" = initcheck ] && how=(env -u TOKENMILL_REQUIRE "LD_LIBRARY_PATH=$hidden:${LD_LIBRARY_PATH:-}")
    local left=$((deadline - $(date +%s)))
    left=$((left < seconds ? left : seconds))
    [ "$left" -gt 0 ] || { echo "status 124" >"$log" && return; }
    timeout -k 5 "$left" "${how[@]}" compute-sanitizer "${flags[@]}" \
        "$program" --exact "$2" --test-threads 1 --nocapture >"$log" 2>&1
    echo "status $?" >>"$log"
}

places() { # FILE...: each report with the places it names, and how often it comes
    awk -v sass="$folder/sass" '
        function flush(  text, at, done) {
            text = head
            while (match(text, /[A-Za-z_][A-Za-z_0-9]*\+0x[0-9a-f]+/)) {
                at = substr(text, RSTART, RLENGTH)
                done = done substr(text, 1, RSTART + RLENGTH - 1) (at in code ? " (" code[at] ")" : "")
                text = substr(text, RSTART + RLENGTH)
            }
            if (head) print done text
            head = ""
        }
        BEGIN { FS = "\t"; while ((getline < sass) > 0) code[$1] = $2 }
        FNR == 1 { flush() }
        /^=========( COMPUTE-SANITIZER|.*SUMMARY|.* Frame)/ || /terminated before first/ { next }
        /^========= [A-Z]/ { flush(); head = substr($0, 11); next }
        head && /^=========     (at|and) .*\+0x/ { head = head " " substr($0, 15) }
        END { flush() }' "$@" |
        sed -E 's/ *\[[0-9]+ hazards?\]//g; s/ in block \([0-9,]+\)//g; s/0x[0-9a-f]{7,}/an address/g' |
        sort | uniq -c | sort -rn
}

mkdir -p "$folder" && : >"$folder/sass"
for cubin in ${cubins:+"$cubins"/*.cubin}; do
    cuobjdump -sass "$cubin" | sed -nE 's/^\s*Function : (\w+).*/\1/p; s/^\s*\/\*([0-9a-f]{4,})\*\/\s+(@\S+ )?([A-Z0-9_.]+).*/+0x\1\t\3/p' |
        awk '/^\+/ { sub(/0x0*/, "0x"); print name $0; next } { name = $0 }'
done >>"$folder/sass"

told() { # TOOL: of places, each with the reason where there is one; fails where one has none
    awk -F '\t' -v tool="$1" '
        FNR == NR { if ($1 == tool) reason[$2] = $3; next }
        {
            print
            report = $0
            sub(/^ *[0-9]+ /, "", report)
            for (pattern in reason) if (report ~ pattern) { print "        known: " reason[pattern]; next }
            open = 1
        }
        END { exit open }' "$known" -
}

# Files of its name that are no library.
mkdir -p "$folder/hidden"
hidden=$(realpath "$folder/hidden")
touch "$hidden"/libcublasLt.so{,.13}

export -f one
export program folder seconds deadline only hidden
failed=0
for tool in ${tools//,/ }; do
    mkdir -p "$folder/$tool"
    began=$SECONDS
    deadline=$(($(date +%s) + total))
    names "$@" | xargs -r -P "$jobs" -I{} bash -c 'one "$@"' _ "$tool" {}
    logs=("$folder/$tool"/*)
    [ -e "${logs[0]}" ] || { echo "$tool: no test has such a name" >&2 && exit 2; }
    # Some tests touch no device, for which the tool has a status of its own.
    idle=$(grep -l 'terminated before first instrumented API call' "${logs[@]}")
    bad=$(grep -LxE 'status (0|86)|.* status (0|86)' "${logs[@]}" | grep -vxF "${idle:-none}")
    for log in $bad; do
        echo "FAILED under $tool: ${log##*/}, $(tail -n 1 "$log" | grep -o 'status.*')"
        grep -a -A 2 'panicked at' "$log"
    done
    reports=$(sed -nE 's/^========= (ERROR|RACECHECK) SUMMARY: ([0-9]+) .*/\2/p' "${logs[@]}" |
        awk '{ sum += $1 } END { print sum + 0 }')
    printf '%s: %d tests, %d of them without a device, %d failed, %d reports, %d s\n' \
        "$tool" "${#logs[@]}" "$(wc -w <<<"$idle")" "$(wc -w <<<"$bad")" "$reports" $((SECONDS - began))
    places "${logs[@]}" | told "$tool" && [ -z "$bad" ] || failed=1
done
exit $failed
