"""The servers of the demo: PostgreSQL with the shop and Tryton's databases, Tryton, perhaps Kafka, and Tidegate."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/tryton"))
from client import Failed as Refused  # noqa: E402
from client import Tryton, wait_until_up  # noqa: E402


class Failed(Exception):
    pass


def say(text=""):
    print(text, flush=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what, deadline, look):
    """Looks until `look` gives something true; gives that and the seconds it took.

    A long wait says every ten seconds what for, with the first of `look.missing` where it has one. A server that does
    not answer is waited for like anything else."""
    start = told = time.monotonic()
    while True:
        try:
            found, trouble = look(), None
        except (Refused, OSError, http.client.HTTPException, psycopg.OperationalError, subprocess.TimeoutExpired) as error:
            found, trouble = None, f"{type(error).__name__}: {error}".splitlines()[0]
        now = time.monotonic()
        if found:
            return found, now - start
        missing = trouble or (look.missing and f"{len(look.missing)} differ, the first: {look.missing[0]}"
                              if hasattr(look, "missing") else None)
        since = f"{what}{f' ({missing})' if missing else ''}"
        if now - start > deadline:
            raise Failed(f"not within {deadline} s: {since}")
        if now - told > 10:
            told = now
            say(f"   … {now - start:.0f} s so far, {deadline} at the most: {since}")
        time.sleep(0.2)


def equal(compare):
    """For `wait_for`: true when none of what `compare` gives differs; what does is in its `missing`."""
    def look():
        look.missing = [line for _, _, differences in compare() for line in differences]
        return not look.missing
    look.missing = []
    return look


class World:
    def __init__(self, template, log):
        self.template, self.log = Path(template), log
        self.dir = Path(tempfile.mkdtemp(prefix="tidegate-demo-"))
        self.dir.chmod(0o755)                 # PostgreSQL may have to run as another user
        self.processes = {}
        self.ports = {}
        self.started = set()

    # -- PostgreSQL

    def start_postgresql(self):
        port = self.ports["postgresql"] = free_port()
        self.started.add("postgresql")
        self.script("postgresql.sh", "start", self.dir / "pg", port, "wal_level=logical", "synchronous_commit=off")
        for database in ("shop", "erp", "crm"):
            self.sql("postgres", f"CREATE DATABASE {database}")
        bin = subprocess.check_output([ROOT / "scripts/postgresql.sh", "bin", self.dir / "pg"], text=True).strip()
        where = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
        self.run([f"{bin}/psql", *where, "-q", "-v", "ON_ERROR_STOP=1", "-d", "shop", "-f", ROOT / "scripts/demo/shop.sql"])
        for database in ("erp", "crm"):
            self.run([f"{bin}/pg_restore", *where, "-d", database, "--no-owner", "-j", "2",
                      self.template / f"{database}.dump"])

    def connect(self, database="shop", role="postgres"):
        return psycopg.connect(host="127.0.0.1", port=self.ports["postgresql"], user=role, password=role,
                               dbname=database, autocommit=True, connect_timeout=10,
                               options="-c statement_timeout=30s")

    def sql(self, database, *statements):
        with self.connect(database) as connection:
            for statement in statements:
                connection.execute(statement)

    def rows(self, query, parameters=None):
        with self.connect() as connection:
            return connection.execute(query, parameters).fetchall()

    # -- Tryton

    def start_tryton(self):
        if "tryton" not in self.ports:
            self.ports["tryton"] = free_port()
            (self.dir / "files").mkdir()
            (self.dir / "trytond.conf").write_text(
                f"[database]\nuri = postgresql://postgres@127.0.0.1:{self.ports['postgresql']}/\npath = {self.dir}/files\n"
                f"[web]\nlisten = {self.tryton_address()}\n")
        trytond = Path(sys.executable).with_name("trytond")
        self.spawn("tryton", [trytond, "-c", self.dir / "trytond.conf", "-d", "erp", "crm"])
        wait_until_up(self.tryton_address())

    def tryton_address(self):
        return f"127.0.0.1:{self.ports['tryton']}"

    def tryton(self, database):
        """A person at the ERP or CRM: over JSON-RPC, which is not counted by `requests`."""
        client = Tryton(self.tryton_address(), database)
        if database == "erp":
            client.context = {"company": 1}
        return client

    def requests(self, database, methods=("POST", "PUT", "DELETE"), since=0):
        """The REST requests that Tryton logged: (method, path, status)."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", (self.dir / "tryton.log").read_text(errors="replace"))
        found = re.findall(r'"([A-Z]+) (\S+) HTTP/[\d.]+" (\d+)', text)
        prefix = f"/{database}/rest/model/"
        return [(method, path[len(prefix):], int(status)) for method, path, status in found
                if method in methods and path.startswith(prefix)][since:]

    # -- Kafka

    def start_kafka(self):
        self.ports["kafka"] = free_port()
        self.started.add("kafka")
        self.script("kafka.sh", "start", self.dir / "kafka", self.ports["kafka"])

    # -- Tidegate

    def start_tidegate(self):
        self.ports["tidegate"] = free_port()
        self.config = ROOT / "config/tidegate.yaml"
        if self.log == "kafka":
            text = re.sub(r"(?m)^log: .*$", "log: { type: kafka, bootstrap.servers: \"127.0.0.1:%d\" }" % self.ports["kafka"],
                          self.config.read_text()).replace("../connectors/", str(ROOT / "connectors"))
            self.config = self.dir / "tidegate.yaml"
            self.config.write_text(text)
        tryton = f"http://{self.tryton_address()}"
        self.env = {
            "TIDEGATE_CONFIG": str(self.config),
            "TIDEGATE_DATA": str(self.dir / "tidegate"),
            "TIDEGATE_LISTEN": f"127.0.0.1:{self.ports['tidegate']}",
            "SHOP_URL": f"postgres://tidegate@127.0.0.1:{self.ports['postgresql']}/shop",
            "ERP_URL": f"{tryton}/erp/rest/model",
            "ERP_KEY": (self.template / "erp.key").read_text().strip(),
            "CRM_URL": f"{tryton}/crm/rest/model",
            "CRM_KEY": (self.template / "crm.key").read_text().strip(),
        }
        lines = [f"export {name}='{value}'\n" for name, value in self.env.items()]
        lines.append(f"PATH='{Path(self.binary()).resolve().parent}':$PATH\n")
        (self.dir / "env").write_text("".join(lines))
        self.run([self.binary(), "validate"], env=self.env)
        self.spawn("tidegate", [self.binary(), "run"], env=self.env, cwd=ROOT)

    def binary(self):
        return os.environ["TIDEGATE_BIN"]

    def tidegate(self, *args, ok=(0,)):
        """A command of the command line, with --output json; gives the list of JSON values that it printed."""
        done = subprocess.run([self.binary(), *args, "--output", "json"], env={**os.environ, **self.env}, cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
        if done.returncode not in ok:
            raise Failed(f"tidegate {' '.join(args)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        values, decoder, text = [], json.JSONDecoder(), done.stdout.strip()
        while text:
            value, end = decoder.raw_decode(text)
            values.append(value)
            text = text[end:].lstrip()
        return values

    def status(self):
        """The status report; None while the worker is not up."""
        try:
            return self.tidegate("status", ok=(0, 5))[0]
        except Failed:
            if self.processes["tidegate"].poll() is not None:
                raise Failed("tidegate ended; its log ends:\n" + self.log_end("tidegate"))
            return None

    def status_text(self):
        """What `tidegate status` prints for people, or why it can't."""
        if "tidegate" not in self.processes:
            return "(it was not started)"
        try:
            done = subprocess.run([self.binary(), "status"], env={**os.environ, **self.env}, cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
            return done.stdout
        except subprocess.TimeoutExpired as error:
            return str(error)

    # -- processes

    def spawn(self, name, command, env=None, cwd=None):
        with open(self.dir / f"{name}.log", "ab") as log:
            # A session of its own: Ctrl-C is for the demo, which then ends everything in order.
            self.processes[name] = subprocess.Popen(
                command, env={**os.environ, **(env or {})}, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True)

    def kill(self, name, how=signal.SIGTERM):
        process = self.processes.pop(name)
        process.send_signal(how)
        try:
            return process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failed(f"{name} did not end within 40 s of a {how.name}")

    def run(self, command, env=None):
        done = subprocess.run([str(part) for part in command], env={**os.environ, **(env or {})}, cwd=ROOT,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=300)
        if done.returncode:
            raise Failed(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")

    def script(self, name, *args):
        # Not captured: a server that stays would hold the pipe open.
        subprocess.run([str(ROOT / "scripts" / name), *map(str, args)], check=True, stdin=subprocess.DEVNULL, timeout=300)

    def log_end(self, name, lines=25):
        path = self.dir / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def end(self, logs=None):
        """Ends everything that was started, and removes the folder; the logs go to the folder `logs`, where given."""
        for name in ("tidegate", "tryton"):
            if name in self.processes:
                try:
                    self.kill(name)
                except Failed as failed:
                    say(str(failed))
        if "kafka" in self.started:
            self.script("kafka.sh", "stop", self.dir / "kafka")
        if "postgresql" in self.started:
            self.script("postgresql.sh", "stop", self.dir / "pg")
        if logs:
            Path(logs).mkdir(parents=True, exist_ok=True)
            for log in [*self.dir.glob("*.log"), self.dir / "pg/log", self.dir / "kafka/log"]:
                if log.exists():
                    name = log.name if log.suffix else f"{'postgresql' if log.parent.name == 'pg' else 'kafka'}.log"
                    shutil.copy(log, Path(logs) / name)
        shutil.rmtree(self.dir, ignore_errors=True)
