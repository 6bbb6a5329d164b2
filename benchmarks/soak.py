#!/usr/bin/env python3
"""Run a mix of clients against ws-echo: some echo, some are slow, some hostile, some short-lived.

Every reply is compared. The last line says what was done, what was lost and what has
grown. The exit code is 1 if anything was lost or has grown.
"""

import argparse
import asyncio
import contextlib
import gc
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from faults import Subject, serving, settled
from servers import HERE, raise_file_limit
from wire import (
    BINARY,
    CLOSE,
    MASKS,
    TEXT,
    client_frame,
    deflated,
    handshake,
    reply_frame,
    server_frame,
)

PATIENCE = 30.0
MIB = 1 << 20
# The memory that may be left in the heap after a burst. It must not grow with time.
GROWTH = 16 * MIB
OPTIONS = ("--stall-timeout=20", "--handshake-timeout=5")

PING = 9
CODE = (1000).to_bytes(2, "big")
# Faults of a peer, and the code of the Close that answers each.
WRONGS = (
    (1002, b"\x81\x02hi"),
    (1002, client_frame(3, b"", MASKS[0])),
    (1002, client_frame(CLOSE, b"\x03", MASKS[1])),
    (1002, client_frame(TEXT, b"x", MASKS[0], compressed=True)[:2] + bytes(5)),
    (1007, client_frame(TEXT, b"a\xff", MASKS[2])),
    (1008, b"\x01\x80" + MASKS[0] + (b"\x00\x80" + MASKS[0]) * 1100),
    (1009, b"\x82\xff" + (MIB + 1).to_bytes(8, "big") + MASKS[0]),
)
JUNK = (
    b"",
    b"GET / HT",
    b"\x16\x03\x01\x02",
    b"\0" * 999,
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
)


class LostError(Exception):
    """A reply is missing or wrong."""


