#!/bin/bash
# Installs what compiling Tidegate needs: a C and C++ compiler, cmake and headers for librdkafka, and Rust 1.95 or newer.
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
apt_install gcc g++ make cmake pkg-config libssl-dev zlib1g-dev libcurl4-openssl-dev ca-certificates curl git

wanted=1.95
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
new_enough() {
  local have; have=$(cargo --version 2>/dev/null | awk '{print $2}') || return 1
  [ -n "$have" ] && [ "$(printf '%s\n' "$wanted" "${have%%-*}" | sort -V | head -n 1)" = "$wanted" ]
}
if ! new_enough; then
  echo "Rust $wanted or newer is needed; there is $(cargo --version 2>/dev/null || echo none)" >&2
  if ! command -v rustup >/dev/null && apt-cache show rustup >/dev/null 2>&1; then apt_install rustup; fi
  if command -v rustup >/dev/null; then
    rustup toolchain install stable --profile minimal --component clippy --component rustfmt && rustup default stable
  else
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy --component rustfmt
  fi
  new_enough || { echo "please install Rust $wanted or newer (https://rustup.rs) and run this again" >&2; exit 1; }
fi
