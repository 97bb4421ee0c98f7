"""The command line of every table: which preset, which data, which folders; then cell by cell, with an estimate of the time."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dememo_jax import cells
from dememo_jax.cli import console, identity, runs
from dememo_jax.errors import BadInput, require
from lab import models
from lab.models import World
from lab.presets import PRESETS

RESULTS = Path(__file__).parent.parent / "results"
EXHAUSTED = "RESOURCE_EXHAUSTED"


def main(
    table: str, doc: str, names: Callable[[Any], Sequence[str]], compute: Callable[[Any, str], dict],
    argv: Sequence[str] | None = None, *, presets: Mapping[str, Any] = PRESETS, make: Callable = World,
) -> dict[str, dict]:  # fmt: skip
    """Fill `results/PRESET/TABLE`; returns its cells. `compute(world, name)` gives what stands in one.

    make(preset, data, work): the world of the table, with `preset`, `work` and `sets`, training and test examples.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--preset", choices=presets, default="cpu")
    parser.add_argument("--data", help="an .npz, a folder or a TFDS name; of texts the folder of the .tsv files. "
                        "Default that of the preset")  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=Path("runs/experiments"), help="noise and weights; share it, or fill it anew"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON a cell; processes that share it share the work")
    parser.add_argument("--only", nargs="*", help="these cells")
    parser.add_argument("--mixed", action="store_true", help="keep cells of other commits")
    asked = parser.parse_args(argv)
    preset = presets[asked.preset]
    world = make(preset, asked.data or preset.data, (asked.work / preset.name).resolve())
    try:
        return _fill(world, asked, table, list(names(world)), compute)
    except BadInput as error:
        console.error(str(error))
        sys.exit(2)


def _fill(world: Any, asked: argparse.Namespace, table: str, names: list[str], compute: Callable) -> dict[str, dict]:
    unknown = sorted(set(asked.only or ()) - set(names))
    require(not unknown, f"{table} has no cell {', '.join(unknown)}; it has {', '.join(names)}")
    training, _ = world.sets  # data that are not there must show before anything is claimed
    world.work.mkdir(parents=True, exist_ok=True)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(world.work / "compiled"))
    folder = asked.results / world.preset.name / table
    configuration = models.stamp(world, 0.0, 0)["configuration"]
    settings = configuration | {"digest": identity.digest(training.x, training.y)}
    cells.begin(folder, settings, commit=runs.measured(0.0)["commit"], mixed=asked.mixed)
    wanted = asked.only or names
    already = len(cells.done(folder).keys() & set(wanted))
    with console.progress(f"{table}, {world.preset.name}", len(wanted), already, "cells") as advance:
        found = cells.fill(folder, wanted, lambda name: _cell(world, name, compute), say=console.say, after=advance)
    console.say(f"{table}: {len(found)} of {len(names)} cells in {folder}")
    return found


def _cell(world: Any, name: str, compute: Callable) -> dict:
    """One cell; where a device runs out of memory, once more with half of the batch."""
    started = time.monotonic()
    try:
        found = compute(world, name)
    except jax.errors.JaxRuntimeError as error:
        batch = world.preset.batch
        if EXHAUSTED not in str(error) or batch == 1:
            raise
        console.warn(f"{name}: out of memory with batches of {batch}; once more with {batch // 2}")
        world = dataclasses.replace(world, preset=dataclasses.replace(world.preset, batch=batch // 2))
        try:
            found = compute(world, name)
        except jax.errors.JaxRuntimeError as again:
            require(EXHAUSTED not in str(again), f"{name}: out of memory with batches of {batch // 2} as well: take a larger "
                    "device or smaller images; cells that are finished stay")  # fmt: skip
            raise
    return {"cell": name, **found, **models.stamp(world, started, world.preset.seeds[0])}
