#!/usr/bin/env bash
# Decode against the memory's read bandwidth, and prefill against OpenBLAS, each pair measured in
# turn on this machine: bench/cpu.sh [rounds]. Needs a release build and a Python with numpy (its
# wheels carry OpenBLAS). Prints one JSON object; the medians are over the rounds.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5}
threads=$(nproc)
program=target/release/tokenmill
work=$(mktemp -d)
trap 'kill "${server:-0}" 2>/dev/null || true; rm -rf "$work"' EXIT

cargo build --release --quiet -p tokenmill
cargo build --release --quiet -p ops --example read_bandwidth
"$program" model random recipes/qwen3-0.6b/config.json --out "$work/model" --dtype bfloat16 >&2
"$program" serve "$work/model" --port 0 --dtype bfloat16 --max-model-len 1024 \
    --no-enable-prefix-caching >"$work/log" 2>&1 &
server=$!
until url=$(grep -om1 'http://127.0.0.1:[0-9]*' "$work/log") &&
    curl -sf "$url/readyz" >/dev/null; do
    kill -0 "$server" || { cat "$work/log" >&2; exit 1; }
    sleep 0.2
done

# One numpy product of the prefill's largest shape: 512 tokens x 1024 by 6144 merged outputs.
sgemm() {
    OPENBLAS_NUM_THREADS=2 "${PYTHON:-python3}" - <<'PY'
import time, numpy as np
a, b = (np.random.rand(*s).astype(np.float32) for s in ((512, 1024), (1024, 6144)))
best = []
for _ in range(20):
    t = time.perf_counter(); a @ b; best.append(time.perf_counter() - t)
print(2 * 512 * 1024 * 6144 / sorted(best)[10] / 1e9)
PY
}
latency() { "$program" bench latency --url "$url" --vocab-size 150000 --json "$@"; }

for _ in $(seq "$rounds"); do
    target/release/examples/read_bandwidth "$threads" 4 >>"$work/bandwidth"
    latency --input-len 16 --output-len 33 --repeats 1 >>"$work/decode"
    sgemm >>"$work/sgemm"
    latency --input-len 512 --output-len 1 --repeats 1 >>"$work/prefill"
done
"${PYTHON:-python3}" - "$work" "$rounds" "$("$program" --version)" <<'PY'
import json, statistics, sys
work, rounds, version = sys.argv[1:]
lines = lambda name: [json.loads(line) for line in open(f"{work}/{name}")]
median = statistics.median
config = json.load(open("recipes/qwen3-0.6b/config.json"))
h, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
layer = h * dim * (heads + 2 * kv) + heads * dim * h + 3 * h * inner
head = h * config["vocab_size"]
bandwidth = median(line["gb_per_s"] for line in lines("bandwidth"))
step_ms = median(line["report"]["tpot_ms"]["p50"] for line in lines("decode"))
decode = 2 * (layers * layer + head) / step_ms / 1e6
sgemm = median(lines("sgemm"))
prefill_ms = median(line["report"]["ttft_ms"]["p50"] for line in lines("prefill"))
# Projections of every token, causal attention (scores and values), the head of the last token.
flops = 2 * 512 * layers * layer + layers * heads * dim * 2 * 512 * 512 + 2 * head
prefill = flops / prefill_ms / 1e6
print(json.dumps({
    "bench": "cpu", "model": "qwen3-0.6b random bf16", "rounds": int(rounds), "version": version,
    "read_gb_per_s": bandwidth, "decode_step_ms": step_ms, "decode_gb_per_s": round(decode, 2),
    "decode_percent_of_read": round(100 * decode / bandwidth, 1),
    "sgemm_gflops": round(sgemm, 1), "prefill_512_ms": prefill_ms,
    "prefill_gflops": round(prefill, 1), "prefill_percent_of_sgemm": round(100 * prefill / sgemm, 1),
}))
PY
