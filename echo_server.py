#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6.1,<6.7"]
# ///
"""ws-echo: a WebSocket server that answers every message X with ECHO:X.

Run it:    python echo_server.py --port=4000
Embed it:  from echo_server import EchoHandler
           app = tornado.web.Application([(r"/echo", EchoHandler)])
           app.listen(8888)

Importing this only defines names and gets the logger "echo_server". The bands of this file are
Handler, Frames (RFC 6455 without I/O), Connection (frames on a socket), HTTP, Options, Server,
Client, Command line, Page. A message that `echo_texts` does not answer at once takes this path:

  in:   Connections.poll > Connection.ready > Receiver.feed > on_message > Wire.put
  out:  Connection.settle > Wire.flush > kernel; if that is full, Wire.backlog > Wire.drain
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import contextlib
import contextvars
import dataclasses
import errno
import functools
import gc
import hashlib
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
import threading
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from http.client import responses
from typing import Any, ClassVar, NamedTuple, cast
from urllib.parse import urlsplit

from tornado import gen, httpserver, httputil, iostream, netutil, routing, web, websocket
from tornado.concurrent import future_set_result_unless_cancelled
from tornado.escape import json_encode, utf8, xhtml_escape
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.ioloop import IOLoop

# The only private name that is imported. It masks in C; Python would take 300 times as long.
from tornado.util import _websocket_mask as unmask
from tornado.websocket import WebSocketClosedError

log = logging.getLogger("echo_server")

# ------------------------------------------------------------------------------------------ Handler


class EchoHandler(websocket.WebSocketHandler):
    """Answers text X with text ECHO:X, and binary X with binary ECHO:X. A subclass overrides what
    it likes; a route passes options to `initialize`: (r"/mirror", EchoHandler, {"prefix": ""})."""

    def open(self, *args: Any, **kwargs: Any) -> Awaitable[None] | None:
        self.__say(CAME, self.__peer, printable(path_of(self.request)))
        if self.__scenario and self.__protocol:
            self.__scenario.begin(self, self.__protocol)
        return None

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        """Returns a future if the reply cannot leave yet; later messages wait until it is done."""
        log.debug(RECEIVED, printable(message))
        if self.__scenario and self.__protocol:
            return self.__scenario.reply(self, self.__protocol, message)
        if isinstance(message, str):
            sent = self.write_message(self.prefix + message)
        else:
            sent = self.write_message(utf8(self.prefix) + message, binary=True)
        if not isinstance(sent, asyncio.Future):
            # A subclass has a `write_message` of its own.
            return sent
        if sent.done():
            # It has left, or the connection has ended and has logged why.
            return None
        sent.add_done_callback(self.on_sent)
        return sent

    def on_sent(self, sent: asyncio.Future[None]) -> None:
        if not sent.cancelled() and sent.exception():
            log.warning("[SERVER] error:%s, %s", sent.exception(), self.__peer)

    def on_close(self) -> None:
        self.__say(LEFT, self.__protocol)

    def __say(self, line: str, *args: object) -> None:
        if self.__protocol is None or not self.__protocol.registry.omits(line):
            log.info(line, *args)

    # The defaults, in case the `initialize` of a subclass does not call ours. All but the prefix
    # have private names, which cannot clash with those of a subclass.
    prefix = "ECHO:"
    __compression = True
    __origins: Collection[str] = ()
    __stall_timeout = 60.0
    __takes_scenarios = False
    __scenario: Scenario | None = None
    __protocol: EchoProtocol | None = None
    __peer = ""

    def __take_options(
        self,
        prefix: str = "ECHO:",
        compression: bool = True,
        origins: str | Collection[str] = (),
        stall_timeout: float = 60.0,
        scenarios: bool = False,
    ) -> None:
        """`prefix` goes before each message, and stays the same after `open`. `compression`:
        permessage-deflate (RFC 7692) is accepted if offered. `origins`: pages of these may connect
        in addition to our own; "*" means any. `stall_timeout`: for how many seconds a message, in
        or out, may make no progress; 0 means forever. `scenarios`: the URL may ask for
        misbehaviour, see Scenario."""
        self.prefix = prefix
        self.__compression = compression
        self.__origins = parse_origins(origins if isinstance(origins, str) else ",".join(origins))
        self.__stall_timeout = stall_timeout
        self.__takes_scenarios = scenarios

    # Tornado declares this type, too, so that a subclass can have parameters of its own.
    initialize: Callable[..., None] = __take_options

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Does the handshake. If it fails, the answer says why."""
        self.open_args, self.open_kwargs = args, kwargs
        try:
            self._check_handshake()
        except Refusal as refusal:
            refusal.answer(self, self.__peer)
            return
        self.ws_connection = self.get_websocket_protocol()
        if self.ws_connection:
            await self.ws_connection.accept_connection(self)
        else:
            Refusal(426, "this handler does not speak WebSocket").answer(self, self.__peer)

    def _check_handshake(self) -> None:
        """Raises Refusal if something is wrong with the handshake."""
        self.__peer = self._find_peer()
        check_handshake(self.request)
        self.__check_page()
        if self.__takes_scenarios:
            self.__scenario = Scenario.of(self.request)

    def _find_peer(self) -> str:
        return peer_of(self.request)

    def __check_page(self) -> None:
        """Applies Tornado's rules about the page that connects: 6.6 looks at Sec-Fetch-Site, and
        does not ask `check_origin` about pages of this host. Only browsers send these headers."""
        if "*" in self.__origins:
            return
        headers, modern = self.request.headers, hasattr(self, "check_trusted_origin")
        site, origin = headers.get("Sec-Fetch-Site") if modern else None, headers.get("Origin")
        if site in ("same-origin", "none"):
            return
        if site is None and (origin is None or (modern and is_same_host(origin, headers))):
            return
        if origin is None or not self.check_origin(origin):
            given = printable(origin) if origin else f"it is {site}" if site else "it is empty"
            raise Refusal(403, "this page may not connect", given)

    def check_origin(self, origin: str) -> bool:
        with contextlib.suppress(ValueError):
            if normal_origin(origin) in self.__origins:
                return True
        return super().check_origin(origin)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """Selects the first one, since a browser fails the handshake if none is selected."""
        return subprotocols[0] if subprotocols else None

    def get_compression_options(self) -> dict[str, Any] | None:
        return {} if self.__compression else None

    def get_websocket_protocol(self) -> websocket.WebSocketProtocol | None:
        self.__protocol = EchoProtocol(self, self.__peer, self.__stall_timeout)
        return self.__protocol

    async def _switch_protocols(self, answer: dict[str, str]) -> iostream.IOStream:
        """Accepts the handshake with this answer. Returns the stream for the connection."""
        self.clear_header("Content-Type")
        self.set_status(101)
        for name, value in answer.items():
            self.set_header(name, value)
        self.finish()
        stream = self.detach()
        with contextlib.suppress(iostream.StreamClosedError):
            # Done when the answer has left. A subclass may have a `finish` that returns nothing.
            await stream.write(b"")
        return stream

    def _only_echoes(self) -> bool:
        """Whether replies can be sent without calling `on_message`, since it is the one above, and
        would do nothing else."""
        return self.__scenario is None and all(
            getattr(getattr(self, name), "__func__", None) is method
            for name, method in ECHOING.items()
        )

    def write_message(
        self, message: str | bytes | dict[str, Any], binary: bool = False
    ) -> asyncio.Future[None]:
        """Like Tornado's, except that a write to a peer that has left returns a failed future until
        `on_close` is called. An exception would stop a handler that writes to many clients."""
        if self.ws_connection is None:
            raise WebSocketClosedError
        return self.ws_connection.write_message(message, binary)

    def on_connection_close(self) -> None:
        """Calls `on_close`, once, if `open` has been called. Tornado's method would not run an
        `async def on_close`."""
        if self.ws_connection and not self.__protocol:
            # A subclass has a `get_websocket_protocol` of its own.
            super().on_connection_close()
            return
        protocol, self.ws_connection = self.__protocol, None
        if protocol and protocol.connection:
            if not protocol.is_closing():
                # It is the host that has called this method.
                protocol.connection.drop(reset=False)
            protocol.call_on_close()
        # The protocol and `ui` belong to reference cycles, which only the garbage collector would
        # free. But an `async def on_close` may still call ours, which needs the protocol.
        if protocol and not protocol.inbox.is_busy():
            self.__protocol = None
        self.ui = None  # type: ignore[assignment]  # as Tornado does it

    def _has_opened(self) -> bool:
        return self.__protocol is not None and self.__protocol.opened > 0


# What `_only_echoes` compares with: these methods may be replaced in a subclass, in a handler, and
# even in this class, but not after `open`, unless by a coroutine of the handler.
ECHOING = {name: vars(EchoHandler)[name] for name in ("on_message", "on_sent", "write_message")}


def until_open(name: str) -> Any:
    """Wraps a method that may not be called after the handshake: it then raises RuntimeError, as in
    Tornado."""

    def method(self: EchoHandler, *args: Any, **kwargs: Any) -> Any:
        if self._has_opened():
            raise RuntimeError("Method not supported for Web Sockets")
        return getattr(super(EchoHandler, self), name)(*args, **kwargs)

    return functools.update_wrapper(method, getattr(websocket.WebSocketHandler, name))


for name in "write", "redirect", "set_header", "set_cookie", "set_status", "flush", "finish":
    setattr(EchoHandler, name, until_open(name))

# The log recognises these lines by their text. When there are too many of a kind, no more of them
# are made until the next second: they are only counted.
CAME = "[SERVER] connection() from %s %s"
RECEIVED = "[SERVER] Received:%s"
LEFT = "[SERVER] close() %s"
FREQUENT = {CAME: logging.INFO, RECEIVED: logging.DEBUG, LEFT: logging.INFO}


class Scenario:
    """The misbehaviour that the query of the URL asks for, so that people see how their client
    copes with it. Other parameters of the query are ignored."""

    # For each parameter: its type, a test of its value, and the allowed values in words.
    rules: ClassVar[dict[str, tuple[Any, Callable[[Any], bool], str]]] = {
        "delay": (float, lambda value: 0 <= value <= 60, "a number of seconds up to 60"),
        "close": (int, lambda value: value in CLOSE_CODES, "1000-1003, 1007-1014 or 3000-4999"),
        "reason": (str, lambda value: len(utf8(value)) <= 123, "a text of at most 123 bytes"),
        "after": (int, lambda value: value >= 0, "a number of messages"),
        "drop": (int, lambda value: value in (0, 1), "0 or 1"),
        "push": (int, lambda value: value in (0, 1), "0 or 1"),
    }

    def __init__(self, asked: dict[str, Any]) -> None:
        self.delay: float = asked.get("delay", 0.0)
        self.code: int = asked.get("close", 0)
        self.reason: str = asked.get("reason", "")
        self.drop: int = asked.get("drop", 0)
        self.after: int = asked.get("after", 0)
        self.push: int = asked.get("push", 0)
        # Kept since asyncio has only a weak reference to a task.
        self._pushing: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, request: httputil.HTTPServerRequest) -> Scenario | None:
        """Returns None if the query asks for nothing. Raises Refusal if a value is bad."""
        asked = {
            name: cls._value(name, values)
            for name, values in request.query_arguments.items()
            if name in cls.rules
        }
        return cls(asked) if asked else None

    @classmethod
    def _value(cls, name: str, values: list[bytes]) -> Any:
        kind, allowed, words = cls.rules[name]
        with contextlib.suppress(ValueError):
            (value,) = (kind(value.decode()) for value in values)
            if allowed(value):
                return value
        given = printable(b", ".join(values), 40)
        raise Refusal(400, "the query has a bad value", f"{name}={given} is not {words}")

    def begin(self, handler: EchoHandler, protocol: EchoProtocol) -> None:
        if self.push:
            self._pushing = asyncio.create_task(self._push(handler, protocol))
        if self.after == 0:
            self._strike(handler, protocol)

    async def _push(self, handler: EchoHandler, protocol: EchoProtocol) -> None:
        with contextlib.suppress(WebSocketClosedError):
            for number in itertools.count(1):
                await protocol.sleep(1)
                await self._write(handler, f"PUSH:{number}")

    async def _write(self, handler: EchoHandler, *message: Any) -> None:
        """Awaits the write, unless a subclass has a `write_message` that returns nothing."""
        sent: Awaitable[None] | None = handler.write_message(*message)
        if sent is not None:
            await sent

    def reply(
        self, handler: EchoHandler, protocol: EchoProtocol, message: str | bytes
    ) -> Awaitable[None]:
        """Encodes the reply before the delay, since a str may occupy four bytes per character."""
        payload = utf8(handler.prefix) + utf8(message)
        return self._reply(handler, protocol, payload, isinstance(message, bytes))

    async def _reply(
        self, handler: EchoHandler, protocol: EchoProtocol, payload: bytes, binary: bool
    ) -> None:
        if not protocol.is_closing():
            await protocol.sleep(self.delay)
        with contextlib.suppress(WebSocketClosedError):
            await self._write(handler, payload, binary)
            if protocol.traffic.received()[0] >= self.after:
                self._strike(handler, protocol)

    def _strike(self, handler: EchoHandler, protocol: EchoProtocol) -> None:
        if self.drop and protocol.connection:
            protocol.connection.drop()
        elif self.code:
            handler.close(self.code, self.reason)


def make_app(server: Server) -> web.Application:
    """Makes the stand-alone application: WebSocket on every path, and the answers to plain GETs."""
    options = server.options
    paths = ["/healthz", "/metrics"] if options.metrics else ["/healthz"]
    return web.Application(
        [
            routing.Rule(PlainGet(paths), PlainHandler, {"server": server}),
            (r".*", ServedHandler, {"server": server}),
        ],
        websocket_ping_interval=options.ping_interval,
        websocket_ping_timeout=options.ping_timeout,
        websocket_max_message_size=options.max_message_size,
        # This replaces Tornado's line for each request: our lines say more, and omit the query.
        log_function=lambda handler: server.lobby.on_answer(handler),
    )


# ------------------------------------------------------------------------------------------- Frames
# RFC 6455 sections 5 to 8 and RFC 7692 without I/O: bytes become events, and messages become bytes.

# The opcodes and the bits of section 5.2.
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = OPCODES = 0, 1, 2, 8, 9, 10
FIN, RSV1, MASK = 0x80, 0x40, 0x80
# First bytes of the frames that are events by themselves: whole messages and control frames.
WHOLE = {FIN | TEXT, FIN | BINARY, FIN | CLOSE, FIN | PING, FIN | PONG}
# The codes that a Close may carry (section 7.4 and IANA's registry).
CLOSE_CODES: frozenset[int] = frozenset(
    (*range(1000, 1004), *range(1007, 1015), *range(3000, 5000))
)

# The opcode and the payload of a message or a control frame, after all checks.
Event = tuple[int, bytes | bytearray]

# What one turn of a connection may cost, so that no peer keeps the others waiting: the bytes of its
# events; what each event costs besides its bytes (256 events are half a millisecond of work); and
# the bytes of texts that are answered without events.
TURN = 256 * 1024
EVENT = 1024
ECHO_TURN = 32 * 1024
# With a longer prefix, texts are answered one by one: the replies to ECHO_TURN bytes of empty texts
# would be more than HIGH_WATER bytes.
SHORT_PREFIX = 10

# The most frames in a message, of which Autobahn sends 65,536, and the most empty ones among them.
MAX_FRAGMENTS = 131_072
MAX_EMPTY = 1_024
# The most deflate streams in a message: a block with BFINAL ends one, and another may follow.
MAX_STREAMS = 1_024
# The number of bytes by which deflate can refer back (RFC 1951 section 2).
WINDOW = 32_768
# The bytes given to zlib at a time: few, since it copies those that follow the end of a stream.
DEFLATE_PIECE = 8_192
# If a message is shorter than this many bytes, deflate does not pay.
COMPRESS_FROM = 1024


