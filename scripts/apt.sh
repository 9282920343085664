#!/bin/bash
# Sourced by the install scripts: `apt_install PACKAGE…` installs what is missing with apt, as root or through sudo.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else
    command -v sudo >/dev/null || { echo "need root (or sudo) to run: $*" >&2; return 1; }
    sudo "$@"
  fi
}

apt_install() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  command -v apt-get >/dev/null || { echo "no apt-get here; please install: ${missing[*]}" >&2; return 1; }
  echo "installing ${missing[*]}" >&2
  # The lists may be missing (a container) or old: refreshed once, when the first try fails.
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2 || {
    as_root apt-get update -q >&2
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
  }
}
