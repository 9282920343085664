#!/bin/bash
# A shop's PostgreSQL, a real ERP (Tryton) and a CRM, kept in step by Tidegate, shown and checked step by step.
#   LOG=kafka   on a Kafka broker instead of the embedded log
#   KEEP=1      leave everything running at the end, and say how to stop it
#   TIDEGATE_BIN=FILE   run this binary instead of building one
#   DEMO_LOGS=FOLDER    put the servers' logs there at the end; of a demo that failed they are kept in any case
# Exits 0 only if all ends equal.
set -eu
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
if [ -z "${TIDEGATE_BIN:-}" ]; then
  scripts/install-build.sh
  cargo build --release --locked
  TIDEGATE_BIN=$PWD/target/release/tidegate
fi
scripts/install-postgresql.sh distribution
template=$(scripts/tryton/template.sh)
[ "${LOG:-embedded}" != kafka ] || scripts/install-kafka.sh
export TIDEGATE_BIN
exec "$(scripts/cache-dir.sh)/tryton-8.2/bin/python" -B scripts/demo/demo.py "$template"
