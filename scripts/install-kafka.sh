#!/bin/bash
# Installs Apache Kafka 4.3.1 (its jars, from Maven Central) into the cache folder, and Java 17 or newer with apt.
set -eu
here=$(cd "$(dirname "$0")" && pwd); . "$here/apt.sh"
version=4.3.1 log4j=2.25.1
target=$("$here/cache-dir.sh")/kafka-$version
exec 9>"$target.lock"; flock 9
"$here/install-java.sh"
[ -f "$target/.done" ] && exit 0
rm -rf "$target"; mkdir -p "$target"
cat > "$target/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tidegate</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$version</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>$log4j</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId><version>$log4j</version></dependency>
  </dependencies>
</project>
POM
(cd "$target" && mvn -q -B org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies \
  -DincludeScope=runtime -DoutputDirectory="$target/libs") >&2
chmod -R a+rX "$target"
touch "$target/.done"
