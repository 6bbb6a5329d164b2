"""Tests of ws-echo on real sockets, TLS, processes and browsers, in the order of the module."""

from __future__ import annotations

import _ssl
import asyncio
import contextlib
import contextvars
import ctypes
import gc
import html
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from subprocess import PIPE
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from tornado import gen
from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPInputError
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets, bind_unix_socket
from tornado.web import Application
from tornado.websocket import WebSocketClosedError, WebSocketHandler
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.protocol import CLIENT, Protocol
from websockets.sync.client import ClientConnection, connect

import echo_server
from echo_server import (
    CannotServe,
    Connections,
    Deflate,
    EchoHandler,
    Options,
    Receiver,
    Sender,
    accept_deflate,
    echo_table,
    echo_texts,
    inherited_socket,
    listening_sockets,
    make_parser,
    parse_args,
    read_config,
)

# -------------------------------------------------------------------------------------------- Tools

MODULE = Path(echo_server.__file__)
# After so many seconds of waiting for something, a test has failed.
PATIENCE = 10.0
# RFC 6455 section 1.3.
NONCE = "dGhlIHNhbXBsZSBub25jZQ=="

HEADERS = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": NONCE,
    "Sec-WebSocket-Version": "13",
}


def start(*command: str, **options: Any) -> subprocess.Popen[str]:
    """Starts a command, with text in and out."""
    options = {"stdin": subprocess.DEVNULL, "text": True} | options
    return subprocess.Popen(command, **options)  # noqa: S603  # it is ours


