"""The command line as the tests call it: in this process, and its result read back."""

import json

from dememo_jax import cli


def inside(*arguments):
    """The command in this process; returns its exit code."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def result(folder):
    return json.loads((folder / "result.json").read_text())
