#!/bin/bash
# A Python environment with the stock Confluent client, which the tests read Tidegate's topics with.
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
target=$("$here/cache-dir.sh")/python-clients version=1
exec 9>"$target.lock"; flock 9
[ -f "$target/.done-$version" ] && exit 0
apt_install python3 python3-venv
rm -rf "$target"; python3 -m venv "$target"
"$target/bin/pip" install -q --disable-pip-version-check --only-binary=:all: 'confluent-kafka[avro,schemaregistry]>=2.8'
touch "$target/.done-$version"