def ended(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command that ends by itself."""
    options = {"capture_output": True, "text": True, "timeout": PATIENCE} | options
    return subprocess.run(command, **options)  # noqa: S603  # it is ours


class Process:
    """The server as a process of its own; `lines` is what it has said on standard error so far."""

    def __init__(self, *args: str, script: str = 'exec "$@"', **popen: Any) -> None:
        """`script` starts it in a shell, and `env` is added to its environment."""
        self.lines: list[str] = []
        popen["env"] = os.environ | popen.get("env", {})
        command = ["sh", "-c", script, "sh", sys.executable, str(MODULE), *args]
        self.popen = start(*command, stderr=PIPE, **popen)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        assert self.popen.stderr
        with self.popen.stderr as lines:
            for line in lines:
                self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.exit_code()
        assert not self.tracebacks()

    def tracebacks(self) -> list[str]:
        return [line for line in self.lines if "Traceback" in line or "exception was never" in line]

    def matching(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in list(self.lines) if (found := re.search(pattern, line))]

    def line(self, pattern: str, count: int = 1) -> re.Match[str]:
        """The first line that has this, after `count` of them have come."""
        until(lambda: len(self.matching(pattern)) >= count, lambda: f"{pattern!r}: {self.lines}")
        return self.matching(pattern)[0]

    @property
    def url(self) -> str:
        """Waits until it listens."""
        return self.line(r"\[SERVER\] listening on (wss?://\S+?)(,|$)")[1]

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def exit_code(self) -> int:
        """Waits until it has ended."""
        code = self.popen.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.exit_code()

    def dial(self, trust: ssl.SSLContext | None = None) -> socket.socket:
        """A connection; over TLS if `trust` is given."""
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        return trust.wrap_socket(sock, server_hostname="localhost") if trust else sock


Serve = Callable[..., Process]


def until(condition: Callable[[], Any], found: Callable[[], str] = str) -> None:
    """Polls until the condition holds; otherwise the failure says what was found."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, found()
        select.select([], [], [], 0.01)


def listens(address: tuple[str, int] | str) -> bool:
    """Whether anybody listens at an address, or at the path of a Unix socket."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        return probe.connect_ex(address) == 0


def request(
    line: str = "GET / HTTP/1.1", *, without: str = "", add: str = "", **changed: str
) -> bytes:
    """A handshake `without` a header, with lines added, or with values changed (Host="x")."""
    headers = HEADERS | {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [line, *(f"{name}: {headers[name]}" for name in headers if name != without)]
    return ("\r\n".join([*lines, *filter(None, [add])]) + "\r\n\r\n").encode("latin-1")


def answer(sock: socket.socket, data: bytes) -> tuple[int, Message, str]:
    """Status, headers and body of the response; the socket stays open."""
    sock.sendall(data)
    with http.client.HTTPResponse(sock, method=data.partition(b" ")[0].decode()) as response:
        response.begin()
        return response.status, response.headers, response.read().decode()


def refused(server: Process, data: bytes) -> tuple[int, Message, str]:
    """The response on a connection of its own."""
    with server.dial() as sock:
        return answer(sock, data)


def get(
    server: Process, path: str = "/", *, method: str = "GET", **headers: str
) -> tuple[int, Message, str]:
    """The response to a request on a connection of its own."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return refused(server, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())


def upgraded(
    server: Process | str, path: str = "/", trust: ssl.SSLContext | None = None, **changed: str
) -> socket.socket:
    """A socket after its handshake with a server, over TLS if `trust` is given; or with what
    listens at the path of a Unix socket."""
    if isinstance(server, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(server)
    else:
        sock = server.dial(trust)
    sock.sendall(request(f"GET {path} HTTP/1.1", **changed))
    assert is_let_in(sock)
    return sock


def is_let_in(sock: socket.socket) -> bool:
    """Whether the response to a handshake is 101. Nothing after its head is read."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (byte := sock.recv(1)):
        head += byte
    return head.startswith(b"HTTP/1.1 101")


def echoed(sock: socket.socket, message: str = "Hello!") -> str:
    sock.sendall(text(message))
    with sock.makefile("rb") as file:
        return read_frame(file)[1].decode()


def read_frame(file: BinaryIO) -> tuple[int, bytes]:
    """First byte and payload of a frame; the first byte is -1 at the end of the stream."""
    head = file.read(2)
    if len(head) < 2:
        return -1, b""
    size = {126: 2, 127: 8}.get(head[1], 0)
    length = int.from_bytes(file.read(size), "big") if size else head[1]
    return head[0], file.read(length)


def run(*args: str, streams: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the program, if it ends by itself, with its standard streams as a shell says, and
    without a terminal."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, str(MODULE), *args]
    return ended(*command, input="", start_new_session=True)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers on free ports; no server may have printed a traceback when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **popen: stack.enter_context(Process("--port=0", *args, **popen))


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """A server for all the tests that leave no trace in it."""
    with Process("--port=0") as process:
        yield process


@pytest.fixture(scope="module")
def tls(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The same with TLS."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    with Process("--port=0", f"--certfile={path}") as process:
        yield process


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Issues the certificates that the clients of these tests trust."""
    return trustme.CA()


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> Path:
    """A file with a key and a certificate for localhost."""
    path = tmp_path / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    """What a client needs to trust these certificates. It lacks the authorities of the system,
    which would take 20 ms to load."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


# The largest message in bytes, if a test needs to reach it quickly.
LIMIT = 4096
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN, RSV1, RSV2, RSV3 = 0x80, 0x40, 0x20, 0x10
KEY = b"\x37\xfa\x21\x3d"


def header(first: int, length: int, size: int = 0) -> bytes:
    """The header of a client's frame; `size` is that of a longer form of its length than needed,
    2 or 8 bytes."""
    size = size or (0 if length < 126 else 2 if length < 65536 else 8)
    short = {0: length, 2: 126, 8: 127}[size]
    extended = length.to_bytes(size, "big") if size else b""
    return bytes((first, 0x80 | short)) + extended + KEY


def masked(payload: bytes, key: bytes = KEY) -> bytes:
    """As one number, since Python is slow with each byte."""
    size = len(payload)
    keys = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")


def frame(first: int, payload: bytes = b"") -> bytes:
    """A client's frame."""
    return header(first, len(payload)) + masked(payload)


def text(payload: str) -> bytes:
    """A whole text message."""
    return frame(FIN | TEXT, payload.encode())


def close_body(code: int, reason: str = "") -> bytes:
    return struct.pack("!H", code) + reason.encode()


def close(code: int = 1000, reason: str = "") -> bytes:
    """A Close of a client."""
    return frame(FIN | CLOSE, close_body(code, reason))


def fragments(opcode: int, *payloads: bytes) -> bytes:
    """A message with a frame for each payload."""
    firsts = [opcode] + [CONTINUATION] * (len(payloads) - 1)
    firsts[-1] |= FIN
    return b"".join(map(frame, firsts, payloads))


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def packed(payload: bytes, level: int = 6) -> bytes:
    """The payload of a frame with RSV1."""
    return Deflate("", False, 15, level).compress(payload)


def inflated(payload: bytes, window_bits: int = 15) -> bytes:
    """The content of such a payload. It is inflated byte by byte, since zlib accepts a reference
    beyond the window if its target is in the same piece."""
    inflater = zlib.decompressobj(-window_bits)
    return b"".join(map(inflater.decompress, bytewise(payload + b"\0\0\xff\xff")))


def noise(length: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(length).randbytes(length)  # noqa: S311  # nobody has to guess them


# RFC 7692 section 7.2.3.1.
HELLO = bytes.fromhex("f248cdc9c90700")

# Each is invalid at its last byte, whatever comes after it.
NOT_UTF8 = {
    "a byte that no text has": b"\xff",
    "an overlong form": b"\xc0\x80",
    "an overlong form of three bytes": b"\xe0\x80\xaf",
    "a surrogate": b"\xed\xa0\x80",
    "a surrogate by its first two bytes": b"\xed\xa0",
    "above U+10FFFF": b"\xf4\x90",
    "five bytes": b"\xf8\x88",
    "a lone continuation": b"\x80",
    "a broken sequence": b"\xce\xbaa\xe2\x28",
}

BAD: dict[int, dict[str, bytes]] = {
    1002: {
        "unmasked text": b"\x81\x02hi",
        "unmasked empty text": b"\x81\x00",
        "unmasked ping": b"\x89\x00",
        "unmasked close": b"\x88\x02\x03\xe8",
        "RSV2": frame(FIN | RSV2 | TEXT, b"hi"),
        "RSV3": frame(FIN | RSV3 | BINARY, b"hi"),
        "RSV1 and RSV2": frame(FIN | RSV1 | RSV2 | TEXT, HELLO),
        "RSV2 on a ping": frame(FIN | RSV2 | PING),
        "RSV1 on a ping": frame(FIN | RSV1 | PING),
        "RSV1 on a pong": frame(FIN | RSV1 | PONG),
        "RSV1 on a close": frame(FIN | RSV1 | CLOSE),
        "RSV1 on a continuation": frame(TEXT, b"hi") + frame(FIN | RSV1, b"hi"),
        "RSV1 on a continuation of RSV1": frame(RSV1 | TEXT, HELLO) + frame(FIN | RSV1, HELLO),
        **{f"opcode {n}": frame(FIN | n) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
        "opcode 3 within a message": frame(TEXT, b"hi") + frame(FIN | 3),
        "fragmented ping": frame(PING),
        "fragmented pong": frame(PONG),
        "fragmented close": frame(CLOSE),
        "ping of 126 bytes": header(FIN | PING, 126),
        "pong of 126 bytes": header(FIN | PONG, 126),
        "close of 126 bytes": header(FIN | CLOSE, 126),
        "ping of 65536 bytes": header(FIN | PING, 65536),
        "ping with a long form of a short length": header(FIN | PING, 5, size=2),
        "continuation of nothing": frame(FIN | CONTINUATION, b"hi"),
        "unfinished continuation of nothing": frame(CONTINUATION, b"hi"),
        "text within text": frame(TEXT, b"hi") + frame(FIN | TEXT, b"hi"),
        "binary within text": frame(TEXT, b"hi") + frame(BINARY, b"hi"),
        "text within an empty start": frame(TEXT) + frame(FIN | TEXT),
        "text within compressed text": frame(RSV1 | TEXT, HELLO) + frame(FIN | RSV1 | TEXT, HELLO),
        "125 in two bytes": header(FIN | TEXT, 125, size=2),
        "0 in two bytes": header(FIN | BINARY, 0, size=2),
        "125 in eight bytes": header(FIN | TEXT, 125, size=8),
        "65535 in eight bytes": header(FIN | BINARY, 65535, size=8),
        "length 2^63": header(FIN | BINARY, 1 << 63),
        "length 2^64-1": header(FIN | TEXT, (1 << 64) - 1),
        "close of 1 byte": frame(FIN | CLOSE, b"\x03"),
        **{f"close {n}": close(n) for n in (0, 999, 1004, 1005, 2999, 5000)},
        "close within a message, with a bad code": frame(TEXT, b"hi") + close(1005),
    },
    1007: {
        **{f"text, {name}": frame(FIN | TEXT, b"a" + data) for name, data in NOT_UTF8.items()},
        **{f"in a fragment, {name}": frame(TEXT, b"a" + data) for name, data in NOT_UTF8.items()},
        **{
            f"inside a frame, {name}": header(FIN | TEXT, 100) + frame(0, data)[6:]
            for name, data in NOT_UTF8.items()
        },
        "unfinished character": frame(FIN | TEXT, "aé".encode()[:-1]),
        "unfinished character at the end of fragments": fragments(TEXT, "é".encode()[:1], b""),
        "surrogate over two fragments": frame(TEXT, b"\xed") + frame(CONTINUATION, b"\xa0"),
        "character broken by the next fragment": frame(TEXT, b"\xf0\x9f")
        + frame(CONTINUATION, b"a"),
        "compressed text": frame(FIN | RSV1 | TEXT, packed(b"abc\xff")),
        "compressed fragment": frame(RSV1 | TEXT, packed(b"abc\xff")),
        "compressed unfinished character": frame(FIN | RSV1 | TEXT, packed("é".encode()[:1])),
        "close reason": frame(FIN | CLOSE, close_body(1000) + b"\xff"),
        "unfinished close reason": frame(FIN | CLOSE, close_body(1000) + "é".encode()[:1]),
        "corrupt deflate data": frame(FIN | RSV1 | BINARY, b"\xff\xff\xff\xff"),
        "corrupt deflate data in a fragment": frame(RSV1 | BINARY, b"\xff\xff\xff\xff"),
        "deflate data of the context before": frame(FIN | RSV1 | TEXT, bytes.fromhex("f200110000")),
        "truncated deflate data": frame(FIN | RSV1 | BINARY, packed(b"Hello" * 9)[:-3]),
        "truncated stored block": frame(FIN | RSV1 | BINARY, packed(b"Hello", level=0)[:6]),
        "truncated deflate fragments": fragments(RSV1 | BINARY, HELLO[:3], HELLO[3:5]),
    },
    1008: {
        "1,025 empty fragments": frame(TEXT) + frame(CONTINUATION) * 1024,
        "1,025 empty fragments between others": frame(TEXT, b"a")
        + (frame(0) + frame(0, b"b")) * 1024
        + frame(0),
    },
    1009: {
        "message, before its key has come": header(FIN | TEXT, LIMIT + 1)[:-4],
        "huge message": header(FIN | BINARY, (1 << 63) - 1),
        "fragments": frame(TEXT, b"a" * LIMIT) + header(CONTINUATION, 1),
        "fragment sizes": frame(BINARY, b"a") + header(FIN | CONTINUATION, 1 << 40),
        "bomb": frame(FIN | RSV1 | BINARY, packed(bytes(LIMIT + 1))),
        "large bomb": frame(FIN | RSV1 | TEXT, packed(bytes(200 * LIMIT))),
        "bomb in fragments": fragments(
            RSV1 | BINARY, packed(bytes(LIMIT)) + b"\0\0\xff\xff", packed(b"a")
        ),
        "compressed size": header(FIN | RSV1 | BINARY, 2 * LIMIT),
        "compressed huge size": header(RSV1 | TEXT, 1 << 62),
    },
}


@pytest.fixture
def app() -> Application:
    return Application([("/echo", EchoHandler)], websocket_max_message_size=1 << 20)


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of our own logger."""
    return [record.getMessage() for record in caplog.records if record.name == "echo_server"]


def python(script: str) -> str:
    """What a script prints in an interpreter of its own, which finds the module."""
    done = ended(sys.executable, "-W", "error", "-c", script, cwd=MODULE.parent)
    return done.stdout + done.stderr


@contextlib.asynccontextmanager
async def listening(app: Application, **options: Any) -> AsyncIterator[int]:
    """Serves this application, on the port that it yields."""
    http, sockets = HTTPServer(app, **options), bind_sockets(0, "127.0.0.1")
    http.add_sockets(sockets)
    yield sockets[0].getsockname()[1]
    http.stop()
    await http.close_all_connections()
    await eventually(lambda: not Connections.current().open)


async def peer_at(
    address: int | str, trust: ssl.SSLContext | None = None, receive_buffer: int = 0
) -> Peer:
    """A peer of a server at this port, or at this path of a Unix socket, before its handshake."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(address if isinstance(address, str) else ("127.0.0.1", address))
    name = "localhost" if trust else None
    return Peer(
        *await asyncio.open_connection(sock=sock, ssl=trust, server_hostname=name, limit=4096)
    )


def said(*contents: str | bytes, first: int = FIN | TEXT) -> bytes:
    """Frames of the server."""
    payloads = [part.encode() if isinstance(part, str) else part for part in contents]
    return b"".join(echo_server.frame_header(first, len(part)) + part for part in payloads)


def pong(payload: bytes = b"") -> bytes:
    return said(payload, first=FIN | PONG)


class Peer:
    """A client that sends any bytes, and sees those that come back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        # The response to its handshake.
        self.head = ""

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def upgrade(self, *data: bytes) -> None:
        """Sends a handshake, and perhaps more; it is accepted."""
        self.send(*data)
        async with asyncio.timeout(PATIENCE):
            self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        assert self.head.startswith("HTTP/1.1 101 ")

    async def receive(self, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readexactly(size)

    async def frame(self) -> tuple[int, bytes]:
        """First byte and payload."""
        first, length = await self.receive(2)
        if length > 125:
            length = int.from_bytes(await self.receive(2 if length == 126 else 8), "big")
        return first, await self.receive(length)

    async def replies(self, *payloads: bytes, first: int = FIN | TEXT) -> bool:
        """Whether exactly these come next."""
        expected = said(*payloads, first=first)
        return await self.receive(len(expected)) == expected

    async def close_code(self) -> int | None:
        """The code of the Close that comes next; None if it has none."""
        first, payload = await self.frame()
        assert first == FIN | CLOSE
        return int.from_bytes(payload[:2], "big") if payload else None

    async def goodbye(self) -> int | None:
        """The code of the Close that comes next. It is answered, and then the end comes."""
        code = await self.close_code()
        self.send(close(code or 1000))
        assert await self.rest() == b""
        return code

    async def rest(self) -> bytes:
        """What comes before the server ends TCP; ConnectionResetError if it does so by a reset."""
        async with asyncio.timeout(PATIENCE):
            data = await self.reader.read()
        self.leave()
        return data

    async def shut(self) -> None:
        """Ends the sending side of TCP, below TLS, after everything has been sent."""
        await eventually(lambda: not self.writer.transport.get_write_buffer_size())
        self.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """Ends TCP, without a Close."""
        self.writer.close()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def eventually(condition: Callable[[], Any]) -> None:
    """Like until(), within the event loop."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # the server has no event for what a test may ask
            await asyncio.sleep(0.002)


@dataclass
class Host:
    """An application with our handler, and what connects to it."""

    app: Application
    address: int | str
    trust: ssl.SSLContext | None
    caplog: pytest.LogCaptureFixture
    monkeypatch: pytest.MonkeyPatch
    peers: list[Peer] = field(default_factory=list)

    def errors(self) -> list[str]:
        """The loggers of the errors in the log, which is then empty."""
        records = self.caplog.get_records("call")
        names = [record.name for record in records if record.levelno >= logging.ERROR]
        records.clear()
        return names

    def route(self, handler: type[EchoHandler] = EchoHandler, **initialize: Any) -> str:
        path = f"/{len(self.app.default_router.rules)}"
        self.app.add_handlers(".*", [(path, handler, initialize)])
        return path

    async def dial(self, receive_buffer: int = 0) -> Peer:
        self.peers.append(await peer_at(self.address, self.trust, receive_buffer))
        return self.peers[-1]

    async def connect(
        self,
        handler: type[EchoHandler] = EchoHandler,
        headers: Mapping[str, str] = {},
        early: bytes = b"",
        receive_buffer: int = 0,
        query: str = "",
        **initialize: Any,
    ) -> Peer:
        """A peer after its handshake, in one piece with which it sends `early`."""
        peer = await self.dial(receive_buffer)
        line = f"GET {self.route(handler, **initialize)}{query} HTTP/1.1"
        added = "\r\n".join(f"{name}: {headers[name]}" for name in headers)
        await peer.upgrade(request(line, add=added), early)
        return peer

    async def record(
        self, handler: type[Recorder], shut: bool = False, **options: Any
    ) -> tuple[Peer, Calls]:
        """A peer whose handler has opened, and the calls of the handler; the gate may be `shut`."""
        calls = Calls()
        if shut:
            calls.gate.clear()
        peer = await self.connect(handler, calls=calls, **options)
        await eventually(lambda: calls)
        return peer, calls

    async def finish(self) -> None:
        for peer in self.peers:
            peer.writer.transport.abort()
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()
        await eventually(lambda: not Connections.current().open)


@pytest.fixture
def transport() -> str:
    """A test or a class may choose others by parametrize."""
    return "tcp"


@pytest.fixture
def io_loop(transport: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[IOLoop]:
    """Like that of pytest-tornado, but perhaps with uvloop, or polling in a thread of its own."""
    if transport == "tcp as on Windows":
        monkeypatch.setattr(asyncio, "ProactorEventLoop", asyncio.SelectorEventLoop, raising=False)
    library = pytest.importorskip("uvloop") if "uvloop" in transport else asyncio
    # Otherwise Tornado would ask asyncio for the current one, which would make one that stays open.
    asyncio.set_event_loop(None)
    loop = IOLoop(asyncio_loop=library.new_event_loop())
    yield loop
    loop.clear_current()
    loop.close(all_fds=True)


@pytest.fixture(scope="module")
def ssl_options(authority: trustme.CA) -> ssl.SSLContext:
    """For the https_server of pytest-tornado."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def host(
    request: pytest.FixtureRequest,
    transport: str,
    app: Application,
    io_loop: IOLoop,
    http_port: int,
    caplog: pytest.LogCaptureFixture,
    trust: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Host]:
    """Serves `app`. In the end no connection is left, and the test has asked for all errors."""
    server = request.getfixturevalue("https_server" if transport == "tls" else "http_server")
    address: int | str = http_port
    if transport == "unix":
        address = str(tmp_path / "socket")
        server.add_socket(bind_unix_socket(address))
    if transport in ("tcp without epoll", "tcp as on Windows"):
        monkeypatch.delattr(select, "epoll", raising=False)
    if transport == "tcp as on Windows":
        monkeypatch.delattr(select, "poll")
        # A property without a getter, which no object has.
        monkeypatch.setattr(socket.socket, "sendmsg", property(), raising=False)
        for name in "fcntl", "termios":
            monkeypatch.setitem(sys.modules, name, None)
    # A connection that ends well does so without the limits of time, unless a test is `hurried`.
    for name in "CLOSE_TIMEOUT", "LINGER_TIMEOUT":
        monkeypatch.setattr(echo_server, name, 4 * PATIENCE)
    host = Host(app, address, trust if transport == "tls" else None, caplog, monkeypatch)
    yield host
    io_loop.run_sync(host.finish, timeout=PATIENCE)
    assert not host.errors()


class Calls(list[Any]):
    """The calls of a handler, in order."""

    handler: Recorder

    def __init__(self) -> None:
        super().__init__()
        # Coroutines may wait at this gate. It is open until a test shuts it.
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def closes(self) -> list[Any]:
        return [call for call in self if call[0] == "close"]


class Recorder(EchoHandler):
    def initialize(self, *args: Any, **options: Any) -> None:
        self.calls: Calls = options.pop("calls")
        super().initialize(*args, **options)

    def open(self, *args: str, **kwargs: str) -> Any:
        self.calls.handler = self
        self.calls.append(("open",))

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        self.calls.append(("message", message))
        return super().on_message(message)

    def on_ping(self, data: bytes) -> None:
        self.calls.append(("ping", data))

    def on_pong(self, data: bytes) -> None:
        self.calls.append(("pong", data))

    def on_close(self) -> None:
        self.calls.append(("close", self.close_code, self.close_reason))


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> Path:
    """A folder with a key and its certificate, and with files that are neither."""
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    authority.issue_cert("localhost").private_key_pem.write_to_path(str(tmp_path / "other-key"))
    # Before OpenSSL deciphers a key with these lines, it needs the password.
    encrypted = f"-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{'0' * 32}\n\n"
    key = issued.private_key_pem.bytes().decode()
    (tmp_path / "locked").write_text(key.replace("-----\n", encrypted, 1))
    (tmp_path / "junk").write_text("junk")
    return tmp_path


def everything(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(4096):
            data += part
    return data


def inheriting(serve: Serve, given: socket.socket, *arguments: str, offset: int = 0) -> Process:
    """A server that is started as by socket activation, with `given` as its descriptor 3."""
    script = f'exec env LISTEN_FDS=1 LISTEN_PID=$(($$ + {offset})) "$@" 3<&0'
    return serve(*arguments, script=script, stdin=given)


@contextlib.contextmanager
def bystander(server: Process, trust: ssl.SSLContext | None = None) -> Iterator[None]:
    """A WebSocket that was open before goes on, and then all descriptors have been given back."""
    server.line("listening")
    before = descriptors(server)
    with upgraded(server, trust=trust) as sock:
        yield
        assert echoed(sock) == "ECHO:Hello!"
    until(lambda: descriptors(server) <= before, lambda: f"{descriptors(server)}, not {before}")


def descriptors(server: Process) -> int:
    folder = Path(f"/proc/{server.popen.pid}/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def cut_off(sock: socket.socket) -> None:
    """Ends the connection with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def close_code(sock: socket.socket) -> int:
    """The code of the Close that comes, after whatever else."""
    with sock.makefile("rb") as file:
        while (got := read_frame(file))[0] != FIN | CLOSE:
            assert got[0] >= 0, "it has left without a Close"
    return int.from_bytes(got[1][:2], "big")


def send_until_refused(sock: socket.socket, data: bytes) -> None:
    """Sends without reading, until the kernel takes no more."""
    sock.settimeout(0.1)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.sendall(data)


def is_text(data: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return data.decode() is not None
    return False


def can_become_text(data: bytes) -> bool:
    """Whether it is UTF-8, or would be with a suitable ending, which is always one of these."""
    endings = b"", *(first + b"\x80" * n for first in (b"\x80", b"\xbf") for n in range(3))
    return any(is_text(data + ending) for ending in endings)


# ------------------------------------------------------------------------------------------ Handler

STATE = r"""
import asyncio, logging, os, signal, sys, threading, warnings
import tornado.options, tornado.web, tornado.websocket

def state():
    loggers = map(logging.getLogger, ["", "asyncio", "echo_server", "tornado", "tornado.access"])
    return {
        "options": sorted(tornado.options.options),
        "logging": [(logger.name, logger.level, logger.handlers[:]) for logger in loggers],
        "signals": [signal.getsignal(n) for n in signal.valid_signals()],
        "threads": threading.enumerate(),
        "hooks": [sys.excepthook, threading.excepthook, warnings.filters[:]],
        "descriptors": os.listdir("/dev/fd"),
    }

touched = []
watched = ("socket.", "subprocess.", "os.putenv")
sys.addaudithook(lambda event, args: event.startswith(watched) and touched.append(event))
before = state()
import echo_server
assert before == state(), (before, state())
print(touched, {"tomllib", "resource", "uvloop"} & sys.modules.keys())
"""


def test_importing_does_nothing() -> None:
    assert python(STATE) == "[] set()\n"


@pytest.mark.gen_test
class TestInAnApplication:
    @pytest.mark.parametrize(
        ("route", "arguments"),
        [(r"/to/(\w+)", [["Zoe"], {}]), (r"/to/(?P<name>\w+)", [[], {"name": "Zoe"}])],
    )
    async def test_open_is_called_with_the_groups_of_the_route(
        self, host: Host, route: str, arguments: list[Any]
    ) -> None:
        class Tells(EchoHandler):
            def open(self, *args: str, **kwargs: str) -> None:
                self.write_message(json.dumps([args, kwargs]))

        host.app.add_handlers(".*", [(route, Tells)])
        peer = await host.dial()
        await peer.upgrade(request("GET /to/Zoe?token=x HTTP/1.1"))
        assert json.loads((await peer.frame())[1]) == arguments

    @pytest.mark.parametrize(
        ("origins", "origin", "status"),
        [
            ([], "http://localhost", 101),
            ([], "http://localhost:1", 403),
            (["*"], "null", 101),
            (["https://a.example", "https://b.example"], "https://b.example", 101),
            (["https://a.example"], "http://localhost", 101),
            ("https://a.example, https://b.example", "https://b.example", 101),
        ],
    )
    async def test_embedded_only_pages_of_its_own_origin_and_of_those_named_may_connect(
        self, host: Host, origins: str | list[str], origin: str, status: int
    ) -> None:
        peer = await host.dial()
        peer.send(request(f"GET {host.route(origins=origins)} HTTP/1.1", Origin=origin))
        assert f" {status} " in (await peer.reader.readline()).decode()

    async def test_the_log_has_the_words_of_the_original_sample(
        self, host: Host, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG", "echo_server")
        peer = await host.connect(query="?token=secret")
        peer.send(text("Hello!"), text("Zoë\n"), text("ab" * 300), close(4001, "bye"))
        await eventually(lambda: len(ours(caplog)) == 5)
        first, *lines, last = ours(caplog)
        assert lines == [f"[SERVER] Received:{x}" for x in ("Hello!", r"Zo\xeb\n", "ab" * 100)]
        ending = r"close\(\) 4001 from 127.0.0.1:\d+ after \d\.\d s, 3 messages, 611 bytes"
        assert re.fullmatch(r"\[SERVER\] connection\(\) from 127.0.0.1:\d+ /\d+", first)
        assert re.fullmatch(rf"\[SERVER\] {ending}", last)


# ------------------------------------------------------------------------------------------- Frames

NO_TAKEOVER, TAKEOVER = Deflate("", False, 15), Deflate("", True, 15)
Event = tuple[int, bytes]


def feed(receiver: Receiver, data: bytes = b"") -> list[Event]:
    """The events of all the turns that these bytes take."""
    events = receiver.feed(data)
    while receiver.more:
        events += receiver.feed()
    return [(opcode, bytes(payload)) for opcode, payload in events]


def receive(
    pieces: Iterable[bytes], limit: int = LIMIT, deflate: Deflate | None = NO_TAKEOVER
) -> tuple[list[Event], int | None]:
    """The events that a Receiver makes of these pieces, and the code of its fault."""
    receiver = Receiver(limit, deflate)
    events = [event for piece in pieces for event in feed(receiver, piece)]
    return events, receiver.fault.code if receiver.fault else None


def receive_split(
    stream: bytes, limit: int = LIMIT, deflate: Deflate | None = NO_TAKEOVER
) -> tuple[list[Event], int | None]:
    """The same of a stream, which must not depend on whether it comes at once or bytewise."""
    whole = receive([stream], limit, deflate)
    assert receive(bytewise(stream), limit, deflate) == whole
    return whole


def cut(data: bytes, where: Iterable[int]) -> list[bytes]:
    """One piece more than there are cuts."""
    ends = sorted(min(i, len(data)) for i in where)
    return [data[i:j] for i, j in itertools.pairwise([0, *ends, len(data)])]


def finished(payload: bytes, window: bytes = b"") -> bytes:
    """A deflate stream that ends with BFINAL, and may refer back to a window."""
    compressor = zlib.compressobj(9, wbits=-15, zdict=window)
    return compressor.compress(payload) + compressor.flush()


# ---- Tables

PACKED = FIN | RSV1 | TEXT
HELLO_TEXT: list[Event] = [(TEXT, b"Hello")]
TWICE = finished(b"a word") + finished(b"a word", b"a word") + b"\0"
CHARACTERS = "\0é\ud7ff\ue000\U0010ffff\ufeff€".encode()

GOOD: dict[str, tuple[bytes, list[Event]]] = {
    "characters of every length, cut anywhere": (
        fragments(TEXT, *bytewise(CHARACTERS), b""),
        [(TEXT, CHARACTERS)],
    ),
    "a ping within a message that has not ended": (
        frame(TEXT, b"a") + frame(FIN | PING, b"p"),
        [(PING, b"p")],
    ),
    "a ping while a message is as long as the limit": (
        frame(TEXT, b"a" * LIMIT) + frame(FIN | PING, b"p" * 100) + frame(FIN),
        [(PING, b"p" * 100), (TEXT, b"a" * LIMIT)],
    ),
    "control frames of up to 125 bytes of anything": (
        frame(FIN | PING) + frame(FIN | PING, bytes(range(125))) + frame(FIN | PONG, b"\xff" * 125),
        [(PING, b""), (PING, bytes(range(125))), (PONG, b"\xff" * 125)],
    ),
    "a close with a reason of 123 bytes": (
        close(4999, "é" * 61 + "!"),
        [(CLOSE, close_body(4999, "é" * 61 + "!"))],
    ),
    "a second close": (close(1000) + close(1001), [(CLOSE, close_body(1000))]),
    # RFC 7692 section 7.2.3, in its order; for 7.2.3.2 see context takeover below.
    "one block": (frame(PACKED, HELLO), HELLO_TEXT),
    "one block in two fragments": (fragments(RSV1 | TEXT, HELLO[:3], HELLO[3:]), HELLO_TEXT),
    **{
        name: (frame(PACKED, bytes.fromhex(data)), HELLO_TEXT)
        for name, data in {
            "a block without compression": "000500faff48656c6c6f00",
            "a block with BFINAL": "f348cdc9c9070000",
            "a block with BFINAL and without the octet after it": "f348cdc9c90700",
            "two blocks in one message": "f24805000000ffffcac9c90700",
        }.items()
    },
    "an empty compressed message": (frame(PACKED, b"\0"), [(TEXT, b"")]),
    "two blocks with BFINAL, the second of which refers to the first": (
        frame(PACKED, TWICE) + fragments(RSV1 | TEXT, *bytewise(TWICE)),
        [(TEXT, b"a worda word")] * 2,
    ),
}


@pytest.mark.parametrize(("stream", "events"), GOOD.values(), ids=GOOD.keys())
def test_valid_frames_become_the_events_that_they_carry(stream: bytes, events: list[Event]) -> None:
    assert receive_split(stream) == (events, None)


@pytest.mark.parametrize("code", BAD)
def test_a_fault_has_its_code_at_its_last_byte_after_what_came_before(code: int) -> None:
    for name, data in BAD[code].items():
        stream = text("before") + data
        for rest in b"", frame(FIN) * 9 + text("after") + close():
            assert receive_split(stream + rest) == ([(TEXT, b"before")], code), name


# A fault of the content, and what ends its message.
STILL_TOLD_APART = {
    "not UTF-8": (1007, frame(TEXT, b"\xff"), frame(CONTINUATION, b"more") + frame(FIN)),
    "inside a frame": (1007, header(FIN | TEXT, 100) + b"\x00" * 50, b"\x00" * 50),
    "corrupt deflate data": (1007, frame(FIN | RSV1 | TEXT, b"\xff" * 4), b""),
    "too many fragments": (1008, frame(TEXT) + frame(0) * 1024, frame(0, b"a") + frame(FIN)),
    "too long": (1009, header(TEXT, LIMIT + 1), b"a" * (LIMIT + 1) + frame(FIN)),
    "far too long": (1009, header(FIN | BINARY, 3_000_000), bytes(3_000_000)),
    "too many deflate streams": (1008, frame(PACKED, b"\x03\x00" * 1025), b""),
    "a bomb": (
        1009,
        frame(RSV1 | TEXT, packed(bytes(LIMIT + 1))),
        frame(CONTINUATION, b"more") + frame(FIN),
    ),
}


@pytest.mark.parametrize("size", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    ("code", "fault", "rest"), STILL_TOLD_APART.values(), ids=STILL_TOLD_APART.keys()
)
def test_after_a_fault_in_the_content_the_close_is_still_found(
    code: int, fault: bytes, rest: bytes, size: int
) -> None:
    stream = text("before") + fault + rest + text("after") + frame(FIN | PING, b"p") + close()
    size = max(size, len(stream) // 5_000)
    events, found = receive(stream[at : at + size] for at in range(0, len(stream), size))
    assert found == code
    assert events == [(TEXT, b"before"), (PING, b"p"), (CLOSE, close_body(1000))]


def test_nothing_is_kept_after_a_bad_header() -> None:
    receiver = Receiver(LIMIT)
    feed(receiver, b"\xff" * 9)
    receiver.keep(text("hi"))
    assert (receiver.rest, receiver.more, receiver.in_sync) == (b"", False, False)


def test_a_close_may_have_the_codes_of_section_7_4_and_no_other() -> None:
    for code in (*range(5100), 65535):
        found = [(CLOSE, close_body(code))], None
        assert receive([close(code)]) == (found if code in MAY_BE_SENT else ([], 1002))


# ---- Sizes and turns


@pytest.mark.parametrize("limit", [125, 126, 65535, 65536, 1 << 20])
def test_a_message_may_have_exactly_the_limit(limit: int) -> None:
    """Also one that deflate makes longer, as with fixed codes."""
    for size in (limit, limit + 1):
        payload, zeros = noise(size), bytes(size)
        fixed = zlib.compressobj(1, wbits=-15, memLevel=1, strategy=zlib.Z_FIXED)
        longer = (fixed.compress(payload) + fixed.flush(zlib.Z_SYNC_FLUSH))[:-4]
        for stream, content in (
            (frame(FIN | BINARY, payload), payload),
            (fragments(BINARY, payload[:9], payload[9:]), payload),
            (frame(FIN | RSV1 | BINARY, packed(zeros)), zeros),
            (frame(FIN | RSV1 | BINARY, longer), payload),
        ):
            expected = ([(BINARY, content)], None) if size == limit else ([], 1009)
            assert receive([stream], limit) == expected
            assert receive([*bytewise(stream[:20]), stream[20:]], limit) == expected


def test_a_bomb_is_stopped_when_it_has_inflated_to_the_limit() -> None:
    bomb = frame(FIN | RSV1 | BINARY, packed(bytes(10 << 20)))
    assert receive([bomb[: len(bomb) // 4]], 1 << 20) == ([], 1009)


@pytest.mark.parametrize(("payload", "most"), [(b"a", 131_072), (b"", 1_024)])
def test_a_message_may_have_131_072_fragments_and_1_024_empty_ones(
    payload: bytes, most: int
) -> None:
    # Those of the message before do not count.
    stream = fragments(BINARY, payload, payload) + frame(BINARY, payload)
    stream += frame(CONTINUATION, payload) * (most - 1)
    assert receive([stream], 1 << 20) == ([(BINARY, payload * 2)], None)
    assert receive([stream, frame(FIN, payload)], 1 << 20)[1] == 1008


@pytest.mark.parametrize(
    ("data", "count", "most"),
    [
        (frame(FIN | RSV1 | BINARY, packed(bytes(1 << 20))), 20, 1),
        (frame(FIN | PING), 5000, 1024),
        (text("hi"), 5000, 1024),
        (frame(PACKED, HELLO), 5000, 1024),
    ],
    ids=["long", "ping", "text", "packed"],
)
def test_a_turn_ends_after_a_long_message_or_some_hundred_frames(
    data: bytes, count: int, most: int
) -> None:
    receiver = Receiver(1 << 20, NO_TAKEOVER)
    events = [len(receiver.feed(data * count + close()))]
    while receiver.more:
        events.append(len(receiver.feed()))
    assert sum(events) == count + 1 and max(events) <= most


def test_a_turn_ends_at_a_close_and_after_it_only_control_frames_count() -> None:
    receiver = Receiver(LIMIT)
    unfinished = frame(TEXT, b"un") + frame(FIN | PING, b"p") + header(FIN, 1 << 40) + b"finished"
    assert receiver.feed(frame(FIN | CLOSE) + text("hi") + unfinished) == [(CLOSE, b"")]
    assert receiver.more and receiver.feed() == [(PING, b"p")]
    assert receiver.feed(bytes(1 << 20)) == [] and not receiver.more
    assert receiver.fault is None and receiver.unfinished is None


def time_to_receive(stream: bytes) -> float:
    """The CPU seconds that a message takes."""
    began = time.process_time()
    events, code = receive([stream], 32 << 20)
    assert (len(events), code) == (1, None)
    return time.process_time() - began


def test_a_message_takes_a_time_that_is_linear_in_its_fragments() -> None:
    few, many = (
        time_to_receive(fragments(BINARY, *[bytes(100)] * count)) for count in (1000, 10_000)
    )
    assert many < 30 * few


def test_unfinished_changes_with_each_byte_of_a_message_and_is_none_after_it() -> None:
    receiver = Receiver(LIMIT)
    seen: list[tuple[int, int] | None] = []
    assert receiver.unfinished is None
    for byte in bytewise(frame(TEXT) + frame(CONTINUATION) + frame(CONTINUATION, b"ab")):
        receiver.feed(byte)
        seen.append(receiver.unfinished)
    assert None not in seen and len(set(seen)) == len(seen)
    receiver.feed(frame(FIN | PING, b"p")[:-1])
    assert receiver.unfinished == seen[-1]
    receiver.feed(frame(FIN | PING, b"p")[-1:] + frame(FIN))
    assert receiver.unfinished is None


@pytest.mark.parametrize("frames", [text("a"), frame(FIN | PING), fragments(TEXT, b"a", b"")])
def test_unfinished_changes_when_one_frame_has_ended_and_another_begun(frames: bytes) -> None:
    receiver, seen = Receiver(LIMIT), set()
    for piece in cut(frames * 10, range(3, 10 * len(frames), len(frames))):
        feed(receiver, piece)
        seen.add(receiver.unfinished)
    assert len(seen) == 11


# ---- permessage-deflate


@pytest.mark.parametrize("payload", [b"Hello", b"Hello" * 50, noise(300)], ids=len)
@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_deflate_data_that_ends_early_is_corrupt(payload: bytes, level: int) -> None:
    data = packed(payload, level)
    # A first byte 00 alone is the empty message.
    for i in range(1 + (data[0] == 0), len(data)):
        assert receive([frame(FIN | RSV1 | BINARY, data[:i])]) == ([], 1007), i
    assert receive([frame(FIN | RSV1 | BINARY, data)]) == ([(BINARY, payload)], None)


def test_a_message_may_refer_to_those_before_only_with_context_takeover() -> None:
    # RFC 7692 section 7.2.3.2: Hello, from the window of the message before.
    again = frame(PACKED, bytes.fromhex("f200110000"))
    stream = frame(PACKED, HELLO) + text("plain") + again
    before = [(TEXT, b"Hello"), (TEXT, b"plain")]
    assert receive_split(stream, deflate=TAKEOVER) == ([*before, (TEXT, b"Hello")], None)
    assert receive_split(stream, deflate=NO_TAKEOVER) == (before, 1007)


def test_context_takeover_reaches_back_as_far_as_deflate_does() -> None:
    words = [noise(n) for n in (100, 20_000, 32_500, 5, 40_000)]
    payloads = [words[i] for i in (0, 1, 0, 2, 2, 3, 1, 4, 4, 3, 0)]
    frames, window = [], b""
    for payload in payloads:
        frames.append(frame(FIN | RSV1 | BINARY, finished(payload, window)))
        window = (window + payload)[-32_768:]
    expected = [(BINARY, payload) for payload in payloads]
    assert receive(frames, 1 << 20, TAKEOVER) == (expected, None)
    assert sum(map(len, frames)) < sum(map(len, payloads)) - 29_000


def test_many_blocks_with_bfinal_take_a_time_that_is_linear_in_them() -> None:
    """Neither what is before them nor what comes after them is copied for each."""
    before, after = finished(bytes(8 << 20)), finished(noise(8 << 20))
    few, many = (
        time_to_receive(frame(FIN | RSV1 | BINARY, before + finished(b"a") * count + after))
        for count in (10, 1000)
    )
    assert many < 3 * few


OFFER = "permessage-deflate"

# Offers, and what is answered; None where that is the offer.
TAKEN = {
    OFFER: None,
    f"{OFFER}; server_no_context_takeover": None,
    f"{OFFER}; client_no_context_takeover": None,
    f"{OFFER}; client_max_window_bits=8": None,
    f"{OFFER}; client_max_window_bits=15": None,
    f"{OFFER}; server_max_window_bits=9": None,
    f"{OFFER}; server_max_window_bits=15": None,
    f"{OFFER}; client_no_context_takeover; client_max_window_bits=11": None,
    f"{OFFER}; client_max_window_bits": OFFER,
    f'{OFFER}; client_max_window_bits="10"': f"{OFFER}; client_max_window_bits=10",
    f'{OFFER}; server_max_window_bits="10"': f"{OFFER}; server_max_window_bits=10",
    f" {OFFER} ;\tserver_max_window_bits=12 ": f"{OFFER}; server_max_window_bits=12",
    f"{OFFER}; server_max_window_bits=10, {OFFER}": f"{OFFER}; server_max_window_bits=10",
    f"{OFFER}; server_max_window_bits=8, {OFFER}": OFFER,
    f'permessage-other; x="a,b", {OFFER},': OFFER,
}

NOT_9_TO_15 = "", "8", "16", "010", "09", "+9", "1_0", "٩", '"9', '9"', "'9'", '"16"', "9 9"
NOT_8_TO_15 = "", "7", "16", "08", '"8', '""'

DECLINED = [
    "",
    "x-permessage-deflate",
    f"{OFFER}d",
    f"{OFFER}\xa0",
    f"{OFFER};\x85client_max_window_bits=10",
    f"{OFFER} server_no_context_takeover",
    f'x; y=", {OFFER}, "',
    f"{OFFER}; ",
    f"{OFFER}; unknown",
    f"{OFFER}; server_no_context_takeover=1",
    f"{OFFER}; client_no_context_takeover=true",
    f"{OFFER}; server_max_window_bits",
    *(f"{OFFER}; server_max_window_bits={bits}" for bits in NOT_9_TO_15),
    *(f"{OFFER}; client_max_window_bits={bits}" for bits in NOT_8_TO_15),
    f"{OFFER}; server_no_context_takeover; server_no_context_takeover",
    f"{OFFER}; server_max_window_bits=10; server_max_window_bits=9",
    f"{OFFER}; client_max_window_bits; client_max_window_bits=9",
]


@pytest.mark.parametrize(("offers", "answer"), TAKEN.items())
def test_the_first_suitable_offer_is_taken_and_each_of_its_parameters_answered(
    offers: str, answer: str | None
) -> None:
    agreed = accept_deflate(offers, {})
    assert agreed and agreed.answer == (answer or offers)
    bits = re.search(r"server_max_window_bits=(\d+)", agreed.answer)
    assert (agreed.window_bits, agreed.level) == (int(bits[1] if bits else 15), 1)
    assert agreed.takeover == ("client_no_context_takeover" not in agreed.answer)


def test_an_unsuitable_offer_is_declined() -> None:
    for offers in DECLINED:
        assert accept_deflate(offers, {}) is None, offers
        assert accept_deflate(f"{offers}, {offers}", {}) is None, offers


@pytest.mark.parametrize("bits", range(9, 16))
def test_a_reply_keeps_to_the_window_that_was_asked_for(bits: int) -> None:
    payload = noise(3000) * 30
    data = Deflate("", False, bits, 6).compress(payload)
    assert inflated(data, bits) == payload


# ---- What is sent


def test_a_pong_waits_while_the_peer_does_not_read_and_only_the_latest_ping_counts() -> None:
    sender = Sender()
    assert sender.answer(b"1", congested=False) == pong(b"1")
    assert sender.answer(b"2", congested=True) == b""
    assert sender.answer(b"3", congested=True) == b""
    assert sender.last(congested=True, waiting=False) == b""
    assert sender.last(congested=False, waiting=True) == pong(b"3")
    assert sender.answer(b"4", congested=True) == b""
    assert sender.answer(b"5", congested=False) == pong(b"5")
    assert sender.last(congested=False, waiting=False) == b""


def test_our_close_is_sent_once_and_last() -> None:
    sender = Sender()
    sender.our_close = b"goodbye"
    assert sender.last(congested=False, waiting=True) == b""
    sender.answer(b"p", congested=True)
    assert sender.last(congested=True, waiting=False) == b""
    assert sender.last(congested=False, waiting=True) == pong(b"p")
    sender.answer(b"q", congested=True)
    assert sender.last(congested=False, waiting=False) == pong(b"q") + b"goodbye"
    assert sender.last(congested=False, waiting=False) == b""


@pytest.mark.parametrize("bits", [0, 9, 15])
def test_websockets_reads_what_is_sent_and_from_1_kib_it_is_compressed(bits: int) -> None:
    sender = Sender(Deflate("", False, bits) if bits else None)
    other = Protocol(CLIENT, max_size=None)
    other.extensions = [PerMessageDeflate(True, True, bits, 15)] if bits else []
    for length in (5, 125, 126, 1023, 1024, 65535, 65536, 200_000):
        payload = noise(length // 2) + bytes(length - length // 2)
        head, rest = sender.message(BINARY, payload[5:], prefix=payload[:5])
        assert head[0] == FIN | BINARY | RSV1 * (bits > 0 and length >= 1024)
        other.receive_data(head + rest)
        assert other.events_received() == [Frame(Opcode.BINARY, payload)]


TABLE = echo_table(b"ECHO:", LIMIT)

OTHER_FRAMES = {
    "nothing": b"",
    "the start of a text": text("ab")[:-1],
    "text that is not ASCII": text("é"),
    "a text of 126 bytes": text("a" * 126),
    "binary": frame(FIN | BINARY, b"a"),
    "a fragment": frame(TEXT, b"a"),
    "compressed text": frame(PACKED, HELLO),
    "a ping": frame(FIN | PING),
    "unmasked text": b"\x81\x01a" + KEY,
}


@pytest.mark.parametrize("rest", OTHER_FRAMES.values(), ids=OTHER_FRAMES.keys())
def test_echo_texts_answers_short_ascii_texts_up_to_the_first_other_frame(rest: bytes) -> None:
    words = "", "Hello!", "x" * 125
    short = b"".join(map(text, words))
    replies = [said(f"ECHO:{word}") for word in words]
    assert echo_texts(short + rest, TABLE) == (replies, len(short))


def test_echo_texts_ends_after_some_kilobytes_and_before_a_text_above_the_limit() -> None:
    data = text("Hello!") * 10_000
    replies, end = echo_texts(data, TABLE)
    assert end == len(replies) * len(text("Hello!")) < len(data)
    for size in range(20):
        replies, _ = echo_texts(text("") * 20_000, echo_table(b"x" * size, LIMIT))
        assert len(b"".join(replies)) < 66_000
    assert echo_texts(text("x" * 101), echo_table(b"ECHO:", 100)) == ([], 0)


# --------------------------------------------------------------------------------------- Connection

DEFLATE = {"Sec-WebSocket-Extensions": "permessage-deflate"}

# A test without a mark runs over TCP alone; what depends on what is between peer and handler runs
# over more of that. macOS has no epoll, and some hosts run uvloop.
EVERYTHING = ["tcp", "tcp without epoll", "tcp as on Windows", "tcp over uvloop", "tls"]
EITHER_LOOP = ["tcp", "tcp over uvloop"]
over_everything = pytest.mark.parametrize("transport", EVERYTHING)
over_tcp_and_tls = pytest.mark.parametrize("transport", ["tcp", "tls"])

WORD = "x" * 100_000
REPLY = b"ECHO:" + WORD.encode()


class Waiting(Recorder):
    """Its on_message is a coroutine, which waits at the gate."""

    async def on_message(self, message: str | bytes) -> None:
        self.calls.append(("start", message))
        await self.calls.gate.wait()
        await asyncio.sleep(0)
        self.calls.append(("end", message))
        await self.write_message(message)


def doing(method: str, does: Callable[..., Any], base: type[EchoHandler] = Recorder) -> Any:
    """A handler in one of whose methods this is done: in on_message instead of what the base does,
    in others after it."""

    def do(self: EchoHandler, *args: Any) -> Any:
        if method != "on_message":
            getattr(base, method)(self, *args)
        return does(self, *args)

    return type("Doing", (base,), {method: do})


@contextlib.asynccontextmanager
async def little_memory(most: int) -> AsyncIterator[None]:
    """What is done meanwhile leaves at most so many bytes in memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[0] < most
    finally:
        tracemalloc.stop()


async def taken(peer: Peer, data: bytes) -> None:
    """Sends it, and waits until it has left."""
    peer.send(data)
    await eventually(lambda: not peer.writer.transport.get_write_buffer_size())


async def have_turns(other: Peer, turns: int) -> None:
    for _ in range(turns):
        other.send(text("a"))
        assert await other.replies(b"ECHO:a")


async def others_have_their_turn(host: Host, turns: int = 5) -> None:
    """Long enough for the server to do what it wants to do for another peer."""
    await have_turns(await host.connect(), turns)


async def sweep() -> None:
    """The server looks at its deadlines once more."""
    before = Connections.current().now
    await eventually(lambda: Connections.current().now > before)


@pytest.fixture
def hurried(host: Host) -> None:
    """The limits of time for a closing peer, so that a second is far more than they are."""
    for name in "CLOSE_TIMEOUT", "LINGER_TIMEOUT":
        host.monkeypatch.setattr(echo_server, name, 0.3)


# ---- What is sent, and what comes back


def fail(*_: object) -> None:
    raise ZeroDivisionError


def generate(handler: EchoHandler, message: str) -> Iterator[Awaitable[None]]:
    yield handler.write_message(message)


def ping_without_delay(handler: Any) -> None:
    sock, option = handler.ws_connection.stream.socket, (socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for value in (0, 1):
        handler.set_nodelay(bool(value))
        assert sock.family == socket.AF_UNIX or sock.getsockopt(*option) == value
    handler.ping(b"are you there?")


def write_ten(handler: EchoHandler, message: str) -> None:
    """More than the kernels take."""
    for _ in range(10):
        handler.write_message(WORD * 10)


async def write_without_awaiting(handler: EchoHandler, message: str) -> None:
    """In a task of its own, as many do."""

    async def write() -> None:
        while True:
            handler.write_message("more")
            await asyncio.sleep(0.01)

    await asyncio.gather(write())


def close_and_write(handler: Any, message: str) -> None:
    handler.ws_connection.stream.close()
    handler.write_message(message)


async def wait(handler: Recorder, *_: object) -> None:
    await handler.calls.gate.wait()
    handler.calls.append(("waited",))


async def wait_and_drop(handler: Recorder, message: str) -> None:
    await wait(handler)
    # Tornado's protocol has it, too, and hosts call it.
    cast(Any, handler.ws_connection)._abort()


async def close_and_wait(handler: Recorder, message: str) -> None:
    handler.close(4000)
    await handler.calls.gate.wait()
    handler.calls.append(("message", message))


def set_close_callback(handler: Any) -> None:
    handler.ws_connection.stream.set_close_callback(lambda: None)


async def set_a_method(handler: Any) -> None:
    await asyncio.sleep(0)
    handler.on_message = handler.write_message


Closing = doing("on_message", close_and_wait)


class Picky(EchoHandler):
    def open(self, *args: str, **kwargs: str) -> None:
        self.write_message(str(self.selected_subprotocol))

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return subprotocols[-1]

    def get_compression_options(self) -> dict[str, Any] | None:
        return {"compression_level": 9, "mem_level": 9}


class Plainly(EchoHandler):
    """Its methods do not call ours, and have parameters of their own: mypy has to allow what it
    allows where Tornado's class is the base."""

    def initialize(self, database: str) -> None:
        self.database = database

    async def open(self, *, room: str = "lobby") -> None:
        self.room = room

    async def on_message(self, message: str | bytes) -> None:
        await self.write_message(f"{self.prefix}{self.database} in the {self.room}")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.finish("an error page")


class Careless(Recorder):
    """It has limits that are none, and methods that return nothing, or something."""

    ping_interval = ping_timeout = cast(Any, -1.0)
    max_message_size = cast(Any, float("inf"))

    def finish(self, *args: Any) -> Any:
        super().finish(*args)

    def write_message(self, *args: Any) -> Any:
        super().write_message(*args)

    def on_close(self) -> Any:
        super().on_close()
        return 5


class OfTornado(Recorder):
    get_websocket_protocol: Any = WebSocketHandler.get_websocket_protocol


class WithNames(EchoHandler):
    """It has names that are usual in applications."""

    __slots__ = ("server",)
    connection = origins = stall_timeout = property(lambda _: "of the host")
    compression = scenario = scenarios = peer = connection


class Script(NamedTuple):
    """What a peer sends at once, what comes back, and the code of the Close after that.

    The code is None where the Close has none, and 0 where no Close comes.
    """

    sent: bytes
    replies: bytes = b""
    code: int | None = 0
    handler: type[EchoHandler] = EchoHandler
    # What a Recorder is called with after open().
    calls: list[Any] | None = None
    # Of the connection: its headers, what comes in one piece with them, options of the handler.
    headers: Mapping[str, str] = {}
    early: bytes = b""
    options: Mapping[str, Any] = {}
    # Headers of the answer to the handshake; "" where there is none.
    head: Mapping[str, str] = {}
    # The gate of a Recorder is shut until this has come.
    held: bytes = b""
    # What the peer sends after our Close, in place of its own with the same code.
    last: bytes = b""
    over: Iterable[str] = ("tcp",)


NUMBERED = [str(number) for number in range(500)]
WORDS = ["", "\U0001f600 Zoë\0", "x" * 125, "x" * 126, "é" * 32768, "x" * (1 << 20)]
LEFT = [("close", None, None)]
PROTOCOL, EXTENSIONS = "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"
BEST = Deflate("", False, window_bits=15, level=9, mem_level=9)

SCRIPTS = {
    **{
        f"replies come in order from {name}": Script(
            b"".join(map(text, NUMBERED)), said(*NUMBERED), handler=handler, options={"prefix": ""}
        )
        for name, handler in {
            "the shortcut": EchoHandler,
            "on_message": doing("on_message", EchoHandler.on_message, EchoHandler),
            "an on_message that returns a future": doing("on_message", EchoHandler.write_message),
            "a coroutine of Tornado": doing("on_message", gen.coroutine(generate)),
        }.items()
    },
    "9000 frames and a close in one packet with the handshake are answered": Script(
        b"",
        said("ECHO:" + "x" * 110) * 9000,
        4000,
        early=text("x" * 110) * 9000 + close(4000),
        over=EVERYTHING,
    ),
    **{
        f"a close with code {code} is answered, and nothing after it is handled": Script(
            text("last") + last + text("too late") + frame(FIN | PING),
            said("ECHO:last"),
            code,
            handler=Recorder,
            calls=[("message", "last"), ("close", code, reason)],
        )
        for last, code, reason in ((frame(FIN | CLOSE), None, None), (close(4999, "é"), 4999, "é"))
    },
    **{
        f"{len(prefix)} characters of prefix come before text and binary": Script(
            b"".join(frame(FIN | kind, word.encode()) for kind in (TEXT, BINARY) for word in WORDS),
            said(*(prefix + word for word in WORDS))
            + said(*(prefix + word for word in WORDS), first=FIN | BINARY),
            options={"prefix": prefix},
        )
        for prefix in ("ECHO:", "", "é" * 70)
    },
    "replies and pongs leave in the order in which the methods of a handler are called": Script(
        text("a") + frame(FIN | PING, b"p") + frame(FIN | BINARY, b"b") + frame(FIN | PONG, b"q"),
        said("ECHO:a") + pong(b"p") + said("ECHO:b", first=FIN | BINARY),
        handler=Recorder,
        calls=[("message", "a"), ("ping", b"p"), ("message", b"b"), ("pong", b"q")],
        over=EVERYTHING,
    ),
    "a handler may ping and set TCP_NODELAY": Script(
        frame(FIN | PONG, b"yes") + text("a"),
        said(b"are you there?", first=FIN | PING) + said("ECHO:a"),
        handler=doing("open", ping_without_delay),
        calls=[("pong", b"yes"), ("message", "a")],
        over=("tcp", "unix"),
    ),
    # ---- Coroutines
    "a coroutine that opens holds messages back but no pings": Script(
        text("a") + frame(FIN | PING, b"p"),
        said("ECHO:early", "ECHO:a"),
        handler=doing("open", wait),
        calls=[("ping", b"p"), ("waited",), ("message", "early"), ("message", "a")],
        early=text("early"),
        held=pong(b"p"),
    ),
    "pings and pongs are handled while a coroutine is pending, also after a close": Script(
        text("b") + frame(FIN | PONG, b"1") + close(4001) + frame(FIN | PING, b"2"),
        said("a", "b"),
        4001,
        handler=Waiting,
        calls=[
            *(("start", "a"), ("pong", b"1"), ("ping", b"2"), ("end", "a")),
            *(("start", "b"), ("end", "b"), ("close", 4001, None)),
        ],
        early=text("a"),
        held=pong(b"2"),
    ),
    "a method that a coroutine sets is called": Script(
        text("a"), said("a"), handler=doing("open", set_a_method, EchoHandler)
    ),
    # ---- Faults and errors
    **{
        f"a fault is answered by {code}": Script(
            text("before") + fault,
            said("ECHO:before"),
            code,
            headers=DEFLATE,
            over=("tcp", "tls"),
        )
        for code, fault in (
            (1002, b"\x81\x00"),
            (1007, frame(PACKED, b"\xff" * 4)),
            (1008, frame(TEXT) + frame(0) * 1024),
            (1009, frame(FIN | BINARY, bytes((1 << 20) + 1))),
        )
    },
    **{
        f"{name} is 1011 and one traceback, and nothing is handled after it": Script(
            sent + frame(FIN | PING, b"2") + frame(FIN | PONG) + text("a"),
            replies,
            1011,
            handler=doing(method, does),
            calls=[*calls, ("close", 1011, None)],
        )
        for name, method, does, sent, replies, calls in (
            ("an error in on_message", "on_message", fail, text("1"), b"", []),
            ("an error in on_ping", "on_ping", fail, frame(FIN | PING), pong(), [("ping", b"")]),
            ("a generator from on_message", "on_message", generate, text("1"), b"", []),
            ("a moment from on_message", "on_message", lambda *_: gen.moment, text("1"), b"", []),
            ("a number from open", "open", lambda *_: 5, b"", b"", []),
            ("a failure of pytest", "on_message", lambda *_: pytest.fail("x"), text("1"), b"", []),
        )
    },
    # ---- The end
    "nothing is sent after our close": Script(
        text("a") + (frame(FIN | PING) + text("b") + text("c" * 2000)) * 2,
        said("ECHO:a") + pong(),
        4000,
        handler=doing("on_ping", lambda handler, _: handler.close(4000), EchoHandler),
    ),
    "messages after our close are delivered until the peer closes": Script(
        text("a") + text("b"),
        b"",
        4000,
        handler=Closing,
        calls=[*(("message", word) for word in "abc"), ("close", 4000, "ok")],
        last=text("c") + close(4000, "ok") + text("d"),
    ),
    "after our close no message is delayed": Script(
        text(WORD) * 30,
        said(REPLY),
        4001,
        options={"query": "?close=4001&after=1&delay=1", "scenarios": True},
    ),
    "a fault has its code even if a close comes before the handler has finished": Script(
        text("a") + frame(FIN | TEXT, b"\xff") + close() + frame(FIN | PING),
        said("a"),
        1007,
        handler=Waiting,
        held=pong(),
        last=frame(FIN | PONG),
    ),
    "a fault after our close does not cause a second close": Script(
        text("a"), b"", 4000, handler=Closing, calls=[("message", "a"), *LEFT], last=b"\xff\xff"
    ),
    "writes that nobody awaits leave, then the latest pong, and then our close": Script(
        text("a") + frame(FIN | PING, b"1") + close(4000) + frame(FIN | PING, b"2"),
        said(*[WORD * 10] * 10) + pong(b"2"),
        4000,
        handler=doing("on_message", write_ten),
        options={"receive_buffer": 65536},
        over=EVERYTHING,
    ),
    # ---- Subprotocol and compression
    **{
        f"the first subprotocol is selected, {offered!r}": Script(
            b"",
            headers={PROTOCOL: offered} if offered else {},
            head={PROTOCOL: selected, EXTENSIONS: ""},
        )
        for offered, selected in (("b, a", "b"), (" , x", "x"), ("", ""))
    },
    "a subclass selects the subprotocol, and decides how to compress": Script(
        text("a" * 5000),
        said("b") + said(BEST.compress(b"ECHO:" + b"a" * 5000), first=FIN | RSV1 | TEXT),
        handler=Picky,
        headers={PROTOCOL: "a, b"} | DEFLATE,
        head={PROTOCOL: "b"} | DEFLATE,
    ),
    # ---- What hosts are used to
    "embedded, the query asks for nothing": Script(
        text("a"),
        said("ECHO:a"),
        options={"query": "?after=0&close=4001&drop=1&push=1&delay=60&token=x"},
    ),
    "a host may have an initialize of its own, and then has no scenarios": Script(
        text("a"),
        said("ECHO:tables in the lobby"),
        handler=Plainly,
        options={"database": "tables", "query": "?close=4000"},
        over=EITHER_LOOP,
    ),
    **{
        f"a host may have methods of its own, {handler.__name__}": Script(
            sent + close(),
            said("ECHO:a"),
            1000,
            handler=handler,
            calls=[("message", "a"), ("close", 1000, None)],
            headers=headers,
        )
        for handler, sent, headers in (
            (Careless, frame(FIN | RSV1 | TEXT, packed(b"a")), DEFLATE),
            (OfTornado, text("a"), {}),
        )
    },
    "scenarios need no write_message that returns anything": Script(
        text("a"),
        said("ECHO:a"),
        4000,
        handler=Careless,
        calls=[("message", "a"), ("close", 4000, None)],
        options={"scenarios": True, "query": "?close=4000&after=1"},
    ),
    "a host may set the close callback of its stream, also after an early message": Script(
        text("b") + close(4000),
        said("ECHO:a", "ECHO:b"),
        4000,
        handler=doing("open", set_close_callback, EchoHandler),
        early=text("a"),
        over=(*EITHER_LOOP, "tls"),
    ),
    "a host may have names of its own": Script(
        text("a") + close(),
        said("ECHO:a"),
        1000,
        handler=WithNames,
        options={"origins": ["*"], "stall_timeout": 5.0},
        over=EITHER_LOOP,
    ),
}


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("script", "transport"),
    [
        pytest.param(script, transport, id=f"{claim}, over {transport}")
        for claim, script in SCRIPTS.items()
        for transport in script.over
    ],
)
async def test_a_script_has_the_replies_and_calls_that_it_names(host: Host, script: Script) -> None:
    options = {"headers": script.headers, "early": script.early, **script.options}
    calls = Calls()
    if script.held:
        calls.gate.clear()
    if issubclass(script.handler, Recorder):
        options["calls"] = calls
    peer = await host.connect(script.handler, **options)
    answer = HTTPHeaders.parse(peer.head.partition("\r\n")[2])
    assert {name: answer.get(name, "") for name in script.head} == script.head
    peer.send(script.sent)
    for expected in script.held, script.replies:
        assert await peer.receive(len(expected)) == expected
        calls.gate.set()
    if script.code != 0:
        assert await peer.close_code() == script.code
        peer.send(script.last or close(script.code or 1000))
        assert await peer.rest() == b""
        await eventually(lambda: not Connections.current().open)
    if script.calls is not None:
        assert calls[1:] == script.calls
    assert host.errors() == ["tornado.application"] * (script.code == 1011)


# ---- How a peer leaves


class Leave(NamedTuple):
    """What a peer sends, how many frames it reads, and how it ends TCP then."""

    end: Callable[[Peer], None]
    sent: bytes = b""
    reads: int = 0
    handler: type[Recorder] = Recorder


LEAVES = {
    "FIN": Leave(Peer.leave),
    "FIN within a message": Leave(Peer.leave, frame(TEXT, b"unfini") + header(FIN, 100) + b"shed"),
    "FIN after our close": Leave(Peer.leave, text("a"), 1, Closing),
    "reset": Leave(Peer.reset),
    "reset after our close": Leave(Peer.reset, text("a"), 1, Closing),
    "reset within a message": Leave(Peer.reset, frame(TEXT, bytes(50_000))),
    "reset behind many frames": Leave(Peer.reset, frame(FIN | PONG) * 8000),
    "reset after it was failed": Leave(Peer.reset, b"\xff\xff", 1),
    "reset before it has read all replies": Leave(Peer.reset, text("a" * 10_000) * 500, 1),
    "reset while we write": Leave(Peer.reset, text("a"), 0, doing("on_message", write_ten)),
    "a host that closes the stream": Leave(
        lambda _: None, text("a"), 0, doing("on_message", close_and_write)
    ),
    "reset while a coroutine writes": Leave(
        Peer.reset, text("a"), 1, doing("on_message", write_without_awaiting)
    ),
}


AB, BYE = text("a") + text("b"), close(4000, "bye")
DELIVERED = [(call, word) for word in "ab" for call in ("start", "end")]
GONE = [("close", 4000, "bye")]
Dropping = doing("on_message", wait_and_drop)


@pytest.mark.gen_test
class TestLeaving:
    @over_everything
    @pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES.keys())
    async def test_on_close_is_the_last_call_and_comes_once_however_a_peer_leaves(
        self, host: Host, leave: Leave
    ) -> None:
        peer, calls = await host.record(leave.handler)
        peer.send(leave.sent)
        for _ in range(leave.reads):
            await peer.frame()
        # The server may have its turn now, or see all at once.
        await asyncio.sleep(0)
        leave.end(peer)
        await eventually(lambda: calls.closes and not Connections.current().open)
        await asyncio.sleep(0)
        assert calls.closes == calls[-1:] == LEFT
        with pytest.raises(WebSocketClosedError):
            calls.handler.write_message("too late")

    async def test_the_last_peers_may_leave_at_once(self, host: Host) -> None:
        # So that one round serves all of them, also on a machine that is busy.
        host.monkeypatch.setattr(echo_server, "ROUND", PATIENCE)
        peers = [await host.connect() for _ in range(8)]
        for peer in peers:
            peer.send(close())
            assert await peer.close_code() == 1000 and await peer.reader.read() == b""
        for peer in peers:
            peer.leave()
        await eventually(lambda: not Connections.current().open)

    @over_everything
    @pytest.mark.parametrize(
        ("handler", "sent", "end", "calls", "says"),
        [
            (Waiting, AB, Peer.reset, DELIVERED + LEFT, "error:reply not sent, 127.0.0.1:"),
            (Waiting, AB, Peer.leave, DELIVERED + LEFT, ""),
            (Waiting, AB + BYE, Peer.leave, DELIVERED + GONE, ""),
            # More messages than are looked at while the handler has not finished.
            (Dropping, AB * 200 + BYE, Peer.reset, [("waited",), *GONE], ""),
        ],
        ids=["reset", "FIN", "close", "drop"],
    )
    async def test_what_a_peer_sent_before_it_left_is_delivered_in_order_before_on_close(
        self, host: Host, handler: Any, sent: bytes, end: Any, calls: list[Any], says: str
    ) -> None:
        host.app.settings["websocket_max_message_size"] = 1000
        peer, made = await host.record(handler, early=sent, shut=True)
        end(peer)
        if end is Peer.reset:
            await eventually(lambda: cast(Any, made.handler.ws_connection).is_closing())
        else:
            await others_have_their_turn(host)
        made.gate.set()
        await eventually(lambda: made.closes)
        assert made[1:] == calls and says in host.caplog.text

    @pytest.mark.parametrize("transport", ["unix"])
    @pytest.mark.parametrize("owed", [0, 30])
    async def test_what_came_before_a_unix_socket_was_closed_is_delivered(
        self, host: Host, owed: int
    ) -> None:
        """Also if a write finds first that the peer has left."""
        host.app.settings["websocket_max_message_size"] = 1000
        writing = doing("open", lambda self: self.write_message(WORD * owed) and None, Waiting)
        peer, calls = await host.record(writing, shut=True)
        await taken(peer, AB * 300 + BYE)
        peer.leave()
        await others_have_their_turn(host)
        calls.gate.set()
        await eventually(lambda: calls.closes)
        assert calls[1:] == DELIVERED * 300 + GONE


# ---- What a subclass sees


async def two_writes(host: Host) -> tuple[Peer, list[asyncio.Future[None]]]:
    """A peer, and two writes that cannot leave before it reads."""
    peer, calls = await host.record(Recorder, receive_buffer=65536)
    return peer, [calls.handler.write_message(word) for word in (WORD * 80, "after")]


@pytest.mark.gen_test
class TestSubclass:
    async def test_on_close_does_not_wait_for_the_fin_of_a_client(self, host: Host) -> None:
        peer, calls = await host.record(Recorder)
        peer.send(text("a"), close(4002))
        await eventually(lambda: calls.closes)
        assert Connections.current().open
        assert await peer.replies(b"ECHO:a") and await peer.goodbye() == 4002

    @pytest.mark.parametrize(("args", "body"), [((), b""), ((None, "é"), close_body(1000, "é"))])
    async def test_close_sends_a_code_and_reason(self, host: Host, args: Any, body: bytes) -> None:
        """The code is 1000 where there is only a reason."""
        peer, calls = await host.record(Recorder)
        calls.handler.close(*args)
        assert await peer.frame() == (FIN | CLOSE, body)
        with pytest.raises(WebSocketClosedError):
            calls.handler.write_message("too late")

    async def test_write_message_of_what_the_kernel_takes_is_done_at_once(self, host: Host) -> None:
        # As long as the round lasts, and on a machine that is busy two milliseconds may be over.
        host.monkeypatch.setattr(echo_server, "ROUND", PATIENCE)
        peer, calls = await host.record(Recorder)
        sent = [calls.handler.write_message(message) for message in ("text", b"bytes", {"a": 1})]
        assert all(future.done() and future.exception() is None for future in sent)
        # Hosts use them as keys.
        assert len(set(sent)) == 3
        assert await peer.replies(b"text", b"bytes", b'{"a": 1}')

    @over_tcp_and_tls
    async def test_a_write_is_pending_until_the_peer_reads(self, host: Host) -> None:
        peer, sent = await two_writes(host)
        expected = said(WORD * 80, "after")
        assert await peer.receive(500_000) == expected[:500_000]
        assert not any(future.done() for future in sent)
        assert await peer.receive(len(expected) - 500_000) == expected[500_000:]
        assert await asyncio.wait_for(asyncio.gather(*sent), PATIENCE) == [None, None]

    @over_tcp_and_tls
    async def test_a_pending_write_fails_when_the_peer_is_lost(self, host: Host) -> None:
        peer, sent = await two_writes(host)
        peer.reset()
        for future in sent:
            with pytest.raises(WebSocketClosedError):
                await asyncio.wait_for(future, PATIENCE)


# ---- As a WebSocketHandler of Tornado


user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")


def whose(name: str) -> Any:
    """A method that says in whose context it runs."""
    return lambda self, *_: self.calls.append((name, user.get()))


class Personal(Recorder):
    on_ping, on_pong, log_exception = map(whose, ("on_ping", "on_pong", "log_exception"))

    def prepare(self) -> None:
        user.set(self.get_argument("user"))

    async def open(self, *args: str, **kwargs: str) -> None:
        await asyncio.sleep(0)
        self.token = user.set(user.get())
        self.calls.append(("open", user.get()))

    def on_close(self) -> None:
        # This raises unless it is the context of open(), and no copy.
        user.reset(self.token)
        self.calls.append(("on_close", user.get()))

    async def on_message(self, message: str | bytes) -> None:
        await asyncio.sleep(0)
        self.calls.append(("on_message", user.get()))
        if message == "break":
            raise ZeroDivisionError


class WithDatabase(Recorder):
    async def get(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("get", asyncio.current_task()))
        await super().get(*args, **kwargs)
        self.calls.append("close the database")


def close_with_callback(handler: Any) -> None:
    set_close_callback(handler)
    handler.ws_connection.stream.close()


WITHOUT_UNIX = """
import socket, sys, tornado.ioloop
for name in ("fcntl", "termios", "resource"):
    sys.modules[name] = None
unix = socket.AF_UNIX
del socket.AF_UNIX
import echo_server
# The event loop itself needs it here.
socket.AF_UNIX = unix
print(echo_server.main(["--port=0"]))
"""


@pytest.mark.parametrize("transport", EITHER_LOOP)
@pytest.mark.gen_test
class TestAsTornado:
    @pytest.mark.parametrize(
        "end",
        [
            lambda handler: handler.on_connection_close(),
            lambda handler: handler.ws_connection._abort(),
            close_with_callback,
        ],
    )
    async def test_a_host_can_get_rid_of_a_connection_at_once(self, host: Host, end: Any) -> None:
        """Then `on_close` is called once. If it is a coroutine, that goes on."""
        peer, calls = await host.record(doing("on_close", wait))
        protocol = cast(Any, calls.handler.ws_connection)
        end(calls.handler)
        await eventually(lambda: calls.closes and not Connections.current().open)
        assert protocol.client_terminated and protocol.server_terminated
        assert await peer.rest() == b"" and calls[1:] == [*LEFT, ("waited",)]

    async def test_a_closed_socket_is_not_watched_even_if_a_fork_has_it(self, host: Host) -> None:
        other, (peer, calls) = await host.connect(), await host.record(Recorder)
        stream = cast(Any, calls.handler.ws_connection).stream
        with stream.socket.dup():
            stream.close()
            peer.send(text("a"))
            await eventually(lambda: calls.closes)
            await have_turns(other, 1)
            # For the poller, there is nothing to do.
            assert not select.select([Connections.current()], [], [], 0)[0]

    @pytest.mark.parametrize("ends", ["the peer", "the host"])
    async def test_the_get_of_a_host_goes_on_after_the_end(self, host: Host, ends: str) -> None:
        peer, calls = await host.record(WithDatabase)
        await eventually(lambda: ("open",) in calls)
        peer.leave() if ends == "the peer" else calls[0][1].cancel()
        await eventually(lambda: calls.closes and "close the database" in calls)
        assert len(calls) == 4

    async def test_a_method_may_be_replaced_on_the_class(self, host: Host) -> None:
        host.monkeypatch.setattr(
            EchoHandler, "on_message", lambda self, _: self.write_message("mine")
        )
        peer = await host.connect()
        peer.send(text("a"))
        assert await peer.replies(b"mine")

    async def test_a_negative_interval_does_not_keep_the_event_loop_busy(self, host: Host) -> None:
        await host.connect(Careless, calls=Calls())
        await sweep()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("ping_interval", property(fail)),
            ("select_subprotocol", lambda *_: "not offered"),
            ("get_compression_options", lambda _: {"compression_level": 10}),
            ("get_compression_options", lambda _: {"mem_level": 6.0}),
        ],
    )
    async def test_what_a_connection_cannot_be_made_with_is_500(
        self, host: Host, name: str, value: Any
    ) -> None:
        peer = await host.dial()
        broken = type("Broken", (EchoHandler,), {name: value})
        peer.send(request(f"GET {host.route(broken)} HTTP/1.1", **DEFLATE))
        assert (await peer.receive(13)).startswith(b"HTTP/1.1 500 ")
        assert host.errors() == ["tornado.application", "tornado.access"]

    @pytest.mark.parametrize(("method", "status"), [("GET", 426), ("HEAD", 405)])
    async def test_a_plain_get_is_426_with_its_header_and_any_other_method_405(
        self, host: Host, method: str, status: int
    ) -> None:
        """Also for a browser, and where a host has error pages of its own."""
        peer = await host.dial()
        line = f"{method} {host.route(Plainly, database='none')} HTTP/1.1"
        peer.send(request(line, without="Upgrade", Accept="text/html"))
        head = (await peer.reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith(f"HTTP/1.1 {status} ")
        for name in ("Upgrade: websocket", "Content-Type: text/plain;"):
            assert (name in head) == (status == 426)

    async def test_go_away_closes_only_the_clients_of_one_application(self, host: Host) -> None:
        async with listening(Application([("/", EchoHandler)])) as port:
            other, peer = await peer_at(port), await host.connect()
            await other.upgrade(request())
            leaving = asyncio.create_task(Connections.current().go_away(host.app, 5))
            assert await peer.goodbye() == 1001
            await leaving
            later = await host.connect()
            for still_here in (other, later):
                await have_turns(still_here, 1)
                still_here.leave()

    async def test_go_away_waits_for_what_has_arrived_but_is_unread(self, host: Host) -> None:
        host.app.settings["websocket_max_message_size"] = 100_000
        other, (peer, calls) = await host.connect(), await host.record(Waiting, shut=True)
        peer.send(text("a" * 60_000) * 3)
        # These are read, and hold back what comes next.
        await have_turns(other, 5)
        await taken(peer, text("b"))
        leaving = asyncio.create_task(Connections.current().go_away(host.app, 5))
        assert await other.goodbye() == 1001
        calls.gate.set()
        assert await peer.replies(*[b"a" * 60_000] * 3, b"b") and await peer.goodbye() == 1001
        await leaving

    async def test_go_away_also_sends_away_a_peer_that_goes_on_sending(self, host: Host) -> None:
        peer = await host.connect(query="?delay=0.02", scenarios=True)
        peer.send(text("a") * 3)
        assert await peer.replies(b"ECHO:a")
        leaving = asyncio.create_task(Connections.current().go_away(host.app, 3))
        while (got := await peer.frame())[0] == FIN | TEXT:
            peer.send(text("a"))
        assert got[1][:2] == close_body(1001) and not leaving.done()
        peer.send(close(1001))
        assert await peer.rest() == b""
        await leaving

    @pytest.mark.gen_test(timeout=20)
    async def test_both_sides_may_send_24_mb_before_they_read(self, host: Host) -> None:
        counting = doing("on_message", lambda handler, text: handler.calls.append(len(text)))
        peer, calls = await host.record(counting, stall_timeout=1.0)
        for _ in range(240):
            calls.handler.write_message(WORD)
        for _ in range(240):
            peer.send(text(WORD))
            await peer.writer.drain()
        assert await peer.replies(*[WORD.encode()] * 240)
        await eventually(lambda: calls == [("open",), *[100_000] * 240])


@pytest.mark.parametrize("transport", [*EITHER_LOOP, "tls"])
@pytest.mark.gen_test
async def test_after_open_there_is_what_tornado_has(host: Host) -> None:
    peer, calls = await host.record(Recorder)
    handler, protocol = calls.handler, cast(Any, calls.handler.ws_connection)
    sock, connection = protocol.stream.socket, cast(Any, handler.request.connection)
    address = peer.writer.get_extra_info("sockname")
    assert connection.context.address == sock.getpeername() == address
    # Which also knows the certificate of a client.
    assert isinstance(sock, ssl.SSLSocket) == bool(host.trust)
    for name in ("write", "redirect", "set_header", "set_cookie", "set_status", "flush", "finish"):
        with pytest.raises(RuntimeError):
            getattr(handler, name)()
    assert not (protocol.client_terminated or protocol.server_terminated)
    handler.close(4000)
    assert protocol.server_terminated and not protocol.client_terminated
    assert await peer.goodbye() == 4000
    await eventually(lambda: protocol.client_terminated)


@over_everything
@pytest.mark.gen_test
async def test_each_connection_has_a_context_of_its_own(host: Host, hurried: None) -> None:
    """Also in turns that others have put off, and where the sweep finds that nobody answers, whose
    lines in the log belong to nobody. What an asynchronous open sets in it is there later."""
    logged = set()

    def note(_: logging.LogRecord) -> bool:
        logged.add(user.get())
        return True

    host.monkeypatch.setattr(logging.getLogger("echo_server"), "filters", [note])
    host.app.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.3)
    calls = [Calls() for _ in range(5)]
    bomb = frame(FIN | RSV1 | BINARY, packed(bytes(1 << 20)))
    for n, made in enumerate(calls):
        await host.connect(Personal, DEFLATE, query=f"?user={n}", calls=made)
    user.set("the test")
    for n, peer in enumerate(host.peers):
        peer.send(frame(FIN | PING), frame(FIN | PONG), bomb * 5, text("" if n else "break"))
    await eventually(lambda: all("on_close" in dict(made) for made in calls))
    for n, made in enumerate(calls):
        names = {"open", "on_ping", "on_pong", "on_message", "on_close"}
        names |= set() if n else {"log_exception"}
        assert set(made) == {(name, str(n)) for name in names}
    assert logged == {"nobody"}


@pytest.mark.gen_test
async def test_all_of_a_tls_record_is_read_where_a_host_reads_smaller_pieces(
    app: Application, ssl_options: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    """Also if they are more than are read ahead while a coroutine opens."""
    opening = doing("open", lambda *_: asyncio.sleep(0.01), EchoHandler)
    app.add_handlers(".*", [("/opening", opening)])
    app.settings["websocket_max_message_size"] = 2000
    async with listening(app, ssl_options=ssl_options, chunk_size=1024) as port:
        for path in "echo", "opening":
            peer = await peer_at(port, trust)
            await peer.upgrade(request(f"GET /{path} HTTP/1.1"), text("x" * 100) * 100)
            assert await peer.replies(*[b"ECHO:" + b"x" * 100] * 100)
            peer.leave()


def test_on_windows_it_can_be_imported_and_says_what_the_server_needs() -> None:
    assert python(WITHOUT_UNIX) == "1\necho_server: the server needs Linux or macOS\n"


# ---- Everything that is owed arrives

# More than the kernels take at once, and than is read in the limits of time below.
PILE = 30


async def reply(peer: Peer) -> tuple[int, bytes]:
    """The next frame but for Pings, which are answered, and Pongs, where an answer does no harm."""
    while (got := await peer.frame())[0] in (FIN | PING, FIN | PONG):
        peer.send(frame(FIN | PONG, got[1]))
    return got


class End(NamedTuple):
    """The code of our Close, 0 where there is none, and why it comes: what the peer sends after its
    messages, what its URL asks for, and what it sends when it has read some replies."""

    code: int
    sent: bytes = b""
    query: str = ""
    later: bytes = b""


ENDS = [
    End(4001, query="?close=4001&after=30"),
    End(4001, close(4001)),
    End(4001, close(4001), query="?delay=0.001"),
    *(End(4001, close(4001), later=later) for later in (frame(FIN | PONG), frame(FIN | PING))),
    End(4001, close(4001), later=text("too late")),
    End(1002, b"\x81\x00"),
    End(1002, b"\x81\x00" + bytes(1 << 20)),
    End(1007, frame(FIN | TEXT, b"\xff")),
    End(1009, header(FIN | BINARY, 1 << 30)),
]

# The peer sends no Close after its FIN.
ENDS_AFTER_FIN = [
    End(0),
    End(0, query="?delay=0.01"),
    End(4001, close(4001)),
    End(4001, close(4001), query="?delay=0.01"),
    End(4001, query="?close=4001&after=30"),
    End(1007, frame(FIN | TEXT, b"\xff")),
]


@pytest.mark.gen_test(timeout=20)
class TestOwed:
    # In a Unix socket, our kernel holds what the peer has not read.
    @pytest.mark.parametrize("transport", ["tcp", "tls", "unix"])
    async def test_a_slow_reader_gets_all_that_it_is_owed(self, host: Host, hurried: None) -> None:
        """Nor is it taken for a dead one."""
        host.app.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.3)
        options: dict[str, Any] = {"scenarios": True, "stall_timeout": 0.3}

        async def read(end: End) -> None:
            peer = await host.connect(receive_buffer=4096, query=end.query, **options)
            peer.send(text(WORD) * PILE, end.sent)
            for number in range(PILE):
                assert await reply(peer) == (FIN | TEXT, REPLY), end
                peer.send(end.later if number == 3 else b"")
                # 100 KB every 20 ms, as over a slow link.
                await asyncio.sleep(0.02)
            first, body = await reply(peer)
            assert first == FIN | CLOSE and body[:2] == close_body(end.code), end
            peer.send(close(end.code))
            assert await peer.rest() == b"", end

        await asyncio.gather(*map(read, ENDS))

    @pytest.mark.parametrize("transport", ["tcp", "tcp without epoll", "unix"])
    async def test_all_replies_and_our_close_follow_the_fin_of_a_peer(self, host: Host) -> None:
        async def shut(end: End) -> None:
            peer = await host.connect(receive_buffer=4096, query=end.query, scenarios=True)
            peer.send(text(WORD) * PILE, end.sent)
            _, replied = await asyncio.gather(peer.shut(), peer.replies(*[REPLY] * PILE))
            assert replied, end
            assert not end.code or await peer.close_code() == end.code, end
            assert await peer.rest() == b"", end

        await asyncio.gather(*map(shut, ENDS_AFTER_FIN))

    @over_tcp_and_tls
    async def test_a_kernel_may_acknowledge_seldom_what_it_receives(self, host: Host) -> None:
        """With a buffer of the usual size, it does so every 64 KB or more."""
        for name in "CLOSE_TIMEOUT", "LINGER_TIMEOUT":
            host.monkeypatch.setattr(echo_server, name, 0.1)
        peer = await host.connect()
        peer.send(text(WORD) * 4, close(4001))
        expected = said(*[REPLY] * 4) + said(close_body(4001), first=FIN | CLOSE)
        for start in range(0, len(expected), 4000):
            piece = expected[start : start + 4000]
            assert await peer.receive(len(piece)) == piece
            await asyncio.sleep(0.01)
        assert await peer.rest() == b""


class Records:
    """A client that makes its TLS records by itself, so that it can cut them and send others."""

    def __init__(self, sock: socket.socket, trust: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trust.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        while hello := self.of(self.tls.do_handshake):
            sock.sendall(hello)
            if not self.tls.version():
                self.incoming.write(sock.recv(9999))
        sock.sendall(self.of(self.tls.write, request()))

    def of(self, call: Callable[..., Any], *args: Any) -> bytes:
        """The records that a call makes."""
        with contextlib.suppress(ssl.SSLWantReadError):
            call(*args)
        return self.outgoing.read()


JUNK = b"\x17\x03\x03\0\x05junk!"


def test_a_peer_that_ends_tls_right_behind_a_full_record_gets_its_replies_and_the_end(
    serve: Serve, certificate: Path, trust: ssl.SSLContext
) -> None:
    server = serve(f"--certfile={certificate}", "--log-level=info")
    with server.dial() as sock:
        records = Records(sock, trust)
        full = records.of(records.tls.write, text("x" * 122) * 128)
        sock.sendall(full + records.of(records.tls.unwrap))
        assert len(everything(sock)) > len(full)
    server.line(r"close\(\) 1006 .* 128 messages")


def test_parts_of_a_tls_record_are_no_silence(
    serve: Serve, certificate: Path, trust: ssl.SSLContext
) -> None:
    limits = [f"--{name}=0.3" for name in ("stall-timeout", "ping-interval", "ping-timeout")]
    server = serve(f"--certfile={certificate}", *limits)
    with server.dial() as sock:
        records = Records(sock, trust)
        record = records.of(records.tls.write, text("x" * 10_000))
        for start in range(0, len(record), 1000):
            sock.sendall(record[start : start + 1000])
            select.select([], [], [], 0.1)
        server.line("Received:xxx")


def test_a_message_in_a_full_record_counts_also_if_the_peer_is_lost_behind_it(
    tls: Process, trust: ssl.SSLContext
) -> None:
    with tls.dial() as sock:
        records = Records(sock, trust)
        sock.sendall(records.of(records.tls.write, text("x" * 16_376)) + JUNK)
        tls.line(r"close\(\) 1006 .* 1 messages, 16376 bytes")


def test_bytes_behind_the_close_notify_of_a_peer_do_not_cost_it_what_it_is_owed(
    tls: Process, trust: ssl.SSLContext
) -> None:
    with tls.dial() as sock:
        records = Records(sock, trust)
        sock.sendall(records.of(records.tls.write, text("x" * 1_000_000)))
        sock.sendall(records.of(records.tls.unwrap) + JUNK)
        received = 0
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(20_000):
                received += len(data)
                select.select([], [], [], 0.005)
        assert received > 1_000_000


def test_a_peer_that_shuts_its_side_below_tls_gets_all_replies_and_our_close(
    tls: Process, trust: ssl.SSLContext
) -> None:
    """This takes a socket, since asyncio's client would lose what has come."""
    query = "/?delay=0.1&close=4001&after=3"
    with upgraded(tls, query, trust) as sock, sock.makefile("rb") as file:
        sock.sendall(text(WORD) * 3)
        socket.socket.shutdown(sock, socket.SHUT_WR)
        ending = [(FIN | CLOSE, close_body(4001)), (-1, b"")]
        assert [read_frame(file) for _ in range(5)] == [(FIN | TEXT, REPLY)] * 3 + ending


# ---- Closing


def reply_and_drop(handler: Recorder, message: str) -> None:
    Recorder.on_message(handler, message)
    drop = cast(Any, handler.ws_connection)._abort
    if message == "close":
        handler.close(4000)
    drop()


@pytest.mark.gen_test
class TestClosing:
    @over_tcp_and_tls
    async def test_a_peer_can_read_why_it_was_failed_while_it_is_still_sending(
        self, host: Host
    ) -> None:
        """Nor does it have to answer, since its frames cannot be told apart any more."""
        peer = await host.connect()
        peer.send(b"\xff\xff", bytes(4 << 20))
        await asyncio.wait_for(peer.writer.drain(), PATIENCE)
        assert await peer.close_code() == 1002 and await peer.rest() == b""

    @over_tcp_and_tls
    async def test_our_fin_waits_for_the_close_of_a_peer_that_was_failed(self, host: Host) -> None:
        peer, other = await host.connect(), await host.connect()
        peer.send(frame(FIN | TEXT, b"\xff"), text("after") * 1000)
        assert await peer.close_code() == 1007
        await have_turns(other, 20)
        assert not peer.reader.at_eof()
        peer.send(close(1007))
        assert await peer.rest() == b""

    @over_tcp_and_tls
    @pytest.mark.parametrize("word", ["stay", "close"])
    async def test_what_was_written_before_a_drop_still_leaves(self, host: Host, word: str) -> None:
        last = said(close_body(4000), first=FIN | CLOSE) if word == "close" else b""
        peer, calls = await host.record(doing("on_message", reply_and_drop))
        peer.send(text(word) * 3)
        assert await peer.replies(b"ECHO:" + word.encode()) and await peer.rest() == last
        assert calls == [("open",), ("message", word), *LEFT]

    async def test_the_closing_handshake_does_not_wait_for_a_coroutine(self, host: Host) -> None:
        peer, calls = await host.record(doing("on_message", close_and_wait), shut=True)
        peer.send(text("start"))
        assert await peer.goodbye() == 4000 and not calls.closes
        calls.gate.set()
        await eventually(lambda: calls.closes)


# ---- One connection, and the others


class Streaming(Recorder):
    async def on_message(self, message: str | bytes) -> None:
        self.calls.append(asyncio.current_task())
        while True:
            await self.write_message("more")


class Hopeless(Recorder):
    """Whatever can raise does."""

    on_message: Any = fail
    on_ping: Any = fail

    def log_exception(self, *args: Any) -> None:
        raise RuntimeError

    def on_close(self) -> None:
        super().on_close()
        raise RuntimeError


def write_to_everybody(_: EchoHandler, message: str | bytes) -> None:
    for connection in Connections.current().open:
        if connection.handler.ws_connection:
            connection.handler.write_message(message)


async def prepare_slowly(handler: Recorder) -> None:
    handler.calls.append("prepare")
    await wait(handler)


async def being_prepared(host: Host) -> tuple[Peer, Calls]:
    """A peer whose handler has not finished its prepare()."""
    peer, calls = await host.dial(), Calls()
    calls.gate.clear()
    path = host.route(doing("prepare", prepare_slowly), calls=calls)
    peer.send(request(f"GET {path} HTTP/1.1"))
    await eventually(lambda: calls)
    return peer, calls


async def close_later(handler: EchoHandler) -> None:
    await asyncio.sleep(0)
    EchoHandler.on_close(handler)
    raise ZeroDivisionError


@pytest.mark.gen_test
class TestAmongOthers:
    async def test_a_coroutine_that_awaits_its_writes_lets_others_live(self, host: Host) -> None:
        other, streaming = await host.connect(), await host.connect(Streaming, calls=Calls())
        streaming.send(text("go"))
        for _ in range(20):
            before = Connections.current().all_traffic().texts_sent
            await have_turns(other, 1)
            assert Connections.current().all_traffic().texts_sent - before < 10_000

    async def test_a_write_that_is_cancelled_cancels_no_other(self, host: Host) -> None:
        calls = Calls()
        for peer in [await host.connect(Streaming, calls=calls) for _ in range(3)]:
            peer.send(text("start"))
            await peer.frame()
        tasks = [call for call in calls if isinstance(call, asyncio.Task)]
        tasks[0].cancel()
        await others_have_their_turn(host)
        assert [task.done() for task in tasks] == [True, False, False]
        assert host.errors() == ["tornado.application"]

    @pytest.mark.parametrize("transport", ["tcp", "tcp without epoll"])
    async def test_an_exception_in_one_connection_does_not_harm_others(self, host: Host) -> None:
        calls = Calls()
        other = await host.connect()
        host.app.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.1)
        peers = [await host.connect(doing("open", fail, Hopeless), calls=calls)]
        for sent in (text("a"), frame(FIN | PING), close(), b"\xff\xff"):
            peers.append(await host.connect(Hopeless, calls=calls))
            peers[-1].send(sent)
        await have_turns(other, 5)
        for peer in peers:
            peer.leave()
        await eventually(lambda: len(calls.closes) == 5 and len(Connections.current().open) == 1)
        await have_turns(other, 5)
        assert set(host.errors()) == {"echo_server"}

    async def test_a_coroutine_on_close_may_call_ours_and_then_fail(self, host: Host) -> None:
        host.caplog.set_level("INFO", "echo_server")
        peer, _ = await host.record(doing("on_close", close_later))
        peer.send(close(4000))
        await eventually(lambda: "ZeroDivisionError" in host.caplog.text)
        assert "[SERVER] close() 4000 from 127.0.0.1" in host.caplog.text
        assert host.errors() == ["tornado.application"]

    @pytest.mark.parametrize("end", [Peer.reset, Peer.leave, lambda peer: peer.send(close())])
    async def test_a_handler_that_writes_to_everybody_is_not_failed_because_others_leave(
        self, host: Host, hurried: None, end: Callable[[Peer], None]
    ) -> None:
        calls, broadcasting = Calls(), doing("on_message", write_to_everybody)
        innocent, *lost = [await host.connect(broadcasting, calls=calls) for _ in range(6)]
        for peer in lost:
            end(peer)
        for _ in range(20):
            innocent.send(text("to all"))
            assert await innocent.replies(b"to all")
        await eventually(lambda: len(calls.closes) == 5)

    async def test_a_task_goes_on_when_the_client_that_began_it_leaves(self, host: Host) -> None:
        tasks = []

        async def broadcast() -> None:
            while True:
                write_to_everybody(cast(Any, None), "to all")
                await asyncio.sleep(0.01)

        begin = doing("open", lambda *_: tasks.append(asyncio.create_task(broadcast())), Waiting)
        other = await host.connect()
        peer, calls = await host.record(begin, early=text("a"), shut=True)
        peer.reset()
        await eventually(lambda: cast(Any, calls.handler.ws_connection).is_closing())
        for _ in range(50):
            assert await other.replies(b"to all")
        tasks[0].cancel()
        calls.gate.set()

    async def test_a_filter_of_the_log_may_write_to_the_logged_connection(self, host: Host) -> None:
        peer, calls = await host.record(Recorder)

        def show(record: logging.LogRecord) -> bool:
            calls.handler.write_message(record.getMessage())
            return True

        host.monkeypatch.setattr(logging.getLogger("echo_server"), "filters", [show])
        peer.send(frame(FIN | TEXT, b"\xff"))
        assert await peer.goodbye() == 1007

    @pytest.mark.parametrize("end", [Peer.leave, Peer.reset])
    async def test_who_leaves_during_prepare_is_never_opened(self, host: Host, end: Any) -> None:
        other = await host.connect()
        peer, calls = await being_prepared(host)
        end(peer)
        await have_turns(other, 5)
        calls.gate.set()
        await have_turns(other, 5)
        assert calls == ["prepare", ("waited",)]
        assert len(Connections.current().open) == 1

    async def test_open_is_called_even_if_the_poller_has_no_descriptor(self, host: Host) -> None:
        peer, calls = await being_prepared(host)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
        try:
            calls.gate.set()
            await eventually(lambda: len(calls) > 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        # Where the poller needs no descriptor, the connection has not ended.
        peer.leave()
        await eventually(lambda: calls.closes)
        assert calls[2:] == [("open",), *LEFT]

    @pytest.mark.parametrize(
        ("message", "count", "most"),
        [
            # The one that waits for its time, one that waits for it, and a piece of the next.
            (text("x" * 600_000 + "\U0001f600"), 4, 1_800_000),
            # They are not inflated ahead.
            (frame(FIN | RSV1 | BINARY, packed(bytes(1 << 20))), 20, 5_000_000),
        ],
        ids=["text", "bomb"],
    )
    async def test_during_a_delay_a_connection_holds_no_more_than_a_message(
        self, host: Host, message: bytes, count: int, most: int
    ) -> None:
        peer = await host.connect(headers=DEFLATE, query="?delay=60", scenarios=True)
        async with little_memory(most):
            peer.send(message * count)
            await others_have_their_turn(host, 100)
        peer.reset()

    async def test_after_our_close_messages_also_wait_for_a_coroutine(self, host: Host) -> None:
        """They are not read meanwhile, and delivered in the end."""
        host.app.settings["websocket_max_message_size"] = 100_000
        peer, calls = await host.record(doing("on_message", close_and_wait), shut=True)
        peer.send(text("a" * 60_000) * 10)
        await others_have_their_turn(host)
        calls.gate.set()
        await eventually(lambda: len(calls) == 11)

    @pytest.mark.parametrize(
        ("handler", "sent", "code"),
        [
            (Recorder, close(4001), 4001),
            (Waiting, close(4001), 4001),
            (Waiting, b"\x81\x00", 1002),
            (Waiting, frame(FIN | TEXT, b"\xff"), 1007),
        ],
    )
    async def test_data_after_the_end_is_dropped_while_a_coroutine_runs_or_the_loop_is_busy(
        self, host: Host, monkeypatch: pytest.MonkeyPatch, handler: Any, sent: bytes, code: int
    ) -> None:
        # No round has time for what may have to be inflated.
        monkeypatch.setattr(echo_server, "ROUND", 0.0)
        options = {"early": text("a") + sent, "headers": DEFLATE, "prefix": ""}
        peer, calls = await host.record(handler, shut=True, **options)
        async with little_memory(1_500_000):
            for _ in range(5):
                await taken(peer, text("x" * 1_000_000))
        calls.gate.set()
        assert await peer.replies(b"a") and await peer.close_code() == code

    async def test_a_packet_of_bombs_does_not_keep_others_waiting(self, host: Host) -> None:
        bomber, other = await host.connect(headers=DEFLATE), await host.connect()
        bomber.send(frame(FIN | RSV1 | BINARY, packed(bytes(1 << 20), 9)) * 60)
        await have_turns(other, 5)
        assert Connections.current().all_traffic().binaries_received < 60


async def one_connection(client: socket.socket, handler: type[Recorder] = Recorder) -> Calls:
    """Serves one, which is open when the event loop ends."""
    calls = Calls()
    http = HTTPServer(Application([("/", handler, {"calls": calls})]))
    sockets = bind_sockets(0, "127.0.0.1")
    http.add_sockets(sockets)
    client.connect(sockets[0].getsockname())
    client.sendall(request())
    await eventually(lambda: calls)
    http.stop()
    return calls


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
def test_the_end_of_an_event_loop_is_the_end_of_its_connections(library: str) -> None:
    counts, loops = [], pytest.importorskip(library)
    for _ in range(5):
        with socket.socket() as client:
            with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
                calls = runner.run(one_connection(client))
            assert calls[1:] == LEFT
            assert client.recv(999).startswith(b"HTTP/1.1 101") and client.recv(1) == b""
        gc.collect()
        counts.append(len(os.listdir("/dev/fd")))
    assert counts[-1] <= counts[1]


def test_on_close_may_call_ours_when_tornado_closes_the_event_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the io_loop of pytest-tornado is closed: it is not the current one any more."""
    caplog.set_level("INFO", "echo_server")
    loop, handler = IOLoop(make_current=False), doing("on_close", EchoHandler.on_close)
    with socket.socket() as client:
        loop.run_sync(lambda: one_connection(client, handler))
        loop.close(all_fds=True)
    assert "[SERVER] close() 1006 from 127.0.0.1" in caplog.text


def interrupt(handler: Recorder, message: str) -> None:
    if message == "stop":
        raise KeyboardInterrupt


def test_an_interrupt_in_a_round_ends_no_rounds() -> None:
    loop = IOLoop(make_current=False)

    async def write() -> None:
        """Longer than a round."""
        for _ in range(5000):
            await calls.handler.write_message("more")

    with socket.socket() as one, socket.socket() as other:
        loop.run_sync(lambda: one_connection(one, doing("on_message", interrupt)))
        calls = loop.run_sync(lambda: one_connection(other))
        # The first turn ends before the last of these.
        one.sendall(text("go on") * 1000 + text("stop"))
        with pytest.raises(KeyboardInterrupt):
            loop.run_sync(asyncio.Event().wait, timeout=PATIENCE)
        loop.run_sync(write, timeout=PATIENCE)
        loop.close(all_fds=True)


WITHOUT_COLLECTOR = """
import gc, sys, echo_server
gc.disable()
echo_server.main(sys.argv[3:])
left = [thing for thing in gc.get_objects() if isinstance(thing, echo_server.EchoHandler)]
print(f"{len(left)} handlers are left", file=sys.stderr)
"""


def test_the_end_of_a_connection_frees_it_without_the_garbage_collector(serve: Serve) -> None:
    """Also where the handshake has passed through Tornado's HTTP server."""
    process = serve(script=f'exec "$1" -c \'{WITHOUT_COLLECTOR}\' "$@"', cwd=MODULE.parent)
    for first in ([], [HEALTH]):
        with process.dial() as sock:
            assert [answer(sock, data)[0] for data in (*first, request())][-1] == 101
            assert echoed(sock) == "ECHO:Hello!"
            sock.sendall(close())
            everything(sock)
    process.line(r"close\(\)", 2)
    assert process.stop() == 0
    process.line("^0 handlers are left")


@pytest.mark.parametrize(
    "add", [lambda inbox, _: inbox.put((echo_server.TEXT, b"a")), echo_server.Inbox.begin]
)
def test_short_messages_and_coroutines_of_pings_count_for_more_than_their_bytes(add: Any) -> None:
    inbox, number = echo_server.Inbox(limit=100 * 1024), 0
    while inbox.has_place() and number < 200:
        add(inbox, number)
        number += 1
    assert 100 <= number <= 102


def test_a_turn_ends_also_while_messages_that_have_waited_are_delivered() -> None:
    inbox = echo_server.Inbox(limit=1 << 20)
    for _ in range(9):
        inbox.put((echo_server.TEXT, b"a" * 100_000))
    assert [len(list(inbox.take())) for _ in range(4)] == [3, 3, 3, 0]


# ---- Deadlines and flow control


def write_much_and_close(handler: EchoHandler, *_: object) -> None:
    handler.write_message(WORD * 80)
    handler.close(4000)


async def write_on(handler: EchoHandler, message: str | bytes) -> None:
    """Often, but never so much that the kernel does not take it."""
    await handler.write_message(message)
    while True:
        await handler.write_message("more")
        await asyncio.sleep(0.002)


@pytest.mark.gen_test
class TestDeadlines:
    @pytest.mark.parametrize("transport", ["tcp", "tcp as on Windows"])
    async def test_an_idle_peer_stays_while_it_answers_pings_and_is_dropped_when_it_does_not(
        self, host: Host
    ) -> None:
        host.app.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.1)
        peer, calls = await host.record(Recorder)
        for _ in range(3):
            assert await peer.frame() == (FIN | PING, b"")
            peer.send(frame(FIN | PONG))
        assert await peer.frame() == (FIN | PING, b"")
        assert await peer.frame() == (FIN | CLOSE, close_body(1008, "no answer to a ping"))
        assert await peer.rest() == b""
        await eventually(lambda: calls.closes)
        assert calls == [("open",), *[("pong", b"")] * 3, *LEFT]

    async def test_time_in_which_the_process_was_stopped_does_not_count(self, host: Host) -> None:
        host.app.settings.update(websocket_ping_interval=0.4, websocket_ping_timeout=0.4)
        peer = await host.connect(stall_timeout=0.1)
        assert await peer.frame() == (FIN | PING, b"")
        await sweep()
        time.sleep(0.8)  # noqa: ASYNC251  # nothing else in this process has a turn meanwhile
        await sweep()
        peer.send(frame(FIN | PONG), text("hi"))
        assert await peer.replies(b"ECHO:hi")

    async def test_a_slow_peer_that_goes_on_sending_is_not_dropped(self, host: Host) -> None:
        host.app.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.1)
        peer = await host.connect(stall_timeout=0.1)
        for byte in bytewise(text("slow")):
            peer.send(byte)
            await asyncio.sleep(0.03)
        assert await peer.replies(b"ECHO:slow")

    async def test_a_pong_may_be_late_while_the_peer_goes_on_reading(self, host: Host) -> None:
        host.app.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.3)
        peer, calls = await host.record(Recorder, receive_buffer=4096)
        assert await peer.frame() == (FIN | PING, b"")
        calls.handler.write_message(WORD * 80)
        for _ in range(60):
            await peer.receive(20_000)
            await asyncio.sleep(0.02)
        peer.send(frame(FIN | PONG), text("hi"))
        await peer.receive(len(said(WORD * 80)) - 60 * 20_000)
        assert await peer.replies(b"ECHO:hi")

    async def test_a_message_that_stalls_is_1008_even_if_pings_come(self, host: Host) -> None:
        peer = await host.connect(stall_timeout=0.2)
        peer.send(text("before"), frame(TEXT, b"Hel"), frame(FIN | PING))
        assert await peer.replies(b"ECHO:before")
        while (got := await peer.frame()) == (FIN | PONG, b""):
            peer.send(frame(FIN | PING))
        assert got == (FIN | CLOSE, close_body(1008, "message does not go on"))

    @over_tcp_and_tls
    async def test_a_message_stalls_also_while_we_write(self, host: Host) -> None:
        async def write() -> None:
            with contextlib.suppress(WebSocketClosedError):
                while True:
                    await calls.handler.write_message(WORD * 20)

        peer, calls = await host.record(Recorder, stall_timeout=0.3)
        peer.send(frame(TEXT, b"Hel"))
        writing = asyncio.create_task(write())
        while (got := await peer.frame())[0] == FIN | TEXT:
            pass
        assert got == (FIN | CLOSE, close_body(1008, "message does not go on"))
        await writing

    @pytest.mark.parametrize(
        ("word", "rest", "code"), [("a", text("b")[:-1], 1008), ("a" * 60_000, b"", 1000)]
    )
    async def test_messages_that_wait_for_a_coroutine_have_not_stalled(
        self, host: Host, word: str, rest: bytes, code: int
    ) -> None:
        """Nor does one that stalls behind them cost their replies."""
        host.app.settings["websocket_max_message_size"] = 100_000
        peer, calls = await host.record(Waiting, stall_timeout=0.2, shut=True)
        other = await host.connect(stall_timeout=0.2)
        peer.send(text(word) * 10, rest)
        other.send(text("unfinished")[:-1])
        # What is failed later has stalled for no longer.
        assert await other.close_code() == 1008
        calls.gate.set()
        assert await peer.replies(*[word.encode()] * 10)
        peer.send(close())
        assert await peer.close_code() == code

    @pytest.mark.parametrize(
        ("transport", "handler", "words", "code"),
        [
            ("tcp", Recorder, 80, 1008),
            ("tls", Recorder, 80, 1008),
            ("tcp", doing("on_message", write_on), 5, 1008),
            # Until the kernel takes no more, for which a Unix socket adds something to each piece.
            ("unix", doing("on_message", write_on), 1, 1008),
            ("tcp", doing("on_message", write_much_and_close), 1, 4000),
        ],
        ids=["reply", "reply over TLS", "write on", "write on over a Unix socket", "close"],
    )
    async def test_a_peer_that_takes_nothing_is_reset(
        self, host: Host, hurried: None, handler: Any, words: int, code: int
    ) -> None:
        """Also while we write on, which is no progress of the peer, and while our Close waits."""
        peer, calls = await host.record(handler, receive_buffer=4096, stall_timeout=0.3)
        peer.send(text(WORD) * words)
        await eventually(lambda: calls.closes)
        assert Connections.current().closed == {code: 1} and len(calls.closes) == 1
        # A Unix socket knows no reset.
        if isinstance(host.address, int):
            with pytest.raises(ConnectionResetError):
                await peer.rest()

    async def test_while_our_close_waits_pings_do_not_delay_it(self, host: Host) -> None:
        host.monkeypatch.setattr(echo_server, "HIGH_WATER", 1 << 30)
        peer, calls = await host.record(Recorder, receive_buffer=4096)
        write_much_and_close(calls.handler)
        pings = [b"%d" % number for number in range(20)]
        peer.send(*[frame(FIN | PING, ping) for ping in pings])
        await eventually(lambda: calls[1:] == [("ping", ping) for ping in pings])
        assert await peer.replies(WORD.encode() * 80)
        assert await peer.replies(pings[-1], first=FIN | PONG)
        assert await peer.goodbye() == 4000

    async def test_who_stays_after_a_fault_is_dropped(self, host: Host, hurried: None) -> None:
        peer, other = await host.connect(), await host.connect()
        peer.send(b"\xff\xff")
        assert await peer.close_code() == 1002
        while len(Connections.current().open) > 1:
            peer.send(bytes(1000))
            await have_turns(other, 1)

    async def test_the_latest_ping_is_answered_above_the_high_water_mark(self, host: Host) -> None:
        peer = await host.connect()
        peer.send(text("a" * 900))
        assert await peer.replies(b"ECHO:" + b"a" * 900)
        pings = [frame(FIN | PING, b"%0125d" % number) for number in range(80)]
        # In one turn, at the end of which everything leaves at once.
        peer.send(text("b" * 900) * 70, *pings)
        while await peer.frame() != (FIN | PONG, b"%0125d" % 79):
            pass


def test_a_peer_of_a_unix_socket_that_reads_less_than_it_asks_for_is_not_dropped(
    serve: Serve, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    serve(f"--unix-socket={path}", "--stall-timeout=0.3", "--log-level=info").line("listening")
    with upgraded(path) as sock:
        for _ in range(60):
            sock.sendall(text("a") * 3)
            assert [sock.recv(8) for _ in range(2)] == [said("ECHO:a")] * 2
            select.select([], [], [], 0.02)


# ---- Other people's clients

NODE = """
const { WebSocket } = require('ws'), ws = new WebSocket(process.argv[1]);
ws.on('open', () => ws.send('Hello!'));
ws.on('message', data => { console.log(String(data)); ws.close(1000); });
ws.on('close', code => console.log(code));
"""


def test_ws_of_node_gets_its_echo(server: Process) -> None:
    node = shutil.which("node")
    if not node or ended(node, "-e", "require('ws')").returncode:
        pytest.skip("there is no node, or no module ws (see NODE_PATH)")
    done = ended(node, "-e", NODE, server.url + "test")
    assert (done.stdout, done.stderr) == ("ECHO:Hello!\n1000\n", "")


# ---- Anything in any order, compared with a model

MAY_BE_SENT = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}


class Failed(Exception):  # noqa: N818  # the peer has
    pass


def require(condition: object, code: int) -> None:
    if not condition:
        raise Failed(code)


def inflated_whole(data: bytes, window: bytes) -> tuple[bytes, bool]:
    """The content, and whether its last stream has ended."""
    content = b""
    while True:
        stream = zlib.decompressobj(-15, zdict=(window + content)[-32768:])
        content += stream.decompress(data, LIMIT + 1 - len(content))
        data = stream.unused_data
        if not data or len(content) > LIMIT:
            return content, stream.eof


def inflated_so_far(data: bytes, last: bool, window: bytes) -> bytes:
    try:
        content, ended = inflated_whole(data, window)
        if last and not ended and len(content) <= LIMIT:
            end = inflated_whole(data + b"\0\0\xff\xff\x03\0", window)
            require(end == (content, True), 1007)
    except zlib.error:
        raise Failed(1007) from None
    return content


class Model:
    """What the contract says that a server has to make of these bytes, seen as a whole."""

    def __init__(self, data: bytes, deflate: Deflate | None) -> None:
        self.rest, self.deflate = data, deflate
        # What came compressed before, if that may be referred to.
        self.window = b"" if deflate and deflate.takeover else None
        # Messages and control frames, and the code of the peer's fault.
        self.events: list[Event] = []
        self.fault: int | None = None
        self.begin_message(0, False)
        try:
            while self.code is None and self.frame(self.rest):
                pass
        except Failed as failed:
            self.fault = failed.args[0]

    @property
    def code(self) -> int | None:
        """The code of the Close that is the last reply; 1005: it has none."""
        opcode, payload = self.events[-1] if self.events else (0, b"")
        return int.from_bytes(payload[:2] or b"\x03\xed", "big") if opcode == CLOSE else self.fault

    @property
    def replies(self) -> list[Event]:
        replies = {
            PING: lambda payload: (PONG, payload),
            CLOSE: lambda payload: (CLOSE, payload[:2]),
            TEXT: lambda payload: (TEXT, b"ECHO:" + payload),
            BINARY: lambda payload: (BINARY, b"ECHO:" + payload),
        }
        failed = [(CLOSE, close_body(self.fault))] if self.fault else []
        return [replies[op](payload) for op, payload in self.events if op != PONG] + failed

    def begin_message(self, opcode: int, compressed: bool) -> None:
        self.opcode, self.compressed = opcode, compressed
        self.content, self.empty = b"", 0

    def frame(self, data: bytes) -> bool:
        """Takes a frame as far as it is there; whether all of it was."""
        if len(data) < 2:
            return False
        opcode, length = data[0] & 15, data[1] & 127
        require(data[1] & 0x80 and not data[0] & (RSV2 | RSV3), 1002)
        require(opcode in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG), 1002)
        require(not data[0] & RSV1 or (self.deflate and opcode in (TEXT, BINARY)), 1002)
        if opcode >= CLOSE:
            require(data[0] & FIN and length < 126, 1002)
        else:
            require(bool(self.opcode) == (opcode == CONTINUATION), 1002)
        size = {126: 2, 127: 8}.get(length, 0)
        if len(data) < 2 + size:
            return False
        if size:
            length = int.from_bytes(data[2 : 2 + size], "big")
            require((125 if size == 2 else 65535) < length < 1 << 63, 1002)
        start, end = 6 + size, 6 + size + length
        if opcode < CLOSE:
            room = LIMIT // 7 + 256 if data[0] & RSV1 or self.compressed else 0
            require(len(self.content) + length <= LIMIT + room, 1009)
        if len(data) < (start if opcode < CLOSE else end):
            return False
        payload = masked(data[start:end], data[start - 4 : start])
        self.rest = data[end:]
        if opcode >= CLOSE:
            self.control(opcode, payload)
        else:
            self.data(data[0], payload, len(data) >= end)
        return len(data) >= end

    def control(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE and payload:
            require(int.from_bytes(payload[:2], "big") in MAY_BE_SENT, 1002)
            require(is_text(payload[2:]), 1007)
        self.events.append((opcode, payload))

    def data(self, first: int, payload: bytes, whole: bool) -> None:
        if first & 15:
            self.begin_message(first & 15, bool(first & RSV1))
        self.content += payload
        self.empty += whole and not payload
        require(self.empty <= 1024, 1008)
        last, content = whole and bool(first & FIN), self.content
        if self.compressed:
            content = inflated_so_far(content, last, self.window or b"")
        require(self.opcode == BINARY or can_become_text(content), 1007)
        require(len(content) <= LIMIT, 1009)
        if last:
            require(self.opcode == BINARY or is_text(content), 1007)
            if self.compressed and self.window is not None:
                self.window = (self.window + content)[-32768:]
            self.events.append((self.opcode, content))
            self.begin_message(0, False)


sizes = st.sampled_from([0, 1, 125, 126, 127, 1018, 1019, 1024, LIMIT - 1, LIMIT, LIMIT + 1])

contents = (
    st.binary(max_size=200)
    | st.text(max_size=99).map(str.encode)
    | sizes.map(lambda size: b"x" * size)
)

opcodes = st.sampled_from([TEXT, BINARY])
flags = st.sampled_from([FIN, FIN, FIN, 0, 0, 0, FIN | RSV1, RSV1])

# After how many bytes, and whether to wait until the server has seen them.
Pauses = list[tuple[int, bool]]
pauses = st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=4)


def fitting(opcode: int, content: bytes) -> bytes:
    """Text that is not UTF-8 is only sent on purpose."""
    return content if opcode == BINARY or is_text(content) else content.decode("latin-1").encode()


def damaged(opcode: int, content: bytes, level: int, bit: int) -> bytes:
    """Compressed, with one bit that is wrong."""
    data = bytearray(packed(content, level))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    return frame(FIN | RSV1 | opcode, bytes(data))


fragmented = st.builds(
    lambda opcode, content, cuts: fragments(opcode, *cut(fitting(opcode, content), cuts)),
    opcodes,
    contents,
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
)
damages = st.builds(damaged, opcodes, contents, st.integers(0, 9), st.integers(0, 999))
controls = st.builds(frame, st.sampled_from([FIN | PING, FIN | PONG]), st.binary(max_size=125))
closes = st.builds(close, st.sampled_from([1000, 1001, 3000, 4999, 1005]), st.text(max_size=30))

bad_frames = st.sampled_from(
    [data for frames in BAD.values() for data in frames.values() if len(data) < 3 * LIMIT]
)

anything = st.binary(min_size=1, max_size=60) | bad_frames | controls | closes | fragmented

any_frame_of_data = st.builds(
    lambda flag, opcode, content: frame(
        flag | opcode, packed(content) if flag & RSV1 else fitting(opcode, content)
    ),
    flags,
    st.sampled_from([CONTINUATION, TEXT, BINARY]),
    contents,
)


@given(
    st.lists(anything | any_frame_of_data | damages, max_size=8).map(b"".join),
    st.lists(st.integers(0, 2 * LIMIT), max_size=8),
    st.sampled_from([None, NO_TAKEOVER, TAKEOVER]),
)
@settings(deadline=None, derandomize=True, max_examples=250)
def test_a_receiver_makes_of_any_bytes_what_the_contract_says(
    stream: bytes, cuts: list[int], deflate: Deflate | None
) -> None:
    model = Model(stream, deflate)
    events, fault = receive(cut(stream, cuts), LIMIT, deflate)
    count = len(model.events)
    assert (events[:count], fault) == (model.events, model.fault)
    # After a Close or a fault, control frames still count.
    assert all(model.code and opcode >= CLOSE for opcode, _ in events[count:])


OFFERS = {
    "": None,
    "permessage-deflate": TAKEOVER,
    "permessage-deflate; client_no_context_takeover": NO_TAKEOVER,
}

while_open = precondition(lambda self: self.open)


class Conversation(RuleBasedStateMachine):
    """Sends anything, in any pieces, on one connection after the other, and knows what comes."""

    server: Process
    trust: ssl.SSLContext | None
    neighbour: socket.socket
    # Messages by their type, and connections by the code of their Close, as the metrics name them.
    totals: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.open = False

    def teardown(self) -> None:
        if self.open:
            self.receive()
            self.end(1006)

    @precondition(lambda self: not self.open)
    @rule(offer=st.sampled_from(list(OFFERS)))
    def connect(self, offer: str) -> None:
        self.sock = upgraded(self.server, trust=self.trust, Sec_WebSocket_Extensions=offer)
        self.file = self.sock.makefile("rb")
        # What was sent, and how many replies have been read.
        self.open, self.sent, self.read = True, b"", 0
        self.model = Model(b"", OFFERS[offer])

    def send(self, data: bytes, pauses: Pauses) -> None:
        """In pieces, up to where the connection is over; at some cuts the server has its turn."""
        for size, pause in [*pauses, (len(data), False)]:
            piece, data = data[:size], data[size:]
            if piece and self.model.code is None:
                self.sock.sendall(piece)
                self.sent += piece
                self.model = Model(self.sent, self.model.deflate)
                if pause:
                    self.pause()
        if self.model.code is not None:
            self.receive()

    @while_open
    @rule()
    def pause(self) -> None:
        """Until the server has seen what was sent: it has answered somebody else since."""
        assert echoed(self.neighbour) == "ECHO:Hello!"
        self.totals["text"] += 1

    def answer(self) -> Event:
        """Opcode and content of the frame that comes next."""
        first, payload = read_frame(self.file)
        if first & RSV1:
            payload = inflated(payload)
        return first & 15, payload[:2] if first == FIN | CLOSE else payload

    @while_open
    @rule()
    def receive(self) -> None:
        """What the model expects, and the end if that is expected."""
        expected = self.model.replies[self.read :]
        assert [self.answer() for _ in expected] == expected
        self.read += len(expected)
        if self.model.code is not None:
            if self.model.code in (1007, 1008, 1009):
                # The server waits for a Close, for which there may be no place.
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
            assert not self.file.read(1)
            self.end(self.model.code)

    def end(self, code: int) -> None:
        self.file.close()
        cut_off(self.sock)
        self.open = False
        opcodes = Counter(opcode for opcode, _ in self.model.events)
        self.totals.update(text=opcodes[TEXT], binary=opcodes[BINARY])
        # Codes that applications choose are counted by the thousand.
        self.totals[f"{code // 1000}000-{code // 1000}999" if code >= 3000 else str(code)] += 1

    @while_open
    @rule(opcode=opcodes, content=contents, squeeze=st.booleans(), pauses=pauses)
    def send_message(self, opcode: int, content: bytes, squeeze: bool, pauses: Pauses) -> None:
        content = fitting(opcode, content)
        if squeeze and self.model.deflate:
            self.send(frame(FIN | RSV1 | opcode, self.squeezed(content)), pauses)
        else:
            self.send(frame(FIN | opcode, content), pauses)

    def squeezed(self, content: bytes) -> bytes:
        """It refers back where it may; and now and then it ends with BFINAL."""
        window = self.model.window or b""
        if len(content) % 5 == 0:
            return finished(content, window) + b"\0" * (len(content) % 2)
        compressor = zlib.compressobj(wbits=-15, zdict=window)
        return (compressor.compress(content) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]

    @while_open
    @rule(opcode=opcodes, content=contents, flag=flags, pauses=pauses)
    def send_next_part(self, opcode: int, content: bytes, flag: int, pauses: Pauses) -> None:
        """Of a message that goes on, if there is one."""
        opcode = CONTINUATION if self.model.opcode else opcode
        self.send(frame(flag | opcode, fitting(TEXT, content)), pauses)

    @precondition(lambda self: self.open and self.model.deflate)
    @rule(data=damages)
    def send_damaged(self, data: bytes) -> None:
        self.send(data, [])

    @while_open
    @rule(data=anything | st.just(b""), pauses=pauses)
    def send_anything(self, data: bytes, pauses: Pauses) -> None:
        if data:
            self.send(data, pauses)
        else:
            self.leave()

    def leave(self) -> None:
        """Without a Close; the replies that are owed have to come."""
        if self.trust:
            # TLS that ends without its own goodbye may lose what has just come.
            self.receive()
        # Not SSLSocket's, which would end TLS as well.
        socket.socket.shutdown(self.sock, socket.SHUT_WR)
        self.receive()
        # An alert: TLS does not like it.
        with contextlib.suppress(ssl.SSLError):
            assert not self.file.read(1)
        self.end(1006)


budget = settings(
    # The number of conversations, of up to 50 steps each.
    max_examples=int(os.environ.get("WS_ECHO_FUZZ", "6")),
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
def test_whatever_is_sent_is_answered_as_the_contract_says(
    serve: Serve, certificate: Path, trust: ssl.SSLContext, secure: bool
) -> None:
    options = [f"--certfile={certificate}"] if secure else []
    server = serve("--metrics", f"--max-message-size={LIMIT}", *options)
    Conversation.server, Conversation.totals = server, Counter()
    Conversation.trust = trust if secure else None
    # Hypothesis parses this file. When garbage of other tests is collected meanwhile, and asyncio
    # logs an exception of it, Python 3.11 parses within its parser, and loses count of its depth.
    gc.collect()
    with upgraded(server, trust=Conversation.trust) as Conversation.neighbour:
        run_state_machine_as_test(Conversation, settings=budget)
        until(
            lambda: measured(server, Conversation.trust) == Conversation.totals,
            lambda: f"{measured(server, Conversation.trust)} is not {Conversation.totals}",
        )


def measured(server: Process, trust: ssl.SSLContext | None) -> Counter[str]:
    """Messages by type, and closes by code, as the server counts them."""
    with server.dial(trust) as sock:
        _, _, text = answer(sock, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    name = r'_(?:messages_total{direction="received",type|closed_total{code)="([\w-]+)"}'
    return Counter({label: int(count) for label, count in re.findall(name + r" (\d+)", text)})


# --------------------------------------------------------------------------------------------- HTTP

REFUSED = {
    "a plain GET": (request(without="Upgrade"), 426, "Upgrade"),
    "another protocol": (request(Upgrade="h2c"), 426, "Upgrade"),
    "no Connection": (request(without="Connection"), 426, "Connection"),
    "Connection: keep-alive": (request(Connection="keep-alive"), 426, "Connection"),
    "no version": (request(without="Sec-WebSocket-Version"), 426, "must be 13: it is missing"),
    "version 8, no key": (request(Sec_WebSocket_Key="", Sec_WebSocket_Version="8"), 426, "it is 8"),
    "version 013": (request(Sec_WebSocket_Version="013"), 426, "Sec-WebSocket-Version"),
    "two versions": (request(add="Sec-WebSocket-Version: 13"), 426, "Sec-WebSocket-Version"),
    "no key": (request(without="Sec-WebSocket-Key"), 400, "Sec-WebSocket-Key must be"),
    "two keys": (request(add=f"Sec-WebSocket-Key: {NONCE}"), 400, "Sec-WebSocket-Key"),
    "a key of 15 bytes": (request(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25j"), 400, "16 bytes"),
    "a key of 17 bytes": (request(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZTE="), 400, "16 bytes"),
    "a key that is not base64": (request(Sec_WebSocket_Key="!" * 24), 400, "16 bytes"),
    "a key without its padding": (request(Sec_WebSocket_Key=NONCE.rstrip("=")), 400, "16 bytes"),
    "a key that is not ASCII": (request(Sec_WebSocket_Key="\xe9" * 22 + "=="), 400, "16 bytes"),
    "HTTP/1.0": (request("GET / HTTP/1.0"), 400, "HTTP/1.1"),
    "HTTP/1.2": (request("GET / HTTP/1.2"), 400, "HTTP/1.1"),
    "no target": (request("GET  HTTP/1.1"), 400, "request line"),
    "two Hosts": (request(add="Host: other"), 400, "Multiple host headers"),
    "no Host": (request(without="Host"), 400, "Missing Host header"),
    "a Host with a space": (request(Host="a b"), 400, "Invalid Host header"),
    "a body": (request(add="Content-Length: 5") + b"hello", 400, "not have a body"),
    "a body in chunks": (request(add="Transfer-Encoding: chunked"), 400, "not have a body"),
    "a body after 100": (request(add="Content-Length: 5\r\nExpect: 100-continue"), 400, "a body"),
    "two lengths": (request(add="Content-Length: 0\r\nContent-Length: 5"), 400, "not have a body"),
    "an Origin that is not a URL": (request(Origin="http://[::1"), 403, "Origin"),
    "a POST": (request("POST / HTTP/1.1", add="Content-Length: 0"), 405, "GET: it is POST"),
    "a HEAD": (request("HEAD / HTTP/1.1"), 405, ""),
    "a plain BREW": (b"BREW /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 405, "GET: it is BREW"),
    "a NUL in a header": (request(Origin="a\0b"), 400, "Invalid header value"),
    "a bare CR in a header": (request(Origin="a\rb"), 400, "Invalid header value"),
    "a header without a colon": (request(add="nonsense"), 400, "no colon"),
    "a header that is folded": (request(add="X-A: b\r\n c"), 400, "folding not supported"),
    "1,001 arguments": (request(f"GET /?{'a=1&' * 1000}a=1 HTTP/1.1"), 400, "number of fields"),
    "a cookie of 17 KB": (request(Cookie="x" * 17_000), 431, "more than 16384 bytes"),
    "a target of 17 KB": (request(f"GET /{'x' * 17_000} HTTP/1.1"), 414, "more than 16384 bytes"),
    "a protocol that is no token": (request(Sec_WebSocket_Protocol="a b"), 400, "list of tokens"),
    "a code that may not be": (request("GET /?close=77 HTTP/1.1"), 400, "close=77 is not 1000"),
    "a delay that is no number": (request("GET /?delay=x HTTP/1.1"), 400, "delay=x is not a num"),
    "a scenario twice": (request("GET /?drop=1&drop=0 HTTP/1.1"), 400, "drop=1, 0 is not 0 or 1"),
}

ODD = {
    "Upgrade: WebSocket": request(Upgrade="WebSocket"),
    "a list in Upgrade": request(Upgrade="websocket, h2c"),
    "a list in Connection": request(Connection="keep-alive, Upgrade"),
    "Content-Length: 0": request(add="Content-Length: 0"),
    "the type of a body that is not there": request(Content_Type="multipart/form-data; boundary=x"),
    "1,000 arguments": request(f"GET /?{'a=1&' * 999}a=1 HTTP/1.1"),
    "bytes and escapes that are not UTF-8": request("GET /\xe9%zz?%ff=%zz HTTP/1.1"),
    "a path of slashes and dots": request("GET //../etc/passwd HTTP/1.1"),
    "absolute form": request("GET ws://localhost:4000/ws/chat?x=1 HTTP/1.1"),
    "absolute form without a path": request("GET http://localhost:4000 HTTP/1.1"),
    "the path of the health check": request("GET /healthz HTTP/1.1"),
    "a browser's Accept": request(Accept="text/html"),
    "a header of 15 KB": request(X_Filler="x" * 15_000),
    "a page of another site": request(Origin="https://other.example", Sec_Fetch_Site="cross-site"),
}


PAGE = r"<!doctype html>.*</html>\s*"


@pytest.mark.parametrize(
    ("path", "accept", "kind", "body"),
    [
        ("http://localhost/healthz?x=1", "text/html,*/*", "text/plain", "ok\n"),
        ("/ws/chat?token=x", "application/xhtml+xml,text/html;q=0.9,*/*", "text/html", PAGE),
        ("/favicon.ico", "text/html", "text/html", PAGE),
    ],
)
def test_health_check_and_page_are_never_stored_or_sniffed_and_head_is_get_without_a_body(
    server: Process, path: str, accept: str, kind: str, body: str
) -> None:
    status, headers, found = get(server, path, Accept=accept)
    bare = get(server, path, method="HEAD", Accept=accept)
    names = ["Content-Type", "Vary", "Cache-Control", "X-Content-Type-Options"]
    expected = [f"{kind}; charset=utf-8", "Accept", "no-store", "nosniff"]
    assert [headers[name] for name in names] == [bare[1][name] for name in names] == expected
    assert headers["Content-Security-Policy"] == bare[1]["Content-Security-Policy"]
    assert (status, bare[0], bare[2]) == (200, 200, "")
    assert re.fullmatch(body, found, re.DOTALL)


# The text format of Prometheus.
METRICS = re.compile(
    r"(# HELP (\w+) [A-Z].+\.\n# TYPE \2 ((?<=_total )counter|(?<!_total )gauge)\n"
    r'(\2({[a-z]+="[^"\\]*"(,[a-z]+="[^"\\]*")*})? [\d.e+]+\n)*)+'
)


def test_metrics_are_written_and_named_as_prometheus_knows_them(serve: Serve) -> None:
    text = get(serve("--metrics"), "/metrics")[2]
    assert METRICS.fullmatch(text)
    values = re.findall(r"(?m)^(process_\w+) (\S+)$", text)
    found = {name: float(value) for name, value in values}
    assert time.time() - 60 < found["process_start_time_seconds"] < time.time()
    assert 0 < found["process_cpu_seconds_total"] < 60
    assert 1 << 20 < found["process_resident_memory_bytes"] < 1 << 30
    assert 3 < found["process_open_fds"] < found["process_max_fds"]


def test_replies_count_with_the_prefix_that_they_were_sent_with() -> None:
    traffic = echo_server.Traffic()
    for prefix, payloads in ((5, [b"one", b"two"]), (0, [b"three"])):
        traffic.echo_with(prefix)
        traffic.echoes += len(payloads)
        traffic.echo_bytes += sum(len(text(payload.decode())) for payload in payloads)
    assert traffic.received() == (3, 11)
    assert (traffic.texts_sent, traffic.text_bytes_sent) == (3, 21)
    traffic.count_sent(BINARY, 7)
    assert (traffic.binaries_sent, traffic.binary_bytes_sent) == (1, 7)


def test_metrics_have_two_series_for_the_close_codes_of_applications(serve: Serve) -> None:
    server = serve("--metrics")
    for code in 3000, 3999, 4000, 4999:
        with upgraded(server) as sock:
            sock.sendall(close(code))
            everything(sock)
    until(lambda: measured(server, None) == Counter({"3000-3999": 2, "4000-4999": 2}))


@pytest.mark.parametrize(("data", "status", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_handshake_is_refused_with_the_status_and_the_header_at_fault(
    server: Process, data: bytes, status: int, text: str
) -> None:
    found, headers, body = refused(server, data)
    assert (found, text in body) == (status, True)
    if status == 426:
        assert (headers["Upgrade"], headers["Sec-WebSocket-Version"]) == ("websocket", "13")
        assert "upgrade" in headers["Connection"].lower()
        assert (headers["Vary"], headers["Cache-Control"]) == ("Accept", "no-store")
    assert headers["Allow"] == ("GET" if status == 405 else None)
    assert not server.tracebacks()


def test_each_refusal_is_one_line_with_the_reason_of_the_answer_and_a_plain_get_is_none(
    serve: Serve,
) -> None:
    server, expected = serve(), []
    for path, accept in ("/", "text/html"), ("/", "*/*"), ("/healthz", "*/*"):
        get(server, path, Accept=accept)
    # In a second, the log has no more than fifty lines of a kind.
    for data, status, _ in itertools.islice(REFUSED.values(), 50):
        with server.dial() as sock:
            body = answer(sock, data)[2] or "405: the method must be GET: it is HEAD"
            reason = body.partition("\n")[0].removeprefix(f"{status}: ")
            expected.append(f"{status} {reason}, 127.0.0.1:{sock.getsockname()[1]}")
    assert server.stop() == 0
    _, *lines, _ = server.lines
    assert [line.partition(" [SERVER] error:")[2] for line in lines] == expected


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_an_odd_but_valid_handshake_is_taken(server: Process, data: bytes) -> None:
    with server.dial() as sock:
        status, headers, _ = answer(sock, data)
        assert (status, headers["Sec-WebSocket-Accept"]) == (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        assert echoed(sock, "") == "ECHO:"
    assert not server.tracebacks()


def test_the_log_shows_the_path_of_a_handshake_without_its_query(server: Process) -> None:
    upgraded(server, "ws://localhost:4000/ws/chat?token=secret").close()
    server.line(r"connection\(\) from 127\.0\.0\.1:\d+ /ws/chat$")


# ---- Both ways

# A handshake in one piece does not pass through Tornado's HTTP server, others do.

METHODS = "GET", "get", "POST", "G(T", "GET\t"
TARGETS = "/", "ws://h:1/p?q", "http://h", "http://[::1", "*", "/ /", ""
VERSIONS = "HTTP/1.1", "HTTP/1.0", "http/1.1", "HTTP/1.1 ", "HTTP/11"

# The values of each header, with a | in between.
VALUES = {
    "Upgrade": "WEBSOCKET|websocket,|h2c, websocket|websocket/13|",
    "Connection": "keep-alive, upgrade|,,Upgrade,,|close|Upgrade\t|",
    "Host": "[::1]:4000|h:x|user@h|a,b|a b|\xe9|",
    "Sec-WebSocket-Version": "13 |8, 13|+13|",
    "Sec-WebSocket-Key": f"{NONCE} |{NONCE}=|{NONCE}, x|",
    "Sec-WebSocket-Protocol": f"a, b|a,,b|a;b|a/b|\xe9|,|{'x' * 9000}",
    "Sec-WebSocket-Extensions": 'x, permessage-deflate; client_max_window_bits|x-webkit; y="|',
    "Origin": "null|http://a:b|http://a\xbd|\xff",
    "Content-Length": "0|00|+0|0,0|1|",
    "Transfer-Encoding": "chunked|identity|",
    "Expect": "100-continue|x",
    "Accept": "text/html",
    "Cookie": "x" * 9000,
    "X-A": "\t|\x7f|a\0b|\x85",
}

END = b"\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x" + END

FORMS = [
    *(lead + request() for lead in (b"\r\n", b"\n", END, b"\r\n\n", b"\r", b" ", b"\0", HEALTH)),
    *(request()[:-4] + end for end in (b"\n\n", b"\n\r\n", b"\r\n\n", b"\n\n\r\n", b"\r\r\n\r\n")),
    *(request().replace(b"\r\nUp", end + b"Up") for end in (b"\n", b"\n\n", b"\r\n\n", b"\r\r\n")),
    *(line + END for line in (b"GET /", b"hello", b" ", b"PRI * HTTP/2.0", b"HTTP/1.1 200 OK")),
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + request(),
]


def all_requests() -> Iterator[bytes]:
    """Right, wrong, and odd ones."""
    yield from (data for data, *_ in REFUSED.values())
    yield from (*ODD.values(), *FORMS)
    for query in "delay=0", "close=4999&reason=%f0%9f%98%80", "drop=1", "push=2&after=-1", "&&a;b":
        yield request(f"GET /?{query} HTTP/1.1")
    for words in itertools.product(METHODS, TARGETS, VERSIONS):
        yield request(" ".join(words))
    for name, values in VALUES.items():
        for value in values.split("|"):
            yield request(without=name, add=f"{name}: {value}")
            yield request(add=f"{name.lower()}:{value}")
        yield request(without=name, add=f"{name} : {HEADERS.get(name)}")
        yield request(without=name, add=f"{name}:\r\n {HEADERS.get(name)}")
    # Around the limit of 16 KiB: for the head, and for its first line.
    for limit in 16_383, 16_384, 16_385:
        yield request(X_Filler="x" * (limit - len(request(X_Filler=""))))
        yield request(f"GET /{'x' * (limit - len(request()))} HTTP/1.1")


def test_headers_are_read_as_tornado_reads_them() -> None:
    def outcome(read: Callable[[str], HTTPHeaders], text: str) -> Any:
        try:
            return list(read(text).get_all())
        except HTTPInputError as error:
            return str(error)

    for data in all_requests():
        text = data.decode("latin-1").partition("\n")[2]
        assert outcome(echo_server.read_headers, text) == outcome(HTTPHeaders.parse, text)


@pytest.mark.parametrize("text", ["a" * 16_000 + "\r\n", f"a:{'b' * 16_000}\n"], ids=len)
def test_an_unusual_header_line_takes_no_time_that_anybody_would_notice(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(HTTPInputError):
        echo_server.read_headers(text + "\r\n")
    assert time.process_time() - began < 0.1


def test_a_request_has_the_same_answer_in_one_piece_in_two_and_after_another(
    server: Process,
) -> None:
    """A message and a Close follow each request; dates and ports do not matter."""
    varies = rb"(Date|Etag): .*\r\n|127\.0\.0\.1:\d+"

    def let_it_look() -> None:
        """Two answers later, the server has looked at what came before."""
        for _ in range(2):
            other.sendall(HEALTH)
            assert other.recv(4096).endswith(b"ok\n")

    def answers(*pieces: bytes) -> bytes:
        with server.dial() as sock:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
                    let_it_look()
                sock.shutdown(socket.SHUT_WR)
            return re.sub(varies, b"", everything(sock))

    statuses = set()
    with server.dial() as other:
        healthy = answers(HEALTH)
        for number, data in enumerate(all_requests()):
            end = number % (len(data) - 1) + 1
            rest = frame(FIN | TEXT, b"Hello!") + close()
            one = answers(data + rest)
            assert answers(data[:end], data[end:] + rest) == one, data
            # Tornado reads whatever comes after a request that was no handshake.
            assert answers(HEALTH, data + rest) == healthy + one, data
            statuses.add(one[9:12])
    assert statuses >= {b"101", b"400", b"403", b"405", b"414", b"426", b"431", b""}


# ---- Who the peer is


ORIGINS = "https://App.Example.org:443/, http://b\xfccher.example:8080,https://[2001:DB8:0::7]"


PROXIES = "127.0.0.0/8, 198.18.0.1,::1"


@pytest.fixture(scope="module")
def choosy() -> Iterator[Process]:
    """A server that has to know who the peer is."""
    with Process("--port=0", f"--origins={ORIGINS}", f"--trusted-proxies={PROXIES}") as process:
        yield process


# What a browser says about a page, and why it may not connect.
PAGES = [
    ({"Origin": "https://app.example.org"}, ""),
    ({"Origin": "HTTPS://APP.example.org:443", "Sec-Fetch-Site": "cross-site"}, ""),
    ({"Origin": "http://xn--bcher-kva.example:8080"}, ""),
    ({"Origin": "https://[2001:db8::7]"}, ""),
    ({"Origin": "http://localhost"}, ""),
    ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, ""),
    ({"Sec-Fetch-Site": "none"}, ""),
    ({"Origin": "http://app.example.org"}, "http://app.example.org"),
    ({"Origin": "https://app.example.org:444"}, "https://app.example.org:444"),
    ({"Origin": "https://x.app.example.org"}, "https://x.app.example.org"),
    ({"Origin": "http://localhost:1", "Sec-Fetch-Site": "same-site"}, "http://localhost:1"),
    ({"Origin": "null", "Sec-Fetch-Site": "cross-site"}, "null"),
    ({"Origin": ""}, "it is empty"),
    ({"Sec-Fetch-Site": "cross-site"}, "it is cross-site"),
]


@pytest.mark.parametrize(("headers", "reason"), PAGES)
def test_origins_are_compared_as_browsers_write_them_and_others_refused_in_our_words(
    choosy: Process, headers: dict[str, str], reason: str
) -> None:
    status, _, body = refused(choosy, request(**headers))
    said = f"403: this page may not connect: {reason}"
    assert (status, body.partition("\n")[0]) == ((403, said) if reason else (101, ""))


@pytest.mark.parametrize(
    ("forwarded", "peer"),
    [
        ("203.0.113.9, 203.0.113.7,198.18.0.1", "203.0.113.7"),
        ("203.0.113.7:41234", "203.0.113.7"),
        ("[2001:db8::7]:41234", "2001:db8::7"),
        ('"[2001:db8::7]"', "2001:db8::7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("203.0.113.7,, ::ffff:198.18.0.1,[::1]:80,", "203.0.113.7"),
        ("203.0.113.7\r\nX-Forwarded-For: [::1]", "203.0.113.7"),
        ("203.0.113.7, unknown", r"127\.0\.0\.1:\d+"),
        ("[]", r"127\.0\.0\.1:\d+"),
        ("", r"127\.0\.0\.1:\d+"),
        ("2001:db8::1%\x9b31m and more", "2001:db8::1"),
        # Only the last 32 addresses are looked at.
        ("203.0.113.7" + ", ::1" * 31, "203.0.113.7"),
        ("203.0.113.7" + ", ::1" * 32, "::1"),
    ],
)
def test_a_trusted_proxy_says_who_the_peer_is(choosy: Process, forwarded: str, peer: str) -> None:
    assert re.search(f"Peer: {peer}\n", get(choosy, X_Forwarded_For=forwarded)[2])


def test_the_address_of_a_trusted_proxy_may_be_written_in_any_form() -> None:
    right = "::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "[::1], 127.0.0.1"
    for form in "127.0.0.1", "127.0.0.1:80", "::ffff:127.0.0.1", "[::ffff:127.0.0.1]:80":
        peer = echo_server.parse_address(form)
        for proxies in *right, "10.0.0.0/8,unix,::/0", "":
            trusted = echo_server.is_trusted(peer, echo_server.parse_proxies(proxies))
            assert trusted == (proxies in right), (form, proxies)


def test_on_a_socket_of_both_families_ipv4_and_ipv6_are_named_as_usual(serve: Serve) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        server = inheriting(serve, listener, "--trusted-proxies=127.0.0.0/8")
        assert server.url == f"ws://localhost:{listener.getsockname()[1]}/"
        with upgraded(server, "/a") as sock:
            server.line(rf"connection\(\) from 127\.0\.0\.1:{sock.getsockname()[1]} /a$")
        upgraded(server, "/b", X_Forwarded_For="203.0.113.7").close()
        server.line(r"connection\(\) from 203\.0\.113\.7 /b$")
        with connect(f"ws://[::1]:{server.port}/c", proxy=None):
            server.line(r"connection\(\) from \[::1\]:\d+ /c$")


@pytest.mark.gen_test
async def test_embedded_the_peer_is_the_one_that_tornado_found_in_a_header(
    app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with listening(app, xheaders=True) as port:
        peer = await peer_at(port)
        await peer.upgrade(request("GET /echo HTTP/1.1", X_Real_Ip="203.0.113.7"))
        peer.leave()
        await eventually(lambda: len(ours(caplog)) == 2)
        assert all(" 203.0.113.7 " in line for line in ours(caplog))


# ------------------------------------------------------------------------------------------ Options


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"ws-echo \d+\.\d+\.\d+\n", run("--version").stdout)


def test_a_value_follows_an_equals_sign_or_a_space() -> None:
    assert parse_args([]) == Options()
    arguments = "--port 65535 --prefix=x --no-compression --send=a --send=b"
    given = parse_args(arguments.split())
    assert given == Options(port=65535, prefix="x", compression=False, send=("a", "b"))


USAGE: dict[str, list[str]] = {
    "--port": ["x", "", "1.5", "-1", "65536"],
    "--max-message-size": ["124"],
    "--max-connections": ["-1"],
    "--handshake-timeout": ["0", "nan"],
    "--stall-timeout": ["inf"],
    "--timeout": ["0"],
    "--log-level": ["loud", "INFO"],
    "--trusted-proxies": ["localhost", "10.0.0.0/33", "[]"],
    "--origins": ["x", "https://x/y", "a://b, c://", "https://*.x", "wss://x", "https://fa\xdf.de"],
    "--prefix": ["\udcff"],
    "--connect": ["", "nonsense", "ftp://localhost/"],
    # There are no such flags, or none with a value.
    "--nonsense": ["1"],
    "--por": ["1"],
    "--no-prefix": [""],
    "--compression": ["yes"],
    "--reuse-port": ["1"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in USAGE.items() for value in values]
)
def test_a_wrong_option_is_a_usage_error_that_names_it(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_args([f"{name}={value}"])
    assert name in capsys.readouterr().err.splitlines()[-1]


def test_the_file_has_the_same_names_and_flags_override_it_also_with_a_default(
    tmp_path: Path,
) -> None:
    config = tmp_path / "ws-echo.toml"
    config.write_text(
        'port = 1\nmax-message-size = 125\nping_timeout = 3\nprefix = "f"\ncompression = false\n'
    )
    options = parse_args([f"--config={config}", "--port=4000", "--ping-timeout=4"])
    assert options == Options(
        config=str(config), max_message_size=125, ping_timeout=4.0, prefix="f", compression=False
    )
    assert parse_args([f"--config={config}", "--compression"]).compression


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nonsense = 1", "nonsense"),
        ('port = "4000"', "port"),
        ("port = true", "port"),
        ("max_message_size = 1", "max_message_size"),
        (f"ping-interval = {'9' * 400}", "ping-interval"),
        (f"prefix = {'[' * 3000}{']' * 3000}", ""),
        ('connect = "ws://localhost/"', "connect"),
        ('config = "other.toml"', "config"),
        ('certfile = "a\\u0000b"', "certfile"),
        ("port", ""),
        ('prefix = "\xff', ""),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_file_and_the_option(
    text: str, name: str, tmp_path: Path
) -> None:
    config = tmp_path / "ws-echo.toml"
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(config))}: {name}"):
        read_config(str(config))


# ------------------------------------------------------------------------------------------- Server


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd would read from."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.bind(str(tmp_path / "notify"))
        yield sock


def told(sock: socket.socket, pattern: str) -> str:
    """The next message that has this, which is read as long as it takes."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, message := sock.recv(4096).decode()):
        assert time.monotonic() < deadline, message
    return message


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def client_hello() -> bytes:
    """What a client of TLS says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    return outgoing.read()


# ---- Where it listens


@contextlib.contextmanager
def listening_at(**options: Any) -> Iterator[str]:
    """Sockets of a server with these options, which accepts nobody, and the URL of them."""
    sockets = listening_sockets(Options(**options))
    (url,) = echo_server.urls_of(sockets, tls=False)
    yield url
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("", "localhost"),
        ("127.0.0.2", "127.0.0.2"),
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104  # only for a moment
        ("::1", "::1"),
        ("::", "::1"),
    ],
)
def test_each_printed_url_can_be_connected_to_and_localhost_means_both_families(
    address: str, host: str
) -> None:
    with listening_at(address=address, port=0) as url:
        assert urlsplit(url).hostname == host
        for each in ["127.0.0.1", "::1"] if host == "localhost" else [host]:
            socket.create_connection((each, urlsplit(url).port), PATIENCE).close()


def test_a_port_is_shared_with_a_server_that_asks_for_it_as_well(serve: Serve) -> None:
    with listening_at(port=0, reuse_port=True) as url:
        port = urlsplit(url).port
        assert serve(f"--port={port}", "--reuse-port").port == port


def test_a_unix_socket_is_for_the_group_and_goes_with_the_server(
    serve: Serve, tmp_path: Path
) -> None:
    """It replaces the socket file of a server that has crashed."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = serve(f"--unix-socket={path}")
    assert server.line(r"listening on (\S+)")[1] == f"ws+unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with upgraded(str(path), "/test") as client:
        assert echoed(client) == "ECHO:Hello!"
        server.line(r"connection\(\) from unix /test$")
    assert server.stop() == 0
    assert not path.exists()


def test_a_socket_file_that_cannot_be_removed_does_not_cost_a_client_its_1001(
    serve: Serve, tmp_path: Path
) -> None:
    path, script = f"{tmp_path}/s", 'exec "$@"'
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("nothing keeps root from removing it")
        os.chown(tmp_path, 65534, 65534)
        tmp_path.chmod(0o777)
        script = 'exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    server = serve(f"--unix-socket={path}", script=script)
    server.line("listening")
    with upgraded(path) as client:
        tmp_path.chmod(0o555)
        server.signal(signal.SIGTERM)
        assert close_code(client) == 1001
    assert server.exit_code() == 0


def test_a_unix_socket_that_another_server_has_taken_over_stays(
    serve: Serve, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    first = serve(f"--unix-socket={path}")
    first.line("listening")
    os.unlink(path)
    with listening_at(unix_socket=path):
        assert first.stop() == 0
        assert listens(path)


@pytest.mark.parametrize("backlog", [0, 8], ids=["its queue is full", "it has room"])
def test_a_unix_socket_in_use_is_named_and_stays(tmp_path: Path, backlog: int) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(path)
        other.listen(backlog)
        client.connect(path)
        with pytest.raises(CannotServe, match=f"{path}: it is in use"):
            listening_sockets(Options(unix_socket=path))
        other.listen(8)
        assert listens(path)


# ---- TLS


def test_tls_1_2_is_spoken_and_1_1_is_not(tls: Process, trust: ssl.SSLContext) -> None:
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    assert tls.url.startswith("wss://localhost:")
    with upgraded(tls, trust=trust) as sock:
        assert echoed(sock, "x" * 300_000) == "ECHO:" + "x" * 300_000
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        trust.minimum_version, trust.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    trust.set_ciphers("DEFAULT:@SECLEVEL=0")
    with tls.dial() as sock, pytest.raises(ssl.SSLError, match="protocol version"):
        trust.wrap_socket(sock, server_hostname="localhost")


def test_alpn_selects_http_1_1(tls: Process, trust: ssl.SSLContext) -> None:
    trust.set_alpn_protocols(["h2", "http/1.1"])
    with upgraded(tls, trust=trust) as sock:
        assert cast(ssl.SSLSocket, sock).selected_alpn_protocol() == "http/1.1"


def test_only_a_client_with_a_certificate_of_the_authority_asked_for_is_let_in(
    serve: Serve, files: Path, trust: ssl.SSLContext
) -> None:
    """The key of the server is in a file of its own."""
    clients = trustme.CA()
    clients.cert_pem.write_to_path(str(files / "ca"))
    options = f"--certfile={files}/cert --keyfile={files}/key --client-cafile={files}/ca"
    server = serve(*options.split())
    for issuer in None, trustme.CA(), clients:
        if issuer:
            issuer.issue_cert("me@example.com").configure_cert(trust)
        refusal = pytest.raises((ssl.SSLError, ConnectionError))
        with contextlib.nullcontext() if issuer is clients else refusal, server.dial(trust) as sock:
            assert answer(sock, request())[0] == 101


@pytest.mark.parametrize("last", [b"", close()], ids=["the peer's is answered", "after a Close"])
def test_tls_ends_with_close_notify(tls: Process, trust: ssl.SSLContext, last: bytes) -> None:
    with upgraded(tls, trust=trust) as sock:
        sock.sendall(last)
        if last:
            assert close_code(sock) == 1000
        # Without a close_notify from the server, this would raise SSLEOFError.
        cast(ssl.SSLSocket, sock).unwrap()


# What Python itself calls.
OPENSSL = ctypes.CDLL(_ssl.__file__)


@pytest.mark.skipif(
    not hasattr(OPENSSL, "SSL_key_update"), reason="OpenSSL cannot be called past Python"
)
def test_a_key_update_harms_no_replies_that_wait(tls: Process, trust: ssl.SSLContext) -> None:
    sent = 0
    with upgraded(tls, trust=trust) as sock:
        # Past Python, whose object has the SSL* behind its header and a pointer.
        pointer = ctypes.c_void_p.from_address(id(cast(Any, sock)._sslobj) + 24)
        sock.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while True:
                sock.sendall(frame(FIN | BINARY, bytes(1000)) * 5)
                sent += 5
                assert OPENSSL.SSL_key_update(pointer, 1) == 1
        sock.settimeout(PATIENCE)
        with sock.makefile("rb") as file:
            for _ in range(sent):
                assert read_frame(file) == (FIN | BINARY, b"ECHO:" + bytes(1000))


def test_messages_that_came_before_sigterm_are_answered(
    serve: Serve, certificate: Path, trust: ssl.SSLContext
) -> None:
    """The server cannot see how many are in the records of TLS that it has not read."""
    server = serve(f"--certfile={certificate}")
    with upgraded(server, trust=trust) as sock, sock.makefile("rb") as file:
        server.signal(signal.SIGSTOP)
        for _ in range(200):
            sock.sendall(text("Hello!"))
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGCONT)
        assert [read_frame(file)[1] for _ in range(200)] == [b"ECHO:Hello!"] * 200
        assert read_frame(file) == (FIN | CLOSE, close_body(1001, "the server is stopping"))


# ---- SIGHUP


def serial(server: Process, trust: ssl.SSLContext) -> object:
    with server.dial() as sock, trust.wrap_socket(sock, server_hostname="localhost") as tls:
        return (tls.getpeercert() or {})["serialNumber"]


def test_sighup_takes_certificate_and_log_level_or_neither_if_one_is_wrong_and_keeps_connections(
    serve: Serve,
    systemd: socket.socket,
    authority: trustme.CA,
    certificate: Path,
    trust: ssl.SSLContext,
) -> None:
    config, debug = certificate.with_name("ws-echo.toml"), "log-level = 'debug'"
    config.write_text("log-level = 'info'")
    renewed = authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()
    options = f"--config={config}", f"--certfile={certificate}"
    server = serve(*options, env={"NOTIFY_SOCKET": systemd.getsockname()})
    with upgraded(server, trust=trust) as sock:
        before = serial(server, trust)
        for pem, text in (b"junk", debug), (renewed, "port"), (renewed, ""), (renewed, debug):
            assert echoed(sock, "hidden") and serial(server, trust) == before
            certificate.write_bytes(pem)
            config.write_text(text) if text else config.unlink()
            server.signal(signal.SIGHUP)
            told(systemd, "(?m)^RELOADING=1$")
            told(systemd, "^READY=1")
        assert echoed(sock) == "ECHO:Hello!" and serial(server, trust) != before
    server.line("reloaded")
    errors = zip(server.matching("error:"), (certificate, config, config), strict=True)
    assert all(str(path) in found.string for found, path in errors)
    assert [found[1] for found in server.matching("Received:(.*)")] == ["Hello!"]


# ---- Limits


def test_above_max_connections_a_handshake_gets_503_and_the_health_check_200(serve: Serve) -> None:
    process = serve("--max-connections=1")
    with upgraded(process) as client:
        status, headers, _ = refused(process, request())
        assert status == 503 and int(headers["Retry-After"]) > 0
        assert get(process, "/healthz")[0] == 200
        assert echoed(client) == "ECHO:Hello!"


def ask(sock: socket.socket) -> tuple[int, str | None]:
    """For the health, on a connection that stays open: the status, and the header Connection."""
    status, headers, _ = answer(sock, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return status, headers["Connection"]


def test_when_descriptors_run_out_the_longest_idle_is_closed_and_open_connections_go_on(
    serve: Serve,
) -> None:
    process = serve(script='ulimit -n 64; exec "$@"')
    with upgraded(process) as client, process.dial() as first, process.dial() as second:
        assert ask(second) == ask(first) == (200, None)
        with contextlib.ExitStack() as stack:
            while not process.matching("out of descriptors"):
                stack.enter_context(process.dial())
            idlest = process.line("error:out of descriptors, closing the longest idle: (.*)")[1]
            assert idlest == f"127.0.0.1:{second.getsockname()[1]}"
            assert second.recv(1) == b""
            assert get(process, "/healthz")[0] == 200
            assert echoed(client) == "ECHO:Hello!"


def test_plain_connections_do_not_take_the_descriptors_of_health_checks_and_handshakes(
    serve: Serve,
) -> None:
    """Of 150 descriptors, 64 are kept for these, and plain connections may keep half of them."""
    process = serve(script='ulimit -n 150; exec "$@"')
    for _ in range(40):
        with process.dial() as gone:
            assert ask(gone) == (200, None)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(upgraded(process)) for _ in range(150 - 64)]
        asked = [ask(stack.enter_context(process.dial())) for _ in range(50)]
        assert asked == [(200, None)] * 32 + [(200, "close")] * 18
        assert get(process)[1].get_all("Connection") == ["close", "Upgrade"]
        assert refused(process, request())[0] == 503
        clients.pop().close()
        process.line(r"close\(\)")
        stack.enter_context(upgraded(process))


can_limit = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="needs to limit another process"
)


@can_limit
def test_a_handshake_needs_no_further_descriptor(serve: Serve) -> None:
    process = serve()
    with process.dial() as one, process.dial() as two:
        # Neither is asked for more before both are accepted.
        assert ask(two) == (200, None)
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (3, 3))
        for sock in (one, two):
            assert answer(sock, request())[0] == 101
            assert echoed(sock) == "ECHO:Hello!"
        process.line(r"connection\(\) from", 2)


# Enough for a handshake also where the machine is busy.
HASTE = 0.4

# Nothing, half a line, half a header, half of TLS.
SLOW = [b"", b"GET / HT", request()[:-2], b"\x16\x03\x01\x02"]


def drip(sock: socket.socket, data: bytes) -> None:
    for byte in bytewise(data):
        sock.sendall(byte)
        select.select([], [], [], 0.02)


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
def test_a_handshake_that_stalls_or_comes_byte_by_byte_is_dropped(
    serve: Serve, certificate: Path, trust: ssl.SSLContext, secure: bool
) -> None:
    """Before the handshake of TLS as after it. A WebSocket that was open before goes on."""
    process = serve(f"--handshake-timeout={HASTE}", *[f"--certfile={certificate}"] * secure)
    trusted = trust if secure else None
    with bystander(process, trusted), contextlib.ExitStack() as stack:
        slow = [(process.dial(), data) for data in SLOW]
        slow += [(process.dial(trusted), data) for data in SLOW[:3]]
        began = time.monotonic()
        for sock, data in slow:
            stack.enter_context(sock).sendall(data)
        said = b"".join(everything(sock) for sock, _ in slow)
        assert not re.search(rb"HTTP/1.1 [1235]", said)
        assert HASTE / 2 < time.monotonic() - began < 5
        with process.dial(trusted) as sock, pytest.raises((ConnectionError, ssl.SSLError)):
            drip(sock, request(X_Filler="x" * 200))


def test_the_time_for_a_request_begins_when_the_handshake_of_tls_is_over(
    serve: Serve, certificate: Path, trust: ssl.SSLContext
) -> None:
    process = serve("--handshake-timeout=0.6", f"--certfile={certificate}")
    with process.dial() as sock:
        select.select([], [], [], 0.4)
        with trust.wrap_socket(sock, server_hostname="localhost") as secure:
            select.select([], [], [], 0.4)
            secure.sendall(request())
            assert is_let_in(secure)


# ---- Handshakes that come to nothing

# What a client has sent when it leaves.
MOMENTS = {
    "at once": b"",
    "in the request": b"GET / HTTP/1.1\r\nHo",
    "after a good request and a bad one": b"GET / HTTP/1.1\r\nHost: x\r\n\r\nbad\r\n\r\n",
    "after the handshake": request(),
    "with replies on their way": request() + frame(FIN | TEXT, b"x" * 70_000) * 9,
    "in the hello of TLS": client_hello()[:11],
    "after the hello of TLS": client_hello(),
}


def hang_up(sock: socket.socket) -> None:
    """Ends the connection as usual."""
    sock.shutdown(socket.SHUT_WR)
    everything(sock)
    sock.close()


@pytest.mark.parametrize("leave", [cut_off, hang_up])
@pytest.mark.parametrize("data", MOMENTS.values(), ids=MOMENTS)
def test_a_client_that_leaves_early_costs_no_descriptor_and_at_most_one_line_about_an_error(
    server: Process,
    tls: Process,
    trust: ssl.SSLContext,
    data: bytes,
    leave: Callable[[socket.socket], None],
) -> None:
    for process, over_tls in (server, None), (tls, None), (tls, trust):
        before = len(process.lines)
        with bystander(process, trust if process is tls else None):
            sock = process.dial(over_tls)
            peer = f"127.0.0.1:{sock.getsockname()[1]}"
            sock.sendall(data)
            leave(sock)
        errors = [text for text in process.lines[before:] if "error:" in text and peer in text]
        assert len(errors) <= 1 and not process.tracebacks()


# What a client says, what the log calls it, and what it advises or quotes.
STRANGERS = [
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2", "only HTTP/1.1 is supported"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + request(), "the PROXY protocol", "supported"),
    (b"\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c" + bytes(12), "the PROXY protocol", "supported"),
    (b"SSH-2.0-x\r\n", "not HTTP", r"begins with SSH-2.0-x\r\n"),
    (b"GET /\r\n", "not HTTP", r"begins with GET /\r\n"),
    (b"\3\0\0\x13", "not HTTP", r"begins with \x03\x00\x00\x13"),
    (bytes(99), "not HTTP", "begins with " + r"\x00" * 40),
]

ON_ONE_PORT = [
    (False, client_hello(), "TLS on a plain port", "use ws:// or --certfile"),
    (False, client_hello()[:1], "TLS on a plain port", "use ws:// or --certfile"),
    (True, request(), "plain HTTP on a TLS port", "use wss:// or https://"),
    (True, b"GET / HT", "plain HTTP on a TLS port", "use wss:// or https://"),
]


@pytest.mark.parametrize(
    ("secure", "data", "kind", "detail"),
    [*((secure, *row) for secure in (False, True) for row in STRANGERS), *ON_ONE_PORT],
)
def test_another_protocol_is_recognised_at_once_and_is_worth_one_line(
    server: Process, tls: Process, secure: bool, data: bytes, kind: str, detail: str
) -> None:
    process = tls if secure else server
    before = len(process.lines)
    with process.dial() as sock:
        peer = f"127.0.0.1:{sock.getsockname()[1]}"
        # Half of the time that the server would wait for a handshake.
        sock.settimeout(5)
        sock.sendall(data)
        said = everything(sock)
    until(lambda: any(peer in text for text in process.lines[before:]))
    (found,) = [text for text in process.lines[before:] if peer in text]
    assert f"error:{kind}, from {peer}: " in found and found.endswith(detail)
    answer = b"HTTP/1.1 400 .*400: this port speaks TLS.*" if "plain HTTP" in kind else b""
    assert re.fullmatch(answer, said, re.DOTALL)


# ---- Stopping


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_with_128_and_its_number(serve: Serve, second: int) -> None:
    """A coroutine that runs is no error."""
    server = serve()
    with upgraded(server, "/?delay=60") as client:
        client.sendall(text("Hello!"))
        server.line("Received:Hello!")
        server.signal(signal.SIGTERM)
        until(lambda: not listens(("127.0.0.1", server.port)))
        server.signal(second)
        assert server.exit_code() == 128 + second
    server.line(r"close\(\) 1006 .* 1 messages")


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_clients_that_never_close_are_dropped_after_drain_timeout(
    serve: Serve, seconds: float
) -> None:
    """Also those that wait for a coroutine, do not read, or have still to shake hands."""
    server = serve(f"--drain-timeout={seconds}")
    with (
        upgraded(server) as idle,
        upgraded(server, "/?delay=60") as waiting,
        upgraded(server) as full,
        server.dial() as late,
    ):
        waiting.sendall(text("Hello!"))
        server.line("Received:Hello!")
        send_until_refused(full, frame(FIN | BINARY, b"x" * 65536))
        late.sendall(b"GET / HT")
        began = time.monotonic()
        assert server.stop() == 0
        assert seconds <= time.monotonic() - began < 5
        assert close_code(idle) == 1001
    server.line(r"close\(\) 1006 .* 1 messages")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_replies_that_are_owed_come_before_1001(serve: Serve, number: int) -> None:
    """Those that the peer has not read yet, and those that a coroutine has still to make."""
    server, message = serve(), b"x" * 65536
    with upgraded(server) as full, upgraded(server, "/?delay=0.1") as slow:
        send_until_refused(full, frame(FIN | BINARY, message))
        slow.sendall(text("a") + text("b") + frame(FIN | PING))
        assert slow.recv(2) == pong()
        server.signal(number)
        full.settimeout(PATIENCE)
        stopped = FIN | CLOSE, close_body(1001, "the server is stopping")
        with full.makefile("rb") as file, slow.makefile("rb") as slowly:
            owed = [(FIN | TEXT, b"ECHO:a"), (FIN | TEXT, b"ECHO:b"), stopped]
            assert [read_frame(slowly) for _ in owed] == owed
            replies = list(iter(lambda: read_frame(file), stopped))
        assert set(replies) == {(FIN | BINARY, b"ECHO:" + message)}
    assert server.exit_code() == 0
    assert server.matching(rf"close\(\) .* {len(replies)} messages")


def test_while_stopping_nobody_is_let_in_and_the_health_check_says_so(serve: Serve) -> None:
    server = serve()
    with upgraded(server) as held, server.dial() as idle, server.dial() as other:
        assert ask(idle) == ask(other) == (200, None)
        server.signal(signal.SIGTERM)
        assert close_code(held) == 1001
        assert ask(idle)[0] == answer(other, request())[0] == 503
        with pytest.raises(ConnectionRefusedError):
            server.dial()


def test_clients_in_the_queue_of_the_listening_socket_are_answered_and_sent_away(
    serve: Serve,
) -> None:
    """Also if there are more of them, or of their messages, than are taken at a time."""
    server = serve()
    server.line("listening")
    server.signal(signal.SIGSTOP)
    goodbye = said(close_body(1001, "the server is stopping"), first=FIN | CLOSE)
    owed = said("ECHO:a") * 8_000 + goodbye
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.dial()) for _ in range(40)]
        for sock in socks:
            sock.sendall(request() + text("a") * 8_000)
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGCONT)
        for sock in socks:
            assert is_let_in(sock)
            with sock.makefile("rb") as file:
                assert file.read(len(owed)) == owed
    assert server.exit_code() == 0


def test_a_handshake_that_comes_after_sigterm_is_followed_by_1001(serve: Serve) -> None:
    server = serve()
    with server.dial() as sock:
        server.signal(signal.SIGTERM)
        until(lambda: not listens(("127.0.0.1", server.port)))
        sock.sendall(request())
        assert is_let_in(sock) and close_code(sock) == 1001
    assert server.exit_code() == 0


@pytest.mark.skipif(not shutil.which("haproxy"), reason="there is no haproxy")
def test_behind_haproxy_a_server_that_stops_under_load_refuses_nobody(
    serve: Serve, listener: socket.socket, tmp_path: Path
) -> None:
    """HAProxy has the configuration in the README."""
    one, two = serve(), serve()
    config = README.partition("```haproxy\n")[2].partition("```")[0]
    config = config.replace(":80", f"fd@{listener.fileno()}")
    config = config.replace("192.0.2.1:4000", f"127.0.0.1:{one.port}")
    config = config.replace("192.0.2.2:4000", f"127.0.0.1:{two.port}")
    (tmp_path / "config").write_text(config)

    def come() -> socket.socket:
        sock = socket.create_connection(listener.getsockname(), PATIENCE)
        assert answer(sock, request())[0] == 101
        return sock

    command = ["haproxy", "-db", "-f", str(tmp_path / "config")]
    with contextlib.ExitStack() as stack:
        haproxy = stack.enter_context(start(*command, pass_fds=[listener.fileno()], stderr=PIPE))
        stack.callback(haproxy.kill)
        clients = [stack.enter_context(come()) for _ in range(20)]
        with ThreadPoolExecutor(4) as threads:
            first = threads.map(lambda _: come().close(), range(200))
            one.signal(signal.SIGTERM)
            until(lambda: not listens(("127.0.0.1", one.port)))
            second = threads.map(lambda _: come().close(), range(200))
            assert len([*first, *second]) == 400
        for client in clients:
            client.sendall(text("Hello!"))
        ends = Counter(client.recv(4) for client in clients)
        assert ends == {b"\x88\x18\x03\xe9": 10, b"\x81\x0bEC": 10}
    assert one.exit_code() == 0


# ---- systemd


def test_systemd_is_told_of_start_reload_and_stop_and_the_watchdog_is_fed_in_time(
    serve: Serve, systemd: socket.socket
) -> None:
    server = serve(env={"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "3000000"})
    told(systemd, "^READY=1")
    with server.dial():
        assert re.search(r"(?m)^STATUS=.*0 connections", told(systemd, "^WATCHDOG=1"))
    began = time.monotonic()
    server.signal(signal.SIGHUP)
    assert re.search(r"(?m)^MONOTONIC_USEC=\d+$", told(systemd, "(?m)^RELOADING=1$"))
    told(systemd, "^READY=1")
    told(systemd, "^WATCHDOG=1")
    assert time.monotonic() - began < 2.5
    server.signal(signal.SIGTERM)
    told(systemd, "^STOPPING=1")
    assert server.exit_code() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract sockets")
def test_the_notify_socket_may_be_abstract(serve: Serve) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.bind("")
        serve(env={"NOTIFY_SOCKET": "@" + sock.getsockname()[1:].decode()})
        told(sock, "READY=1")


def test_a_systemd_that_reads_nothing_keeps_nobody_waiting(
    serve: Serve, systemd: socket.socket
) -> None:
    # It is told of the state a thousand times a second.
    server = serve(env={"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "3000"})
    with upgraded(server) as client:
        for _ in range(300):
            assert echoed(client) == "ECHO:Hello!"
    assert server.stop() == 0


@can_limit
def test_the_last_descriptor_is_enough_for_a_client_and_systemd_is_told_without_one(
    serve: Serve, systemd: socket.socket
) -> None:
    server = serve(env={"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "300000"})
    server.line("listening")
    folder = Path(f"/proc/{server.popen.pid}/fd")
    most = next(number for number in itertools.count(1) if not (folder / f"{number - 1}").exists())
    resource.prlimit(server.popen.pid, resource.RLIMIT_NOFILE, (most, most))
    with upgraded(server) as client:
        assert echoed(client) == "ECHO:Hello!"
        told(systemd, "STATUS=serving 1 connections")


CRASH = """
import sys, echo_server
echo_server.Lobby.dismiss_idle = lambda lobby: 1 / 0
sys.exit(echo_server.main(["--port=0", "--handshake-timeout=0.1"]))
"""


def test_a_crash_ends_the_server_with_a_code_that_systemd_restarts() -> None:
    done = ended(sys.executable, "-c", CRASH, cwd=MODULE.parent)
    assert "ZeroDivisionError" in done.stderr
    unit = (MODULE.parent / "systemd" / "ws-echo.service").read_text()
    kept = re.findall(r"(?m)^RestartPreventExitStatus=(.*)", unit)[0].split()
    assert "Restart=on-failure" in unit and done.returncode not in (0, *map(int, kept))


def test_sockets_that_systemd_has_opened_for_another_process_are_not_served(
    serve: Serve, listener: socket.socket
) -> None:
    server = inheriting(serve, listener, offset=1)
    assert server.port != listener.getsockname()[1] and not server.matching("systemd")


# A process that cannot serve ends, and so do its sockets.
@pytest.mark.filterwarnings("ignore:unclosed <socket")
@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("AF_INET", socket.SOCK_DGRAM, "not a TCP or Unix socket: AF_INET, SOCK_DGRAM"),
        ("AF_VSOCK", socket.SOCK_STREAM, "not a TCP or Unix socket: AF_VSOCK, SOCK_STREAM"),
        # Python has no name for this one.
        ("AF_INET", 10, "not a TCP or Unix socket: AF_PACKET, 10"),
        ("AF_UNIX", socket.SOCK_STREAM, "does not listen (Accept=yes?): AF_UNIX, SOCK_STREAM"),
    ],
)
def test_an_inherited_socket_of_another_kind_is_named(family: str, kind: int, words: str) -> None:
    try:
        number = socket.socket(getattr(socket, family), kind).detach()
    except (AttributeError, OSError) as error:
        pytest.skip(f"there is none here: {error}")
    with pytest.raises(CannotServe, match=rf"^inherited descriptor {number} .*{re.escape(words)}$"):
        inherited_socket(number)


def test_an_inherited_descriptor_that_is_no_socket_is_named() -> None:
    with MODULE.open() as file, pytest.raises(CannotServe, match=r"\d: Socket operation on non-so"):
        inherited_socket(file.fileno())


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="it is not installed")
def test_it_is_started_by_systemd_socket_activate(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Process(script=f'exec systemd-socket-activate --listen={path} "$@"') as server:
        until(lambda: os.path.exists(path))
        with upgraded(path) as client:
            assert echoed(client) == "ECHO:Hello!"
        server.line(r"systemd.*--address")
        assert server.stop() == 0


# ---- Surroundings

READ_ONLY = "mount -o remount,bind,ro / && mount -t tmpfs -o ro none /dev/shm"
NAMESPACES = ("unshare", "--user", "--map-root-user", "--kill-child", "--mount", "--net")


def skip_without_namespaces() -> None:
    if not shutil.which("unshare") or ended(*NAMESPACES, "sh", "-c", READ_ONLY).returncode:
        pytest.skip("needs namespaces of its own")


NO_EPOLL = (
    "import asyncio, runpy, select, sys; del select.epoll; sys.argv = sys.argv[2:]; "
    'runpy.run_path(sys.argv[0], run_name="__main__")'
)

# Scripts that start the server.
SURROUNDINGS = {
    "no epoll": f'exec "$1" -c \'{NO_EPOLL}\' "$@"',
    "no environment": 'exec env -i "$@"',
    "no such home, locale and time zone": 'exec env HOME=/no LC_ALL=xx_YY.no TZ=No/No "$@"',
    "no number for the watchdog": 'exec env WATCHDOG_USEC=no "$@"',
    "ASCII": 'exec env LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 PYTHONIOENCODING=ascii "$@"',
    "no folder and no room": 'd=$(mktemp -d) && cd "$d" && rmdir "$d" && ulimit -f 0 && exec "$@"',
    "no input or output": 'exec "$@" <&- >&-',
    "no systemd": 'exec env NOTIFY_SOCKET=/no/systemd WATCHDOG_USEC=200000 "$@"',
    "optimised": 'exec env PYTHONOPTIMIZE=2 PYTHONDONTWRITEBYTECODE=1 "$@"',
    "all files read-only": f'exec unshare -Urm sh -c \'{READ_ONLY} && exec "$@"\' sh "$@"',
}


@pytest.mark.parametrize("script", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_it_serves_in_unusual_surroundings_and_says_at_most_once_what_is_wrong_with_them(
    serve: Serve, script: str
) -> None:
    if "unshare" in script:
        skip_without_namespaces()
    server = serve(script=script)
    with upgraded(server, "/%C3%A9%E2%82%AC") as client:
        assert echoed(client, "é\ud7ff€") == "ECHO:é\ud7ff€"
        client.sendall(close())
    assert get(server, "/", Accept="text/html")[0] == 200
    server.line(r"close\(\) 1000")
    assert server.stop() == 0 and all(line.isascii() for line in server.lines)
    assert len(server.matching("error:")) <= 1


def full_pipe(path: Path) -> str:
    os.mkfifo(path)
    ends = [os.open(path, way | os.O_NONBLOCK) for way in (os.O_RDONLY, os.O_WRONLY)]
    fill(ends[1])
    return str(path)


def nearly_full_terminal(_: Path) -> str:
    terminal, far_end = os.openpty()
    os.set_blocking(far_end, False)
    fill(far_end)
    os.read(terminal, 4096)
    return os.ttyname(far_end)


def fill(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.write(descriptor, b"x" * 4096):
            pass


@pytest.mark.parametrize(
    "make", [lambda _: "/dev/full", lambda _: "&-", full_pipe, nearly_full_terminal]
)
def test_it_serves_when_the_log_cannot_be_written(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    path, log = str(tmp_path / "socket"), make(tmp_path / "log")
    with Process(f"--unix-socket={path}", script=f'exec "$@" 2>{log}') as server:
        until(lambda: listens(path))
        for _ in range(45):
            # Each of these lines has more than the 256 bytes that a terminal makes room for.
            with upgraded(path, "/" + "x" * 300) as client:
                assert echoed(client) == "ECHO:Hello!"
        assert server.stop() == 0


@pytest.mark.parametrize("log", ["/dev/full", "&-"])
def test_a_log_that_cannot_be_written_leaves_the_exit_code_right(log: str) -> None:
    done = run("--keyfile=unused", streams=f"2>{log}")
    assert (done.returncode, done.stdout) == (2, "")


HALF_OPEN = """
import fcntl, socket, struct, subprocess, sys
def set_loopback(flags):
    # SIOCSIFFLAGS.
    fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", flags))
set_loopback(1)
server = subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, text=True)
server.stderr.readline()
sock = socket.create_connection(("127.0.0.1", 4000))
sock.sendall(REQUEST)
sock.recv(999)
# From now on, packets vanish.
set_loopback(0)
print(next(line for line in server.stderr if "close()" in line))
server.kill()
"""


def test_a_peer_that_vanishes_without_a_reset_is_dropped() -> None:
    skip_without_namespaces()
    script = HALF_OPEN.replace("REQUEST", repr(request()))
    server = [sys.executable, str(MODULE), "--ping-interval=0.3", "--ping-timeout=0.3"]
    done = ended(*NAMESPACES, sys.executable, "-c", script, *server)
    assert "close() 1008 from 127.0.0.1" in done.stdout


# ------------------------------------------------------------------------------------------- Client


def received(*texts: str) -> list[str]:
    """What the client prints."""
    return ["[CLIENT] open()", *(f"[CLIENT] Received: ECHO:{text}" for text in texts)]


def test_the_client_sends_each_text_and_prints_what_the_original_sample_printed(
    server: Process,
) -> None:
    """The scheme may be in capitals."""
    texts = ["Hello!", "a", "b", "", "a", "Zoë \U0001f600", "\x1b[2J", "x" * 100_000]
    url = server.url.replace("ws", "Ws", 1)
    done = run(f"--connect={url}test", *(f"--send={text}" for text in texts))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == received(*texts)
    server.line(rf"close\(\) 1000 from .* {len(texts)} messages")


def test_without_texts_the_client_sends_the_lines_of_its_input_as_they_come(
    server: Process,
) -> None:
    command = [sys.executable, str(MODULE), f"--connect={server.url}"]
    with start(*command, stdin=PIPE, stdout=PIPE) as popen:
        assert popen.stdin and popen.stdout
        print("one", file=popen.stdin, flush=True)
        assert [popen.stdout.readline().strip() for _ in range(2)] == received("one")
        rest, _ = popen.communicate("\nno end of the line", PATIENCE)
        assert rest.splitlines() == received("", "no end of the line")[1:]
        assert popen.returncode == 0


def test_the_time_for_a_reply_is_limited_also_while_there_may_be_more_input(
    server: Process,
) -> None:
    command = [sys.executable, str(MODULE), f"--connect={server.url}?delay=60", "--timeout=0.6"]
    with start(*command, stdin=PIPE, stderr=PIPE) as popen, contextlib.ExitStack() as stack:
        stack.callback(popen.kill)
        assert popen.stdin and popen.stderr
        print("one", file=popen.stdin, flush=True)
        assert popen.wait(PATIENCE) == 1
        assert "no reply within 0.6 s" in popen.stderr.read()


def test_at_a_terminal_control_characters_of_a_server_are_escaped(server: Process) -> None:
    terminal, far_end = os.openpty()
    command = [sys.executable, str(MODULE), f"--connect={server.url}", "--send=é\x1b[2J\x9bm\u202e"]
    with start(*command, stdout=far_end) as popen, open(terminal, "rb", buffering=0) as file:
        os.close(far_end)
        assert popen.wait(PATIENCE) == 0
        assert file.read(4096).decode().splitlines() == received(r"é\x1b[2J\x9bm\u202e")


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("text/plain; charset=utf-8", b"400: a\x1b[2J\n\nb", r"a\x1b[2J"),
        ("text/plain", b"", "Bad Request"),
        ("text/html", b"<html>\n<body>", "Bad Request"),
    ],
)
def test_the_client_says_why_a_server_refuses_it(kind: str, body: bytes, reason: str) -> None:
    headers = HTTPHeaders({"Content-Type": kind})
    response = HTTPResponse(HTTPRequest("/"), 400, headers, io.BytesIO(body))
    said = echo_server.explain(HTTPClientError(400, response=response))
    assert said == f"HTTP 400: {reason}"


def test_the_client_checks_the_certificate_against_cafile(
    tls: Process, authority: trustme.CA, tmp_path: Path
) -> None:
    cafile = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(cafile))
    for url, option, code in (
        (tls.url, f"--cafile={cafile}", 0),
        (tls.url, "--insecure", 0),
        (tls.url, "--timeout=5", 1),
        (tls.url.replace("localhost", "127.0.0.1"), f"--cafile={cafile}", 1),
    ):
        done = run(f"--connect={url}", option, "--send=a")
        said = rf"\[CLIENT\] error:{url}: .*CERTIFICATE.*\n" if code else ""
        assert done.returncode == code and re.fullmatch(said, done.stderr)


def test_the_client_does_without_output(server: Process) -> None:
    done = run(f"--connect={server.url}", "--send=a", streams=">&-")
    assert (done.returncode, done.stderr) == (0, "")


# What comes behind the URL on the command line, standard input, the replies, and what it says.
FAILURES = [
    ("?delay=x", "", 0, "HTTP 400: the query has a bad value: delay=x is not a number"),
    ("?delay=60 --send=a --timeout=0.6", "", 0, "no reply within 0.6 s"),
    # By the first reply, after which the Close comes, both texts have been sent.
    ("?delay=0.3&close=4001&after=1 --send=a --send=b", "", 1, "with 4001, replies missing: 1\n"),
    ("?close=4001&after=1" + " --send=a" * 50, "", 1, "closed with 4001, replies missing: "),
    ("?close=4001 --send=a", "", 0, "closed with 4001, replies missing: 1\n"),
    ("?drop=1 --send=a", "", 0, "closed without a code, replies missing: 1\n"),
    ("?delay=0.1", "<<END\na\n\udcff\nEND", 1, "'utf-8' codec can't encode"),
    ("", "0>/dev/null", 0, "cannot read standard input: Bad file descriptor"),
]


@pytest.mark.parametrize(("arguments", "streams", "replies", "said"), FAILURES)
def test_the_client_ends_with_1_and_one_line_when_it_cannot_read_or_a_reply_is_missing(
    server: Process, arguments: str, streams: str, replies: int, said: str
) -> None:
    url, *options = (server.url + arguments).split()
    done = run(f"--connect={url}", *options, streams=streams)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"[CLIENT] error:{url}: ") and said in done.stderr
    assert done.stdout.count("Received: ECHO:a") == replies


# ------------------------------------------------------------------------------------- Command line


# ---- The log


def left_out(server: Process, kind: str) -> int:
    """How many lines of a kind the log says that it has left out."""
    found = server.matching(rf"… and ([0-9,]+) more: \[SERVER\] {kind}")
    return sum(int(line[1].replace(",", "")) for line in found)


def test_lines_of_a_kind_are_limited_and_each_omitted_line_is_counted(serve: Serve) -> None:
    """Those of messages are shown by default, whether or not these need a call of the handler."""
    server, visits = serve(), itertools.count()
    kinds = {"error:": 1, r"connection\(\)": 1, r"close\(\)": 1, "Received:": 9}

    def some_of_each_are_left_out() -> bool:
        for number in itertools.islice(visits, 60):
            assert answer(sock, request(Sec_WebSocket_Key=f"{number}"))[0] == 400
            with (
                upgraded(server, "/?delay=0" if number % 2 else "/") as client,
                client.makefile("rb") as replies,
            ):
                client.sendall(text("a") * 8 + frame(FIN | BINARY, b"a"))
                assert replies.read(9 * 8) == b"\x81\x06ECHO:a" * 8 + b"\x82\x06ECHO:a"
        return all(left_out(server, kind) for kind in kinds)

    with server.dial() as sock:
        until(some_of_each_are_left_out)
        # And once more in the next second; what is left out of that is said at the end.
        some_of_each_are_left_out()
    assert server.stop() == 0
    number = next(visits)
    for kind, each in kinds.items():
        shown = len(server.matching(rf"(?<!more: )\[SERVER\] {kind}"))
        assert shown + left_out(server, kind) == each * number and 50 <= shown <= 200


FORGED = "a\x1b[2J\r\n\x7f\x85\x9b31m\u2028\u2029\u202e\u2066\u061c[SERVER] forged" + "\xff" * 3000


@pytest.mark.gen_test
async def test_every_line_of_the_log_is_escaped_and_short_whatever_it_is_about(
    capfd: pytest.CaptureFixture[str],
) -> None:
    handler = echo_server.LineHandler(Connections.current())
    records: list[dict[str, Any]] = [
        {"msg": "\ud800" + FORGED},
        {"msg": "400 GET %s", "args": (FORGED,)},
        {"msg": "a traceback", "exc_info": (ValueError, ValueError(FORGED), None)},
        {"msg": "%d", "args": ("x",)},
        {"msg": type("Broken", (), {"__str__": lambda _: 1 / 0})()},
    ]
    for record in records:
        handler.handle(logging.makeLogRecord(record))
    *lines, last = capfd.readouterr().err.split("\n")
    events = [line[len("2000-01-01 00:00:00,000 ") :] for line in lines]
    assert last == "" and len([event for event in events if event[0] != " "]) == len(records)
    assert len([event for event in events if "cannot format" in event]) == 2
    assert all(line.isprintable() and len(line) <= 2000 for line in lines)
    assert not [event for event in events if event.startswith("[SERVER]")]


def test_in_the_journal_lines_have_a_priority_and_no_time(serve: Serve) -> None:
    server = serve(script='JOURNAL_STREAM=$(stat -L -c %d:%i /dev/stderr) exec "$@"')
    assert refused(server, request(Sec_WebSocket_Key="x"))[0] == 400
    with upgraded(server) as sock:
        echoed(sock)
    server.line("close")
    assert server.stop() == 0
    assert [re.split(r"\(| on|:", line)[0] for line in server.lines] == [
        "<6>[SERVER] listening",
        "<4>[SERVER] error",
        "<6>[SERVER] connection",
        "<7>[SERVER] Received",
        "<6>[SERVER] close",
        "<6>[SERVER] stopped",
    ]


RAW = "\x80\x85\x9b\xff" * 700

STRANGE = [
    request(f"GET /{RAW}?token=secret HTTP/1.1"),
    request("GET /?secret HTTP/1.1", Cookie="secret", Authorization="secret", User_Agent=RAW),
    request(Origin=f"http://{RAW}", Cookie="secret"),
    request(Origin=f"http://[{RAW}"),
    request(Origin="a\x1b[2J secret"),
    *(request(**{name: RAW}) for name in ("Host", "Origin", "X-Forwarded-For")),
    *(request(**{f"Sec-WebSocket-{name}": RAW}) for name in ("Key", "Protocol", "Version")),
    request(f"{RAW} / HTTP/1.1"),
    request(f"GET /{RAW}?delay=x&a=secret HTTP/1.1"),
    request("GET /?%1b%9b=secret HTTP/1.1"),
    request(add=f"{RAW}: secret"),
    request() + text(FORGED) + close(),
    request() + frame(FIN | BINARY, FORGED.encode("utf-16")) + close(),
    request() + close(1000, "secret\x1b\n"),
    request() + frame(FIN | PING, b"\xff") + frame(FIN | TEXT, b"\xff"),
]


def test_what_peers_send_reaches_the_log_only_short_and_in_ascii(serve: Serve) -> None:
    server = serve("--origins=", "--trusted-proxies=127.0.0.1")
    for data in STRANGE:
        with server.dial() as sock:
            sock.sendall(data)
            assert re.match(rb"HTTP/1.1 [14]|$", sock.recv(999))
            hang_up(sock)
    assert server.stop() == 0
    assert all(line.isascii() and line.isprintable() and len(line) < 1000 for line in server.lines)
    assert not server.matching("secret") and len(server.lines) < 3 * len(STRANGE)
    assert len(server.matching(r"a\\x1b\[2J|a\\x00")) == len(server.matching("1007")) == 2


def test_a_reply_to_a_client_that_has_left_is_one_line(serve: Serve) -> None:
    server = serve()
    sock = upgraded(server)
    send_until_refused(sock, frame(FIN | TEXT, b"x" * 100_000))
    cut_off(sock)
    server.line("error:")
    assert server.stop() == 0
    assert len(server.matching("error:|WARNING|exception")) == 1


# ---- Exit codes

# What a command line that serves nothing ends with, and what its last line of standard error has.
EXITS = [
    (2, "--port", "--port"),
    (2, "4000", "4000"),
    (2, "--port=0 --keyfile=FOLDER/key", "--keyfile"),
    (2, "--port=0 --client-cafile=FOLDER/key", "--client-cafile"),
    (2, "--config=FOLDER/junk", "FOLDER/junk: "),
    (1, "--config=FOLDER/missing.toml", "FOLDER/missing.toml"),
    (1, "--connect=ws://127.0.0.1:1/", "[CLIENT] error:ws://127.0.0.1:1/: Connection refused"),
    (1, "--connect=ws://[\x9b", r"[CLIENT] error:ws://[\x9b: "),
    (1, "--connect=ws://.../", "[CLIENT] error:ws://.../: "),
    (1, "--connect=ws://127.0.0.1:65537/", "Port out of range"),
    (1, "--connect=wss://localhost:1/ --cafile=/nowhere/ca.pem", ": cannot read /nowhere/ca.pem: "),
    (1, "--connect=ws://127.0.0.1:PORT/ --timeout=0.2", "[CLIENT] error:ws://127.0.0.1:PORT/: "),
]

# What keeps it from serving, which is the last value.
OBSTACLES = [
    "--certfile=FOLDER/missing",
    "--certfile=FOLDER/junk",
    "--certfile=FOLDER/cert",
    "--certfile=FOLDER/cert --keyfile=FOLDER/missing",
    "--certfile=FOLDER/cert --keyfile=FOLDER/other-key",
    # Nobody is asked for its password.
    "--certfile=FOLDER/cert --keyfile=FOLDER/locked",
    "--certfile=FOLDER/cert --keyfile=FOLDER/key --client-cafile=FOLDER/junk",
    "--address=192.0.2.1",
    "--address=...",
    "--address=127.0.0.1 --port=PORT",
    "--unix-socket=/nowhere/s",
    "--unix-socket=FOLDER/junk",
    "--unix-socket=/" + "x" * 200,
]


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [*EXITS, *((1, arguments, arguments.rpartition("=")[2]) for arguments in OBSTACLES)],
)
def test_the_last_line_names_what_is_wrong_and_the_exit_code_tells_its_kind(
    files: Path, listener: socket.socket, code: int, arguments: str, said: str
) -> None:
    port = str(listener.getsockname()[1])
    arguments, said = (
        text.replace("FOLDER", str(files)).replace("PORT", port) for text in (arguments, said)
    )
    done = run(*arguments.split())
    *usage, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (code, "") and said in last
    assert usage in ([], ["usage: echo_server.py [options]"][: code - 1])


def test_the_bare_file_says_what_it_needs() -> None:
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", MODULE.read_text())
    assert block
    assert "tornado>=6.6.1,<6.7" in block[1] and 'requires-python = ">=3.11"' in block[1]


# --------------------------------------------------------------------------------------------- Page


# ---- What it answers


# But for the digests and the host.
POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src 'sha256'; "
    "script-src 'sha256'; frame-ancestors 'none'; connect-src 'self'"
)


@pytest.mark.parametrize(
    ("host", "sockets"),
    [("[::1]:4000", " ws://[::1]:4000 wss://[::1]:4000"), ("*", ""), ("x'", "")],
)
def test_the_policy_of_the_page_allows_its_own_script_and_style_its_own_host_and_nothing_else(
    server: Process, host: str, sockets: str
) -> None:
    plain_get = request(without="Upgrade", Host=host, Accept="text/html")
    policy = refused(server, plain_get)[1]["Content-Security-Policy"]
    found = re.sub("sha256-[^']+", "sha256", policy).split("; ")
    assert sorted(found) == sorted((POLICY + sockets).split("; "))


SEEN = {
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "Origin": "https://friend.example",
    "Sec-WebSocket-Protocol": "soap, wamp",
    "Connection": "keep-alive, x",
}


@pytest.mark.parametrize("accept", ["text/html", "text/plain"])
def test_the_page_and_the_text_list_what_the_server_saw_but_no_credentials(
    server: Process, accept: str
) -> None:
    secret = dict.fromkeys(["Cookie", "Authorization", "Proxy_Authorization"], "secret")
    said = get(server, "/?secret", Accept=accept, **SEEN, **secret)[2]
    seen = html.unescape(re.sub("<d[td]>|</d[td]>", ": ", said))
    for name, value in (SEEN | {"Host": "localhost"}).items():
        assert re.search(rf"{name}[: ]+{re.escape(value)}", seen)
    assert re.search(r"Peer[: ]+127\.0\.0\.1:\d+", seen) and "secret" not in seen


@pytest.mark.parametrize("value", ["\"'><b>", "<!--handshake-->"])
def test_the_page_escapes_the_headers_that_it_shows(server: Process, value: str) -> None:
    page = get(server, Accept="text/html", X_Forwarded_Host=value)[2]
    assert value not in page.split('id="handshake"')[1]
    assert html.escape(value) in page


def test_a_long_header_is_cut_where_it_is_shown(server: Process) -> None:
    assert get(server, Accept="text/plain", X_Forwarded_Host="x" * 9000)[2].count("x") < 1100


# ---- The page in a real browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
# To neither browser is plain.test a safe place, as localhost is.
CHROME = {
    "binary": shutil.which("chromium"),
    "args": [*FLAGS.split(), "--host-resolver-rules=MAP plain.test 127.0.0.1"],
}
FIREFOX_PREFERENCES = """
user_pref("network.dns.localDomains", "plain.test");
user_pref("network.proxy.type", 0);
"""

# How each browser is started, and what a session asks for.
BROWSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "chromium": ("chromedriver --port=0", {"webSocketUrl": True, "goog:chromeOptions": CHROME}),
    "firefox-esr": (
        "firefox-esr --headless --no-remote --remote-debugging-port=0 --profile PROFILE",
        {},
    ),
}
# What it says when it can be driven.
DRIVEN_AT = r"(?:successfully on port |BiDi listening on ws://127\.0\.0\.1:)(\d+)"

# Run before any script of the page: what goes wrong in it is kept.
WATCH_FAULTS = """() => {
    window.faults = [];
    const keep = event => faults.push(`${event.type}: ${event.message || event.reason}`);
    ["error", "unhandledrejection", "securitypolicyviolation"].forEach(name =>
        addEventListener(name, keep)); }"""


class Browser:
    """A headless browser, driven by WebDriver BiDi."""

    def __init__(self, connection: ClientConnection, wanted: dict[str, Any]) -> None:
        self.connection = connection
        self.call("session.new", capabilities={"alwaysMatch": wanted})
        self.call("script.addPreloadScript", functionDeclaration=WATCH_FAULTS)
        self.tab = self.call("browsingContext.create", type="tab")["context"]

    def call(self, method: str, **params: Any) -> Any:
        self.connection.send(json.dumps({"id": 1, "method": method, "params": params}))
        while (answer := json.loads(self.connection.recv(3 * PATIENCE))).get("id") != 1:
            # It tells of events that nobody has asked for.
            pass
        assert answer["type"] == "success", answer
        return answer["result"]

    def open(self, server: Process, path: str = "", host: str = "localhost") -> None:
        """The page, which connects."""
        url = f"http://{host}:{server.port}/{path}"
        self.call("browsingContext.navigate", context=self.tab, url=url, wait="complete")
        self.shows("state", "Connected")

    def run(self, script: str) -> Any:
        """The value of an expression of the page."""
        where = {"target": {"context": self.tab}, "awaitPromise": False}
        found = self.call("script.evaluate", expression=f"JSON.stringify({script})", **where)
        assert found["type"] == "success", found
        return json.loads(found["result"]["value"])

    def press(self, selector: str) -> None:
        """As from the keyboard."""
        self.type(selector, "\ue007")

    def type(self, selector: str, text: str) -> None:
        """In place of what is there."""
        element = f"document.querySelector('{selector}')"
        self.run(f"({element}.focus(), {element}.select?.() ?? 0)")
        keys = [{"type": f"key{way}", "value": char} for char in text for way in ("Down", "Up")]
        actions = [{"type": "key", "id": "keyboard", "actions": keys}]
        self.call("input.performActions", context=self.tab, actions=actions)

    def shows(self, name: str, pattern: str) -> str:
        """The text of an element, when it has this."""
        until(
            lambda: re.search(pattern, self.text(name)),
            lambda: f"{pattern!r} is not in {self.text(name)!r}",
        )
        return self.text(name)

    def text(self, name: str) -> str:
        """Nothing, while the page gives way to another."""
        with contextlib.suppress(AssertionError):
            return str(self.run(f"document.getElementById('{name}').textContent"))
        return ""


@pytest.fixture(scope="module", params=BROWSERS)
def browser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    command, wanted = BROWSERS[request.param]
    for program in request.param, command.partition(" ")[0]:
        if not shutil.which(program):
            pytest.skip(f"there is no {program}")
    profile = tmp_path_factory.mktemp("profile")
    (profile / "user.js").write_text(FIREFOX_PREFERENCES)
    said, arguments = profile / "said", command.replace("PROFILE", str(profile)).split()
    with (
        said.open("w") as file,
        start(*arguments, stdout=file, stderr=file) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.terminate)
        until(lambda: re.search(DRIVEN_AT, said.read_text()), said.read_text)
        (port,) = re.findall(DRIVEN_AT, said.read_text())
        with connect(f"ws://127.0.0.1:{port}/session", max_size=None, proxy=None) as connection:
            browser = Browser(connection, wanted)
            yield browser
            browser.call("session.end")


def test_the_page_talks_to_the_server_in_a_real_browser(server: Process, browser: Browser) -> None:
    browser.open(server, "ws/chat?token=x")
    browser.type("#message", "Hello <b>!")
    browser.press("#send")
    browser.shows("log", r"received.*ECHO:Hello <b>!")
    browser.press("#send100")
    browser.shows("stats", "count 101")
    browser.press("#disconnect")
    browser.shows("detail", "1000: normal closure")
    browser.press("#connect")
    browser.shows("state", "Connected")
    browser.type("#kind", "hex")
    browser.type("#message", "00 fF")
    browser.press("#send")
    browser.shows("log", "received binary, 7 bytes.*45 43 48 4f 3a 00 ff")
    assert browser.run("faults") == []


def test_the_page_makes_the_server_misbehave(server: Process, browser: Browser) -> None:
    browser.open(server)
    browser.press("summary")
    for name, value in ("close", "4001"), ("reason", "bye"), ("after", "1"):
        browser.type(f"[name={name}]", value)
    browser.press("#scenarios button")
    browser.shows("url", "close=4001&reason=bye&after=1$")
    browser.shows("state", "Connected")
    browser.press("#send")
    browser.shows("detail", "4001: private use. Reason: bye")
    assert browser.run("faults") == []


def test_the_page_says_when_the_server_has_gone(serve: Serve, browser: Browser) -> None:
    process = serve()
    browser.open(process)
    assert process.stop() == 0
    browser.shows("detail", "1001: going away")
    browser.press("#connect")
    browser.shows("state", "Could not connect")
    browser.shows("detail", "1006")


@pytest.mark.parametrize(("host", "exact"), [("localhost", True), ("plain.test", False)])
def test_the_page_shows_no_time_that_the_clock_cannot_tell(
    server: Process, browser: Browser, host: str, exact: bool
) -> None:
    """On localhost, clocks are exact. Elsewhere without TLS, Firefox rounds them to 1 ms."""
    browser.open(server, host=host)
    assert browser.run("crossOriginIsolated") == exact
    browser.press("#send100")
    stats = browser.shows("stats", "count 100")
    least = re.match(r"min (< )?(\d+(\.\d+)?) ms", stats)
    assert least and float(least[2]) > 0 and (not least[1] or not exact)
    assert "0.00 ms" not in browser.text("log") + browser.text("summary")


# ------------------------------------------------------------------------------------------- README

README = (MODULE.parent / "README.md").read_text()


def shown(section: str) -> str:
    """The code that the README has under these words."""
    return README.partition(f"**{section}.**")[2].partition("```python\n")[2].partition("```\n")[0]


def defined(code: str) -> dict[str, Any]:
    """The names that it defines."""
    names: dict[str, Any] = {"__name__": "shown"}
    exec(code, names)  # noqa: S102  # it is ours
    return names


async def echo_of(app: Application) -> bytes:
    """Its reply to a text at /echo."""
    async with listening(app) as port:
        peer = await peer_at(port)
        await peer.upgrade(request("GET /echo HTTP/1.1"), text("Hello!"))
        _, reply = await peer.frame()
        peer.leave()
    return reply


@pytest.mark.gen_test
class TestReadme:
    async def test_the_three_lines_in_the_readme_and_in_the_docstring_are_enough(self) -> None:
        lines = re.findall(r"(?m)^(?:Embed it:|         )  (.*)", echo_server.__doc__ or "")
        assert lines.pop() == "app.listen(8888)"
        for code in shown("In three lines"), "\n".join(["import tornado.web", *lines]):
            assert await echo_of(defined(code)["app"]) == b"ECHO:Hello!"

    async def test_as_the_readme_shows_an_application_has_it_beside_other_handlers(
        self, tmp_path: Path
    ) -> None:
        code = shown("Beside other handlers").replace("docs", str(tmp_path))
        # All but what would go on for ever.
        code = code.partition(".listen")[0].replace("    Application(", "    return Application(")
        app = await defined(code)["main"]()
        assert await echo_of(app) == b"> Hello!"
        (tmp_path / "echo.txt").write_text("It is at /echo.")
        async with listening(app) as port:
            peer = await peer_at(port)
            peer.send(b"GET /echo.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"It is at /echo." in await peer.rest()

    @pytest.mark.parametrize("kind", ["def", "async def"])
    async def test_as_the_readme_shows_a_subclass_answers_in_json_and_says_what_is_nonsense(
        self, host: Host, kind: str
    ) -> None:
        code = shown("With answers of your own").replace("def", kind)
        peer = await host.connect(defined(code)["Length"])
        for word in "", "Zoë \ud800":
            peer.send(text(json.dumps({"id": 7, "text": word})))
            assert json.loads((await peer.frame())[1]) == {"id": 7, "length": len(word)}
        for nonsense in "Hello!", "[]", "{}", '{"id": 7, "text": 7}', "[" * 994 + "]" * 994:
            peer.send(text(nonsense))
            assert json.loads((await peer.frame())[1]).keys() == {"error"}

    async def test_as_the_readme_shows_origins_compression_size_and_pings_are_the_hosts_to_decide(
        self,
    ) -> None:
        app = defined(shown("With Tornado's settings"))["app"]
        pings = [app.settings[f"websocket_ping_{name}"] for name in ("interval", "timeout")]
        assert pings == [20, 10]
        async with listening(app) as port:
            stranger, friend = await peer_at(port), await peer_at(port)
            stranger.send(request("GET /echo HTTP/1.1", Origin="https://example.org"))
            assert b" 403 " in await stranger.reader.readline()
            stranger.leave()
            headers = DEFLATE | {"Origin": "https://app.example.org"}
            await friend.upgrade(request("GET /echo HTTP/1.1", **headers))
            assert "permessage" not in friend.head
            friend.send(text("x" * 65536), text("x" * 65537))
            assert await friend.replies(b"ECHO:" + b"x" * 65536)
            assert await friend.goodbye() == 1009

    @pytest.mark.parametrize(("level", "lines"), [("DEBUG", 3), ("WARNING", 0)])
    async def test_as_the_readme_shows_a_host_sets_our_log_level_and_closes_its_clients(
        self, host: Host, caplog: pytest.LogCaptureFixture, level: str, lines: int
    ) -> None:
        # In the end, the level is again what it was.
        caplog.set_level("DEBUG", "echo_server")
        code = shown("With options, logging and signals of your own")
        names = defined(code.replace("WARNING", level))
        peer = await host.connect()
        peer.send(text("Hello!"))
        leaving = asyncio.create_task(names["close_clients"](host.app))
        assert await peer.replies(b"ECHO:Hello!") and await peer.goodbye() == 1001
        await leaving
        assert len(ours(caplog)) == lines


def test_as_the_readme_shows_pytest_runs_the_test_of_a_handler(tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path)
    (tmp_path / "test_app.py").write_text(shown("With a test"))
    # Hypothesis takes a second to load, and is not needed.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "test_app.py"]
    done = ended(*command, cwd=tmp_path)
    assert re.search(r"(?m)^1 passed\b", done.stdout), done.stdout + done.stderr


def test_every_test_and_load_that_the_readme_names_is_there() -> None:
    tests = re.findall(r"`(test_\w+)`", README)
    loads = ",".join(re.findall(r"`(?:faults|compare)\.py --\w+ ([\w,-]+)`", README)).split(",")
    benchmarks = "".join(path.read_text() for path in (MODULE.parent / "benchmarks").glob("*.py"))
    assert set(tests) <= set(re.findall(r"def (test_\w+)", Path(__file__).read_text()))
    assert set(loads) <= set(re.findall(r'"([\w-]+)"', benchmarks))


def test_the_readme_lists_the_options_of_help_and_no_other() -> None:
    rows = re.findall(r"(?m)^\|(.*?)\|", README)
    listed = re.findall(r"--[a-z][a-z-]*", "".join(rows))
    assert set(listed) == set(re.findall(r"--[a-z][a-z-]*", make_parser().format_help()))


def test_server_and_client_say_what_the_readme_shows(serve: Serve) -> None:
    lines = re.findall(r"^ *(\[(?:SERVER|CLIENT)\] .*?)(?:   .*)?$", README, re.MULTILINE)
    server = serve()
    said = run(f"--connect=ws://localhost:{server.port}/test", "--send=Hello!").stdout.splitlines()
    server.line(r"close\(\)")
    said += [line[line.index("[SERVER]") :] for line in server.lines]
    port = str(server.port)
    without_numbers = {re.sub(r"\d", "0", line.replace(port, "4000")) for line in said}
    assert len(lines) == 6 and {re.sub(r"\d", "0", line) for line in lines} <= without_numbers
