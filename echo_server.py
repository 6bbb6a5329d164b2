#!/usr/bin/env python3
"""draft"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import hashlib
import logging
import re
import socket
import struct
import sys
import weakref
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

from tornado import gen
from tornado.escape import json_encode, utf8
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream, StreamClosedError

# The one private name: the C function that Tornado's own protocol masks with (a Python loop takes 300 times as long).
from tornado.util import _websocket_mask as unmask
from tornado.web import Application
from tornado.websocket import WebSocketClosedError, WebSocketHandler, WebSocketProtocol

log = logging.getLogger("echo_server")

# -------------------------------------------------------------------------------------------------- Handler


class EchoHandler(WebSocketHandler):
    def initialize(
        self,
        prefix: str = "ECHO:",
        compression: bool = True,
        origins: Collection[str] | None = None,
        stall_timeout: float = 60.0,
    ) -> None:
        self.prefix, self.compression, self.origins, self.stall_timeout = (
            prefix,
            compression,
            origins,
            stall_timeout,
        )

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        return Connection(self, self.stall_timeout)

    def get_compression_options(self) -> dict[str, Any] | None:
        return {} if self.compression else None

    def open(self, *args: str, **kwargs: str) -> None:
        log.info("[SERVER] connection() from %s %s", 0, 0)

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        if isinstance(message, str):
            future = self.write_message(self.prefix + message)
        else:
            future = self.write_message(self.prefix.encode() + message, binary=True)
        if not future.done():
            future.add_done_callback(self.on_reply)
        return None

    def on_reply(self, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()):
            log.warning("[SERVER] error:%s", error)

    def check_origin(self, origin):
        return True


# --------------------------------------------------------------------------------------------------- Frames
# RFC 6455 sections 5 to 8 and RFC 7692 without I/O: bytes in, events out; messages in, bytes out.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes, section 5.2
FIN, RSV1, MASK = 0x80, 0x40, 0x80
CLOSE_CODES = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}  # section 7.4, IANA's registry

Event = tuple[int, bytes]  # opcode and payload of a whole message or a control frame, validated

TURN = 256 * 1024  # bytes of events taken at a time, so that one peer does not keep the others waiting
EVENT = 512  # what an event counts beside its bytes: 512 of them are half a millisecond of work
MAX_FRAGMENTS = 131_072  # frames of a message; Autobahn sends 65,536
MAX_EMPTY = 1_024  # of them without a byte


class Fault(Exception):
    """The peer's fault, which fails the connection with this close code (RFC 6455 section 7.1.7)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
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
    if payload and (len(payload) == 1 or int.from_bytes(payload[:2], "big") not in CLOSE_CODES):
        raise Fault(1002, "close code may not be sent")
    check_text(payload[2:], final=True)


def check_frame(first: int, second: int, deflate: bool, unfinished: int) -> None:
    """Sections 5.1 to 5.5: the first two bytes of a frame; `unfinished` is the opcode of a message, or 0."""
    opcode, length = first & 0x0F, second & 0x7F
    if not second & MASK:
        raise Fault(1002, "frame is not masked")
    if first & 0x70 and not (first & 0x70 == RSV1 and deflate and opcode in (TEXT, BINARY)):
        raise Fault(1002, "reserved bit is set")
    if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        raise Fault(1002, "opcode is not known")
    if opcode >= CLOSE:
        if length > 125 or not first & FIN:
            raise Fault(1002, "control frame is fragmented or too long")
    elif (opcode == CONTINUATION) != bool(unfinished):
        raise Fault(1002, "continuation is missing" if unfinished else "nothing to continue")


