#!/bin/bash
# Tryton 8.2 (the ERP of tests and demo) in a Python environment in the cache folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
target=$("$here/cache-dir.sh")/tryton-8.2 version=1
exec 9>"$target.lock"; flock 9
[ -f "$target/.done-$version" ] && exit 0
apt_install python3 python3-venv
rm -rf "$target"; python3 -m venv "$target"
"$target/bin/pip" install -q --disable-pip-version-check \
  'trytond==8.2.*' 'trytond_party==8.2.*' 'trytond_product==8.2.*' 'trytond_stock==8.2.*' 'trytond_sale==8.2.*' \
  'psycopg[binary,pool]>=3'
touch "$target/.done-$version"