class Client:
    """A connection that knows what it has to receive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def dial(cls, address: tuple[str, int]) -> "Client":
        return cls(*await asyncio.open_connection(*address, limit=MIB))

    @classmethod
    async def connect(cls, address: tuple[str, int], deflate: bool = False) -> "Client":
        client = await cls.dial(address)
        client.writer.write(handshake(address[1], deflate))
        head = await client.reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in head:
            raise LostError(f"handshake: {head[:80]!r}")
        return client

    async def expect(self, data: bytes, step: int = 65536, pause: float = 0.0) -> None:
        for start in range(0, len(data), step):
            part = data[start : start + step]
            if await self.reader.readexactly(len(part)) != part:
                raise LostError(f"a reply of {len(data)} bytes differs after byte {start}")
            if pause:
                await asyncio.sleep(pause)

    async def end(self) -> None:
        self.writer.write(client_frame(CLOSE, CODE, MASKS[3]))
        await self.expect(server_frame(CLOSE, CODE))
        if await self.reader.read():
            raise LostError("something arrived after the Close")
        self.abort()

    def abort(self) -> None:
        self.writer.transport.abort()


class Soak:
    """The clients, and their counts."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.counts: Counter[str] = Counter()
        self._address = address
        self._until = 0.0

    async def run(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        kinds = [
            (self.echo, 20),
            (self.slow, 5),
            (self.churn, 5),
            (self.wrong, 5),
            (self.junk, 3),
            (self.bomb, 2),
        ]
        async with asyncio.TaskGroup() as group:
            for kind, number in kinds:
                for _ in range(number):
                    group.create_task(self._repeat(kind))

    async def _repeat(self, kind: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self._until:
            try:
                async with asyncio.timeout(PATIENCE):
                    await kind()
            except (LostError, OSError, EOFError, TimeoutError) as error:
                self.counts["lost"] += 1
                print(
                    f"{kind.__name__}: {type(error).__name__} {error}", file=sys.stderr, flush=True
                )
            self.counts["connections"] += 1

    async def _some(self, client: Client, largest: int, pause: float = 0.0) -> None:
        """Send a few messages at once, and expect the replies in the same order."""
        sent, expected = [], []
        for _ in range(random.randint(1, 8)):
            opcode, size = (
                random.choice((TEXT, BINARY)),
                random.choice((0, 5, 32, 125, 126, 500, largest)),
            )
            payload = bytes(random.choices(b"abcdefgh", k=min(size, 99))) * (size // 99 + 1)
            sent.append(client_frame(opcode, payload, random.choice(MASKS)))
            expected.append(reply_frame(opcode, payload))
        if random.random() < 0.2:
            sent.append(client_frame(PING, b"p", MASKS[0]))
            expected.append(server_frame(10, b"p"))
        client.writer.write(b"".join(sent))
        await client.expect(b"".join(expected), *((8192, pause) if pause else ()))
        self.counts["messages"] += len(expected)

    async def echo(self) -> None:
        client = await Client.connect(self._address, deflate=random.random() < 0.3)
        until = min(self._until, time.monotonic() + random.uniform(1, 10))
        while time.monotonic() < until:
            # These replies are too short to be compressed.
            await self._some(client, 900)
            await asyncio.sleep(0.005)
        await client.end()

    async def slow(self) -> None:
        client = await Client.connect(self._address)
        await self._some(client, 100_000, pause=0.02)
        await client.end()

    async def churn(self) -> None:
        client = await Client.connect(self._address)
        await self._some(client, 20_000)
        if random.random() < 0.5:
            await client.end()
        client.abort()

    async def wrong(self) -> None:
        client = await Client.connect(self._address)
        code, data = random.choice(WRONGS)
        client.writer.write(data)
        head = await client.reader.readexactly(4)
        if head[0] != 0x80 | CLOSE or int.from_bytes(head[2:], "big") != code:
            raise LostError(f"{head!r} rather than {code}")
        client.abort()
        self.counts["faults"] += 1
        await asyncio.sleep(0.01)

    async def junk(self) -> None:
        client = await Client.dial(self._address)
        client.writer.write(random.choice(JUNK))
        await asyncio.sleep(random.uniform(0, 0.2))
        client.abort()
        self.counts["faults"] += 1

    async def bomb(self) -> None:
        client = await Client.connect(self._address, deflate=True)
        client.writer.write(
            client_frame(BINARY, deflated(bytes(2 * MIB)), MASKS[0], compressed=True)
        )
        head = await client.reader.readexactly(4)
        if int.from_bytes(head[2:], "big") != 1009:
            raise LostError(f"{head!r} rather than 1009")
        client.abort()
        self.counts["faults"] += 1
        await asyncio.sleep(0.1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a mix of clients against ws-echo.")
    text = "minutes that the clients run (default: %(default)s)"
    parser.add_argument("--minutes", type=float, default=10.0, help=text)
    text = "directory of echo_server.py"
    parser.add_argument("--ws-echo", type=Path, default=HERE.parent, metavar="DIR", help=text)
    return parser.parse_args(arguments)


def soak(server: Subject, minutes: float) -> int:
    runner = Soak(server.address)
    seconds = minutes * 60
    # What the server needs in any case, it has taken after the first tenth.
    asyncio.run(runner.run(seconds / 10))
    time.sleep(1.0)
    memory, descriptors = server.memory(), server.descriptors()
    last, slices = time.monotonic() + seconds * 0.9, 9
    for number in range(slices):
        asyncio.run(runner.run((last - time.monotonic()) / (slices - number)))
        gc.collect()
        print(
            f"{number + 1}/{slices}: {dict(runner.counts)}, {server.memory() / MIB:.1f} MiB",
            flush=True,
        )
    time.sleep(1.0)
    grown = settled(server.memory, memory + GROWTH) - memory
    more = settled(server.descriptors, descriptors) - descriptors
    server.check_alive()
    counts, tracebacks = runner.counts, server.tracebacks()
    done = ", ".join(f"{counts[what]:,} {what}" for what in ("messages", "connections", "faults"))
    print(
        f"{done}, {counts['lost']} lost, {tracebacks} tracebacks; "
        f"memory {grown / MIB:+.1f} MiB (at most {GROWTH / MIB:+.0f}), descriptors {more:+d}"
    )
    return 1 if counts["lost"] or tracebacks or grown > GROWTH or more > 0 else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    raise_file_limit()
    with (
        contextlib.suppress(KeyboardInterrupt),
        serving(options.ws_echo.resolve(), *OPTIONS) as server,
    ):
        return soak(server, options.minutes)
    return 130


if __name__ == "__main__":
    sys.exit(main())
