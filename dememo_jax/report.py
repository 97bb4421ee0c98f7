"""Results as data, then as pictures and one self-contained page.

A `Section` is what a stage has to say: a sentence, tables, plots, pictures. It goes to JSON and back unchanged.
"""

import base64
import dataclasses
import functools
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dememo_jax.errors import require

Cell = str | int | float | None
PNG = b"\x89PNG\r\n\x1a\n"  # what such a file begins with


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]  # shares in [0, 1] as floats; None prints as a dash
    note: str = ""


@dataclass(frozen=True)
class Plot:
    name: str  # file name of the picture, without suffix
    title: str
    x: str
    y: str
    series: tuple[tuple[str, tuple[float, ...], tuple[float | None, ...]], ...]  # (label, xs, ys); None leaves a gap
    note: str = ""
    scale: str = ""  # "roc": both axes logarithmic, from the decade of the smallest x on, with the diagonal of chance
    bands: tuple[tuple[str, tuple[float, ...], tuple[float | None, ...], tuple[float | None, ...]], ...] = ()
    # (label, xs, lows, highs); None leaves a gap
    ticks: tuple[float, ...] = ()  # of the x axis, where they are not left to matplotlib


@dataclass(frozen=True)
class Section:
    title: str
    summary: str  # one line
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()  # (file name in the run folder, caption)


