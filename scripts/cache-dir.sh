#!/bin/sh
# Prints the folder that downloaded servers live in: TIDEGATE_CACHE, else ~/.cache/tidegate. PostgreSQL refuses to run
# as root, so the tests of root run it as another user, who must be able to reach the folder: where root's home is
# closed, /var/cache/tidegate is taken instead.
set -eu
if [ -n "${TIDEGATE_CACHE:-}" ]; then
  dir=$TIDEGATE_CACHE
elif [ "$(id -u)" = 0 ] && [ "$(stat -Lc %A "$HOME" | cut -c10)" != x ]; then
  dir=/var/cache/tidegate
else
  dir=$HOME/.cache/tidegate
fi
mkdir -p "$dir"
cd "$dir" && pwd
