#!/usr/bin/env python3
"""Measure what hostile peers cost: for each fault, print figures and their bounds.

Meanwhile, a well-behaved client in a process of its own sends a short message, and the next one
5 ms after the reply.
"""

import argparse
import array
import contextlib
import multiprocessing
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any

from loads import (
    CHUNK,
    ECHO,
    INTERVAL,
    client_socket,
    close_all,
    connections,
    percentiles,
    visits,
)
from options import add_ws_echo, chosen, split
from servers import Address, Growth, Process, raise_file_limit, running, ws_echo
from wire import (
    BINARY,
    MASKS,
    MIB,
    PING,
    TEXT,
    ClosedError,
    MeasurementError,
    StalledError,
    WrongError,
    client_frame,
    close_code,
    deflated,
    described,
    handshake,
    short,
)

PATIENCE = 10.0

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
    def within(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        value = f"{self.title} {self.value:,.4g} {self.unit}".rstrip()
        return f"{value} (at most {self.bound:,.4g}){'' if self.within else ' EXCEEDED'}"


# Takes a running server, and the seconds that a flood lasts.
Run = Callable[[Process, float], list[Figure]]


# The well-behaved client


def _echo(sock: socket.socket) -> float:
    """Send a message; return the seconds until the reply is there."""
    message, reply = short(7)
    start = time.perf_counter()
    sock.sendall(message)
    answer = sock.recv(4096)
    if answer != reply:
        raise WrongError(f"answered {answer!r}")
    return time.perf_counter() - start


def _keep_echoing(address: Address, pipe: "Connection[Any, Any]") -> None:
    """Send messages until the pipe has something; then put the error and the latencies into it."""
    latencies = array.array("d")
    error = ""
    with socket.create_connection(address, timeout=PATIENCE) as sock:
        sock.sendall(handshake(address[1]))
        sock.recv(4096)
        pipe.send("ready")
        pause = 0.0
        try:
            while not pipe.poll(pause):
                latencies.append(_echo(sock))
                pause = INTERVAL
        except (MeasurementError, OSError) as problem:
            error = str(problem)
    pipe.send((error, latencies))


class Bystander:
    """The well-behaved client, in a process of its own."""

    def __init__(self, server: Process) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_keep_echoing, args=(server.address, theirs), daemon=True
        )
        self._process.start()
        self._receive()

    def _receive(self) -> Any:
        if not self._pipe.poll(2 * PATIENCE):
            raise StalledError("the well-behaved client was not answered")
        return self._pipe.recv()

    def end(self) -> float:
        """End the client; return the 99th percentile of its latencies in ms."""
        self._pipe.send("end")
        error, latencies = self._receive()
        self._process.join()
        if error:
            raise WrongError(f"the well-behaved client: {error}")
        return percentiles(latencies)["p99"]


# What several faults do


