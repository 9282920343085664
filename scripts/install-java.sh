#!/bin/bash
# Installs Java 17 (or, where the distribution has none, its default, if newer) and Maven with apt, when missing.
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
java_major() { java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1; }
if ! command -v java >/dev/null || [ "$(java_major)" -lt 17 ]; then
  if apt-cache show openjdk-17-jre-headless >/dev/null 2>&1; then apt_install openjdk-17-jre-headless; else apt_install default-jre-headless; fi
fi
command -v mvn >/dev/null || apt_install maven
