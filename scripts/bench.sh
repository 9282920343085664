#!/bin/bash
# Measures on this machine: capture beside pg_recvlogical into both logs, then encoding a row and appending to the
# embedded log. What follows is handed to scripts/bench.py (--rows, --rounds, --logs, --huge; --help says more).
# Nothing else should run meanwhile; where something does, CPU seconds and ratios say more than wall times.
set -eu
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
scripts/install-postgresql.sh distribution
scripts/install-kafka.sh
python3 -B scripts/bench.py target/release/tidegate "$@"
[ $# = 0 ] || exit 0
for bench in benches/*.rs; do
  cargo bench --locked --bench "$(basename "$bench" .rs)"
done
