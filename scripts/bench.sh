#!/bin/bash
# Measures on this machine: capture beside pg_recvlogical into both logs, then appending to both logs and encoding a
# row. What follows is handed to scripts/bench.py alone (--rows, --rounds, --logs, --huge; --help says more).
# Nothing else should run meanwhile; where something does, CPU seconds and ratios say more than wall times.
set -eu
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
scripts/install-postgresql.sh distribution
scripts/install-kafka.sh
python3 -B scripts/bench.py target/release/tidegate "$@"
[ $# = 0 ] || exit 0
cargo bench --locked --no-run
broker=$(mktemp -d -t tidegate-bench-XXXXXX)
trap 'scripts/kafka.sh stop "$broker"; rm -rf "$broker"' EXIT
# The controller has the port behind it.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
KAFKA_TIER=4 KAFKA_HEAP=512m scripts/kafka.sh start "$broker" "$port"
BENCH_KAFKA=127.0.0.1:$port cargo bench --locked --bench log
cargo bench --locked --bench encode
