"""The options that compare.py, faults.py and soak.py have in common."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from servers import HERE


class Named(Protocol):
    """A server, a load or a fault."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def chosen(names: list[str] | None, everything: Sequence[N]) -> list[N]:
    """Return the items with these names, in this order, or all if no names are given."""
    known = {item.name.lower(): item for item in everything}
    unknown = [name for name in names or () if name.lower() not in known]
    if unknown:
        here = ", ".join(item.name for item in everything)
        raise ValueError(f"unknown: {', '.join(unknown)}; here are {here}")
    return [known[name.lower()] for name in names] if names else list(everything)


def add_ws_echo(parser: argparse.ArgumentParser) -> None:
    text = "directory of echo_server.py"
    parser.add_argument("--ws-echo", type=Path, default=HERE.parent, metavar="DIR", help=text)
