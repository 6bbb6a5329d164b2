"""What is sent, and what has to come back: handshakes, masked frames, replies."""

import zlib
from collections.abc import Callable

TEXT = 1
BINARY = 2
CLOSE = 8
PING = 9
PONG = 10
PREFIX = b"ECHO:"
# The body of a Close with the code 1000.
NORMAL = (1000).to_bytes(2, "big")
MIB = 1 << 20

# Masking keys. There are several, since a server could cache the work for a single one, and none
# is zero, since unmasking would then only copy.
MASKS = (b"\x37\xfa\x21\x3d", b"\x9c\x04\xe7\x5b", b"\x01\x80\xfe\x7f", b"\xd6\x6b\x13\xa8")

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
OFFER = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"

# Takes all that has been received: returns True if it is complete and False if more has to follow,
# or raises WrongError.
Check = Callable[[bytes], bool]


class MeasurementError(Exception):
    """There is no result for a server: the table shows the label in its place."""

    label = "FAILED"


class WrongError(MeasurementError):
    """The server sent what it should not have sent."""

    label = "WRONG"


class ClosedError(MeasurementError):
    """The server closed a connection."""

    label = "CLOSED"


class StalledError(MeasurementError):
    """The server did not answer in time."""

    label = "STALLED"


def described(error: MeasurementError | OSError) -> str:
    """Return the label of an error, and what it says."""
    kind = ClosedError if isinstance(error, ConnectionError) else MeasurementError
    return f"{getattr(error, 'label', kind.label)}: {error}"


def _head(first: int, size: int, mask_bit: int) -> bytes:
    if size < 126:
        return bytes((first, mask_bit | size))
    if size < 65536:
        return bytes((first, mask_bit | 126)) + size.to_bytes(2, "big")
    return bytes((first, mask_bit | 127)) + size.to_bytes(8, "big")


def _masked(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def client_frame(opcode: int, payload: bytes, mask: bytes, compressed: bool = False) -> bytes:
    first = 0x80 | (0x40 if compressed else 0) | opcode
    return _head(first, len(payload), 0x80) + mask + _masked(payload, mask)


def server_frame(opcode: int, payload: bytes) -> bytes:
    return _head(0x80 | opcode, len(payload), 0) + payload


def message_and_reply(opcode: int, payload: bytes, number: int) -> tuple[bytes, bytes]:
    """Return the frames of a message and of its reply. The number chooses the masking key."""
    frame = client_frame(opcode, payload, MASKS[number % len(MASKS)])
    return frame, server_frame(opcode, PREFIX + payload)


def text(number: int) -> bytes:
    """Return 32 bytes of text, different for each number."""
    return b"message %024d" % number


def short(number: int) -> tuple[bytes, bytes]:
    return message_and_reply(TEXT, text(number), number)


def close_code(data: bytes) -> int | None:
    """Return the code of the Close frame at the beginning of the data, if there is one."""
    complete = len(data) >= 4 and data[0] == 0x80 | CLOSE
    return int.from_bytes(data[2:4], "big") if complete else None


def handshake(port: int, deflate: bool = False) -> bytes:
    lines = (
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n" % (port, KEY)
    )
    return lines + (OFFER if deflate else b"") + b"\r\n"


def deflated(payload: bytes) -> bytes:
    """Compress with the smallest window, which is right whatever size was negotiated."""
    deflater = zlib.compressobj(wbits=-9)
    data = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return data[:-4]


def difference(expected: bytes, received: bytes) -> str:
    """Say where the two differ first, and show the bytes around that."""
    pairs = zip(expected, received, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(received)))
    start = max(0, at - 8)
    wanted, came = expected[start : at + 24], received[start : at + 24]
    return f"byte {at}: expected {wanted!r}, received {came!r}"


def upgraded(data: bytes) -> bool:
    if not data.endswith(b"\r\n\r\n"):
        return False
    if not data.startswith(b"HTTP/1.1 101 ") or ACCEPT not in data:
        raise WrongError(f"handshake: {data[:120]!r}")
    return True


def accepts_deflate(response: bytes) -> bool:
    lines = response.lower().split(b"\r\n")
    return any(
        x.startswith(b"sec-websocket-extensions:") and b"permessage-deflate" in x for x in lines
    )


def exactly(expected: bytes) -> Check:
    def check(data: bytes) -> bool:
        if data == expected:
            return True
        if not expected.startswith(data):
            raise WrongError(difference(expected, data))
        return False

    return check


def _split(data: bytes) -> tuple[int, bytes, bytes] | None:
    """Return the first byte of a frame, its payload, and what follows; None if more has to come."""
    if len(data) < 2:
        return None
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    elif size > 126:
        raise WrongError(f"the second byte of a short frame is {size:#x}")
    if len(data) < start + size:
        return None
    return data[0], data[start : start + size], data[start + size :]


def inflating(expected: tuple[tuple[int, bytes], ...]) -> Check:
    """Check replies that the server may have compressed, each with its opcode and payload."""

    def check(data: bytes) -> bool:
        # All replies share one inflater, since the server may use context takeover.
        inflater = zlib.decompressobj(wbits=-15)
        for opcode, payload in expected:
            parts = _split(data)
            if parts is None:
                return False
            first, body, data = parts
            if first & 0x40:
                body = inflater.decompress(body + b"\x00\x00\xff\xff")
            if first & 0xBF != 0x80 | opcode or body != payload:
                raise WrongError(f"first byte {first:#x}, {difference(payload, body)}")
        return True

    return check
