"""The errors that every floor may raise, and the check that raises the first of them."""

from typing import Any


class BadInput(ValueError):
    """The caller's input cannot be used; the message says what was expected and what to do."""


class NonFinite(FloatingPointError):
    """A reported quantity became infinite or NaN; the message names it and the step, `kept` is what stood before."""

    def __init__(self, message: str, kept: Any = None):
        super().__init__(message)
        self.kept = kept


def distinct(**values: Any) -> None:
    """BadInput naming the first sequence that holds one of its entries twice."""
    for name, entries in values.items():
        twice = [entry for i, entry in enumerate(entries) if entry in entries[:i]]
        require(not twice, f"{name} names {twice[:1]} twice; give every value once")


def require(condition: Any, message: str) -> None:
    """Raise `BadInput(message)` unless `condition`."""
    if not condition:
        raise BadInput(message)
