"""Every recipe at its smallest, for the tests that hold all of them to the same things."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import models, projected, protect


def network(outputs: int):
    """A small smooth network, quick to compile, whose gradient is zero nowhere, and its features."""

    def init(key, x):
        one, other = jax.random.split(key)
        return {"in": jax.random.normal(one, (x[0].size, 6)) / 14, "out": jax.random.normal(other, (6, outputs))}

    def features(params, x):
        return jnp.tanh(x.reshape(len(x), -1) @ params["in"])

    model = models.from_apply(init, lambda params, x: features(params, x) @ params["out"])
    return model, lambda weights, x: features(weights.params, x)


MODEL, FEATURES = network(3)
ENCODER = network(4)[0]
RADIUS = 16 / 255
SMALL = {"radius": RADIUS, "classes": 3}
ALTERNATING = {**SMALL, "batch": 12, "passes": 2}
ONLINE = {**SMALL, "batch": 12, "learner_steps": 4, "iterations": 2, "inner_steps": 2}
FROZEN = {**SMALL, "epochs": 2, "inner_steps": 3, "parts": 2}

RECIPES = {
    "ue-s": protect.error_minimizing(MODEL, learner_steps=2, inner_steps=3, **ALTERNATING),
    "ue-c": protect.error_minimizing(MODEL, learner_steps=2, granularity="class", portion=0.8, **ALTERNATING),
    "ue-s sapa": protect.error_minimizing(MODEL, learner_steps=2, inner_steps=2, sharpness=0.1, **ALTERNATING),
    "gray": protect.error_minimizing(MODEL, learner_steps=2, inner_steps=3, gray=True, **ALTERNATING),
    "em": protect.minimizing_online(MODEL, **ONLINE),
    "rem": protect.robust(MODEL, draws=2, attack_steps=2, **ONLINE),
    "sem": protect.robust(MODEL, draws=2, attack_steps=2, stable=True, **ONLINE),
    "aue": protect.augmented_minimizing(MODEL, inner_steps=2, **ALTERNATING),
    "lock": protect.learnability_lock(MODEL, learner_steps=2, **ALTERNATING),
    "tap": protect.adversarial(MODEL, restarts=2, **FROZEN),
    "tap-untargeted": protect.adversarial(MODEL, restarts=1, untargeted=True, **FROZEN),
    "hypo": protect.hypocritical(MODEL, **FROZEN),
    "sep": protect.self_ensemble(MODEL, checkpoints_kept=2, **FROZEN),
    "entf-push": protect.entangled_features(MODEL, FEATURES, attack_steps=2, **FROZEN),
    "entf-pull": protect.entangled_features(MODEL, FEATURES, attack_steps=2, form="pull", **FROZEN),
    "clog": protect.tensor_clog(MODEL, batch=12, **FROZEN),
    "pil": protect.linear_surrogate(epochs=2, inner_steps=3, **SMALL),
    "tue": protect.transferable(inner_steps=2, **ALTERNATING),
    "tue-paper": protect.transferable(ENCODER, form="paper", inner_steps=2, learner_steps=2, **ALTERNATING),
    "mi": protect.mutual_information(MODEL, FEATURES, inner_steps=2, **ALTERNATING),
    "pue": protect.provable(
        MODEL, sigmas=(0.0, 0.1), learner_draws=2, noise_draws=2, learner_steps=2, switch=1.1, portion=0.8, **ALTERNATING
    ),
    "ntga": protect.ntga(radius=RADIUS, classes=3, steps=2, block=12, validation=8, rate=50.0),
}
NORMS = dict.fromkeys(RECIPES, "linf") | {"hypo": "l2"}

# name -> (norm, budget, function of key, data and mask)
SHORTCUTS = {
    "ops": ("l0", 2, lambda key, data, mask: protect.one_pixel(data, mask, classes=3, pixels=2)),
    "lsp": ("l2", 1.0, lambda key, data, mask: protect.linear_patches(key, data, mask, classes=3, patch=4, radius=1.0)),
    "ar": ("l2", 1.0, lambda key, data, mask: protect.autoregressive(key, data, mask, classes=3, radius=1.0)),
    "cuda": (None, math.inf, lambda key, data, mask: protect.convolution_filters(key, data, mask, classes=3)),
    "random": (
        "linf",
        RADIUS,
        lambda key, data, mask: protect.random_noise(key, data, mask, ball=projected.linf(RADIUS)),
    ),
}


def examples(count: int = 24):
    """8-bit colour images of three classes, and a mask that leaves out the last class and a few more."""
    random = np.random.default_rng(0)
    data = sets.make(random.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 3)
    return data, (np.arange(count) % 3 < 2) & (np.arange(count) % 7 > 0)
