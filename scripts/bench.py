#!/usr/bin/env python3
"""Measures Tidegate's capture beside pg_recvlogical, on one machine, in one run. Run by scripts/bench.sh (make bench).

What is measured
  rows      N rows (default 1,000,000) of ten columns are written in 1,000-row transactions while nothing reads; then
            they are drained from a slot each by pg_recvlogical writing pgoutput to /dev/null (the floor: the server's
            own pace), and by `tidegate run` into the embedded log and into Kafka, until the slot is confirmed past the
            last commit, that is, until every record is durable. Wall time is from the start of the process, CPU is the
            process's own user and system time. Medians of the rounds; the ratio is the median of each round's.
  idle      resident memory of the worker with one capture that has nothing to do
  latency   commit (source.ts_us) to a line that `tidegate consume --follow`, another process, prints, at 1,000
            single-row transactions a second
  huge      --huge: instead of all that, 10,000,000 rows in one transaction, and the worker's peak memory
Needs Python alone, and what scripts/install-postgresql.sh and scripts/install-kafka.sh bring.
"""
import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TICK = os.sysconf("SC_CLK_TCK")
TABLE = """create table public.bench (id bigint primary key, customer int not null, sku text not null, name text,
  price numeric(10,2), quantity int, ok boolean, placed timestamptz, note text, ref uuid)"""
ROW = """select i, (i % 5000)::int, 'SKU-' || (i % 900), 'Item number ' || i, (i % 10000) / 100.0, (i % 7)::int, i % 3 = 0,
  timestamptz '2026-01-01' + i * interval '1 second', repeat('note ', 8), md5(i::text)::uuid"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def script(name, *args, **env):
    # Not captured: a server that stays would hold the pipe open.
    subprocess.run([str(ROOT / "scripts" / name), *map(str, args)], check=True, stdin=subprocess.DEVNULL,
                   env={**os.environ, **env})


def wait(what, seconds, look, pause=0.02):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(pause)
    sys.exit(f"gave up after {seconds} s waiting for {what}")


class Postgres:
    def __init__(self, folder):
        self.folder, self.port = folder / "pg", free_port()
        bin_ = subprocess.run([ROOT / "scripts/postgresql.sh", "bin", "."], check=True, capture_output=True, text=True)
        self.bin = Path(bin_.stdout.strip())
        script("postgresql.sh", "start", self.folder, self.port, "wal_level=logical", "max_wal_size=16GB",
               "shared_buffers=256MB", "checkpoint_timeout=30min")
        self.address = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]
        self.sql("create database bench", "postgres")
        # One that stays: a process for each question would take CPU from what is measured.
        self.asking = subprocess.Popen([self.bin / "psql", *self.address, "-d", "bench", "-qAtX"], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def sql(self, text, database="bench"):
        done = subprocess.run([self.bin / "psql", *self.address, "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", text],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{text}\n{done.stderr}")
        return done.stdout.strip()

    def ask(self, question):
        """One value."""
        self.asking.stdin.write(question + ";\n")
        self.asking.stdin.flush()
        return self.asking.stdout.readline().strip()

    def streams(self, slot):
        return self.ask(f"select count(*) from pg_replication_slots where slot_name = '{slot}' and active") == "1"

    def drained(self, slot, lsn):
        return self.ask(f"select confirmed_flush_lsn >= '{lsn}' from pg_replication_slots where slot_name = '{slot}'") == "t"

    def fill(self, first, rows, transaction):
        """Writes rows in transactions of that many; gives the WAL's end."""
        self.sql(f"do $$ begin for k in 0..{rows // transaction - 1} loop insert into public.bench {ROW} from "
                 f"generate_series({first} + k * {transaction}::bigint, {first} + (k + 1) * {transaction}::bigint - 1) i; "
                 "commit; end loop; end $$")
        # The end of the last commit, and nothing behind it: what is not a commit is confirmed only now and then.
        end = self.sql("select pg_current_wal_lsn()")
        self.sql("checkpoint")
        return end

    def stop(self):
        self.asking.stdin.close()
        self.asking.wait(10)
        script("postgresql.sh", "stop", self.folder)