class Fault(Exception):  # noqa: N818  # the peer's error, not ours
    """An error of the peer, for which we fail the connection with this code (section 7.1.7)."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


def check_text(data: bytes | bytearray, final: bool) -> bytes:
    """Section 8.1: raises Fault if `data` is not UTF-8. Returns the unfinished last character."""
    try:
        rest = bytes(data[codecs.utf_8_decode(data, "strict", final)[1] :])
    except UnicodeDecodeError:
        raise Fault(1007, "text is not UTF-8") from None
    # The decoder considers a surrogate an unfinished character until its third byte arrives.
    if rest[:1] == b"\xed" and rest[1:2] > b"\x9f":
        raise Fault(1007, "text is not UTF-8")
    return rest


def check_close(payload: bytes) -> None:
    """Section 5.5.1: the body of a Close is empty, or a code that may be sent (section 7.4) and a
    reason. One byte is not a code."""
    if len(payload) == 1:
        raise Fault(1002, "body of a close frame is one byte")
    code = int.from_bytes(payload[:2], "big")
    if payload and code not in CLOSE_CODES:
        raise Fault(1002, f"close code {code} may not be sent")
    check_text(payload[2:], final=True)


def check_frame(first: int, second: int, deflate: bool, unfinished: int) -> None:
    """Sections 5.1 to 5.5: checks the first two bytes of a frame. `unfinished` is the opcode of the
    message that began in an earlier frame and has not ended, or 0."""
    opcode = first & 0x0F
    if not second & MASK:
        raise Fault(1002, "frame is not masked")
    # RSV1 on the first frame of a message belongs to permessage-deflate (RFC 7692 section 6).
    if first & (0x30 if deflate and opcode in (TEXT, BINARY) else 0x70):
        raise Fault(1002, "reserved bit is set")
    if opcode not in OPCODES:
        raise Fault(1002, "opcode is not known")
    if opcode >= CLOSE:
        if second & 0x7F > 125 or not first & FIN:
            raise Fault(1002, "control frame is fragmented or too long")
    elif (opcode == CONTINUATION) != bool(unfinished):
        raise Fault(1002, "continuation is missing" if unfinished else "nothing to continue")


def payload_at(data: bytes, pos: int) -> tuple[int, int]:
    """Section 5.2: returns where the payload of the frame at `pos` starts, and its length. While
    that has not arrived, the start is beyond `data`. A length uses as few bytes as possible, and
    its top bit is 0."""
    length = data[pos + 1] & 0x7F
    if length < 126:
        return pos + 6, length
    size, least = (2, 126) if length == 126 else (8, 65536)
    start = pos + 2 + size
    if start > len(data):
        return start + 4, 0
    length = int.from_bytes(data[pos + 2 : start], "big")
    if not least <= length < 1 << 63:
        raise Fault(1002, "length is not minimal or too large")
    return start + 4, length


class Receiver:
    """Parses what one peer sends: `feed` takes bytes and returns the events that they complete.

    Section 5.2, a frame:    FIN RSV1-3 opcode(4), MASK length(7), 0, 2 or 8 bytes of length,
                             key(4), payload
    Section 5.4, a message:  one frame with its opcode, then any number with opcode 0. FIN is set on
                             the last of these frames. Control frames may come between them.
    RFC 7692 section 7.2.2:  If RSV1 is set on the first frame, the payloads of all frames form one
                             deflate stream, which may refer to earlier messages (context takeover).
    """

    def __init__(self, limit: int, deflate: Deflate | None = None) -> None:
        """`limit` is the largest size of a message, in bytes. `deflate` is the compression that has
        been agreed on, if any."""
        self.limit = limit
        self.deflate = deflate is not None
        # The last bytes of earlier compressed messages, once inflated: the peer may refer back to
        # them. A zlib object that kept them would cost 40 KB.
        self._window: bytes | None = b"" if deflate and deflate.takeover else None

        # The error for which the connection is to be failed, if any.
        self.fault: Fault | None = None
        # A Close has arrived.
        self.closed = False
        # Frames can still be told apart: no header and no Close was wrong.
        self.in_sync = True
        # Data frames are skipped, as after a Close (section 1.4) or a fault.
        self.skipping = False

        # Bytes not parsed yet: an incomplete header or control frame, unless `more` is set.
        self.rest = b""
        self.more = False

        # Of the present data frame: the payload bytes still to come, FIN, and the key.
        self._left = 0
        self._final = True
        self._key = b""

        # The opcode of the unfinished message, or 0; and a number that grows with each byte of it,
        # and whenever another message or frame begins.
        self.opcode = 0
        self._progress = 0
        self._begin_message(0)

    def _begin_message(self, opcode: int, compressed: bool = False) -> None:
        self.opcode = opcode
        self._message: bytes | bytearray = b""
        # Its bytes as sent, its frames, its empty frames, and its deflate streams that have ended.
        self._size = self._fragments = self._empty = self._streams = 0
        # The unfinished character at the end of its text so far.
        self._tail = b""
        self._inflater = zlib.decompressobj(-15, zdict=self._window or b"") if compressed else None

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """Changes with each byte of an unfinished message or frame; None if we wait for neither.
        Control frames are not progress for the message that they interrupt."""
        if self.skipping or self.more or not (self.opcode or self.rest):
            return None
        interrupted = self.opcode and self.rest and self.rest[0] & 0x0F >= CLOSE
        return self._progress, 0 if interrupted else len(self.rest)

    def skip(self) -> None:
        """From now on, data frames are skipped."""
        self.skipping = True
        self._window = None
        self._begin_message(self.opcode if self._left or not self._final else 0)

    def feed(self, data: bytes = b"") -> list[Event]:
        """Returns the events that are complete, or a turn's worth of them: then `more` is set, and
        `feed` has to be called again, if only with b"". A `fault` comes after these events."""
        events: list[Event] = []
        try:
            if self.in_sync:
                self._parse(self.rest + data if self.rest else data, events)
        except Fault as fault:
            if not self.skipping:
                # This copy has no traceback, whose frames would keep the data in memory.
                self.fault = Fault(fault.code, fault.reason)
            self.in_sync = fault.code != 1002 and not self.closed
            self.rest = self.rest if self.in_sync else b""
            self.more = bool(self.rest)
            self.skip()
        return events

    def keep(self, data: bytes) -> None:
        """Keeps `data` for the next call of `feed`, unless that would ignore it."""
        if data and self.in_sync:
            self.rest += data
            self.more = True

    def take_rest(self) -> bytes:
        """Returns the bytes that are not parsed yet, and forgets them: `unfinished` changes."""
        self._progress += 1
        rest, self.rest, self.more = self.rest, b"", False
        return rest

    def _parse(self, data: bytes, events: list[Event]) -> None:
        """Moves past each piece before checking it, so that parsing can go on after a fault."""
        pos, end, budget = 0, len(data), TURN
        try:
            while pos < end and budget > 0:
                if self._left:
                    piece = data[pos : pos + self._left]
                    pos += len(piece)
                    budget -= self._add(piece, events)
                    continue
                start, length = self._header(data, pos)
                if start > end:
                    break
                first, stop, key = data[pos], start + length, data[start - 4 : start]
                if stop <= end and first in WHOLE:
                    pos = stop
                    payload = unmask(key, data[start:stop])
                    budget -= EVENT + self._take(first & 0x0F, payload, events)
                elif first & 0x0F >= CLOSE:
                    break
                else:
                    pos = start
                    budget -= EVENT + self._begin_frame(first, length, key, events)
        finally:
            self.rest = data[pos:]
            self.more = budget <= 0 and pos < end
            if not self.opcode:
                self._progress += pos

    def _header(self, data: bytes, pos: int) -> tuple[int, int]:
        """Like `payload_at`, but raises Fault if the frame is not allowed here, or is too long."""
        if pos + 2 > len(data):
            return pos + 6, 0
        first = data[pos]
        check_frame(first, data[pos + 1], self.deflate, self.opcode)
        start, length = payload_at(data, pos)
        if first & 0x0F < CLOSE and not self.skipping:
            # Deflate makes some data longer: by up to 1/8 + 1/64, according to zlib's deflateBound.
            room = self.limit // 7 + 256 if first & RSV1 or self._inflater else 0
            if self._size + length > self.limit + room:
                # The key may not have arrived, so the header is skipped with the payload.
                self._left = start + length - pos
                self._final = bool(first & FIN)
                self.opcode = first & 0x0F or self.opcode
                raise Fault(1009, "message too big")
        return start, length

    def _take(self, opcode: int, payload: bytes, events: list[Event]) -> int:
        """Handles a whole message or control frame. Returns its cost besides EVENT. A Close ends
        the turn, so that our own can leave; only until then are later pings answered."""
        if opcode == CLOSE:
            again, self.closed = self.closed, True
            check_close(payload)
            if not again:
                events.append((CLOSE, payload))
            self.skip()
            return TURN
        if opcode < CLOSE and self.skipping:
            return 0
        if opcode == TEXT and not payload.isascii():
            check_text(payload, final=True)
        events.append((opcode, payload))
        return len(payload)

    def _begin_frame(self, first: int, length: int, key: bytes, events: list[Event]) -> int:
        """Begins a data frame that is a fragment, is compressed, or has not arrived completely."""
        if first & 0x0F != CONTINUATION:
            self._begin_message(first & 0x0F, bool(first & RSV1) and not self.skipping)
        self._left, self._final, self._key = length, bool(first & FIN), key
        self._size += length
        self._progress += 1
        self._fragments += 1
        self._empty += not length
        many = self._fragments > MAX_FRAGMENTS or self._empty > MAX_EMPTY
        if many and not self.skipping:
            raise Fault(1008, "too many fragments")
        return 0 if length else self._add(b"", events)

    def _add(self, data: bytes, events: list[Event]) -> int:
        """Adds payload of the present frame. Returns the cost of the message if that ends here."""
        self._left -= len(data)
        self._progress += len(data)
        if not self.skipping:
            self._append(data)
        if self._left or not self._final:
            return 0
        if not self.skipping:
            return self._end_message(events)
        self.opcode = 0
        return 0

    def _append(self, data: bytes) -> None:
        content: bytes | bytearray = unmask(self._key, data)
        # Section 5.3: byte i of the payload is masked with byte i mod 4 of the key.
        shift = len(data) & 3
        self._key = self._key[shift:] + self._key[:shift]
        if self._inflater:
            content = self._inflate(content)
        if self.opcode == TEXT and (self._tail or not content.isascii()):
            self._tail = check_text(self._tail + content, final=False)
        if not self._message:
            self._message = content
        else:
            if isinstance(self._message, bytes):
                self._message = bytearray(self._message)
            self._message += content
        if len(self._message) > self.limit:
            raise Fault(1009, "message too big")

    def _inflate(self, data: bytes | bytearray) -> bytearray:
        """Inflates, but no further than one byte above the limit."""
        content = bytearray()
        for start in range(0, len(data), DEFLATE_PIECE):
            piece = bytes(data[start : start + DEFLATE_PIECE])
            while piece and (room := self.limit + 1 - len(self._message) - len(content)):
                inflater = self._next_stream(content)
                try:
                    content += inflater.decompress(piece, room)
                except zlib.error:
                    raise Fault(1007, "deflate data is corrupt") from None
                piece = inflater.unused_data
        return content

    def _next_stream(self, content: bytearray) -> zlib._Decompress:
        """A block with BFINAL ends one stream, and another may follow, which can refer back to the
        same window (RFC 7692 section 7.2.3.4)."""
        inflater = cast("zlib._Decompress", self._inflater)
        if inflater.eof:
            self._streams += 1
            if self._streams >= MAX_STREAMS:
                raise Fault(1008, "too many deflate streams in a message")
            self._inflater = inflater = zlib.decompressobj(-15, zdict=self._recent(content))
        return inflater

    def _recent(self, content: bytes | bytearray = b"") -> bytes:
        """Returns the last WINDOW bytes of earlier messages, this message and `content`."""
        pieces = self._window or b"", self._message[-WINDOW:], content[-WINDOW:]
        return b"".join(pieces)[-WINDOW:]

    def _end_message(self, events: list[Event]) -> int:
        if self._inflater:
            self._end_inflating()
        if self._tail:
            raise Fault(1007, "text is not UTF-8")
        events.append((self.opcode, self._message))
        cost = len(self._message) + EVENT * (self._empty + self._streams)
        self._begin_message(0)
        return cost

    def _end_inflating(self) -> None:
        """The sender has cut off 00 00 FF FF (RFC 7692 section 7.2.1), so it is put back. Unless a
        block with BFINAL has ended the stream, an empty final block (03 00) is added and must end
        it, since zlib accepts most truncated streams."""
        if not cast("zlib._Decompress", self._inflater).eof:
            content = bytearray()
            with contextlib.suppress(Fault):
                content = self._inflate(b"\x00\x00\xff\xff") + self._inflate(b"\x03\x00")
            if content or not cast("zlib._Decompress", self._inflater).eof:
                raise Fault(1007, "deflate data is truncated")
        if self._window is not None:
            self._window = self._recent()


def frame_header(first: int, length: int) -> bytes:
    """Section 5.2: the header of an unmasked frame."""
    if length < 126:
        return bytes((first, length))
    if length < 65536:
        return struct.pack("!BBH", first, 126, length)
    return struct.pack("!BBQ", first, 127, length)


def control_frame(opcode: int, payload: bytes) -> bytes:
    """Section 5.5. Raises ValueError if the payload is too long."""
    if len(payload) > 125:
        raise ValueError("the payload of a control frame is at most 125 bytes")
    return frame_header(FIN | opcode, len(payload)) + payload


def close_frame(code: int | None, reason: str = "") -> bytes:
    """Section 5.5.1. Raises ValueError if the reason is too long."""
    body = (b"" if code is None else struct.pack("!H", code)) + utf8(reason)
    if len(body) > 125:
        raise ValueError("the reason of a Close is at most 123 bytes")
    return control_frame(CLOSE, body)


class Sender:
    """Makes messages, Pongs and our Close for one peer. Two of them may have to wait: a Pong while
    the peer does not read, and our Close until everything else has left."""

    def __init__(self, deflate: Deflate | None = None) -> None:
        self._deflate = deflate
        # The latest Ping that has not been answered.
        self.late_ping: bytes | None = None
        # Our Close, until it is sent.
        self.our_close: bytes | None = None

    def message(
        self, opcode: int, payload: bytes | bytearray, prefix: bytes = b""
    ) -> tuple[bytes, bytes | bytearray]:
        """Returns the frame of a message, `prefix` and `payload`, in two pieces."""
        first, size = FIN | opcode, len(prefix) + len(payload)
        if self._deflate and size >= COMPRESS_FROM:
            payload, prefix = self._deflate.compress(prefix + payload), b""
            first, size = first | RSV1, len(payload)
        return frame_header(first, size) + prefix, payload

    def answer(self, ping: bytes, congested: bool) -> bytes:
        """Section 5.5.3: returns a Pong, or b"" if it has to wait. Of the Pings that wait, only the
        latest is answered."""
        self.late_ping = ping if congested else None
        return b"" if congested else control_frame(PONG, ping)

    def last(self, congested: bool, waiting: bool) -> bytes:
        """Returns those frames that no longer have to wait. Our Close is the last of all."""
        late, our_close = self.late_ping, self.our_close
        pong = b"" if late is None else self.answer(late, congested)
        if our_close is None or waiting or self.late_ping is not None:
            return pong
        self.our_close = None
        return pong + our_close


# How to read the key and the payload of a frame at a position, by the length of the payload.
KEY_AND_PAYLOAD = [struct.Struct(f"2x4s{length}s").unpack_from for length in range(126)]
# What `echo_texts` has for each length: one of these, what goes before the payload in the reply,
# and the size of the frame.
ShortText = tuple[Callable[[bytes, int], tuple[Any, ...]], bytes, int]


@functools.lru_cache(16)
def echo_table(prefix: bytes, limit: int) -> list[ShortText | None]:
    """Returns what `echo_texts` needs, indexed by the second byte of a frame. An entry is None
    unless that byte is MASK plus a length below 126 and within the limit, and the prefix short."""
    table: list[ShortText | None] = [None] * 256
    for length in range(min(limit, 125) + 1 if len(prefix) <= SHORT_PREFIX else 0):
        head = frame_header(FIN | TEXT, len(prefix) + length) + prefix
        table[MASK | length] = KEY_AND_PAYLOAD[length], head, 6 + length
    return table


def echo_texts(data: bytes, table: list[ShortText | None]) -> tuple[list[bytes], int]:
    """Returns the replies to the whole, short ASCII texts at the start of `data`, and where the
    rest begins. A text costs 0.3 us; with an event and `on_message`, it would cost 1.3."""
    replies, pos, end = [], 0, len(data)
    while end - pos > 5 and data[pos] == 0x81 and (known := table[data[pos + 1]]):
        unpack, head, size = known
        if pos + size > end or pos > ECHO_TURN:
            break
        payload = unmask(*unpack(data, pos))
        if not payload.isascii():
            break
        replies.append(head + payload)
        pos += size
    return replies, pos


DEFLATE_OFFER = re.compile(
    r"permessage-deflate(?:\s*;\s*(?:server_no_context_takeover|client_no_context_takeover"
    r'|server_max_window_bits=("?)(?:9|1[0-5])\1|client_max_window_bits(?:=("?)(?:[89]|1[0-5])\2)?'
    r"))*",
    re.ASCII,
)
DEFLATE_PARAMETER = re.compile(r';\s*(\w+)(?:="?(\d+))?', re.ASCII)


class Deflate(NamedTuple):
    """The parameters of permessage-deflate that have been agreed on."""

    # What we answer to the offer.
    answer: str
    # Whether the peer may refer back to its earlier messages (context takeover).
    takeover: bool
    # zlib's parameters for our messages. All other connections wait while a megabyte of text is
    # compressed: for 9 ms at level 1, and for 30 ms at zlib's default.
    window_bits: int
    level: int = 1
    mem_level: int = 8

    def compress(self, payload: bytes) -> bytes:
        """RFC 7692 section 7.2.1: compresses a message, without context takeover."""
        level, bits, memory = self.level, -self.window_bits, self.mem_level
        compressor = zlib.compressobj(level, zlib.DEFLATED, bits, memory)
        return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def accept_deflate(offers: str, options: Mapping[str, int]) -> Deflate | None:
    """RFC 7692 section 7.1: accepts the first suitable offer. A parameter is answered only if it
    was offered, since some clients fail otherwise; client_max_window_bits only if it had a value.
    That we do without context takeover needs no announcement.

    An offer is unsuitable if a parameter is unknown, repeated or malformed, or if it contains
    server_max_window_bits=8, for which zlib has no raw compressor."""
    if offers.count('"') % 2:
        return None
    level, memory = options.get("compression_level", 1), options.get("mem_level", 8)
    if options:
        # Raises ValueError or TypeError if zlib does not take them.
        zlib.compressobj(level, zlib.DEFLATED, -15, memory)
    for offer in re.findall(r'(?:[^,"]|"[^"]*")+', offers):
        given = DEFLATE_PARAMETER.findall(offer)
        values = dict(given)
        if not DEFLATE_OFFER.fullmatch(offer.strip(" \t")) or len(values) < len(given):
            continue
        if values.get("client_max_window_bits") == "":
            del values["client_max_window_bits"]
        answer = [f"{name}={value}" if value else name for name, value in values.items()]
        return Deflate(
            "; ".join(["permessage-deflate", *answer]),
            "client_no_context_takeover" not in values,
            int(values.get("server_max_window_bits", 15)),
            level,
            memory,
        )
    return None


# --------------------------------------------------------------------------------------- Connection
# Frames on a socket, in three classes: Wire (one socket), Connection (the protocol on it) and
# Connections (all of them in one event loop). EchoProtocol stands between a Connection and its
# handler. Two rules apply throughout:
#
# 1. Whatever happens only changes facts; then Connection.settle decides what follows from them.
# 2. Progress is what the peer's kernel has acknowledged. A peer that makes progress is late neither
#    in taking our bytes, nor in answering a Ping, nor in closing.

# If more bytes of ours than this wait to leave, the future of a write is not done at once, and only
# the latest Ping is answered (section 5.5.3).
HIGH_WATER = 64 * 1024
# Bytes to ask for in a read, so that a message of 64 KiB arrives in one piece.
READ_SIZE = 256 * 1024
# Bytes to ask for after a short read: so small a buffer comes from Python's own allocator, 0.2 us
# faster.
SHORT_READ = 470
# If at most 64 pieces contain this many bytes in total, they are written as they are rather than
# joined.
SCATTER = 16 * 1024
# The most bytes in a record of TLS (RFC 8446 section 5.1).
RECORD = 16 * 1024

# Seconds that turns, and that reading what is ready, may take before the event loop goes on.
ROUND = 0.002
# Seconds without progress after which we give up on a closing peer: while our last frames leave or
# its Close is awaited (as long as in Tornado).
CLOSE_TIMEOUT = 5.0
# The same after our FIN.
LINGER_TIMEOUT = 2.0
# Seconds without progress while bytes of ours are under way, if `stall_timeout` is 0.
STALL_TIMEOUT = 60.0
# The most seconds between two looks at the deadlines.
PERIOD = 0.5

# What a socket is watched for. Tornado's IOLoop uses the numbers of epoll(7).
READ, WRITE, ERROR = IOLoop.READ, IOLoop.WRITE, IOLoop.ERROR
WOULD_BLOCK = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError


class Wire:
    """One socket, and what waits to leave it.

    `put` gathers pieces until `flush` writes them, so that a turn ends in one write. What the
    kernel does not take then is the backlog, which `drain` writes when there is room again. All
    methods that read or write raise OSError when the peer is lost.
    """

    def __init__(self, sock: socket.socket, stream: iostream.IOStream | None = None) -> None:
        """`stream` is Tornado's, if the socket has to be closed through it."""
        self.socket = sock
        self.fd = sock.fileno()
        self._owner = stream or sock
        self._gathered: list[bytes | bytearray] = []
        self.backlog: bytes | bytearray = b""
        # Futures, each with the number of bytes that the kernel must have taken before it is done.
        self._writes: deque[tuple[int, asyncio.Future[None]]] | None = None
        # Done when the socket is closed.
        self._closed: asyncio.Future[None] | None = None

        # Bytes received so far, and at which of them reading ends when the server stops.
        self.received = self._last = 0
        # Bytes put so far, and how many of them the kernel has not taken.
        self.total = self.waiting = 0
        # The `total` at which nothing was unacknowledged.
        self._acknowledged_total = 0
        # What `acknowledged` last returned; and how many bytes had left our kernel, and how many it
        # had taken, by then.
        self._progress = self._left = self._taken = 0
        # How often bytes have come that completed no record of TLS.
        self.partial = 0
        # How many bytes to ask for in the next read.
        self._ask = SHORT_READ
        # The peer has shut its side; we have shut ours.
        self.eof = False
        self.shut = False

    def put(self, piece: bytes | bytearray) -> None:
        if piece:
            self._gathered.append(piece)
            self.total += len(piece)
            self.waiting += len(piece)

    def flush(self) -> None:
        pieces = self._gathered
        if not pieces:
            return
        self._gathered = []
        if self.backlog:
            self.backlog += b"".join(pieces)
            return
        taken = self._send(pieces)
        self.waiting -= taken
        if self.waiting:
            self.backlog = bytearray().join(pieces)
            del self.backlog[:taken]

    def send(self, piece: bytes) -> bool:
        """Like `put` and `flush`, for a wire where nothing waits. Returns whether all has left."""
        size, taken = len(piece), 0
        self.total += size
        try:
            taken = self.socket.send(piece)
        except BlockingIOError:
            pass
        except OSError:
            # So that `_lose` sees that a reply is owed.
            self.waiting = size
            raise
        if taken == size:
            return True
        self.waiting = size - taken
        self.backlog = bytearray(piece[taken:])
        return False

    def drain(self) -> None:
        backlog = self.backlog
        taken = self._send([backlog])
        self.waiting -= taken
        if isinstance(backlog, bytearray) and taken < len(backlog):
            del backlog[:taken]
        else:
            self.backlog = b""
        while self._writes and self._writes[0][0] <= self.total - self.waiting:
            future_set_result_unless_cancelled(self._writes.popleft()[1], None)

    def _send(self, pieces: list[bytes | bytearray]) -> int:
        """Returns how many of the bytes the kernel has taken."""
        try:
            if len(pieces) == 1:
                return self.socket.send(pieces[0])
            # Windows has no sendmsg.
            few = len(pieces) <= 64 and hasattr(self.socket, "sendmsg")
            if self.waiting < SCATTER or not few:
                return self.socket.send(b"".join(pieces))
            return self.socket.sendmsg(pieces)
        except BlockingIOError:
            return 0

    def written(self) -> asyncio.Future[None]:
        """The future is done when the kernel has taken all that waits now. `close` fails it."""
        future: asyncio.Future[None] = asyncio.Future()
        self._writes = self._writes or deque()
        self._writes.append((self.total, future))
        return future

    def receive(self) -> bytes:
        """Returns what has arrived. b"" means nothing yet or, if `eof` is set, nothing any more."""
        try:
            data = self.socket.recv(self._ask)
        except BlockingIOError:
            return b""
        size = len(data)
        self.received += size
        self._ask = SHORT_READ if size < SHORT_READ else READ_SIZE
        if not size:
            self.eof = True
        return data

    def receive_rest(self) -> bytes:
        """Returns what has been read from the socket and is not in Tornado's stream."""
        return b""

    def receive_last(self) -> bytes:
        """Returns what the peer of a Unix socket has sent before closing it, which is not lost; but
        no more than there is now, since the peer may only have shut its reading side."""
        is_unix, data = self.socket.family == getattr(socket, "AF_UNIX", None), b""
        left = in_kernel(self.fd, "FIONREAD") if is_unix else 0
        with contextlib.suppress(OSError):
            while len(data) < left and (piece := self.receive()):
                data += piece
        return data

    def note_unread(self, least: int) -> None:
        """Called when the server stops. From now on, `has_unread` tells of what has arrived, and of
        what arrives while that is read, up to `least` bytes."""
        self._last = self.received + max(least, in_kernel(self.fd, "FIONREAD"))

    def has_unread(self) -> bool:
        """Whether some of that can be read. Once there is nothing to read, what arrives later does
        not count."""
        if self.received < self._last and not self._can_peek():
            self._last = self.received
        return self.received < self._last

    def _can_peek(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(socket.socket.recv(self.socket, 1, socket.MSG_PEEK))
        return False

    def find_loss(self, events: int = 0) -> None:
        """Raises OSError if the peer is lost, which epoll reports even if we do not read."""
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code or events & ERROR:
            raise OSError(code, os.strerror(code) if code else "the peer has left")

    def held(self) -> int:
        """Bytes that the peer's kernel has not acknowledged: those that wait, and those in our
        kernel, if it tells their number."""
        if self._acknowledged_total == self.total:
            return 0
        held = self.waiting + in_kernel(self.fd, "TIOCOUTQ")
        if not held:
            self._acknowledged_total = self.total
        return held

    def acknowledged(self, held: int) -> tuple[int, bool]:
        """Returns a number that grows with what the peer's kernel acknowledges, and whether
        anything is unacknowledged. On Linux, TCP counts these bytes. Elsewhere, the number grows by
        1 if our kernel has taken bytes since the last call, or holds fewer: a Unix socket adds some
        hundred bytes to each piece, so what has left it cannot be told while we write. There, a
        peer that takes nothing is noticed when our kernel takes no more."""
        left, taken = self.total - held, self.total - self.waiting
        if held and (count := bytes_acknowledged(self.socket)):
            self._progress = count
        elif left > self._left or taken > self._taken:
            self._progress += 1
        self._left, self._taken = left, taken
        return self._progress, held > 0

    def half_close(self) -> None:
        """Sends a FIN after everything else (section 7.1.1)."""
        self.shut = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)

    def until_closed(self) -> asyncio.Future[None]:
        self._closed = self._closed or asyncio.Future()
        return self._closed

    def close(self, reset: bool) -> None:
        """Closes the socket. Fails the futures of what has not left."""
        if reset:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._owner.close()
        self._gathered, self.backlog = [], b""
        for _, future in self._writes or ():
            fail_write(future)
        if self._closed:
            future_set_result_unless_cancelled(self._closed, None)