class Receiver:
    """What one peer sends: `feed` it bytes, take the `events` that are complete.

    Section 5.2, a frame:    FIN RSV1-3 opcode(4), MASK length(7), 0, 2 or 8 bytes of length, key(4), payload
    Section 5.4, a message:  a frame with its opcode, then any number with opcode 0, FIN on the last of them;
                             control frames may stand in between
    RFC 7692 section 7.2.2:  RSV1 on the first frame: the payloads of all frames are one deflate stream
    """

    __slots__ = (
        "_data", "_deflate", "_empty", "_final", "_fragments", "_inflater", "_key", "_left", "_limit",
        "_message", "_opcode", "_tail", "_wire", "done", "fault", "more", "received",
    )  # fmt: skip

    def __init__(self, limit: int, deflate: bool = False) -> None:
        self._limit = limit  # bytes of a message, before and after inflating
        self._deflate = deflate  # permessage-deflate is agreed on
        self.done = False  # a Close or a fault has come: nothing behind it is looked at
        self.fault: Fault | None = None
        self.more = False  # `events` stopped at TURN: take the rest before feeding again
        self.received = 0  # payload bytes of unfinished messages, ever
        self._data = b""  # fed and not parsed: less than a header or control frame, or what is behind TURN
        self._left = 0  # bytes still to come of the present data frame
        self._final = True  # that frame ends its message
        self._key = b""
        self._begin_message(0)

    def _begin_message(self, opcode: int, compressed: bool = False) -> None:
        self._opcode = opcode  # of the unfinished message; 0: there is none
        self._message: bytes | bytearray = b""
        self._wire = self._fragments = self._empty = 0  # its bytes as sent, its frames, those without a byte
        self._tail = b""  # the unfinished character at the end of its text
        self._inflater = zlib.decompressobj(-15) if compressed else None

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """Changes with every byte of an unfinished message or frame; None when there is none."""
        return (self.received, len(self._data)) if self._opcode or self._data else None

    def feed(self, data: bytes) -> None:
        if not self.done:
            self._data = self._data + data if self._data else data

    def events(self) -> list[Event]:
        """What has become complete, TURN bytes at most. Look at `fault` behind them, and at `more`."""
        events: list[Event] = []
        try:
            self._parse(events)
        except Fault as fault:
            self.fault, self.done, self.more, self._data = fault, True, False, b""
            self._begin_message(0)
        return events

    def _parse(self, events: list[Event]) -> None:
        data, pos, end, budget = self._data, 0, len(self._data), TURN
        while budget > 0 and end - pos >= (1 if self._left else 2):
            if self._left:
                stop = min(pos + self._left, end)
                self._left -= stop - pos
                self._add_payload(data[pos:stop])
                pos = stop
                if not self._left and self._final:
                    budget -= self._end_message(events)
                continue
            first, second = data[pos], data[pos + 1]
            if 0x80 <= second < 0xFE and 0x80 < first < 0x83 and not self._opcode:
                stop = pos + second - 0x7A  # nearly all frames: a whole message of at most 125 bytes
                if stop <= end:
                    payload = unmask(data[pos + 2 : pos + 6], data[pos + 6 : stop])
                    if first == 0x81 and not payload.isascii():
                        check_text(payload, final=True)
                    events.append((first & 0x0F, payload))
                    budget -= EVENT
                    pos = stop
                    continue
            check_frame(first, second, self._deflate, self._opcode)
            start, length = pos + 2, second & 0x7F
            if length > 125:
                start += 2 if length == 126 else 8
                if start > end:
                    break
                length = extended_length(data[pos + 2 : start])
            opcode, stop = first & 0x0F, start + 4 + length
            if opcode < CLOSE:
                self._check_size(bool(first & RSV1 or self._inflater), length)
                if start + 4 > end:
                    break
                self._begin_frame(first, length, data[start : start + 4])
                pos = start + 4
                if not length and self._final:
                    budget -= self._end_message(events)
            elif stop <= end:
                payload = unmask(data[start : start + 4], data[start + 4 : stop])
                if opcode == CLOSE:
                    check_close(payload)
                    self.done, end = True, stop  # section 1.4: what comes after a Close is discarded
                events.append((opcode, payload))
                budget -= EVENT
                pos = stop
            else:
                break
        self._data = data[pos:end]
        self.more = budget <= 0 and pos < end

    def _begin_frame(self, first: int, length: int, key: bytes) -> None:
        if first & 0x0F != CONTINUATION:
            self._begin_message(first & 0x0F, bool(first & RSV1))
        self._final, self._left, self._key = bool(first & FIN), length, key
        self._wire += length
        self.received += 1
        self._fragments += 1
        if self._fragments > MAX_FRAGMENTS:
            raise Fault(1008, "too many fragments")
        if not length:
            self._count_empty()

    def _check_size(self, compressed: bool, length: int) -> None:
        """Before a byte of the payload is accepted. Deflate makes some data longer, by less than 1/64."""
        allowance = self._limit // 64 + 256 if compressed else 0
        if self._wire + length > self._limit + allowance:
            raise Fault(1009, "message is too big")

    def _add_payload(self, data: bytes) -> None:
        data = unmask(self._key, data)
        shift = len(data) & 3
        self._key = self._key[shift:] + self._key[:shift]  # section 5.3: byte i goes with key byte i mod 4
        self.received += len(data)
        self._add_content(self._inflate(data) if self._inflater else data)

    def _add_content(self, data: bytes) -> None:
        if self._opcode == TEXT and (self._tail or not data.isascii()):
            self._tail = check_text(self._tail + data, final=False)
        if not self._message:
            self._message = data  # often all of it, so do not copy yet
        else:
            if isinstance(self._message, bytes):
                self._message = bytearray(self._message)
            self._message += data
        if len(self._message) > self._limit:
            raise Fault(1009, "message is too big")

    def _inflate(self, data: bytes) -> bytes:
        """Stops one byte above the limit. A BFINAL block ends the stream, yet another may follow that refers
        back to the same window (RFC 7692 section 7.2.3.4)."""
        assert self._inflater
        content = b""
        while data and (room := self._limit + 1 - len(self._message) - len(content)):
            try:
                content += self._inflater.decompress(data, room)
            except zlib.error:
                raise Fault(1007, "deflate data is corrupt") from None
            if not self._inflater.eof:
                break
            data = self._inflater.unused_data
            window = (bytes(self._message[-32768:]) + content)[-32768:]
            self._inflater = zlib.decompressobj(-15, zdict=window)
            self._count_empty()
        return content

    def _count_empty(self) -> None:
        self._empty += 1
        if self._empty > MAX_EMPTY:
            raise Fault(1008, "too many empty fragments")

    def _end_deflate(self) -> None:
        """The sender has cut off the end of an empty stored block (RFC 7692 section 7.2.1). zlib is content
        with most truncated streams: a last block (03 00) shows whether this one was at the end of a block."""
        self._add_content(self._inflate(b"\x00\x00\xff\xff"))
        assert self._inflater
        try:
            more = self._inflater.decompress(b"\x03\x00")
        except zlib.error:
            more = b"?"
        if more or not self._inflater.eof or self._inflater.unused_data:
            raise Fault(1007, "deflate data is truncated")

    def _end_message(self, events: list[Event]) -> int:
        if self._inflater:
            self._end_deflate()
        if self._tail:
            raise Fault(1007, "text is not UTF-8")
        events.append((self._opcode, bytes(self._message)))
        cost = EVENT * (1 + self._empty) + len(self._message)
        self._begin_message(0)
        return cost


