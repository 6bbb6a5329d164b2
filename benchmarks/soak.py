#!/usr/bin/env python3
"""Run a mix of clients against ws-echo: some echo, some are slow, some hostile, some short-lived.

Every reply is compared. The last line says what was done, what was lost and what has grown. The
exit code is 1 if anything was lost or has grown.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from options import add_ws_echo
from servers import Address, Growth, Process, raise_file_limit, running, ws_echo
from wire import (
    BINARY,
    CLOSE,
    MASKS,
    MIB,
    NORMAL,
    PING,
    PONG,
    TEXT,
    WrongError,
    client_frame,
    close_code,
    deflated,
    difference,
    handshake,
    message_and_reply,
    server_frame,
    upgraded,
)

PATIENCE = 30.0
# The memory that may be left in the heap after a burst. It must not grow with time.
GROWTH = 16 * MIB
OPTIONS = ("--log-level=info", "--stall-timeout=20", "--handshake-timeout=5")
SLICES = 9

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
BOMB = client_frame(BINARY, deflated(bytes(2 * MIB)), MASKS[0], compressed=True)
# What is sent in place of a handshake.
JUNK = (
    b"",
    b"GET / HT",
    b"\x16\x03\x01\x02",
    b"\0" * 999,
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
)


class Client:
    """A connection that knows what it has to receive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def dial(cls, address: Address) -> "Client":
        return cls(*await asyncio.open_connection(*address, limit=MIB))

    @classmethod
    async def connect(cls, address: Address, deflate: bool = False) -> "Client":
        client = await cls.dial(address)
        client.writer.write(handshake(address[1], deflate))
        upgraded(await client.reader.readuntil(b"\r\n\r\n"))
        return client

    async def expect(self, data: bytes, pause: float = 0.0) -> None:
        """Read what has to come: all at once, or slowly with a pause after each 8 KiB."""
        step = 8192 if pause else 65536
        for start in range(0, len(data), step):
            expected = data[start : start + step]
            received = await self.reader.readexactly(len(expected))
            if received != expected:
                where = difference(expected, received)
                raise WrongError(f"{len(data)} bytes of replies from byte {start} on: {where}")
            await asyncio.sleep(pause)

    async def end(self) -> None:
        self.writer.write(client_frame(CLOSE, NORMAL, MASKS[3]))
        await self.expect(server_frame(CLOSE, NORMAL))
        if await self.reader.read():
            raise WrongError("something arrived after the Close")
        self.abort()

    def abort(self) -> None:
        self.writer.transport.abort()


class Soak:
    """The clients, and their counts."""

    def __init__(self, address: Address) -> None:
        self.counts: Counter[str] = Counter()
        self._address = address
        self._until = 0.0

    async def run(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        kinds = {
            self.echo: 20,
            self.slow: 5,
            self.churn: 5,
            self.wrong: 5,
            self.junk: 3,
            self.bomb: 2,
        }
        async with asyncio.TaskGroup() as group:
            for kind, number in kinds.items():
                for _ in range(number):
                    group.create_task(self._repeat(kind))

    async def _repeat(self, kind: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self._until:
            try:
                async with asyncio.timeout(PATIENCE):
                    await kind()
            except (WrongError, OSError, EOFError, TimeoutError) as error:
                self.counts["lost"] += 1
                what = f"{type(error).__name__} {error}"
                print(f"{kind.__name__}: {what}", file=sys.stderr, flush=True)
            self.counts["connections"] += 1

    async def _some(self, client: Client, largest: int, pause: float = 0.0) -> None:
        """Send a few messages at once, and expect the replies in the same order."""
        sent, expected = [], []
        for _ in range(random.randint(1, 8)):
            opcode = random.choice((TEXT, BINARY))
            size = random.choice((0, 5, 32, 125, 126, 500, largest))
            payload = bytes(random.choices(b"abcdefgh", k=min(size, 99))) * (size // 99 + 1)
            message, reply = message_and_reply(opcode, payload, random.randrange(len(MASKS)))
            sent.append(message)
            expected.append(reply)
        if random.random() < 0.2:
            sent.append(client_frame(PING, b"p", MASKS[0]))
            expected.append(server_frame(PONG, b"p"))
        client.writer.write(b"".join(sent))
        await client.expect(b"".join(expected), pause)
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

    async def _fail(self, code: int, data: bytes, deflate: bool = False) -> None:
        """Send a fault, and expect the Close with its code."""
        client = await Client.connect(self._address, deflate)
        client.writer.write(data)
        head = await client.reader.readexactly(4)
        if close_code(head) != code:
            raise WrongError(f"{head!r} rather than a Close with {code}")
        client.abort()
        self.counts["faults"] += 1

    async def wrong(self) -> None:
        await self._fail(*random.choice(WRONGS))
        await asyncio.sleep(0.01)

    async def bomb(self) -> None:
        await self._fail(1009, BOMB, deflate=True)
        await asyncio.sleep(0.1)

    async def junk(self) -> None:
        client = await Client.dial(self._address)
        client.writer.write(random.choice(JUNK))
        await asyncio.sleep(random.uniform(0, 0.2))
        client.abort()
        self.counts["faults"] += 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a mix of clients against ws-echo.")
    text = "minutes that the clients run (default: %(default)s)"
    parser.add_argument("--minutes", type=float, default=10.0, help=text)
    add_ws_echo(parser)
    return parser.parse_args(arguments)


def soak(server: Process, minutes: float) -> int:
    clients = Soak(server.address)
    seconds = minutes * 60
    # What the server needs in any case, it has taken after the first tenth.
    asyncio.run(clients.run(seconds / 10))
    time.sleep(1.0)
    growth = Growth(server)
    last = time.monotonic() + seconds * 0.9
    for number in range(SLICES):
        asyncio.run(clients.run((last - time.monotonic()) / (SLICES - number)))
        memory = f"{server.memory() / MIB:.1f} MiB"
        print(f"{number + 1}/{SLICES}: {dict(clients.counts)}, {memory}", flush=True)
    time.sleep(1.0)
    server.check_alive()
    return conclude(clients.counts, server.tracebacks(), growth)


def conclude(counts: Counter[str], tracebacks: int, growth: Growth) -> int:
    """Print the last line; return the exit code."""
    memory, descriptors = growth.memory(GROWTH), growth.descriptors()
    done = ", ".join(f"{counts[what]:,} {what}" for what in ("messages", "connections", "faults"))
    print(
        f"{done}, {counts['lost']} lost, {tracebacks} tracebacks; "
        f"memory {memory / MIB:+.1f} MiB (at most {GROWTH / MIB:+.0f}), "
        f"descriptors {descriptors:+d}"
    )
    return 1 if counts["lost"] or tracebacks or memory > GROWTH or descriptors > 0 else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    raise_file_limit()
    candidate = ws_echo(options.ws_echo, *OPTIONS)
    with contextlib.suppress(KeyboardInterrupt), running(candidate) as server:
        return soak(server, options.minutes)
    return 130


if __name__ == "__main__":
    sys.exit(main())
