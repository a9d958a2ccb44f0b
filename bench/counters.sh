#!/usr/bin/env bash
# Counters of the kernels behind named cases of `tokenmill bench kernels`: bench/counters.sh [NAMES]
#
# NAMES are parts of names, separated by commas, each for all cases that contain it (moe.v2_lite.bs1 for 1,
# 16 and 128 tokens); `tokenmill bench kernels --list` has all. Without them the
# cases that decide how fast models run are read, which takes less than a minute. Each kernel is launched
# once by itself, warm but for the caches, which ncu empties; so times of short kernels are longer than in a graph, where a
# launch begins before the one in front has ended. Needs ncu, and a user who may read counters. The program is
# target/release/tokenmill, or what TOKENMILL names. CSV keeps what ncu said in a file.
set -euo pipefail
cd "$(dirname "$0")/.."
program=${TOKENMILL:-target/release/tokenmill}
names=${1:-linear.chain.100mb.bs1,linear.chain.100mb.bs8,linear.chain.30mb.bs1,linear.chain.30mb.bs8,moe.v2_lite.bs1,moe.v2_lite.bs4,moe.v2_lite.bs256,moe.v2_lite.rows,mla_decode.h16.bs1.ctx1024,attention_block.v2_lite.bs1.,sample.greedy,sample.everything,gqa_decode.h32kv8.bs64.ctx4096,gqa_prefill,mla_prefill.h16.len16384}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
metrics=gpu__time_duration.sum
metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,lts__t_sector_hit_rate.pct
metrics+=,regex:smsp__average_warps_issue_stalled_.*_per_issue_active.ratio
ncu --clock-control none --profile-from-start off --metrics "$metrics" --csv --page raw --print-units base \
    --log-file "$work/csv" "$program" bench kernels --profile --filter "$names" >"$work/cases" 2>"$work/err" ||
    { tail -n 5 "$work/err" "$work/csv" >&2; exit 1; }
[ -z "${CSV:-}" ] || cp "$work/csv" "$CSV"
"${PYTHON:-python3}" bench/counters.py "$work/cases" "$work/csv"
