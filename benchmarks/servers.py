"""The servers: how they are found, started, measured and stopped."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wire import MeasurementError

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
HOST = "127.0.0.1"
START_TIMEOUT = 15.0
STOP_TIMEOUT = 5.0

# All other options of ws-echo keep their defaults, so its log shows up to 50 messages a second.
OPTIONS = ("--address=127.0.0.1", "--port={port}", "--max-message-size=16777216")


class EndedError(MeasurementError):
    """The server did not start, or has ended."""


@dataclass(frozen=True)
class Candidate:
    """A server to measure.

    The command may have placeholders: `{port}`; `{deflate}`, which stands for the word
    "deflate" if compression is measured; and `{no_compression}`, which stands for the
    option `--no-compression` if it is not.
    """

    name: str
    command: tuple[str, ...]
    version: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self, port: int, deflate: bool) -> list[str]:
        values = {
            "{port}": str(port),
            "{deflate}": "deflate" if deflate else "",
            "{no_compression}": "" if deflate else "--no-compression",
        }
        words = []
        for word in self.command:
            filled = word
            for placeholder, value in values.items():
                filled = filled.replace(placeholder, value)
            # A word that consists of an empty placeholder is left out.
            if filled or not word:
                words.append(filled)
        return words


def _python_peer(name: str, package: str, file: str) -> Candidate | None:
    if importlib.util.find_spec(package) is None:
        return None
    command = (sys.executable, str(PEERS / file), "{port}", "{deflate}")
    return Candidate(name, command, importlib.metadata.version(package))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _module_folders(node_modules: str | None) -> list[Path]:
    folders = [Path(node_modules)] if node_modules else []
    folders += [HERE / "node_modules", HERE.parent / "node_modules"]
    folders += [Path(p) for p in os.environ.get("NODE_PATH", "").split(":") if p]
    return [folder.resolve() for folder in folders if folder.is_dir()]


def _ws_peer(folders: list[Path]) -> Candidate | None:
    node = shutil.which("node")
    folder = next((f for f in folders if (f / "ws" / "package.json").is_file()), None)
    if node is None or folder is None:
        return None
    version = json.loads((folder / "ws" / "package.json").read_text())["version"]
    command = (node, str(PEERS / "ws_server.mjs"), "{port}", "{deflate}")
    environment = {"NODE_PATH": str(folder)}
    return Candidate("ws", command, f"{version}, Node {_output(node, '--version')}", environment)


def _bun_peer(folders: list[Path]) -> Candidate | None:
    near = (f / ".bin" / "bun" for f in folders)
    bun = next((str(p) for p in near if p.is_file()), None) or shutil.which("bun")
    if bun is None:
        return None
    command = (bun, str(PEERS / "bun_server.js"), "{port}", "{deflate}")
    return Candidate("Bun", command, _output(bun, "--version"))


def _own(folder: Path) -> list[Candidate]:
    source = folder / "echo_server.py"
    if not source.is_file():
        return []
    found = re.search(r"""^__version__ = ["'](.+)["']""", source.read_text(), re.MULTILINE)
    version = found.group(1) if found else ""
    command = (sys.executable, str(source), *OPTIONS, "{no_compression}")
    return [Candidate("ws-echo", command, version)]


def find(folder: Path, node_modules: str | None) -> tuple[list[Candidate], list[str]]:
    """Return the servers that can be started, ws-echo first, and the names of the others."""
    folders = _module_folders(node_modules)
    peers = {
        "Bun": _bun_peer(folders),
        "picows": _python_peer("picows", "picows", "picows_server.py"),
        "socketify": _python_peer("socketify", "socketify", "socketify_server.py"),
        "aiohttp": _python_peer("aiohttp", "aiohttp", "aiohttp_server.py"),
        "ws": _ws_peer(folders),
        "websockets": _python_peer("websockets", "websockets", "websockets_server.py"),
        "Tornado": _python_peer("Tornado", "tornado", "stock_tornado.py"),
    }
    own = _own(folder)
    missing = [] if own else ["ws-echo"]
    missing += [name for name, peer in peers.items() if peer is None]
    return own + [peer for peer in peers.values() if peer is not None], missing


def ad_hoc(text: str) -> Candidate:
    name, separator, command = text.partition("=")
    if not separator or "{port}" not in command:
        raise ValueError(f"not NAME=COMMAND with {{port}}: {text}")
    return Candidate(name.strip(), tuple(shlex.split(command)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


def raise_file_limit() -> int:
    """Raise the soft limit, so that 10,000 connections are possible. Servers inherit it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Process:
    """A running server."""

    def __init__(self, popen: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self._popen = popen
        self._log = log
        self.address = (HOST, port)

    def complaint(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no output"

    def check_alive(self) -> None:
        code = self._popen.poll()
        if code is not None:
            raise EndedError(f"the server ended with status {code}: {self.complaint()}")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError), socket.create_connection(self.address, timeout=1.0):
                return
            time.sleep(0.02)
        raise EndedError(f"no connection within {START_TIMEOUT:.0f} s: {self.complaint()}")

    def _family(self) -> list[int]:
        """Return the process ids of the server and its descendants."""
        pids = [self._popen.pid]
        for pid in pids:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    pids.extend(int(child) for child in children.read_text().split())
        return pids

    def cpu(self) -> float:
        """Return the CPU seconds of all threads of the server's processes."""
        return sum(_cpu(pid) for pid in self._family())

    def waited(self) -> float:
        """Return the seconds that the server waited for its core."""
        return sum(core_wait(pid) for pid in self._family())

    def memory(self) -> int:
        """Return the private memory of the server's processes in bytes."""
        return sum(_private_memory(pid) for pid in self._family())

    def stop(self) -> None:
        family = self._family()
        self._popen.terminate()
        try:
            self._popen.wait(STOP_TIMEOUT)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._popen.kill()
            self._popen.wait(STOP_TIMEOUT)
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _cpu(pid: int) -> float:
    # /proc/PID/schedstat is about the first thread only, and /proc/PID/stat counts
    # hundredths of a second.
    ran = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                ran += int((task / "schedstat").read_text().split()[0])
    return ran / 1e9 if ran else _cpu_ticks(pid)


def core_wait(pid: int | str) -> float:
    """Return the seconds that the first thread was ready to run but had no core."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _cpu_ticks(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _private_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("Private_"))


@contextlib.contextmanager
def running(
    candidate: Candidate, deflate: bool, server_core: int | None, client_core: int | None
) -> Iterator[Process]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        # The server inherits the affinity before it starts any thread.
        pin(server_core)
        try:
            process = Process(_spawn(candidate, port, deflate, log), port, log)
        except OSError as error:
            raise EndedError(str(error)) from error
        finally:
            pin(client_core)
        try:
            process.wait_until_ready()
            yield process
        finally:
            process.stop()


def _spawn(candidate: Candidate, port: int, deflate: bool, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as output:
        return subprocess.Popen(
            candidate.arguments(port, deflate),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | candidate.environment,
            # Ctrl-C reaches this process only, which then stops the server.
            start_new_session=True,
        )
