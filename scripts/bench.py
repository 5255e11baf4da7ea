#!/usr/bin/env python3
"""What the two servers can do, and the relay between them; scripts/bench builds everything and starts this.

The limits are measured beside the relay, in turn within each round, because only what one machine did within the same
minute can be compared: Postgres sends to pg_recvlogical, which writes to /dev/null, a raw publisher (tests/bench)
stores in JetStream, and a bare relay (there) does both and promises nothing. Every trial has a fresh nats-server;
Postgres is one cluster, and each trial begins with a copy of one slot, so that all of them are sent the same log.
Standard library only.
"""

import argparse
import calendar
import contextlib
import hashlib
import json
import math
import os
import pathlib
import pwd
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60  # a server's start
ANSWER_SECONDS = 30  # one answer of the JetStream API
STALL_SECONDS = 60  # a trial in which nothing moves has failed
SQL_SECONDS = 7200  # writing the backlog of the largest run
STREAM = "bench"
PAYLOAD_BYTES = 300
LARGE_PAYLOAD = 900_000
# what the relay has to reach of pg_recvlogical's rate, by events per transaction
OF_THE_WALSENDER = {"all operations": {1: 1.1, 10: 1.0, 1000: 0.9}, "inserts only": {1: 1.0, 10: 0.8, 1000: 0.65}}
# one way; through a proxy, as few kernels of virtual machines have netem
DELAY_MS = 3
PUBLICATIONS = {"all operations": "every", "inserts only": "inserts"}


def note(text):
    print(f"==> {text}", file=sys.stderr, flush=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds, what):
    """The first true value of `condition`, which is asked every 20 ms."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


LIVE = []


def spawn(command, **rest):
    """A child that is ended with this program, whatever ends it."""
    LIVE.append(subprocess.Popen(command, **rest))
    return LIVE[-1]


def end(process, how=signal.SIGTERM):
    """Ends a child and returns its CPU seconds, all threads, to its last instruction; 0 if it was seen to have ended."""
    if process.returncode is not None:
        LIVE.remove(process)
        return 0.0
    # not send_signal and kill: they reap a child that has ended, and what it used is lost
    os.kill(process.pid, how)
    deadline = time.monotonic() + START_SECONDS
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            LIVE.remove(process)  # not before: a signal may end this program while it waits
            return used.ru_utime + used.ru_stime
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


def end_all():
    """What is left, the youngest first; one that cannot be ended does not keep the others."""
    for process in reversed(LIVE.copy()):
        with contextlib.suppress(OSError):
            end(process, signal.SIGINT)


def cpu_of_tree(root):
    """CPU seconds of a process, of its children, and of those of them that have ended."""
    total, wanted, children = 0, [root], {}
    fields = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # ended meanwhile
            values = stat.rpartition(")")[2].split()
            fields[int(entry)] = values
            children.setdefault(int(values[1]), []).append(int(entry))
    while wanted:
        pid = wanted.pop()
        if pid in fields:
            total += sum(int(value) for value in fields[pid][11:15])
        wanted += children.get(pid, [])
    return total / TICKS


def peak_mb(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no VmHWM of {pid}")


class Sql:
    """One connection to the private cluster's socket: simple queries, as text."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SQL_SECONDS)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")
        parameters = b"user\0postgres\0database\0postgres\0\0"
        self.socket.sendall(struct.pack("!ii", len(parameters) + 8, 196608) + parameters)
        self.rows()

    def rows(self):
        rows, error = [], None
        while True:
            head = self.file.read(5)
            if len(head) < 5:
                raise ConnectionError("Postgres closed the connection")
            kind, length = struct.unpack("!ci", head)
            body = self.file.read(length - 4)
            if kind == b"E":
                error = body.replace(b"\0", b" ").decode()
            elif kind == b"D":
                at, row = 2, []
                for _ in range(struct.unpack_from("!h", body)[0]):
                    size = struct.unpack_from("!i", body, at)[0]
                    at += 4
                    row.append(None if size < 0 else body[at : at + size].decode())
                    at += max(size, 0)
                rows.append(row)
            elif kind == b"Z":
                if error:
                    raise RuntimeError(error)
                return rows

    def query(self, text):
        body = text.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!i", len(body) + 4) + body)
        return self.rows()

    def value(self, text):
        return self.query(text)[0][0]


