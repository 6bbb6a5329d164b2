#!/usr/bin/env python3
"""Measure ws-echo and other WebSocket servers in the same run.

Every server answers X with ECHO:X. In each round, the servers take turns, each as a new process
on one core; the load generator has another core. Absolute figures depend on the machine, and drift
if it is shared: compare figures of the same run only.
"""

import argparse
import contextlib
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
from options import add_ws_echo, chosen, split
from report import Board
from servers import Candidate, ad_hoc, find, pin, raise_file_limit, running
from wire import MeasurementError, described

# Descriptors needed in addition to those of the connections.
OTHER_FILES = 500
# The share of the time above which it is reported that a measurement waited for a core.
WAITED = 0.1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    loads = ", ".join(load.name for load in LOADS)
    parser = argparse.ArgumentParser(description="Compare WebSocket echo servers.")
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--only", type=split, metavar="A,B", help="measure these servers only")
    add("--loads", type=split, metavar="A,B", help=f"measure these loads only, of {loads}")
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
    add_ws_echo(parser)
    add("--node-modules", metavar="DIR", help="directory in which ws and bun are installed")
    add("--server-core", type=int, default=0, help=f"core of the server {default}")
    add("--client-core", type=int, default=1, help=f"core of the load generator {default}")
    add("--json", type=Path, metavar="FILE", help="write each result of each round")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--svg", type=Path, metavar="FILE", help="draw the most important rows")
    add("--list", action="store_true", help="show the servers that would be measured, and exit")
    return parser.parse_args(arguments)


def candidates_of(options: argparse.Namespace) -> list[Candidate]:
    found, missing = find(options.ws_echo, options.node_modules)
    if missing:
        say(f"not found: {', '.join(missing)}")
    return chosen(options.only, [*map(ad_hoc, options.server), *found])


def subject_of(options: argparse.Namespace, board: Board) -> str | None:
    """Return the server that the others are compared with."""
    first = options.server[0].partition("=")[0].strip() if options.server else "ws-echo"
    name = options.subject or first
    return next((server for server in board.servers if server.lower() == name.lower()), None)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cores(options: argparse.Namespace) -> tuple[int | None, int | None]:
    both = {options.server_core, options.client_core}
    if len(both) == 2 and both <= os.sched_getaffinity(0):
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
        self._server_core, self.client_core = cores(options)
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
            return say(f"{where}: left out, {outcome.label} before")
        try:
            with running(candidate, load.deflate, self._server_core) as server:
                result = load.run(server, self._settings)
        except (MeasurementError, OSError) as error:
            outcome.rounds.append(None)
            outcome.error = described(error)
            return say(f"{where}: {outcome.error}")
        outcome.rounds.append(result)
        say(f"{where}: {summary(load, result)}")


def summary(load: Load, result: Result) -> str:
    shown = [metric for metric in load.metrics if metric.key in result]
    parts = [f"{m.title} {report.number(result[m.key], m.digits)}" for m in shown]
    waited = result.get("waited", 0.0)
    if waited > WAITED:
        parts.append(f"waited for a core {waited:.0%} of the time")
    return "; ".join(parts)


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


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


def everything(
    options: argparse.Namespace, board: Board, candidates: list[Candidate]
) -> dict[str, object]:
    return {
        "machine": machine(),
        "settings": {key: getattr(options, key) for key in ("rounds", "seconds", "idle")},
        "versions": {c.name: c.version for c in candidates},
        "results": report.as_json(board, subject_of(options, board)),
    }


def write(options: argparse.Namespace, board: Board, candidates: list[Candidate]) -> None:
    text = tables(options, board, candidates)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        data = everything(options, board, candidates)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.svg:
        picture = report.svg(board, "WebSocket echo servers, one core", footer(options))
        options.svg.write_text(picture)


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
        candidates, loads = candidates_of(options), chosen(options.loads, LOADS)
    except ValueError as error:
        say(f"compare.py: {error}")
        return 2
    if options.list or not candidates:
        print("\n".join(f"{c.name} {c.version}: {' '.join(c.command)}" for c in candidates))
        return 0
    prepare(options)
    run = Run(options, candidates, loads)
    pin(run.client_core)
    # The garbage collector would make the load generator pause, and nothing here makes cycles.
    gc.disable()
    status = 0
    try:
        run.run()
    except KeyboardInterrupt:
        status = 130
        say("interrupted; what was measured until now:")
    write(options, run.board, candidates)
    return status or (1 if report.errors(run.board) else 0)


if __name__ == "__main__":
    sys.exit(main())
