"""The tables of text in `RESULTS.md`: cells of a task and what was learned from, to markdown."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dememo_jax.report import Plot
from lab import findings
from lab.tables import largest, markdown, percent, verdicts

COLUMNS = {"clean": ("clean", "Before"), "regtext": ("regtext", "Before"), "retrain": ("regtext", "RT"),
           "ga": ("regtext", "GA"), "npo": ("regtext", "NPO"), "ft": ("regtext", "FT")}  # fmt: skip
Found = dict[str, dict]


def _rows(found: Found) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Task, what was learned from, and a row of a cell."""
    for name, cell in found.items():
        task, kind = name.split(".")
        for row in cell["value"]:
            yield task, kind, row


def _grouped(found: Found, value: Callable[[dict], Any], *more: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """(kind, method, form, more entries of the row) -> task -> value."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for task, kind, row in _rows(found):
        at = (kind, row["method"], row["form"], *(f"{row[name]:g}" for name in more))
        groups.setdefault(at, {})[task] = value(row)
    return groups


def published() -> dict:
    """The paper's Table 4: (task,) -> {column: accuracy}."""
    return findings.published("regtext_unlearning", ("task",), "model", "accuracy")


def ours(found: Found) -> dict:
    """The same of our cells, of whole networks."""
    numbers: dict = {}
    for task, kind, row in _rows(found):
        for column, wanted in COLUMNS.items():
            if wanted == (kind, row["method"]) and row["form"] == "full" and row["accuracy"]:
                numbers.setdefault((task,), {})[column] = row["accuracy"]["test"]
    return numbers


def unlearning(found: Found) -> str:
    """A line a network: its accuracy on the test texts of the task that was forgotten, task by task; then means over them."""
    tasks = list(dict.fromkeys(task for task, _, _ in _rows(found)))
    parts = {
        "writes the label": "generated",
        "forgotten, as seen": "seen",
        "forgotten, clean": "clean",
        "other tasks": "others",
    }
    lines = [["learned from", "network", "parameters", *tasks, *parts, "membership, area"]]
    for (kind, method, form), rows in _grouped(found, lambda row: row).items():
        alive = {task: row for task, row in rows.items() if row["accuracy"]}
        shown = [percent(alive[task]["accuracy"]["test"] if task in alive else None) for task in tasks]
        means = [_mean([row["accuracy"][part] for row in alive.values()]) for part in parts.values()]
        area = _mean([row["membership"]["sequence"] for row in alive.values()])
        lines.append([kind, method, form, *shown, *map(percent, means), percent(area)])
    theirs = [["task", *COLUMNS]]
    theirs += [[at[0], *(percent(row.get(column)) for column in COLUMNS)] for at, row in published().items()]
    note = "\nThe paper's Table 4, of a model of seven billion parameters and tasks of its own:\n\n"
    return markdown(lines) + note + markdown(theirs) + "\n" + verdicts(findings.TEXT, ours(found), published())


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def recovery(found: Found) -> str:
    """A line a network and radius, means over tasks: accuracy before the attack and at its best."""
    lines = [["learned from", "network", "parameters", "radius", "before", "best of the attack", "tasks"]]
    for at, curves in _grouped(found, lambda row: row["accuracy"], "radius").items():
        ends = [(curve[0], max(curve)) for curve in curves.values()]
        lines.append([*at, *(percent(value) for value in np.mean(ends, axis=0)), str(len(ends))])
    return markdown(lines) + "\n" + verdicts(findings.TEXT_RECOVERY, _recovered(found), None)


def _recovered(found: Found) -> dict:
    """(method, task): of whole networks that learned RegText, before the attack and at its best in any of the balls."""
    numbers: dict = {}
    for task, kind, row in _rows(found):
        if (kind, row["form"]) == ("regtext", "full"):
            before, back = row["accuracy"][0], max(row["accuracy"])
            known = numbers.setdefault((row["method"], task), {"before": before, "back": back})
            known["back"] = max(known["back"], back)
    return numbers


def curves(found: Found) -> Plot:
    """Figure 12: curves of the attack at the largest radius on what learned RegText, means over tasks."""
    largest = max(row["radius"] for _, _, row in _rows(found))
    groups = _grouped(found, lambda row: row["accuracy"], "radius")
    series = tuple(
        (f"{method}, {form}", tuple(map(float, range(len(each[0])))), tuple(np.mean(each, axis=0).tolist()))
        for (kind, method, form, radius), tasks in groups.items()
        if kind == "regtext" and radius == f"{largest:g}" and (each := list(tasks.values()))
    )
    title = f"Recovery of a task learned from RegText, radius {largest:g}"
    return Plot("figure12", title, "epoch of the attack", "accuracy on the task", series)


def depth(found: Found) -> str:
    """The largest certified upper bound over the tasks; a radius that any of them abstains at has none."""
    groups = _grouped(found, lambda row: row)
    etas = sorted({one["eta"] for _, _, row in _rows(found) for one in row["bounds"] or []})
    lines = [["learned from", "network", "parameters", "how many", *(f"eta {eta:g}" for eta in etas)]]
    for at, rows in groups.items():
        count = next(iter(rows.values()))["parameters"]
        lines.append([*at, f"{count:,}", *(largest([_upper(row, eta) for row in rows.values()]) for eta in etas)])
    return markdown(lines)


def _upper(row: dict, eta: float) -> float | None:
    return next((one["upper"] for one in row["bounds"] or [] if one["eta"] == eta), None)
