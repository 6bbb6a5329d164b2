"""A pytest plugin that replaces Tornado's WebSocketHandler with EchoHandler.

With `-p hosts_plugin`, pytest imports it before the tests, which then find EchoHandler under the
name `tornado.websocket.WebSocketHandler`. With WS_ECHO_STOCK=1, they find Tornado's own class, so
that the results can be compared.
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
# A single test need not open a WebSocket.
ALONE = os.environ.get("WS_ECHO_ALONE") == "1"

# How many WebSockets each handler has served. They are counted when their protocol object is made,
# which is the last step before the handshake is answered.
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

# Tornado's tests fail if anything is logged at INFO, as every request is. So Tornado's own runner,
# tornado.test.runtests, has the first of these lines; our handler has a logger of its own.
logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
logging.getLogger("echo_server").setLevel(logging.CRITICAL)


def mistake() -> str:
    """Return why the run proves nothing, or ""."""
    other = "ws-echo" if STOCK else "Tornado"
    if served[other]:
        return f"{served[other]} WebSockets were served by {other}, which this run does not test"
    return "" if STOCK or ALONE or served["ws-echo"] else "no WebSocket was served by ws-echo"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the run fail if it has tested other handlers than it should have."""
    if mistake():
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    numbers = f"{served['ws-echo']} by ws-echo, {served['Tornado']} by Tornado"
    terminalreporter.write_line(f"WebSockets served: {numbers}")
    if mistake():
        terminalreporter.write_line(f"hosts_plugin: {mistake()}", red=True)
