"""The results: medians and ratios in Markdown, JSON and SVG."""

import statistics
from dataclasses import dataclass, field
from html import escape

from loads import Load, Metric, Result


@dataclass
class Outcome:
    """One server under one load: the result of each round, or None where it has failed."""

    rounds: list[Result | None] = field(default_factory=list)
    error: str = ""

    @property
    def label(self) -> str:
        return self.error.partition(":")[0]

    def values(self, key: str) -> list[float]:
        return [result[key] for result in self.rounds if result is not None and key in result]

    def median(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.median(values) if values and not self.error else None


@dataclass
class Board:
    """All outcomes of a run."""

    servers: list[str]
    loads: list[Load]
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def rows(self) -> list[tuple[Load, Metric]]:
        return [(load, metric) for load in self.loads for metric in load.metrics]

    def outcome(self, load: Load, server: str) -> Outcome:
        return self.outcomes.setdefault((load.name, server), Outcome())

    def ratio(self, load: Load, metric: Metric, subject: str, peer: str) -> float | None:
        """Return how many times better the subject is: the median of the ratios of the rounds.

        If the machine is slow for a while, it is so for all servers of a round.
        """
        ours, theirs = self.outcome(load, subject), self.outcome(load, peer)
        if ours.error or theirs.error:
            return None
        ratios = []
        for a, b in zip(ours.rounds, theirs.rounds, strict=False):
            if a and b and a.get(metric.key, 0) > 0 and b.get(metric.key, 0) > 0:
                quotient = a[metric.key] / b[metric.key]
                ratios.append(quotient if metric.more_is_better else 1 / quotient)
        return statistics.median(ratios) if ratios else None

    def waited(self, limit: float) -> tuple[int, int]:
        """Return the number of measurements that waited longer for a core, and that of all."""
        shares = [share for outcome in self.outcomes.values() for share in outcome.values("waited")]
        return sum(share > limit for share in shares), len(shares)

    def best(self, load: Load, metric: Metric) -> float | None:
        medians = [self.outcome(load, server).median(metric.key) for server in self.servers]
        known = [value for value in medians if value is not None]
        if not known or not metric.compared:
            return None
        return max(known) if metric.more_is_better else min(known)


def _title(load: Load, metric: Metric) -> str:
    return f"{load.name}: {metric.title}"


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _cell(board: Board, load: Load, metric: Metric, server: str) -> str:
    outcome = board.outcome(load, server)
    if outcome.error:
        return outcome.label
    value = outcome.median(metric.key)
    if value is None:
        return ""
    text = number(value, metric.digits)
    return f"**{text}**" if value == board.best(load, metric) else text


def _times(board: Board, load: Load, metric: Metric, subject: str, peer: str) -> str:
    ratio = board.ratio(load, metric, subject, peer)
    return "" if ratio is None else f"{ratio:.2f}x"


def _markdown(*rows: list[str]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|:--|" + "--:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def medians(board: Board) -> str:
    rows = (
        [_title(load, metric), *(_cell(board, load, metric, name) for name in board.servers)]
        for load, metric in board.rows()
    )
    return _markdown(["median", *board.servers], *rows)


def ratios(board: Board, subject: str) -> str:
    peers = [server for server in board.servers if server != subject]
    rows = (
        [_title(load, metric), *(_times(board, load, metric, subject, peer) for peer in peers)]
        for load, metric in board.rows()
        if metric.compared
    )
    return _markdown([f"{subject} is better by", *peers], *rows)


def errors(board: Board) -> list[str]:
    return [
        f"{load.name}, {server}: {error}"
        for load in board.loads
        for server in board.servers
        if (error := board.outcome(load, server).error)
    ]


def as_json(board: Board, subject: str | None) -> list[dict[str, object]]:
    return [
        _entry(board, load, server, subject) for load in board.loads for server in board.servers
    ]


def _entry(board: Board, load: Load, server: str, subject: str | None) -> dict[str, object]:
    outcome = board.outcome(load, server)
    others = subject is not None and subject != server
    compared = [metric for metric in load.metrics if metric.compared and others]
    return {
        "load": load.name,
        "server": server,
        "error": outcome.error,
        "rounds": outcome.rounds,
        "median": {m.key: outcome.median(m.key) for m in load.metrics},
        "ratio": {m.key: board.ratio(load, m, subject or "", server) for m in compared},
    }


# The picture

ROW = 30
FIRST = 280
COLUMN = 112
TOP = 62
STYLE = """
.back { fill: #ffffff } text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px } .head { font-weight: 600 }
.note { fill: #59636e; font-size: 12px }
.best { font-weight: 700 } .bar { fill: #9ec5fe } .bar.best { fill: #2f81f7 }
.line { stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117 }
  text { fill: #f0f6fc } .note { fill: #9198a1 } .bar { fill: #274b7a } .bar.best { fill: #2f81f7 }
  .line { stroke: #3d444d }
}
"""


def _text(x: float, y: float, text: str, style: str = "", end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}"{anchor}>{escape(text)}</text>'


def _svg_head(server: str, right: float) -> list[str]:
    # The text in parentheses gets a line of its own, since the column is narrow.
    name, _, variant = server.partition(" (")
    if not variant:
        return [_text(right, TOP - 10, name, "head", end=True)]
    return [
        _text(right, TOP - 25, name, "head", end=True),
        _text(right, TOP - 10, variant.rstrip(")"), "note", end=True),
    ]


def _svg_cell(
    board: Board, load: Load, metric: Metric, server: str, x: float, y: float
) -> list[str]:
    outcome = board.outcome(load, server)
    value, best = outcome.median(metric.key), board.best(load, metric)
    right = x + COLUMN - 10
    if value is None or best is None:
        return [_text(right, y + 16, outcome.label, "note", end=True)]
    # The bar of the best server has the full length. Half of that means half as good.
    less, more = sorted((value, best))
    share = less / more if less > 0 else float(value == best)
    style = "best" if value == best else ""
    width = max(1.0, (COLUMN - 20) * share)
    place = f'x="{right - width:.1f}" y="{y + 21}" width="{width:.1f}" height="4"'
    bar = f'<rect {place} class="bar {style}"/>'
    return [_text(right, y + 16, number(value, metric.digits), style, end=True), bar]


def _svg_row(board: Board, load: Load, metric: Metric, y: float, width: float) -> list[str]:
    parts = [f'<line x1="0" y1="{y}" x2="{width}" y2="{y}" class="line"/>']
    parts.append(_text(8, y + 19, _title(load, metric)))
    for column, server in enumerate(board.servers):
        parts += _svg_cell(board, load, metric, server, FIRST + column * COLUMN, y)
    return parts


def svg(board: Board, title: str, note: str) -> str:
    shown = [(load, metric) for load, metric in board.rows() if metric.key in load.overview]
    width = FIRST + COLUMN * len(board.servers)
    height = TOP + ROW * len(shown) + 30
    parts = ['<rect width="100%" height="100%" class="back"/>', _text(8, 20, title, "title")]
    for column, server in enumerate(board.servers):
        parts += _svg_head(server, FIRST + (column + 1) * COLUMN - 10)
    for row, (load, metric) in enumerate(shown):
        parts += _svg_row(board, load, metric, TOP + row * ROW, width)
    parts.append(_text(8, height - 10, note, "note"))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )
