"""Classes by name: flags take numbers or names, run folders keep numbers, and pages show both."""

import dataclasses
from typing import Any

from dememo_jax.cli import console
from dememo_jax.cli.lineage import Known
from dememo_jax.errors import BadInput, require
from dememo_jax.sources import composed

FLAGS = ("classes", "forget_class", "observed_classes", "protected_classes", "target_class")


def numbered(config: Any, base: Known) -> Any:
    """The configuration with every class by its number; says which classes are meant, where they have names."""
    given = {flag: getattr(config, flag) for flag in FLAGS if getattr(config, flag, None) not in (None, ())}
    found = {
        flag: tuple(number(one, base) for one in value) if isinstance(value, tuple) else number(value, base)
        for flag, value in given.items()
    }
    for flag, value in found.items():
        meant = ", ".join(base.called(one) for one in (value if isinstance(value, tuple) else (value,)))
        if "(" in meant:
            console.say(f"--{flag.replace('_', '-')}: {meant}")
    return dataclasses.replace(config, **found)


def number(given: int | str, base: Known) -> int:
    """The number of a class that was given by its number or by its name.

    BadInput for a name that no class has, and for a number that is the name of another class: `name:1` and `number:1` tell
    which is meant.
    """
    kind, _, word = str(given).rpartition(":")
    if kind not in ("name", "number"):
        kind, word = "", str(given)
    word, readings = composed(word), set()
    whole = word.isascii() and word.isdigit() and len(word) < 10
    if kind != "number" and word in base.names:
        readings.add(base.names.index(word))
    if kind != "name" and whole and int(word) < base.classes:
        readings.add(int(word))
    both = " or ".join(base.called(k) for k in sorted(readings))
    require(len(readings) < 2, f"class {word} may be {both}: say name:{word} or number:{word}")
    if not readings:
        there = ", ".join(base.called(k) for k in range(base.classes)[:20])
        raise BadInput(f"class {word} does not exist; there are {there}{', ...' * (base.classes > 20)}")
    return readings.pop()


def kept(base: Known) -> dict[str, list[str]]:
    """What a run folder remembers of the names of images' classes; texts have theirs in their files."""
    return {"class_names": list(base.names)} if base.names and base.language is None else {}
