"""Keep a model from learning data: perturbations that make it unlearnable, and what a victim makes of them.

Learned noise is a `Recipe`, a Method with a ceiling; `generate` runs one. Noise without gradients is a function of the
data. Both take a mask of the examples to protect, and both end in a `Perturbation`.
"""

from dememo_jax.protect.bilevel import Phase, Recipe, alternate
from dememo_jax.protect.countermeasures import Countermeasure, combine, countermeasure, shortcut_directions
from dememo_jax.protect.features import mutual_information, transferable
from dememo_jax.protect.frozen import (
    adversarial,
    entangled_features,
    hypocritical,
    linear_surrogate,
    self_ensemble,
    tensor_clog,
)
from dememo_jax.protect.generate import check, finished, generate
from dememo_jax.protect.lock import learnability_lock, unlock
from dememo_jax.protect.minimizing import augmented_minimizing, error_minimizing, minimizing_online, robust
from dememo_jax.protect.patterns import autoregressive, convolution_filters, linear_patches
from dememo_jax.protect.provable import provable
from dememo_jax.protect.refine import descent
from dememo_jax.protect.shortcut import one_pixel
from dememo_jax.protect.tangent import ntga
from dememo_jax.protect.victim import Outcome, evaluate, learned, random_labels, random_noise, trials
from dememo_jax.protect.words import Injected, Words, inject, regtext, traces

__all__ = [
    "Countermeasure",
    "Injected",
    "Outcome",
    "Phase",
    "Recipe",
    "Words",
    "adversarial",
    "alternate",
    "augmented_minimizing",
    "autoregressive",
    "check",
    "combine",
    "convolution_filters",
    "countermeasure",
    "descent",
    "entangled_features",
    "error_minimizing",
    "evaluate",
    "finished",
    "generate",
    "hypocritical",
    "inject",
    "learnability_lock",
    "learned",
    "linear_patches",
    "linear_surrogate",
    "minimizing_online",
    "mutual_information",
    "ntga",
    "one_pixel",
    "provable",
    "random_labels",
    "random_noise",
    "regtext",
    "robust",
    "self_ensemble",
    "shortcut_directions",
    "tensor_clog",
    "traces",
    "transferable",
    "trials",
    "unlock",
]
