"""A plug-in of pytest that puts EchoHandler in the place of Tornado's WebSocketHandler.

Load it with `-p hosts_plugin`: pytest imports it before any of the tests, and whoever says
`tornado.websocket.WebSocketHandler` from then on gets EchoHandler. With WS_ECHO_STOCK=1 all is the
same, except that Tornado's own class stays, to see what the tests say of that.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tornado.websocket
from tornado.websocket import WebSocketHandler

from echo_server import EchoHandler

STOCK = os.environ.get("WS_ECHO_STOCK") == "1"

# WebSockets by who has made their protocol, which is the last step before the handshake's answer.
served: Counter[str] = Counter()


def count(owner: type, name: str) -> None:
    make: Callable[[Any], Any] = vars(owner)["get_websocket_protocol"]

    def counted(self: Any) -> Any:
        protocol = make(self)
        served[name] += protocol is not None
        return protocol

    owner.get_websocket_protocol = counted  # type: ignore[attr-defined]


count(EchoHandler, "ws-echo")
count(WebSocketHandler, "Tornado")
if not STOCK:
    tornado.websocket.WebSocketHandler = EchoHandler  # type: ignore[misc]

# Tornado's tests fail when anything is logged at INFO. So its own runner, tornado.test.runtests,
# does the first of these, as every test makes a request; our handler has a logger beside.
logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
logging.getLogger("echo_server").setLevel(logging.CRITICAL)


def mistake() -> str:
    """What makes the run worthless, if anything does."""
    other = "ws-echo" if STOCK else "Tornado"
    if served[other]:
        return f"{served[other]} WebSockets were served by {other}, whom this run is not about"
    return "" if STOCK or served["ws-echo"] else "no WebSocket was served by ws-echo"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which the handlers were not those that it is about must not pass."""
    if mistake():
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    numbers = f"{served['ws-echo']} by ws-echo, {served['Tornado']} by Tornado"
    terminalreporter.write_line(f"WebSockets served: {numbers}")
    if mistake():
        terminalreporter.write_line(f"hosts_plugin: {mistake()}", red=True)
