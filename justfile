# Names for the commands people type; each line works without just.

# Every check that runs before a change lands.
ci:
    bash .ci/run

# All tests.
test:
    cargo test --workspace

# Formatting and lints, as the gate wants them.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# The bundled model on 127.0.0.1:8000.
serve:
    cargo run --release

# The scheduler under a seed: `just sim 42`.
sim seed="1" events="100000":
    cargo run --release -p sim -- --seed {{seed}} --events {{events}}
