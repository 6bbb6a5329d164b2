#!/usr/bin/env python3
"""Measure ws-echo and other WebSocket servers in the same run.

Every server answers X with ECHO:X. In each round, the servers take turns, each as a
new process on one core; the load generator has another core. Absolute figures depend
on the machine, and drift if it is shared: compare figures of the same run only.
"""

import argparse
import gc
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import report
from loads import LOADS, Load, Result, Settings
from report import Board
from servers import HERE, Candidate, ad_hoc, find, pin, raise_file_limit, running
from wire import ClosedError, MeasurementError

# Descriptors needed in addition to those of the connections.
OTHER_FILES = 500
# The share of the time spent waiting for a core from which on it is reported.
WAITED = 0.1


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    loads = ", ".join(load.name for load in LOADS)
    parser = argparse.ArgumentParser(description="Compare WebSocket echo servers.")
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--only", type=names, metavar="A,B", help="measure these servers only")
    add("--loads", type=names, metavar="A,B", help=f"measure these loads only, of {loads}")
    add("--rounds", type=int, default=3, help=f"number of rounds for each load {default}")
    add("--seconds", type=float, default=2.0, help=f"seconds that a measurement takes {default}")
    add("--warm-up", type=float, default=0.3, help=f"seconds before a measurement {default}")
    add("--idle", type=int, default=10_000, help=f"number of idle connections {default}")
    text = (
        "one more server; in the command, {port} stands for the port, {deflate} for the word "
        "deflate if compression is measured, {no_compression} for --no-compression if it is not "
        "(repeatable)"
    )
    add("--server", action="append", default=[], metavar="NAME=COMMAND", help=text)
    text = "server that the others are compared with (default: the first --server, or ws-echo)"
    add("--subject", help=text)
    text = "directory of echo_server.py"
    add("--ws-echo", type=Path, default=HERE.parent, metavar="DIR", help=text)
    add("--node-modules", metavar="DIR", help="directory in which ws and bun are installed")
    add("--server-core", type=int, default=0, help=f"core of the server {default}")
    add("--client-core", type=int, default=1, help=f"core of the load generator {default}")
    add("--json", type=Path, metavar="FILE", help="write each result of each round")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--svg", type=Path, metavar="FILE", help="draw the most important rows")
    add("--list", action="store_true", help="show the servers that would be measured, and exit")
    return parser.parse_args(arguments)


def chosen_servers(options: argparse.Namespace) -> list[Candidate]:
    found, missing = find(options.ws_echo.resolve(), options.node_modules)
    candidates = [ad_hoc(text) for text in options.server] + found
    if missing:
        say(f"not found: {', '.join(missing)}")
    if options.only is None:
        return candidates
    known = {candidate.name.lower(): candidate for candidate in candidates}
    unknown = [name for name in options.only if name.lower() not in known]
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; here are {', '.join(known)}")
    return [known[name.lower()] for name in options.only]


def chosen_loads(options: argparse.Namespace) -> list[Load]:
    if options.loads is None:
        return list(LOADS)
    known = {load.name: load for load in LOADS}
    unknown = [name for name in options.loads if name not in known]
    if unknown:
        raise ValueError(f"unknown loads: {', '.join(unknown)}; here are {', '.join(known)}")
    return [known[name] for name in options.loads]


def subject_of(options: argparse.Namespace, board: Board) -> str | None:
    """Return the server that the others are compared with."""
    first = options.server[0].partition("=")[0].strip() if options.server else "ws-echo"
    name = options.subject or first
    return next((server for server in board.servers if server.lower() == name.lower()), None)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cores(options: argparse.Namespace) -> tuple[int | None, int | None]:
    here = os.sched_getaffinity(0)
    if {
        options.server_core,
        options.client_core,
    } <= here and options.server_core != options.client_core:
        return options.server_core, options.client_core
    say("warning: the server and the load generator do not have a core each")
    return None, None


