"""What every recipe keeps, learned or not: its budget after rounding, its mask, its key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import some
from small_recipes import NORMS, RADIUS, RECIPES, SHORTCUTS, examples

from dememo_jax import data as sets
from dememo_jax import protect, release

KEY = jax.random.key(3)


def made(name, key, data, mask):
    if name in RECIPES:
        recipe = RECIPES[name]
        if name == "ntga":
            recipe = protect.Recipe(recipe.init, recipe.step, 2, None, lambda state, data: state.perturbation)
        return protect.generate(recipe, key, data, mask)
    return SHORTCUTS[name][2](key, data, mask)


QUICK = ("ntga", "ops", "random", "cuda", "ue-s sapa", "tue", "lsp")


@pytest.mark.parametrize("name", some([*RECIPES, *SHORTCUTS], QUICK))
def test_budget_mask_and_key(name):
    data, mask = examples()
    norm, budget = (NORMS[name], RADIUS) if name in RECIPES else SHORTCUTS[name][:2]
    found = made(name, KEY, data, mask)
    np.testing.assert_array_equal(found.mask, mask)
    released = release.quantise(data, found)
    held = release.measure(data.x, released, mask, norm=norm, radius=budget)
    release.verify(held)  # the budget after rounding to 8 bits, and nothing outside the mask
    clean = np.round(np.asarray(data.x) * 255).astype(np.uint8)
    changed = (released != clean).reshape(len(mask), -1).any(axis=1)
    assert changed[mask].mean() > 0.9  # an image may by chance already be what the noise wants
    assert not changed[~mask].any()
    if norm == "linf":
        assert held.linf >= 1
    if len(found.delta) == len(mask):
        assert (np.asarray(found.delta)[~mask] == 0).all()
        assert found.delta.dtype in (jnp.float16, jnp.float32)
    assert np.isfinite(np.asarray(found.delta, np.float32)).all()
    again = made(name, KEY, data, mask)
    np.testing.assert_array_equal(again.delta, found.delta)
    if name != "ops":
        other = made(name, jax.random.key(4), data, mask)
        assert (np.asarray(other.delta) != np.asarray(found.delta)).any()


def test_a_mask_may_name_everything():
    data, _ = examples()
    found = protect.generate(RECIPES["ue-s"], KEY, data)
    assert found.mask.all()
    assert (np.abs(np.asarray(found.delta, np.float32)).reshape(24, -1).max(axis=1) > 0).all()


def test_noise_joins_by_the_number_of_an_example():
    """A batch in any order wears the noise of its examples."""
    data, mask = examples()
    found = protect.generate(RECIPES["ue-s"], KEY, data, mask)
    order = jnp.asarray(np.random.default_rng(1).permutation(24)[:10])
    whole = sets.perturb(data, found)
    np.testing.assert_array_equal(sets.perturb(sets.take(data, order), found).x, whole.x[order])