class TlsWire(Wire):
    """A wire on which TLS records travel."""

    socket: ssl.SSLSocket

    def _send(self, pieces: list[bytes | bytearray]) -> int:
        """Writes one record at a time, and only while the kernel has room for a whole one: OpenSSL
        fails if it has to answer a KeyUpdate while half a record waits (RFC 8446 section 4.6.3)."""
        taken = 0
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        with memoryview(data) as view, contextlib.suppress(*WOULD_BLOCK):
            while taken < len(view) and has_room(self.socket):
                taken += self.socket.send(view[taken : taken + RECORD])
        return taken

    def send(self, piece: bytes) -> bool:
        self.put(piece)
        self.flush()
        return not self.backlog

    def receive(self) -> bytes:
        """Reads whole records, since the poller cannot see what OpenSSL has read from the socket. A
        full record is probably followed by another. If the peer is lost behind one, this is the end
        of what it sends."""
        pieces: list[bytes] = []
        try:
            while not pieces or (len(pieces[-1]) == RECORD and len(pieces) < 16):
                pieces.append(self._receive_record())
        except BlockingIOError:
            # Nothing has come: the kernel takes bytes again.
            pass
        except WOULD_BLOCK:
            self.partial += not pieces
        except OSError:
            if not pieces:
                raise
            pieces.append(b"")
        data = b"".join(pieces)
        self.received += len(data)
        self.eof = bool(pieces) and not pieces[-1]
        return data

    def _receive_record(self) -> bytes:
        """After our close_notify, OpenSSL cannot read: what arrives is read from the socket itself,
        to be thrown away. A FIN without a close_notify would be an error to OpenSSL, after which it
        would not write either. So we look for a FIN first, and hide it from OpenSSL."""
        if self.shut:
            return socket.socket.recv(self.socket, READ_SIZE)
        if not self.socket.pending() and not socket.socket.recv(self.socket, 1, socket.MSG_PEEK):
            return b""
        return self.socket.recv(READ_SIZE)

    def receive_rest(self) -> bytes:
        """OpenSSL may have the rest of a record, which the poller cannot see."""
        data = self.socket.recv(RECORD) if self.socket.pending() else b""
        self.received += len(data)
        return data

    def half_close(self) -> None:
        """Sends close_notify (RFC 8446 section 6.1) and a FIN, without waiting for the peer's. Even
        if its close_notify has come, its FIN may be still to come, and bytes before that."""
        with contextlib.suppress(OSError, ValueError):
            self.socket.unwrap()
        super().half_close()
        self.eof = False


def take_over(stream: iostream.IOStream, on_close: Callable[[], None]) -> bytes:
    """From now on, only we read and write the socket. Returns what the stream has already read. The
    stream still closes the socket, and calls `on_close` before, no matter who closes it."""

    def close_fd() -> None:
        # First, this breaks the reference cycle of the stream and this function.
        del stream.close_fd
        on_close()
        stream.close_fd()

    stream.close_fd = close_fd  # type: ignore[method-assign]  # a callback would come too late
    stream.read_from_fd = lambda buf: None  # type: ignore[method-assign]  # so it reads no more
    early = b""
    # The last of these reads waits for ever. Without one that waits, the stream would watch the
    # socket again as soon as somebody sets its close callback.
    while (read := cast("asyncio.Future[bytes]", stream.read_bytes(1 << 20, partial=True))).done():
        early += read.result()
    stream.io_loop.remove_handler(stream.socket)
    return early


def in_kernel(fd: int, queue: str) -> int:
    """Bytes that our kernel holds for a socket: "FIONREAD", those that we have not read;
    "TIOCOUTQ", those that the peer's has not acknowledged (SIOCOUTQ in tcp(7), which Unix sockets
    have as well)."""
    try:
        import fcntl
        import termios

        (size,) = struct.unpack("i", fcntl.ioctl(fd, getattr(termios, queue), bytes(4)))
    except (ImportError, OSError):
        return 0
    return int(size)


def bytes_acknowledged(sock: socket.socket) -> int:
    """Bytes that the peer's kernel has acknowledged so far: tcpi_bytes_acked in <linux/tcp.h>. 0 if
    it is unknown, as on Unix sockets and on macOS."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int(struct.unpack_from("=Q", info, 120)[0])
    except (OSError, struct.error):
        return 0


def has_room(sock: socket.socket) -> bool:
    """Whether the kernel would take bytes: on Linux, whether a third of its buffer is free. For a
    closed socket, this is true, so that `send` raises."""
    if sock.fileno() < 0:
        return True
    if not hasattr(select, "poll"):
        return bool(select.select([], [sock], [], 0)[1])
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


def failed_write() -> asyncio.Future[None]:
    """Returns the future of a write to a connection that is closing."""
    future: asyncio.Future[None] = asyncio.Future()
    fail_write(future)
    return future


def fail_write(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(WebSocketClosedError("the peer has left"))
        # asyncio would complain about an exception that nobody looks at.
        future.exception()


@dataclasses.dataclass(slots=True)
class Traffic:
    """Counts messages and the bytes of their payloads, by type and direction."""

    texts_received: int = 0
    text_bytes_received: int = 0
    binaries_received: int = 0
    binary_bytes_received: int = 0
    texts_sent: int = 0
    text_bytes_sent: int = 0
    binaries_sent: int = 0
    binary_bytes_sent: int = 0

    # The texts that `echo_texts` has answered and that are in no other number yet: how many, the
    # bytes of their frames, and those of the prefix of each reply. Adding up two numbers for each
    # read rather than four saves a tenth of its Python.
    echoes: int = 0
    echo_bytes: int = 0
    prefix: int = 0

    def count_received(self, opcode: int, size: int, number: int = 1) -> None:
        if opcode == TEXT:
            self.texts_received += number
            self.text_bytes_received += size
        else:
            self.binaries_received += number
            self.binary_bytes_received += size

    def count_sent(self, opcode: int, size: int, number: int = 1) -> None:
        if opcode == TEXT:
            self.texts_sent += number
            self.text_bytes_sent += size
        else:
            self.binaries_sent += number
            self.binary_bytes_sent += size

    def count_echoes(self) -> None:
        """Counts the echoes and their replies like other texts. In front of each payload, a frame
        of theirs has 6 bytes."""
        number, size = self.echoes, self.echo_bytes - 6 * self.echoes
        self.count_received(TEXT, size, number)
        self.count_sent(TEXT, size + number * self.prefix, number)
        self.echoes = self.echo_bytes = 0

    def echo_with(self, prefix: int) -> None:
        """From now on, the prefix of each reply has that many bytes."""
        self.count_echoes()
        self.prefix = prefix

    def received(self) -> tuple[int, int]:
        """Returns the number of messages, and that of their bytes."""
        self.count_echoes()
        size = self.text_bytes_received + self.binary_bytes_received
        return self.texts_received + self.binaries_received, size

    def add(self, other: Traffic) -> None:
        other.count_echoes()
        for name in self.__slots__[:8]:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Since:
    """Remembers since when a value has not changed."""

    __slots__ = ("at", "value")

    def __init__(self, now: float) -> None:
        self.value: object = None
        self.at = now

    def seconds(self, value: object, now: float) -> float:
        if value != self.value:
            self.value = value
            self.at = now
        return now - self.at


class Deadlines:
    """What a peer has to do in time. The limits are in seconds, where 0 means none; the clocks show
    the time of Connections.now."""

    __slots__ = (
        "arrival", "due", "message", "ping_interval", "ping_timeout", "pinged", "progress",
        "stall_timeout", "state",
    )  # fmt: skip

    def __init__(
        self, handler: websocket.WebSocketHandler, stall_timeout: float, now: float
    ) -> None:
        # As in Tornado, a negative limit is none.
        self.ping_interval = max(handler.ping_interval or 0.0, 0.0)
        timeout = handler.ping_timeout
        self.ping_timeout = self.ping_interval if timeout is None else max(timeout, 0.0)
        self.stall_timeout = max(stall_timeout, 0.0)
        # The clocks: for bytes received, the unfinished message, bytes acknowledged, and the state.
        self.arrival, self.message = Since(now), Since(now)
        self.progress, self.state = Since(now), Since(now)
        # When we sent a Ping after which nothing has arrived yet; 0 if there is none.
        self.pinged = 0.0
        # Before this time, a connection with nothing under way is not looked at again: like the
        # sweep's own, such looks are 1/4 of the shortest limit apart. Looking at 10,000 idle
        # connections each time would take 5 % of a core.
        self.due = 0.0

    def shortest(self, most: float) -> float:
        limits = self.ping_interval, self.ping_timeout, self.stall_timeout, most
        return min(filter(None, limits))

    def passed(self, now: float, state: int, wire: Wire, unfinished: object, reads: bool) -> str:
        """Returns what has taken too long: "closing", "taking" our bytes, a "message", the "answer"
        to a Ping, "silence", or "". While we do not read, it is not the peer who is late."""
        held = wire.held()
        progress = self.progress.seconds(wire.acknowledged(held), now)
        standing = self.state.seconds(state, now)
        if state != OPEN:
            limit = LINGER_TIMEOUT if state == LINGERING else CLOSE_TIMEOUT
            # A kernel may tell of the room in its buffer only when much of it is free, so a peer
            # that reads slowly can seem to make no progress for many seconds.
            slow = held and progress < (self.stall_timeout or STALL_TIMEOUT)
            return "closing" if not slow and min(progress, standing) >= limit else ""
        # A value that is always new keeps the clock at 0.
        waiting_for = reads and unfinished and (unfinished, wire.partial)
        stalled = self.message.seconds(waiting_for or now, now)
        silent = self.arrival.seconds((wire.received, wire.partial) if reads else now, now)
        if self.arrival.at > self.pinged:
            self.pinged = 0.0
        if held and 0 < self.stall_timeout <= progress:
            return "taking"
        if 0 < self.stall_timeout <= stalled:
            return "message"
        if self.pinged:
            waited = min(now - self.pinged, progress)
            return "answer" if 0 < self.ping_timeout <= waited else ""
        if not held and 0 < self.ping_interval <= silent:
            return "silence"
        if reads and not (held or unfinished):
            self.due = now + self.shortest(30.0) / 4
        return ""


class Inbox:
    """The messages that the handler has not got yet. It gets one at a time: while a coroutine of it
    runs, later messages are queued here, and so is the Close after them.

    There is room for as many bytes as one message may contain; above that, we stop reading.
    """

    __slots__ = "_held", "_limit", "_running", "_waiting", "_waiting_size", "is_shut"

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Nothing counts any more but the peer's Close (section 7.1.7).
        self.is_shut = False
        # The calls of the handler whose coroutines run, and writes that `on_message` has returned
        # (None rather than an empty set, which would take 200 bytes); and the bytes of the message
        # that they work on.
        self._running: set[object] | None = None
        self._held = 0
        # The queue, and its bytes, to which each entry adds EVENT.
        self._waiting: deque[Event] | None = None
        self._waiting_size = 0

    def is_busy(self) -> bool:
        return bool(self._running)

    def is_empty(self) -> bool:
        return not (self._running or self._waiting)

    def has_next(self) -> bool:
        return bool(self._waiting) and not self._running

    def has_place(self) -> bool:
        """Each coroutine but the first, such as those of `on_ping`, counts like a short message."""
        others = EVENT * (len(self._running) - 1) if self._running else 0
        return self._waiting_size + self._held + others <= self._limit

    def put(self, event: Event) -> None:
        self._waiting = self._waiting or deque()
        self._waiting.append(event)
        self._waiting_size += len(event[1]) + EVENT

    def take(self) -> Iterator[Event]:
        """Yields what waits for as long as nothing runs, but no more than a turn's worth."""
        budget = TURN
        while budget > 0 and self._waiting and not self._running:
            event = self._waiting.popleft()
            size = len(event[1]) + EVENT
            self._waiting_size -= size
            budget -= size
            yield event

    def shut(self) -> None:
        """Throws away all messages, queued and later ones, and later Pings and Pongs; but not the
        peer's Close."""
        self.is_shut = True
        waiting, self._waiting, self._waiting_size = self._waiting, None, 0
        for event in waiting or ():
            if event[0] == CLOSE:
                self.put(event)

    def hold(self, size: int) -> None:
        """The handler has got a message, which needs room while a coroutine works on it."""
        self._held = size if self._running else 0

    def begin(self, call: object) -> None:
        self._running = self._running or set()
        self._running.add(call)

    def has_begun(self, call: object) -> bool:
        return self._running is not None and call in self._running

    def release(self, call: object) -> None:
        """Called when a coroutine is done."""
        if self._running:
            self._running.discard(call)
        if not self._running:
            self._running, self._held = None, 0


# The call of a handler's method that runs in this context. Tasks that it begins inherit it.
CALL: contextvars.ContextVar[object] = contextvars.ContextVar("CALL")


