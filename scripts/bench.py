#!/usr/bin/env python3
"""Measures Tidegate's capture beside pg_recvlogical, on one machine, in one run.

  scripts/bench.py TIDEGATE_BINARY [--rows N] [--rounds N] [--logs embedded,kafka] [--kafka-dir DIR] [--latency-seconds S]

What is measured: N rows (default 1,000,000) of ten columns, written in 1,000-row transactions while nothing reads,
are then drained from a logical slot by
  * pg_recvlogical writing pgoutput to /dev/null (the floor: the walsender's own pace), and
  * `tidegate run` into the embedded log and into Kafka, until the slot is confirmed past the last commit, that is,
    until every record is durable.
CPU is the worker process's own user and system time, from its start; wall time is from its start too. Then the size of
an idle worker, and the time from commit to a consumer in another process at 1,000 rows a second.
Needs only the standard library, PostgreSQL's programs, and for Kafka the broker that scripts/install-kafka.sh brings.
"""
import argparse, glob, json, os, shutil, signal, socket, statistics, subprocess, sys, tempfile, threading, time

TICK = os.sysconf("SC_CLK_TCK")
TABLE = """create table public.bench (id bigint primary key, customer int not null, sku text not null, name text,
 price numeric(10,2), quantity int, ok boolean, placed timestamptz, note text, ref uuid)"""
