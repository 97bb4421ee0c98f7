"""Protect, measured: the engine against a bare PGD loop on the same network, and the shortcuts on 50,000 images.

    python benchmarks/protect.py --data cifar10.npz [--full]

The two sides of a ratio run in turn, and the median of the pairs is printed. `--full` adds, for a GPU, UE-s and TAP on the
whole training set with ResNet-18 at the published settings; without it these rows are not measured.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import data as sets
from dememo_jax import losses, models, nets, projected, protect, sources, train
from dememo_jax.protect import objectives, refine
from dememo_jax.types import Weights

NETS = {
    "three-layer CNN (16, 32, 64)": (lambda: nets.cnn(10, (16, 32, 64)), 2048, 128),
    "three-layer CNN (32, 64, 128)": (lambda: nets.cnn(10, (32, 64, 128)), 2048, 128),
    "ResNet-18": (lambda: nets.resnet18(10), 200, 100),
}
RADIUS, STRIDE, STEPS = 8 / 255, 0.8 / 255, 20


def seconds(call):
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def bare(model, weights, data, batch):
    """What anyone would write: sign descent on a batch in a jitted loop, noise in and out."""

    @jax.jit
    def attack(params, stats, x, y, noise):
        def loss(noise):
            logits = model.apply(Weights(params, stats), jnp.clip(x + noise, 0, 1))
            return losses.cross_entropy(logits, y).sum()

        def step(_, noise):
            noise = jnp.clip(noise - STRIDE * jnp.sign(jax.grad(loss)(noise)), -RADIUS, RADIUS)
            return jnp.clip(x + noise, 0, 1) - x

        return jax.lax.fori_loop(0, STEPS, step, noise)

    parts = [(data.x[i : i + batch], data.y[i : i + batch]) for i in range(0, len(data.y), batch)]
    return lambda: [attack(weights.params, weights.stats, x, y, jnp.zeros_like(x)) for x, y in parts]


def engine(model, weights, data, batch):
    """One iteration of the engine without a learner's step: a whole pass, and the error after it."""
    improve = refine.descent(objectives.minimizing(model), projected.linf(RADIUS), stride=STRIDE, steps=STEPS)
    held = train.sgd(model, optax.sgd(0.1))
    held = held._replace(init=lambda key, x: train.start(optax.sgd(0.1), weights))  # a pass over, nothing learned
    recipe = protect.alternate(
        model, lambda steps: held, improve, phases=(protect.Phase(1),), batch=batch, granularity="sample"
    )
    state = recipe.init(jax.random.key(0), data)
    step = jax.jit(recipe.step)
    return lambda: step(jax.random.key(1), state, data)


def against_pgd(images, pairs, networks):
    print("| network | images, batch | bare PGD loop, gradients/s | engine | ratio |\n|---|---|---|---|---|")
    for name, (make, count, batch) in list(NETS.items())[:networks]:
        model = models.from_linen(make())
        data = sets.make(images.x[:count], images.y[:count])
        weights = model.init(jax.random.key(0), data.x[:1])
        one, other = bare(model, weights, data, batch), engine(model, weights, data, batch)
        one(), other()  # compile
        times = [(seconds(one), seconds(other)) for _ in range(pairs if count > 256 else 1)]
        speeds = [count * STEPS / statistics.median(side) for side in zip(*times)]
        ratio = statistics.median(a / b for a, b in times)
        print(f"| {name} | {count}, {batch} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.2f} |", flush=True)


def shortcuts(images):
    many = sets.make(jnp.tile(images.x, (-(-50_000 // len(images.y)), 1, 1, 1))[:50_000], np.resize(images.y, 50_000))
    calls = {
        "OPS, two pixels": lambda: protect.one_pixel(many, classes=10, pixels=2),
        "LSP": lambda: protect.linear_patches(jax.random.key(0), many, classes=10),
        "AR": lambda: protect.autoregressive(jax.random.key(0), many, classes=10),
        "CUDA": lambda: protect.convolution_filters(jax.random.key(0), many, classes=10),
    }
    print("\n| method, 50,000 images | seconds, compilation included | again |\n|---|---|---|")
    for name, call in calls.items():
        print(f"| {name} | {seconds(call):.1f} | {seconds(call):.1f} |", flush=True)


def full(images):
    """Published settings on everything; the seconds include compilation."""
    model, key = models.from_linen(nets.resnet18(10)), jax.random.key(0)
    recipes = {"UE-s": protect.error_minimizing(model), "TAP, one restart": protect.adversarial(model, restarts=1)}
    print(f"\n| {len(images.y):,} images, ResNet-18 | seconds |\n|---|---|")
    for name, recipe in recipes.items():
        print(f"| {name} | {seconds(partial(protect.generate, recipe, key, images)):.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10.npz")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--networks", type=int, default=len(NETS), help="only so many, from the smallest")
    parser.add_argument("--full", action="store_true", help="UE-s and TAP on all of the data: for a GPU")
    arguments = parser.parse_args()
    images, _ = sources.load(arguments.data)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {len(images.y):,} training images\n")
    against_pgd(images, arguments.pairs, arguments.networks)
    shortcuts(images)
    if arguments.full:
        full(images)


if __name__ == "__main__":
    main()
