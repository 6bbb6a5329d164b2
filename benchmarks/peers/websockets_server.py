"""The websockets library: `python websockets_server.py PORT [deflate]`."""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

MAX_SIZE = 16 * 1024 * 1024
COMPRESSION = "deflate" if "deflate" in sys.argv[2:] else None


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        if isinstance(message, str):
            await connection.send("ECHO:" + message)
        else:
            await connection.send(b"ECHO:" + message)


async def main() -> None:
    port = int(sys.argv[1])
    async with serve(echo, "127.0.0.1", port, max_size=MAX_SIZE, compression=COMPRESSION) as server:
        print("ready", flush=True)
        await server.serve_forever()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(coroutine)
    asyncio.run(coroutine)


if __name__ == "__main__":
    run(main())