class Worker:
    """`tidegate run` with one capture, whose slot is called as the log is."""

    def __init__(self, binary, folder, pg, name, log):
        self.binary, self.folder, self.pg, self.name, self.process = binary, folder / name, pg, name, None
        (self.folder / "connectors").mkdir(parents=True)
        settings = {"datastore": {"url": f"postgres://postgres@127.0.0.1:{pg.port}/bench"}, "log": log,
                    "state": str(self.folder / "state"), "schema.registry": "builtin",
                    "connectors": str(self.folder / "connectors"), "rest": {"listen": f"127.0.0.1:{free_port()}"}}
        capture = {"name": "bench", "type": "postgres-source", "topic.prefix": name, "slot.name": name,
                   "publication.name": name, "table.include.list": ["public.bench"], "snapshot.mode": "no_data"}
        (self.folder / "tidegate.yaml").write_text(json.dumps(settings))
        (self.folder / "connectors/bench.yaml").write_text(json.dumps(capture))

    def command(self, *args):
        return [self.binary, "--config", str(self.folder / "tidegate.yaml"), *args]

    def start(self):
        with open(self.folder / "out", "ab") as out:
            self.process = subprocess.Popen(self.command("run"), stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def check(self):
        if self.process.poll() is not None:
            sys.exit("the worker ended:\n" + (self.folder / "out").read_text()[-2000:])

    def wait_until_it_streams(self):
        # The slot alone does not say it: it is active while it is made, too.
        said = lambda: "streaming" in (self.folder / "out").read_text()
        wait("the worker to stream", 60, lambda: self.check() or (said() and self.pg.streams(self.name)))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            sys.exit("the worker did not stop within 40 s of SIGTERM")

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory_mb(self, what):
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

    def threads(self):
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def drain(self, lsn, deadline):
        """Seconds, CPU seconds, peak memory in MB."""
        start = time.monotonic()
        self.start()
        wait("the worker to drain the slot", deadline, lambda: self.check() or self.pg.drained(self.name, lsn))
        got = time.monotonic() - start, self.cpu_seconds(), self.memory_mb("VmHWM")
        self.stop()
        return got


def drain_peer(pg, lsn):
    """The same by pg_recvlogical."""
    start = time.monotonic()
    peer = subprocess.Popen([pg.bin / "pg_recvlogical", *pg.address, "-d", "bench", "--slot", "peer", "--start", "--endpos", lsn,
                             "-f", "/dev/null", "-o", "proto_version=1", "-o", "publication_names=peer", "-n"])
    _, status, usage = os.wait4(peer.pid, 0)
    peer.returncode = os.waitstatus_to_exitcode(status)
    if peer.returncode:
        sys.exit(f"pg_recvlogical: exit code {peer.returncode}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def latencies(pg, worker, seconds):
    """Milliseconds, sorted."""
    worker.start()
    worker.wait_until_it_streams()
    consumer = subprocess.Popen(worker.command("consume", f"{worker.name}.public.bench", "--from", "end", "--follow",
                                               "--output", "json"), stdout=subprocess.PIPE, text=True)
    took, newest = [], [0]

    def read():
        for line in consumer.stdout:
            now = time.time()
            value = json.loads(line).get("value") or {}
            if value.get("op") == "c":
                took.append((now - value["source"]["ts_us"] / 1e6) * 1e3)
                newest[0] = value["after"]["id"]

    threading.Thread(target=read, daemon=True).start()
    first = int(pg.sql("select coalesce(max(id), 0) + 1 from public.bench"))

    def begun():
        nonlocal first
        pg.sql(f"insert into public.bench {ROW} from generate_series({first}, {first}) i")
        first += 1
        return newest[0]
    wait("the consumer", 60, begun, 0.2)
    wait("what was written before", 30, lambda: newest[0] == first - 1)
    took.clear()
    start = time.monotonic()
    pg.sql(f"""do $$ declare began timestamptz := clock_timestamp(); begin
      for k in 0..{seconds * 1000 - 1} loop
        insert into public.bench {ROW} from generate_series({first} + k, {first} + k) i;
        commit;
        perform pg_sleep(extract(epoch from began + k * interval '1 ms' - clock_timestamp()));
      end loop; end $$""")
    rate = seconds * 1000 / (time.monotonic() - start)
    wait("the last row", 30, lambda: worker.check() or len(took) >= seconds * 1000)
    consumer.terminate()
    consumer.wait(10)
    worker.stop()
    return rate, sorted(took)


def at(sorted_values, share):
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * share))]


def say(text=""):
    print(text, flush=True)


