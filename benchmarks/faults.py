#!/usr/bin/env python3
"""Measure what hostile peers cost: for each fault, print figures and their bounds.

Meanwhile, a well-behaved client in a process of its own sends a message every 5 ms.
"""

import argparse
import array
import contextlib
import multiprocessing
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from loads import (
    RESET_ON_CLOSE,
    Caller,
    close_all,
    connections,
    echo,
    farewell,
    greeting,
    message,
    percentiles,
)
from servers import HERE, Process, free_port, pin, raise_file_limit
from wire import (
    BINARY,
    CLOSE,
    MASKS,
    TEXT,
    ClosedError,
    MeasurementError,
    StalledError,
    WrongError,
    client_frame,
    deflated,
    handshake,
    reply_frame,
    upgraded,
)

PING = 9
MIB = 1 << 20
CHUNK = 256 * 1024
INTERVAL = 0.005
SETTLE = 10.0
OPTIONS = ("--address=127.0.0.1", "--log-level=info")

# The bounds for every fault: the 99th percentile of the well-behaved client, in ms; the growth of
# the process after the fault, in MiB, since glibc keeps some memory after a burst; and the size of
# the log, in bytes.
P99 = 50.0
KEPT = 16.0
LOG = 100_000


@dataclass(frozen=True)
class Figure:
    """A measured value, and the largest value that is allowed."""

    title: str
    value: float
    bound: float
    unit: str = ""

    @property
    def kept(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        text = (
            f"{self.title} {self.value:,.4g} {self.unit}".rstrip() + f" (at most {self.bound:,.4g})"
        )
        return text if self.kept else f"{text} EXCEEDED"


class Subject(Process):
    """A running ws-echo, of which more is measured than of the other servers."""

    def __init__(self, popen: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        super().__init__(popen, port, log)
        self._folder = Path(f"/proc/{popen.pid}")
        self.log = log

    def descriptors(self) -> int:
        return len(list((self._folder / "fd").iterdir()))

    def forget_peak(self) -> None:
        (self._folder / "clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak of the resident memory, in bytes, since forget_peak()."""
        status = (self._folder / "status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback")


@contextlib.contextmanager
def serving(
    folder: Path, *options: str, before: Sequence[str] = (), core: int | None = None
) -> Iterator[Subject]:
    port = free_port()
    command = [
        *before,
        sys.executable,
        str(folder / "echo_server.py"),
        f"--port={port}",
        *OPTIONS,
        *options,
    ]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        here = os.sched_getaffinity(0)
        pin(core)
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=output, start_new_session=True
            )
        os.sched_setaffinity(0, here)
        server = Subject(popen, port, log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


# The well-behaved client


def _keep_echoing(address: tuple[str, int], pipe: "Connection[bytes, bytes]") -> None:
    """Send a message at fixed times until the pipe has data. Send the error and the latencies."""
    latencies = array.array("d")
    frame, reply = client_frame(TEXT, message(7), MASKS[1]), reply_frame(TEXT, message(7))
    error = ""
    with socket.create_connection(address, timeout=SETTLE) as sock:
        sock.sendall(handshake(address[1]))
        sock.recv(4096)
        pipe.send_bytes(b"ready")
        due = time.perf_counter()
        while not error and not pipe.poll(max(0.0, due - time.perf_counter())):
            start = time.perf_counter()
            sock.sendall(frame)
            try:
                answer = sock.recv(4096)
            except OSError as problem:
                error = str(problem)
            else:
                error = "" if answer == reply else f"answered {answer!r}"
            due = time.perf_counter()
            latencies.append(due - start)
            due += INTERVAL
    pipe.send_bytes(error.encode())
    pipe.send_bytes(latencies.tobytes())


class Bystander:
    """The well-behaved client, in a process of its own."""

    def __init__(self, server: Subject) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_keep_echoing, args=(server.address, theirs), daemon=True
        )
        self._process.start()
        self._receive()

    def _receive(self) -> bytes:
        if not self._pipe.poll(2 * SETTLE):
            raise StalledError("the well-behaved client was not answered")
        return self._pipe.recv_bytes()

    def end(self) -> float:
        """End the client; return the 99th percentile of its latencies in ms."""
        self._pipe.send_bytes(b"end")
        error = self._receive()
        latencies = array.array("d", [])
        latencies.frombytes(self._receive())
        self._process.join()
        if error:
            raise WrongError(f"the well-behaved client: {error.decode()}")
        return percentiles(latencies)["p99"]


# Load


def flood(sockets: Iterable[socket.socket], blob: bytes, seconds: float, read: bool) -> None:
    """Send the blob again and again on all sockets, until the time is over or all are closed."""
    offsets = {sock.fileno(): 0 for sock in sockets}
    by_fd = {sock.fileno(): sock for sock in sockets}
    view = memoryview(blob)
    poll = select.epoll()

    def exchange(fd: int, event: int) -> None:
        if event & select.EPOLLIN and not by_fd[fd].recv(CHUNK):
            raise ConnectionResetError
        if event & select.EPOLLOUT:
            sent = by_fd[fd].send(view[offsets[fd] : offsets[fd] + CHUNK])
            offsets[fd] = (offsets[fd] + sent) % len(blob)
        elif event & (select.EPOLLHUP | select.EPOLLERR):
            raise ConnectionResetError

    def handle(fd: int, event: int) -> None:
        try:
            exchange(fd, event)
        except BlockingIOError:
            pass
        except OSError:
            poll.unregister(fd)
            del by_fd[fd]

    until = time.perf_counter() + seconds
    with contextlib.closing(poll):
        for fd in by_fd:
            poll.register(fd, select.EPOLLOUT | (select.EPOLLIN if read else 0))
        while by_fd and (left := until - time.perf_counter()) > 0:
            for fd, event in poll.poll(left):
                handle(fd, event)


def close_codes(sockets: Iterable[socket.socket], timeout: float) -> dict[int, int]:
    """Count the codes with which the server closes these connections; 1006 stands for none."""
    until = time.perf_counter() + timeout
    return dict(Counter(close_code(sock, until) for sock in sockets))


def close_code(sock: socket.socket, until: float) -> int:
    data = b""
    with contextlib.suppress(OSError):
        while select.select([sock], [], [], max(0.0, until - time.perf_counter()))[0]:
            more = sock.recv(CHUNK)
            data += more
            if data[:1] == bytes((0x80 | CLOSE,)):
                return int.from_bytes(data[2:4], "big")
            if not more:
                break
    return 1006


def deflating(server: Subject, count: int) -> "contextlib.closing[Caller]":
    caller = Caller(server.address, [(handshake(server.address[1], deflate=True), upgraded)])
    caller.run(count)
    return contextlib.closing(caller)


def settled(value: Callable[[], int], least: int) -> int:
    """Wait until the value has come down to `least`, but not forever; return the value."""
    until = time.perf_counter() + SETTLE
    while value() > least and time.perf_counter() < until:
        time.sleep(0.05)
    return value()


# The faults, each of which returns figures of its own


def unfinished(server: Subject, seconds: float) -> list[Figure]:
    blob = client_frame(BINARY, bytes(MIB), MASKS[0])[:-1]
    server.forget_peak()
    before = server.peak()
    with connections(server, 500) as sockets:
        for sock in sockets:
            sock.setblocking(True)
            sock.sendall(blob)
        codes = close_codes(sockets, SETTLE)
    held = (server.peak() - before) / MIB
    return [
        Figure("held for each", held / 500, 1.5, "MiB"),
        Figure("not closed by 1008", 500 - codes.get(1008, 0), 0),
    ]


def churn(server: Subject, seconds: float) -> list[Figure]:
    steps = [greeting(server), echo(TEXT, message(1), MASKS[1]), farewell()]
    start = time.perf_counter()
    for _ in range(10):
        with contextlib.closing(Caller(server.address, steps, hang_up=True)) as caller:
            caller.run(1000)
        # These connections end with a reset.
        with connections(server, 1000):
            pass
    return [Figure("time for 20,000 connections", time.perf_counter() - start, 60, "s")]


def _flooding(blob: bytes, read: bool, peers: int = 50, taken: float = 16.0) -> "Run":
    def run(server: Subject, seconds: float) -> list[Figure]:
        before = server.memory()
        with connections(server, peers) as sockets:
            flood(sockets, blob * (CHUNK // len(blob)), seconds, read)
            held = (server.memory() - before) / MIB
        return [Figure("held meanwhile", held, taken, "MiB")]

    return run


def bombs_below(server: Subject, seconds: float) -> list[Figure]:
    blob = client_frame(BINARY, deflated(bytes(MIB - 5)), MASKS[0], compressed=True)
    before = server.memory()
    with deflating(server, 50) as caller:
        flood(caller.open, blob * 50, seconds, read=False)
        held = (server.memory() - before) / MIB
    return [Figure("held for each of 50", held / 50, 1.5, "MiB")]


def bombs_above(server: Subject, seconds: float) -> list[Figure]:
    blob = client_frame(TEXT, deflated(b"a" * 16 * MIB)[: MIB // 2], MASKS[0], compressed=True)
    server.forget_peak()
    before, others = server.peak(), 0
    for _ in range(20):
        with deflating(server, 50) as caller:
            for sock in caller.open:
                sock.send(blob)
            others += 50 - close_codes(caller.open, SETTLE).get(1009, 0)
    return [
        Figure("taken at most", (server.peak() - before) / MIB, 64, "MiB"),
        Figure("of 1,000 not closed by 1009", others, 0),
    ]


def no_descriptors(server: Subject, seconds: float) -> list[Figure]:
    size = server.log.stat().st_size
    sockets = [socket.create_connection(server.address) for _ in range(200)]
    time.sleep(0.5)
    start, cpu = time.perf_counter(), server.cpu()
    time.sleep(seconds)
    share = (server.cpu() - cpu) / (time.perf_counter() - start) * 100
    lines = server.log.read_bytes()[size:].count(b"\n")
    close_all(sockets)
    start = time.perf_counter()
    with contextlib.suppress(ClosedError), connections(server, 1, echo(TEXT, message(1), MASKS[1])):
        pass
    return [
        Figure("CPU", share, 20, "%"),
        Figure("lines of log", lines, 10),
        Figure("until it accepts again", time.perf_counter() - start, 1.0, "s"),
    ]


def scans(server: Subject, seconds: float) -> list[Figure]:
    count = 0
    start = time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        if count >= 5000 * (now - start):
            time.sleep(0.001)
            continue
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.bind((f"127.0.0.{2 + count % 8}", 0))
            sock.connect(server.address)
        count += 1
    rate = count / (time.perf_counter() - start)
    return [Figure("5,000/s less what was reached", max(0.0, 5000 - rate), 1000, "/s")]


def hostile(server: Subject, seconds: float) -> list[Figure]:
    """31 MB of hostile headers and messages."""
    strange = "GET /\x9b\x85?secret HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    strange += "Origin: {}\r\nCookie: secret\r\n\r\n"
    head = strange.format("\x1b\x9b" * 7000).encode("latin-1")
    plain = handshake(server.address[1]).replace(
        b"Host:", b"Origin: http://\x9b\x85" + b"x" * 15_000 + b"\r\nHost:"
    )
    words = client_frame(TEXT, "\x1b[2J\x9b".encode() * 2500, MASKS[2])
    start, total = time.perf_counter(), 0
    while total < 31_000_000:
        with socket.create_connection(server.address) as sock, contextlib.suppress(ConnectionError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            for data in (head,) if total % 3 else (plain, words, b"\xff" * 15_000):
                sock.sendall(data)
                total += len(data)
    text = server.log.read_bytes()
    return [
        Figure("time for 31 MB", time.perf_counter() - start, 30, "s"),
        Figure("secrets in it", text.count(b"secret"), 0),
        Figure(
            "bytes in it that are not ASCII",
            sum(byte > 127 for byte in text.replace("…".encode(), b"")),
            0,
        ),
    ]


Run = Callable[[Subject, float], list[Figure]]


@dataclass(frozen=True)
class Fault:
    name: str
    title: str
    run: Run
    options: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


PINGS = client_frame(PING, b"p" * 125, MASKS[0])
BYTES = client_frame(TEXT, b"x", MASKS[1])
# In fragments of 1 byte: all but the last without FIN, all but the first a continuation.
FRAGMENTS = b"\x01" + BYTES[1:] + (b"\x00" + BYTES[1:]) * 30_000 + b"\x80" + BYTES[1:]
FEW = ("sh", "-c", 'ulimit -n 64; exec "$@"', "sh")

FAULTS = (
    Fault(
        "unfinished",
        "500 peers with an almost finished message of 1 MiB",
        unfinished,
        ("--stall-timeout=3",),
    ),
    Fault("churn", "20,000 connections, half of them ended by a reset", churn),
    Fault("pings", "pings from 50 peers that read the pongs", _flooding(PINGS, read=True)),
    # For each peer, 64 KiB of pongs wait, and what is left of the last read of up to 256 KiB.
    Fault(
        "pings-unread",
        "pings from 50 peers that do not",
        _flooding(PINGS, read=False, taken=50 * 0.4),
    ),
    Fault("bytes", "messages of 1 byte from 50 peers", _flooding(BYTES, read=True)),
    Fault(
        "bytes-unread",
        "the same, with replies that nobody reads",
        _flooding(BYTES, read=False, taken=50 * 1.1),
    ),
    Fault(
        "fragments",
        "messages in 30,000 fragments from 50 peers",
        _flooding(FRAGMENTS, read=True),
    ),
    Fault("bombs", "50 peers with bombs of just 1 MiB, replies not read", bombs_below),
    Fault("big-bombs", "1,000 bombs of 16 MiB, 50 at a time", bombs_above),
    Fault("descriptors", "200 peers where there are 64 descriptors", no_descriptors, before=FEW),
    Fault("scans", "5,000 connections a second that say nothing", scans),
    Fault("hostile", "31 MB of hostile headers and messages", hostile),
)


def measure(fault: Fault, options: argparse.Namespace) -> list[Figure]:
    with serving(
        options.ws_echo.resolve(), *fault.options, before=fault.before, core=options.server_core
    ) as server:
        # Without this, the figures would include what the first connections cost.
        with connections(server, 20 if fault.before else 200, echo(TEXT, message(1), MASKS[1])):
            pass
        time.sleep(0.3)
        descriptors, memory = server.descriptors(), server.memory()
        bystander = Bystander(server)
        figures = fault.run(server, options.seconds)
        p99 = bystander.end()
        more = settled(server.descriptors, descriptors) - descriptors
        kept = settled(server.memory, memory + int(KEPT * MIB)) - memory
        return [
            Figure("p99", p99, P99, "ms"),
            *figures,
            Figure("kept", kept / MIB, KEPT, "MiB"),
            Figure("descriptors kept", more, 0),
            Figure("log", server.log.stat().st_size, LOG, "bytes"),
            Figure("tracebacks", server.tracebacks(), 0),
        ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what hostile peers cost ws-echo.")
    add = parser.add_argument
    every = ", ".join(fault.name for fault in FAULTS)
    add("--only", metavar="A,B", help=f"measure these faults only, of {every}")
    add("--seconds", type=float, default=3.0, help="seconds of a flood (default: %(default)s)")
    text = "directory of echo_server.py"
    add("--ws-echo", type=Path, default=HERE.parent, metavar="DIR", help=text)
    add("--server-core", type=int, help="core of the server (default: any)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    known = {fault.name: fault for fault in FAULTS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        print(
            f"faults.py: unknown: {', '.join(unknown)}; here are {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    raise_file_limit()
    exceeded = 0
    for name in names:
        print(f"{name}: {known[name].title}", flush=True)
        try:
            figures = measure(known[name], options)
        except (MeasurementError, OSError) as error:
            print(f"    {getattr(error, 'label', 'FAILED')}: {error}", flush=True)
            exceeded += 1
            continue
        exceeded += sum(not figure.kept for figure in figures)
        print("".join(f"    {figure}\n" for figure in figures), end="", flush=True)
    print(f"{len(names)} faults, {exceeded} bounds exceeded")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
