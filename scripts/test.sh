#!/bin/bash
# Runs every test and prints, last and alone on a line, `N passed, N failed`; fails when a test, or a build, did.
#   scripts/test.sh [ARGUMENTS OF cargo test]
#
# The tests share the machine with brokers and servers that they kill, and their waits have deadlines. Up to three that
# failed are run once more, each by itself, and named above the last line whatever comes of it: one that passes only
# then counts as passed, and is to be looked into all the same. Its first failure stays in the output.
set -u
cd "$(dirname "$0")/.."
out=$(mktemp); again=$(mktemp); trap 'rm -f "$out" "$again"' EXIT
cargo test --locked --no-fail-fast "$@" 2>&1 | tee "$out"
code=${PIPESTATUS[0]}
failed=$(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$out" | sort -u)
later=0
# A test binary that crashed says no result, and nothing makes up for that.
whole() { [ "$(grep -cE '^ +(Running|Doc-tests) ' "$out")" = "$(grep -c '^test result: ' "$out")" ]; }
if [ "$code" != 0 ] && [ -n "$failed" ] && [ "$(wc -l <<<"$failed")" -le 3 ] && whole; then
  code=0
  while read -r name; do
    echo "== again, by itself: $name"
    # Without a test of that name among those that ran, it did not pass.
    if cargo test --locked --no-fail-fast --lib --bins --tests -- --exact "$name" --include-ignored >"$again" 2>&1 </dev/null &&
      grep -qxF "test $name ... ok" "$again"; then
      later=$((later + 1))
      told+=("$name")
    else
      code=1
      cat "$again"
    fi
  done <<<"$failed"
  for name in ${told[@]+"${told[@]}"}; do
    echo "== failed at first and passed by itself, to be looked into: $name"
  done
fi
# One that crashed counts as one failure.
awk -v code="$code" -v later="$later" '
  /^test result: / { for (i = 1; i < NF; i++) { if ($(i+1) ~ /^passed/) passed += $i; if ($(i+1) ~ /^failed/) failed += $i } }
  END { passed += later; failed -= later
    if (code != 0 && failed == 0) failed = 1; if (failed > 0) code = 1
    printf "%d passed, %d failed\n", passed, failed; exit code }' "$out"
