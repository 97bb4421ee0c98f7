"""The errors that every floor may raise, and the check that raises the first of them."""

from typing import Any


class BadInput(ValueError):
    """The caller's input cannot be used; the message says what was expected and what to do."""


class NonFinite(FloatingPointError):
    """A reported quantity became infinite or NaN; the message names it and the step."""


def require(condition: Any, message: str) -> None:
    """Raise `BadInput(message)` unless `condition`."""
    if not condition:
        raise BadInput(message)
