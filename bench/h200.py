"""The table and the result lines of bench/h200.sh: h200.py LINES RECORD VERSION PEER.

PEER is a JSON object of another engine's figures by name; what it says of itself is under "about".
A decode step is the median time between tokens as a client sees it; beside it stands the mean of the
steps on the device, from the server's own metrics.
"""
import json, subprocess, sys

MODELS = {"v2": "deepseek_v2_lite", "qwen": "qwen3_8b"}
# ms of a decode step in which bytes and operations take no longer than the chip gives; by context and batch.
FLOORS = {
    "decode.v2.ctx256": {1: 1.15, 4: 2.7, 16: 5.9, 64: 7.4, 256: 7.75},
    "decode.v2.ctx8192": {1: 1.21, 16: 6.9, 64: 11.2},
    "decode.v2.ctx32768": {1: 1.39, 16: 9.7},
    "decode.qwen.ctx256": {1: 3.55, 256: 7.1},
    "decode.qwen.ctx8192": {1: 3.83, 16: 8.1, 64: 21.7},
    "decode.qwen.ctx32768": {1: 4.68, 16: 21.7},
}


def figures(name, line, peers):
    """Name, value, unit, peer, floor, and what else is worth a word."""
    report, server = line.get("report"), line.get("server") or {}
    if report and report["failed"]:
        print(f"{name}: {report['failed']} requests failed: {report['first_failure']}", file=sys.stderr)
        return
    kind, model, rest = (name.split(".", 2) + [""])[:3]
    named = f"engine.{MODELS[model]}"
    if kind == "decode":
        context, batch = rest.split(".")
        n = int(batch[2:])
        peer, floor = peers.get(name), FLOORS.get(f"decode.{model}.{context}", {}).get(n)
        steps = [s for s in server.get("decode_steps", []) if s["tokens"] >= n]
        more = {"device_step_ms": steps[0]["mean_ms"]} if steps else {}
        for key in ("device_idle_percent", "planner_p99_us", "deliver_p99_us", "launches_per_step"):
            more[key] = server.get(key)
        of = "" if context == "ctx256" else f".{context}"
        yield f"{named}.decode.{batch}{of}.ms", report["itl_ms"]["p50"], "ms", peer, floor, more
    elif kind == "prefill":
        tokens = int(rest.split("x")[1])
        alone = rest.startswith("1x")
        value = tokens / report["ttft_ms"]["p50"] * 1e3 if alone else report["total_tokens_per_s"]
        yield f"{named}.prefill.{rest}.tokens_per_s", value, "tokens/s", peers.get(name), None, {}
    elif kind == "offline":
        yield f"{named}.offline.{rest}.tokens_per_s", report["output_tokens_per_s"], "tokens/s", peers.get(name), None, {}
    elif kind == "http":
        c = line["concurrency"]
        peer = peers.get(f"http.c{c}", {})
        at = f"http.{MODELS[model]}.{rest}.c{c}"
        yield f"{at}.tokens_per_s", report["output_tokens_per_s"], "tokens/s", peer.get("tokens_per_s"), None, {}
        yield f"{at}.ttft_mean.ms", report["ttft_ms"]["mean"], "ms", peer.get("ttft_mean_ms"), None, {}
        yield f"{at}.itl_p99.ms", report["itl_ms"]["p99"], "ms", peer.get("itl_p99_ms"), None, {
            k: server.get(k) for k in ("device_idle_percent", "planner_p99_us", "deliver_p99_us")}
    elif line.get("bench") == "cold_start":
        more = {"steady_ms": line["steady_ttft_p99_ms"], "ratio": round(line["ratio"], 2)}
        yield f"startup.{MODELS[model]}.ttft_p99_first_100.ms", line["ttft_p99_ms"], "ms", None, None, more
    elif kind == "startup":
        yield f"startup.{MODELS[model]}.{rest}.s", line["seconds"], "s", None, None, {}


def machine():
    try:
        ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def main(lines, record, version, peer_file):
    peers = json.load(open(peer_file))
    commit = version.rsplit("(", 1)[-1].rstrip(")\n")
    found = {}
    for text in open(lines):
        name, command, line = text.rstrip("\n").split("\t")
        for figure in figures(name, json.loads(line), peers):
            # Of a measurement that was repeated the last counts.
            found[figure[0]] = figure + (f"bench/h200.sh: tokenmill {command.split(' --record ')[0]}",)
    with open(record, "a") as out:
        for name, value, unit, peer, floor, more, command in found.values():
            told = {"name": name, "value": round(value, 3), "unit": unit, "floor": floor, "peer": peer,
                    "commit": commit, "machine": machine(), "command": command, **more}
            out.write(json.dumps(told) + "\n")
            ratio = "" if not peer else f"{value / peer if unit == 'tokens/s' else peer / value:6.2f} of peer {peer}"
            extra = ", ".join(f"{k} {v}" for k, v in more.items() if v is not None)
            print(f"{name:<58}{value:>12.2f} {unit:<9}{ratio:<24}{extra}")


main(*sys.argv[1:])
