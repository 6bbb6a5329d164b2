"""aiohttp's WebSocketResponse: `python aiohttp_server.py PORT [deflate]`."""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any

from aiohttp import WSMsgType, web

MAX_SIZE = 16 * 1024 * 1024
DEFLATE = "deflate" in sys.argv[2:]


async def echo(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(max_msg_size=MAX_SIZE, compress=DEFLATE)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str("ECHO:" + message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(b"ECHO:" + message.data)
    return socket


async def main() -> None:
    application = web.Application()
    application.router.add_get("/", echo)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(coroutine)
    asyncio.run(coroutine)


if __name__ == "__main__":
    run(main())