class EchoProtocol(websocket.WebSocketProtocol):
    """Does what Tornado asks of a protocol, for one handler: does the handshake, calls the methods
    of the handler, and passes on to the Connection what these want."""

    handler: EchoHandler
    selected_subprotocol: str | None = None
    # The code and the reason of the peer's Close.
    close_code: int | None = None
    close_reason: str | None = None

    def __init__(self, handler: EchoHandler, peer: str, stall_timeout: float) -> None:
        super().__init__(handler)
        # Exists from the end of the handshake to the end of the connection.
        self.connection: Connection | None = None
        self.registry = Connections.current()
        self.deadlines = Deadlines(handler, stall_timeout, self.registry.now)
        # The largest size of a message: a number that zlib takes, which a host's may not be.
        self.limit = int(min(handler.max_message_size, 1 << 62))
        self.inbox = Inbox(self.limit)
        # What the handshake has agreed on.
        self.deflate: Deflate | None = None
        # For the log and the metrics: when the handshake was done, in time.monotonic(); and the
        # code of our Close, or 1005 if it had none. Without a Close, the outcome is 1006 (section
        # 7.1.5), or 1008 if the peer took no bytes.
        self.peer = peer
        self.traffic = Traffic()
        self.opened = 0.0
        self.outcome = 1006
        # Whether `on_close` has been called; and `finish`, after which a host's own `get` goes on.
        self._has_closed = False
        self.finished = False
        self._ended: asyncio.Future[None] | None = None

    # ---- The handshake

    async def accept_connection(self, handler: websocket.WebSocketHandler) -> None:
        """RFC 6455 section 4.2.2: does the server's part of the handshake."""
        stream = await self.handler._switch_protocols(self.negotiate())
        if stream.closed() or self.server_terminated:
            # The peer left, or the handler closed the connection, during the handshake.
            stream.close()
            return
        # Tornado's HTTP server turns TCP_NODELAY off. A Close right after a reply could then take
        # 40 ms more.
        stream.set_nodelay(True)
        self.stream, early = stream, take_over(stream, self.on_stream_close)
        kind = TlsWire if isinstance(stream.socket, ssl.SSLSocket) else Wire
        self.start(kind(stream.socket, stream), early)
        if type(handler).get is not EchoHandler.get and not self.finished:
            # As in Tornado, a host's own `get` goes on when the connection has ended.
            self._ended = asyncio.Future()
            try:
                await self._ended
            except asyncio.CancelledError:
                self._abort()

    def negotiate(self) -> dict[str, str]:
        """Section 4.2.2: chooses the subprotocol and the extension. Returns the headers of the
        answer."""
        handler, headers = self.handler, self.handler.request.headers
        accept = websocket.WebSocketProtocol13.compute_accept_value(headers["Sec-WebSocket-Key"])
        answer = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept}
        offered = offered_protocols(headers)
        selected = self.selected_subprotocol = handler.select_subprotocol(offered) or None
        if selected:
            if selected not in offered:
                raise ValueError(f"select_subprotocol may not select {selected}, only {offered}")
            answer["Sec-WebSocket-Protocol"] = selected
        options, offers = handler.get_compression_options(), headers.get("Sec-WebSocket-Extensions")
        if options is not None and offers:
            self.deflate = accept_deflate(offers, options)
        if self.deflate:
            answer["Sec-WebSocket-Extensions"] = self.deflate.answer
        return answer

    def start(self, wire: Wire, early: bytes) -> None:
        """Begins when the handshake is done. `early` is what has already arrived after it."""
        # All methods of this handler run in this context, and those of no other handler.
        self._context = contextvars.copy_context()
        self._wire = wire
        self.connection = connection = Connection(self, wire)
        self.opened = time.monotonic()
        connection.enter(connection.start, early)

    # ---- Calls of the handler

    def open(self) -> None:
        self.call(self._open)

    def _open(self) -> Awaitable[Any] | None:
        """As in Tornado, what an `async def open` changes in its context is there later."""
        opened = self.handler.open(*self.handler.open_args, **self.handler.open_kwargs)
        if not asyncio.iscoroutine(opened):
            return opened
        context = contextvars.copy_context()

        def keep(_: object) -> None:
            self._context = context

        try:
            task = self.registry.loop.create_task(opened, context=context)
        except TypeError:
            # The host has a task factory that does not know contexts, as in Python 3.10.
            return opened
        task.add_done_callback(keep)
        return task

    def call(self, method: Callable[..., Any], *args: Any) -> None:
        self._context.run(self.run, method, *args)

    def run(self, method: Callable[..., Any], *args: Any) -> None:
        """Calls a method of the handler. If it returns a coroutine or a future, messages are queued
        until that is done."""
        call = object()
        token = CALL.set(call)
        try:
            result = method(*args)
            if result is not None:
                self.wait_for(gen.convert_yielded(result), call)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._report()
        finally:
            CALL.reset(token)

    def wait_for(self, future: asyncio.Future[Any], call: object) -> None:
        if self.connection:
            resume = functools.partial(self.connection.enter, self._resume, call)
            outside(IOLoop.current().add_future, future, resume)
            self.inbox.begin(call)

    def _resume(self, call: object, future: asyncio.Future[Any]) -> None:
        """Called when a coroutine of the handler is done, or a write that `on_message` returned."""
        self.inbox.release(call)
        try:
            future.result()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # If EchoHandler.on_message has returned a write, `on_sent` already reports its failure.
            self._context.run(self._report, isinstance(future, asyncio.Task))
        if self.connection:
            self.connection.resume()

    def _report(self, say: bool = True) -> None:
        """Logs the traceback of an error in the handler, and closes with 1011. A write that fails
        because the connection is closing is no error, and worth a line only if `say` is set; nor is
        a coroutine that is cancelled after the end."""
        error = sys.exc_info()[1]
        if self.is_closing() and isinstance(error, WebSocketClosedError):
            if say:
                self.warn("reply not sent")
        elif not (self.is_closed() and isinstance(error, asyncio.CancelledError)):
            self.handler.log_exception(*sys.exc_info())
            if self.connection:
                self.connection.fail(1011)

    def finish(self) -> None:
        """Tells the handler of the end, once."""
        if self.finished:
            return
        self.finished = True
        close = self.handler.on_ws_connection_close
        try:
            self._context.run(close, self.close_code, self.close_reason)
        finally:
            if self._ended:
                future_set_result_unless_cancelled(self._ended, None)

    def call_on_close(self) -> None:
        """Calls `on_close` once: a host may call `on_connection_close`, too."""
        if not self._has_closed:
            self._has_closed = True
            self.run(self._on_close)

    def _on_close(self) -> Awaitable[Any] | None:
        """As in Tornado, `on_close` may return anything. Only what can be awaited is."""
        result = cast(Any, self.handler).on_close()
        return result if isinstance(result, Awaitable) else None

    def release(self) -> None:
        """Called after the end. Only the garbage collector would free two objects that refer to
        each other. But a coroutine that still runs may need the connection."""
        if not self.inbox.is_busy():
            self.connection = None

    # ---- What Tornado and the handler ask for

    def write_message(
        self, message: str | bytes | dict[str, Any], binary: bool = False
    ) -> asyncio.Future[None]:
        """Returns a future. If more than HIGH_WATER bytes wait, it is done when the kernel has
        taken them; otherwise at once or, outside a turn when the round is over, in the next round.
        It fails with WebSocketClosedError if the connection is closing. In coroutines for whose end
        `on_close` waits, and in tasks of theirs, that is raised, since they may await no write.
        """
        if self.connection is None or self.is_closing():
            if self.inbox.has_begun(CALL.get(None)):
                raise WebSocketClosedError
            return failed_write()
        payload = utf8(json_encode(message) if isinstance(message, dict) else message)
        sent = self.connection.write(BINARY if binary else TEXT, payload)
        if sent is self.registry.done:
            # This one is shared by all connections, but hosts use futures as keys.
            sent = asyncio.Future()
            sent.set_result(None)
        return sent

    def write_ping(self, data: bytes) -> None:
        if self.connection:
            self.connection.ping(data)

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Begins the closing handshake; during the opening one, makes `accept_connection` give up.
        As in Tornado, a reason alone goes with 1000."""
        if self.connection:
            self.connection.close(1000 if code is None and reason is not None else code, reason)
        self.server_terminated = True

    def is_closing(self) -> bool:
        return self.connection is None or self.connection.state != OPEN

    def is_closed(self) -> bool:
        return self.connection is None or self.connection.state == CLOSED

    def on_stream_close(self) -> None:
        """Called before the stream closes the socket. If it was a host that closed the stream, the
        connection ends, but later, since it closes the stream as well. The poller has to forget the
        socket now: it would go on watching the copy that a forked process has."""
        if self.stream and self.connection and not self.is_closed():
            self.registry.forget(self._wire.fd, self.connection)
            self.stream.io_loop.add_callback(self.on_connection_close)

    def on_connection_close(self) -> None:
        """Called when somebody else has closed the socket."""
        self.server_terminated = True
        if self.connection:
            self.connection.close_socket(reset=False)

    def _abort(self) -> None:
        """Some hosts call this method of Tornado's to get rid of a connection."""
        self.server_terminated = True
        if self.connection:
            self.connection.drop(reset=False)

    def note_unread(self) -> None:
        """What has arrived by now is handled before the server stops. What a peer has sent may go
        on arriving while we read, so a message's size of that is handled, too."""
        self._wire.note_unread(max(self.limit, READ_SIZE))

    def set_nodelay(self, x: bool) -> None:
        if self.stream:
            self.stream.set_nodelay(x)

    async def sleep(self, seconds: float) -> None:
        """Lets the handler sleep, but no longer than until the socket is closed."""
        if not self.is_closed():
            await asyncio.wait([self._wire.until_closed()], timeout=seconds)

    def warn(self, text: str) -> None:
        log.warning("[SERVER] error:%s, %s", text, self.peer)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.opened
        messages, size = self.traffic.received()
        about = f"{self.outcome} from {self.peer} after {seconds:.1f} s"
        return f"{about}, {messages} messages, {size} bytes"

    # The sweep and the turns replace the first two; the third is for clients only.
    def start_pinging(self) -> None: ...
    async def _receive_frame_loop(self) -> None: ...
    def _process_server_headers(self, key: str | bytes, headers: httputil.HTTPHeaders) -> None: ...


# The states of a connection, and what ends each of them:
#
# OPEN       Messages go both ways, until we decide to send a Close, or the peer has shut its side
#            and everything before that is handled.
# CLOSING    Our Close waits until nothing else has to leave before it. Pings are still answered,
#            unless we fail the connection.
# AWAITING   Our Close is out, and the peer's can still come.
# ENDING     Both sides have sent their last frame, or we have given up on the peer's. When the
#            kernel has taken the last of ours, we shut our side.
# LINGERING  Our side is shut; `on_close` is called as soon as the handler has got all messages and
#            no coroutine runs. What arrives is thrown away until the peer has shut its side, too: a
#            byte that arrives after close() would make the kernel throw away what is still on its
#            way to the peer.
# CLOSED     The socket is closed. If `on_close` has not been called, it is called when the handler
#            has got all messages, except those that `drop` has thrown away.
#
# CLOSING, AWAITING and ENDING last for at most CLOSE_TIMEOUT without progress, and LINGERING for
# LINGER_TIMEOUT. While bytes of ours are under way, they last instead until the peer's kernel has
# acknowledged none for `stall_timeout`. Then AWAITING becomes ENDING, and the others become CLOSED.
# A reset, an unhandled exception, or `drop` leads from any state to CLOSED.
OPEN, CLOSING, AWAITING, ENDING, LINGERING, CLOSED = range(6)


