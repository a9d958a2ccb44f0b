#!/usr/bin/env bash
# The README's first command as a stranger runs it: start, wait for the proof, ask once, stop.
set -euo pipefail
log=$(mktemp)
./target/release/tokenmill serve --port 0 >"$log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; cat "$log"' EXIT
for _ in $(seq 300); do
    grep -q "Talk to it" "$log" && break
    sleep 0.2
done
grep -q "Talk to it" "$log" || { echo "no proof was printed"; exit 1; }
url=$(grep -o 'http://127.0.0.1:[0-9]*' "$log" | head -n 1)
answer=$(curl -sf "$url/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "tokenmill-demo", "messages": [{"role": "user", "content": "What is a thread?"}], "max_tokens": 16}')
echo "$answer" | grep -q '"finish_reason":"length"\|"finish_reason":"stop"'
kill -TERM $server
wait $server
