#!/usr/bin/env bash
# What one H200 gives through the whole engine: bench/h200.sh PART [RECORD]
#
# PART: steps, long, prefill, offline (each of both models, or of one as steps:v2 or steps:qwen), http,
# start, kernels, or all. Every part starts servers of its own and takes less than a minute for a model.
# Weights are random, made on the device; or those of CHECKPOINTS/deepseek-v2-lite and CHECKPOINTS/qwen3-8b
# (as `tokenmill model random` writes them), so that another engine can be measured on the same ones.
# The program is target/release/tokenmill, or what TOKENMILL names. Figures are printed as a table at the
# end, beside those of bench/results/peer.json or of the file that PEER names, and appended to RECORD as the
# lines of bench/results; CURVE may name a file for the loads of the sweep, which `tokenmill bench plot` draws.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?usage: bench/h200.sh PART [RECORD]} record=${2:-/dev/null}
program=${TOKENMILL:-target/release/tokenmill}
port=${PORT:-8123}
work=$(mktemp -d)
server=
trap 'stop; rm -rf "$work"' EXIT

stop() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" 2>/dev/null || true; }
    server=
}
folder() { # MODEL: a folder with its config.json, and weights if they are not to be made
    case $1 in
        v2) echo "${CHECKPOINTS:-recipes}/deepseek-v2-lite" ;;
        qwen) echo "${CHECKPOINTS:-recipes}/qwen3-8b" ;;
    esac
}
weights=random
[ -z "${CHECKPOINTS:-}" ] || weights=checkpoint
serve() { # MODEL CONTEXT REQUESTS TOKENS_OF_A_STEP
    stop
    local format=()
    [ $weights = checkpoint ] || format=(--load-format random)
    "$program" serve "$(folder "$1")" "${format[@]}" --device "${DEVICE:-cuda}" --port "$port" \
        --max-model-len "$2" --max-num-seqs "$3" --max-num-batched-tokens "$4" \
        --no-enable-prefix-caching >"$work/log" 2>&1 &
    server=$!
    until curl -sf "http://127.0.0.1:$port/readyz" >/dev/null; do
        kill -0 "$server" 2>/dev/null || { tail -n 20 "$work/log" >&2; server=; return 1; }
        sleep 0.05
    done
}
measure() { # NAME BENCH ARGUMENTS...: a line for each object that it prints
    local name=$1 bench=$2
    shift 2
    "$program" bench "$bench" --url "http://127.0.0.1:$port" --vocab-size 100000 --json "$@" 2>"$work/err" |
        while read -r line; do printf '%s\t%s\t%s\n' "$name" "bench $bench $*" "$line"; done >>"$work/lines" ||
        { echo "$name failed: $(tail -n 2 "$work/err")" >&2; }
}
at_once() { # NAME REQUESTS IN OUT
    measure "$1" serve --num-prompts "$2" --max-concurrency "$2" --input-len "$3" --output-len "$4"
}

steps() { # as the other engine was measured: 128 tokens in, 257 out, a context of 256 on average
    serve "$1" 512 256 2048
    for n in 1 4 16 64 256; do at_once "decode.$1.ctx256.bs$n" "$n" 128 257; done
}
long() { # prompts that lie in a step as a whole, and so many tokens behind them that most steps only decode
    serve "$1" 8400 64 16384
    for n in 1 16 64; do at_once "decode.$1.ctx8192.bs$n" "$n" 8128 128; done
    serve "$1" 33000 16 32768
    for n in 1 16; do at_once "decode.$1.ctx32768.bs$n" "$n" 32700 64; done
}
prefill() {
    serve "$1" 16384 16 16384
    for n in 512 4096 16000; do measure "prefill.$1.1x$n" latency --input-len "$n" --output-len 1 --repeats 3; done
    measure "prefill.$1.16x2048" throughput --num-prompts 16 --input-len 2048 --output-len 1
    measure "prefill.$1.16x2048" throughput --num-prompts 16 --input-len 2048 --output-len 1 --seed 1
}
offline() { # eight prompts of 1,024 beside 512 requests that decode
    serve "$1" 1536 512 8704
    measure "offline.$1.in1024.out256" throughput --num-prompts 512 --input-len 1024 --output-len 256
    measure "offline.$1.in256.out512" throughput --num-prompts 512 --input-len 256 --output-len 512 --seed 1
}
http() { # two prompts of 1,024 beside 256 requests that decode
    serve v2 4096 256 2304
    measure http.v2.in1024.out256 serve --input-len 1024 --output-len 256 --max-concurrency 1,4,16,64,256 \
        ${CURVE:+--record "$CURVE"}
}
start() {
    serve v2 4096 256 2048
    measure start.v2 serve --cold-start --num-prompts 100 --max-concurrency 16 --input-len 1024 --output-len 16
    curl -sf "http://127.0.0.1:$port/metrics" | sed -n 's/^tokenmill_startup_seconds{.*phase="\([a-z_]*\)".*} /\1 /p' |
        while read -r phase seconds; do printf 'startup.v2.%s.%s\tserve\t{"seconds": %s}\n' $weights "$phase" "$seconds"; done >>"$work/lines"
}
kernels() { "$program" bench kernels --record "$record"; }

: >"$work/lines"
run() { # PART[:MODEL]
    local models=${1#*:}
    case $1 in
        *:*) "${1%:*}" "$models" ;;
        http | start | kernels) "$1" ;;
        steps | long | prefill | offline) "$1" v2 && "$1" qwen ;;
        all) for each in start steps long prefill offline http kernels; do run "$each"; done ;;
        *) echo "no part is called $1" >&2; exit 2 ;;
    esac
}
run "$part"
stop
"${PYTHON:-python3}" bench/h200.py "$work/lines" "$record" "$("$program" --version)" "${PEER:-bench/results/peer.json}"
