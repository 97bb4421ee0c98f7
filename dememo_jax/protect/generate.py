"""Run a recipe to its end."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dememo_jax import callbacks, loop
from dememo_jax.errors import NonFinite
from dememo_jax.protect.bilevel import Recipe
from dememo_jax.types import Dataset, Key, Method, Perturbation

Watch = Callable[[int, Any, dict[str, float]], callbacks.Answer]  # iterations done, state, info of the last


def generate(recipe: Recipe, key: Key, data: Dataset, mask: Any = None, *, watch: Watch = lambda *_: None) -> Perturbation:
    """The perturbation of `data` that a recipe makes, for the examples where `mask` [N] (None: for all).

    Stops after `recipe.steps` iterations, or as soon as the error is at most `recipe.stop`. After each iteration
    `watch(done, state, info)` may print or save, and return `loop.STOP` to end the run. Raises BadInput before any work;
    NonFinite, which names the outer iteration, with the perturbation before it as `kept`.
    """
    mask = None if mask is None else np.asarray(mask)
    check(recipe, data, mask)
    state = jax.jit(recipe.init)(key, data, mask)

    def after(done: int, state: Any, info: dict[str, np.ndarray]) -> callbacks.Answer:
        last = {name: float(values[-1]) for name, values in info.items()}
        stop = callbacks.stops(watch(done, state, last), "watch")
        return loop.STOP if stop or finished(recipe, last) else None

    try:
        state = loop.run(Method(recipe.init, recipe.step), key, state, data, steps=recipe.steps, every=1, after=after)
    except NonFinite as error:
        named = str(error).replace("at step", "at outer iteration")
        raise NonFinite(named, kept=recipe.finish(error.kept, data)) from error
    return recipe.finish(state, data)


def check(recipe: Recipe, data: Dataset, mask: Any = None) -> None:
    """BadInput for data, labels, a mask or a surrogate that do not fit, at no cost: nothing is computed."""
    jax.eval_shape(lambda key: recipe.init(key, data, mask), jax.random.key(0))  # data and mask stay values that can be read


def finished(recipe: Recipe, info: dict[str, float]) -> bool:
    """Whether the info of an iteration says that the noise is good enough."""
    return recipe.stop is not None and info["error"] <= recipe.stop
