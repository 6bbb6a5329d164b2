"""Tornado's own WebSocketHandler: `python stock_tornado.py PORT [deflate]`."""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any

from tornado.web import Application
from tornado.websocket import WebSocketHandler

MAX_SIZE = 16 * 1024 * 1024
DEFLATE = "deflate" in sys.argv[2:]


class Echo(WebSocketHandler):
    def get_compression_options(self) -> dict[str, Any] | None:
        # An empty dict turns permessage-deflate on with Tornado's defaults.
        return {} if DEFLATE else None

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)

    def on_message(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self.write_message("ECHO:" + message)
        else:
            self.write_message(b"ECHO:" + message, binary=True)


async def main() -> None:
    application = Application([("/", Echo)], websocket_max_message_size=MAX_SIZE)
    application.listen(int(sys.argv[1]), "127.0.0.1")
    print("ready", flush=True)
    await asyncio.Event().wait()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(coroutine)
    asyncio.run(coroutine)


if __name__ == "__main__":
    run(main())