class Connection:
    """RFC 6455 on a wire, for one handler: turns, flow control and the closing handshake.

    While a coroutine of the handler runs, later messages and the Close after them queue in the
    inbox, and reading stops when that is full. This is the only back-pressure, also of replies:
    if one cannot leave, EchoHandler.on_message returns a future, which counts as a coroutine.
    """

    def __init__(self, protocol: EchoProtocol, wire: Wire) -> None:
        self.protocol = protocol
        self._inbox = protocol.inbox
        self.handler = protocol.handler
        self._wire = wire
        self._receiver = Receiver(protocol.limit, protocol.deflate)
        self._sender = Sender(protocol.deflate)
        self._registry = protocol.registry
        self._deadlines = protocol.deadlines
        self.traffic = protocol.traffic

        self.state = OPEN
        # What the socket is watched for.
        self._watched = READ
        # A turn is going on: what is put leaves at its end.
        self._corked = False
        # The prefix, if replies need no call of the handler; and the table, if `echo_texts` may
        # answer what arrives next.
        self._prefix: bytes | None = None
        self._table: list[ShortText | None] | None = None

    # ---- Entries: each of them changes facts, then settles

    def enter(self, step: Callable[..., None], *args: Any) -> None:
        """Calls `step`. An exception ends this connection, but no round, sweep or event loop."""
        try:
            step(*args)
        except Exception as error:
            self._end_with(error)

    def _end_with(self, error: Exception) -> None:
        if isinstance(error, OSError):
            self._lose(error)
            return
        # This logs last, since a host's log handler may write to the connection.
        self.drop()
        log.exception("[SERVER] error:unhandled exception, %s", self.protocol.peer)

    def start(self, early: bytes) -> None:
        self._corked = True
        try:
            self.enter(self._registry.add, self, self._wire.fd)
            self.protocol.open()
        finally:
            self._corked = False
        self.resume(early + self._wire.receive_rest())

    def ready(self, events: int = 0) -> None:
        """Called when bytes have arrived, the kernel takes bytes again, or the peer is lost; and
        without events when a round gives this connection another turn."""
        receiver = self._receiver
        try:
            # Nearly always, bytes have arrived, and nothing else.
            if events and (events != READ or self._watched != READ) and not self._notice(events):
                return
            data = self._wire.receive() if events else b""
            table = None if self._registry.shows else self._table
            if table and receiver.rest:
                data = receiver.take_rest() + data
            replies, size = echo_texts(data, table) if table else ([], 0)
            if replies:
                self._registry.unshown += len(replies)
                self.traffic.echoes += len(replies)
                self.traffic.echo_bytes += size
                done = self._wire.send(b"".join(replies)) and size == len(data)
                if done and self._watched == READ and not self._wire.eof:
                    # Nothing that `settle` looks at has changed.
                    return
                data = data[size:]
            if events and receiver.deflate and not (self._discards() or self._registry.has_time()):
                # Inflating and deflating may take milliseconds: the data waits for a later turn.
                receiver.keep(data)
                self.settle()
            else:
                self.turn(data)
        except Exception as error:
            self._end_with(error)

    def _notice(self, events: int) -> bool:
        """Acts on all events but bytes that have arrived. Returns whether those are to be read."""
        if events & WRITE:
            self._wire.drain()
        if self._watched & READ:
            return True
        self._wire.find_loss(events)
        self.settle()
        return False

    def resume(self, data: bytes = b"") -> None:
        """Called when `open` or a coroutine is done, since both may have changed the handler."""
        self._look_at_handler()
        self.turn(data)

    def write(
        self, opcode: int, payload: bytes | bytearray, prefix: bytes = b""
    ) -> asyncio.Future[None]:
        """Outside a turn, once the round is over, the future is done only in the next one: a
        coroutine that awaits write after write has to yield."""
        wire = self._wire
        self.traffic.count_sent(opcode, len(prefix) + len(payload))
        for piece in self._sender.message(opcode, payload, prefix):
            wire.put(piece)
        if not self._corked:
            self.settle()
        elif wire.waiting > HIGH_WATER and not wire.backlog:
            self.enter(wire.flush)
        if self.state == CLOSED:
            return failed_write()
        if wire.waiting > HIGH_WATER:
            return wire.written()
        return self._registry.done if self._corked else self._registry.next_write()

    def ping(self, data: bytes) -> None:
        if self.state == OPEN:
            self._wire.put(control_frame(PING, data))
            self.settle()

    def close(self, code: int | None, reason: str | None) -> None:
        self._begin_closing(code, reason or "")
        self.settle()

    def drop(self, reset: bool = True) -> None:
        """Closes the socket without a closing handshake. The handler gets no more messages. If
        there is no reset, bytes that our kernel has taken may still arrive."""
        self._discard_messages()
        if self.state != CLOSED:
            self._receiver.take_rest()
            with contextlib.suppress(OSError):
                self._send_last()
        self.close_socket(reset)

    def end(self) -> None:
        """Ends the connection at once: the event loop ends, or the time for a clean end is over."""
        self.enter(self.drop, False)
        self.finish()

    # ---- What follows

    def settle(self) -> None:
        """The only place that decides what follows from the facts."""
        if self._corked:
            return
        if self.state == CLOSED:
            self._hand_over()
            return
        wire, receiver = self._wire, self._receiver
        try:
            wire.flush()
            ending = receiver.fault or wire.eof or self._registry.leaving or self.state != OPEN
            late_pong = self._sender.late_ping is not None
            calm = self._inbox.is_empty() and not (ending or wire.backlog or late_pong)
            quick = calm and not receiver.opcode and self._prefix is not None
            self._table = echo_table(self._prefix or b"", receiver.limit) if quick else None
            if not calm or receiver.opcode or receiver.rest:
                self._deadlines.due = 0.0
            if calm and not receiver.more and self._watched == READ:
                # Nearly always, nothing follows.
                return
            self._decide_close()
            self._send_last()
        except OSError as error:
            self._lose(error)
            return
        if self.state == ENDING and not wire.backlog:
            wire.half_close()
            self.state = LINGERING
        if self.state == LINGERING and wire.eof:
            self.close_socket(reset=False)
            return
        self._hand_over()
        watched = (READ if self._may_read() else 0) | (WRITE if wire.backlog else 0)
        if watched != self._watched:
            self._watched = watched
            self._registry.watch(wire.fd, watched)

    def _decide_close(self) -> None:
        """When all that arrived is handled, acts on a fault, a FIN, or the server's stop."""
        wire, receiver = self._wire, self._receiver
        if self.state != OPEN or not self._inbox.is_empty():
            return
        if receiver.fault:
            self.fail(receiver.fault.code, receiver.fault.reason)
        elif wire.eof and not receiver.more:
            self.protocol.client_terminated = True
            self.state = ENDING
        elif self._registry.sends_away(self.handler) and not (receiver.more or wire.has_unread()):
            receiver.skip()
            self._begin_closing(1001, "the server is stopping")

    def _send_last(self) -> None:
        """Sends a late Pong if there is no congestion, and our Close if nothing waits before it.
        Then both sides have sent their last frame, unless the peer's Close can still come."""
        wire, receiver = self._wire, self._receiver
        wire.put(self._sender.last(self._is_congested(), bool(wire.backlog)))
        wire.flush()
        if self.state == CLOSING and self._sender.our_close is None:
            self.state = AWAITING
        came = receiver.closed or self.protocol.client_terminated
        idle = self._inbox.is_empty() and not receiver.more
        if self.state == AWAITING and (came or not receiver.in_sync or (wire.eof and idle)):
            self.state = ENDING

    def _hand_over(self) -> None:
        """Plans another turn if the handler has not got everything, and in the end `on_close`."""
        inbox, more = self._inbox, self._receiver.more and not self._discards()
        if (more and inbox.has_place()) or inbox.has_next():
            self._registry.again(self)
        elif self.state >= LINGERING and not (self.protocol.finished or inbox.is_busy()):
            # Later, so that `on_close` is not called within another method of the handler.
            outside(self._registry.loop.call_soon, self.finish)

    def finish(self) -> None:
        """Has `on_close` called. In LINGERING, the FIN of a peer that does not read may be late."""
        self.enter(self.protocol.finish)
        if self.state == CLOSED:
            self._registry.remove(self)

    def _may_read(self) -> bool:
        if self._wire.eof:
            return False
        if self._discards():
            return True
        if self._receiver.more or not self._inbox.has_place():
            return False
        leaving = self._registry.sends_away(self.handler)
        return self.state != OPEN or not leaving or self._wire.has_unread()

    def _discards(self) -> bool:
        """Whether what arrives is thrown away: no frame counts any more, or none can be parsed."""
        over = self.protocol.finished or self.state in (ENDING, LINGERING)
        return over or not self._receiver.in_sync

    # ---- A turn

    def turn(self, data: bytes = b"") -> None:
        """Handles what has arrived, in order. What is put meanwhile leaves at the end."""
        self._corked = True
        try:
            for event in self._inbox.take():
                self._deliver(*event)
            if self._inbox.has_next():
                self._receiver.keep(data)
            elif (data or self._receiver.more) and self._inbox.has_place() and not self._discards():
                self._handle(self._receiver.feed(data))
        finally:
            self._corked = False
        self.settle()

    def _handle(self, events: Iterable[Event]) -> None:
        """Messages, and the Close after them, queue for a busy handler; pings and pongs do not."""
        for opcode, payload in events:
            if self._inbox.is_shut and opcode != CLOSE:
                continue
            if opcode == PING:
                self._answer(bytes(payload))
                self.protocol.call(self.handler.on_ping, payload)
            elif opcode == PONG:
                self.protocol.call(self.handler.on_pong, payload)
            elif self._inbox.is_empty():
                self._deliver(opcode, payload)
            else:
                self._inbox.put((opcode, payload))

    def _deliver(self, opcode: int, payload: bytes | bytearray) -> None:
        """Delivers a message to the handler, or acts on the Close after the last one."""
        if opcode == CLOSE:
            self._take_close(bytes(payload))
            return
        if self._prefix is not None and self.state != OPEN:
            # EchoHandler could no longer reply.
            return
        self.traffic.count_received(opcode, len(payload))
        if self._prefix is None or self._registry.shows:
            message = payload.decode() if opcode == TEXT else bytes(payload)
            self.protocol.call(self.handler.on_message, message)
        else:
            # This does what EchoHandler.on_message does, without making a str of the message.
            self._registry.unshown += 1
            sent = self.write(opcode, payload, self._prefix)
            if not sent.done():
                sent.add_done_callback(self.handler.on_sent)
                self.protocol.wait_for(sent, sent)
        self._inbox.hold(len(payload))

    def _look_at_handler(self) -> None:
        """Finds out whether replies need a call of the handler."""
        self._prefix = utf8(self.handler.prefix) if self.handler._only_echoes() else None
        self.traffic.echo_with(len(self._prefix or b""))
        self._table = None

    def _answer(self, ping: bytes) -> None:
        """Section 5.5.2: answers a Ping, unless our Close has left."""
        if self.state <= CLOSING:
            self._wire.put(self._sender.answer(ping, self._is_congested()))

    def _is_congested(self) -> bool:
        """Whether a Pong has to wait. Once we are closing, Pings must not delay our Close."""
        return self._wire.waiting > (HIGH_WATER if self.state == OPEN else 0)

    # ---- The closing handshake, section 7

    def _begin_closing(self, code: int | None, reason: str = "") -> None:
        """Prepares our Close, unless the connection is closing already."""
        if self.state == OPEN:
            self._sender.our_close = close_frame(code, reason)
            self.state = CLOSING
            self.protocol.server_terminated = True
            self.protocol.outcome = code or 1005

    def _take_close(self, body: bytes) -> None:
        """Section 5.5.1: answers the peer's Close with its code, or that of an earlier fault."""
        self.protocol.client_terminated = True
        if body:
            self.protocol.close_code = int.from_bytes(body[:2], "big")
            self.protocol.close_reason = body[2:].decode() or None
        if (fault := self._receiver.fault) and self.state == OPEN:
            self.fail(fault.code, fault.reason)
        self._begin_closing(self.protocol.close_code)

    def fail(self, code: int, reason: str = "") -> None:
        """Section 7.1.7: fails the connection."""
        self._discard_messages()
        self._begin_closing(code, reason)
        if reason:
            self.protocol.warn(f"{code} {reason}")

    def _discard_messages(self) -> None:
        """From now on, no message counts, not even one that waits; but the peer's Close does."""
        self._inbox.shut()
        self._receiver.skip()

    def _lose(self, error: OSError) -> None:
        """The peer is lost. A coroutine that awaits a write is told, and then `_report` logs it."""
        owed = self._wire.backlog or (self._wire.waiting and self.state == OPEN)
        if not self._discards():
            self._receiver.keep(self._wire.receive_last())
        self.close_socket(reset=False)
        if owed and not self._inbox.is_busy():
            self.protocol.warn(f"reply not sent: {error.strerror or error}")

    def close_socket(self, reset: bool) -> None:
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self._table = None
        if self._prefix is not None:
            # EchoHandler can no longer reply, so nothing need be inflated for it.
            self._receiver.skip()
        self.protocol.client_terminated = self.protocol.server_terminated = True
        self._registry.forget(self._wire.fd, self)
        self._wire.close(reset)
        if self.protocol.finished:
            self._registry.remove(self)
        self.settle()

    # ---- Deadlines

    def check(self, now: float) -> None:
        """Called by the sweep. Acts on a deadline that has passed."""
        if now < self._deadlines.due or self.state == CLOSED:
            return
        if not self._watched & READ:
            # Where there is no epoll, nothing else notices.
            self._wire.find_loss()
        receiver = self._receiver
        reads = bool(self._watched & READ) and not receiver.closed
        late = self._deadlines.passed(now, self.state, self._wire, receiver.unfinished, reads)
        if late == "taking":
            self.protocol.outcome = 1008
            self._registry.cut["stalled"] += 1
            self.drop()
            self.protocol.warn("1008 takes nothing")
        elif late == "message":
            # What came before it is handled first.
            receiver.fault = Fault(1008, "message does not go on")
            receiver.skip()
        elif late == "answer":
            self._registry.cut["silent"] += 1
            self.fail(1008, "no answer to a ping")
            # Our Close would not be answered either.
            self.protocol.client_terminated = True
        elif late == "silence":
            self._deadlines.pinged = now
            self._wire.put(control_frame(PING, b""))
        elif late == "closing" and self.state == AWAITING:
            # The peer's Close does not come. Nothing but a FIN follows ours.
            self.state = ENDING
            receiver.take_rest()
        elif late == "closing":
            self.drop(reset=self._wire.held() > 0)
        if late:
            self.settle()


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function` in an empty context, so that what it schedules does not run in the
    context of a connection."""
    return contextvars.Context().run(function, *args)


class Connections:
    """The WebSockets of one event loop: their poller, rounds, deadlines and numbers.

    The object is an attribute of the IOLoop, and lives as long as that. Without `stay`, the poller
    and the sweep of the deadlines exist only while there are connections or visitors.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        # The connections whose socket is not closed, or whose `on_close` has not been called.
        self.open: set[Connection] = set()
        # What is watched, by descriptor; and whether the poller stays while that is nothing.
        self.watched: dict[int, Connection | Visitor] = {}
        self._stays = False
        self._epoll: Any = None
        self._sweeper: asyncio.Task[None] | None = None
        # The applications whose clients are being sent away.
        self.leaving: set[web.Application] = set()

        # For the metrics: the connections so far; the traffic of those that have ended, and their
        # number by code; those that we have cut, and the handshakes refused, by reason.
        self.opened = 0
        self.traffic = Traffic()
        self.closed: Counter[int] = Counter()
        self.cut: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        # The kinds of lines of which the log has too many, each with how many were omitted; all
        # messages without a line, counted apart for speed; and whether the log shows messages.
        self.omitted: dict[str, int] = {}
        self.unshown = 0
        self.shows = log.isEnabledFor(logging.DEBUG)

        # The connections that have more to do, in the order of their next turns.
        self._queue: OrderedDict[Connection, None] = OrderedDict()
        # When the time of this round is over, in time.monotonic(); 0 until it is asked for.
        self._round_ends = 0.0
        # Those that wait for the next round, each of which may be cancelled; and one always done.
        self._waiting: list[asyncio.Future[None]] = []
        self.done: asyncio.Future[None] = asyncio.Future()
        self.done.set_result(None)

        # The clock of the deadlines; and the seconds between looks: at most 1/4 of the shortest.
        self.now = 0.0
        self._period = PERIOD
        # What glibc keeps at the top of the heap grows with the largest block that was ever freed.
        # Without this one, a message of 64 KiB costs 35 page faults: 70 us rather than 25.
        bytes(16 << 20)

    @classmethod
    def current(cls) -> Connections:
        """Returns the Connections of the running event loop, which are made at the first call."""
        attributes = vars(IOLoop.current())
        connections: Connections = attributes.get("_ws_echo") or cls()
        attributes["_ws_echo"] = connections
        return connections

    # ---- The poller: one epoll; or the IOLoop, where there is none

    def register(self, fd: int, who: Connection | Visitor) -> None:
        self._begin()
        known = isinstance(self.watched.get(fd), Visitor)
        self.watched[fd] = who
        if known:
            # A visitor has become a connection. Anything else that had this descriptor was closed
            # without our knowledge, and is no longer in the poller.
            return
        if self._epoll:
            self._epoll.register(fd, READ)
        else:
            outside(IOLoop.current().add_handler, fd, self._ready, READ)

    def watch(self, fd: int, events: int) -> None:
        if self._epoll:
            self._epoll.modify(fd, events)
        else:
            outside(IOLoop.current().update_handler, fd, events)

    def forget(self, fd: int, who: Connection | Visitor) -> None:
        """Called before the socket is closed, unless somebody else has closed it already."""
        if isinstance(who, Connection):
            self._queue.pop(who, None)
        if self.watched.get(fd) is not who:
            return
        del self.watched[fd]
        if not self._epoll:
            IOLoop.current().remove_handler(fd)
        else:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)
        self._end()

    def _ready(self, fd: int, events: int) -> None:
        if who := self.watched.get(fd):
            who.ready(events)

    def poll(self, *_: object) -> None:
        """Serves every socket that is ready. While several are ready at a time, polls again, for at
        most ROUND: going through the event loop each time would take up to an eighth of the time of
        a message."""
        watched, ends = self.watched, time.monotonic() + ROUND
        ready = self._epoll.poll(0)
        while ready:
            for fd, events in ready:
                # What came before in this list may have ended this one.
                if fd in watched:
                    watched[fd].ready(events)
            again = len(ready) > 1 and self._epoll and time.monotonic() < ends
            ready = self._epoll.poll(0) if again else None

    # The IOLoop watches this object, for which it needs these two methods.

    def fileno(self) -> int:
        return int(self._epoll.fileno())

    def close(self) -> None:
        """Ends all connections. IOLoop.close(all_fds=True) calls this, too."""
        self._stays = False
        for connection in list(self.open):
            connection.end()
        self._end()

    def stay(self) -> None:
        """Keeps the poller: when descriptors have run out, another could not be made."""
        self._stays = True
        self._begin()

    def _begin(self) -> None:
        if self._sweeper:
            return
        if hasattr(select, "epoll"):
            self._epoll = select.epoll()
            outside(IOLoop.current().add_handler, self, self.poll, READ)
        self._sweeper = outside(self.loop.create_task, self._sweep())

    def _end(self) -> None:
        if self.watched or self.open or self._stays:
            return
        sweeper, self._sweeper = self._sweeper, None
        if sweeper:
            sweeper.cancel()
        self._period = PERIOD
        if self._epoll:
            IOLoop.current().remove_handler(self)
            self._epoll.close()
            self._epoll = None

    # ---- Connections that come and go

    def add(self, connection: Connection, fd: int) -> None:
        self.register(fd, connection)
        self.open.add(connection)
        if self.sends_away(connection.handler):
            connection.protocol.note_unread()
        self.opened += 1
        limit = connection.protocol.deadlines.shortest(LINGER_TIMEOUT)
        self._period = min(self._period, max(limit / 4, 0.001))
        self.look_at_log()

    def remove(self, connection: Connection) -> None:
        """Adds its numbers to the totals, since `/metrics` must not count backwards."""
        if connection not in self.open:
            return
        self.open.remove(connection)
        self.closed[connection.protocol.outcome] += 1
        self.traffic.add(connection.traffic)
        connection.protocol.release()
        self._end()

    def omits(self, line: str) -> bool:
        """Whether the log has too many of these lines already. Then it only counts this one."""
        if line not in self.omitted:
            return False
        self.omitted[line] += 1
        return True

    def omit(self, line: str) -> None:
        """From now on, such lines are omitted."""
        self.omitted[line] = 0
        if line == RECEIVED:
            self.unshown = 0
        self.look_at_log()

    def show_all(self) -> dict[str, int]:
        """From now on, all lines are shown again. Returns how many of each kind were omitted."""
        omitted, self.omitted = self.omitted, {}
        if RECEIVED in omitted:
            omitted[RECEIVED] = self.unshown
        self.look_at_log()
        return omitted

    def look_at_log(self) -> None:
        self.shows = log.isEnabledFor(logging.DEBUG) and RECEIVED not in self.omitted

    def all_traffic(self) -> Traffic:
        """The traffic of all connections, also of those that have not ended."""
        traffic = dataclasses.replace(self.traffic)
        for connection in self.open:
            traffic.add(connection.traffic)
        return traffic

    async def go_away(self, application: web.Application, seconds: float = 10.0) -> None:
        """Closes the clients of an application with 1001 once they have got the replies that they
        are owed; also clients that connect meanwhile. Drops whoever is left after these seconds."""
        self.leaving.add(application)
        for connection in self._clients(application):
            connection.protocol.note_unread()
            # The caller may be a handler. Nothing that is scheduled here may run in its context.
            outside(connection.enter, connection.settle)
        try:
            await until(lambda: not self._clients(application), time.monotonic() + seconds)
        finally:
            self.leaving.discard(application)
            for connection in self._clients(application):
                connection.end()

    def sends_away(self, handler: web.RequestHandler) -> bool:
        """Whether its application is leaving. Then only what had arrived before is handled."""
        return handler.application in self.leaving

    def _clients(self, application: web.Application) -> list[Connection]:
        return [client for client in self.open if client.handler.application is application]

    # ---- Rounds

    def again(self, connection: Connection) -> None:
        """Queues a connection that has more to do for another turn."""
        self._queue[connection] = None
        self._plan_round()

    def has_time(self) -> bool:
        """Whether slow work may begin: no connection is queued, and the round is not over."""
        self._plan_round()
        return not self._queue and time.monotonic() < self._round_ends

    def _plan_round(self) -> None:
        if not self._round_ends:
            self._round_ends = time.monotonic() + ROUND
            outside(self.loop.call_soon, self._begin_round)

    def next_write(self) -> asyncio.Future[None]:
        """The future is done while the round has time, otherwise in the next round."""
        if self.has_time():
            return self.done
        future: asyncio.Future[None] = asyncio.Future()
        self._waiting.append(future)
        return future

    def _begin_round(self) -> None:
        self._round_ends = time.monotonic() + ROUND
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future_set_result_unless_cancelled(future, None)
        try:
            while self._queue:
                self._queue.popitem(last=False)[0].ready()
                if time.monotonic() >= self._round_ends:
                    break
        finally:
            # Also after a KeyboardInterrupt in a handler.
            self._round_ends = 0.0
            if self._queue or self._waiting:
                self._plan_round()

    # ---- The sweep

    async def _sweep(self) -> None:
        """Looks at all deadlines, over and over. If the event loop ends, ends all connections."""
        before = time.monotonic()
        try:
            while True:
                await asyncio.sleep(self._period)
                now = time.monotonic()
                # If the process was stopped or the event loop was busy, at most two periods of that
                # count against the peers.
                self.now += min(now - before, 2 * self._period)
                before = now
                self.look_at_log()
                await self._check_all()
        except asyncio.CancelledError:
            if self._sweeper is asyncio.current_task():
                self.close()
                raise

    async def _check_all(self) -> None:
        """Checks the connections in slices, between which the event loop goes on."""
        for number, connection in enumerate(list(self.open), 1):
            connection.enter(connection.check, self.now)
            if number % 256 == 0:
                await asyncio.sleep(0)


async def until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110  # no one event tells
        await asyncio.sleep(0.01)


# --------------------------------------------------------------------------------------------- HTTP
# The rules of the handshake and its refusals, who the peer is, and the answers to plain GETs: the
# health check, the metrics and the page.


class Refusal(Exception):  # noqa: N818  # a plain GET is refused as well, and is no error
    """Says why a request is refused, and with which status. The metrics count the reasons; the
    answer and the log have the detail, too."""

    headers: ClassVar[dict[int, dict[str, str]]] = {
        405: {"Allow": "GET"},
        426: {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"},
        503: {"Retry-After": "5"},
    }

    def __init__(self, status: int, reason: str, detail: str = "") -> None:
        self.status = status
        self.reason = reason
        self.text = f"{reason}: {detail}" if detail else reason

    def answer(self, handler: web.RequestHandler, peer: str) -> None:
        """Sends the reason, and what the server has seen of the request."""
        headers = handler.request.headers
        # A plain GET gets 426 as well, but is not worth a line in the log.
        if self.status != 426 or "Sec-WebSocket-Key" in headers or "Upgrade" in headers:
            self.report(peer)
        seen = seen_by_server(handler.request, peer)
        lines = "".join(f"{name}: {value}\n" for name, value in seen)
        handler.set_status(self.status)
        body = f"{self.status}: {self.text}\n\nThe server saw:\n{lines}"
        answer(handler, "text/plain", body, **self.headers.get(self.status, {}))

    def report(self, peer: str) -> None:
        log.warning("[SERVER] error:%d %s, %s", self.status, self.text, peer)
        Connections.current().refused[self.reason] += 1


KEY = re.compile("[A-Za-z0-9+/]{22}==")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~\w-]+", re.ASCII)


def check_handshake(request: httputil.HTTPServerRequest) -> None:
    """RFC 6455 section 4.2.1: raises Refusal if the handshake is not valid."""
    headers = request.headers
    if not has_token(headers, "Upgrade", "websocket"):
        raise Refusal(426, "a WebSocket endpoint needs the header Upgrade: websocket")
    if not has_token(headers, "Connection", "upgrade"):
        raise Refusal(426, "the header Connection: Upgrade is missing")
    version = headers.get("Sec-WebSocket-Version", "")
    if version != "13":
        given = f"it is {printable(version, 40)}" if version else "it is missing"
        raise Refusal(426, "the header Sec-WebSocket-Version must be 13", given)
    if request.version != "HTTP/1.1":
        raise Refusal(400, "a handshake needs HTTP/1.1")
    refuse_body(headers)
    key = headers.get("Sec-WebSocket-Key")
    if key is None or not KEY.fullmatch(key):
        given = f"it is {printable(key, 40)}" if key else "it is missing"
        raise Refusal(400, "the header Sec-WebSocket-Key must be 16 bytes in base64", given)
    if "Origin" in headers:
        try:
            urlsplit(headers["Origin"])
        except ValueError:
            given = printable(headers["Origin"])
            raise Refusal(403, "the header Origin is not a URL", given) from None


def check_subprotocols(headers: httputil.HTTPHeaders) -> None:
    """RFC 6455 section 4.2.1, item 8: raises Refusal if the header is malformed. Only the
    stand-alone server is so strict: some applications carry other data in the header, as Tornado
    allows."""
    if not all(map(TOKEN.fullmatch, offered_protocols(headers))):
        raise Refusal(400, "the header Sec-WebSocket-Protocol must be a list of tokens")


def offered_protocols(headers: httputil.HTTPHeaders) -> list[str]:
    name = "Sec-WebSocket-Protocol"
    return listed(headers[name]) if name in headers else []


def refuse_body(headers: httputil.HTTPHeaders) -> None:
    if "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0":
        raise Refusal(400, "a request may not have a body")


def switching_protocols(headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 101 Switching Protocols\r\n{lines}\r\n".encode("latin-1")


def has_token(headers: httputil.HTTPHeaders, name: str, token: str) -> bool:
    value = headers.get(name, "").lower()
    return value == token or token in listed(value)


def listed(text: str) -> list[str]:
    """RFC 9110 section 5.6.1: returns the items of a comma-separated list, except empty ones."""
    return [item.strip() for item in text.split(",") if item.strip()]


@functools.lru_cache(256)
def normal_origin(text: str) -> str:
    """Returns an origin as browsers write it (RFC 6454 section 6): in lower case, with an IDN in
    punycode, and without the default port of the scheme. Raises ValueError."""
    if text in ("*", "null"):
        return text
    # A host name has at most 253 characters, and a port follows.
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#@]{1,300})/?", text.lower())
    if not match or match[1] in ("ws", "wss"):
        raise ValueError(f"{text!r} is not an origin such as https://example.org")
    parts = urlsplit(match[0])
    host = parts.hostname or ""
    if ":" in host:
        host = str(ipaddress.IPv6Address(host))
    elif re.search("[\u00df\u03c2\u200c\u200d]", host):
        # Python's codec knows IDNA 2003 only. For these characters, browsers differ from it.
        raise ValueError(f"the host name in {text!r} has to be written in punycode (xn--...)")
    else:
        host = host.encode("idna").decode()
        if not re.fullmatch(r"[a-z0-9._-]+", host):
            raise ValueError(f"{text!r} has no valid host name")
    default = {"http": 80, "https": 443}.get(parts.scheme)
    port = f":{parts.port}" if parts.port and parts.port != default else ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


@functools.lru_cache(16)
def parse_origins(origins: str) -> frozenset[str]:
    """Parses a comma-separated list of origins. Raises ValueError."""
    return frozenset(map(normal_origin, listed(origins)))


def is_same_host(origin: str, headers: httputil.HTTPHeaders) -> bool:
    return urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()


def path_of(request: httputil.HTTPServerRequest) -> str:
    """Returns the path of the request target without its query, also if the target has the absolute
    form (RFC 9112 section 3.2.2)."""
    path = request.path
    return path if path.startswith("/") else re.sub(r"^[A-Za-z]+://[^/]*", "", path) or "/"


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# The networks of trusted proxies. The only str is "unix", which stands for all Unix sockets.
Proxies = Collection[ipaddress.IPv4Network | ipaddress.IPv6Network | str]


def parse_address(text: str) -> Address:
    """Parses an IP address in any form that proxies use: in brackets, with a port or a zone, or
    IPv4-mapped. Raises ValueError."""
    bracketed = re.fullmatch(r"\[(.+)\](:\d+)?|([\d.]+):\d+", text.strip().strip('"'))
    host = (bracketed[1] or bracketed[3]) if bracketed else text.strip()
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def parse_proxies(text: str) -> Proxies:
    """Parses the value of --trusted-proxies. Raises ValueError."""
    return ["unix" if item == "unix" else parse_network(item) for item in listed(text)]


def parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    host, slash, bits = text.partition("/")
    address = parse_address(host)
    if slash and address.version == 4 and ":" in host:
        # An IPv4-mapped network, such as ::ffff:192.0.2.0/120.
        bits = str(int(bits) - 96)
    return ipaddress.ip_network(f"{address}{slash}{bits}", strict=False)


# A request passes through few proxies. Of a longer list of addresses, only the last are looked at.
MOST_PROXIES = 32


def peer_of(request: httputil.HTTPServerRequest, proxies: Proxies = ()) -> str:
    """Returns the address of the peer: that of its socket, or the one that Tornado has found in a
    header. Behind trusted proxies, it is the last address in X-Forwarded-For that is not one of
    theirs."""
    address = cast(Any, request.connection).context.address
    is_ip = isinstance(address, tuple)
    if is_ip and request.remote_ip and request.remote_ip != address[0]:
        return str(request.remote_ip)
    peer = name_of(address)
    if proxies:
        host = parse_address(address[0]) if is_ip else "unix"
        forwarded = listed(request.headers.get("X-Forwarded-For", ""))[-MOST_PROXIES:]
        with contextlib.suppress(ValueError):
            while forwarded and is_trusted(host, proxies):
                host = parse_address(forwarded.pop())
                peer = str(host)
    return peer


def name_of(address: Any) -> str:
    """Returns the address of a socket's peer in the form that the log shows."""
    if not isinstance(address, tuple):
        return "unix"
    host, port = address[:2]
    if ":" in host:
        # It is IPv6, perhaps an IPv4-mapped address.
        parsed = parse_address(host)
        host = f"[{parsed}]" if parsed.version == 6 else parsed
    return f"{host}:{port}"


def is_trusted(host: Address | str, proxies: Proxies) -> bool:
    if isinstance(host, str):
        return host in proxies
    return any(host in network for network in proxies if not isinstance(network, str))


def printable(text: str | bytes | bytearray, most: int = 200) -> str:
    """Returns the first characters or bytes of `text`, escaped to be ASCII on one line."""
    if isinstance(text, str):
        return text[:most].encode("unicode_escape").decode()
    return repr(bytes(text[:most]))[2:-1]


def seen_by_server(request: httputil.HTTPServerRequest, peer: str) -> list[tuple[str, str]]:
    """Returns the peer and the headers of a handshake, for people whose proxy drops or changes
    some. Cookies and credentials are left out, since people pass such answers on."""
    shown = re.compile(r"Host|Connection|Upgrade|Origin|Sec-Websocket-.*|X-Forwarded-.*")
    headers = [item for item in sorted(request.headers.get_all()) if shown.fullmatch(item[0])]
    return [
        ("Peer", peer),
        *((n.replace("Websocket", "WebSocket"), printable(v, 1000)) for n, v in headers),
    ]


def answer(handler: web.RequestHandler, media_type: str, body: str, **more: str) -> None:
    headers = {
        "Content-Type": f"{media_type}; charset=utf-8",
        "Vary": "Accept",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    for name, value in (headers | more).items():
        # There may be a Connection: close already.
        set_header = handler.add_header if name == "Connection" else handler.set_header
        set_header(name, value)
    handler.finish(body)


# The name of a metric, its help text, and its values by labels.
Family = tuple[str, str, Mapping[str, float]]


def metrics(connections: Connections) -> str:
    """Returns the metrics in Prometheus's text format, version 0.0.4."""
    lines = []
    for name, text, values in [*connection_metrics(connections), *process_metrics()]:
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"


def connection_metrics(connections: Connections) -> list[Family]:
    messages, sizes = by_type(connections.all_traffic())
    closed = Counter[str]()
    for code, count in connections.closed.items():
        # The codes of applications share two series, so that no peer can create thousands.
        closed[f"{code // 1000}000-{code // 1000}999" if code >= 3000 else str(code)] += count
    by_code = by("code", closed)
    families: list[Family] = [
        ("build_info", "Version of ws-echo.", by("version", {__version__: 1})),
        ("connections", "Open WebSocket connections.", {"": len(connections.open)}),
        ("connections_opened_total", "Connections opened.", {"": connections.opened}),
        ("connections_closed_total", "Connections closed, by code (1006: none).", by_code),
        ("connections_cut_total", "Peers given up on, by reason.", by("reason", connections.cut)),
        ("handshakes_refused_total", "Refusals, by reason.", by("reason", connections.refused)),
        ("messages_total", "Messages, by direction and type.", messages),
        ("message_bytes_total", "Bytes of messages, by direction and type.", sizes),
    ]
    return [(f"ws_echo_{name}", text, values) for name, text, values in families]


def by_type(traffic: Traffic) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the number of messages and the number of their bytes, both by labels."""
    messages, sizes = {}, {}
    for way in ("received", "sent"):
        for kind, plural in (("text", "texts"), ("binary", "binaries")):
            labels = f'{{direction="{way}",type="{kind}"}}'
            messages[labels] = getattr(traffic, f"{plural}_{way}")
            sizes[labels] = getattr(traffic, f"{kind}_bytes_{way}")
    return messages, sizes


def by(label: str, counts: Mapping[Any, int]) -> dict[str, int]:
    return {f'{{{label}="{value}"}}': count for value, count in counts.items()}


def process_metrics() -> list[Family]:
    """Returns what Prometheus's client libraries export about every process, in their words."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    values: dict[str, tuple[float, str]] = {
        "start_time_seconds": (STARTED, "Start time of the process since unix epoch in seconds."),
        "cpu_seconds_total": (
            usage.ru_utime + usage.ru_stime,
            "Total user and system CPU time spent in seconds.",
        ),
        "max_fds": (
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "Maximum number of open file descriptors.",
        ),
    }
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        size = pages * resource.getpagesize()
        values["resident_memory_bytes"] = size, "Resident memory size in bytes."
        # The listing itself needs one of them.
        descriptors = len(os.listdir("/proc/self/fd")) - 1
        values["open_fds"] = descriptors, "Number of open file descriptors."
    return [(f"process_{name}", text, {"": value}) for name, (value, text) in values.items()]


STARTED = time.time()


class PlainGet(routing.Matcher):
    """Matches a GET or HEAD that is no handshake, if it has one of these paths or accepts HTML."""

    def __init__(self, paths: Collection[str]) -> None:
        self.paths = paths

    def match(self, request: httputil.HTTPServerRequest) -> dict[str, Any] | None:
        plain = request.method in ("GET", "HEAD")
        if not plain or has_token(request.headers, "Upgrade", "websocket"):
            return None
        wanted = path_of(request) in self.paths or "text/html" in request.headers.get("Accept", "")
        return {} if wanted else None


# Without this, Tornado would parse the body for some values of Content-Type, but there is none.
@web.stream_request_body
class PlainHandler(web.RequestHandler):
    """Answers plain GETs with the health check, the metrics, or the page."""

    def initialize(self, server: Server) -> None:
        self.server = server

    def prepare(self) -> None:
        self.server.lobby.hurry(self)

    def get(self) -> None:
        server, path = self.server, path_of(self.request)
        if path == "/healthz":
            # A load balancer sends no new clients to a server that answers 503.
            self.set_status(503 if server.stopping else 200)
            answer(self, "text/plain", "stopping\n" if server.stopping else "ok\n")
        elif path == "/metrics" and server.options.metrics:
            answer(self, "text/plain; version=0.0.4", metrics(server.connections))
        else:
            self.show_page()

    head = get

    def show_page(self) -> None:
        seen = seen_by_server(self.request, peer_of(self.request, self.server.proxies))
        rows = (
            f"<dt>{xhtml_escape(name)}</dt><dd>{xhtml_escape(value)}</dd>" for name, value in seen
        )
        page = PAGE.replace("<!--handshake-->", "".join(rows))
        if not self.server.options.scenarios:
            page = page.replace("<details>", "<details hidden>")
        headers = {
            "Content-Security-Policy": page_policy(self.request.host),
            # Browsers give more precise clocks to a cross-origin isolated page.
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Embedder-Policy": "require-corp",
        }
        answer(self, "text/html", page, **headers)


def page_policy(host: str) -> str:
    """Returns the Content-Security-Policy: it allows the page's own style and script, and
    connections to its host, which is named since 'self' excludes ws: in older versions of Safari.
    """
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", PAGE, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(utf8(text)).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    sockets = f" ws://{host} wss://{host}" if re.fullmatch(r"[\w.:\[\]-]+", host) else ""
    return "; ".join([*rules, f"connect-src 'self'{sockets}", "frame-ancestors 'none'"])


# ------------------------------------------------------------------------------------------ Options


def option(
    group: str, default: Any, text: str, metavar: str = "", least: float = 0, most: float = 2**53
) -> Any:
    """Makes a field of Options. `metavar` stands for the value in --help. A number has to be from
    `least` to `most`."""
    metadata = {"group": group, "help": text, "metavar": metavar, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


listening, tls, echo, limits, operation, client = (
    functools.partial(option, group)
    for group in ("Listening", "TLS", "Echo", "Limits", "Operation", "Client")
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Each option, once: flags and the names in the configuration file are made from the fields."""

    address: str = listening("", "address to listen on (default: all IPv4 and IPv6)", "ADDRESS")
    port: int = listening(4000, "port to listen on; 0: any free port", "PORT", 0, 65535)
    reuse_port: bool = listening(False, "share the port with other processes that set this, too")
    unix_socket: str = listening("", "Unix socket to listen on instead of a TCP port", "PATH")
    certfile: str = tls("", "PEM file with the certificate chain; turns TLS on", "FILE")
    keyfile: str = tls("", "PEM file with the private key, if --certfile has none", "FILE")
    client_cafile: str = tls(
        "", "PEM file with CAs; each client needs a certificate from one", "FILE"
    )
    prefix: str = echo("ECHO:", "start of each reply; '' makes the server a mirror", "TEXT")
    origins: str = echo(
        "*", "origins whose pages may connect; *: any; '': only the server's own", "LIST"
    )
    compression: bool = echo(True, "accept permessage-deflate if a client offers it")
    scenarios: bool = echo(True, "let the URL ask for delays, closes, drops and pushes")
    max_message_size: int = limits(
        1 << 20, "largest size of a message, also after inflating", "BYTES", 125
    )
    max_connections: int = limits(
        0, "most WebSockets at a time; 0: as many as there are descriptors for", "NUMBER"
    )
    handshake_timeout: float = limits(
        10.0, "seconds for the TLS handshake, and again for the request", "SECONDS", 0.001
    )
    ping_interval: float = limits(
        30.0, "seconds of silence before a ping is sent; 0: never", "SECONDS"
    )
    ping_timeout: float = limits(30.0, "seconds to wait for a pong; 0: forever", "SECONDS")
    stall_timeout: float = limits(
        60.0, "seconds that a message may make no progress; 0: forever", "SECONDS"
    )
    drain_timeout: float = limits(10.0, "most seconds that stopping takes after SIGTERM", "SECONDS")
    trusted_proxies: str = operation(
        "", "addresses or networks of proxies whose X-Forwarded-For is trusted", "LIST"
    )
    metrics: bool = operation(False, "serve metrics for Prometheus at /metrics")
    log_level: str = operation("debug", "lowest level to log: debug, info, warning, error", "LEVEL")
    config: str = operation("", "TOML file with these options; flags override it", "FILE")
    connect: str = client("", "URL to connect to as a client, instead of serving", "URL")
    send: tuple[str, ...] = client(
        (), "text to send; repeatable (default: the lines of standard input)", "TEXT"
    )
    timeout: float = client(
        10.0, "seconds to wait for the handshake, and for each reply", "SECONDS", 0.001
    )
    cafile: str = client("", "PEM file with the CAs to trust, instead of the system's", "FILE")
    insecure: bool = client(False, "do not verify the server's certificate")


FIELDS = {field.name: field for field in dataclasses.fields(Options)}
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
LEVELS = "debug", "info", "warning", "error"


def check_option(name: str, value: Any) -> Any:
    """Returns the value in the type of the option. Raises ValueError if it is not allowed."""
    field = FIELDS[name]
    kind: Any = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not {KINDS[kind]}")
    least, most = field.metadata["least"], field.metadata["most"]
    if kind in (int, float) and not least <= value <= most:
        raise ValueError(f"{value} is not between {least} and {most}")
    if name == "log_level" and value not in LEVELS:
        raise ValueError(f"{value!r} is not debug, info, warning or error")
    if field.metadata["metavar"] == "FILE" and "\0" in value:
        raise ValueError(f"{value!r} cannot be a file name")
    if name == "trusted_proxies":
        parse_proxies(value)
    if name == "origins":
        parse_origins(value)
    if name == "connect" and not re.match("wss?://", value, re.IGNORECASE):
        raise ValueError(f"{value!r} does not begin with ws:// or wss://")
    return value


def read_config(path: str) -> dict[str, Any]:
    """Reads the configuration file. Raises OSError if this is impossible, and ValueError if an
    option in it is wrong."""
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
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    return options


# ------------------------------------------------------------------------------------------- Server
# The stand-alone server: the lobby, listening sockets, TLS, systemd, and the clean stop.


class CannotServe(Exception):  # noqa: N818  # the error is in the environment
    """The environment keeps the server from starting. The text names the obstacle in one line."""


# The descriptors kept free of WebSockets: for files, listening sockets, handshakes, health checks.
RESERVE = 64
# The most connections that wait in the kernel to be accepted; net.core.somaxconn may allow fewer.
BACKLOG = 4096
# The seconds after the signal to stop in which the clients in the lobby can still send a request.
GRACE = 1.0
# The seconds without accepting after descriptors have run out, and the errors of accept(2) that
# say so.
PAUSE = 0.5
NO_ROOM = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM
# The most bytes in the head of a request (its request line and headers), and what ends it. Tornado
# looks for \r?\n\r?\n, which ends at the same byte, but takes 6 to 100 times as long to find.
HEAD = 16 * 1024
END_OF_HEAD = re.compile(rb"\n\r?\n")


async def run_server(options: Options, reread: Callable[[], Options]) -> int:
    # The level of all other loggers stays WARNING: what Tornado and asyncio log below that is
    # caused by peers.
    lines = LineHandler(Connections.current())
    logging.basicConfig(handlers=[lines])
    log.setLevel(options.log_level.upper())
    # No line shows the thread or the process, and looking them up takes a third of a line's time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # Python loads a codec when it is first used, and by then there may be no descriptor left.
    for codec in ("unicode_escape", "idna"):
        codecs.lookup(codec)
    # The collector passes over the objects that exist now, since they stay. It also runs less
    # often, since connections leave little garbage: it took a tenth of a short connection's time.
    gc.freeze()
    gc.set_threshold(2_000, 10, 10)
    await Server(options, reread, lines).serve()
    return 0


@web.stream_request_body
class ServedHandler(EchoHandler):
    """EchoHandler in the stand-alone server."""

    def initialize(self, server: Server) -> None:
        options = server.options
        self._server = server
        super().initialize(
            prefix=options.prefix,
            compression=options.compression,
            origins=options.origins,
            stall_timeout=options.stall_timeout,
            scenarios=options.scenarios,
        )

    def clear(self) -> None:
        """Sets the default headers of an answer, which takes 8 us and 1 KB. The answer to a visitor
        is not made of them, so they are left out."""
        if not isinstance(self.request.connection, Visitor):
            super().clear()

    def prepare(self) -> None:
        self._server.lobby.hurry(self)

    def _find_peer(self) -> str:
        return peer_of(self.request, self._server.proxies)

    def _check_handshake(self) -> None:
        super()._check_handshake()
        check_subprotocols(self.request.headers)
        self._server.check_room()

    def shake_hands(self) -> tuple[EchoProtocol, bytes]:
        """Does the handshake without Tornado's HTTP server. Returns the protocol and the answer.
        Raises Refusal."""
        # This namespace for templates takes 0.7 KB, and no template is rendered.
        self.ui = None  # type: ignore[assignment]  # as Tornado does it at the end
        self.open_args, self.open_kwargs = (), {}
        self._check_handshake()
        self.ws_connection = protocol = cast(EchoProtocol, self.get_websocket_protocol())
        return protocol, switching_protocols(protocol.negotiate())

    async def _switch_protocols(self, answer: dict[str, str]) -> iostream.IOStream:
        """Does the handshake with Tornado's HTTP server. The same bytes leave."""
        stream = self.detach()
        with contextlib.suppress(iostream.StreamClosedError):
            await stream.write(switching_protocols(answer))
        # Only now: until the answer has left, the lobby dismisses a peer that does not read it.
        self._server.lobby.leave(stream)
        return stream

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == 405:
            refusal = Refusal(405, "the method must be GET", f"it is {self.request.method}")
            refusal.answer(self, self._find_peer())
        else:
            super().write_error(status_code, **kwargs)


class Visitor:
    """A client that has connected but has not completed the handshake. For the request of the
    handshake, it stands in for Tornado's HTTP connection."""

    protocol = "http"
    __slots__ = (
        "address", "answered", "fd", "head", "lobby", "remote_ip", "since", "socket", "stream",
    )  # fmt: skip

    def __init__(self, lobby: Lobby, sock: socket.socket, address: Any) -> None:
        self.lobby = lobby
        self.socket = sock
        self.fd = sock.fileno()
        self.address = address
        # What Tornado calls it, also for a Unix socket. The log shows what `peer_of` finds.
        is_ip = isinstance(address, tuple)
        self.remote_ip = address[0] if is_ip else "0.0.0.0"  # noqa: S104  # nothing is bound to it
        # When it connected or last got an answer, in time.monotonic(); and whether it ever got one.
        self.since = time.monotonic()
        self.answered = False
        # What has been read of its first request, until Tornado's HTTP server takes it.
        self.head = b""
        # Set when Tornado's HTTP server takes over.
        self.stream: HeadCheck | None = None

    @property
    def context(self) -> Visitor:
        return self

    def set_close_callback(self, callback: object) -> None:
        """RequestHandler calls this. The callback is not needed, since the handshake that follows
        awaits nothing."""

    def ready(self, events: int) -> None:
        """Called when bytes have arrived, or the visitor has left."""
        try:
            self.lobby.receive(self)
        except BlockingIOError:
            # The poller was wrong: nothing has arrived.
            pass
        except OSError:
            self.lobby.dismiss(self)
        except Exception:
            log.exception("[SERVER] error:unhandled exception, %s", self)
            self.lobby.dismiss(self)

    def give(self, buf: bytearray | memoryview) -> int:
        """Moves what has been read to `buf`. Returns the number of bytes."""
        given = self.head[: len(buf)]
        buf[: len(given)] = given
        self.head = self.head[len(given) :]
        return len(given)

    def __str__(self) -> str:
        return name_of(self.address)

    def tell(self, answer: bytes) -> None:
        """Sends a last answer, and reads what has arrived: if a socket is closed with bytes unread,
        the kernel sends a reset, which may overtake the answer."""
        with contextlib.suppress(OSError):
            self.socket.send(answer)
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
            for _ in range(16):
                socket.socket.recv(self.socket, READ_SIZE)


class Lobby:
    """The clients that have connected but have not completed the handshake.

    The head of a visitor's first request is read here; with TLS, only its first bytes are peeked
    at. A visitor that sends a valid handshake becomes a WebSocket as soon as that is complete. One
    that speaks another protocol is told so and dismissed. All others are handed over to Tornado's
    HTTP server, with every byte that they have sent. A visitor that sends no request in time is
    dismissed.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        # Used as a set, in the order of `since`.
        self.visitors: OrderedDict[Visitor, None] = OrderedDict()
        # The number of connections accepted so far.
        self.accepted = 0
        # When a line of the log last said that descriptors have run out, in time.monotonic().
        self.said = 0.0
        limit = server.options.handshake_timeout
        self.http = httpserver.HTTPServer(
            server.application,
            idle_connection_timeout=limit,
            body_timeout=limit,
            max_header_size=HEAD,
            max_body_size=0,
        )

    # ---- Arrival

    def watch(self, listener: socket.socket) -> None:
        if not self.server.stopping:
            IOLoop.current().add_handler(listener, self.accept, IOLoop.READ)

    def accept(self, listener: Any, _: int) -> None:
        """Accepts at most 32 connections at a time: if thousands arrive, messages on open
        connections are delayed by 7 ms rather than 45."""
        for number in range(32):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if number:
                    # Without a descriptor, the kernel does not look whether anybody else waits.
                    return
                if error.errno in NO_ROOM and self.make_room():
                    continue
                # The connection stays in the queue, so trying again at once would be a busy loop.
                log.error("[SERVER] error:cannot accept connections: %s", error.strerror)
                IOLoop.current().remove_handler(listener)
                IOLoop.current().call_later(PAUSE, self.watch, listener)
                return
            sock.setblocking(False)
            visitor = Visitor(self, sock, address)
            self.accepted += 1
            self.visitors[visitor] = None
            try:
                self.server.connections.register(visitor.fd, visitor)
            except OSError as error:
                # The kernel has no room for another in the poller.
                log.error("[SERVER] error:cannot serve %s: %s", visitor, error.strerror)
                self.dismiss(visitor)

    def accept_rest(self, listener: socket.socket) -> None:
        """Accepts the connections in the queue of a listening socket, of which there are at most
        BACKLOG, since closing it would reset them."""
        latest = self.accepted + BACKLOG
        before = -1
        while before < self.accepted < latest:
            before = self.accepted
            self.accept(listener, IOLoop.READ)

    def receive(self, visitor: Visitor) -> None:
        """Reads what has arrived, and decides what becomes of the visitor. With TLS, the bytes stay
        in the socket, since OpenSSL has to read them."""
        tls = self.server.tls is not None
        before = visitor.head
        data = visitor.socket.recv(HEAD - len(before), socket.MSG_PEEK if tls else 0)
        if not data:
            self.dismiss(visitor)
            return
        # Even if the head arrives byte by byte, this copy costs less than the system call.
        visitor.head = data = before + data
        end = None if tls else END_OF_HEAD.search(data, max(0, len(before) - 3))
        if end and self.admit(visitor, end.end()):
            return
        # Tornado also gets a head that is too long, and refuses it.
        ready = tls or end or len(data) == HEAD
        if (ready or not before) and self.turn_away(visitor, data, tls):
            return
        if ready:
            self.hand_over(visitor)

    def turn_away(self, visitor: Visitor, data: bytes, tls: bool) -> bool:
        """If a visitor speaks another protocol, tells it so, dismisses it, and returns True."""
        wrong = self.find_stranger(data, tls)
        if wrong:
            log.warning("[SERVER] error:%s, from %s: %s", wrong[0], visitor, wrong[1])
            self.server.connections.refused[wrong[0]] += 1
            visitor.tell(wrong[2])
            self.dismiss(visitor)
        return wrong is not None

    def find_stranger(self, data: bytes, tls: bool) -> tuple[str, str, bytes] | None:
        """If `data` belongs to another protocol, returns what that is, what the log advises, and
        the answer to send. More bytes can change the result from None to something, but not from
        something to None."""
        is_tls = data[:1] == b"\x16"
        line, ended, _ = data.lstrip(b"\r\n").partition(b"\n")
        # A whole request line names the version; the start of one is a method, perhaps unfinished.
        http = re.match(rb"[!-~]+ .*HTTP/1" if ended else rb"[!-~]*( |$)", line)
        if is_tls and not tls:
            return "TLS on a plain port", "use ws:// or --certfile", b""
        if tls and http and not is_tls:
            text = "this port speaks TLS: use wss:// or https://"
            return "plain HTTP on a TLS port", "use wss:// or https://", plain_answer(400, text)
        if is_tls or (http and not tls):
            return None
        if data.startswith(b"PRI * HTTP/2.0"):
            return "HTTP/2", "only HTTP/1.1 is supported", b""
        if data.startswith((b"PROXY ", b"\r\n\r\n\x00\r\nQUIT\n")):
            return "the PROXY protocol", "it is not supported", b""
        return "not HTTP", f"it begins with {printable(data, 40)}", b""

    def admit(self, visitor: Visitor, end: int) -> bool:
        """If the head that ends at `end` is a valid handshake, makes the visitor a WebSocket and
        returns True."""
        head, early = visitor.head[:end], visitor.head[end:]
        if b"websocket" not in head.lower():
            return False
        try:
            request = read_head(head, visitor)
            if request.method != "GET" or "Expect" in request.headers:
                return False
            handler = ServedHandler(self.server.application, request, server=self.server)
            protocol, answer = handler.shake_hands()
        except Refusal:
            return False
        visitor.head = b""
        self.visitors.pop(visitor, None)
        wire = Wire(visitor.socket)
        # The answer leaves before the handler's `open` is called, which may drop the connection.
        wire.send(answer)
        protocol.start(wire, early)
        return True

    def hand_over(self, visitor: Visitor) -> None:
        """Hands the visitor over to Tornado's HTTP server."""
        server, sock = self.server, visitor.socket
        server.connections.forget(visitor.fd, visitor)
        if server.tls is None:
            visitor.stream = HeadCheck(sock, max_buffer_size=1 << 20)
            visitor.stream.visitor = visitor
            self.http.handle_stream(visitor.stream, visitor.address)
            return
        visitor.head = b""
        sock = server.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        stream = TlsHeadCheck(sock, ssl_options=server.tls, max_buffer_size=1 << 20)
        stream.visitor = visitor
        visitor.stream, visitor.socket = stream, sock
        begin = functools.partial(self.begin_request, visitor)
        outside(IOLoop.current().add_future, stream.wait_for_handshake(), begin)

    def begin_request(self, visitor: Visitor, handshake: asyncio.Future[Any]) -> None:
        """Called when the TLS handshake is over. The time for the request begins."""
        if not (handshake.cancelled() or handshake.exception()) and visitor in self.visitors:
            visitor.since = time.monotonic()
            self.visitors.move_to_end(visitor)
            self.http.handle_stream(cast(HeadCheck, visitor.stream), visitor.address)

    # ---- Answers, and the end of a visit

    def on_answer(self, handler: web.RequestHandler) -> None:
        """Called when Tornado has answered a request with anything but 101."""
        stream = cast(Any, handler.request.connection).stream
        visitor = stream.visitor
        visitor.answered, visitor.since = True, time.monotonic()
        if visitor in self.visitors:
            self.visitors.move_to_end(visitor)
        if self.is_crowded():
            IOLoop.current().add_callback(stream.close)

    def hurry(self, handler: web.RequestHandler) -> None:
        """Makes the answer the last one on its connection if the lobby is crowded."""
        if self.is_crowded():
            handler.set_header("Connection", "close")

    def is_crowded(self) -> bool:
        """Whether visitors hold more than half of the descriptors in reserve."""
        return len(self.visitors) > self.server.reserve // 2

    def leave(self, stream: Any) -> None:
        """Called when a stream is closed, or carries a WebSocket from now on."""
        self.visitors.pop(stream.visitor, None)

    def dismiss(self, visitor: Visitor) -> None:
        self.visitors.pop(visitor, None)
        self.server.connections.forget(visitor.fd, visitor)
        (visitor.stream or visitor.socket).close()

    def make_room(self) -> bool:
        """Dismisses the visitor that has been idle for the longest time. Returns False if there is
        none."""
        oldest = next(iter(self.visitors), None)
        if oldest is None:
            return False
        if time.monotonic() >= self.said + 1:
            self.said = time.monotonic()
            log.warning("[SERVER] error:out of descriptors, closing the longest idle: %s", oldest)
        self.dismiss(oldest)
        return True

    def dismiss_idle(self) -> None:
        """Dismisses visitors that do not send a request in time, and those that do not read the
        answer, for which Tornado has no time limit."""
        latest = time.monotonic() - self.server.options.handshake_timeout
        while self.visitors and (oldest := next(iter(self.visitors))).since < latest:
            self.dismiss(oldest)

    def is_quiet(self) -> bool:
        """Whether each visitor has had an answer."""
        return all(visitor.answered for visitor in self.visitors)


class HeadCheck(iostream.IOStream):
    """A stream that tells the peer why a request is refused, before it is closed."""

    visitor: Visitor
    # How many bytes of the head may still arrive, and whether the request line has arrived.
    room = HEAD
    knows_target = False

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        size = self.visitor.give(buf) or super().read_from_fd(buf)
        self.knows_target |= b"\n" in bytes(buf[: min(size or 0, self.room)])
        self.room = max(0, self.room - (size or 0))
        return size

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """Reads the head of a request, and returns it to Tornado unless it is refused."""
        head = await super().read_until_regex(regex, max_bytes)
        self.room, self.knows_target = HEAD, False
        try:
            if not self.visitor.lobby.turn_away(self.visitor, head, tls=False):
                refuse_body(read_head(head, self.visitor).headers)
        except Refusal as refusal:
            self._refuse(refusal)
        if self.closed():
            raise iostream.StreamClosedError
        return head

    def close(self, exc_info: Any = False) -> None:
        if isinstance(exc_info, iostream.UnsatisfiableReadError) and not self.closed():
            status, what = (431, "header") if self.knows_target else (414, "target")
            self._refuse(Refusal(status, f"the {what} of the request has more than {HEAD} bytes"))
        super().close(exc_info)
        self.visitor.lobby.leave(self)

    def _refuse(self, refusal: Refusal) -> None:
        refusal.report(str(self.visitor))
        self.visitor.tell(plain_answer(refusal.status, refusal.text))
        self.close()


class TlsHeadCheck(HeadCheck, iostream.SSLIOStream):
    pass


# The usual header line: a name, and a value without control characters other than a tab. Without
# the ^, a long line that is not one would be searched from each of its characters.
HEADER = re.compile(r"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r\n", re.MULTILINE)


def read_headers(text: str) -> httputil.HTTPHeaders:
    """Returns what HTTPHeaders.parse does, in half of its time, which was a seventh of the time of
    a short connection. An unusual line, or a name that occurs twice, is left to HTTPHeaders.parse.
    """
    # The texts between the matches, and after each of them the two groups of a match.
    parts = HEADER.split(text)
    if parts[-1] == "\r\n" and not any(parts[:-1:3]):
        headers = httputil.HTTPHeaders()
        for name, value in zip(parts[1::3], parts[2::3], strict=True):
            headers[name] = value.strip(" \t")
        if len(headers) == len(parts) // 3:
            return headers
    return httputil.HTTPHeaders.parse(text)


def read_head(head: bytes, visitor: Visitor) -> httputil.HTTPServerRequest:
    """Parses the head of a request. Raises Refusal if Tornado would not accept it."""
    line, _, rest = head.decode("latin-1").lstrip("\r\n").partition("\n")
    start = line.rstrip("\r")
    try:
        start_line, headers = httputil.parse_request_start_line(start), read_headers(rest)
        return httputil.HTTPServerRequest(
            start_line=start_line, headers=headers, connection=cast(Any, visitor)
        )
    except httputil.HTTPInputError as error:
        # Tornado's text then quotes the value, which may be a secret.
        detail = re.split(":? ['\"]", str(error), maxsplit=1)[0]
        raise Refusal(400, "the request cannot be read", detail) from None


def plain_answer(status: int, text: str) -> bytes:
    """Returns an answer like that of Refusal.answer, for use without a handler."""
    head = f"HTTP/1.1 {status} {responses[status]}\r\nConnection: close\r\n"
    body = f"{status}: {text}\n"
    about = f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{about}\r\n{body}".encode("latin-1")


class Server:
    """Serves until a signal stops it. Its constructor opens the listening sockets and reads the TLS
    files, and raises CannotServe if that fails."""

    def __init__(self, options: Options, reread: Callable[[], Options], lines: LineHandler) -> None:
        self.options = options
        self.reread = reread
        self.lines = lines
        self.proxies = parse_proxies(options.trusted_proxies)

        room = descriptor_limit()
        self.reserve = min(RESERVE, room // 2)
        self.max_connections = options.max_connections or room - self.reserve
        self.tls = tls_context(options)
        inherited = inherited_sockets()
        self.sockets = inherited or listening_sockets(options)
        # The sockets that end with this process. Inherited ones may be served by the next process.
        self.own = [] if inherited else self.sockets
        # The socket file to remove at the end, unless it has been replaced by then.
        self.file = socket_file(options.unix_socket) if not inherited else None
        self.urls = ", ".join(urls_of(self.sockets, self.tls is not None))
        self.connections = Connections.current()
        self.systemd = Systemd()
        self.stopping = False
        self.signalled = asyncio.Event()
        self.application = make_app(self)
        self.lobby = Lobby(self)
        self.connections.stay()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        for sock in self.sockets:
            if sock.family != socket.AF_UNIX:
                # Accepted sockets inherit this.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.lobby.watch(sock)
        log.info("[SERVER] listening on %s", self.urls)
        self.systemd.notify("READY=1")
        # The group ends the server if one of the tasks fails.
        async with asyncio.TaskGroup() as group:
            chores = self.keep_systemd_informed(), self.clean_up(), self.flush_lines()
            tasks = [group.create_task(chore) for chore in chores]
            await self.signalled.wait()
            await self.drain()
            for task in tasks:
                task.cancel()
        self.systemd.close()
        log.info("[SERVER] stopped")

    async def flush_lines(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.lines.flush()

    async def clean_up(self) -> None:
        """Dismisses idle visitors. Returns memory to the kernel when many clients have left."""
        import ctypes

        # This function of glibc returns all that is free, not only what is at the top of the heap.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        seen = 0
        while True:
            await asyncio.sleep(min(1.0, self.options.handshake_timeout / 4))
            self.lobby.dismiss_idle()
            left = self.lobby.accepted - len(self.lobby.visitors) - len(self.connections.open)
            if left - seen >= 50:
                seen = left
                # Much of the memory is in reference cycles, which exceptions in Tornado leave.
                gc.collect(2 if len(self.connections.open) < 1_000 else 1)
                trim(0)

    def check_room(self) -> None:
        """Raises Refusal if there may not be another WebSocket."""
        if len(self.connections.open) >= self.max_connections:
            raise Refusal(503, "the server is stopping" if self.stopping else "the server is full")

    def stop(self, number: int) -> None:
        """Called for SIGTERM and SIGINT. The first signal starts a clean stop, and the second ends
        the process at once."""
        if self.stopping:
            self.connections.close()
            sys.exit(128 + number)
        self.stopping = True
        self.signalled.set()

    async def drain(self) -> None:
        """Stops accepting, and sends every client away with 1001. Clients that have connected but
        have not sent a request yet have GRACE seconds for it, so that a restart refuses nobody."""
        count = len(self.connections.open)
        self.systemd.notify(f"STOPPING=1\nSTATUS=stopping with {count} connections")
        for listener in self.sockets:
            IOLoop.current().remove_handler(listener)
            if listener in self.own:
                # Right before closing, since connections that arrive in between are reset.
                self.lobby.accept_rest(listener)
            listener.close()
        if self.file and socket_file(self.file[0]) == self.file:
            with contextlib.suppress(OSError):
                os.unlink(self.file[0])
        seconds = self.options.drain_timeout
        latest = time.monotonic() + seconds
        leaving = asyncio.create_task(self.connections.go_away(self.application, seconds))
        await until(self.lobby.is_quiet, time.monotonic() + min(GRACE, seconds))
        # From now on, handshakes on connections from before are refused, too.
        self.max_connections = 0
        await leaving
        # This is for clients that have completed the handshake since the others were gone.
        await self.connections.go_away(self.application, latest - time.monotonic())

    def reload(self) -> None:
        """Called for SIGHUP: reads the certificate and the log level again. If one of them is
        wrong, nothing changes."""
        self.systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            options = self.reread()
            self.tls = tls_context(self.options)
        except (CannotServe, OSError, ValueError) as error:
            log.error("[SERVER] error:cannot reload, nothing has changed: %s", error)
        else:
            log.setLevel(options.log_level.upper())
            self.connections.look_at_log()
            log.info("[SERVER] reloaded")
        finally:
            self.systemd.notify("READY=1")

    async def keep_systemd_informed(self) -> None:
        """Sends the status and, for the watchdog, WATCHDOG=1. The event loop runs this, so systemd
        restarts a server whose event loop hangs, but not one that is merely busy."""
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        given = os.environ.get("WATCHDOG_USEC", "")
        limit = int(given) / 1e6 if ours and given.isdecimal() else 0.0
        while self.systemd.path:
            # An earlier READY=1 may have been lost.
            state, does = ("", "stopping with") if self.stopping else ("READY=1\n", "serving")
            status = f"{does} {len(self.connections.open)} connections on {self.urls}"
            self.systemd.notify(f"WATCHDOG=1\n{state}STATUS={status}")
            await asyncio.sleep(min(limit / 3 or 5.0, 5.0))


def listening_sockets(options: Options) -> list[socket.socket]:
    path, address = options.unix_socket, options.address
    try:
        if not path:
            return netutil.bind_sockets(
                options.port, address or None, backlog=BACKLOG, reuse_port=options.reuse_port
            )
        check_free(path)
        return [netutil.bind_unix_socket(path, mode=0o660, backlog=BACKLOG)]
    except (OSError, ValueError) as error:
        where = path or f"{address or 'all addresses'}, port {options.port}"
        text = getattr(error, "strerror", None) or str(error)
        raise CannotServe(f"cannot listen on {where}: {text}") from None


def check_free(path: str) -> None:
    """Raises OSError if somebody listens on this socket file. Otherwise it can be replaced."""
    with socket.socket(socket.AF_UNIX) as probe:
        # A blocking socket would wait for a listener whose queue is full.
        probe.setblocking(False)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            with contextlib.suppress(BlockingIOError):
                probe.connect(path)
            raise OSError(None, "it is in use")


def socket_file(path: str) -> tuple[str, int, int] | None:
    """Returns the path, and the device and inode of its file; or None if there is no file, as for
    an abstract socket."""
    with contextlib.suppress(OSError, ValueError):
        if path:
            status = os.stat(path)
            return path, status.st_dev, status.st_ino
    return None


def inherited_sockets() -> list[socket.socket]:
    """Socket activation, see sd_listen_fds(3): returns the sockets that systemd has passed to this
    process, from descriptor 3 on. Raises CannotServe."""
    pid, count, _ = (
        os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = [inherited_socket(number) for number in range(3, 3 + int(count))]
    if sockets:
        log.info("[SERVER] serving on systemd's sockets, not on --address, --port or --unix-socket")
    return sockets


def inherited_socket(number: int) -> socket.socket:
    """Returns the socket of this descriptor. Raises CannotServe if it is not a listening one."""
    families = {socket.AF_INET: "TCP", socket.AF_INET6: "TCP", socket.AF_UNIX: "Unix"}
    try:
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise CannotServe(f"inherited descriptor {number}: {error.strerror}") from None
    # Python has no names for some families and types.
    what = ", ".join(str(getattr(kind, "name", kind)) for kind in (sock.family, sock.type))
    if sock.family not in families or sock.type != socket.SOCK_STREAM:
        raise CannotServe(f"inherited descriptor {number} is not a TCP or Unix socket: {what}")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise CannotServe(f"inherited descriptor {number} does not listen (Accept=yes?): {what}")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


class Systemd:
    """Tells systemd of the state of the server, see sd_notify(3), if systemd has started it."""

    def __init__(self) -> None:
        self.path = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))
        # Kept open, since later there may be no descriptor left.
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)

    def notify(self, state: str) -> None:
        try:
            if self.path:
                self.socket.sendto(state.encode(), self.path)
        except BlockingIOError:
            # Nobody has read the last messages. The next one comes in at most 5 s.
            pass
        except OSError as error:
            log.warning("[SERVER] error:cannot tell systemd: %s", error)
            # Without this, the next calls would fail and log, too.
            self.path = ""

    def close(self) -> None:
        self.path = ""
        self.socket.close()


def urls_of(sockets: list[socket.socket], tls: bool) -> list[str]:
    """Returns the URLs to connect to, with `localhost` if both IPv4 and IPv6 are served."""
    scheme = "wss" if tls else "ws"
    urls = []
    bound = {sock.getsockname()[:2] for sock in sockets}
    for sock in sockets:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            # The name of an abstract socket begins with NUL, see unix(7).
            urls.append(f"{scheme}+unix:{os.fsdecode(name)}".replace("\0", "@"))
            continue
        host, port = name[:2]
        if host in WILDCARDS:
            both = all((wildcard, port) in bound for wildcard in WILDCARDS) or (
                host == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            )
            host = "localhost" if both else WILDCARDS[host]
        urls.append(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/")
    return list(dict.fromkeys(urls))


# The wildcard addresses, and the loopback address of each.
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # nothing is bound to these here


def tls_context(options: Options) -> ssl.SSLContext | None:
    """Returns None without --certfile. Raises CannotServe if a file is unsuitable."""
    if not options.certfile:
        return None
    files = [name for name in (options.certfile, options.keyfile, options.client_cafile) if name]
    try:
        for name in files:
            # The errors of ssl do not name the file that cannot be read.
            open(name, "rb").close()
        purpose = ssl.Purpose.CLIENT_AUTH
        context = ssl.create_default_context(purpose, cafile=options.client_cafile or None)
        context.verify_mode = ssl.CERT_REQUIRED if options.client_cafile else ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # Without a password, OpenSSL would ask for that of an encrypted key at the terminal.
        context.load_cert_chain(options.certfile, options.keyfile or None, password="")
        return context
    except ssl.SSLError as error:
        text = f"cannot use {' with '.join(files)}: {error.reason or error}"
        raise CannotServe(text) from None
    except OSError as error:
        raise CannotServe(f"cannot read {error.filename}: {error.strerror}") from None


def descriptor_limit() -> int:
    """Raises the soft limit to the hard one, and returns it."""
    try:
        import resource
    except ImportError:
        raise CannotServe("the server needs Linux or macOS") from None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# ------------------------------------------------------------------------------------------- Client


async def run_client(options: Options) -> int:
    """Returns 0 if the handshake succeeded and every message was answered, else 1."""
    # Errors are reported below; what Tornado logs about them is not shown.
    logging.basicConfig(handlers=[logging.NullHandler()])
    if sys.stdout:
        cast(Any, sys.stdout).reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        # Tornado accepts the scheme in lower case only.
        url = re.sub("^wss?", lambda match: match[0].lower(), options.connect, flags=re.IGNORECASE)
        request = client_request(url, options)
        connection = await websocket.websocket_connect(request, max_message_size=1 << 30)
        try:
            print("[CLIENT] open()")
            await converse(connection, options)
            return 0
        finally:
            connection.close(1000)
    except BrokenPipeError:
        # Nobody reads standard output. Without this, Python would fail to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        # The error may concern the URL, the host name, the connection, TLS, the handshake, a reply.
        return fail(f"[CLIENT] error:{options.connect}: {explain(error)}")


def explain(error: Exception) -> str:
    """Describes an error in one line; a refused handshake, in the words of the server."""
    response = error.response if isinstance(error, HTTPClientError) else None
    if response and response.headers.get("Content-Type", "").startswith("text/plain"):
        first = response.body.decode(errors="replace").strip().partition("\n")[0]
        first = first.removeprefix(f"{response.code}: ") or response.reason
        return f"HTTP {response.code}: {printable(first)}"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return error.strerror
    return printable(str(error)) or type(error).__name__


def client_request(url: str, options: Options) -> HTTPRequest:
    # Raises ValueError if this is above 65535, which the resolver would accept.
    _ = urlsplit(url).port
    if options.cafile:
        # The errors of ssl do not name the file that cannot be read.
        try:
            open(options.cafile, "rb").close()
        except OSError as error:
            raise ConnectionError(f"cannot read {options.cafile}: {error.strerror}") from None
    return HTTPRequest(
        url,
        connect_timeout=options.timeout,
        request_timeout=options.timeout,
        validate_cert=not options.insecure,
        ca_certs=options.cafile or None,
    )


async def converse(connection: websocket.WebSocketClientConnection, options: Options) -> None:
    """Sends all texts and prints the replies. Raises ConnectionError if a reply is missing."""
    sent = received = 0
    # When the present wait for a reply began.
    since = 0.0

    async def send_all() -> None:
        nonlocal sent, since
        async for text in texts(options.send):
            data = text.encode()
            since = time.monotonic() if sent == received else since
            sent += 1
            await connection.write_message(data)
            # The time for the reply begins when the text has left.
            since = time.monotonic() if sent == received + 1 else since

    sending = asyncio.ensure_future(send_all())
    reading = asyncio.ensure_future(connection.read_message())
    while not sending.done() or received < sent:
        waiting = {reading} if sending.done() else {reading, sending}
        # If a text is sent meanwhile, the time for its reply is not over before that for this wait.
        left = since + options.timeout - time.monotonic() if received < sent else options.timeout
        done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done and received < sent and time.monotonic() >= since + options.timeout:
            raise ConnectionError(f"no reply within {options.timeout:g} s")
        if reading in done:
            message, reading = reading.result(), asyncio.ensure_future(connection.read_message())
            if message is None:
                code, missing = connection.close_code, max(sent, len(options.send)) - received
                how = f"closed with {code}" if code else "closed without a code"
                raise ConnectionError(f"{how}, replies missing: {missing}")
            received += 1
            since = time.monotonic()
            print("[CLIENT] Received:", shown(message))
    # Raises if not everything could be read or encoded.
    sending.result()


def shown(message: str | bytes) -> str:
    """Returns a message as it is printed: what a server sends must not control the terminal."""
    if isinstance(message, bytes):
        return printable(message)
    return escaped(message) if sys.stdout and sys.stdout.isatty() else message


async def texts(given: tuple[str, ...]) -> AsyncIterator[str]:
    """Yields the texts to send: those of --send, or else the lines of standard input."""
    queue: asyncio.Queue[str | OSError | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    # So that no more lines than these are read ahead.
    room = threading.Semaphore(1000)

    def read() -> None:
        end = None
        try:
            with open(0, errors="surrogateescape", closefd=False) as file:
                for text in given or (line.rstrip("\n") for line in file):
                    room.acquire()
                    loop.call_soon_threadsafe(queue.put_nowait, text)
        except OSError as error:
            end = error
        loop.call_soon_threadsafe(queue.put_nowait, end)

    # A thread reads, since some kinds of standard input, such as files, cannot be polled.
    threading.Thread(target=read, daemon=True).start()
    while isinstance(text := await queue.get(), str):
        room.release()
        yield text
    if text:
        raise ConnectionError(f"cannot read standard input: {text.strerror}")


# ------------------------------------------------------------------------------------- Command line

__version__ = "1.0.0"
# The most lines of one kind that the log shows in a second.
LINES_A_SECOND = 50
# The most characters in a line.
LONGEST_LINE = 2_000
# Characters that could control a terminal or disguise a text: C0 and C1 controls, line and
# paragraph separators, invisible characters, those that change the direction of text, surrogates.
UNSAFE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def escaped(text: str) -> str:
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class LineHandler(logging.Handler):
    """Writes each event to standard error as one line. It limits the lines of a kind, escapes what
    peers could forge lines with, and never waits for the reader of a pipe."""

    def __init__(self, connections: Connections) -> None:
        super().__init__()
        self.connections = connections
        self.fd = 2
        if os.isatty(2):
            # A write to a terminal that nobody reads may wait although there is room for some
            # bytes. This open file is our own, so O_NONBLOCK does not reach other programs.
            with contextlib.suppress(OSError):
                self.fd = os.open(os.ttyname(2), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        # The last line has not been written to its end.
        self.torn = False
        status = os.fstat(2)
        # Whether standard error goes to the journal: see $JOURNAL_STREAM in systemd.exec(5).
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        # Lines since the last flush, by kind and level.
        self.counts: Counter[tuple[str, int]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        kind = text, record.levelno
        self.counts[kind] += 1
        if self.counts[kind] <= LINES_A_SECOND:
            self.write(record)
        elif text in FREQUENT and text not in self.connections.omitted:
            # Until the next flush, connections only count such lines instead of logging them.
            self.connections.omit(text)

    def flush(self) -> None:
        """Says how many lines of each kind were left out. Called each second, and at exit."""
        for line, number in self.connections.show_all().items():
            self.counts[line, FREQUENT[line]] += number
        counts, self.counts = self.counts, Counter()
        for (kind, level), number in counts.items():
            if number > LINES_A_SECOND:
                text = f"… and {number - LINES_A_SECOND:,} more: {kind.partition('%')[0].strip()}"
                self.write(logging.makeLogRecord({"levelno": level, "msg": text}))

    def write(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        except Exception as error:
            where = f"{record.pathname}:{record.lineno}"
            text, trace = f"cannot format what {where} logs: {type(error).__name__}", ""
        priorities = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>"}
        head = priorities.get(record.levelno, "<3>")
        if not self.journal:
            head = logging.Formatter().formatTime(record) + " "
        # The lines of a traceback are indented, so that an exception's text cannot pass for events.
        indented = (f"  {line}" for line in trace.split("\n") if line)
        for line in (text, *indented):
            data = (head + escaped(line[:LONGEST_LINE]))[:LONGEST_LINE].encode() + b"\n"
            with contextlib.suppress(OSError):
                # A pipe that nobody reads must not block the server.
                if select.select([], [self.fd], [], 0)[1]:
                    data = b"\n" * self.torn + data
                    self.torn = os.write(self.fd, data) < len(data)


def make_parser() -> argparse.ArgumentParser:
    about = "A WebSocket server that answers every message X with ECHO:X."
    usage = "%(prog)s [options]"
    parser = argparse.ArgumentParser("echo_server.py", usage, about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ws-echo {__version__}")
    for title, fields in itertools.groupby(FIELDS.values(), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in fields:
            flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
            if field.default not in ("", (), False, True):
                text += f" (default: {str(field.default).removesuffix('.0')})"
            group.add_argument(flag, help=text, default=argparse.SUPPRESS, **how_to_parse(field))
    return parser


def how_to_parse(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if isinstance(field.default, bool):
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    if field.default == ():
        return {"action": "append", "metavar": field.metadata["metavar"]}
    parse = functools.partial(parse_option, field.name)
    return {"type": parse, "metavar": field.metadata["metavar"]}


def parse_option(name: str, text: str) -> Any:
    try:
        # The text is UTF-8 in every locale. UnicodeDecodeError is a ValueError.
        value: Any = os.fsencode(text).decode()
        with contextlib.suppress(ValueError):
            value = cast(Any, type(FIELDS[name].default))(value)
        return check_option(name, value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args(argv: list[str] | None) -> Options:
    """Returns the options: flags override the configuration file, which overrides the defaults.
    Raises SystemExit(2) after printing what is wrong with a flag, OSError if the configuration file
    cannot be read, and ValueError if it is wrong, or if options do not go together."""
    given = vars(make_parser().parse_args(argv))
    given["send"] = tuple(given.get("send", ()))
    config = read_config(given["config"]) if given.get("config") else {}
    options = Options(**config | given)
    if (options.keyfile or options.client_cafile) and not options.certfile:
        raise ValueError("--keyfile and --client-cafile need --certfile")
    return options


def fail(text: str, code: int = 1) -> int:
    # If standard error is closed, only the exit code tells of the failure.
    with contextlib.suppress(OSError):
        if sys.stderr:
            print(escaped(text), file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 after a clean stop, 1 if the server cannot serve or the client was
    not answered, 2 for wrong options, 70 after an unhandled exception, and 130 if the client was
    interrupted. Raises SystemExit: with 2 if
    a flag is wrong, and with 128 plus the number of the signal after the second one."""
    # If a standard stream is closed, /dev/null takes its descriptor before a socket can.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    try:
        options = parse_args(argv)
    except OSError as error:
        return fail(f"echo_server: cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
        return fail(f"echo_server: {error}", 2)
    reread = functools.partial(parse_args, argv)
    try:
        return asyncio.run(run_client(options) if options.connect else run_server(options, reread))
    except CannotServe as error:
        return fail(f"echo_server: {error}")
    except KeyboardInterrupt:
        return 130
    except Exception:
        # With this exit code, systemd restarts the server.
        log.exception("[SERVER] error:unhandled exception, the server ends")
        return os.EX_SOFTWARE


# --------------------------------------------------------------------------------------------- Page

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ws-echo</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --bg: #f3f5f9; --card: #fff; --ink: #1a2230; --dim: #566173;
  --line: #dde2ea; --accent: #1a56c4; --ok: #0a6b39; --bad: #b3261e; --mid: #a34700; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #11141a; --card: #1a1f28; --ink: #e6e9ef; --dim: #a4aebe; --line: #313947;
    --accent: #8bb4ff; --ok: #6fd39b; --bad: #ff9d93; --mid: #ffb366; } }
* { box-sizing: border-box; margin: 0; min-width: 0; padding: 0; }
body { background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }
main, .pair, .pair > div { display: grid; gap: 1rem; }
section, details { background: var(--card); border: 1px solid var(--line); border-radius: 9px; }
section, details { padding: 1em; }
h2 { font-size: 1.05rem; margin-bottom: .5rem; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: end; }
.grow { flex: 1 1 11rem; }
label { display: grid; gap: .2rem; font-size: .875rem; }
label.row { padding: .7rem 0; }
.dim, label, dt, small { color: var(--dim); }
input, select, button { font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--dim); border-radius: 8px; padding: 0 .75rem; height: 2.6rem; }
[type=checkbox] { height: 1.2rem; }
button, summary { font-weight: 600; cursor: pointer; }
#send { background: var(--accent); border-color: var(--accent); color: var(--card); }
:disabled, [aria-disabled=true] { opacity: .5; cursor: auto; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
code, dd, #message, #log p { font: .875rem/1.5 ui-monospace, monospace; white-space: pre-wrap; }
dd, summary { margin-bottom: .3rem; }
#note { margin-top: .5rem; }
#state, #median { font-size: 1.25rem; font-weight: 650; }
#state::before { content: '● '; }
.open #state, .received b { color: var(--ok); }
.shut #state, .error { color: var(--bad); }
a, .sent b { color: var(--accent); }
.mid { color: var(--mid); fill: var(--mid); font-weight: 650; }
#plot { width: 100%; height: 15rem; padding: 22px 0 28px 64px; overflow: visible; }
circle { fill: var(--accent); }
line { stroke: var(--line); }
line.mid { stroke: var(--mid); stroke-width: 2; stroke-dasharray: 6 4; }
text { font-size: 12px; text-anchor: end; fill: var(--dim); }
text { stroke: var(--card); stroke-width: 5; paint-order: stroke; }
#feed { height: 20rem; overflow: auto; }
#log li { border-top: 1px solid var(--line); padding: .3rem .1rem; list-style: none; }
#log:empty::before { content: 'None yet. Press Send.'; color: var(--dim); }
@media (min-width: 60rem) {
  .pair { grid-template: auto / 3fr 2fr; }
  #feed { height: 27rem; }
  #note { min-height: 1.5rem; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } }
</style><main><header><h1>ws-echo</h1>
  <p class="dim">A WebSocket server that sends every message back to you.</p></header>
<section class="row"><div class="grow"><div id="status" role="status">
    <p id="state"><noscript>This page needs JavaScript.</noscript></p><p id="detail"></p>
    <p id="failed" hidden>The handshake failed. The usual reason is a proxy that drops the Upgrade
      header: see <a href="#handshake">what the server saw of this page's request</a>.</p></div>
    <p class="dim">URL: <code id="url"></code></p></div>
  <div class="row"><button id="connect" data-in="shut">Connect</button>
    <button id="disconnect" data-in="wait open">Disconnect</button></div></section>
<div class="pair"><div><section><h2>Send a message</h2><form id="compose" class="row">
    <label>Kind <select id="kind"><option>text<option value="hex">hex bytes</select></label>
    <label class="grow">Message <input id="message" value="hello" aria-describedby="note"
      autocomplete="off" autocapitalize="off" spellcheck="false"></label>
    <div class="row"><button id="send" data-in="open">Send</button>
      <button type="button" id="send100" data-in="open">Send 100</button></div></form>
    <p id="note" role="status"></p></section>
  <section><h2 id="times">Round-trip time</h2><p class="dim" id="summary">Median
    <output id="median" class="mid" aria-live="off"></output> <span id="stats"></span></p>
    <svg id="plot" role="img" aria-labelledby="times summary"></svg></section></div>
  <section><div class="row"><h2 class="grow">Messages</h2><button id="clear">Clear</button></div>
    <div id="feed" role="log" aria-live="polite" aria-label="Messages" tabindex="0">
      <ol id="log"></ol></div></section></div>
<section id="handshake"><h2>What the server saw of this page's request</h2>
  <dl><!--handshake--></dl></section>
<details><summary>Scenarios: make the server misbehave</summary><form id="scenarios" class="row">
  <label>Delay (seconds) <input type="number" name="delay" min="0" step="any"></label>
  <label>Close code <input type="number" name="close" min="1000" max="4999"></label>
  <label class="grow">Close reason <input name="reason"></label>
  <label>After (messages) <input type="number" name="after" min="0"></label>
  <label class="row"><input type="checkbox" name="drop" value="1"> Drop, with no close frame</label>
  <label class="row"><input type="checkbox" name="push" value="1"> Push messages</label>
  <button>Apply</button></form></details></main><script>
const $ = id => document.getElementById(id);
const url = location.origin.replace(/^http/, 'ws') + location.pathname + location.search;
const MAX = 200;
const SCALE = [.01, .1, 1, 10, 100, 1e3, 1e4, 1e5].flatMap(t => [t, 2 * t, 5 * t]);
const CODES = { 1000: 'normal closure', 1001: 'going away', 1002: 'protocol error',
  1003: 'unsupported data', 1005: 'no code given', 1006: 'connection lost without a close frame',
  1007: 'invalid data', 1008: 'policy violation', 1009: 'message too big',
  1010: 'extension missing', 1011: 'server error', 1012: 'restart', 1013: 'try again later',
  1015: 'TLS failure', 3: 'registered use', 4: 'private use' };
const HIDDEN = /[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const visible = text => text.replace(HIDDEN, c => c < ' '
  ? String.fromCharCode(c.charCodeAt() + 0x2400) : `\\u{${c.charCodeAt().toString(16)}}`);
// Every value in a template that is tagged with "markup" is escaped.
const safe = value => String(value).replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`);
const markup = (parts, ...values) => String.raw({ raw: parts }, ...values.map(safe));
let [ws, pending, samples, fresh] = [null, [], [], []];
const running = () => pending.some(sent => sent.left > 0);
// Browsers may round their clocks: of a time below the smallest step, no more is known.
const clock = new Set();
for (let i = 0; clock.size < 9 && i < 1e6; i++) clock.add(performance.now());
const steps = [...clock].map((now, i, all) => now - all[i - 1] || 100);
const step = Math.max(.01, Math.min(...steps).toPrecision(3));
const ms = t => t < step * .99 ? `< ${step} ms` : t.toFixed(t < 10 ? 2 : 1) + ' ms';
function show(state, title, detail) {
  $('failed').hidden = state !== 'shut' || $('status').className === 'open';
  $('status').className = state;
  $('state').textContent = title;
  $('detail').textContent = detail;
  for (const b of document.querySelectorAll('[data-in]')) b.disabled = !b.dataset.in.match(state);
  if (document.activeElement.disabled) $(state === 'shut' ? 'connect' : 'disconnect').focus(); }
