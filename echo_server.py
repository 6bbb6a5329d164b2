#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6.1,<6.7", "uvloop>=0.22; platform_python_implementation == 'CPython'"]
# ///
"""ws-echo: a WebSocket server that answers every message X with ECHO:X.

Run it:    python echo_server.py --port=4000
Embed it:  from echo_server import EchoHandler
           app = tornado.web.Application([(r"/echo", EchoHandler)])
           app.listen(8888)

Importing this does nothing: it defines names and gets the logger "echo_server". The bands of the file: Handler (what it
does), Frames (RFC 6455, no I/O), Connection (frames on a socket), HTTP, Options, Server, Client, Command line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import html
import ipaddress
import itertools
import logging
import os
import re
import select
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time
import weakref
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from operator import add
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

from tornado import gen, netutil, websocket
from tornado.concurrent import future_set_result_unless_cancelled
from tornado.escape import json_encode, utf8
from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError
from tornado.routing import Matcher, Rule

# The one private name: masking in C. In Python it takes 300 times as long, and there is no public way to it.
from tornado.util import _websocket_mask as unmask
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler, WebSocketProtocol

__version__ = "1.0.0"
log = logging.getLogger("echo_server")

# ---------------------------------------------------------------------------------------------------- Handler


class EchoHandler(WebSocketHandler):
    """Answers text X with text ECHO:X, and binary X with binary ECHO:X.

    A route passes options to `initialize`, as in (r"/mirror", EchoHandler, {"prefix": ""}); a subclass replaces
    `on_message`, `open` or `on_close`. Tornado's own settings and methods do what Tornado says.
    """

    # With these in its __dict__ an instance would have more attributes than CPython shares the keys of: 1.2 KB more.
    __slots__ = ("compression", "connection", "origins", "peer", "prefix", "scenarios", "server", "stall_timeout")
    scenario: Scenario | None = None

    def initialize(
        self,
        prefix: str = "ECHO:",
        compression: bool = True,  # take permessage-deflate (RFC 7692) when it is offered
        origins: Collection[str] = (),  # of pages that may connect beside our own; "*" is any
        stall_timeout: float = 60.0,  # seconds without progress of a message, either way; 0: for ever
        scenarios: bool = False,  # the URL may ask for trouble: see Scenario
        server: Server | None = None,  # the stand-alone server, which can be full, or stopping
    ) -> None:
        self.prefix, self.compression, self.origins = prefix, compression, origins
        self.stall_timeout, self.scenarios, self.server = stall_timeout, scenarios, server

    def open(self, *args: str, **kwargs: str) -> Awaitable[None] | None:
        if log.isEnabledFor(logging.INFO):
            log.info("[SERVER] connection() from %s %s", self.peer, printable(path_of(self.request)))
        if self.scenario:
            self.scenario.begin(self)
        return None

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("[SERVER] Received:%s", printable(message))
        if self.scenario:
            return self.scenario.reply(self, message)
        self.reply(message)
        return None

    def reply(self, message: str | bytes) -> None:
        if isinstance(message, str):
            sent = self.write_message(self.prefix + message)
        else:
            sent = self.write_message(utf8(self.prefix) + message, binary=True)
        if not sent.done():  # the kernel has not taken it at once
            sent.add_done_callback(self.on_sent)

    def on_sent(self, sent: asyncio.Future[None]) -> None:
        if not sent.cancelled() and sent.exception():
            log.warning("[SERVER] error:%s, %s", sent.exception(), self.peer)

    def on_close(self) -> None:
        it, seconds = self.connection, time.monotonic() - self.connection.opened
        line = "[SERVER] close() %d from %s after %.1f s, %d messages, %d bytes"
        log.info(line, it.outcome, self.peer, seconds, *it.received())
        if self.scenario and self.scenario.pushing:
            self.scenario.pushing.cancel()
        del self.connection  # a cycle, which would be left to the garbage collector

    async def get(self, *args: str, **kwargs: str) -> None:
        """The handshake: what is wrong with it is said in the answer."""
        self.peer = peer_of(self.request, self.server.proxies if self.server else ())
        check_handshake(self.request)
        if self.server:
            self.server.check_room()
        if self.scenarios:
            self.scenario = Scenario.of(self.request)
        await super().get(*args, **kwargs)

    head = get  # is refused, since no handshake is a HEAD

    def check_origin(self, origin: str) -> bool:
        if "*" in self.origins or origin in self.origins or super().check_origin(origin):
            return True
        log.warning("[SERVER] error:origin %s refused, %s", printable(origin), self.peer)
        return False

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return subprotocols[0] if subprotocols else None  # a browser fails the handshake when none is selected

    def get_compression_options(self) -> dict[str, Any] | None:
        return {} if self.compression else None

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        self.connection = Connection(self, self.stall_timeout)
        return self.connection

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        return error.answer(self) if isinstance(error, Refusal) else super().write_error(status_code, **kwargs)


class Scenario:
    """What the query of the URL asks for, so that people see how their client behaves. Other names are ignored."""

    names: ClassVar[dict[str, str]] = {
        "delay": "seconds before each reply, at most 60",
        "close": "close with this code ...",
        "reason": "... and this reason, at most 123 bytes",
        "drop": "1: reset the connection instead",
        "after": "how many messages come first; default 0: at once",
        "push": "1: also send PUSH:1, PUSH:2 ... by itself, one a second",
    }
    pushing: asyncio.Task[None] | None = None

    def __init__(self, query: dict[str, str]) -> None:
        """Raises ValueError."""
        self.delay, self.after = float(query.get("delay", 0)), int(query.get("after", 0))
        self.code, self.reason = int(query.get("close", 0)), query.get("reason", "")
        self.drop, self.push = (["0", "1"].index(query.get(name, "0")) for name in ("drop", "push"))
        code = self.code in CLOSE_CODES or "close" not in query
        if not (code and 0 <= self.delay <= 60 and self.after >= 0 and len(utf8(self.reason)) <= 123):
            raise ValueError

    @classmethod
    def of(cls, request: HTTPServerRequest) -> Scenario | None:
        given = {name: values for name, values in request.query_arguments.items() if name in cls.names}
        try:
            return cls({name: value.decode() for name, (value,) in given.items()}) if given else None
        except ValueError:
            known = "".join(f"\n  {name}={text}" for name, text in cls.names.items())
            raise Refusal(400, f"the query has a bad value; it may ask for:{known}") from None

    def begin(self, handler: EchoHandler) -> None:
        if self.push:
            self.pushing = asyncio.create_task(self.push_messages(handler))
        if self.after == 0:
            self.end(handler)

    async def push_messages(self, handler: EchoHandler) -> None:
        with contextlib.suppress(WebSocketClosedError):
            for number in itertools.count(1):
                await asyncio.sleep(1)
                await handler.write_message(f"PUSH:{number}")

    async def reply(self, handler: EchoHandler, message: str | bytes) -> None:
        await asyncio.sleep(self.delay)
        with contextlib.suppress(WebSocketClosedError):
            handler.reply(message)
            if handler.connection.received()[0] >= self.after:
                self.end(handler)

    def end(self, handler: EchoHandler) -> None:
        if self.drop:
            handler.connection.drop()
        elif self.code:
            handler.close(self.code, self.reason)


OWN = EchoHandler.on_message, EchoHandler.reply, EchoHandler.on_sent, EchoHandler.write_message


def only_echoes(handler: WebSocketHandler) -> bool:
    """Whether `on_message` is the one above, what it calls is what it was, and nobody wants to see each message."""
    if not isinstance(handler, EchoHandler) or handler.scenario or log.isEnabledFor(logging.DEBUG):
        return False
    return all(getattr(handler, method.__name__) == MethodType(method, handler) for method in OWN)


def make_app(server: Server) -> Application:
    """The stand-alone application: WebSocket on every path, and what answers a plain GET."""
    options = server.options
    paths = ["/healthz", "/metrics"] if options.metrics else ["/healthz"]
    echo = {"prefix": options.prefix, "compression": options.compression, "origins": listed(options.origins)}
    echo |= {"stall_timeout": options.stall_timeout, "scenarios": options.scenarios, "server": server}
    return Application(
        [Rule(PlainGet(paths), PlainHandler, {"server": server}), (r".*", EchoHandler, echo)],
        websocket_ping_interval=options.ping_interval,
        websocket_ping_timeout=options.ping_timeout,
        websocket_max_message_size=options.max_message_size,
        log_function=server.on_request,  # instead of Tornado's line: our own say more, and no query
    )


# --------------------------------------------------------------------------------------------------- Frames
# RFC 6455 sections 5 to 8 and RFC 7692 without I/O: bytes in, events out; messages in, bytes out.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = OPCODES = 0, 1, 2, 8, 9, 10  # section 5.2
FIN, RSV1, MASK = 0x80, 0x40, 0x80
CLOSE_CODES = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}  # section 7.4, IANA's registry

Event = tuple[int, bytes | bytearray]  # opcode and payload of a whole message or a control frame, validated

TURN = 256 * 1024  # bytes of events taken at a time, so that one peer does not keep the others waiting
EVENT = 1024  # what an event counts beside its bytes: 256 of them are half a millisecond of work
MAX_FRAGMENTS = 131_072  # frames of a message; Autobahn sends 65,536
MAX_EMPTY = 1_024  # of them without a byte


class Fault(Exception):  # noqa: N818  # the peer's error, not ours
    """The peer's fault, which fails the connection with this close code (RFC 6455 section 7.1.7)."""

    def __init__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason


def check_text(data: bytes, final: bool) -> bytes:
    """Section 8.1: a Fault unless `data` is UTF-8; returns the unfinished character at its end."""
    try:
        rest = data[codecs.utf_8_decode(data, "strict", final)[1] :]
    except UnicodeDecodeError:
        raise Fault(1007, "text is not UTF-8") from None
    if rest[:1] == b"\xed" and rest[1:2] > b"\x9f":  # a surrogate, which the decoder sees one byte later
        raise Fault(1007, "text is not UTF-8")
    return rest


def check_close(payload: bytes) -> None:
    """Section 5.5.1: a Close frame has no body, or a code that may be sent (section 7.4) and a reason."""
    if payload and int.from_bytes(payload[:2], "big") not in CLOSE_CODES:  # one byte is no code either
        raise Fault(1002, "close code may not be sent")
    check_text(payload[2:], final=True)


def check_frame(first: int, second: int, deflate: bool, unfinished: int) -> None:
    """Sections 5.1 to 5.5: the first two bytes of a frame; `unfinished` is the opcode of a message, or 0."""
    opcode, length = first & 0x0F, second & 0x7F
    if not second & MASK:
        raise Fault(1002, "frame is not masked")
    if first & (0x30 if deflate and opcode in (TEXT, BINARY) else 0x70):  # RSV1 is permessage-deflate's
        raise Fault(1002, "reserved bit is set")
    if opcode not in OPCODES:
        raise Fault(1002, "opcode is not known")
    if opcode >= CLOSE:
        if length > 125 or not first & FIN:
            raise Fault(1002, "control frame is fragmented or too long")
    elif (opcode == CONTINUATION) != bool(unfinished):
        raise Fault(1002, "continuation is missing" if unfinished else "nothing to continue")


def extended_length(data: bytes, pos: int) -> tuple[int, int]:
    """Section 5.2: in as few bytes as it needs, with the most significant bit 0. Returns where the payload of the frame
    at `pos` starts, and its length once that has come."""
    size, least = (2, 126) if data[pos + 1] & 0x7F == 126 else (8, 65536)
    length = int.from_bytes(data[pos + 2 : pos + 2 + size], "big")
    if pos + 2 + size <= len(data) and not least <= length < 1 << 63:
        raise Fault(1002, "length is not minimal or too large")
    return pos + 6 + size, length


