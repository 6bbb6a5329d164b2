"""picows: `python picows_server.py PORT`.

picows hands out frames and leaves compression to its user, so there is no
`deflate` here. It does not check that text is valid UTF-8 either.
"""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any

from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

MAX_SIZE = 16 * 1024 * 1024


class Echo(WSListener):
    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        kind = frame.msg_type
        if kind is WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()
        elif kind is WSMsgType.TEXT or kind is WSMsgType.BINARY:
            transport.send(kind, b"ECHO:" + frame.get_payload_as_memoryview())


def listener(request: WSUpgradeRequest) -> WSListener:
    return Echo()


async def main() -> None:
    server = await ws_create_server(
        listener, "127.0.0.1", int(sys.argv[1]), max_frame_size=MAX_SIZE
    )
    print("ready", flush=True)
    await server.serve_forever()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(coroutine)
    asyncio.run(coroutine)


if __name__ == "__main__":
    run(main())
