#!/bin/bash
# Measures on this machine: encoding a row, appending to the embedded log, and capture beside pg_recvlogical into both
# logs. ROWS and ROUNDS set the size (1000000 and 2); nothing else should run meanwhile.
set -eu
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
scripts/install-postgresql.sh distribution
scripts/install-kafka.sh
kafka=$(mktemp -d)
trap 'scripts/kafka.sh stop "$kafka" || true; rm -rf "$kafka"' EXIT
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
scripts/kafka.sh start "$kafka" "$port"
python3 -B scripts/bench.py target/release/tidegate --rows "${ROWS:-1000000}" --rounds "${ROUNDS:-2}" --kafka "127.0.0.1:$port"
for bench in benches/*.rs; do
  cargo bench --locked --bench "$(basename "$bench" .rs)"
done