def extended_length(data: bytes) -> int:
    """Section 5.2: the minimal number of bytes is used, and the most significant bit is 0."""
    length = int.from_bytes(data, "big")
    if length < (126 if len(data) == 2 else 65536) or length >= 1 << 63:
        raise Fault(1002, "length is not minimal or too large")
    return length


def frame_header(first: int, length: int) -> bytes:
    """Section 5.2, of an unmasked frame."""
    if length < 126:
        return bytes((first, length))
    if length < 65536:
        return struct.pack("!BBH", first, 126, length)
    return struct.pack("!BBQ", first, 127, length)


DEFLATE_PARAMETER = re.compile(
    r"(server_no_context_takeover|client_no_context_takeover"
    r'|server_max_window_bits=("?)(?P<bits>9|1[0-5])\2|client_max_window_bits(=("?)([89]|1[0-5])\5)?)'
)


def accept_deflate(offers: str) -> tuple[str, int]:
    """RFC 7692 section 7.1: the answer to the first offer that suits and its window bits, or ("", 0).

    Not taken: a parameter that is unknown, repeated or malformed, and server_max_window_bits=8, for which
    zlib has no raw compressor. client_max_window_bits needs no answer, since our window has all 15.
    """
    for offer in offers.split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        matches = [DEFLATE_PARAMETER.fullmatch(parameter) for parameter in parameters]
        names = {parameter.partition("=")[0] for parameter in parameters}
        if name != "permessage-deflate" or None in matches or len(names) < len(parameters):
            continue
        bits = next((m["bits"] for m in matches if m and m["bits"]), None)
        answer = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        return answer + (f"; server_max_window_bits={bits}" if bits else ""), int(bits or 15)
    return "", 0