class Receiver:
    """What one peer sends: `feed` it bytes, take the `events` that are complete.

    Section 5.2, a frame:    FIN RSV1-3 opcode(4), MASK length(7), 0, 2 or 8 bytes of length, key(4), payload
    Section 5.4, a message:  a frame with its opcode, then any number with opcode 0, FIN on the last of them;
                             control frames may stand in between
    RFC 7692 section 7.2.2:  RSV1 on the first frame: the payloads of all frames are one deflate stream
    """

    __slots__ = (
        "_deflate", "_empty", "_final", "_fragments", "_inflater", "_key", "_left", "_message", "_tail", "_wire",
        "done", "fault", "limit", "more", "opcode", "received", "rest",
    )  # fmt: skip

    def __init__(self, limit: int, deflate: bool = False) -> None:
        self.limit = limit  # bytes of a message, before and after inflating
        self._deflate = deflate  # permessage-deflate is agreed on
        self.done = False  # a Close or a fault has come: nothing behind it is looked at
        self.fault: Fault | None = None
        self.more = False  # `events` stopped at TURN: take the rest before feeding again
        self.received = 0  # payload bytes of unfinished messages, ever
        self.rest = b""  # fed and not parsed: less than a header or control frame, or what is behind TURN
        self._left = 0  # bytes still to come of the present data frame
        self._final = True  # that frame ends its message
        self._key = b""
        self._begin_message(0)

    def _begin_message(self, opcode: int, compressed: bool = False) -> None:
        self.opcode = opcode  # of the unfinished message; 0: there is none
        self._message: bytes | bytearray = b""
        self._wire = self._fragments = self._empty = 0  # its bytes as sent, its frames, those without a byte
        self._tail = b""  # the unfinished character at the end of its text
        self._inflater = zlib.decompressobj(-15) if compressed else None

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """Changes with every byte of an unfinished message or frame; None when there is none."""
        return (self.received, len(self.rest)) if self.opcode or self.rest else None

    def feed(self, data: bytes = b"") -> list[Event]:
        """What has become complete, TURN bytes of it at most. Look at `fault` behind it, and at `more`."""
        events: list[Event] = []
        if self.done:
            return events
        try:
            self._parse(self.rest + data if self.rest else data, events)
        except Fault as fault:
            self.fault = Fault(fault.code, fault.reason)  # without the traceback, whose frames hold the data
            self.done, self.more, self.rest = True, False, b""
            self._begin_message(0)
        return events

    def _parse(self, data: bytes, events: list[Event]) -> None:
        pos, end, budget, longest = 0, len(data), TURN, MASK + min(125, self.limit)
        if self._left:
            pos = min(self._left, end)
            budget -= self._add_payload(data[:pos], events)
        while budget > 0 and end - pos >= 2:
            first, second = data[pos], data[pos + 1]
            if MASK <= second <= longest and 0x80 < first < 0x83 and not self.opcode:
                stop = pos + second - 0x7A  # nearly all frames: a whole message of at most 125 bytes
                if stop <= end:
                    payload = unmask(data[pos + 2 : pos + 6], data[pos + 6 : stop])
                    if first == 0x81 and not payload.isascii():
                        check_text(payload, final=True)
                    events.append((first & 0x0F, payload))
                    budget -= EVENT
                    pos = stop
                    continue
            check_frame(first, second, self._deflate, self.opcode)
            opcode, start, length = first & 0x0F, pos + 6, second & 0x7F
            if length > 125:
                start, length = extended_length(data, pos)
            if opcode < CLOSE and end >= start - 4:
                self._check_size(bool(first & RSV1 or self._inflater), length)
            if end < (start + length if opcode >= CLOSE else start):  # control frames are taken whole
                break
            budget -= EVENT
            if opcode < CLOSE:
                self._begin_frame(first, length, data[start - 4 : start])
                pos = min(start + length, end)
                budget -= self._add_payload(data[start:pos], events)
                continue
            pos = start + length
            payload = unmask(data[start - 4 : start], data[start:pos])
            if opcode == CLOSE:
                check_close(payload)
                self.done, end = True, pos  # section 1.4: what comes after a Close is discarded
            events.append((opcode, payload))
        self.rest = data[pos:end]
        self.more = budget <= 0 and pos < end

    def _begin_frame(self, first: int, length: int, key: bytes) -> None:
        if first & 0x0F != CONTINUATION:
            self._begin_message(first & 0x0F, bool(first & RSV1))
        self._final, self._left, self._key = bool(first & FIN), length, key
        self._wire += length
        self.received += 1
        self._fragments += 1
        self._empty += not length
        if self._fragments > MAX_FRAGMENTS or self._empty > MAX_EMPTY:
            raise Fault(1008, "too many fragments")

    def _check_size(self, compressed: bool, length: int) -> None:
        """Before the key has come. Deflate makes some data longer, by less than 1/64."""
        if self._wire + length > self.limit + (self.limit // 64 + 256 if compressed else 0):
            raise Fault(1009, "message is too big")

    def _add_payload(self, data: bytes, events: list[Event]) -> int:
        """Of the present frame. Returns what the message that it ends takes of TURN, or 0."""
        self._left -= len(data)
        data = unmask(self._key, data)
        shift = len(data) & 3
        self._key = self._key[shift:] + self._key[:shift]  # section 5.3: byte i goes with key byte i mod 4
        self.received += len(data)
        if self._inflater:
            data = self._inflate(data)
        if self.opcode == TEXT and (self._tail or not data.isascii()):
            self._tail = check_text(self._tail + data, final=False)
        if self._message and isinstance(self._message, bytes):
            self._message = bytearray(self._message)  # which grows in place
        self._message += data  # often all of it, and not copied then: b"" + data is data
        if len(self._message) > self.limit:
            raise Fault(1009, "message is too big")
        if self._left or not self._final:
            return 0
        return self._end_message(events)

    def _inflate(self, data: bytes) -> bytes:
        """Stops one byte above the limit. After a block with BFINAL another stream may follow, which refers back to the
        same window (RFC 7692 section 7.2.3.4)."""
        content, stream = b"", cast("zlib._Decompress", self._inflater)
        while data and (room := self.limit + 1 - len(self._message) - len(content)):
            if stream.eof:
                window = (bytes(self._message[-32768:]) + content)[-32768:]
                self._inflater = stream = zlib.decompressobj(-15, zdict=window)
                self._empty += 1
                if self._empty > MAX_EMPTY:
                    raise Fault(1008, "too many deflate streams in a message")
            try:
                content += stream.decompress(data, room)
            except zlib.error:
                raise Fault(1007, "deflate data is corrupt") from None
            data = stream.unused_data
        return content

    def _end_message(self, events: list[Event]) -> int:
        if self._inflater:
            # The sender cut off the end of an empty stored block (RFC 7692 section 7.2.1). zlib takes most truncated
            # streams without complaint: whether a last block (03 00) ends this one shows that it was complete.
            content = self._inflate(b"\x00\x00\xff\xff")  # it went into a stored block that is not complete
            with contextlib.suppress(Fault):  # corrupt for want of what is missing
                content += self._inflate(b"\x03\x00")
            if content or not self._inflater.eof:
                raise Fault(1007, "deflate data is truncated")
        if self._tail:
            raise Fault(1007, "text is not UTF-8")
        events.append((self.opcode, self._message))
        size = EVENT * self._empty + len(self._message)
        self._begin_message(0)
        return size


def frame_header(first: int, length: int) -> bytes:
    """Section 5.2, of an unmasked frame."""
    if length < 126:
        return bytes((first, length))
    if length < 65536:
        return struct.pack("!BBH", first, 126, length)
    return struct.pack("!BBQ", first, 127, length)


DEFLATE_OFFER = re.compile(
    r"permessage-deflate(?:\s*;\s*(?:server_no_context_takeover|client_no_context_takeover"
    r'|server_max_window_bits=("?)(?P<bits>9|1[0-5])\1|client_max_window_bits(?:=("?)(?:[89]|1[0-5])\3)?))*'
)


def accept_deflate(offers: str) -> tuple[str, int]:
    """RFC 7692 section 7.1: the answer to the first offer that suits and its window bits, or ("", 0).

    Not taken: a parameter that is unknown, repeated or malformed, and server_max_window_bits=8, for which
    zlib has no raw compressor. client_max_window_bits needs no answer, since our window has all 15.
    """
    for offer in re.findall(r'(?:[^,"]|"[^"]*")+', offers) if offers.count('"') % 2 == 0 else ():
        match, names = DEFLATE_OFFER.fullmatch(offer.strip()), re.findall(r";\s*(\w+)", offer)
        if match and len(names) == len(set(names)):
            answer, bits = "permessage-deflate; server_no_context_takeover; client_no_context_takeover", match["bits"]
            return answer + (f"; server_max_window_bits={bits}" if bits else ""), int(bits or 15)
    return "", 0


def deflate(payload: bytes, window_bits: int, level: int, mem_level: int) -> bytes:
    """RFC 7692 section 7.2.1, without context takeover."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -window_bits, mem_level)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


@functools.lru_cache(16)
def echo_heads(prefix: str) -> tuple[bytes, list[tuple[bytes, bytes, bytes]]]:
    """The prefix, and what comes before a payload by its length and opcode, in frames of at most 125 bytes."""
    head = prefix.encode()
    return head, [(b"", bytes((0x81, n)) + head, bytes((0x82, n)) + head) for n in range(len(head), 126)]


# ------------------------------------------------------------------------------------------------ Connection
# Frames on a socket: reading in turns, gathered writes, flow control, deadlines, closing.

HIGH_WATER = 64 * 1024  # bytes waiting to be sent above which nothing more is read
ROUND = 0.002  # seconds of turns that may take long, for each time that the event loop looks for events
SHORT_READ = 470  # bytes to ask for while no more come: Python's own allocator has them, which saves 0.1 us
READ_SIZE = 256 * 1024  # bytes to ask for at a time: a 64 KiB message comes in one piece
SCATTER = 16 * 1024  # bytes from which a reply is written in pieces rather than joined
COMPRESS_FROM = 1024  # bytes of a message below which deflate does not pay
CLOSE_TIMEOUT = 5.0  # seconds without progress of our last frames, or until the peer's Close; as in Tornado
LINGER_TIMEOUT = 2.0  # seconds for a peer that was failed to read why

# CLOSING: our Close is out, theirs has not come. ENDING: nothing more is parsed, our last frames leave. LINGERING: they
# have left, and what comes is thrown away: close() with unread bytes is a reset, which may overtake our Close.
OPEN, CLOSING, ENDING, LINGERING, CLOSED = range(5)
READ, WRITE = 1, 2  # what the event loop watches a socket for
WOULD_BLOCK = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError


class Connection(WebSocketProtocol):
    """A handler's protocol on its socket, plain or TLS, which is taken over from Tornado's IOStream: as it has to be
    told of each read and write, a message costs 25 us rather than 9 on it, and 0.8 rather than 0.6 when pipelined."""

    __slots__ = (
        "_backlog", "_deadline", "_deflate", "_heads", "_held", "_hold", "_linger", "_mark", "_mark_at",
        "_only_echoes", "_out", "_out_size", "_pending", "_ping", "_pinged", "_prefix", "_progress_at", "_queue",
        "_queue_size", "_read_size", "_receiver", "_registry", "_scheduled", "_seen", "_seen_at", "_sent",
        "_socket", "_stall_timeout", "_state", "_tls", "_turning", "_waiters", "_watched", "close_code",
        "close_reason", "opened", "outcome", "selected_subprotocol", "traffic",
    )  # fmt: skip
    selected_subprotocol: str | None

    def __init__(self, handler: WebSocketHandler, stall_timeout: float) -> None:
        super().__init__(handler)
        self.handler: WebSocketHandler = handler
        self._state, self._registry = OPEN, Connections.current()
        self.opened = self._seen_at = self._mark_at = self._progress_at = time.monotonic()
        self.traffic = [0] * 8  # texts, their bytes, binaries, their bytes received; the same sent
        self.outcome = 1006  # the close code for log and metrics; 1006: without a Close
        self.close_code: int | None = None  # what the peer said
        self.close_reason: str | None = None
        self._read_size = SHORT_READ
        self._only_echoes = False  # the shortcuts may be taken: see choose()
        self._heads: list[tuple[bytes, bytes, bytes]] = []  # echo_heads() of the present prefix, if they may
        self._hold = False  # messages wait: for a coroutine of the handler, or for the peer to take replies
        self._queue: deque[Event] | None = None  # these
        self._queue_size = 0
        self._pending = 0  # coroutines of the handler that run
        self._scheduled = False  # another turn is due, for the rest of what was read
        self._turning = False  # in a turn: what is written is gathered in _out and leaves at its end
        self._out: list[bytes | bytearray] = []
        self._out_size = 0  # bytes of messages in it
        self._backlog: bytearray | None = None  # what the kernel has not taken yet
        self._sent = 0  # bytes that have left the backlog, ever
        self._waiters: deque[tuple[int, asyncio.Future[None]]] | None = None  # by the _sent that they wait for
        self._held = 0  # bytes that the kernel had not delivered at the last check
        self._linger = False
        self._seen, self._pinged = True, False  # a byte came or left since the last check; a ping was sent
        self._deadline = 0.0  # of the present state, in time.monotonic(); 0: none
        self._mark: tuple[int, int] | None = None
        self._stall_timeout, interval = stall_timeout, handler.ping_interval or 0.0
        self._ping = interval, interval if handler.ping_timeout is None else handler.ping_timeout

    async def accept_connection(self, handler: WebSocketHandler) -> None:
        """The server's half of the handshake, RFC 6455 section 4.2.2; returns when the socket is ours."""
        answer = {"Upgrade": "websocket", "Connection": "Upgrade"}
        answer["Sec-WebSocket-Accept"] = accept_key(handler.request.headers["Sec-WebSocket-Key"])
        answer |= self._negotiate(handler, handler.request.headers)
        handler.set_status(101)
        if type(handler) is EchoHandler and handler.server:  # finish() is a sixth of the work, and adds nothing
            handler.server.on_request(handler)
            stream = handler.detach()
            lines = "".join(f"{name}: {value}\r\n" for name, value in answer.items())
            self._out.append(f"HTTP/1.1 101 Switching Protocols\r\n{lines}\r\n".encode("latin-1"))
        else:
            handler.clear_header("Content-Type")
            for name, value in answer.items():
                handler.set_header(name, value)
            sent, stream = handler.finish(), handler.detach()
            with contextlib.suppress(StreamClosedError):
                await sent
        # These hold Tornado's connection objects, 3 KB, for as long as the handler lives.
        handler.request.connection = handler.request.server_connection = None
        if stream.closed():
            return  # it has left before it was let in
        early = self._take(stream)
        if self._out:
            self._flush()
        if self._state == CLOSED:
            return
        self._registry.add(self, (*self._ping, self._stall_timeout))
        self._call(handler.open, *handler.open_args, **handler.open_kwargs)
        self.choose()
        self._turn(early)

    def _negotiate(self, handler: WebSocketHandler, headers: HTTPHeaders) -> dict[str, str]:
        """Returns the headers of the answer about subprotocol and extensions."""
        answer = {}
        self.selected_subprotocol = handler.select_subprotocol(listed(headers.get("Sec-WebSocket-Protocol", "")))
        if self.selected_subprotocol:
            answer["Sec-WebSocket-Protocol"] = self.selected_subprotocol
        options, accepted, bits = handler.get_compression_options(), "", 0
        # Tornado's client ignores client_no_context_takeover: its second message would not inflate.
        offers = headers.get("Sec-WebSocket-Extensions")
        if offers and options is not None and not headers.get("User-Agent", "").startswith("Tornado/"):
            accepted, bits = accept_deflate(offers)
        self._deflate: tuple[int, int, int] | None = None
        if accepted and options is not None:
            answer["Sec-WebSocket-Extensions"] = accepted
            # Level 1: others wait for 9 ms when a megabyte of text is compressed, and for 30 ms with zlib's default.
            self._deflate = bits, options.get("compression_level", 1), options.get("mem_level", 8)
        self._receiver = Receiver(handler.max_message_size, bool(accepted))
        return answer

    # ---- The socket

    def _take(self, stream: IOStream) -> bytes:
        """Takes the socket from Tornado; returns what came behind the handshake and is in Tornado's buffer."""
        self._socket = stream.socket
        self._tls = isinstance(self._socket, ssl.SSLSocket)
        if self._tls:
            self._read_size = READ_SIZE  # a whole record at least: nobody is told of a rest that OpenSSL holds
        stream.close_fd = lambda: None  # type: ignore[method-assign]  # so that close() leaves it open
        stream.close()
        self._watched = READ
        # Tornado closes it with the loop, and does not call us: being called past it saves 0.3 us a message.
        stream.io_loop.add_handler(self._socket, lambda *_: None, 0)
        asyncio.get_running_loop().add_reader(self._socket, self._on_readable)
        early = b""
        with contextlib.suppress(StreamClosedError):  # one that is closed gives what it has, without asking the socket
            early = cast("asyncio.Future[bytes]", stream.read_bytes(1 << 20, partial=True)).result()
        return early + self._socket.recv(READ_SIZE) if self._tls and cast(Any, self._socket).pending() else early

    def _on_readable(self) -> None:
        """One short text, as it comes from clients that wait for each reply, is answered here: 0.4 us rather than 1.3
        for a turn, beside 5 in the kernel and the event loop."""
        try:
            data = self._socket.recv(self._read_size)
        except WOULD_BLOCK:
            return
        except OSError:
            data = b""
        self._seen = True
        size, heads, receiver = len(data) - 6, self._heads, self._receiver
        if (
            0 <= size < len(heads) and data[0] == 0x81 and data[1] == 0x80 | size
            and self.handler.prefix is self._prefix  # type: ignore[attr-defined]  # as in _echo
            and not (receiver.opcode or receiver.rest or self._hold or self._backlog or self._state)
            and (payload := unmask(data[2:6], data[6:])).isascii()
        ):  # fmt: skip
            reply, traffic = heads[size][1] + payload, self.traffic
            traffic[0] += 1
            traffic[1] += size
            traffic[4] += 1
            traffic[5] += len(reply) - 2
            try:
                sent = self._socket.send(reply)
            except OSError:
                sent = 0  # _flush sees why
            if sent < len(reply):
                self._out.append(reply[sent:])
                self._flush()
        elif data:
            self._on_data(data)
        else:
            self._lost("the peer has left")

    def read_rest(self) -> None:
        """What has come already: a short read and a long one, or 64 records of TLS, which come one at a time."""
        for _ in range(64 if self._tls else 2):
            self._seen = False
            if self._state == OPEN and self._may_read():
                self._on_readable()
            if not self._seen:
                return

    def _watch(self) -> None:
        """Asks for a call when there is something that may be read, and when the backlog can go on."""
        watched = (READ if self._may_read() else 0) | (WRITE if self._backlog else 0)
        changed, self._watched, loop = watched ^ self._watched, watched, asyncio.get_running_loop()
        if changed & READ and watched & READ:
            loop.add_reader(self._socket, self._on_readable)
        elif changed & READ:
            loop.remove_reader(self._socket)
        if changed & WRITE and watched & WRITE:
            loop.add_writer(self._socket, self._drain)
        elif changed & WRITE:
            loop.remove_writer(self._socket)

    def _watch_on(self) -> None:
        """uvloop does not watch any more when a reset has come right behind the bytes that were read last."""
        try:
            asyncio.get_running_loop().add_reader(self._socket, self._on_readable)
        except RuntimeError:
            self._on_readable()

    def _send(self, pieces: Sequence[bytes | bytearray]) -> int:
        """Writes what is taken at once; returns how many bytes that is."""
        try:
            return self._socket.send(pieces[0]) if len(pieces) == 1 else self._socket.sendmsg(pieces)
        except WOULD_BLOCK:
            return 0

    # ---- Reading

    def _on_data(self, data: bytes) -> None:
        """A turn now, or in a while: a message that is inflated and deflated may take milliseconds."""
        if len(data) >= SHORT_READ:
            self._read_size = READ_SIZE
        if self._deflate and self._state < ENDING and not self._registry.has_time():
            self._receiver.rest += data
            self._line_up()
            self._watch()
        else:
            self._turn(data)

    def _line_up(self) -> None:
        self._scheduled = True
        self._registry.line.append(self)
        self._registry.has_time()

    def _turn(self, data: bytes = b"") -> None:
        """Handles what has come, in order, and writes all replies at once."""
        if self._state >= ENDING:
            return
        receiver, self._turning, self._scheduled = self._receiver, True, False
        while self._queue and not self._hold:
            event = self._queue.popleft()
            self._queue_size -= len(event[1]) + EVENT
            self._dispatch([event])
        if self._state == OPEN and self._queue_size > receiver.limit:
            receiver.rest += data  # the rest waits until some of the queue has gone
            events = []
        else:
            events = receiver.feed(data)
        if self._only_echoes and not self._hold and self._state == OPEN:
            self._call(self._echo, events)  # a prefix may be one that cannot be encoded
        else:
            self._dispatch(events)
        self._turning = False
        if self._out:
            self._flush()
        waits = self._hold or receiver.more or self._backlog or self._watched != READ
        if waits or receiver.fault or self._registry.leaving:
            self._after_turn()

    def _after_turn(self) -> None:
        if self._state < ENDING and not self._scheduled:
            if self._receiver.more:
                if self._state != OPEN or not self._full():
                    self._line_up()
            elif self._receiver.fault and not self._hold:
                self._fail(self._receiver.fault)
            elif self._registry.leaving and not self._hold:
                self.close(1001, "the server is stopping")
        if self._state != CLOSED:
            self._watch()

    def _may_read(self) -> bool:
        if self._state > CLOSING:
            return True
        if self._tls and self._backlog:  # OpenSSL cannot answer a KeyUpdate in the middle of a write: BAD_LENGTH
            return False
        if self._scheduled or self._receiver.more:  # what was read comes first
            return False
        return self._state == CLOSING or not (self._registry.leaving or self._full())

    def _full(self) -> bool:
        return self._queue_size > self._receiver.limit or len(self._backlog or b"") > HIGH_WATER

    def _echo(self, events: list[Event]) -> None:
        """The replies of EchoHandler's own `on_message`, without calling it: 0.6 rather than 1.3 us a message."""
        prefix: str = self.handler.prefix  # type: ignore[attr-defined]  # only_echoes() has looked
        head, heads = echo_heads(prefix)
        self._prefix, self._heads = prefix, heads if self._receiver.limit >= 125 else []
        out, rest, numbers, sizes = self._out, iter(events), [0, 0, 0], [0, 0, 0]
        for opcode, payload in rest:
            if opcode > BINARY:
                self._control(opcode, bytes(payload))
                changed = self.handler.prefix is not prefix  # type: ignore[attr-defined]  # as above
                if changed or self._hold or self._state != OPEN:
                    self._dispatch(rest)
                out = self._out  # it may have been flushed
                continue
            length = len(payload)
            if length < len(heads):
                out.append(heads[length][opcode])
                out.append(payload)
            elif self._deflate:
                self._add_message(opcode, head + payload)
            else:
                out.append(frame_header(FIN | opcode, len(head) + length) + head)
                out.append(payload)
            numbers[opcode] += 1
            sizes[opcode] += length
        self._out_size += sum(sizes)
        for opcode in TEXT, BINARY:
            self._count(0, opcode, sizes[opcode], numbers[opcode])
            self._count(4, opcode, sizes[opcode] + len(head) * numbers[opcode], numbers[opcode])

    def _dispatch(self, events: Iterable[Event]) -> None:
        """Hands messages to the handler. While they have to wait, so does the Close behind them."""
        for opcode, payload in events:
            if self._hold and opcode <= CLOSE and self._state == OPEN:
                if opcode == CLOSE:
                    self._read_close(bytes(payload))  # its sender may have gone when its turn comes
                self._queue = self._queue or deque()
                self._queue.append((opcode, payload))
                self._queue_size += len(payload) + EVENT
            elif opcode > BINARY:
                self._control(opcode, bytes(payload))
            elif self._state == OPEN:  # section 1.4: behind a Close, messages are discarded
                self._count(0, opcode, len(payload))
                self._call(self.handler.on_message, payload.decode() if opcode == TEXT else bytes(payload))

    def _count(self, way: int, opcode: int, size: int, number: int = 1) -> None:
        self.traffic[way + 2 * opcode - 2] += number
        self.traffic[way + 2 * opcode - 1] += size

    def received(self) -> tuple[int, int]:
        """How many messages, and their bytes."""
        return self.traffic[0] + self.traffic[2], self.traffic[1] + self.traffic[3]

    def _control(self, opcode: int, payload: bytes) -> None:
        if self._state >= ENDING:
            return
        if opcode == CLOSE:
            self._read_close(payload)
            if self._state == OPEN:
                self._send_close(self.close_code)  # section 5.5.1: the code comes back
            self._end()
        elif opcode == PONG:
            self._call(self.handler.on_pong, payload)
        else:
            if self._state == OPEN:
                self._write(FIN | PONG, payload)
            self._call(self.handler.on_ping, payload)

    # ---- The handler

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls a method of the handler. While it runs as a coroutine, messages wait."""
        try:
            result = method(*args, **kwargs)
            if result is not None:
                gen.convert_yielded(result).add_done_callback(self._resume)
                self._pending += 1
                self._hold = True
        except (Exception, asyncio.CancelledError):
            self._bug()

    def _resume(self, future: asyncio.Future[None]) -> None:
        self._pending -= 1
        try:
            future.result()
        except (Exception, asyncio.CancelledError):
            if self._state != CLOSED or not future.cancelled():
                self._bug()
        self.choose()  # a coroutine can have changed the handler
        self._release()

    def _release(self) -> None:
        """Goes on with what had to wait, unless something else holds it up."""
        self._hold = self._pending > 0 or len(self._backlog or b"") > HIGH_WATER
        if not self._scheduled:
            self._turn()

    def _bug(self) -> None:
        """An error on our side: its traceback is logged, and the peer is told. That a peer has left is none."""
        if self._state != OPEN and isinstance(sys.exc_info()[1], WebSocketClosedError):
            self._warn("reply not sent,")
        else:
            self.handler.log_exception(*sys.exc_info())
            self._end(1011)

    # ---- Writing

    def write_message(self, message: str | bytes | dict[str, Any], binary: bool = False) -> asyncio.Future[None]:
        """The future is done when the message has left for the kernel, or fails with WebSocketClosedError. In a turn it
        is done at once, up to HIGH_WATER bytes that leave at the end of the turn."""
        if self._state != OPEN:
            raise WebSocketClosedError
        payload = utf8(json_encode(message) if isinstance(message, dict) else message)
        self._add_message(BINARY if binary else TEXT, payload)
        self._count(4, BINARY if binary else TEXT, len(payload))
        if not self._turning or self._out_size > HIGH_WATER:
            self._flush()
            if self._backlog or self._state == CLOSED:
                return self._waiter()
        return self._registry.finished

    def write_ping(self, data: bytes) -> None:
        self._write(FIN | PING, data)

    def _add_message(self, opcode: int, payload: bytes) -> None:
        first = FIN | opcode
        if self._deflate and len(payload) >= COMPRESS_FROM:
            first, payload = first | RSV1, deflate(payload, *self._deflate)
        self._out += (frame_header(first, len(payload)), payload)
        self._out_size += len(payload)

    def _write(self, first: int, payload: bytes) -> None:
        """A control frame; in a turn it takes its place behind the replies."""
        if len(payload) > 125:
            raise ValueError("the payload of a control frame is at most 125 bytes")
        self._out.append(frame_header(first, len(payload)) + payload)
        if not self._turning:
            self._flush()

    def _flush(self) -> None:
        """Hands what was gathered to the kernel; what it does not take is the backlog."""
        out, size, self._out, self._out_size = self._out, self._out_size, [], 0
        pieces = out if size >= SCATTER and len(out) < 64 and not self._tls else (b"".join(out),)
        try:
            sent = 0 if self._backlog else self._send(pieces)
        except OSError as error:
            self._lost(str(error), owed=True)
            return
        if sent < (sum(map(len, pieces)) if pieces is out else len(pieces[0])):
            self._progress_at = self._progress_at if self._backlog else time.monotonic()
            self._backlog = self._backlog or bytearray()
            self._backlog += b"".join(pieces)[sent:]
            self._hold = self._hold or len(self._backlog) > HIGH_WATER
            if not self._turning:
                self._watch()

    def _waiter(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.Future()
        self._waiters = self._waiters or deque()
        self._waiters.append((self._sent + len(self._backlog or b""), future))
        if self._state == CLOSED:
            self._fail_waiters()
        return future

    def _fail_waiters(self) -> None:
        for _, future in self._waiters or ():
            if not future.done():
                future.set_exception(WebSocketClosedError("the peer has left"))
                future.exception()  # nobody has to look

    def _drain(self) -> None:
        """The peer takes bytes again."""
        while self._backlog:
            try:
                sent = self._send([self._backlog])
            except OSError as error:
                self._lost(str(error), owed=True)
                return
            if not sent:
                return
            del self._backlog[:sent]
            self._sent += sent
            self._seen, self._progress_at = True, time.monotonic()
            while self._waiters and self._waiters[0][0] <= self._sent:
                future_set_result_unless_cancelled(self._waiters.popleft()[1], None)
        self._backlog = None
        if self._state == ENDING:
            self._end_sent()
        else:
            self._release()

    # ---- Closing, RFC 6455 section 7

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        if self._state == OPEN:
            self._send_close(1000 if code is None and reason is not None else code, reason or "")
        if self._state == OPEN:  # otherwise the peer has left
            self._state, self._deadline = CLOSING, time.monotonic() + CLOSE_TIMEOUT

    def choose(self) -> None:
        """Whether replies are made without the handler's on_message, as long as nobody can tell."""
        self._only_echoes = only_echoes(self.handler)
        self._heads = self._heads if self._only_echoes else []

    def is_closing(self) -> bool:
        return self._state != OPEN

    def _send_close(self, code: int | None, reason: str = "") -> None:
        self._write(FIN | CLOSE, (struct.pack("!H", code) if code is not None else b"") + utf8(reason))
        self.outcome = code or 1005

    def _read_close(self, payload: bytes) -> None:
        if payload:
            self.close_code, self.close_reason = int.from_bytes(payload[:2], "big"), payload[2:].decode()

    def _fail(self, fault: Fault) -> None:
        self._warn(f"{fault.code} {fault.reason}, from")
        self._end(fault.code, fault.reason)

    def _end(self, code: int = 0, reason: str = "") -> None:
        """Our last frames: with a code the connection fails, without one both sides have sent a Close."""
        if self._state < ENDING:
            before, self._state = self._state, ENDING  # first: it may become CLOSED when we send
            self._deadline, self._linger = time.monotonic() + CLOSE_TIMEOUT, code > 0
            if code and before == OPEN:
                self._send_close(code, reason)
            if self._out:
                self._flush()
            self._end_sent()

    def _end_sent(self) -> None:
        if self._state != ENDING or not (self._backlog or self._linger):
            self.drop(reset=False)
            return
        asyncio.get_running_loop().add_reader(self._socket, self._discard)
        self._watched |= READ
        if not self._backlog:
            self._state, self._deadline = LINGERING, time.monotonic() + LINGER_TIMEOUT
            self._end_tls()
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_WR)  # not SSLSocket's, which ends TLS as well
        self._watch()

    def _discard(self) -> None:
        """What comes behind our last frame; past TLS, which takes data behind our close_notify for an error."""
        try:
            if socket.socket.recv(self._socket, READ_SIZE):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._lost("the peer has left")

    def _end_tls(self) -> None:
        """Sends close_notify, RFC 8446 section 6.1."""
        if self._tls and not self._backlog:
            self._tls = False
            with contextlib.suppress(OSError, ValueError):  # the peer's has not come, or TLS is broken
                cast(Any, self._socket).unwrap()

    def _lost(self, why: str, owed: bool = False) -> None:
        if (owed or self._backlog) and self._state != CLOSED and self._only_echoes:  # others' futures say it
            self._warn(f"reply not sent: {why},")
        self.drop(reset=False)

    def drop(self, reset: bool = True) -> None:
        """Without a Close; with a reset, since the kernel would go on offering what it has."""
        if self._state == CLOSED:
            return
        self._state, loop = CLOSED, asyncio.get_running_loop()
        if reset:
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self._end_tls()
        loop.remove_reader(self._socket)
        loop.remove_writer(self._socket)
        IOLoop.current().remove_handler(self._socket)
        self._socket.close()
        self._fail_waiters()
        if self in self._registry.open:  # otherwise it has left before it was let in
            loop.call_soon(self._notify)  # never from within another method of the handler

    def _notify(self) -> None:
        registry, handler = self._registry, cast(Any, self.handler)
        registry.open.remove(self)  # not before: /metrics must not count backwards
        registry.closed[self.outcome] += 1
        registry.traffic = [*map(add, registry.traffic, self.traffic)]
        handler.on_close = functools.partial(self._call, handler.on_close)  # Tornado drops what a coroutine returns
        try:
            handler.on_ws_connection_close(self.close_code, self.close_reason)
        except Exception:
            handler.log_exception(*sys.exc_info())
        del handler.on_close  # a cycle

    def _warn(self, text: str) -> None:
        log.warning("[SERVER] error:%s %s", text, getattr(self.handler, "peer", self.handler.request.remote_ip))

    # ---- Deadlines

    def check(self, now: float) -> None:
        """Comes some times in the shortest of the limits. Any byte, either way, is a sign of life."""
        if self._seen and self._state != CLOSED:
            self._seen, self._seen_at, self._pinged = False, now, False
            self._read_size = READ_SIZE if self._tls else SHORT_READ
            if self._watched & READ and self._state < ENDING:
                self._watch_on()
        if self._state == CLOSED:
            return
        if self._backlog:
            self._check_progress(now)
        if self._backlog and 0 < self._stall_timeout <= now - self._progress_at:
            self.outcome = 1008
            self._registry.cut["stalled"] += 1
            self._warn("1008 takes nothing,")
            self.drop()
        elif self._deadline and now >= self._deadline:
            if not self._backlog or now >= self._progress_at + CLOSE_TIMEOUT:
                self.drop()
        elif self._state == OPEN and self._may_read():
            self._check_message(now)
            if self._state == OPEN:
                self._check_life(now, *self._ping)
        else:
            self._mark_at = self._seen_at = now  # it is not the peer who holds the message up

    def _check_progress(self, now: float) -> None:
        """The kernel says that a socket is writable when a third of its buffer is free, which can be a megabyte later:
        ask it how much it holds."""
        with contextlib.suppress(OSError):
            (held,) = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))
            if held < self._held:
                self._progress_at = self._seen_at = now
            self._held = held

    def _check_message(self, now: float) -> None:
        mark = self._receiver.unfinished
        if mark != self._mark:
            self._mark, self._mark_at = mark, now
        elif mark and 0 < self._stall_timeout <= now - self._mark_at:
            self._fail(Fault(1008, "message does not go on"))

    def _check_life(self, now: float, interval: float, timeout: float) -> None:
        silence = now - self._seen_at
        if self._pinged and 0 < timeout <= silence - interval:
            self._registry.cut["silent"] += 1
            self._warn("no answer to a ping,")
            self.drop()
        elif interval and silence >= interval and not self._pinged and not self._backlog:
            self._pinged = True
            self._write(FIN | PING, b"")

    # ---- What Tornado asks for beside

    def set_nodelay(self, x: bool) -> None:
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, x)

    def on_connection_close(self) -> None:
        self.drop(reset=False)

    # `check` and `_turn` do it; the third is for clients.
    def start_pinging(self) -> None: ...
    async def _receive_frame_loop(self) -> None: ...
    def _process_server_headers(self, key: str | bytes, headers: HTTPHeaders) -> None: ...