function say(text, error = false) {
  $('note').textContent = text;
  $('note').className = error ? 'error' : 'dim';
  $('message').setAttribute('aria-invalid', error); }
function connect() {
  show('wait', 'Connecting…', '');
  ws = new WebSocket(url);
  ws.binaryType = 'arraybuffer';
  ws.onopen = () => show('open', 'Connected',
    `Subprotocol: ${ws.protocol || 'none'}. Extensions: ${ws.extensions || 'none'}.`);
  ws.onmessage = receive;
  ws.onclose = closed; }
function closed({ code, reason }) {
  const title = $('status').className === 'open' ? 'Closed' : 'Could not connect';
  const meaning = CODES[code] || CODES[Math.floor(code / 1000)] || '?';
  const why = reason ? 'Reason: ' + visible(reason) : 'No reason given.';
  show('shut', title, `Close code ${code}: ${meaning}. ${why}`);
  if (running()) say('Send 100 stopped: the connection closed.');
  pending = [];
  draw(); }
// Of "Send 100", each goes when the reply to the one before has come; "left" counts down.
function submit(left) {
  const text = $('message').value;
  const hex = $('kind').value === 'hex';
  const bad = hex && !/^(\s*[0-9a-f]{2})*\s*$/i.test(text);
  say(bad ? 'Not hex bytes: give two digits (0-9, a-f) for each byte, such as 48 65 6c.' : '', bad);
  if (bad) $('message').focus();
  else send(hex ? Uint8Array.from(text.match(/\w\w/g) || [], x => parseInt(x, 16)) : text, left); }