def to_json(value: Any) -> str:
    """Strict JSON of dataclasses, tuples and numbers: NaN and infinity are refused rather than written."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, indent=1, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def sections(done: dict) -> list[Section]:
    """All sections of a result, one at least. Raises BadInput as `section`."""
    known = done.get("sections")
    require(isinstance(known, list) and known, "no result, as dememo writes it: it has no sections")
    return [section(each) for each in known or ()]


def section(plain: Any) -> Section:
    """The Section that `to_json` wrote. Raises BadInput for what it never writes."""
    try:
        tables = tuple(Table(t["title"], tuple(t["columns"]), tuple(map(tuple, t["rows"])), t["note"]) for t in plain["tables"])
        pictures = tuple((name, caption) for name, caption in plain["pictures"])
        found = Section(plain["title"], plain["summary"], tables, tuple(map(_plot, plain["plots"])), pictures)
        wrong = _wrong(found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = f"{type(error).__name__} {error}"
    require(wrong is None, f"no section of a result, as dememo writes it: {wrong}")
    return found


def _plot(plain: dict) -> Plot:
    lines = {name: tuple((label, *map(tuple, parts)) for label, *parts in plain.get(name, ())) for name in ("series", "bands")}
    return Plot(**{**plain, **lines, "ticks": tuple(plain.get("ticks", ()))})


def _wrong(found: Section) -> str | None:
    """What is wrong with a section, or None."""
    texts = [found.title, found.summary, *(text for pair in found.pictures for text in pair)]
    numbers: list[Any] = []
    for table in found.tables:
        texts += [table.title, table.note, *table.columns]
        cells = [value for row in table.rows for value in row]
        if any(len(row) != len(table.columns) for row in table.rows):
            return f"a row of another length than the columns of {table.title!r}"
        if not all(isinstance(value, str | int | float | np.generic | None) for value in cells):
            return f"a cell of {table.title!r} that is neither text nor number"
        numbers += [value for value in cells if not isinstance(value, str)]
    for plot in found.plots:
        lines: list[tuple[Any, ...]] = [*plot.series, *plot.bands]
        texts += [plot.name, plot.title, plot.x, plot.y, plot.note, plot.scale, *(line[0] for line in lines)]
        numbers += [*plot.ticks, *(value for line in lines for part in line[1:] for value in part)]
        if any(len(part) != len(line[1]) for line in lines for part in line[1:]):
            return f"a curve of {plot.title!r} whose ends differ in length"
    if not all(isinstance(text, str) for text in texts):
        return "a title, a label or a note that is no text"
    if not all(value is None or math.isfinite(value) for value in numbers):
        return "a number that is not finite"
    names = [*(plot.name for plot in found.plots), *(name for name, _ in found.pictures)]
    return next((f"{name!r} is no name of a file" for name in names if not _is_name(name)), None)


def _is_name(name: str) -> bool:
    """Whether it names a file, and no place elsewhere."""
    return 0 < len(name) < 200 and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def picture(folder: Path, name: str) -> bytes:
    """The picture of that name in a run folder. Raises BadInput unless it is a PNG file there, and no link to elsewhere."""
    path = folder / name
    there = _is_name(name) and path.is_file() and not path.is_symlink()
    require(there, f"{folder}: its picture {name!r} is no file of that folder")
    content = path.read_bytes()
    require(content.startswith(PNG), f"{path} is no PNG picture")
    return content


def cell(value: Cell) -> str:
    """How a table shows one value: three decimals, thousands in groups, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers, and is set flush right."""
    return any(isinstance(row[column], int | float) for row in table.rows)


# --- pictures ----------------------------------------------------------------------------------------------------


def draw(plot: Plot) -> bytes:
    """A line plot as PNG bytes; drawn once, whatever it is called in how many pages."""
    return _draw(dataclasses.replace(plot, name="", note=""))


STYLES = ("-", "--", ":", "-.", (0, (4, 1, 1, 1, 1, 1)))


@functools.lru_cache(maxsize=64)
def _draw(plot: Plot) -> bytes:
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    # Curves named "model: what" share the model's colour and differ by their line.
    owners = [label.partition(": ")[0] for label, _, _ in plot.series]
    banded = [label.partition(": ")[0] for label, *_ in plot.bands]
    colours = {owner: f"C{i % 10}" for i, owner in enumerate(dict.fromkeys([*banded, *owners]))}
    for owner, (label, xs, lows, highs) in zip(banded, plot.bands):
        ends = [[math.nan if y is None else y for y in ys] for ys in (lows, highs)]
        axes.fill_between(xs, ends[0], ends[1], color=colours[owner], alpha=0.2, linewidth=0, label=_words(label))
        for values in ends:
            axes.plot(xs, values, color=colours[owner], linewidth=1, marker=".")
    for number, (label, xs, ys) in enumerate(plot.series):
        owner = owners[number]
        line = owners[:number].count(owner) if owners.count(owner) > 1 else number
        values = [math.nan if y is None else y for y in ys]
        marker = "." if len(xs) < 12 else None
        axes.plot(xs, values, label=_words(label), color=colours[owner], linestyle=STYLES[line % len(STYLES)], marker=marker)
    if plot.scale == "roc":
        least = min((x for _, xs, _ in plot.series for x in xs if x > 0), default=0.1)
        floor = min(0.1, 10.0 ** math.floor(math.log10(least) + 1e-9))
        axes.plot([floor, 1], [floor, 1], color="0.6", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.05))
    axes.set(title=_words(plot.title), xlabel=_words(plot.x), ylabel=_words(plot.y))
    if "accuracy" in plot.y:
        axes.set_ylim(-0.02, 1.02)
    if plot.ticks:
        axes.set_xticks(plot.ticks, [f"{x:g}" for x in plot.ticks], fontsize=8, rotation=90 if len(plot.ticks) > 4 else 0)
    elif plot.scale != "roc":  # whose logarithmic axes have their own
        axes.xaxis.set_major_locator(MaxNLocator(integer=all(float(x).is_integer() for _, xs, _ in plot.series for x in xs)))
    axes.grid(alpha=0.3)
    if len(plot.series) + len(plot.bands) > 1:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def image_grid(rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str]) -> bytes:
    """Rows of images [n, H, W, C] in [0, 1], each with its name, under named columns, as PNG bytes.

    Of more than three channels the first three are drawn, of two the first.
    """
    figure = Figure(figsize=(0.8 * len(columns) + 1.2, 0.85 * len(rows) + 0.3), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(grid, rows):
        for axes, image in zip(line, images):
            shown = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]  # of other channels none has a colour
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(_words(name), rotation=0, ha="right", va="center", fontsize=8)
    for axes, name in zip(grid[0], columns):
        axes.set_title(_words(name), fontsize=8)
    return _png(figure)


def heat_maps(
    panels: Sequence[tuple[str, np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    above: float | None = None,
) -> bytes:
    """Named maps of positive numbers [rows, columns] on one logarithmic scale, as PNG bytes; a dot marks those `above`."""
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    size = (1.6 + across * (0.9 + 0.16 * len(columns)), 0.8 + down * (0.7 + 0.2 * len(rows)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    top = max(float(values.max()) for _, values in panels)
    floor = max(1e-4 * top, 1e-12)
    scale = LogNorm(floor, max(top, 10 * floor))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for number, (axes, (name, values)) in enumerate(zip(grid.flat, panels)):
        shown = axes.imshow(np.maximum(values, floor), norm=scale, aspect="auto", cmap="viridis")
        axes.set_title(_words(name), fontsize=9)
        every = max(1, len(columns) // 8)
        axes.set_xticks(range(0, len(columns), every), columns[::every], fontsize=7)
        axes.set_yticks(
            range(len(rows)), [_words(row) for row in rows] if number % across == 0 else [""] * len(rows), fontsize=7
        )
        if above is not None:
            y, x = np.nonzero(values > above)
            axes.plot(x, y, ".", color="white", markersize=3)
    figure.colorbar(shown, ax=grid, label=label, shrink=0.8)
    return _png(figure)


def landscape(
    x, y, panels: Sequence[tuple[str, np.ndarray, bool]], labels: Sequence[str], trajectory: Sequence | None = None
) -> bytes:
    """Filled contours of surfaces [Y, X], (name, values, logarithmic), and the way to the origin upon them, as PNG bytes."""
    figure = Figure(figsize=(4.4 * len(panels), 3.7), dpi=110, layout="constrained")
    for axes, (name, values, logarithmic) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        values = np.maximum(values, 1e-6) if logarithmic else values
        flat = values.max() <= values.min()
        levels = (np.geomspace if logarithmic else np.linspace)(values.min(), values.max(), 21)
        scale = LogNorm() if logarithmic else None
        if flat:  # no contour to draw
            name = f"{name}: {values.min():.3g} everywhere"
        else:
            shown = axes.contourf(x, y, values, levels, norm=scale, cmap="viridis")
            figure.colorbar(shown, ax=axes, format="%.3g")
        axes.set(xlabel=labels[0], title=name)
        if trajectory is not None:
            at = np.asarray(trajectory)
            axes.plot(at[:, 0], at[:, 1], "-o", color="C3", markersize=3, linewidth=1)
        axes.plot(0, 0, "*", color="white", markersize=9, markeredgecolor="black")
    figure.axes[0].set_ylabel(labels[1])
    return _png(figure)


def _words(text: str) -> str:
    """Text as it stands: no mathematics between dollars."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --- the page ----------------------------------------------------------------------------------------------------

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c28;background:#fff}
h1{font-size:1.7rem}h2{margin-top:2.4rem;border-bottom:2px solid #dde}.summary{font-size:1.05rem}
table{border-collapse:collapse;margin:.6rem 0;font-size:.9rem}th,td{padding:.25rem .7rem;border-bottom:1px solid #e3e3ee}
th{text-align:left;background:#f5f5fa}th.n,td.n{text-align:right;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}.note{color:#555;font-size:.85rem;margin:.2rem 0 1rem}
td{white-space:nowrap}.scroll{overflow-x:auto}figure{margin:1rem 0}img{max-width:100%}
pre{background:#f5f5fa;padding:.8rem;overflow-x:auto;font-size:.8rem}
"""


def page(title: str, introduction: str, sections: Sequence[Section], folder: Path, provenance: dict) -> str:
    """One HTML file that needs nothing else: tables, pictures inlined, and how it was made."""
    body = [f"<h1>{_text(title)}</h1><p>{_text(introduction)}</p>"]
    for part in sections:
        body.append(f'<section><h2>{_text(part.title)}</h2><p class="summary">{_text(part.summary)}</p>')
        body += [_table(table) for table in part.tables]
        body += [_figure(draw(plot), plot.title, plot.note) for plot in part.plots]
        body += [_figure(picture(folder, name), caption, "") for name, caption in part.pictures]
        body.append("</section>")
    body.append(f"<section><h2>How this was made</h2><pre>{_text(to_json(provenance))}</pre></section>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>'


def _text(value: str) -> str:
    return html.escape(value)


def _table(table: Table) -> str:
    styles = [' class="n"' if numeric(table, i) else "" for i in range(len(table.columns))]

    def line(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}{style}>{_text(text)}</{tag}>" for style, text in zip(styles, texts))

    head = line("th", table.columns)
    rows = "".join(f"<tr>{line('td', [cell(value) for value in row])}</tr>" for row in table.rows)
    caption = f"<caption>{_text(table.title)}</caption>"
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _figure(png: bytes, caption: str, note: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    below = f'<figcaption class="note">{_text(note)}</figcaption>' if note else ""
    return f'<figure><img alt="{_text(caption)}" src="{source}">{below}</figure>'
