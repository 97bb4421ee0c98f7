"""What a callback may return: nothing, to go on, or `STOP`, to end the run. `loop.STOP` is the same object."""

import enum
from typing import Any, Literal, TypeAlias

from dememo_jax.errors import require


class Stop(enum.Enum):
    STOP = "STOP"

    def __repr__(self) -> str:
        return "loop.STOP"


STOP = Stop.STOP
Answer: TypeAlias = Stop | Literal[False] | None


def stops(answer: Any, name: str = "after") -> bool:
    """Whether a callback asks for the end of the run.

    Many functions that are handy as a callback return something true (`CheckpointManager.save` does), so only `STOP` stops.

    Args:
        answer: What the callback returned.
        name: The callback's argument name, for the error.

    Raises:
        BadInput: For anything but `STOP`, None and False.
    """
    if answer is STOP:
        return True
    require(
        answer is None or answer is False,
        f"{name} returned {answer!r:.80}: only dememo_jax.loop.STOP ends the run; return None to go on",
    )
    return False


def reports(answer: Any, name: str = "after") -> None:
    """BadInput when a callback that only reports progress returns `STOP`; anything else that it returns is not used."""
    require(answer is not STOP, f"{name} reports progress only: it cannot stop this run")
