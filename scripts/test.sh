#!/bin/bash
# Runs every test and prints, last and alone on a line, `N passed, N failed`; fails when a test, or a build, did.
#   scripts/test.sh [ARGUMENTS OF cargo test]
set -u
cd "$(dirname "$0")/.."
out=$(mktemp); trap 'rm -f "$out"' EXIT
cargo test --locked --no-fail-fast "$@" 2>&1 | tee "$out"
code=${PIPESTATUS[0]}
# A test binary that crashed says no result: it counts as one failure.
awk -v code="$code" '
  /^test result: / { for (i = 1; i < NF; i++) { if ($(i+1) ~ /^passed/) passed += $i; if ($(i+1) ~ /^failed/) failed += $i } }
  END { if (code != 0 && failed == 0) failed = 1; printf "%d passed, %d failed\n", passed, failed }' "$out"
exit "$code"
