"""socketify, which is uWebSockets for Python: `python socketify_server.py PORT [deflate]`."""

import sys
from typing import Any

from socketify import App, AppListenOptions, CompressOptions, OpCode

MAX_SIZE = 16 * 1024 * 1024
COMPRESSION = (
    CompressOptions.SHARED_COMPRESSOR if "deflate" in sys.argv[2:] else CompressOptions.DISABLED
)


def on_message(socket: Any, message: str | bytes, opcode: OpCode) -> None:
    reply = "ECHO:" + message if isinstance(message, str) else b"ECHO:" + message
    socket.send(reply, opcode, compress=len(reply) >= 1024)


def main() -> None:
    app = App()
    app.ws(
        "/*",
        {
            "compression": COMPRESSION,
            "max_payload_length": MAX_SIZE,
            "max_backpressure": 2 * MAX_SIZE,
            "idle_timeout": 960,
            "message": on_message,
        },
    )
    address = AppListenOptions(port=int(sys.argv[1]), host="127.0.0.1")
    app.listen(address, lambda config: print("ready", flush=True))
    app.run()


if __name__ == "__main__":
    main()
