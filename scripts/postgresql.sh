#!/bin/bash
# Starts and stops a PostgreSQL of one's own from the distribution's packages, without touching the system's clusters.
#   postgresql.sh start DIR PORT [NAME=VALUE…]   a new cluster in DIR when there is none; ready when it returns
#   postgresql.sh stop DIR
# Role postgres is trusted on 127.0.0.1. As root, the server runs as user postgres, which must be able to reach DIR.
set -eu
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
command=$1 dir=$2

# PostgreSQL refuses to run as root.
as_server() {
  if [ "$(id -u)" != 0 ]; then (cd "$dir" && "$@"); else
    (cd "$dir" && setpriv --reuid=postgres --regid="$(id -g postgres)" --clear-groups "$@")
  fi
}

case $command in
  start)
    port=$3; shift 3
    mkdir -p "$dir"; dir=$(cd "$dir" && pwd)
    [ "$(id -u)" != 0 ] || chown postgres "$dir"
    if [ ! -f "$dir/data/PG_VERSION" ]; then
      as_server "$bin/initdb" -D "$dir/data" -U postgres -A trust --no-sync --encoding=UTF8 --locale=C.UTF-8 >"$dir/initdb.log" 2>&1 \
        || { cat "$dir/initdb.log" >&2; exit 1; }
      as_server sh -c "cat >>'$dir/data/postgresql.conf'" <<CONF
listen_addresses = '127.0.0.1'
unix_socket_directories = '$dir'
password_encryption = 'scram-sha-256'
timezone = 'UTC'
CONF
      as_server sh -c "cat >'$dir/data/pg_hba.conf'" <<HBA
local all all trust
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
host replication all 127.0.0.1/32 scram-sha-256
HBA
    fi
    options="-p $port"
    for setting in "$@"; do options="$options -c $setting"; done
    as_server "$bin/pg_ctl" -D "$dir/data" -w -t 60 -s -l "$dir/log" -o "$options" start || { tail -n 20 "$dir/log" >&2; exit 1; }
    ;;
  stop)
    [ -f "$dir/data/postmaster.pid" ] || exit 0
    as_server "$bin/pg_ctl" -D "$dir/data" -w -t 60 -s -m fast stop
    ;;
  bin) echo "$bin";;
  *) sed -n 2,5p "$0" >&2; exit 2;;
esac
