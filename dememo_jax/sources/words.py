"""Names of classes, as folders, labels and arrays of names have them."""

import itertools
import unicodedata
from collections.abc import Iterable

from dememo_jax.errors import require


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): two spellings of "café" that look the same are one class."""
    return unicodedata.normalize("NFC", name)


def ordered(names: Iterable[str], where: str) -> list[str]:
    """Names in the order of their classes' numbers: as whole numbers where all are, else as words.

    Raises BadInput for numbers that are written in two ways, `1` and `01`, which may be one class.
    """
    found = sorted(set(names))
    if not all(name.isascii() and name.isdigit() for name in found):
        return found
    found.sort(key=_magnitude)
    for one, other in itertools.pairwise(found):
        require(_magnitude(one) != _magnitude(other), f"{where}: classes {one} and {other} are one number; write them alike")
    return found


def _magnitude(digits: str) -> tuple[int, str]:
    """Orders whole numbers of any length, which int() does not take."""
    plain = digits.lstrip("0")
    return len(plain), plain
