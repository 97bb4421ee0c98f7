"""The page on one's own network runs as it stands there, with the libraries that it names where they are installed."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BLOCKS = dict(zip(("equinox", "haiku"), re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_python_of_the_page_runs(name, capsys):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    names: dict = {}
    exec(compile(BLOCKS[name], "models.md", "exec"), names)
    assert float(capsys.readouterr().out) > 0.7  # of a class that is forgotten, a tenth may go
    weights, first = names["weights"], names["train"].x[:8]
    model, before = names["model"], names["state"].weights
    assert any((a != b).any() for a, b in zip(*map(names["jax"].tree.leaves, (weights.stats, before.stats))))
    one, other = (model.fit(weights, first, names["jax"].random.key(seed))[0] for seed in (0, 1))
    assert (one != other).any()  # dropout acts
    assert (model.apply(weights, first) == model.apply(weights, first)).all()
