"""Keep a model from learning data: perturbations that make it unlearnable."""

from dememo_jax.protect.noise import error_minimizing
from dememo_jax.protect.shortcut import one_pixel

__all__ = ["error_minimizing", "one_pixel"]
