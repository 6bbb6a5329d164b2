"""The load generator: plain sockets, epoll, and frames that are built in advance.

It runs in one thread on one core, and has to use less CPU than the fastest server. So the
loops below do nothing that could be done before they start.
"""

import array
import contextlib
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from errno import EINPROGRESS
from functools import partial
from typing import TypeVar

from servers import Address, Process, core_wait
from wire import (
    BINARY,
    CLOSE,
    MASKS,
    MIB,
    NORMAL,
    PREFIX,
    TEXT,
    Check,
    ClosedError,
    StalledError,
    WrongError,
    accepts_deflate,
    client_frame,
    deflated,
    difference,
    exactly,
    handshake,
    inflating,
    message_and_reply,
    server_frame,
    short,
    text,
    upgraded,
)

Result = dict[str, float]
# What to send, and the check of what comes back.
Step = tuple[bytes, Check]
T = TypeVar("T")

STALL = 10.0
OPEN_TIMEOUT = 90.0
PARALLEL = 50
CHUNK = 256 * 1024
# The time between two short messages on a connection that sends them at fixed times.
INTERVAL = 0.005
# The addresses to connect from. A single one would have too few ports for a long run.
SOURCES = [(f"127.0.0.{n}", 0) for n in range(2, 10)]
BIND_ADDRESS_NO_PORT = 24
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Settings:
    seconds: float
    warm_up: float
    idle: int


# Opening connections


def client_socket(number: int) -> socket.socket:
    """Return a socket to connect with. Its close is a reset, which leaves no TIME_WAIT."""
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
    sock.bind(SOURCES[number % len(SOURCES)])
    return sock


@dataclass(slots=True)
class Call:
    """A connection that has not finished its steps."""

    sock: socket.socket
    step: int = 0
    data: bytes = b""


class Caller:
    """Opens connections and takes each through the same steps, several at a time.

    With `hang_up`, a connection is finished when the server has closed it. Without, it is
    finished after the last step, and stays open.
    """

    def __init__(self, address: Address, steps: list[Step], hang_up: bool = False) -> None:
        self.finished = 0
        self.open: list[socket.socket] = []
        self._address = address
        self._steps = steps
        self._hang_up = hang_up
        self._started = 0
        self._calls: dict[int, Call] = {}
        self._poll = select.epoll()

    def run(self, count: int) -> None:
        """Finish that many connections."""
        limit = time.perf_counter() + OPEN_TIMEOUT
        self._fill(count)
        while self._calls:
            self._wait()
            if time.perf_counter() > limit:
                raise self._stalled()
            self._fill(count)

    def run_for(self, seconds: float) -> int:
        """Finish as many connections as possible in that time; return how many."""
        before = self.finished
        until = time.perf_counter() + seconds
        self._fill()
        while time.perf_counter() < until:
            self._wait()
            self._fill()
        return self.finished - before

    def go_on(self, count: int) -> None:
        """Take the steps that are possible now. Start connections until that many were started."""
        for fd, event in self._poll.poll(0):
            self._advance(fd, event)
        self._fill(count)

    def close(self) -> None:
        close_all(call.sock for call in self._calls.values())
        close_all(self.open)
        self._poll.close()

    def _wait(self) -> None:
        events = self._poll.poll(STALL)
        if not events:
            raise self._stalled()
        for fd, event in events:
            self._advance(fd, event)

    def _stalled(self) -> StalledError:
        waiting = len(self._calls)
        return StalledError(f"{waiting} connections wait for an answer, {self.finished} had it")

    def _fill(self, count: float = math.inf) -> None:
        while len(self._calls) < PARALLEL and self._started < count:
            self._start()

    def _start(self) -> None:
        sock = client_socket(self._started)
        sock.setblocking(False)
        fd = sock.fileno()
        self._calls[fd] = Call(sock)
        self._started += 1
        code = sock.connect_ex(self._address)
        if code not in (0, EINPROGRESS):
            raise ClosedError(f"connect: {os.strerror(code)}")
        self._poll.register(fd, select.EPOLLIN if self._greet(sock) else select.EPOLLOUT)

    def _greet(self, sock: socket.socket) -> bool:
        # Over loopback, the connection is usually established at once.
        try:
            sock.send(self._steps[0][0])
        except BlockingIOError:
            return False
        return True

    def _advance(self, fd: int, event: int) -> None:
        call = self._calls[fd]
        if event & select.EPOLLOUT:
            call.sock.send(self._steps[0][0])
            self._poll.modify(fd, select.EPOLLIN)
            return
        data = receive(call.sock)
        if call.step == len(self._steps):
            self._expect_end(data)
            self._finish(fd)
            call.sock.close()
        elif not data:
            raise ClosedError(f"the connection was closed at step {call.step + 1}")
        else:
            self._answer(fd, call, data)

    def _answer(self, fd: int, call: Call, data: bytes) -> None:
        call.data += data
        if not self._steps[call.step][1](call.data):
            return
        call.step += 1
        call.data = b""
        if call.step < len(self._steps):
            call.sock.send(self._steps[call.step][0])
        elif not self._hang_up:
            self._poll.unregister(fd)
            self._finish(fd)
            self.open.append(call.sock)

    def _expect_end(self, data: bytes) -> None:
        if data:
            raise WrongError(f"received after the close frame: {data[:32]!r}")

    def _finish(self, fd: int) -> None:
        del self._calls[fd]
        self.finished += 1


def receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""


def close_all(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.close()


def greeting(server: Process, deflate: bool = False) -> Step:
    return handshake(server.address[1], deflate), upgraded


def _echo() -> Step:
    message, reply = short(1)
    return message, exactly(reply)


ECHO = _echo()
FAREWELL: Step = (client_frame(CLOSE, NORMAL, MASKS[0]), exactly(server_frame(CLOSE, NORMAL)))


@contextlib.contextmanager
def connections(
    server: Process, count: int, *steps: Step, deflate: bool = False
) -> Iterator[list[socket.socket]]:
    """Open connections, take these steps on each, and close them in the end."""
    caller = Caller(server.address, [greeting(server, deflate), *steps])
    with contextlib.closing(caller):
        caller.run(count)
        yield caller.open


def visits(server: Process) -> "contextlib.closing[Caller]":
    steps = [greeting(server), ECHO, FAREWELL]
    return contextlib.closing(Caller(server.address, steps, hang_up=True))


# Measuring


class Meter:
    """Measures what the server and the load generator use from the time it is created."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._start = self._now()

    def _now(self) -> tuple[float, ...]:
        lost = self._server.waited() + core_wait("self")
        return lost, time.perf_counter(), self._server.cpu(), time.process_time()

    def per(self, count: int, unit: float, names: tuple[str, str, str]) -> Result:
        """Return the time, the CPU of the server and that of the generator, divided by `count`.

        The result also contains the share of the time that the two waited for their cores.
        """
        spent = [b - a for a, b in zip(self._start, self._now(), strict=True)]
        if not count:
            raise StalledError("nothing was answered in the time of the measurement")
        shares = {name: x / count * unit for name, x in zip(names, spent[1:], strict=True)}
        return shares | {"waited": spent[0] / spent[1]}

    def per_message(self, count: int) -> Result:
        result = self.per(count, 1e6, ("wall", "cpu", "client"))
        return result | {"rate": 1e6 / result["wall"]}


def measured(server: Process, settings: Settings, run: Callable[[float], T]) -> tuple[Meter, T]:
    """Warm up, then run again with a meter; return the meter and what the run has returned."""
    run(settings.warm_up)
    meter = Meter(server)
    return meter, run(settings.seconds)


def percentiles(latencies: "array.array[float]") -> Result:
    ordered = sorted(latencies)
    last = len(ordered) - 1
    return {"p50": ordered[last // 2] * 1e3, "p99": ordered[last * 99 // 100] * 1e3}


# One message in flight per connection, with latencies


class Exchange:
    """Connections that each send a short message again as soon as it has been answered."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        size = max(sock.fileno() for sock in sockets) + 1
        self._messages = [b""] * size
        self._replies = [b""] * size
        self._sent = [0.0] * size
        self._poll = select.epoll()
        for number, sock in enumerate(sockets):
            fd = sock.fileno()
            self._messages[fd], self._replies[fd] = short(number)
            self._poll.register(fd, select.EPOLLIN)
            self._sent[fd] = time.perf_counter()
            os.write(fd, self._messages[fd])

    def close(self) -> None:
        self._poll.close()

    def run(self, seconds: float) -> "array.array[float]":
        """Exchange messages for that time; return the latency of each."""
        poll, messages, replies = self._poll.poll, self._messages, self._replies
        sent, read, write, clock = self._sent, os.read, os.write, time.perf_counter
        latencies = array.array("d")
        add = latencies.append
        now = clock()
        until = now + seconds
        while now < until:
            events = poll(STALL)
            if not events:
                raise StalledError(f"no answer for {STALL:.0f} s")
            for fd, _ in events:
                data = read(fd, 4096)
                now = clock()
                if data != replies[fd]:
                    self._complete(fd, data)
                add(now - sent[fd])
                sent[fd] = now
                write(fd, messages[fd])
        return latencies

    def _complete(self, fd: int, data: bytes) -> None:
        """Receive the rest of a reply that has come in part, or raise WrongError."""
        check = exactly(self._replies[fd])
        while not check(data):
            if not select.select([fd], [], [], STALL)[0]:
                raise StalledError(f"the rest of an answer did not come for {STALL:.0f} s")
            more = os.read(fd, 4096)
            if not more:
                raise ClosedError("the connection was closed")
            data += more


def _exchange(server: Process, settings: Settings, sockets: list[socket.socket]) -> Result:
    with contextlib.closing(Exchange(sockets)) as exchange:
        meter, latencies = measured(server, settings, exchange.run)
        return meter.per_message(len(latencies)) | percentiles(latencies)


def single(server: Process, settings: Settings) -> Result:
    with connections(server, 1) as sockets:
        return _exchange(server, settings, sockets)


def one(server: Process, settings: Settings) -> Result:
    with connections(server, 100) as sockets:
        return _exchange(server, settings, sockets)


def many(server: Process, settings: Settings) -> Result:
    with connections(server, settings.idle, ECHO) as sockets:
        step = max(1, len(sockets) // 100)
        busy = sockets[::step][:100]
        result = _exchange(server, settings, busy)
        _check_quiet(set(sockets) - set(busy))
        return result


def _check_quiet(sockets: Iterable[socket.socket]) -> None:
    with contextlib.closing(select.epoll()) as poll:
        for sock in sockets:
            poll.register(sock.fileno(), select.EPOLLIN)
        events = poll.poll(0)
    if events:
        raise ClosedError(f"{len(events)} idle connections were closed, or received something")


# Streams of messages


class Stream:
    """A connection on which the same messages are sent over and over."""

    def __init__(self, sock: socket.socket, messages: bytes, replies: bytes) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        # How many times the messages are still to be sent.
        self.due = 0
        self._messages = memoryview(messages)
        self._offset = 0
        self._size = len(replies)
        # The replies over and over: enough to compare a whole chunk, wherever it begins.
        self._expected = replies + (replies * (CHUNK // self._size + 1))[:CHUNK]
        self._position = 0

    def send(self) -> bool:
        """Send a chunk of what is due; return whether anything is left."""
        if not self.due:
            return False
        with contextlib.suppress(BlockingIOError):
            self._offset += self.sock.send(self._messages[self._offset : self._offset + CHUNK])
        if self._offset == len(self._messages):
            self._offset = 0
            self.due -= 1
        return self.due > 0

    def receive(self, buffer: memoryview) -> int:
        """Receive and compare a chunk; return how many times it completes the replies."""
        try:
            data = buffer[: self.sock.recv_into(buffer)]
        except BlockingIOError:
            return 0
        if not data:
            raise ClosedError("the connection was closed")
        if not self._expected.startswith(data, self._position):
            raise WrongError(difference(self._expected[self._position :][: len(data)], bytes(data)))
        completed, self._position = divmod(self._position + len(data), self._size)
        return completed


class Streams:
    """Streams that share a poller."""

    def __init__(self, streams: list[Stream], window: int) -> None:
        self._streams = {stream.fd: stream for stream in streams}
        self._blocked: set[int] = set()
        self._buffer = memoryview(bytearray(CHUNK))
        self.poll = select.epoll()
        for stream in streams:
            self.poll.register(stream.fd, select.EPOLLIN)
            stream.due += window
            self._send(stream)

    def close(self) -> None:
        self.poll.close()

    def handle(self, fd: int, event: int) -> int:
        """Handle an event. Send again what has been answered, and return how many times it was."""
        stream = self._streams[fd]
        completed = stream.receive(self._buffer) if event & ~select.EPOLLOUT else 0
        stream.due += completed
        if completed or event & select.EPOLLOUT:
            self._send(stream)
        return completed

    def _send(self, stream: Stream) -> None:
        fd = stream.fd
        if stream.send():
            if fd not in self._blocked:
                self._blocked.add(fd)
                self.poll.modify(fd, select.EPOLLIN | select.EPOLLOUT)
        elif fd in self._blocked:
            self._blocked.discard(fd)
            self.poll.modify(fd, select.EPOLLIN)

    def run(self, seconds: float) -> int:
        """Exchange messages for that time; return how many times they were answered."""
        poll, handle, clock = self.poll.poll, self.handle, time.perf_counter
        count = 0
        until = clock() + seconds
        while clock() < until:
            events = poll(STALL)
            if not events:
                raise StalledError(f"no answer for {STALL:.0f} s")
            for fd, event in events:
                count += handle(fd, event)
        return count


def _stream(
    server: Process, settings: Settings, streams: list[Stream], window: int, batch: int
) -> Result:
    with contextlib.closing(Streams(streams, window)) as running:
        meter, count = measured(server, settings, running.run)
        return meter.per_message(count * batch)


def pipelined(server: Process, settings: Settings) -> Result:
    # Two halves are in flight, so that the server has one to answer when it is done with the other.
    half = 50
    with connections(server, 10) as sockets:
        streams = [_batch(sock, number * half, half) for number, sock in enumerate(sockets)]
        return _stream(server, settings, streams, window=2, batch=half)


def _batch(sock: socket.socket, first: int, count: int) -> Stream:
    messages, replies = zip(*map(short, range(first, first + count)), strict=True)
    return Stream(sock, b"".join(messages), b"".join(replies))


def _payload(opcode: int, size: int, number: int) -> bytes:
    """Return ASCII if it is to be text, and bytes of all values if it is to be binary."""
    line = text(number) if opcode == TEXT else bytes(range(256)) + text(number)
    return (line * (size // len(line) + 1))[:size]


def _single(sock: socket.socket, opcode: int, size: int, number: int) -> Stream:
    return Stream(sock, *message_and_reply(opcode, _payload(opcode, size, number), number))


def _large(server: Process, settings: Settings, opcode: int) -> Result:
    with connections(server, 10) as sockets:
        streams = [_single(sock, opcode, 65536, number) for number, sock in enumerate(sockets)]
        return _stream(server, settings, streams, window=1, batch=1)


def large_text(server: Process, settings: Settings) -> Result:
    return _large(server, settings, TEXT)


def large_binary(server: Process, settings: Settings) -> Result:
    return _large(server, settings, BINARY)


# One huge message at a time, among short ones

HUGE_SIZE = 8 * MIB
BACKGROUND = 10


class Background:
    """Connections on which short messages are sent at fixed times, answered or not."""

    def __init__(self, sockets: list[socket.socket], poll: select.epoll) -> None:
        self._streams = [Stream(sock, *short(number)) for number, sock in enumerate(sockets)]
        self._sent: dict[int, deque[float]] = {stream.fd: deque() for stream in self._streams}
        self._by_fd = {stream.fd: stream for stream in self._streams}
        self._buffer = memoryview(bytearray(4096))
        self._next = time.perf_counter()
        self._number = 0
        self.poll = poll
        self.latencies = array.array("d")
        for fd in self._sent:
            poll.register(fd, select.EPOLLIN)

    def __contains__(self, fd: int) -> bool:
        return fd in self._sent

    def pause(self) -> float:
        """Return the seconds until the next message is due."""
        return max(0.0, self._next - time.perf_counter())

    def send_due(self) -> None:
        while time.perf_counter() >= self._next:
            stream = self._streams[self._number % len(self._streams)]
            self._number += 1
            self._next += INTERVAL / len(self._streams)
            stream.due = 1
            self._sent[stream.fd].append(time.perf_counter())
            if stream.send():
                raise StalledError("a short message did not fit into the socket's buffer")

    def handle(self, fd: int) -> None:
        completed = self._by_fd[fd].receive(self._buffer)
        now = time.perf_counter()
        sent = self._sent[fd]
        for _ in range(completed):
            self.latencies.append(now - sent.popleft())


def _huge_turn(big: Streams, background: Background) -> int:
    """Handle what comes before the next short message is due; return the number of huge replies."""
    answered = 0
    for fd, event in big.poll.poll(background.pause()):
        if fd in background:
            background.handle(fd)
        else:
            answered += big.handle(fd, event)
    return answered


def _huge_run(big: Streams, background: Background, seconds: float) -> int:
    """Return how many huge messages were answered. The first after that time is the last."""
    background.latencies = array.array("d")
    count = 0
    last = time.perf_counter()
    until = last + seconds
    while not count or last < until:
        background.send_due()
        if answered := _huge_turn(big, background):
            count += answered
            last = time.perf_counter()
        elif time.perf_counter() > last + 2 * STALL:
            raise StalledError(f"no answer to {HUGE_SIZE} bytes in {2 * STALL:.0f} s")
    return count


def huge(server: Process, settings: Settings) -> Result:
    with connections(server, 1 + BACKGROUND) as sockets:
        streams = [_single(sockets[0], TEXT, HUGE_SIZE, 1)]
        with contextlib.closing(Streams(streams, window=1)) as big:
            background = Background(sockets[1:], big.poll)
            run = partial(_huge_run, big, background)
            meter, count = measured(server, settings, run)
            result = meter.per(count * HUGE_SIZE, 1e9, ("wall_byte", "cpu_byte", "client_byte"))
    return result | (percentiles(background.latencies) if background.latencies else {})


# Memory


def _memory(server: Process, count: int, *steps: Step) -> Result:
    # Without these, the result would include what the first connections cost.
    with contextlib.closing(Caller(server.address, [*steps, FAREWELL], hang_up=True)) as first:
        first.run(2 * PARALLEL)
    time.sleep(0.5)
    before = server.memory()
    with contextlib.closing(Caller(server.address, list(steps))) as caller:
        caller.run(count)
        time.sleep(1.0)
        _check_quiet(caller.open)
        return {"kilobytes": (server.memory() - before) / count / 1e3}


def idle_memory(server: Process, settings: Settings) -> Result:
    return _memory(server, settings.idle, greeting(server), ECHO)


def _negotiates_deflate(server: Process) -> bool:
    request, _ = greeting(server, deflate=True)
    answers: list[bytes] = []

    def check(data: bytes) -> bool:
        answers.append(data)
        return upgraded(data)

    with contextlib.closing(Caller(server.address, [(request, check)])) as caller:
        caller.run(1)
    return accepts_deflate(answers[-1])


def idle_memory_deflate(server: Process, settings: Settings) -> Result:
    negotiated = _negotiates_deflate(server)
    long = b"".join(b'{"number": %d, "name": "name %d"}' % (n, n * n) for n in range(100))[:2048]
    first = client_frame(TEXT, text(1), MASKS[1])
    body = deflated(long) if negotiated else long
    second = client_frame(TEXT, body, MASKS[2], compressed=negotiated)
    check = inflating(((TEXT, PREFIX + text(1)), (TEXT, PREFIX + long)))
    result = _memory(server, settings.idle, greeting(server, deflate=True), (first + second, check))
    return result | {"deflate": float(negotiated)}


# Connections that come and go

ARRIVALS = 2000


def connects(server: Process, settings: Settings) -> Result:
    with visits(server) as caller:
        meter, count = measured(server, settings, caller.run_for)
        return meter.per_message(count)


def _arrivals_run(caller: Caller, background: Background, seconds: float) -> float:
    """Return how many connections a second were finished."""
    background.latencies = array.array("d")
    before, began = caller.finished, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        background.send_due()
        caller.go_on(before + int(spent * ARRIVALS))
        for fd, _ in background.poll.poll(0):
            background.handle(fd)
    return (caller.finished - before) / spent


def arrivals(server: Process, settings: Settings) -> Result:
    with (
        connections(server, 100) as sockets,
        visits(server) as caller,
        contextlib.closing(select.epoll()) as poll,
    ):
        background = Background(sockets, poll)
        run = partial(_arrivals_run, caller, background)
        meter, rate = measured(server, settings, run)
        latencies = background.latencies
        return meter.per_message(len(latencies)) | percentiles(latencies) | {"arrivals": rate}


# The loads and the columns of the tables


@dataclass(frozen=True)
class Metric:
    key: str
    title: str
    digits: int
    more_is_better: bool = False
    # Whether servers are compared by it.
    compared: bool = True


@dataclass(frozen=True)
class Load:
    name: str
    title: str
    run: Callable[[Process, Settings], Result]
    metrics: tuple[Metric, ...]
    # The keys of the metrics that the picture shows.
    overview: tuple[str, ...] = ("rate", "cpu")
    deflate: bool = False


RATE = Metric("rate", "messages/s", 0, more_is_better=True)
CPU = Metric("cpu", "CPU per message, µs", 2)
CLIENT = Metric("client", "generator, µs", 2, compared=False)
P50 = Metric("p50", "p50, ms", 3)
P99 = Metric("p99", "p99, ms", 2)
KILOBYTES = Metric("kilobytes", "kB per connection", 2)

STREAM = (RATE, CPU, CLIENT)
EXCHANGE = (RATE, CPU, P50, P99, CLIENT)
HUGE = (
    Metric("cpu_byte", "CPU, ns/byte", 3),
    Metric("wall_byte", "time, ns/byte", 3),
    Metric("p50", "p50 of the short, ms", 2),
    Metric("p99", "p99 of the short, ms", 2),
    Metric("client_byte", "generator, ns/byte", 3, compared=False),
)
CONNECTS = (
    Metric("rate", "connects/s", 0, more_is_better=True),
    Metric("cpu", "CPU per connection, µs", 1),
    Metric("client", "generator, µs", 1, compared=False),
)

LOADS = (
    Load(
        "single",
        "1 connection, one message of 32 bytes in flight",
        single,
        (P50, P99, RATE, CPU, CLIENT),
        overview=("p50",),
    ),
    Load("one", "100 connections, one message of 32 bytes in flight each", one, EXCHANGE),
    Load("pipelined", "10 connections, 100 messages of 32 bytes in flight each", pipelined, STREAM),
    Load(
        "large-text",
        "10 connections, one text message of 64 KiB in flight each",
        large_text,
        STREAM,
    ),
    Load(
        "large-binary",
        "10 connections, one binary message of 64 KiB in flight each",
        large_binary,
        STREAM,
    ),
    Load(
        "huge",
        "one text message of 8 MiB at a time; 10 others each send 32 bytes every 5 ms",
        huge,
        HUGE,
        overview=("cpu_byte", "p99"),
    ),
    Load("many", "like one, while 9,900 other connections are idle", many, EXCHANGE),
    Load(
        "idle-memory",
        "memory of an idle connection after one echo",
        idle_memory,
        (KILOBYTES,),
        overview=("kilobytes",),
    ),
    Load(
        "idle-memory-deflate",
        "memory of an idle connection with permessage-deflate, after a compressed message of 2 KiB",
        idle_memory_deflate,
        (KILOBYTES, Metric("deflate", "negotiated", 0, compared=False)),
        overview=("kilobytes",),
        deflate=True,
    ),
    Load(
        "connects",
        "connect, handshake, one echo, close handshake; 50 at a time",
        connects,
        CONNECTS,
    ),
    Load(
        "arrivals",
        "100 connections send 32 bytes every 5 ms each, while 2,000 a second do as in connects",
        arrivals,
        (P50, P99, Metric("arrivals", "connects/s", 0, more_is_better=True)),
        overview=("p99",),
    ),
)
