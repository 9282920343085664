#!/bin/bash
# Starts and stops a one-node Kafka broker (KRaft) of the jars that install-kafka.sh brings.
#   kafka.sh start DIR PORT   data and log in DIR, the controller on PORT + 1; ready when it returns
#   kafka.sh stop DIR
# KAFKA_HEAP (256m) and KAFKA_TIER (1: quick start; 4: speed) set the JVM.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command=$1 dir=$2

case $command in
  start)
    port=$3
    "$here/install-kafka.sh"
    libs=$("$here/cache-dir.sh")/kafka-4.3.1/libs
    mkdir -p "$dir/data"; dir=$(cd "$dir" && pwd)
    cat >"$dir/server.properties" <<CONF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$((port + 1))
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1))
advertised.listeners=PLAINTEXT://127.0.0.1:$port
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$dir/data
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=4194304
log.cleaner.io.buffer.size=65536
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
CONF
    cat >"$dir/log4j2.properties" <<'CONF'
status=error
appender.o.type=Console
appender.o.name=o
appender.o.layout.type=PatternLayout
appender.o.layout.pattern=[%d] %p %m (%c)%n
rootLogger.level=info
rootLogger.appenderRef.o.ref=o
CONF
    # What the storage tool would write.
    [ -f "$dir/data/meta.properties" ] || printf '%s\n' version=1 cluster.id=AAAAAAAAAAAAAAAAAAAAAQ node.id=1 \
      directory.id=AAAAAAAAAAAAAAAAAAAAZA >"$dir/data/meta.properties"
    : >"$dir/log"
    setsid java -Xms64m "-Xmx${KAFKA_HEAP:-256m}" -XX:+UseSerialGC "-XX:TieredStopAtLevel=${KAFKA_TIER:-1}" \
      -XX:+ExitOnOutOfMemoryError "-Dlog4j2.configurationFile=$dir/log4j2.properties" "-Dkafka.logs.dir=$dir" \
      -cp "$libs/*" kafka.Kafka "$dir/server.properties" >"$dir/log" 2>&1 </dev/null &
    echo $! >"$dir/pid"
    for _ in $(seq 1200); do
      grep -q 'Kafka Server started' "$dir/log" && exit 0
      kill -0 "$(cat "$dir/pid")" 2>/dev/null || break
      sleep 0.05
    done
    tail -n 30 "$dir/log" >&2; exit 1
    ;;
  stop)
    [ -f "$dir/pid" ] || exit 0
    pid=$(cat "$dir/pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 600); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$dir/pid"
    ;;
  *) sed -n 2,5p "$0" >&2; exit 2;;
esac