ROW = """select i, (i % 5000)::int, 'SKU-' || (i % 900), 'Item number ' || i, (i % 10000) / 100.0, (i % 7)::int, i % 3 = 0,
 timestamptz '2026-01-01' + i * interval '1 second', repeat('note ', 8), md5(i::text)::uuid"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pg_bin():
    for pattern in ("/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/*/bin"):
        for found in sorted(glob.glob(pattern), reverse=True):
            if os.path.exists(found + "/pg_recvlogical"):
                return found
    sys.exit("no PostgreSQL with pg_recvlogical below /usr/lib/postgresql; run scripts/install-postgres.sh")


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory_mb(pid, what):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(what):
            return int(line.split()[1]) / 1024


def wait(what, seconds, condition, pause=0.02):
    deadline = time.time() + seconds
    while time.time() < deadline:
        got = condition()
        if got:
            return got
        time.sleep(pause)
    sys.exit(f"gave up after {seconds} s waiting for {what}")


class Postgres:
    def __init__(self, folder):
        self.bin, self.data, self.port = pg_bin(), folder + "/pg", free_port()
        os.makedirs(self.data)
        self.as_user = []
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres"), shutil.chown(self.data, "postgres")
            self.as_user = ["runuser", "-u", "postgres", "--"]
        run = lambda *a: subprocess.run([*self.as_user, *a], check=True, stdout=subprocess.DEVNULL, cwd="/")
        run(f"{self.bin}/initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "--no-sync")
        run(f"{self.bin}/pg_ctl", "-D", self.data, "-w", "-l", self.data + "/log", "-o",
            f"-p {self.port} -h 127.0.0.1 -k {self.data} -c wal_level=logical -c max_wal_size=8GB -c shared_buffers=256MB "
            "-c logical_decoding_work_mem=64MB -c checkpoint_timeout=30min", "start")
        self.sql("create database bench", "postgres")

    def sql(self, text, db="bench"):
        return subprocess.run([f"{self.bin}/psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", db, "-qAtX",
                               "-v", "ON_ERROR_STOP=1", "-c", text], check=True, capture_output=True, text=True).stdout.strip()

    def stop(self):
        subprocess.run([*self.as_user, f"{self.bin}/pg_ctl", "-D", self.data, "-m", "immediate", "stop"], stdout=subprocess.DEVNULL, cwd="/")

    def fill(self, first, rows):
        """rows in 1,000-row transactions"""
        self.sql(f"do $$ begin for k in 0..{rows // 1000 - 1} loop insert into public.bench {ROW} "
                 f"from generate_series({first} + k * 1000, {first} + k * 1000 + 999) i; commit; end loop; end $$")
        return self.sql("select pg_current_wal_lsn()")


class Worker:
    def __init__(self, binary, folder, pg, log, slot):
        self.binary, self.folder, self.port = binary, folder, free_port()
        os.makedirs(folder + "/connectors", exist_ok=True)
        json.dump({"datastore": {"url": f"postgres://postgres@127.0.0.1:{pg.port}/bench"}, "log": log, "state": folder + "/state",
                   "schema.registry": "builtin", "connectors": folder + "/connectors", "rest": {"listen": f"127.0.0.1:{self.port}"}},
                  open(folder + "/tidegate.yaml", "w"))
        json.dump({"name": "bench", "type": "postgres-source", "topic.prefix": "b", "slot.name": slot, "publication.name": slot,
                   "table.include.list": ["public.bench"], "snapshot.mode": "no_data"}, open(folder + "/connectors/bench.yaml", "w"))
        self.process = None

    def start(self):
        self.process = subprocess.Popen([self.binary, "run", "--config", self.folder + "/tidegate.yaml"],
                                        stdout=open(self.folder + "/out", "a"), stderr=subprocess.STDOUT)
        return self.process.pid

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            sys.exit("the worker did not stop within 30 s of SIGTERM")


def drained(pg, slot, lsn):
    return pg.sql(f"select confirmed_flush_lsn >= '{lsn}' from pg_replication_slots where slot_name = '{slot}'") == "t"


def drain_peer(pg, slot, lsn):
    start, before = time.time(), os.times()
    subprocess.run([f"{pg.bin}/pg_recvlogical", "-h", "127.0.0.1", "-p", str(pg.port), "-U", "postgres", "-d", "bench", "--slot", slot,
                    "--start", "--endpos", lsn, "-f", "/dev/null", "-o", "proto_version=1", "-o", f"publication_names={slot}", "-n"], check=True)
    after = os.times()
    return time.time() - start, after.children_user - before.children_user + after.children_system - before.children_system


def drain_worker(pg, worker, slot, lsn):
    start = time.time()
    pid = worker.start()
    wait("the worker to drain the slot", 600, lambda: worker.process.poll() is not None or drained(pg, slot, lsn), 0.05)
    if worker.process.poll() is not None:
        sys.exit("the worker ended:\n" + open(worker.folder + "/out").read()[-2000:])
    got = time.time() - start, cpu_seconds(pid), memory_mb(pid, "VmHWM")
    worker.stop()
    return got


def latency(pg, worker, seconds):
    """Commit (source.ts_us) to a line printed by `tidegate consume --follow` in a second process, at 1,000 rows a second."""
    worker.start()
    wait("the worker to stream", 60, lambda: pg.sql("select count(*) from pg_replication_slots where active and slot_name='embedded'") == "1")
    consumer = subprocess.Popen([worker.binary, "consume", "b.public.bench", "--config", worker.folder + "/tidegate.yaml", "--from", "end",
                                 "--follow", "--output", "json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    took, first = [], threading.Event()

    def read():
        for line in consumer.stdout:
            now = time.time()
            value = json.loads(line).get("value") or {}
            first.set()
            if value.get("op") == "c":
                took.append((now - value["source"]["ts_us"] / 1e6) * 1e3)
    threading.Thread(target=read, daemon=True).start()
    next_id = int(pg.sql("select coalesce(max(id), 0) + 1 from public.bench"))
    give_up = time.time() + 30
    while not first.is_set() and time.time() < give_up:      # until the consumer is there
        pg.sql(f"insert into public.bench {ROW} from generate_series({next_id}, {next_id}) i")
        next_id += 1
        time.sleep(0.2)
    took.clear()
    pg.sql(f"do $$ begin for k in 0..{seconds * 1000 - 1} loop insert into public.bench {ROW} from generate_series({next_id} + k, {next_id} + k) i; "
           "commit; perform pg_sleep(0.0008); end loop; end $$")
    time.sleep(1)
    consumer.terminate()
    worker.stop()
    return sorted(took)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--logs", default="embedded,kafka")
    parser.add_argument("--kafka", help="bootstrap.servers of a running broker, for the kafka log")
    parser.add_argument("--latency-seconds", type=int, default=10)
    args = parser.parse_args()
    binary, logs = os.path.abspath(args.binary), args.logs.split(",")
    if "kafka" in logs and not args.kafka:
        sys.exit("--logs kafka needs --kafka HOST:PORT")
    folder = tempfile.mkdtemp(prefix="tidegate-bench-")
    os.chmod(folder, 0o755)
    pg = Postgres(folder)
    try:
        pg.sql(TABLE)
        pg.sql("create publication peer for table public.bench")
        pg.sql("select pg_create_logical_replication_slot('peer', 'pgoutput')")
        workers = {}
        for log in logs:
            settings = {"type": "embedded", "path": f"{folder}/{log}/state"} if log == "embedded" else \
                {"type": "kafka", "bootstrap.servers": args.kafka}
            os.makedirs(f"{folder}/{log}")
            workers[log] = Worker(binary, f"{folder}/{log}", pg, settings, log)
            pid = workers[log].start()
            wait("the worker to stream", 60, lambda: pg.sql(f"select count(*) from pg_replication_slots where active and slot_name='{log}'") == "1")
            if log == "embedded":
                time.sleep(5)
                print(f"idle worker: {memory_mb(pid, 'VmRSS'):.1f} MB resident, "
                      f"{open(f'/proc/{pid}/status').read().split('Threads:')[1].split()[0]} threads", flush=True)
            workers[log].stop()
        results = {name: [] for name in ["pg_recvlogical", *logs]}
        for round_ in range(args.rounds):
            lsn = pg.fill(round_ * args.rows + 1, args.rows)
            results["pg_recvlogical"].append((*drain_peer(pg, "peer", lsn), 0.0))
            for log in logs:
                results[log].append(drain_worker(pg, workers[log], log, lsn))
            for name, got in results.items():
                wall, cpu, rss = got[-1]
                print(f"round {round_ + 1}: {name:15} {wall:6.2f} s  {args.rows / wall / 1e3:6.0f} k rows/s  "
                      f"{cpu * 1e6 / args.rows:5.2f} CPU-s per million rows  {f'peak {rss:.0f} MB' if rss else ''}", flush=True)
        peer = statistics.median(r[0] for r in results["pg_recvlogical"])
        for log in logs:
            wall, cpu = (statistics.median(r[i] for r in results[log]) for i in (0, 1))
            print(f"{log}: wall {wall / peer:.2f} x pg_recvlogical, {cpu * 1e6 / args.rows:.2f} CPU-s per million rows in the worker")
        if "embedded" in logs and args.latency_seconds:
            took = latency(pg, workers["embedded"], args.latency_seconds)
            at = lambda q: took[min(len(took) - 1, int(len(took) * q))]
            print(f"commit to consumer, {len(took) / args.latency_seconds:.0f} rows/s: p50 {at(.5):.2f} ms  p99 {at(.99):.2f} ms  max {took[-1]:.2f} ms")
    finally:
        pg.stop()
        shutil.rmtree(folder, ignore_errors=True)


main()
