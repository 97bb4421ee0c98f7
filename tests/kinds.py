"""Which of many cases of one kind the default run tries."""

import pytest


def some(names, quick):
    """Parameters of a test: the names in `quick`, and the others as slow ones. A quick name that is not there is an error."""
    missing = set(quick) - set(names)
    assert not missing, f"no such case: {sorted(missing)}"
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