class Postgres:
    """A private cluster; as root it runs as the user postgres, which Debian's package makes."""

    def __init__(self, root, bin_folder):
        self.bin = bin_folder
        self.folder = root / "postgres"
        self.folder.mkdir()
        self.user = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self.user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        data = self.folder / "data"
        made = [f"{self.bin}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.user)
        self.port = free_port()
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder,
            "wal_level": "logical", "max_replication_slots": 20, "max_wal_senders": 20, "shared_buffers": "256MB",
            "max_wal_size": "64GB", "checkpoint_timeout": "1h", "autovacuum": "off", "jit": "off",
        }
        with open(data / "postgresql.conf", "a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        with open(self.folder / "log", "w") as log:
            self.process = spawn(
                [f"{self.bin}/postgres", "-D", data], stdout=log, stderr=log, cwd=self.folder, **self.user
            )
        wait_until(self.answers, START_SECONDS, "Postgres starts")
        self.sql = self.connect()
        self.sql.query("SET synchronous_commit = off")  # only makes the writing of backlogs quick
        self.sql.query(
            "CREATE TABLE outbox (id uuid NOT NULL PRIMARY KEY, aggregatetype varchar(255) NOT NULL,"
            " aggregateid varchar(255) NOT NULL, payload jsonb)"
        )
        # no compression: what is measured is the way of the bytes
        self.sql.query("ALTER TABLE outbox ALTER payload SET STORAGE EXTERNAL")
        self.sql.query("CREATE PUBLICATION every FOR TABLE outbox")
        self.sql.query("CREATE PUBLICATION inserts FOR TABLE outbox WITH (publish = 'insert')")

    def connect(self):
        return Sql(f"{self.folder}/.s.PGSQL.{self.port}")

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError("Postgres does not start:\n" + (self.folder / "log").read_text()[-2000:])
        try:
            return self.connect()
        except (OSError, RuntimeError, ConnectionError):
            return None

    def backlog(self, events, per_transaction, payload):
        """Writes events, each row deleted in the transaction that inserts it; the slot `base` stands before them."""
        self.drop_slot("base")
        self.sql.query("SELECT pg_create_logical_replication_slot('base', 'pgoutput')")
        self.sql.query(
            f"""DO $$ DECLARE i int := 0; BEGIN WHILE i < {events} LOOP
                FOR j IN 1..least({per_transaction}, {events} - i) LOOP i := i + 1; {event_sql("i", payload)} END LOOP;
                COMMIT; END LOOP; END $$"""
        )
        self.sql.query("CHECKPOINT")
        self.end = self.sql.value("SELECT pg_current_wal_insert_lsn()")

    def copy_slot(self, name):
        self.drop_slot(name)
        self.sql.query(f"SELECT pg_copy_logical_replication_slot('base', '{name}')")

    def drop_slot(self, name):
        where = f"FROM pg_replication_slots WHERE slot_name = '{name}'"
        is_free = lambda: self.sql.value(f"SELECT count(*) {where} AND active") == "0"
        wait_until(is_free, START_SECONDS, f"the slot {name} is let go of")
        self.sql.query(f"SELECT pg_drop_replication_slot(slot_name) {where}")

    def stop(self):
        end(self.process, signal.SIGINT)


def event_sql(i, payload):
    pad = max(1, payload - len('{"n":100000,"pad":""}'))
    body = f"jsonb_build_object('n', {i}, 'pad', left(repeat(md5({i}::text), {pad // 32 + 1}), {pad}))"
    identity = f"md5('bench-' || {i})::uuid"
    return (
        f"INSERT INTO outbox VALUES ({identity}, 'order', 'agg-' || {i} % 1000, {body});"
        f" DELETE FROM outbox WHERE id = {identity};"
    )


def event(i, payload):
    """(subject behind the prefix, id, body) of what `event_sql` writes."""
    pad = max(1, payload - len('{"n":100000,"pad":""}'))
    digest = hashlib.md5(f"bench-{i}".encode()).hexdigest()
    parts = (digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:])
    text = (hashlib.md5(str(i).encode()).hexdigest() * (pad // 32 + 1))[:pad]
    return f"order.agg-{i % 1000}", "-".join(parts), f'{{"n":{i},"pad":"{text}"}}'


class Nats:
    """A private nats-server, and as much of a client as reading streams needs."""

    def __init__(self, root, binary):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="nats-", dir=root))
        self.port = free_port()
        conf = self.folder / "conf"
        conf.write_text(f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{self.folder}" }}\n')
        with open(self.folder / "log", "w") as log:
            self.process = spawn([binary, "-c", conf], stdout=log, stderr=log)
        self.file = None
        wait_until(self.answers, START_SECONDS, "nats-server starts")

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError("nats-server does not start:\n" + (self.folder / "log").read_text()[-2000:])
        try:
            self.socket = socket.create_connection(("127.0.0.1", self.port), ANSWER_SECONDS)
            self.file = self.socket.makefile("rb", 1 << 20)
            self.socket.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB _INBOX.b 1\r\n')
            return "error" not in self.call("INFO")
        except OSError:
            return False

    def send(self, subject, body):
        payload = json.dumps(body).encode() if body is not None else b""
        self.socket.sendall(f"PUB {subject} _INBOX.b {len(payload)}\r\n".encode() + payload + b"\r\n")

    def message(self):
        """(subject, reply subject, header block, body) of the next one."""
        while True:
            line = self.file.readline()
            words = line.decode().split()
            if not line or words[0] == "-ERR":
                raise ConnectionError(f"nats-server: {line.decode().strip() or 'connection closed'}")
            if words[0] == "PING":
                self.socket.sendall(b"PONG\r\n")
            elif words[0] in ("MSG", "HMSG"):
                head = int(words[-2]) if words[0] == "HMSG" else 0
                data = self.file.read(int(words[-1]) + 2)[:-2]
                reply = words[3] if len(words) == (6 if head else 5) else ""
                return words[1], reply, data[:head], data[head:]

    def call(self, api, body=None):
        self.send(f"$JS.API.{api}", body)
        return json.loads(self.message()[3])

    def checked(self, api, body=None):
        answer = self.call(api, body)
        if "error" in answer:
            raise RuntimeError(f"{api}: {answer['error']['description']}")
        return answer

    def add_stream(self, name, prefix, **settings):
        config = {"name": name, "subjects": [f"{prefix}.>"], "storage": "file"} | settings
        self.checked(f"STREAM.CREATE.{name}", config)

    def state(self, name):
        return self.checked(f"STREAM.INFO.{name}")["state"]

    def messages(self, stream, count, body_bytes):
        """(subject, header block, body, time of storing) of a stream's messages; nats-server drops who is 64 MB behind."""
        config = {"ack_policy": "none", "deliver_policy": "all", "mem_storage": True}
        made = self.checked(f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config})
        taken = 0
        while taken < count:
            batch = min(1000, 16_000_000 // body_bytes, count - taken)
            api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{made['name']}"
            self.send(api, {"batch": batch, "expires": 20_000_000_000})
            for _ in range(batch):
                subject, reply, head, body = self.message()
                if not reply.startswith("$JS.ACK."):
                    raise RuntimeError(f"{stream} ended after {taken} of {count}: {head!r}")
                # $JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<time>.<pending>
                yield subject, head, body, int(reply.split(".")[-2]) / 1e9
                taken += 1

    def stop(self):
        self.socket.close()
        used = end(self.process)
        shutil.rmtree(self.folder)
        return used


class Child:
    """One process between the two servers."""

    def __init__(self, command, log):
        self.started = time.time()
        self.log = log
        with open(log, "w") as out:
            self.process = spawn(command, stdout=out, stderr=out, env={"PATH": os.environ["PATH"]})

    def is_alive(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"the relay ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
        return True

    def stop(self):
        self.is_alive()  # or what it used would be that of a part
        return end(self.process)


class Relay(Child):
    """The program under test, on a slot of its own."""

    def __init__(self, bench, nats, publication, slot="relay", prefix="events", extra=(), ports=None):
        postgres_port, nats_port = ports or (bench.postgres.port, nats.port)
        command = [
            bench.binary, "-db", f"postgres://postgres@127.0.0.1:{postgres_port}/postgres", "-nats",
            f"nats://127.0.0.1:{nats_port}", "-slot", slot, "-publication", publication, "-prefix", prefix, "-logging",
            "warn", *extra,
        ]
        super().__init__(command, bench.root / f"{slot}.log")


class BareRelay(Child):
    """The floor: what is left without any promise."""

    def __init__(self, bench, nats, publication, ports=None):
        addresses = [f"127.0.0.1:{port}" for port in ports or (bench.postgres.port, nats.port)]
        command = [bench.options.tools / "bare_relay", *addresses, "relay", publication]
        super().__init__(command, bench.root / "bare.log")


def seconds_of(text):
    """An RFC 3339 time in UTC with nanoseconds, as seconds since 1970."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    parsed = time.strptime(whole, "%Y-%m-%dT%H:%M:%S")
    return calendar.timegm(parsed) + float(f"0.{fraction or 0}")


class Bench:
    """The servers, the results, and what was asserted of them."""

    def __init__(self, options, root):
        self.options = options
        self.root = root
        self.binary = options.relay
        self.nats_bin = os.environ["NATS_SERVER_BIN"]
        self.postgres = Postgres(root, os.environ["PG_BIN"])
        self.rows = []
        self.claims = []
        self.verified = 0
        self.results = {}

    def nats(self):
        return Nats(self.root, self.nats_bin)

    def row(self, what, value, beside=""):
        self.rows.append((what, value, beside))
        note(f"{what}: {value} {beside}".rstrip())

    def claim(self, what, value, least=None, most=None, margin=None):
        """Noted for the end: `value` must lie within the limit, give or take the margin."""
        margin = self.options.margin if margin is None else margin
        if least is not None:
            kept, limit = value >= least * (1 - margin), f"at least {least:g}"
        else:
            kept, limit = value <= most * (1 + margin), f"at most {most:g}"
        self.claims.append((kept, what, value, limit, margin))

    def wait_for(self, nats, relay, stream, count):
        """The state of the stream once it holds `count`."""
        seen, moved = -1, time.monotonic()
        while True:
            state = nats.state(stream)
            if state["messages"] >= count:
                return state
            relay.is_alive()
            if state["messages"] != seen:
                seen, moved = state["messages"], time.monotonic()
            if time.monotonic() - moved > STALL_SECONDS:
                raise RuntimeError(f"stalled at {seen} of {count} events:\n{relay.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def verify(self, nats, stream, prefix, count, payload):
        """Each event once, in order, with its subject, id and body."""
        state = nats.state(stream)
        if state["messages"] != count:
            raise RuntimeError(f"{state['messages']} messages, but {count} events")
        for i, (subject, head, body, _) in enumerate(nats.messages(stream, count, payload), 1):
            place, identity, text = event(i, payload)
            names_it = f"\r\nNats-Msg-Id: {identity}\r\n".encode() in head
            if subject != f"{prefix}.{place}" or body != text.encode() or not names_it:
                raise RuntimeError(f"message {i} is not event {i}: {subject} {head!r}")
        self.verified += count

    def drain(self, publication, count, payload=PAYLOAD_BYTES, resume=False, delays=None, who=Relay, **stream):
        """One trial: from the relay's start to the time at which JetStream stored the last event. `delays`: ms to
        Postgres and to NATS. `stream`: settings of it."""
        nats = self.nats()
        nats.add_stream(STREAM, "events", **stream)
        self.postgres.copy_slot("relay")
        before = cpu_of_tree(self.postgres.process.pid)
        proxies = [self.proxy(*way) for way in zip((self.postgres.port, nats.port), delays or ())]
        relay = who(self, nats, publication, ports=[port for _, port in proxies])
        state = self.wait_for(nats, relay, STREAM, count)
        peak = peak_mb(relay.process.pid)
        cpu = relay.stop()
        pg_cpu = cpu_of_tree(self.postgres.process.pid) - before
        nats_cpu = cpu_of_tree(nats.process.pid)
        wall = seconds_of(state["last_ts"]) - relay.started
        if self.options.verify and who is Relay:
            self.verify(nats, STREAM, "events", count, payload)
        result = {
            "rate": count / wall, "cpu": cpu * 1e5 / count, "rss": peak,
            "pg_cpu": pg_cpu * 1e5 / count, "nats_cpu": nats_cpu * 1e5 / count,
            "first": seconds_of(state["first_ts"]) - relay.started,
            "flow": count / (seconds_of(state["last_ts"]) - seconds_of(state["first_ts"]) or math.inf),
        }
        for process, _ in proxies:
            end(process)
        if resume:
            self.postgres.copy_slot("relay")
            relay = Relay(self, nats, publication, extra=("-drain",))
            relay.process.wait(STALL_SECONDS * 10)
            LIVE.remove(relay.process)
            if relay.process.returncode or nats.state(STREAM)["messages"] != count:
                raise RuntimeError(f"resume failed:\n{relay.log.read_text()[-2000:]}")
            result["resume"] = count / (time.time() - relay.started)
        self.postgres.drop_slot("relay")
        nats.stop()
        return result

    def proxy(self, port, delay_ms):
        """The process, and the port behind which everything takes so long."""
        command = [self.options.tools / "delay_proxy", f"127.0.0.1:{port}", str(delay_ms)]
        process = spawn(command, stdout=subprocess.PIPE, text=True)
        return process, int(process.stdout.readline())

    def pg_recvlogical(self, publication, count):
        self.postgres.copy_slot("limit")
        command = [
            f"{self.postgres.bin}/pg_recvlogical", "-h", "127.0.0.1", "-p", str(self.postgres.port), "-U", "postgres",
            "-d", "postgres", "-S", "limit", "--start", "-f", "/dev/null", "--endpos", self.postgres.end, "--no-loop",
            "-o", "proto_version=1", "-o", f"publication_names={publication}",
        ]
        before, start = cpu_of_tree(self.postgres.process.pid), time.monotonic()
        subprocess.run(command, check=True, timeout=SQL_SECONDS)
        wall = time.monotonic() - start
        self.postgres.drop_slot("limit")
        return {"rate": count / wall, "pg_cpu": (cpu_of_tree(self.postgres.process.pid) - before) * 1e5 / count}

    def raw_publisher(self, count, *extra):
        """What it prints, and CPU seconds per 100,000 events."""
        nats = self.nats()
        command = [self.options.tools / "raw_publisher", f"127.0.0.1:{nats.port}", "--events", str(count), *extra]
        process = spawn(command, stdout=subprocess.PIPE, text=True)
        line = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        LIVE.remove(process)
        if process.returncode:
            raise RuntimeError(f"the raw publisher ended with {process.returncode}")
        nats_cpu = nats.stop()
        cpu = used.ru_utime + used.ru_stime
        return json.loads(line) | {"cpu": cpu * 1e5 / count, "nats_cpu": nats_cpu * 1e5 / count}

    def rates(self):
        """The relay, the walsender and JetStream, in turn."""
        count = self.options.events
        raw, cpus, peaks = [], [], []
        for per_transaction in (1, 10, 1000):
            self.postgres.backlog(count, per_transaction, PAYLOAD_BYTES)
            trials, bare = {name: ([], []) for name in PUBLICATIONS}, []
            for _ in range(self.options.rounds):
                for name, publication in PUBLICATIONS.items():
                    limit, relay = trials[name]
                    limit.append(self.pg_recvlogical(publication, count))
                    relay.append(self.drain(publication, count, resume=name == "all operations"))
                bare.append(self.drain("every", count, who=BareRelay))
                trial = self.raw_publisher(count)
                raw.append(trial | {"rate": count / trial["seconds"]})
            for name, (limit, relay) in trials.items():
                ratios = [ours["rate"] / theirs["rate"] for ours, theirs in zip(relay, limit)]
                ratio = statistics.median(ratios)
                cpus += [trial["cpu"] for trial in relay]
                peaks += [trial["rss"] for trial in relay]
                self.row(
                    f"{name}, {per_transaction} per transaction",
                    f"{middle('rate', relay):,.0f}/s",
                    f"pg_recvlogical {middle('rate', limit):,.0f}/s, ratio {ratio:.2f};"
                    f" CPU s per 100,000: relay {middle('cpu', relay):.2f},"
                    f" Postgres {middle('pg_cpu', relay):.2f} ({middle('pg_cpu', limit):.2f}),"
                    f" nats-server {middle('nats_cpu', relay):.2f};"
                    f" {max(trial['rss'] for trial in relay):.1f} MB resident",
                )
                self.claim(f"rate, {name}, {per_transaction} per transaction, of pg_recvlogical's", ratio,
                           least=OF_THE_WALSENDER[name][per_transaction])
                self.results.setdefault("rates", {}).setdefault(name, []).append(
                    (per_transaction, middle("rate", relay), middle("rate", limit))
                )
                if name == "all operations":
                    of_bare = statistics.median(ours["rate"] / floor["rate"] for ours, floor in zip(relay, bare))
                    self.row(f"bare relay, {per_transaction} per transaction", f"{middle('rate', bare):,.0f}/s",
                             f"the relay to it: {of_bare:.2f}; CPU s per 100,000: {middle('cpu', bare):.2f},"
                             f" Postgres {middle('pg_cpu', bare):.2f}, nats-server {middle('nats_cpu', bare):.2f}")
                    resumed = statistics.median(
                        ours["resume"] / theirs["rate"] for ours, theirs in zip(relay, limit)
                    )
                    self.row(f"resume, {per_transaction} per transaction", f"{middle('resume', relay):,.0f}/s",
                             f"reading back and skipping; ratio {resumed:.2f}")
                    what = f"resume, {per_transaction} per transaction, of pg_recvlogical's rate"
                    self.claim(what, resumed, least=0.9)
        self.row("raw publisher, window 1000", f"{middle('rate', raw):,.0f}/s",
                 f"CPU s per 100,000: client {middle('cpu', raw):.2f}, nats-server {middle('nats_cpu', raw):.2f}")
        self.results["raw"] = middle("rate", raw)
        self.claim("CPU s of the relay per 100,000 events", statistics.median(cpus), most=0.35)
        self.claim("resident set of the relay while draining, MB", max(peaks), most=10, margin=0)

    def start(self):
        """One event waits: from the relay's start to its storing."""
        self.postgres.backlog(1, 1, PAYLOAD_BYTES)
        took = statistics.median(self.drain("every", 1)["first"] * 1000 for _ in range(5))
        self.row("start to the first event stored", f"{took:.0f} ms")
        self.claim("start to the first event stored, ms", took, most=50)

    def latencies(self):
        self.latency(200, 1, p50=0.24, p99=0.40)
        self.latency(100, 40, p50=1.0, p99=3.0)
        self.latency(200, 1, p50=DELAY_MS + 1, p99=DELAY_MS + 2, delay=DELAY_MS)

    def latency(self, rate, per_transaction, p50, p99, delay=0):
        """To reach are p50 and p99, in ms, or where the machine is slower than that what the bare relay takes."""
        transactions = rate * self.options.latency_seconds
        away = f", {delay} ms away from NATS" if delay else ""
        what = f"latency, {rate} transactions of {per_transaction} a second{away}"
        is_plain = per_transaction == 1 and not delay
        ours = self.latency_of(Relay, rate, per_transaction, delay, idle=is_plain)
        floor = self.latency_of(BareRelay, rate, per_transaction, delay)
        show = lambda taken: "p50 {:.2f} ms, p99 {:.2f} ms".format(*taken)
        self.row(what, show(ours), f"bare relay {show(floor)}; from the return of COMMIT to stored")
        if is_plain:
            raw = self.raw_publisher(transactions, "--rate", str(rate))
            self.row(f"raw publisher, {rate} a second", show((raw["p50"], raw["p99"])),
                     "from publish to ack, one at a time")
        for name, value, floor, aim in zip(("p50", "p99"), ours, floor, (p50, p99)):
            self.claim(f"{what}, {name} ms ({aim:g}, or the bare relay's)", value, most=round(max(aim, floor), 2))

    def latency_of(self, who, rate, per_transaction, delay, idle=False):
        """p50 and p99, in ms, from the return of COMMIT to the time at which JetStream, `delay` ms away, stored the
        event; and the idle wake-ups afterwards, if asked for."""
        nats = self.nats()
        nats.add_stream(STREAM, "events")
        self.postgres.drop_slot("relay")
        self.postgres.sql.query("SELECT pg_create_logical_replication_slot('relay', 'pgoutput')")
        proxy, port = self.proxy(nats.port, delay) if delay else (None, nats.port)
        relay = who(self, nats, "every", ports=(self.postgres.port, port))
        writer, returned, i = self.postgres.connect(), {}, 0
        writer.query(event_sql(0, PAYLOAD_BYTES))
        self.wait_for(nats, relay, STREAM, 1)
        start, transactions = time.monotonic(), rate * self.options.latency_seconds
        for nth in range(transactions):
            until = start + nth / rate - time.monotonic()
            if until > 0:
                time.sleep(until)
            rows = range(i + 1, i + 1 + per_transaction)
            writer.query("BEGIN;" + "".join(event_sql(row, PAYLOAD_BYTES) for row in rows))
            writer.query("COMMIT")
            now, i = time.time(), i + per_transaction
            returned.update((event(row, PAYLOAD_BYTES)[1], now) for row in rows)
        self.wait_for(nats, relay, STREAM, i + 1)
        took = []
        for _, head, _, stored in nats.messages(STREAM, i + 1, PAYLOAD_BYTES):
            identity = head.partition(b"\r\nNats-Msg-Id: ")[2].partition(b"\r\n")[0].decode()
            if identity in returned:
                took.append((stored - returned.pop(identity)) * 1000)
        if returned:
            raise RuntimeError(f"{len(returned)} events are not in the stream")
        took.sort()
        if idle:
            self.idle(relay)
        relay.stop()
        if proxy:
            end(proxy)
        nats.stop()
        self.postgres.drop_slot("relay")
        return [took[math.ceil(share * len(took)) - 1] for share in (0.5, 0.99)]

    def idle(self, relay):
        def switches():
            total = 0
            for status in pathlib.Path(f"/proc/{relay.process.pid}/task").glob("*/status"):
                for line in status.read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches:"):
                        total += int(line.split()[1])
            return total

        # what the last events leave behind: the checkpoint, the hold-back
        time.sleep(2)
        before = switches()
        time.sleep(self.options.idle_seconds)
        woken = (switches() - before) / self.options.idle_seconds
        self.row("idle", f"{woken:.1f} wake-ups a second", "all threads")
        self.claim("idle wake-ups a second, all threads", woken, most=5, margin=0)

    def distances(self):
        """Far servers: the flow from the first to the last event, as the start takes dozens of round trips."""
        count = self.options.events
        self.postgres.backlog(count, 10, PAYLOAD_BYTES)
        ways = {"": (0, 0), "to NATS": (0, DELAY_MS), "to Postgres": (DELAY_MS, 0), "to both": (DELAY_MS, DELAY_MS)}
        trials = {name: [] for name in ways}
        for _ in range(self.options.rounds):
            for name, delays in ways.items():
                trials[name].append(self.drain("every", count, delays=delays)["flow"])
        for name, flows in trials.items():
            if name:
                share = statistics.median(far / near for far, near in zip(flows, trials[""]))
                self.row(f"{DELAY_MS} ms each way {name}", f"{statistics.median(flows):,.0f}/s", f"ratio {share:.2f}")
                self.claim(f"rate with {DELAY_MS} ms each way {name}, of that without", share, least=0.9)
            else:
                self.row("through a proxy without delay", f"{statistics.median(flows):,.0f}/s")

    def payloads(self):
        """What an event costs as it grows."""
        points, peaks = [], {}
        for payload in (100, 1_000, 10_000, 100_000, LARGE_PAYLOAD, 1_000_000):
            count = max(50, min(self.options.events, self.options.payload_bytes // payload))
            self.postgres.backlog(count, 10, payload)
            trial = self.drain("every", count, payload)
            points.append((payload, trial["cpu"] * 10))
            peaks[payload] = trial["rss"]
            self.row(
                f"payload of {payload:,} bytes", f"{trial['rate']:,.0f}/s",
                f"{trial['rate'] * payload / 1e6:.0f} MB/s, {trial['cpu'] * 10:.1f} µs of the relay's CPU an event,"
                f" {trial['rss']:.1f} MB resident",
            )
        what = f"resident set with payloads of {LARGE_PAYLOAD:,} bytes, MB"
        self.claim(what, peaks[LARGE_PAYLOAD], most=16, margin=0)
        self.results["payloads"] = points

    def large_transaction(self):
        count = self.options.transaction
        self.postgres.backlog(count, count, PAYLOAD_BYTES)
        trial = self.drain("every", count)
        self.row(f"one transaction of {count:,} rows", f"{trial['rate']:,.0f}/s", f"{trial['rss']:.1f} MB resident")
        self.claim(f"resident set with a transaction of {count:,} rows, MB", trial["rss"], most=16, margin=0)

    def relays(self):
        """Several relays, each on its slot and stream, side by side; all of them send every event."""
        count, points = self.options.events // 4, []
        self.postgres.backlog(count, 10, PAYLOAD_BYTES)
        for number in (1, 2, 4, 8):
            rate, cpu = self.side_by_side(number, count)
            points.append((number, rate))
            self.row(f"{number} relays" if number > 1 else "1 relay", f"{rate:,.0f}/s together",
                     f"CPU s per 100,000: {cpu:.2f}")
        self.results["relays"] = points
        # where two keep up with both servers, all of them can end up waking one another for every transaction
        trials = self.options.pair_trials
        rates = [self.side_by_side(2, count)[0] for _ in range(trials)]
        slowest, median = min(rates), statistics.median(rates)
        self.row(f"2 relays, {trials} times", f"{median:,.0f}/s together", f"the slowest {slowest:,.0f}/s")
        self.claim(f"the slowest of {trials} times 2 relays, of the median", slowest / median, least=0.7)

    def side_by_side(self, number, count):
        """Together: events a second, and CPU seconds per 100,000."""
        nats = self.nats()
        names = [f"relay{i}" for i in range(number)]
        for name in names:
            nats.add_stream(name, name)
            self.postgres.copy_slot(name)
        running = [Relay(self, nats, "every", slot=name, prefix=name) for name in names]
        last = max(seconds_of(self.wait_for(nats, *pair, count)["last_ts"]) for pair in zip(running, names))
        cpu = sum(relay.stop() for relay in running)
        if self.options.verify:
            for name in names:
                self.verify(nats, name, name, count, PAYLOAD_BYTES)
        nats.stop()
        for name in names:
            self.postgres.drop_slot(name)
        return count * number / (last - running[0].started), cpu * 1e5 / count / number

    def backlogs(self):
        """The size of the backlog must not show. But nats-server keeps each message id for the duplicate window, and
        pays the more for each, the more they are: so also on streams that keep them for a second, and beside a raw
        publisher."""
        points, ours, theirs, peaks = [], [], [], []
        for share in (100, 10, 1):
            count = self.options.backlog // share
            self.postgres.backlog(count, 10, PAYLOAD_BYTES)
            trial, short = self.drain("every", count), self.drain("every", count, duplicate_window=10**9)
            raw = count / self.raw_publisher(count)["seconds"]
            points.append((count, trial["rate"]))
            ours.append(short["rate"])
            theirs.append(raw)
            peaks += [trial["rss"], short["rss"]]
            self.row(f"backlog of {count:,} events", f"{trial['rate']:,.0f}/s",
                     f"{trial['rss']:.1f} MB resident; CPU s per 100,000: relay {trial['cpu']:.2f},"
                     f" nats-server {trial['nats_cpu']:.2f}; raw publisher {raw:,.0f}/s")
            self.row(f"backlog of {count:,} events, ids kept for 1 s", f"{short['rate']:,.0f}/s",
                     f"{short['rss']:.1f} MB resident; CPU s per 100,000: relay {short['cpu']:.2f},"
                     f" nats-server {short['nats_cpu']:.2f}")
        kept = points[2][1] / points[1][1]
        self.row("rate with the largest backlog, of that with a tenth of it", f"{kept:.2f}",
                 f"raw publisher {theirs[2] / theirs[1]:.2f}")
        what = "rate with the largest backlog, of that with a tenth of it"
        self.claim(f"{what}, of the raw publisher's share", kept / (theirs[2] / theirs[1]), least=0.9)
        self.claim(f"{what}, ids kept for 1 s", ours[2] / ours[1], least=0.9)
        self.claim("resident set with the largest backlog, MB", max(peaks), most=10, margin=0)
        self.results["backlogs"] = points

    def plots(self, folder):
        series = {}
        for name, points in self.results["rates"].items():
            series[f"relay, {name}"] = [(x, ours) for x, ours, _ in points]
            series[f"pg_recvlogical, {name}"] = [(x, theirs) for x, _, theirs in points]
        series["raw publisher"] = [(x, self.results["raw"]) for x in (1, 10, 1000)]
        plot(folder / "rate.svg", "Rate", "events per transaction", "events/s", series)
        plot(folder / "payload.svg", "Cost of an event", "payload, bytes", "µs of the relay's CPU",
             {"relay": self.results["payloads"]}, log_y=True)
        together = {"all together": self.results["relays"]}
        plot(folder / "relays.svg", "Relays side by side", "relays", "events/s", together)
        plot(folder / "backlog.svg", "Backlog", "events", "events/s", {"relay": self.results["backlogs"]})


def plot(path, title, x_name, y_name, series, log_y=False):
    """A line for each of `series`. x is logarithmic and begins at the first point; y begins at 0 unless it is, too."""
    width, height, left, right, top, bottom = 720, 400, 80, 230, 40, 50
    colours = ("#1b6ca8", "#c0392b", "#2e8b57", "#d68910", "#7d3c98", "#555555")
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    lowest, highest = math.log10(min(xs)), math.log10(max(xs))
    bottom_y = math.floor(math.log10(min(ys))) if log_y else 0
    if log_y:
        steps = range(bottom_y, max(math.ceil(math.log10(max(ys))), bottom_y + 1) + 1)
    else:
        # 1, 2 or 5 times a power of ten, so that four to ten of them reach the top
        size = 10 ** math.floor(math.log10(max(ys) / 4))
        size *= next(factor for factor in (5, 2, 1) if factor * size * 4 <= max(ys))
        steps = [size * nth for nth in range(math.ceil(max(ys) / size) + 1)]
    top_y = steps[-1]
    across, down = width - left - right, height - top - bottom

    def at(x, y):
        y = math.log10(y) if log_y else y
        share = (math.log10(x) - lowest) / ((highest - lowest) or 1)
        return left + share * across, top + (1 - (y - bottom_y) / (top_y - bottom_y)) * down

    def words(x, y, text, anchor="middle", extra=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{text}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        words(left + across / 2, 22, title, extra='font-size="15"'),
        words(left + across / 2, height - 10, x_name),
        words(16, top + down / 2, y_name, extra=f'transform="rotate(-90 16 {top + down / 2})"'),
    ]
    for step in steps:
        value = 10**step if log_y else step
        y = at(min(xs), value)[1]
        out.append(f'<path d="M{left} {y:.1f}h{across}" stroke="#ddd"/>')
        out.append(words(left - 6, y + 4, f"{value:,.10g}", "end"))
    named = math.inf
    for x in sorted(set(xs), reverse=True):
        place = at(x, max(ys))[0]
        if named - place > 50:  # or the names would cover each other
            out.append(words(place, height - bottom + 18, f"{x:,}"))
            named = place
    for nth, (name, points) in enumerate(series.items()):
        colour = colours[nth % len(colours)]
        line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += ['<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'.format(*at(x, y), colour) for x, y in points]
        out.append(words(width - right + 14, top + 14 + nth * 18, name, "start", f'fill="{colour}"'))
    path.write_text("\n".join(out) + "\n</svg>\n")


def middle(key, trials):
    return statistics.median(trial[key] for trial in trials)


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else "an unknown CPU"
    memory = int(pathlib.Path("/proc/meminfo").read_text().split()[1]) / 1e6
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GB, Linux {os.uname().release}; load {load:.1f} before"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench")
    parser.add_argument("--quick", action="store_true", help="small numbers: under two minutes")
    parser.add_argument("--events", type=int, help="events of a drain (200,000; quick 40,000)")
    parser.add_argument("--rounds", type=int, help="of limits and relay in turn (5; quick 1)")
    parser.add_argument("--backlog", type=int, help="events of the largest backlog (1,000,000; quick 200,000)")
    parser.add_argument("--verify", action="store_true", help="read each stream back and compare every message")
    margin = "what noise may take from a rate, a time or CPU seconds (0.15)"
    parser.add_argument("--margin", type=float, default=0.15, help=margin)
    parser.add_argument("--out", default=None, help="where the plots go (target/bench)")
    parser.add_argument("--relay", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--tools", required=True, type=pathlib.Path, help=argparse.SUPPRESS)
    parts = ["start", "rates", "latency", "distances", "payloads", "transaction", "relays", "backlogs"]
    parser.add_argument("--only", choices=parts, help="one part, without the plots")
    options = parser.parse_args()
    quick = options.quick
    options.events = options.events or (40_000 if quick else 200_000)
    options.rounds = options.rounds or (1 if quick else 5)
    options.backlog = options.backlog or (200_000 if quick else 1_000_000)
    if options.backlog < 100 or options.events < 1000 or options.rounds < 1 or not 0 <= options.margin < 1:
        parser.error("--events is at least 1000, --backlog 100, --rounds 1, --margin from 0 to 1")
    options.latency_seconds = 5 if quick else 20
    options.idle_seconds = 10 if quick else 30  # several of its timers go off every 10 s
    options.payload_bytes = 50_000_000 if quick else 400_000_000
    options.transaction = 100_000 if quick else 1_000_000
    options.pair_trials = 5 if quick else 20
    return options


def run(bench, folder):
    parts = {
        "start": bench.start,
        "rates": bench.rates,
        "latency": bench.latencies,
        "distances": bench.distances,
        "payloads": bench.payloads,
        "transaction": bench.large_transaction,
        "relays": bench.relays,
        "backlogs": bench.backlogs,
    }
    only = bench.options.only
    for name, part in parts.items():
        if only in (None, name):
            part()
    if not only:
        bench.plots(folder)


def report(bench, described):
    options = bench.options
    print(f"{described}.")
    print(f"{options.events:,} events of {PAYLOAD_BYTES} bytes; {options.rounds} round(s), and medians of them.\n")
    print("| what | relay | beside it |\n| --- | --- | --- |")
    for row in bench.rows:
        print("| " + " | ".join(row) + " |")
    print("\n| to reach | is | margin | |\n| --- | --- | --- | --- |")
    for kept, what, value, limit, margin in bench.claims:
        print(f"| {what}: {limit} | {value:.2f} | {margin:.0%} | {'yes' if kept else '**no**'} |")
    if options.verify:
        print(f"\nRead back and compared: {bench.verified:,} messages, each event once, in order, with its content.")


def handle(handler, *numbers):
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, handler)


def main():
    options = parse()
    folder = pathlib.Path(options.out or options.tools)
    folder.mkdir(parents=True, exist_ok=True)
    described = machine()
    handle(lambda *_: sys.exit(1), signal.SIGTERM, signal.SIGHUP)
    root = pathlib.Path(tempfile.mkdtemp(prefix="outbox-bench-"))
    root.chmod(0o755)  # the user postgres must reach its folder
    bench, start = None, time.monotonic()
    try:
        bench = Bench(options, root)
        run(bench, folder)
    finally:
        # an impatient second Ctrl-C would leave servers behind
        handle(signal.SIG_IGN, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        end_all()
        shutil.rmtree(root, ignore_errors=True)
    report(bench, described)
    note(f"plots in {folder}; took {time.monotonic() - start:.0f} s")
    sys.exit(0 if all(kept for kept, *_ in bench.claims) else 1)


main()