def deflate(payload: bytes, window_bits: int, level: int, mem_level: int) -> bytes:
    """RFC 7692 section 7.2.1, without context takeover."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -window_bits, mem_level)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


# ---------------------------------------------------------------------------------------------- Connection

HIGH_WATER = 64 * 1024  # bytes waiting to be sent above which nothing more is read
READ_SIZE = 64 * 1024  # bytes asked for at a time
SMALL = 1024  # bytes of payload below which deflate does not pay
CLOSE_TIMEOUT = 5.0  # seconds for the peer to answer a Close, as in Tornado
LINGER_TIMEOUT = 2.0  # seconds to wait for the peer to see why it was failed

OPEN, CLOSING, ENDING, LINGERING, CLOSED = range(5)


class Connection(WebSocketProtocol):
    """One peer's WebSocket on a socket that was taken over from Tornado's IOStream."""

    def __init__(self, handler: WebSocketHandler, stall_timeout: float = 60.0) -> None:
        super().__init__(handler)
        self.handler: WebSocketHandler = handler
        self.stall_timeout = stall_timeout
        self.close_code: int | None = None  # what the peer sent
        self.close_reason: str | None = None
        self.sent_code: int | None = None
        self.messages = self.bytes = 0  # received
        self._subprotocol: str | None = None
        self._deflate: tuple[int, int, int] | None = None
        self._loop = IOLoop.current()
        self._all = Connections.current()
        self._finished = self._all.finished
        self._state = OPEN
        self._deadline = 0.0
        self._turning = False  # a turn is on: what is written leaves at its end
        self._hold = False  # no message is handed to the handler
        self._scheduled = False
        self._pending: asyncio.Future[Any] | None = None
        self._queue: deque[Event] = deque()
        self._queue_size = 0
        self._out: list[bytes] = []
        self._out_size = 0
        self._backlog: deque[bytes | memoryview] = deque()
        self._queued = 0  # bytes of the backlog
        self._drained = 0  # bytes of it that have left, ever
        self._futures: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._pong: bytes | None = None
        self._linger = False
        self._events = 0

    # ---- handshake

    async def accept_connection(self, handler: WebSocketHandler) -> None:
        headers = handler.request.headers
        key = headers["Sec-WebSocket-Key"]
        handler.clear_header("Content-Type")
        handler.set_status(101)
        handler.set_header("Upgrade", "websocket")
        handler.set_header("Connection", "Upgrade")
        handler.set_header("Sec-WebSocket-Accept", accept_key(key))
        self._choose_subprotocol(handler)
        self._choose_deflate(handler)
        sent = handler.finish()
        stream = handler.detach()
        handler.request.connection = handler.request.server_connection = None
        try:
            await sent
            early = self._take(stream)
        except StreamClosedError:
            return
        self._all.add(self)
        self._run(handler.open, *handler.open_args, **handler.open_kwargs)
        if early:
            self._receiver.feed(early)
        self._turn()

    def _choose_subprotocol(self, handler: WebSocketHandler) -> None:
        offer = handler.request.headers.get("Sec-WebSocket-Protocol", "")
        offered = [name for part in offer.split(",") if (name := part.strip())]
        self._subprotocol = handler.select_subprotocol(offered)
        if self._subprotocol:
            handler.set_header("Sec-WebSocket-Protocol", self._subprotocol)

    def _choose_deflate(self, handler: WebSocketHandler) -> None:
        options = handler.get_compression_options()
        answer, bits = "", 0
        if options is not None and not handler.request.headers.get("User-Agent", "").startswith("Tornado/"):
            answer, bits = accept_deflate(handler.request.headers.get("Sec-WebSocket-Extensions", ""))
        if answer and options is not None:
            handler.set_header("Sec-WebSocket-Extensions", answer)
            self._deflate = bits, options.get("compression_level", 6), options.get("mem_level", 8)
        self._receiver = Receiver(handler.max_message_size, bool(answer))

    def _take(self, stream: IOStream) -> bytes:
        future = stream.read_bytes(1 << 20, partial=True)
        assert isinstance(future, asyncio.Future)
        early: bytes = future.result() if future.done() else b""
        old = stream.socket
        self._loop.remove_handler(old)
        self._socket = socket.socket(old.family, old.type, old.proto, old.detach())
        self._socket.setblocking(False)
        stream.close()
        self._events = IOLoop.READ
        self._loop.add_handler(self._socket, self._on_events, IOLoop.READ)
        return early

    # ---- reading

    def _on_events(self, fd: Any, events: int) -> None:
        if events & IOLoop.WRITE:
            self._drain()
        if events & IOLoop.READ and self._state != CLOSED and not self._scheduled:
            self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        if not data:
            self._lost(None)
            return
        self.seen = True
        if self._state < ENDING:
            self._receiver.feed(data)
            self._turn()

    def _turn(self) -> None:
        receiver = self._receiver
        self._turning, self._scheduled = True, False
        if self._queue and not self._hold:
            queue, self._queue, self._queue_size = self._queue, deque(), 0
            self._dispatch(queue)
        self._dispatch(receiver.events())
        self._turning = False
        if self._out:
            self._flush()
        if self._hold or receiver.more or receiver.fault or self._events != IOLoop.READ:
            self._after_turn()

    def _after_turn(self) -> None:
        if not self._hold and not self._queue:
            if self._receiver.more:
                self._scheduled = True
                self._loop.add_callback(self._turn)
            elif self._receiver.fault and self._state < ENDING:
                self._fail(self._receiver.fault)
        self._set_interest()

    def _dispatch(self, events: Iterable[Event]) -> None:
        rest = iter(events)
        on_message = self.handler.on_message
        if self._hold:
            self._enqueue(rest)
        for opcode, payload in rest:
            if opcode > BINARY:
                self._control(opcode, payload)
            elif self._state == OPEN:
                self.messages += 1
                self.bytes += len(payload)
                try:
                    result = on_message(payload.decode() if opcode == TEXT else payload)
                except (Exception, asyncio.CancelledError):
                    self._bug()
                else:
                    if result is not None:
                        self._wait(result)
            if self._hold:
                self._enqueue(rest)
                return

    def _enqueue(self, events: Iterable[Event]) -> None:
        for opcode, payload in events:
            if opcode > CLOSE:
                self._control(opcode, payload)
            else:
                self._queue.append((opcode, payload))
                self._queue_size += len(payload) + EVENT

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            self._on_close_frame(payload)
        elif opcode == PONG:
            self._run(self.handler.on_pong, payload)
        else:
            if self._state == OPEN:
                if self._backlog:
                    self._pong = payload
                else:
                    self._write(FIN | PONG, payload)
            self._run(self.handler.on_ping, payload)

    def _run(self, callback: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            result = callback(*args, **kwargs)
        except (Exception, asyncio.CancelledError):
            self._bug()
        else:
            if result is not None:
                self._wait(result)

    def _wait(self, result: Any) -> None:
        self._hold = True
        self._pending = gen.convert_yielded(result)
        self._pending.add_done_callback(self._resume)

    def _resume(self, future: asyncio.Future[Any]) -> None:
        self._pending = None
        try:
            future.result()
        except (Exception, asyncio.CancelledError):
            self._bug()
        self._hold = self._queued > HIGH_WATER
        if self._state < ENDING:
            self._turn()

    def _bug(self) -> None:
        self.handler.log_exception(*sys.exc_info())
        if self._state == OPEN:
            self._send_close(1011)
            self._end(linger=True)

    # ---- writing

    def write_message(
        self, message: str | bytes | dict[str, Any], binary: bool = False
    ) -> asyncio.Future[None]:
        if self._state != OPEN:
            raise WebSocketClosedError
        payload = utf8(json_encode(message) if isinstance(message, dict) else message)
        first = FIN | (BINARY if binary else TEXT)
        if self._deflate and len(payload) >= SMALL:
            first, payload = first | RSV1, deflate(payload, *self._deflate)
        self._write(first, payload)
        if self._turning and self._out_size <= HIGH_WATER:
            return self._finished
        if not self._turning:
            return self._queued_future()
        self._flush()
        return self._queued_future()

    def write_ping(self, data: bytes) -> None:
        if len(data) > 125:
            raise ValueError("control frame payloads may not exceed 125 bytes")
        self._write(FIN | PING, data)

    def _write(self, first: int, payload: bytes) -> None:
        self._out.append(frame_header(first, len(payload)))
        self._out.append(payload)
        self._out_size += len(payload)
        if not self._turning:
            self._flush()

    def _queued_future(self) -> asyncio.Future[None]:
        if not self._backlog and self._state != CLOSED:
            return self._finished
        future: asyncio.Future[None] = asyncio.Future()
        if self._state == CLOSED:
            future.set_exception(WebSocketClosedError())
            future.exception()
        else:
            self._futures.append((self._drained + self._queued, future))
        return future

    def _flush(self) -> None:
        data: bytes | memoryview = b"".join(self._out)
        self._out.clear()
        self._out_size = 0
        if not self._backlog:
            sent = self._send(data)
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._backlog.append(data)
        self._queued += len(data)
        if self._queued > HIGH_WATER:
            self._hold = True
        self._set_interest()

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lost(error)
            return 0

    def _drain(self) -> None:
        while self._backlog:
            data = self._backlog[0]
            sent = self._send(data)
            self._queued -= sent
            self._drained += sent
            if sent < len(data):
                self._backlog[0] = memoryview(data)[sent:]
                break
            self._backlog.popleft()
        while self._futures and self._futures[0][0] <= self._drained:
            self._futures.popleft()[1].set_result(None)
        if self._state != CLOSED and not self._backlog:
            self._on_drained()

    def _on_drained(self) -> None:
        if self._pong is not None and self._state == OPEN:
            pong, self._pong = self._pong, None
            self._write(FIN | PONG, pong)
        if self._state == ENDING:
            self._end(self._linger)
        elif self._hold and not self._pending:
            self._hold = False
            self._turn()
        else:
            self._set_interest()

    def _set_interest(self) -> None:
        if self._state == CLOSED:
            return
        reading = (
            self._queued <= HIGH_WATER and self._queue_size <= self._receiver._limit or self._state >= ENDING
        )
        events = (IOLoop.READ if reading else 0) | (IOLoop.WRITE if self._backlog else 0)
        if events != self._events:
            self._events = events
            self._loop.update_handler(self._socket, events)

    # ---- closing

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        if self._state == OPEN:
            self._send_close(code, reason)
            self._state = CLOSING
            self._deadline = self._loop.time() + CLOSE_TIMEOUT

    def _send_close(self, code: int | None = None, reason: str | None = None) -> None:
        if code is None and reason is not None:
            code = 1000
        self.sent_code = code
        self._write(FIN | CLOSE, (struct.pack("!H", code) if code else b"") + utf8(reason or ""))

    def _on_close_frame(self, payload: bytes) -> None:
        if payload:
            self.close_code, self.close_reason = int.from_bytes(payload[:2], "big"), payload[2:].decode()
        if self._state == OPEN:
            self._send_close(self.close_code)
        self._end(linger=False)

    def _fail(self, fault: Fault) -> None:
        log.warning("[SERVER] error:%d %s", fault.code, fault.reason)
        if self._state == OPEN:
            self._send_close(fault.code, fault.reason)
        self._end(linger=True)

    def _end(self, linger: bool) -> None:
        if self._state == CLOSED:
            return
        if self._out:
            self._flush()
        self._linger = linger
        if self._state < ENDING:
            self._deadline = self._loop.time() + CLOSE_TIMEOUT
            self._state = ENDING
        if self._backlog or self._state == CLOSED:
            return
        if linger:
            self._state = LINGERING
            self._deadline = self._loop.time() + LINGER_TIMEOUT
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
        else:
            self._closed()

    def _lost(self, error: OSError | None) -> None:
        self._closed()

    def _closed(self) -> None:
        if self._state == CLOSED:
            return
        self._state = CLOSED
        self._loop.remove_handler(self._socket)
        self._socket.close()
        self._all.remove(self)
        for _, future in self._futures:
            future.set_exception(WebSocketClosedError())
            future.exception()
        self._loop.add_callback(self._notify)

    def _notify(self) -> None:
        try:
            self.handler.on_ws_connection_close(self.close_code, self.close_reason)
        except Exception:
            self.handler.log_exception(*sys.exc_info())

    def is_closing(self) -> bool:
        return self._state != OPEN

    @property
    def selected_subprotocol(self) -> str | None:
        return self._subprotocol

    def set_nodelay(self, x: bool) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, x)

    def on_connection_close(self) -> None:
        pass

    def _process_server_headers(self, key: str | bytes, headers: HTTPHeaders) -> None:
        raise NotImplementedError

    def start_pinging(self) -> None:
        pass

    async def _receive_frame_loop(self) -> None:
        pass


class Connections:
    _by_loop: weakref.WeakKeyDictionary[IOLoop, Connections] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.finished: asyncio.Future[None] = asyncio.Future()
        self.finished.set_result(None)
        self.open: set[Connection] = set()

    @classmethod
    def current(cls) -> Connections:
        return cls._by_loop.setdefault(IOLoop.current(), cls())

    def add(self, c: Connection) -> None:
        self.open.add(c)

    def remove(self, c: Connection) -> None:
        self.open.discard(c)


def accept_key(key: str) -> str:
    digest = hashlib.sha1(utf8(key) + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return base64.b64encode(digest).decode()


def main(argv: list[str] | None = None) -> int:
    import argparse

    p = argparse.ArgumentParser()
    p.add_argument("--port", type=int)
    p.add_argument("--address")
    p.add_argument("--max-message-size", type=int, default=1 << 20)
    p.add_argument("--log-level")
    p.add_argument("--no-compression", action="store_true")
    p.add_argument("--prefix", default="ECHO:")
    a = p.parse_args(argv)
    try:
        import uvloop

        uvloop.install()
    except ImportError:
        pass

    async def run():
        app = Application(
            [(r".*", EchoHandler, dict(prefix=a.prefix, compression=not a.no_compression))],
            websocket_max_message_size=a.max_message_size,
            log_function=lambda h: None,
        )
        s = HTTPServer(app)
        s.listen(a.port, a.address)
        await asyncio.Event().wait()

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