function send(data, left) {
  pending.push({ data, left, at: performance.now() });
  if (ws.readyState !== WebSocket.OPEN) return;
  ws.send(data);
  later('sent', data); }
function receive({ data }) {
  const now = performance.now();
  const push = !pending.length || String(data).startsWith('PUSH:') && data !== pending[0].data;
  const sent = push ? {} : pending.shift();
  later('received', data, push ? ', unsolicited' : ', ' + ms(now - sent.at));
  if (!push) samples = [...samples, now - sent.at].slice(-MAX);
  if (sent.left > 1) send(sent.data, sent.left - 1);
  if (sent.left === 1) say('All 100 replies came.'); }
// Drawing waits, so that it is not part of the time that is measured.
function later(way, data, extra = '') {
  if (fresh.length === 0) setTimeout(draw, 30);
  fresh.push({ way, data, extra, at: new Date() }); }
function row({ way, data, extra, at }) {
  const text = typeof data === 'string';
  const bytes = text ? new TextEncoder().encode(data) : new Uint8Array(data);
  const hex = Array.from(bytes.slice(0, 100), byte => byte.toString(16).padStart(2, '0')).join(' ');
  const body = (text ? visible(data.slice(0, 300)) : hex) || '(empty)';
  const more = (text ? data.length > 300 : bytes.length > 100) ? ' …' : '';
  const size = `${text ? 'text' : 'binary'}, ${bytes.length} byte${bytes.length === 1 ? '' : 's'}`;
  const time = new Date(at - at.getTimezoneOffset() * 6e4).toISOString().slice(11, 23);
  return markup`<li class="${way}"><small>${time} <b>${way === 'sent' ? '↑' : '↓'} ${way}</b> ${
    size + extra}</small><p>${body + more}</p></li>`; }