class Run:
    """All loads, rounds and servers of one invocation."""

    def __init__(
        self, options: argparse.Namespace, candidates: list[Candidate], loads: list[Load]
    ) -> None:
        self.board = Board([candidate.name for candidate in candidates], loads)
        self._candidates = candidates
        self._rounds = options.rounds
        self._settings = Settings(options.seconds, options.warm_up, options.idle)
        self._cores = cores(options)
        self.client_core = self._cores[1]
        self._done = 0

    def run(self) -> None:
        for load in self.board.loads:
            say(f"{load.name}: {load.title}")
            for number in range(self._rounds):
                # Each round begins with another server.
                start = number % len(self._candidates)
                for candidate in self._candidates[start:] + self._candidates[:start]:
                    self._measure(load, number, candidate)

    def _measure(self, load: Load, number: int, candidate: Candidate) -> None:
        outcome = self.board.outcome(load, candidate.name)
        self._done += 1
        total = len(self.board.loads) * self._rounds * len(self._candidates)
        where = f"[{self._done}/{total}] {load.name} {number + 1}/{self._rounds} {candidate.name}"
        if outcome.error:
            return say(f"{where}: left out, {outcome.error.partition(':')[0]} before")
        result, outcome.error = self._attempt(load, candidate)
        outcome.rounds.append(result)
        say(f"{where}: {outcome.error or summary(load, result)}")

    def _attempt(self, load: Load, candidate: Candidate) -> tuple[Result | None, str]:
        try:
            with running(candidate, load.deflate, *self._cores) as server:
                try:
                    return load.run(server, self._settings), ""
                except (MeasurementError, OSError):
                    # If the server has ended, that explains more than this error.
                    server.check_alive()
                    raise
        except MeasurementError as error:
            return None, f"{error.label}: {error}"
        except ConnectionError as error:
            return None, f"{ClosedError.label}: {error}"
        except OSError as error:
            return None, f"{MeasurementError.label}: {error}"


def summary(load: Load, result: Result | None) -> str:
    shown = [metric for metric in load.metrics if result is not None and metric.key in result]
    parts = [f"{m.title} {report.number((result or {})[m.key], m.digits)}" for m in shown]
    share = (result or {}).get("waited", 0.0)
    if share > WAITED:
        parts.append(f"waited for a core {share:.0%} of the time")
    return "; ".join(parts)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
        platform.machine(),
    )


def machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def footer(options: argparse.Namespace) -> str:
    here = machine()
    return (
        f"{here['date']}, {here['processor']}, {here['cores']} cores, {here['kernel']}, "
        f"Python {here['python']}; median of {options.rounds} rounds of {options.seconds:g} s"
    )


def tables(options: argparse.Namespace, board: Board, candidates: list[Candidate]) -> str:
    subject = subject_of(options, board)
    parts = [report.medians(board)]
    if subject is not None and len(board.servers) > 1:
        parts.append(report.ratios(board, subject))
    count, of = board.waited(WAITED)
    note = f"In {count} of {of} measurements a core was busy otherwise for over {WAITED:.0%}."
    versions = [f"{c.name} {c.version}" for c in candidates if c.version]
    parts.append("\n".join([footer(options) + ".", note, ", ".join(versions)]).strip())
    parts += report.errors(board)
    return "\n\n".join(parts) + "\n"


def write(options: argparse.Namespace, board: Board, candidates: list[Candidate]) -> None:
    text = tables(options, board, candidates)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        data = {
            "machine": machine(),
            "settings": {
                "rounds": options.rounds,
                "seconds": options.seconds,
                "idle": options.idle,
            },
            "versions": {c.name: c.version for c in candidates},
            "results": report.as_json(board, subject_of(options, board)),
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(
            report.svg(board, "WebSocket echo servers, one core", footer(options))
        )


def stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def prepare(options: argparse.Namespace) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    files = raise_file_limit()
    if files < options.idle + OTHER_FILES:
        options.idle = max(100, files - OTHER_FILES)
        say(f"warning: the limit of {files} open files allows {options.idle} connections")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        candidates, loads = chosen_servers(options), chosen_loads(options)
    except ValueError as error:
        say(f"compare.py: {error}")
        return 2
    if options.list or not candidates:
        print("\n".join(f"{c.name} {c.version}: {' '.join(c.command)}" for c in candidates))
        return 0
    prepare(options)
    run = Run(options, candidates, loads)
    pin(run.client_core)
    # The garbage collector would make the generator pause, and nothing here makes cycles.
    gc.disable()
    interrupted = False
    try:
        run.run()
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted; what was measured until now:")
    write(options, run.board, candidates)
    return 130 if interrupted else 1 if report.errors(run.board) else 0


if __name__ == "__main__":
    sys.exit(main())