def measure_rows(pg, workers, rows, rounds):
    results = {name: [] for name in ("pg_recvlogical", *workers)}
    for number in range(rounds):
        lsn = pg.fill(number * rows + 1, rows, 1000)
        results["pg_recvlogical"].append(drain_peer(pg, lsn))
        for name, worker in workers.items():
            results[name].append(worker.drain(lsn, 600))
        for name, got in results.items():
            wall, cpu, memory = got[-1]
            say(f"round {number + 1}: {name:14} {wall:6.2f} s  {rows / wall / 1e3:5.0f} k rows/s  "
                f"{cpu * 1e6 / rows:5.2f} CPU-s per million rows  peak {memory:4.0f} MB  "
                f"{wall / results['pg_recvlogical'][-1][0]:.2f} x")
    table = {}
    for name, got in results.items():
        wall, cpu, memory = (statistics.median(one[i] for one in got) for i in range(3))
        ratio = statistics.median(one[0] / peer[0] for one, peer in zip(got, results["pg_recvlogical"]))
        table[name] = [f"{rows / wall / 1e3:.0f} k", f"{ratio:.2f}", f"{cpu * 1e6 / rows:.2f}", f"{memory:.0f} MB"]
    return table


def measure_huge(pg, workers, rows):
    lsn = pg.fill(1, rows, rows)
    say(f"{rows:,} rows in one transaction are written")
    peer = drain_peer(pg, lsn)
    say(f"pg_recvlogical {peer[0]:7.1f} s  {peer[1] * 1e6 / rows:5.2f} CPU-s per million rows  peak {peer[2]:.0f} MB")
    for name, worker in workers.items():
        wall, cpu, memory = worker.drain(lsn, 1800)
        say(f"{name:14} {wall:7.1f} s  {cpu * 1e6 / rows:5.2f} CPU-s per million rows  peak {memory:.0f} MB  {wall / peer[0]:.2f} x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", default="embedded,kafka")
    parser.add_argument("--latency-seconds", type=int, default=10, help="0: leave it out")
    parser.add_argument("--huge", type=int, nargs="?", const=10_000_000, metavar="ROWS")
    args = parser.parse_args()
    binary, logs = os.path.abspath(args.binary), args.logs.split(",")
    folder = Path(tempfile.mkdtemp(prefix="tidegate-bench-"))
    folder.chmod(0o755)                       # PostgreSQL may have to run as another user
    pg = Postgres(folder)
    try:
        settings = {"embedded": {"type": "embedded", "path": str(folder / "embedded/log")}}
        if "kafka" in logs:
            port = free_port()
            script("kafka.sh", "start", folder / "broker", port, KAFKA_TIER="4", KAFKA_HEAP="512m")
            settings["kafka"] = {"type": "kafka", "bootstrap.servers": f"127.0.0.1:{port}"}
        pg.sql(TABLE)
        pg.sql("create publication peer for table public.bench")
        pg.sql("select pg_create_logical_replication_slot('peer', 'pgoutput')")
        workers = {name: Worker(binary, folder, pg, name, settings[name]) for name in logs}
        idle = {}
        for name, worker in workers.items():
            worker.start()
            worker.wait_until_it_streams()
            time.sleep(0 if args.huge else 10)
            idle[name] = worker.memory_mb("VmRSS")
            if not args.huge:
                say(f"idle worker, {name}: {idle[name]:.1f} MB resident, {worker.threads()} threads")
            worker.stop()
        if args.huge:
            measure_huge(pg, workers, args.huge)
            return
        table = measure_rows(pg, workers, args.rows, args.rounds)
        late = {}
        for name, worker in workers.items() if args.latency_seconds else ():
            rate, took = latencies(pg, worker, args.latency_seconds)
            late[name] = [f"{at(took, .5):.1f} ms", f"{at(took, .99):.1f} ms"]
            say(f"commit to consumer, {name}, {rate:.0f} rows/s: p50 {at(took, .5):.2f} ms  p99 {at(took, .99):.2f} ms  max {took[-1]:.2f} ms")
        say("\n| | rows/s | wall, x pg_recvlogical | CPU-s per million rows | peak memory | idle memory | latency p50 | p99 |")
        say("|---|---|---|---|---|---|---|---|")
        for name, row in table.items():
            rest = [f"{idle[name]:.0f} MB", *late.get(name, ["", ""])] if name in idle else ["", "", ""]
            say(f"| {name} | {' | '.join(row + rest)} |")
    finally:
        for worker in [worker for worker in locals().get("workers", {}).values() if worker.process]:
            if worker.process.poll() is None:
                worker.process.kill()
        if (folder / "broker").exists():
            script("kafka.sh", "stop", folder / "broker")
        pg.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
