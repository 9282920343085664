#!/bin/bash
# Prints the folder that holds two set-up Tryton databases as dumps, erp.dump and crm.dump, and their REST keys, erp.key
# and crm.key. Made once (about a minute) and kept in the cache folder; restoring them takes seconds.
set -eu
here=$(cd "$(dirname "$0")" && pwd); scripts=$(dirname "$here")
"$scripts/install-tryton.sh" >&2
"$scripts/install-postgresql.sh" distribution >&2
cache=$("$scripts/cache-dir.sh")
venv=$cache/tryton-8.2
target=$cache/tryton-template-$(cat "$here/setup.py" "$here/client.py" "$here/template.sh" | sha256sum | cut -c1-12)
exec 9>"$cache/.tryton-template.lock"; flock 9
if [ -f "$target/.done" ]; then echo "$target"; exit 0; fi
echo "setting up Tryton's databases (once, about a minute)" >&2

work=$(mktemp -d); chmod 755 "$work"
end() { [ -z "${trytond:-}" ] || kill "$trytond" 2>/dev/null || true; "$scripts/postgresql.sh" stop "$work/pg" || true; rm -rf "$work"; }
trap end EXIT
free_port() { "$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
postgres=$(free_port) port=$(free_port)
# The lock is not handed down: a server that stays would hold it.
"$scripts/postgresql.sh" start "$work/pg" "$postgres" fsync=off 9>&-
bin=$("$scripts/postgresql.sh" bin "$work/pg")
mkdir "$work/files"
cat >"$work/trytond.conf" <<CONF
[database]
uri = postgresql://postgres@127.0.0.1:$postgres/
path = $work/files
[web]
listen = 127.0.0.1:$port
CONF
echo admin >"$work/password"
initialise() { # DATABASE MODULE…
  local database=$1; shift
  "$bin/createdb" -h 127.0.0.1 -p "$postgres" -U postgres "$database"
  TRYTONPASSFILE=$work/password "$venv/bin/trytond-admin" -c "$work/trytond.conf" -d "$database" --all --email admin@example.com \
    -u "$@" --activate-dependencies >"$work/$database.log" 2>&1 || { cat "$work/$database.log" >&2; return 1; }
}
initialise crm party 9>&- & crm=$!
initialise erp party product stock sale 9>&-
wait "$crm"
"$venv/bin/trytond" -c "$work/trytond.conf" -d erp crm >"$work/trytond.log" 2>&1 9>&- & trytond=$!
"$venv/bin/python" -B "$here/setup.py" "127.0.0.1:$port" erp crm >"$work/keys" || { tail -n 30 "$work/trytond.log" >&2; exit 1; }
kill "$trytond"; wait "$trytond" 2>/dev/null || true; trytond=

rm -rf "$target"; mkdir -p "$target"
for database in erp crm; do
  "$bin/pg_dump" -h 127.0.0.1 -p "$postgres" -U postgres -Fc -f "$target/$database.dump" "$database"
done
sed -n 1p "$work/keys" >"$target/erp.key"
sed -n 2p "$work/keys" >"$target/crm.key"
touch "$target/.done"
echo "$target"