class Connections:
    """The open connections of one event loop: their turns, their deadlines, their numbers."""

    of_loop: ClassVar[weakref.WeakKeyDictionary[IOLoop, Connections]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.open: set[Connection] = set()
        self.leaving = False  # whoever comes is sent away at once
        self.opened = 0
        self.traffic = [0] * 8  # of those that have been closed
        self.closed: Counter[int] = Counter()  # by close code
        self.cut: Counter[str] = Counter()  # for a reason that has no code on the wire
        self.refused: Counter[str] = Counter()  # handshakes, by reason
        self.finished: asyncio.Future[None] = asyncio.Future()  # of all writes that left at once
        self.finished.set_result(None)
        self.line: deque[Connection] = deque()  # who waits for a turn that may take long
        self.round_ends = 0.0  # until when such turns begin in this round of the event loop, in time.monotonic()
        self.shown = log.isEnabledFor(logging.DEBUG)  # each message, at the last check
        self.timer: object = None
        self.period = 0.5  # seconds between checks; less than a quarter of the shortest limit
        # glibc returns the top of the heap to the kernel at each free above a threshold, which grows with the largest
        # block that was ever freed. Without this, a message of 64 KiB costs 35 page faults: 70 us rather than 25. The
        # stand-alone server gives memory back when many have left: Server.tidy_up.
        bytes(16 << 20)

    @classmethod
    def current(cls) -> Connections:
        loop = IOLoop.current()
        return cls.of_loop.get(loop) or cls.of_loop.setdefault(loop, cls())

    def add(self, connection: Connection, limits: Iterable[float]) -> None:
        self.open.add(connection)
        self.opened += 1
        self.period = min([self.period, *(limit / 4 for limit in limits if limit > 0)])
        self.timer = self.timer or IOLoop.current().call_later(self.period, self.check)

    async def go_away(self, seconds: float = 10.0) -> None:
        """Closes all with 1001, behind the replies that they are owed, and waits so long for them to leave."""
        for connection in list(self.open):
            connection.read_rest()
        self.leaving = True
        for connection in list(self.open):
            connection._after_turn()
        await until(lambda: not self.open, time.monotonic() + seconds)

    def has_time(self) -> bool:
        """Whether another turn may begin before those are served who ask for little."""
        if not self.round_ends:
            self.round_ends = time.monotonic() + ROUND
            asyncio.get_running_loop().call_soon(self.next_round)
        return not self.line and time.monotonic() < self.round_ends

    def next_round(self) -> None:
        self.round_ends = time.monotonic() + ROUND
        try:
            while self.line and time.monotonic() < self.round_ends:
                self.line.popleft()._turn()
        finally:
            self.round_ends = 0.0
            if self.line:
                self.has_time()

    def check(self) -> None:
        self.timer = IOLoop.current().call_later(self.period, self.check) if self.open else None
        now, shown = time.monotonic(), log.isEnabledFor(logging.DEBUG)
        for connection in list(self.open):
            if shown != self.shown:
                connection.choose()
            connection.check(now)
        self.shown = shown


async def until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110  # there is no one event for it
        await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------------ HTTP
# What is answered without a WebSocket: why a handshake failed, the health check, the page.


class Refusal(HTTPError):  # noqa: N818  # not always an error
    """A handshake that is refused, and why."""

    headers: ClassVar[dict[int, dict[str, str]]] = {
        426: {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"},
        503: {"Retry-After": "5"},
    }

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status)
        self.text = text

    def answer(self, handler: EchoHandler) -> None:
        if "Sec-WebSocket-Key" in handler.request.headers:  # it was meant to be a handshake
            reason = self.text.partition("\n")[0]
            log.warning("[SERVER] error:%d %s, %s", self.status_code, reason, handler.peer)
            Connections.current().refused[reason] += 1
        seen = "".join(f"{name}: {value}\n" for name, value in seen_by_server(handler.request, handler.peer))
        body = f"{self.status_code}: {self.text}\n\nThe server saw:\n{seen}"
        answer(handler, "text/plain", body, **self.headers.get(self.status_code, {}))


def check_handshake(request: HTTPServerRequest) -> None:
    """RFC 6455 section 4.2.1; raises Refusal."""
    headers = request.headers
    if not has_token(headers, "Upgrade", "websocket") or request.method != "GET":
        raise Refusal(426, "this is a WebSocket endpoint, and the header Upgrade: websocket is missing")
    if not has_token(headers, "Connection", "upgrade"):
        raise Refusal(426, "the header Connection: Upgrade is missing")
    if headers.get("Sec-WebSocket-Version") != "13":
        raise Refusal(426, "the header Sec-WebSocket-Version: 13 is missing")
    headers["Upgrade"] = "websocket"  # RFC 9110 section 7.8 allows a list, Tornado does not
    if request.version != "HTTP/1.1":  # whose header Host Tornado has checked
        raise Refusal(400, "a handshake is HTTP/1.1 with one header Host")
    if "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0":
        raise Refusal(400, "a handshake has no body")
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", headers.get("Sec-WebSocket-Key", "")):
        raise Refusal(400, "the header Sec-WebSocket-Key is missing, or not 16 bytes in base64")
    try:
        urlsplit(headers.get("Origin", ""))
    except ValueError:
        raise Refusal(403, "the header Origin is not a URL") from None


accept_key = websocket.WebSocketProtocol13.compute_accept_value  # RFC 6455 section 4.2.2, item 5.4


def has_token(headers: HTTPHeaders, name: str, token: str) -> bool:
    return token in listed(headers.get(name, "").lower())


def listed(text: str) -> list[str]:
    """RFC 9110 section 5.6.1: a comma-separated list; empty ones do not count."""
    return [item.strip() for item in text.split(",") if item.strip()]


def path_of(request: HTTPServerRequest) -> str:
    """Without the query, also of a target in absolute form (RFC 9112 section 3.2.2)."""
    return re.sub(r"^[A-Za-z]+://[^/]*", "", request.path) or "/"


Proxies = Collection[ipaddress.IPv4Network | ipaddress.IPv6Network | str]  # the str is "unix"


def parse_proxies(text: str) -> Proxies:
    return [name if name == "unix" else ipaddress.ip_network(name, strict=False) for name in listed(text)]


def peer_of(request: HTTPServerRequest, proxies: Proxies) -> str:
    """Whom the socket is from; through trusted proxies, from the right, who X-Forwarded-For says it is."""
    address = cast(Any, request.connection).context.address
    host = peer = "unix"
    if isinstance(address, tuple):
        host = address[0].removeprefix("::ffff:")  # IPv4 on a socket for both
        peer = f"{f'[{host}]' if ':' in host else host}:{address[1]}"
    forwarded = request.headers.get("X-Forwarded-For", "").split(",")
    with contextlib.suppress(ValueError):  # not an address
        while forwarded and is_trusted(host, proxies):
            host = peer = str(ipaddress.ip_address(forwarded.pop().strip().partition("%")[0]))  # a zone may be any text
    return peer


def is_trusted(host: str, proxies: Proxies) -> bool:
    if host == "unix":
        return "unix" in proxies
    return any(ipaddress.ip_address(host) in network for network in proxies if not isinstance(network, str))


def printable(text: str | bytes | bytearray, most: int = 200) -> str:
    """In ASCII and on one line."""
    return text[:most].encode("unicode_escape").decode() if isinstance(text, str) else repr(bytes(text[:most]))[2:-1]


def seen_by_server(request: HTTPServerRequest, peer: str) -> list[tuple[str, str]]:
    """For those whose proxy drops or changes it. Never cookies or credentials: a page can read this."""
    shown = re.compile(r"Host|Connection|Upgrade|Origin|Sec-Websocket-.*|X-Forwarded-.*")
    headers = [(name, value) for name, value in sorted(request.headers.get_all()) if shown.fullmatch(name)]
    return [("Peer", peer)] + [(n.replace("Websocket", "WebSocket"), printable(v, 1000)) for n, v in headers]


def answer(handler: RequestHandler, media_type: str, body: str, **more: str) -> None:
    headers = {"Content-Type": f"{media_type}; charset=utf-8", "Vary": "Accept", "Cache-Control": "no-store"}
    for name, value in (headers | {"X-Content-Type-Options": "nosniff"} | more).items():
        handler.set_header(name, value)
    handler.finish(body)


def metrics(connections: Connections) -> str:
    """The text format of Prometheus, 0.0.4."""
    of_each = (connection.traffic for connection in connections.open)
    traffic = [sum(column) for column in zip(connections.traffic, *of_each, strict=True)]
    ways = [f'{{direction="{way}",type="{kind}"}}' for way in ("received", "sent") for kind in ("text", "binary")]
    families: list[tuple[str, str, dict[str, int]]] = [
        ("build_info", "The version that runs.", by("version", {__version__: 1})),
        ("connections", "Open WebSocket connections.", {"": len(connections.open)}),
        ("connections_opened_total", "WebSocket connections so far.", {"": connections.opened}),
        ("connections_closed_total", "By close code; 1006: without a Close.", by("code", connections.closed)),
        ("connections_cut_total", "Peers that stalled, or that did not answer a ping.", by("reason", connections.cut)),
        ("handshakes_refused_total", "By reason.", by("reason", connections.refused)),
        ("messages_total", "Messages.", dict(zip(ways, traffic[::2], strict=True))),
        ("message_bytes_total", "Their payload.", dict(zip(ways, traffic[1::2], strict=True))),
    ]
    lines = []
    for name, text, values in families:
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP ws_echo_{name} {text}", f"# TYPE ws_echo_{name} {kind}"]
        lines += [f"ws_echo_{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"


def by(label: str, counts: Mapping[Any, int]) -> dict[str, int]:
    return {f'{{{label}="{value}"}}': count for value, count in counts.items()}


class PlainGet(Matcher):
    """Not a handshake, and of one of these paths or from somebody who accepts HTML."""

    def __init__(self, paths: Collection[str]) -> None:
        self.paths = paths

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        if has_token(request.headers, "Upgrade", "websocket") or request.method not in ("GET", "HEAD"):
            return None
        wanted = path_of(request) in self.paths or "text/html" in request.headers.get("Accept", "")
        return {} if wanted else None


class PlainHandler(RequestHandler):
    def initialize(self, server: Server) -> None:
        self.server = server

    def get(self) -> None:
        server, path = self.server, path_of(self.request)
        if path == "/healthz":  # for load balancers
            self.set_status(503 if server.stopping else 200)
            answer(self, "text/plain", "stopping\n" if server.stopping else "ok\n")
        elif path == "/metrics" and server.options.metrics:
            answer(self, "text/plain; version=0.0.4", metrics(server.connections))
        else:
            seen = seen_by_server(self.request, peer_of(self.request, server.proxies))
            rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in seen)
            page = PAGE if server.options.scenarios else PAGE.replace("<details>", "<details hidden>")
            page = page.replace("<!--handshake-->", rows)
            answer(self, "text/html", page, **{"Content-Security-Policy": page_policy()})

    head = get


def page_policy() -> str:
    """The page's own style and script, and connections to where it came from."""
    hashes = [
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(utf8(text)).digest()).decode()}'; "
        for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", PAGE, re.DOTALL)
    ]
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {''.join(hashes)}{rest}"


PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ws-echo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --bg: #f3f5f9; --card: #fff; --ink: #1a2230; --dim: #566173;
  --line: #dde2ea; --accent: #1a56c4; --ok: #0a6b39; --bad: #b3261e; --mid: #a34700; }
@media (prefers-color-scheme: dark) { :root { --bg: #11141a; --card: #1a1f28; --ink: #e6e9ef; --dim: #a4aebe;
  --line: #313947; --accent: #8bb4ff; --ok: #6fd39b; --bad: #ff9d93; --mid: #ffb366; } }
* { box-sizing: border-box; margin: 0; min-width: 0; } h2 { font-size: 1.05rem; margin-bottom: .5rem; }
body { background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; padding: 1rem;
  overflow-wrap: anywhere; } main { max-width: 78rem; margin: auto; } #median { color: var(--mid); }
main, .pair, .pair > div { display: grid; gap: 1rem; } summary { font-weight: 600; cursor: pointer; }
section, details { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: 1em; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: end; } .grow { flex: 1 1 11rem; }
.dim, label, dt, small { color: var(--dim); } label { display: grid; gap: .2rem; font-size: .875rem; }
input, select, button { font: inherit; color: var(--ink); background: var(--card); border-radius: 8px;
  border: 1px solid var(--dim); padding: 0 .75rem; height: 2.6rem; } [type=checkbox] { height: 1.2rem; }
button { font-weight: 600; cursor: pointer; } :disabled, [aria-disabled=true] { opacity: .5; cursor: auto; }
#send { background: var(--accent); border-color: var(--accent); color: var(--card); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; } label.row { padding: .7rem 0; }
code, dd, #message, #log p { font: .875rem/1.5 ui-monospace, Consolas, monospace; white-space: pre-wrap; }
#state, #median { font-size: 1.25rem; font-weight: 650; } #state::before { content: '● '; } .open #state,
.received b { color: var(--ok); } .shut #state, .error { color: var(--bad); } a, .sent b { color: var(--accent); }
#plot { fill: var(--accent); width: 100%; height: 15rem; text-anchor: end; } text { font-size: 12px; fill: var(--dim); }
line { stroke: var(--line); } line.mid { stroke: var(--mid); stroke-width: 2; stroke-dasharray: 6 4; }
text.mid { fill: var(--mid); font-weight: 650; stroke: var(--card); stroke-width: 5; paint-order: stroke; }
#feed { height: 20rem; overflow: auto; } #log { padding: 0; list-style: none; } #note { margin-top: .5rem; }
#log li { border-top: 1px solid var(--line); padding: .3rem .1rem; } dd, summary { margin-bottom: .3rem; }
@media (min-width: 60rem) { .pair { grid-template: auto / 3fr 2fr; } #feed { height: 27rem; }
  #note { min-height: 1.5rem; } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } }
</style></head><body><main>
<header><h1>ws-echo</h1><p class="dim">A WebSocket server that sends every message back to you.</p></header>
<section class="row"><div class="grow"><div id="status" role="status"><p id="state"><noscript>This page needs
  JavaScript.</noscript></p><p id="detail"></p><p id="failed" hidden>The handshake failed. The usual reason is
  a proxy that drops the Upgrade header: see <a href="#handshake">what the server saw of this page's
  request</a>.</p></div><p class="dim">URL: <code id="url"></code></p></div><div class="row">
  <button id="connect">Connect</button><button id="disconnect">Disconnect</button></div></section>
<div class="pair"><div><section><h2>Send a message</h2><form id="compose" class="row">
  <label>Kind <select id="kind"><option>text</option><option value="hex">hex bytes</option></select></label>
  <label class="grow">Message <input id="message" value="hello" aria-describedby="note" autocomplete="off"
    autocapitalize="off" spellcheck="false"></label><div class="row"><button id="send">Send</button>
  <button type="button" id="send100">Send 100</button></div></form><p id="note" role="status"></p></section>
<section><h2 id="times">Round-trip time</h2><p class="dim" id="summary">Median <output id="median" aria-live="off">
  </output> <span id="stats"></span></p><svg id="plot" role="img" aria-labelledby="times summary"></svg></section></div>
<section><div class="row"><h2 class="grow">Messages</h2><button id="clear">Clear</button></div><div id="feed"
  role="log" aria-live="polite" aria-label="Messages" tabindex="0"><ol id="log"></ol></div></section></div>
<section id="handshake"><h2>What the server saw of this page's request</h2><dl><!--handshake--></dl></section>
<details><summary>Scenarios: make the server misbehave</summary><form id="scenarios" class="row">
  <label>Delay (seconds) <input type="number" name="delay" min="0" step="any"></label>
  <label>Close code <input type="number" name="close" min="1000" max="4999"></label>
  <label class="grow">Close reason <input name="reason"></label>
  <label>After (messages) <input type="number" name="after" min="0"></label>
  <label class="row"><input type="checkbox" name="drop" value="1"> Drop, with no close frame</label>
  <label class="row"><input type="checkbox" name="push" value="1"> Push messages</label>
  <button>Apply</button></form></details></main><script>
const $ = id => document.getElementById(id), MAX = 200, ms = t => t.toFixed(t < 10 ? 2 : 1) + ' ms';
const url = location.origin.replace(/^http/, 'ws') + location.pathname + location.search;
const CODES = { 1000: 'normal closure', 1001: 'going away', 1002: 'protocol error', 1003: 'unsupported data',
  1005: 'no code given', 1006: 'connection lost without a close frame', 1007: 'invalid data',
  1008: 'policy violation', 1009: 'message too big', 1010: 'extension missing', 1011: 'server error',
  1012: 'restart', 1013: 'try again later', 1015: 'TLS failure', 3: 'registered use', 4: 'private use' };
const visible = s => s.replace(/[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
  c => c < ' ' ? String.fromCharCode(0x2400 + c.charCodeAt()) : `\\u{${c.charCodeAt().toString(16)}}`);
let ws, pending = [], samples = [], fresh = [], running = false, timer = 0;
function show(state, title, detail, failed = false) {  // state: wait, open or shut
  const focus = document.activeElement, shut = state === 'shut'; $('connect').disabled = !shut;
  $('disconnect').disabled = shut; $('send').disabled = $('send100').disabled = state !== 'open';
  $('status').className = state; $('state').textContent = title; $('detail').textContent = detail;
  $('failed').hidden = !failed; if (focus.disabled) $(shut ? 'connect' : 'disconnect').focus(); }
function note(text, error = false) {
  $('note').textContent = text; $('note').className = error ? 'error' : 'dim';
  $('message').setAttribute('aria-invalid', error); }
function connect() {
  show('wait', 'Connecting…', ''); ws = new WebSocket(url); ws.binaryType = 'arraybuffer';
  ws.onmessage = receive; ws.onopen = () => show('open', 'Connected',
    `Subprotocol: ${ws.protocol || 'none'}. Extensions: ${ws.extensions || 'none'}.`);
  ws.onclose = ({ code, reason }) => {
    const opened = $('status').className === 'open', means = CODES[code] || CODES[code / 1000 | 0] || '?';
    show('shut', opened ? 'Closed' : 'Could not connect', `Close code ${code}: ${means}. ` +
      (reason ? 'Reason: ' + visible(reason) : 'No reason given.'), !opened);
    if (running) note('Send 100 stopped: the connection closed.');
    pending = []; running = false; draw(); }; }
function payload() {  // a string, or bytes, or null if the hex is wrong
  const text = $('message').value, hex = $('kind').value === 'hex';
  const wrong = hex && !/^(\s*[0-9a-f]{2})*\s*$/i.test(text); if (wrong) $('message').focus();
  note(wrong ? 'Not hex bytes: give two digits (0-9, a-f) for each byte, such as 48 65 6c.' : '', wrong);
  return wrong ? null : hex ? Uint8Array.from(text.match(/\w\w/g) || [], x => parseInt(x, 16)) : text; }
function send(data, then) {
  if (data === null || ws.readyState !== WebSocket.OPEN) return;
  pending.push({ data, then, at: performance.now() }); ws.send(data); later('sent', data); }
function sendMany(left, data) {  // each when the reply to the one before has come
  if (running = left > 0) send(data, () => sendMany(left - 1, data)); else note('All 100 replies came.'); }
function receive({ data }) {
  const now = performance.now(), first = pending[0];
  const push = !first || String(data).startsWith('PUSH:') && data !== first.data;
  later('received', data, push ? ', unasked' : ', ' + ms(now - first.at)); if (push) return;
  pending.shift(); samples = [...samples, now - first.at].slice(-MAX); if (first.then) first.then(); }
function later(way, data, extra = '') {  // drawing waits, to be out of the time that is measured
  fresh.push({ way, data, extra, at: new Date() }); timer = timer || setTimeout(draw, 30); }
function make(parent, tag, attributes, text = '') {  // an HTML or SVG element, as its parent
  const element = parent.appendChild(document.createElementNS(parent.namespaceURI, tag));
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  element.textContent = text; return element; }
function row({ way, data, extra, at }) {
  const text = typeof data === 'string', bytes = text ? new TextEncoder().encode(data) : new Uint8Array(data);
  const [all, most] = text ? [data, 300] : [bytes, 100], start = all.slice(0, most);
  const body = text ? visible(start) : Array.from(start, byte => byte.toString(16).padStart(2, '0')).join(' ');
  const local = new Date(at - at.getTimezoneOffset() * 6e4).toISOString().slice(11, 23) + ' ';
  const li = make($('log'), 'li', { class: way }), head = make(li, 'small', {}, local);
  make(head, 'b', {}, way === 'sent' ? '↑ sent' : '↓ received');
  head.append(` ${text ? 'text' : 'binary'}, ${bytes.length} byte${bytes.length === 1 ? '' : 's'}${extra}`);
  make(li, 'p', {}, (body || '(empty)') + (all.length > most ? ' …' : '')); }
function draw() {
  const feed = $('feed'), end = feed.scrollHeight - feed.scrollTop - feed.clientHeight < 40;
  feed.setAttribute('aria-live', running || fresh.length > 9 ? 'off' : 'polite');
  $('send100').setAttribute('aria-disabled', running); fresh.splice(0).slice(-MAX).forEach(row); timer = 0;
  while ($('log').children.length > MAX) $('log').firstChild.remove();
  if (end) feed.scrollTop = feed.scrollHeight;
  const n = samples.length, by = [...samples].sort((a, b) => a - b), min = by[0], max = by[n - 1];
  const mid = (by[(n - 1) >> 1] + by[n >> 1]) / 2, p95 = by[Math.ceil(n * .95) - 1];
  $('median').textContent = n ? ms(mid) : '-';
  $('stats').textContent = n ? `min ${ms(min)}, p95 ${ms(p95)}, max ${ms(max)}, count ${n}` : 'no replies';
  plot(n ? min : .1, mid, n ? max : .9); }
function plot(min, mid, max) {
  const svg = $('plot'), n = samples.length; svg.textContent = '';
  const all = [...Array(24).keys()].map(i => +`${'125'[i % 3]}e${(i / 3 | 0) - 2}`);  // 0.01, 0.02, 0.05 ...
  const low = all.filter(t => t <= min).pop() || .01, high = all.find(t => t > max);
  const { width, height } = svg.getBoundingClientRect(), x = i => 64 + (width - 72) * i / Math.max(19, n - 1);
  const y = t => height - 28 - (height - 50) * Math.log(Math.max(t, low) / low) / Math.log(high / low);
  const line = (t, name = '') => make(svg, 'line', { class: name, x1: 58, x2: width, y1: y(t), y2: y(t) });
  const label = (x, y, text, name = '') => make(svg, 'text', { class: name, x, y }, text);
  for (const t of all.filter(t => t >= low && t <= high && (high / low < 1e3 || /1/.test(t))))
    line(t), label(50, y(t) + 4, t + ' ms');
  samples.forEach((t, i) => make(svg, 'circle', { cx: x(i), cy: y(t), r: 3 }));
  label(width, height - 4, 'replies in order, logarithmic scale');
  if (n) line(mid, 'mid'), label(width, y(mid) - 7, 'median ' + ms(mid), 'mid'); }
const form = $('scenarios'), fields = form.querySelectorAll('[name]'), query = new URLSearchParams(location.search);
for (const f of fields) if (query.has(f.name)) { form.parentNode.open = true;
  if (f.type === 'checkbox') f.checked = query.get(f.name) !== '0'; else f.value = query.get(f.name); }
form.onsubmit = event => { event.preventDefault(); fields.forEach(({ name }) => query.delete(name));
  new FormData(form).forEach((value, name) => value && query.set(name, value)); location.search = query; };
$('compose').onsubmit = event => { event.preventDefault(); send(payload()); };
$('send100').onclick = () => { const x = running ? null : payload(); if (x !== null) sendMany(100, x); };
$('clear').onclick = () => { samples = []; fresh = []; $('log').textContent = ''; draw(); };
$('connect').onclick = connect; $('disconnect').onclick = () => ws.close(1000); window.onresize = draw;
$('message').oninput = $('kind').onchange = () => note(''); $('url').textContent = url; connect(); draw();
</script></body></html>"""

# --------------------------------------------------------------------------------------------------- Options


def option(group: str, default: Any, text: str, metavar: str = "", least: float = 0, most: float = 2**53) -> Any:
    """A field of Options: `least` and `most` bound a number, `metavar` names its unit."""
    metadata = {"group": group, "help": text, "metavar": metavar, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Each option once: the flags and the names of the configuration file are made from these fields."""

    address: str = option("Listening", "", "address to listen on (default: all, IPv4 and IPv6)", "ADDRESS")
    port: int = option("Listening", 4000, "port to listen on, 0: any free one", "PORT", 0, 65535)
    reuse_port: bool = option("Listening", False, "let several processes listen on the port")
    unix_socket: str = option("Listening", "", "listen on this Unix socket instead of TCP", "PATH")
    certfile: str = option("TLS", "", "serve TLS with this certificate chain (PEM)", "FILE")
    keyfile: str = option("TLS", "", "its private key, if it is in a file of its own", "FILE")
    client_cafile: str = option("TLS", "", "require client certificates of these authorities", "FILE")
    prefix: str = option("Echo", "ECHO:", "what comes before the message, '' makes a mirror", "TEXT")
    origins: str = option("Echo", "*", "comma-separated origins of pages that may connect, '' only our own", "LIST")
    compression: bool = option("Echo", True, "accept permessage-deflate")
    scenarios: bool = option("Echo", True, "let the URL ask for delays, closes, drops and pushes")
    max_message_size: int = option("Limits", 1 << 20, "of a message, also after inflating", "BYTES", 125)
    max_connections: int = option("Limits", 0, "at the same time, 0: from the descriptor limit", "NUMBER")
    handshake_timeout: float = option("Limits", 10.0, "for TLS and the request", "SECONDS", 0.001)
    ping_interval: float = option("Limits", 30.0, "of silence before a ping, 0: never", "SECONDS")
    ping_timeout: float = option("Limits", 30.0, "for the answer to it, 0: for ever", "SECONDS")
    stall_timeout: float = option("Limits", 60.0, "without progress of a message, 0: for ever", "SECONDS")
    drain_timeout: float = option("Limits", 10.0, "for clients to leave when stopping, 0: none", "SECONDS")
    trusted_proxies: str = option("Operation", "", "addresses whose X-Forwarded-For is believed, or unix", "LIST")
    metrics: bool = option("Operation", False, "answer /metrics for Prometheus")
    log_level: str = option("Operation", "info", "debug, info, warning or error", "LEVEL")
    config: str = option("Operation", "", "TOML file with these names; the command line wins", "FILE")
    connect: str = option("Client", "", "be a client of this server, instead of one", "URL")
    send: tuple[str, ...] = option("Client", (), "message to send (repeatable; default: lines of stdin)", "TEXT")
    timeout: float = option("Client", 10.0, "for the handshake, and for each answer", "SECONDS", 0.001)
    cafile: str = option("Client", "", "authorities that the server's certificate is checked against", "FILE")
    insecure: bool = option("Client", False, "do not check the server's certificate")


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def check_option(name: str, value: Any) -> Any:
    """The value in its type; ValueError says what is wrong with it."""
    field = FIELDS[name]
    kind: Any = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    least, most = field.metadata["least"], field.metadata["most"]
    if kind in (int, float) and not least <= value <= most:
        raise ValueError(f"{value} is not between {least:g} and {most:g}")
    if name == "log_level" and value not in ("debug", "info", "warning", "error"):
        raise ValueError(f"{value!r} is not debug, info, warning or error")
    if field.metadata["metavar"] == "FILE" and "\0" in value:
        raise ValueError(f"{value!r} cannot be the name of a file")
    if name == "trusted_proxies":
        parse_proxies(value)
    if name == "connect" and not re.match("wss?://", value):
        raise ValueError(f"{value!r} does not begin with ws:// or wss://")
    return value


def read_config(path: str) -> dict[str, Any]:
    """Raises OSError when it cannot be read, ValueError when it says something that is not an option."""
    import tomllib

    options, where = {}, path
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
        for name, value in values.items():
            key, where = name.replace("-", "_"), f"{path}: {name}"
            if key not in FIELDS or FIELDS[key].metadata["group"] == "Client" or key == "config":
                raise ValueError("there is no such option")
            options[key] = check_option(key, value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return options


# ---------------------------------------------------------------------------------------------------- Server
# Listening sockets, TLS, systemd, a clean stop.


class CannotServe(Exception):  # noqa: N818  # not our error, either
    """What is around us does not let us serve; the text is one line that names the address or the file."""


RESERVE = 64  # descriptors that are not for WebSockets: files, listening sockets, handshakes, health checks
BACKLOG = 4096  # handshakes of TCP that the kernel keeps for us, if net.core.somaxconn lets it
GRACE = 1.0  # seconds for the requests of those who are connected when we are told to stop
PAUSE = 0.5  # seconds without accepting when descriptors have run out all the same


async def run_server(options: Options, reread: Callable[[], Options]) -> int:
    logging.basicConfig(handlers=[LineHandler()])  # Tornado and asyncio keep to WARNING: below is a peer's doing
    log.setLevel(options.log_level.upper())
    gc.freeze()  # what is there stays; and the garbage of a connection is little, so look for it less often:
    gc.set_threshold(2_000, 10, 10)  # a tenth of the time of short connections was spent on that
    await Server(options, reread).serve()
    return 0


class Server:
    """Serves until a signal stops it. Making one listens already, so that what cannot be served is said early."""

    def __init__(self, options: Options, reread: Callable[[], Options]) -> None:
        self.options, self.reread = options, reread
        self.proxies = parse_proxies(options.trusted_proxies)
        room = descriptor_limit()
        self.max_connections = options.max_connections or room - min(RESERVE, room // 2)
        self.tls = tls_context(options)
        inherited = inherited_sockets()
        self.sockets = inherited or listening_sockets(options)
        self.own_path = "" if inherited else options.unix_socket
        self.urls = ", ".join(dict.fromkeys(url_of(sock, self.tls is not None) for sock in self.sockets))
        self.connections = Connections.current()
        self.accepted = 0
        # Who is not a WebSocket, or not yet: whether it has asked for anything, and when it has come or asked last.
        self.talking: dict[IOStream, tuple[bool, float]] = {}
        self.stopping, self.signalled = False, asyncio.Event()
        limit = options.handshake_timeout
        self.http = HTTPServer(
            make_app(self), idle_connection_timeout=limit, body_timeout=limit, max_header_size=16_384, max_body_size=0
        )

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        for sock in self.sockets:
            if sock.family != socket.AF_UNIX:  # those that are accepted inherit it
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.watch(sock)
        log.info("[SERVER] listening on %s", self.urls)
        notify("READY=1")
        self.tasks = [asyncio.create_task(task) for task in (self.keep_systemd_informed(), self.tidy_up())]
        await self.signalled.wait()
        await self.drain()
        log.info("[SERVER] stopped")

    def accept(self, listener: Any, _: int) -> None:
        for number in range(32):  # not more, so that those who talk wait 7 ms rather than 45 in a flood
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # EMFILE and its like: the connection stays in the queue, so do not spin
                if not number:
                    log.error("[SERVER] error:cannot accept: %s", error.strerror)
                IOLoop.current().remove_handler(listener)
                IOLoop.current().call_later(PAUSE / 50 if number else PAUSE, self.watch, listener)
                return
            try:
                stream = self.make_stream(sock)
            except OSError:  # it has gone already
                sock.close()
            else:
                self.accepted += 1
                self.talking[stream] = False, time.monotonic()
                self.http.handle_stream(stream, address)

    def watch(self, listener: socket.socket) -> None:
        if not self.stopping:
            IOLoop.current().add_handler(listener, self.accept, IOLoop.READ)

    def make_stream(self, sock: socket.socket) -> IOStream:
        if self.tls is None:
            return IOStream(sock, max_buffer_size=1 << 20)
        wrapped = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return SSLIOStream(wrapped, ssl_options=self.tls, max_buffer_size=1 << 20)

    def on_request(self, handler: RequestHandler) -> None:
        stream = cast(Any, handler.request.connection).stream
        if handler.get_status() == 101:
            self.talking.pop(stream, None)
        else:
            self.talking[stream] = True, time.monotonic()

    async def tidy_up(self) -> None:
        """Hangs up on those who neither ask nor read in time, for which Tornado has no limit; and gives memory back."""
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # glibc's: what is free anywhere in the heap
        seen = 0
        while True:
            await asyncio.sleep(min(1.0, self.options.handshake_timeout / 4))
            for stream, (_, since) in list(self.talking.items()):
                if stream.closed() or time.monotonic() - since > self.options.handshake_timeout:
                    stream.close()
                    del self.talking[stream]
            left = self.accepted - len(self.talking) - len(self.connections.open)
            if left - seen >= 50:
                seen = left
                gc.collect(2 if len(self.connections.open) < 1_000 else 1)  # what Tornado's errors hold on to
                trim(0)

    def check_room(self) -> None:
        """Raises Refusal when no further WebSocket is taken."""
        if len(self.connections.open) >= self.max_connections:
            raise Refusal(503, "the server is stopping" if self.stopping else "the server is full")

    def stop(self, number: int) -> None:
        """SIGTERM and SIGINT: the first one lets everybody finish, the second one does not."""
        if self.stopping:
            sys.exit(128 + number)
        self.stopping = True
        self.signalled.set()

    async def drain(self) -> None:
        """Sends everybody away, also who has connected and not asked yet: a restart refuses nobody."""
        notify(f"STOPPING=1\nSTATUS=stopping with {len(self.connections.open)} connections")
        for listener in self.sockets:
            IOLoop.current().remove_handler(listener)
            listener.close()
        if self.own_path:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is abstract, unix(7)
                os.unlink(self.own_path)
        deadline = time.monotonic() + self.options.drain_timeout
        grace = min(time.monotonic() + GRACE, deadline)
        await self.connections.go_away(0)
        await until(lambda: all(asked or stream.closed() for stream, (asked, _) in self.talking.items()), grace)
        self.max_connections = 0  # also for those who had connected before
        await self.connections.go_away(deadline - time.monotonic())

    def reload(self) -> None:
        """SIGHUP: the certificate and the log level are read again; what is wrong with them changes nothing."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            options = self.reread()
            self.tls = tls_context(self.options)
        except (CannotServe, OSError, ValueError) as error:
            log.error("[SERVER] error:nothing is reloaded: %s", error)
        else:
            log.setLevel(options.log_level.upper())
            for connection in self.connections.open:
                connection.choose()  # whether it shows its messages
            log.info("[SERVER] reloaded")
        notify("READY=1")

    async def keep_systemd_informed(self) -> None:
        """WATCHDOG=1 comes from the event loop: a loop that hangs is restarted, one that is busy is not."""
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 if ours else 0.0
        while "NOTIFY_SOCKET" in os.environ:
            status = "stopping with" if self.stopping else "serving"
            notify(f"WATCHDOG=1\nSTATUS={status} {len(self.connections.open)} connections on {self.urls}")
            await asyncio.sleep(min(limit / 3 or 5.0, 5.0))


def listening_sockets(options: Options) -> list[socket.socket]:
    path, address = options.unix_socket, options.address
    try:
        if not path:
            return netutil.bind_sockets(options.port, address or None, backlog=BACKLOG, reuse_port=options.reuse_port)
        # A socket file that nobody listens on is replaced.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
            raise OSError(None, "it is in use")
        return [netutil.bind_unix_socket(path, mode=0o660, backlog=BACKLOG)]
    except (OSError, ValueError) as error:
        where = path or f"{address or 'all addresses'}, port {options.port}"
        raise CannotServe(f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}") from None


def inherited_sockets() -> list[socket.socket]:
    """Socket activation, sd_listen_fds(3): descriptors from 3 on, meant for us if LISTEN_PID says so."""
    pid, count, _ = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    ours = pid == str(os.getpid()) and count.isdecimal()
    sockets = [socket.socket(fileno=number) for number in range(3, 3 + int(count))] if ours else []
    for sock in sockets:
        sock.setblocking(False)
        sock.set_inheritable(False)
    if sockets:
        log.info("[SERVER] systemd has opened the sockets: --address, --port and --unix-socket do not apply")
    return sockets


def notify(state: str) -> None:
    """sd_notify(3); does nothing when not started by systemd."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(state.encode(), re.sub("^@", "\0", path))
        except OSError as error:
            log.warning("[SERVER] error:cannot tell systemd: %s", error)
            del os.environ["NOTIFY_SOCKET"]  # do not say so again


def url_of(sock: socket.socket, tls: bool) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"ws+unix:{os.fsdecode(name)}".replace("\0", "@")  # abstract, unix(7)
    host = "localhost" if name[0] in ("0.0.0.0", "::", "127.0.0.1") else name[0]  # noqa: S104  # it is compared
    return f"{'wss' if tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{name[1]}/"


def tls_context(options: Options) -> ssl.SSLContext | None:
    if not options.certfile:
        return None
    files = [name for name in (options.certfile, options.keyfile, options.client_cafile) if name]
    try:
        for name in files:  # ssl does not say which one it cannot read
            Path(name).read_bytes()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=options.client_cafile or None)
        context.verify_mode = ssl.CERT_REQUIRED if options.client_cafile else ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(options.certfile, options.keyfile or None, password="")  # do not ask for one
        return context
    except ssl.SSLError as error:
        raise CannotServe(f"cannot use {' with '.join(files)}: {error.reason or error}") from None
    except OSError as error:
        raise CannotServe(f"cannot read {error.filename}: {error.strerror}") from None


def descriptor_limit() -> int:
    """Raises the soft limit to the hard one, and returns it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# ---------------------------------------------------------------------------------------------------- Client


async def run_client(options: Options) -> int:
    """0: the handshake succeeded, and as many messages came as were sent."""
    logging.basicConfig(handlers=[logging.NullHandler()])  # it is said below what is wrong
    if sys.stdout:  # it may be closed
        cast(Any, sys.stdout).reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        connection = await websocket.websocket_connect(client_request(options), max_message_size=1 << 30)
        try:
            print("[CLIENT] open()")
            await converse(connection, options)
            return 0
        finally:
            connection.close(1000)
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:  # of the URL, the name, the connection, TLS, the handshake or an answer
        return fail(f"[CLIENT] error:{str(error) or type(error).__name__}")


def client_request(options: Options) -> HTTPRequest:
    if options.cafile:
        Path(options.cafile).read_bytes()  # ssl does not say which file it cannot read
    return HTTPRequest(
        options.connect,
        connect_timeout=options.timeout,
        request_timeout=options.timeout,
        validate_cert=not options.insecure,
        ca_certs=options.cafile or None,
    )


async def converse(connection: websocket.WebSocketClientConnection, options: Options) -> None:
    """Raises ConnectionError when not as many messages come as are sent."""
    sent = received = 0

    async def send_all() -> None:
        nonlocal sent
        async for text in texts(options.send):
            sent += 1
            await connection.write_message(text)

    sending = asyncio.ensure_future(send_all())
    reading = asyncio.ensure_future(connection.read_message())
    while not sending.done() or received < sent:
        waiting = {reading} if sending.done() else {reading, sending}
        limit = options.timeout if received < sent else None
        done, _ = await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise ConnectionError(f"no answer within {options.timeout:g} s")
        if sending in done and (error := sending.exception()):
            raise ConnectionError(str(error) or "closed before everything was sent")
        if reading in done:
            message, reading = reading.result(), asyncio.ensure_future(connection.read_message())
            if message is None:
                code = connection.close_code or 1006
                raise ConnectionError(f"closed with code {code}, {sent - received} answers missing")
            received += 1
            print("[CLIENT] Received:", message if isinstance(message, str) else printable(message))


async def texts(given: tuple[str, ...]) -> AsyncIterator[str]:
    """What to send: the options, or else the lines of standard input."""
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:  # in a thread of its own: not every standard input can be polled
        with open(0, errors="surrogateescape", closefd=False) as file:
            for text in itertools.chain(given or (line.rstrip("\n") for line in file), [None]):
                loop.call_soon_threadsafe(queue.put_nowait, text)

    threading.Thread(target=read, daemon=True).start()
    while (text := await queue.get()) is not None:
        yield text


# ---------------------------------------------------------------------------------------------- Command line

LINES_A_SECOND = 50  # of each kind, in the log


class LineHandler(logging.Handler):
    """One event, one line on standard error: not too many of a kind, and none that would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        status = os.fstat(2)
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"  # systemd.exec(5)
        self.setFormatter(logging.Formatter("%(message)s" if self.journal else "%(asctime)s %(message)s"))
        self.second, self.counts = 0, Counter[tuple[str, int]]()  # lines of this second, by kind and level

    def emit(self, record: logging.LogRecord) -> None:
        if int(record.created) != self.second:
            self.flush()
            self.second = int(record.created)
        kind = record.msg, record.levelno
        self.counts[kind] += 1
        if self.counts[kind] <= LINES_A_SECOND:
            self.write(record)

    def flush(self) -> None:
        counts, self.counts = self.counts, Counter()
        for (kind, level), number in counts.items():
            if number > LINES_A_SECOND:
                text = f"… and {number - LINES_A_SECOND:,} more: {kind.partition('%')[0].strip()}"
                self.write(logging.makeLogRecord({"levelno": level, "msg": text}))

    def write(self, record: logging.LogRecord) -> None:
        priority = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>"}.get(record.levelno, "<3>")
        for line in self.format(record).splitlines():
            data = ((priority if self.journal else "") + line).encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0)[1]:  # a pipe that nobody reads must not stop the service
                    os.write(2, data[: select.PIPE_BUF - 1] + b"\n")


def make_parser() -> argparse.ArgumentParser:
    about = "A WebSocket server that answers every message X with ECHO:X."
    parser = argparse.ArgumentParser("echo_server.py", "%(prog)s [options]", about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ws-echo {__version__}")
    for title, fields in itertools.groupby(FIELDS.values(), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in fields:
            default = f" (default: {field.default})" if field.default not in ("", (), False, True) else ""
            flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"] + default
            group.add_argument(flag, help=text, default=argparse.SUPPRESS, **how_to_parse(field))
    return parser


def how_to_parse(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if isinstance(field.default, bool):
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    how = {"action": "append"} if field.default == () else {"type": functools.partial(parse_option, field.name)}
    return how | {"metavar": field.metadata["metavar"]}


def parse_option(name: str, text: str) -> Any:
    try:
        text = os.fsencode(text).decode()  # UTF-8 also where the locale is not; UnicodeDecodeError is a ValueError
        return check_option(name, cast(Any, type(FIELDS[name].default))(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args(argv: list[str] | None) -> Options:
    """Defaults, then the configuration file, then the command line. Raises SystemExit(2), after saying why; OSError
    when the configuration file cannot be read, ValueError when it, or what all of them say together, is wrong."""
    given = vars(make_parser().parse_args(argv))
    given["send"] = tuple(given.get("send", ()))
    config = read_config(given["config"]) if given.get("config") else {}
    options = Options(**config | given)
    if (options.keyfile or options.client_cafile) and not options.certfile:
        raise ValueError("--keyfile and --client-cafile need --certfile")
    return options


def fail(text: str, code: int = 1) -> int:
    with contextlib.suppress(OSError):  # nobody can be told: the code says it
        if sys.stderr:
            print(text, file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 stopped, 1 cannot serve, 2 wrong configuration file. Raises SystemExit with 2 for wrong
    usage, and with 128 + the signal when told twice to stop."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # a socket must not take the place of a closed stream
        pass
    os.close(spare)
    try:
        options = parse_args(argv)
    except OSError as error:
        return fail(f"echo_server: cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
        return fail(f"echo_server: {error}", 2)
    run = run_client(options) if options.connect else run_server(options, functools.partial(parse_args, argv))
    make_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        import uvloop

        make_loop = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            return runner.run(run)
    except CannotServe as error:
        return fail(f"echo_server: {error}")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