function draw() {
  const feed = $('feed');
  const atEnd = feed.scrollHeight - feed.scrollTop - feed.clientHeight < 40;
  feed.setAttribute('aria-live', running() || fresh.length > 9 ? 'off' : 'polite');
  $('send100').setAttribute('aria-disabled', running());
  $('log').insertAdjacentHTML('beforeend', fresh.splice(0).slice(-MAX).map(row).join(''));
  while ($('log').children.length > MAX) $('log').firstChild.remove();
  if (atEnd) feed.scrollTop = feed.scrollHeight;
  const n = samples.length;
  const sorted = [...samples].sort((a, b) => a - b);
  const mid = (sorted[(n - 1) >> 1] + sorted[n >> 1]) / 2;
  const at = i => ms(sorted[i]);
  $('median').textContent = n ? ms(mid) : '-';
  $('stats').textContent = n === 0 ? 'no replies'
    : `min ${at(0)}, p95 ${at(Math.ceil(n * .95) - 1)}, max ${at(n - 1)}, count ${n}`;
  plot(n ? sorted[0] : .1, mid, n ? sorted[n - 1] : .9); }
function plot(min, mid, max) {
  const low = SCALE.filter(t => t <= Math.max(min, step)).pop();
  const high = SCALE.find(t => t > Math.max(max, step));
  const grid = SCALE.filter(t => t >= low && t <= high && (high / low < 1e3 || /1/.test(t)));
  const x = i => 99 * i / Math.max(19, samples.length - 1);
  const y = t => 100 - 100 * Math.log(Math.max(t, step) / low) / Math.log(high / low);
  const line = (t, x, dy, text, name = '') => markup`
    <line class="${name}" x1="-6" x2="100%" y1="${y(t)}%" y2="${y(t)}%"/>
    <text class="${name}" x="${x}" y="${y(t)}%" dy="${dy}">${text}</text>`;
  $('plot').innerHTML = [...grid.map(t => line(t, -14, 4, t + ' ms')),
    ...samples.map((t, i) => markup`<circle cx="${x(i)}%" cy="${y(t)}%" r="3"/>`),
    '<text x="100%" y="100%" dy="24">replies in order, logarithmic scale</text>',
    samples.length ? line(mid, '100%', -7, 'median ' + ms(mid), 'mid') : ''].join(''); }
const query = new URLSearchParams(location.search);
const fields = [...$('scenarios').querySelectorAll('[name]')];
for (const field of fields.filter(field => query.has(field.name))) {
  $('scenarios').parentNode.open = true;
  if (field.type === 'checkbox') field.checked = query.get(field.name) !== '0';
  else field.value = query.get(field.name); }
$('scenarios').onsubmit = () => {
  for (const field of fields) query.delete(field.name);
  for (const [name, value] of new FormData($('scenarios'))) if (value) query.set(name, value);
  location.search = query; };
$('clear').onclick = () => {
  samples = [];
  draw();
  $('log').replaceChildren(); };
document.onsubmit = event => event.preventDefault();
$('compose').onsubmit = () => submit(0);
$('compose').oninput = () => say('');
$('send100').onclick = () => running() || submit(100);
$('connect').onclick = connect;
$('disconnect').onclick = () => ws.close(1000);
$('url').textContent = url;
connect();
draw();
</script></html>"""


if __name__ == "__main__":
    sys.exit(main())
