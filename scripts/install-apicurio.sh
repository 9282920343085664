#!/bin/bash
# Installs Apicurio Registry 2.6.13.Final, a Confluent-compatible schema registry, into the cache folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
version=2.6.13.Final
target=$("$here/cache-dir.sh")/apicurio-$version
exec 9>"$target.lock"; flock 9
"$here/install-java.sh"
[ -f "$target/.done" ] && exit 0
rm -rf "$target"; mkdir -p "$target/download"
(cd "$target" && mvn -q -B org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy \
  -Dartifact="io.apicurio:apicurio-registry-app:$version:tar.gz:all" -DoutputDirectory="$target/download") >&2
tar -xzf "$target"/download/*.tar.gz -C "$target"
rm -rf "$target/download"
chmod -R a+rX "$target"
ls "$target" >&2
touch "$target/.done"
