"""What the user sees on the terminal: progress bars, one-line results, tables, warnings."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from dememo_jax import report

LOG_SECONDS = 30.0  # between lines of progress in a log file
CONTROLS = {
    c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"
}  # ESC begins commands to terminals


class Lasting(Console):
    """A console whose reader may leave, or whose disk may be full: the work goes on, and `lost` says what was in the way."""

    lost: OSError | None = None

    def print(self, *objects: Any, **how: Any) -> None:
        if self.lost is not None:
            return
        try:
            super().print(*objects, **how)
        except OSError as error:
            self.lose(error)

    def on_broken_pipe(self) -> None:
        self.lose(BrokenPipeError())

    def lose(self, error: OSError) -> None:
        """From now on the stream leads nowhere, so that what it still holds is lost without a traceback at the end."""
        self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


OUT = Lasting(highlight=False)
ERR = Lasting(stderr=True, highlight=False, soft_wrap=True)


def prepare() -> None:
    """Letters that a terminal's encoding has no room for are written as escapes, and nothing was lost so far."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    OUT.lost = ERR.lost = None


def flush() -> str:
    """Why the output did not get where it should, if so; a reader who left is no such reason."""
    try:
        OUT.file.flush()
    except OSError as error:
        OUT.lose(error)
    return "" if OUT.lost is None or isinstance(OUT.lost, BrokenPipeError) else str(OUT.lost)


def escape(text: str) -> str:
    """Text as it is shown: no markup, and no control characters, which data of others may bring along."""
    return markup.escape(text.translate(CONTROLS))


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
    from dememo_jax import report

    section, seconds = report.sections(done)[0], done["measured"].get("seconds")
    took = f" [dim]({seconds:.1f} s)[/]" if isinstance(seconds, int | float) else ""
    OUT.print(f"[bold]{escape(section.title):<34}[/] {escape(section.summary)}{took}", soft_wrap=True)


def say(text: str) -> None:
    OUT.print(escape(text), style="dim", soft_wrap=True)


def warn(text: str) -> None:
    ERR.print(f"[yellow]warning:[/] {escape(text)}")


def error(text: str) -> None:
    ERR.print(f"[red]error:[/] {escape(text)}")


def table(part: "report.Table") -> None:
    from dememo_jax import report  # with what draws pictures: not before --help has answered

    shown = RichTable(title=escape(part.title), title_justify="left", caption=escape(part.note) or None, caption_justify="left")
    for i, name in enumerate(part.columns):
        shown.add_column(escape(name), justify="right" if report.numeric(part, i) else "left")
    for row in part.rows:
        shown.add_row(*(escape(report.cell(value)) for value in row))
    OUT.print(shown)
