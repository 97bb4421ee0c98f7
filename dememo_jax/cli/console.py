"""What the user sees on the terminal: progress bars, one-line results, tables, warnings."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from dememo_jax import report

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
LOG_SECONDS = 30.0  # between lines of progress in a log file


@contextmanager
def progress(title: str, total: int, done: int = 0, unit: str = "steps") -> Iterator[Callable[[int], None]]:
    """A bar with speed, elapsed and remaining time, or a line now and then without a terminal; yields `advance(done)`."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = spoken = time.monotonic()
    with Progress(*columns, console=OUT, transient=True, disable=not OUT.is_terminal) as bar:
        task = bar.add_task(escape(title), total=total, completed=done, rate="")

        def advance(now: int) -> None:
            nonlocal spoken
            moment = time.monotonic()
            speed = (now - done) / max(moment - started, 1e-9)
            rate = f"{speed:.3g} {unit}/s" if speed < 1000 else f"{speed:,.0f} {unit}/s"
            bar.update(task, completed=now, rate=rate)
            if bar.disable and moment - spoken >= LOG_SECONDS and now < total:
                say(f"{title}: {now:,} of {total:,} {unit}, {rate}, about {(total - now) / max(speed, 1e-9):,.0f} s left")
                spoken = moment

        yield advance


def announce(done: dict) -> None:
    """The one-line result of a finished command, from its result.json."""
    section, seconds = done["sections"][0], done["measured"]["seconds"]
    title, summary = escape(section["title"]), escape(section["summary"])
    OUT.print(f"[bold]{title:<34}[/] {summary} [dim]({seconds:.1f} s)[/]", soft_wrap=True)


def say(text: str) -> None:
    OUT.print(escape(text), style="dim", soft_wrap=True)


def warn(text: str) -> None:
    ERR.print(f"[yellow]warning:[/] {escape(text)}")


def error(text: str) -> None:
    ERR.print(f"[red]error:[/] {escape(text)}")


def table(part: report.Table) -> None:
    shown = RichTable(title=escape(part.title), title_justify="left", caption=escape(part.note) or None, caption_justify="left")
    for i, name in enumerate(part.columns):
        shown.add_column(escape(name), justify="right" if report.numeric(part, i) else "left")
    for row in part.rows:
        shown.add_row(*(escape(report.cell(value)) for value in row))
    OUT.print(shown)