class Flood:
    """Sockets on which the same bytes are sent over and over, until the peer closes them."""

    def __init__(self, sockets: Iterable[socket.socket], data: bytes, read: bool) -> None:
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self._offsets = dict.fromkeys(self._sockets, 0)
        self._data = memoryview(data)
        self._events = select.EPOLLOUT | (select.EPOLLIN if read else 0)

    def run(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        with contextlib.closing(select.epoll()) as poll:
            for fd in self._sockets:
                poll.register(fd, self._events)
            while self._sockets and (left := until - time.perf_counter()) > 0:
                for fd, event in poll.poll(left):
                    self._handle(poll, fd, event)

    def _handle(self, poll: select.epoll, fd: int, event: int) -> None:
        try:
            self._exchange(fd, event)
        except BlockingIOError:
            pass
        except OSError:
            poll.unregister(fd)
            del self._sockets[fd]

    def _exchange(self, fd: int, event: int) -> None:
        sock, offset = self._sockets[fd], self._offsets[fd]
        if event & select.EPOLLIN and not sock.recv(CHUNK):
            raise ConnectionResetError
        if event & select.EPOLLOUT:
            sent = sock.send(self._data[offset : offset + CHUNK])
            self._offsets[fd] = (offset + sent) % len(self._data)
        elif event & (select.EPOLLHUP | select.EPOLLERR):
            raise ConnectionResetError


def closed_by(code: int, sockets: Iterable[socket.socket]) -> int:
    """Return how many of these connections the server closes with that code."""
    until = time.perf_counter() + PATIENCE
    return Counter(_close_code(sock, until) for sock in sockets)[code]


def _close_code(sock: socket.socket, until: float) -> int | None:
    data = b""
    with contextlib.suppress(OSError):
        while select.select([sock], [], [], max(0.0, until - time.perf_counter()))[0]:
            more = sock.recv(CHUNK)
            data += more
            if not more or close_code(data):
                break
    return close_code(data)


# The faults, each of which returns figures of its own


def unfinished(server: Process, seconds: float) -> list[Figure]:
    most = client_frame(BINARY, bytes(MIB), MASKS[0])[:-1]
    server.forget_peak()
    before = server.peak()
    with connections(server, 500) as sockets:
        for sock in sockets:
            sock.setblocking(True)
            sock.sendall(most)
        others = len(sockets) - closed_by(1008, sockets)
    return [
        Figure("held for each", (server.peak() - before) / MIB / 500, 1.5, "MiB"),
        Figure("not closed by 1008", others, 0),
    ]


def churn(server: Process, seconds: float) -> list[Figure]:
    start = time.perf_counter()
    for _ in range(10):
        with visits(server) as caller:
            caller.run(1000)
        # These connections end with a reset.
        with connections(server, 1000):
            pass
    return [Figure("time for 20,000 connections", time.perf_counter() - start, 60, "s")]


def _flooding(data: bytes, read: bool, bound: float = 16.0) -> Run:
    def run(server: Process, seconds: float) -> list[Figure]:
        before = server.memory()
        with connections(server, 50) as sockets:
            Flood(sockets, data * (CHUNK // len(data)), read).run(seconds)
            held = (server.memory() - before) / MIB
        return [Figure("held meanwhile", held, bound, "MiB")]

    return run


def bombs_below(server: Process, seconds: float) -> list[Figure]:
    bomb = client_frame(BINARY, deflated(bytes(MIB - 5)), MASKS[0], compressed=True)
    before = server.memory()
    with connections(server, 50, deflate=True) as sockets:
        Flood(sockets, bomb * 50, read=False).run(seconds)
        held = (server.memory() - before) / MIB
    return [Figure("held for each of 50", held / 50, 1.5, "MiB")]


def bombs_above(server: Process, seconds: float) -> list[Figure]:
    bomb = client_frame(TEXT, deflated(b"a" * 16 * MIB)[: MIB // 2], MASKS[0], compressed=True)
    server.forget_peak()
    before, others = server.peak(), 0
    for _ in range(20):
        with connections(server, 50, deflate=True) as sockets:
            for sock in sockets:
                sock.send(bomb)
            others += len(sockets) - closed_by(1009, sockets)
    return [
        Figure("taken at most", (server.peak() - before) / MIB, 64, "MiB"),
        Figure("of 1,000 not closed by 1009", others, 0),
    ]


def no_descriptors(server: Process, seconds: float) -> list[Figure]:
    size = server.log.stat().st_size
    sockets = [socket.create_connection(server.address) for _ in range(200)]
    time.sleep(0.5)
    start, cpu = time.perf_counter(), server.cpu()
    time.sleep(seconds)
    share = (server.cpu() - cpu) / (time.perf_counter() - start) * 100
    lines = server.log.read_bytes()[size:].count(b"\n")
    close_all(sockets)
    start = time.perf_counter()
    with contextlib.suppress(ClosedError), connections(server, 1, ECHO):
        pass
    return [
        Figure("CPU", share, 20, "%"),
        Figure("lines of log", lines, 10),
        Figure("until it accepts again", time.perf_counter() - start, 1.0, "s"),
    ]


def scans(server: Process, seconds: float) -> list[Figure]:
    count = 0
    start = time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        if count >= 5000 * (now - start):
            time.sleep(0.001)
            continue
        with client_socket(count) as sock:
            sock.connect(server.address)
        count += 1
    rate = count / (time.perf_counter() - start)
    return [Figure("short of 5,000/s by", max(0.0, 5000 - rate), 1000, "/s")]


def _hostile_connections(port: int) -> list[tuple[bytes, ...]]:
    """Return what each of three connections sends."""
    refused = (
        b"GET /\x9b\x85?secret HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nOrigin: "
        + b"\x1b\x9b" * 7000
        + b"\r\nCookie: secret\r\n\r\n"
    )
    origin = b"Origin: http://\x9b\x85" + b"x" * 15_000 + b"\r\n"
    head = handshake(port).replace(b"Host:", origin + b"Host:")
    words = client_frame(TEXT, "\x1b[2J\x9b".encode() * 2500, MASKS[2])
    return [(refused,), (refused,), (head, words, b"\xff" * 15_000)]


def hostile(server: Process, seconds: float) -> list[Figure]:
    start, total = time.perf_counter(), 0
    for parts in cycle(_hostile_connections(server.address[1])):
        with client_socket(0) as sock, contextlib.suppress(ConnectionError):
            sock.connect(server.address)
            for data in parts:
                sock.sendall(data)
                total += len(data)
        if total >= 31_000_000:
            break
    log = server.log.read_bytes()
    strange = sum(byte > 127 for byte in log.replace("…".encode(), b""))
    return [
        Figure("time for 31 MB", time.perf_counter() - start, 30, "s"),
        Figure("secrets in the log", log.count(b"secret"), 0),
        Figure("bytes in the log that are not ASCII", strange, 0),
    ]


def halves(server: Process, seconds: float) -> list[Figure]:
    half = handshake(server.address[1])[:-2]
    before = server.memory()
    sockets = [socket.create_connection(server.address) for _ in range(2000)]
    for sock in sockets:
        sock.sendall(half)
    time.sleep(seconds / 2)
    held = (server.memory() - before) / len(sockets)
    until = time.perf_counter() + PATIENCE
    while server.descriptors() > 100 and time.perf_counter() < until:
        time.sleep(0.1)
    left = server.descriptors()
    close_all(sockets)
    return [
        Figure("held for each", held / 1000, 10, "kB"),
        Figure("descriptors after the handshake timeout", left, 100),
    ]


@dataclass(frozen=True)
class Fault:
    name: str
    title: str
    run: Run
    # The options of ws-echo, and the words that precede its command.
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
        "pings from 50 peers that do not read the pongs",
        _flooding(PINGS, read=False, bound=50 * 0.4),
    ),
    Fault(
        "bytes",
        "messages of 1 byte from 50 peers that read the replies",
        _flooding(BYTES, read=True),
    ),
    Fault(
        "bytes-unread",
        "messages of 1 byte from 50 peers that do not read the replies",
        _flooding(BYTES, read=False, bound=50 * 1.1),
    ),
    Fault(
        "fragments",
        "messages in 30,000 fragments from 50 peers",
        _flooding(FRAGMENTS, read=True),
    ),
    Fault("bombs", "bombs of almost 1 MiB from 50 peers that do not read the replies", bombs_below),
    Fault("big-bombs", "1,000 bombs of 16 MiB, 50 at a time", bombs_above),
    Fault("descriptors", "200 peers where there are 64 descriptors", no_descriptors, before=FEW),
    Fault("scans", "5,000 connections a second that say nothing", scans),
    Fault(
        "halves",
        "2,000 peers with half a handshake",
        halves,
        ("--handshake-timeout=5",),
    ),
    Fault("hostile", "31 MB of hostile headers and messages", hostile),
)


def measure(fault: Fault, options: argparse.Namespace) -> list[Figure]:
    candidate = ws_echo(options.ws_echo, "--log-level=info", *fault.options, before=fault.before)
    with running(candidate, core=options.server_core) as server:
        # Without these, the figures would include what the first connections cost.
        with connections(server, 20 if fault.before else 200, ECHO):
            pass
        time.sleep(0.3)
        growth = Growth(server)
        bystander = Bystander(server)
        figures = fault.run(server, options.seconds)
        return [
            Figure("p99", bystander.end(), P99, "ms"),
            *figures,
            Figure("kept", growth.memory(int(KEPT * MIB)) / MIB, KEPT, "MiB"),
            Figure("descriptors kept", growth.descriptors(), 0),
            Figure("log", server.log.stat().st_size, LOG, "bytes"),
            Figure("tracebacks", server.tracebacks(), 0),
        ]


def attempt(fault: Fault, options: argparse.Namespace) -> int:
    """Measure and print the figures of a fault; return how many bounds are exceeded."""
    print(f"{fault.name}: {fault.title}", flush=True)
    try:
        figures = measure(fault, options)
    except (MeasurementError, OSError) as error:
        print(f"    {described(error)}", flush=True)
        return 1
    print("".join(f"    {figure}\n" for figure in figures), end="", flush=True)
    return sum(not figure.within for figure in figures)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what hostile peers cost ws-echo.")
    add = parser.add_argument
    every = ", ".join(fault.name for fault in FAULTS)
    add("--only", type=split, metavar="A,B", help=f"measure these faults only, of {every}")
    add("--seconds", type=float, default=3.0, help="seconds of a flood (default: %(default)s)")
    add_ws_echo(parser)
    add("--server-core", type=int, help="core of the server (default: any)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        faults = chosen(options.only, FAULTS)
    except ValueError as error:
        print(f"faults.py: {error}", file=sys.stderr)
        return 2
    raise_file_limit()
    exceeded = sum(attempt(fault, options) for fault in faults)
    print(f"{len(faults)} faults, {exceeded} bounds exceeded")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
