#!/usr/bin/env bash
# Tests on a CUDA device under compute-sanitizer: accesses out of bounds or misaligned (memcheck), reads of
# memory that nothing wrote (initcheck), hazards in shared memory (racecheck).
#
#   kernels/sanitize.sh TOOL SECONDS EXECUTABLE [FILTER...]
#
# EXECUTABLE is a test program that cargo built (`cargo test -p ops --no-run` says where it is); FILTER are
# arguments of it, such as `mla::` or `--skip 64k`. It need not have been built on this machine. Prints the
# tests that ran, every report in full, and a line that counts them; fails where there are any, where a test
# fails, and where time runs out.
set -uo pipefail
tool=$1 seconds=$2 program=$3
shift 3
log=$(mktemp)
trap 'rm -f "$log"' EXIT
case $tool in
memcheck) flags=(--leak-check no) ;;
initcheck) flags=() ;;
racecheck) flags=(--racecheck-report all) ;;
*) echo "tools are memcheck, initcheck and racecheck" >&2 && exit 2 ;;
esac
began=$SECONDS
timeout "$seconds" compute-sanitizer --tool "$tool" "${flags[@]}" --print-limit 20 \
    "$program" --test-threads 1 --nocapture "$@" >"$log" 2>&1
status=$?
grep -E '^test .*(ok|FAILED)$|^SKIPPED|panicked at' "$log"
grep -E '^=========' "$log" | grep -vE 'COMPUTE-SANITIZER|Host Frame|^========= *$|Saved host backtrace'
tests=$(grep -cE '^test .*ok$' "$log")
reports=$(grep -cE '^========= (Invalid|Uninitialized|Error|Race|Warning: Race|Program hit|.*hazard)' "$log")
printf '%s: %d tests passed, %d reports, %d s, status %d\n' \
    "$tool" "$tests" "$reports" $((SECONDS - began)) "$status"
[ "$status" = 0 ] && [ "$reports" = 0 ]
