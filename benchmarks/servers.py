"""The servers: how they are found, started, measured and stopped."""

import contextlib
import glob
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wire import MeasurementError

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
HOST = "127.0.0.1"
Address = tuple[str, int]
START_TIMEOUT = 15.0
STOP_TIMEOUT = 5.0
SETTLE_TIMEOUT = 10.0


class EndedError(MeasurementError):
    """The server did not start, or has ended."""


@dataclass(frozen=True)
class Candidate:
    """A server to measure.

    The command may contain `{port}`; `{deflate}`, which becomes the word "deflate" if compression
    is measured; and `{no_compression}`, which becomes `--no-compression` if it is not.
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
            # A placeholder that becomes nothing leaves no empty argument behind.
            if filled or not word:
                words.append(filled)
        return words


def _command(interpreter: str, file: str) -> tuple[str, ...]:
    return interpreter, str(PEERS / file), "{port}", "{deflate}"


def _python_peer(name: str, file: str) -> Candidate | None:
    package = name.lower()
    if importlib.util.find_spec(package) is None:
        return None
    version = importlib.metadata.version(package)
    return Candidate(name, _command(sys.executable, file), version)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _module_folders(node_modules: str | None) -> list[Path]:
    folders = [Path(node_modules)] if node_modules else []
    folders += [HERE / "node_modules", HERE.parent / "node_modules"]
    folders += [Path(path) for path in os.environ.get("NODE_PATH", "").split(":") if path]
    return [folder.resolve() for folder in folders if folder.is_dir()]


def _ws_peer(folders: list[Path]) -> Candidate | None:
    node = shutil.which("node")
    folder = next((f for f in folders if (f / "ws" / "package.json").is_file()), None)
    if node is None or folder is None:
        return None
    version = json.loads((folder / "ws" / "package.json").read_text())["version"]
    both = f"{version}, Node {_output(node, '--version')}"
    return Candidate("ws", _command(node, "ws_server.mjs"), both, {"NODE_PATH": str(folder)})


def _bun_peer(folders: list[Path]) -> Candidate | None:
    near = (f / ".bin" / "bun" for f in folders)
    bun = next((str(path) for path in near if path.is_file()), None) or shutil.which("bun")
    if bun is None:
        return None
    return Candidate("Bun", _command(bun, "bun_server.js"), _output(bun, "--version"))


def ws_echo(folder: Path, *options: str, before: tuple[str, ...] = ()) -> Candidate:
    """Return ws-echo as it is in a folder. Its command begins with the words of `before`."""
    source = folder.resolve() / "echo_server.py"
    text = source.read_text() if source.is_file() else ""
    version = re.search(r"""^__version__ = ["'](.+)["']""", text, re.MULTILINE)
    command = (sys.executable, str(source), f"--address={HOST}", "--port={port}", *options)
    return Candidate("ws-echo", before + command, version.group(1) if version else "")


def _own(folder: Path) -> Candidate | None:
    if not (folder / "echo_server.py").is_file():
        return None
    # All other options keep their defaults, so its log shows up to 50 messages a second.
    return ws_echo(folder, "--max-message-size=16777216", "{no_compression}")


def find(folder: Path, node_modules: str | None) -> tuple[list[Candidate], list[str]]:
    """Return the servers that can be started, ws-echo first, and the names of the others."""
    folders = _module_folders(node_modules)
    servers = {
        "ws-echo": _own(folder),
        "Bun": _bun_peer(folders),
        "picows": _python_peer("picows", "picows_server.py"),
        "socketify": _python_peer("socketify", "socketify_server.py"),
        "aiohttp": _python_peer("aiohttp", "aiohttp_server.py"),
        "ws": _ws_peer(folders),
        "websockets": _python_peer("websockets", "websockets_server.py"),
        "Tornado": _python_peer("Tornado", "stock_tornado.py"),
    }
    found = [server for server in servers.values() if server is not None]
    return found, [name for name, server in servers.items() if server is None]


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
    """A running server, and what it uses."""

    def __init__(self, popen: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self._popen = popen
        self.address: Address = (HOST, port)
        self.log = log

    def complaint(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no output"

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback")

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
            for path in glob.glob(f"/proc/{pid}/task/*/children"):
                pids.extend(int(child) for child in _read(path).split())
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

    def forget_peak(self) -> None:
        Path(f"/proc/{self._popen.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak of the first process's resident memory in bytes, since forget_peak()."""
        status = _read(f"/proc/{self._popen.pid}/status")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def descriptors(self) -> int:
        """Return how many descriptors the first process has open."""
        return len(os.listdir(f"/proc/{self._popen.pid}/fd"))

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


class Growth:
    """By how much a server has grown since this was created."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._memory = server.memory()
        self._descriptors = server.descriptors()

    def memory(self, allowed: int) -> int:
        """Return the growth in bytes. Wait some seconds for it to come down to what is allowed."""
        return _settled(self._server.memory, self._memory + allowed) - self._memory

    def descriptors(self) -> int:
        """Return how many more descriptors are open. Wait some seconds for them to be closed."""
        return _settled(self._server.descriptors, self._descriptors) - self._descriptors


def _settled(value: Callable[[], int], least: int) -> int:
    """Wait until the value has come down to `least`, but not forever; return the value."""
    until = time.monotonic() + SETTLE_TIMEOUT
    while value() > least and time.monotonic() < until:
        time.sleep(0.05)
    return value()


def _read(path: str) -> str:
    """Return what a file in /proc says, or nothing if the process has ended."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _cpu(pid: int) -> float:
    # /proc/PID/schedstat is about the first thread only.
    tasks = [_read(path).split() for path in glob.glob(f"/proc/{pid}/task/*/schedstat")]
    nanoseconds = sum(int(fields[0]) for fields in tasks if fields)
    return nanoseconds / 1e9 if nanoseconds else _cpu_ticks(pid)


def _cpu_ticks(pid: int) -> float:
    """Return the CPU seconds to a hundredth, where the kernel keeps no schedstat."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def core_wait(pid: int | str) -> float:
    """Return the seconds that the first thread was ready to run but had no core."""
    fields = _read(f"/proc/{pid}/schedstat").split()
    return int(fields[1]) / 1e9 if fields else 0.0


def _private_memory(pid: int) -> int:
    lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


@contextlib.contextmanager
def running(
    candidate: Candidate, deflate: bool = False, core: int | None = None
) -> Iterator[Process]:
    """Start a server, on that core if one is given, and stop it in the end."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = candidate.arguments(port, deflate)
        environment = os.environ | candidate.environment
        process = Process(_spawn(command, environment, log, core), port, log)
        try:
            process.wait_until_ready()
            yield process
        except (MeasurementError, OSError):
            # If the server has ended, that explains more than this error.
            process.check_alive()
            raise
        finally:
            process.stop()


def _spawn(
    command: list[str], environment: dict[str, str], log: Path, core: int | None
) -> "subprocess.Popen[bytes]":
    # A process inherits its core, and so do the threads that it starts.
    here = os.sched_getaffinity(0)
    pin(core)
    try:
        with log.open("wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C reaches this process only, which then stops the server.
                start_new_session=True,
            )
    except OSError as error:
        raise EndedError(str(error)) from error
    finally:
        os.sched_setaffinity(0, here)
