"""The landscapes of `dememo sharpness`: planes through the final weights, each saved as it ends."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import curvature, files, keys, models, report, sharpness, tree
from dememo_jax.cli import console, runs
from dememo_jax.cli.configs import Sharpness

WORDS = {
    "trajectory": "the plane in which training moved most (principal components of the start and the kept epochs)",
    "random": "two random filter-normalised directions",
    "top": "the top two eigenvectors of the Hessian",
}
MARGIN = 0.25  # around a trajectory, as a share of its extent


def drawn(config: Sharpness, subject: Any) -> tuple[tuple[tuple[str, str], ...], dict[str, Any]]:
    """Pictures with their captions, and the numbers, of every landscape that was asked for."""
    directory = config.run / runs.CHECKPOINTS / "landscapes"
    pictures, values = [], dict[str, Any]()
    for kind in config.landscape:
        found = values[kind] = runs.once(directory / f"{kind}.json", functools.partial(_plane, config, subject, kind))
        surface = {name: np.array(found[name]) for name in ("loss", "accuracy")}
        panels = [("loss, nats (log)", surface["loss"], True), ("accuracy", surface["accuracy"], False)]
        file = f"landscape-{kind}.png"
        picture = report.landscape(found["x"], found["y"], panels, found["labels"], found["trajectory"])
        files.write(config.run / file, picture)
        pictures.append((file, f"Loss and accuracy on {WORDS[kind]}{found['said']}"))
    return tuple(pictures), values


def _plane(config: Sharpness, subject: Any, kind: str) -> dict[str, Any]:
    last = subject.epochs[max(subject.epochs)]
    apply, params = models.freeze(subject.base.model, last)
    key, grid = keys.named(jax.random.key(config.seed), f"landscape {kind}"), np.linspace(-1, 1, config.points)
    x = y = config.span * grid
    labels: tuple[str, ...] = ("first direction", "second direction")
    points, said = None, ""
    if kind == "trajectory":
        start = subject.base.model.init(jax.random.key(subject.base.trained["seed"]), subject.images.x[:1])
        path = sharpness.trajectory([start.params, *(subject.epochs[epoch].params for epoch in sorted(subject.epochs))])
        ways, points = path.directions, path.points
        x, y = (_around(points[:, i], config.points) for i in range(2))
        labels = tuple(f"l2 distance along component {i + 1} ({path.explained[i]:.0%})" for i in range(2))
    elif kind == "random":
        ways = sharpness.random_directions(key, params)
        labels = ("first direction, in lengths of the weights", "second")
    else:
        length = 0.1 * float(tree.norm(params))
        product = curvature.operator(apply, params, subject.images, batch=config.batch)
        found = jax.jit(curvature.top_eigenpairs, static_argnames=("count",))(product, params, key, count=2)
        ways = jax.tree.map(lambda leaf: jnp.asarray(length * leaf, jnp.float32), found.vectors)
        labels = ("first eigenvector, in tenths of the weights' length", "second")
        said = f"; eigenvalues {float(found.values[0]):.3g} and {float(found.values[1]):.3g}"
    metric = sharpness.loss_and_accuracy(apply, batch=config.batch)
    with console.progress(f"landscape {kind}", config.points**2, 0, "points") as advance:
        surface = sharpness.plane(
            metric, params, subject.images, ways, x, y, every=max(1, config.points**2 // 20),
            after=lambda done, _: advance(done),
        )  # fmt: skip
    values = {"loss": surface.values[..., 0], "accuracy": surface.values[..., 1]}
    return {"x": x, "y": y, **values, "labels": labels, "trajectory": points, "said": said}


def _around(at: np.ndarray, points: int) -> np.ndarray:
    low, high = at.min(), at.max()
    room = MARGIN * (high - low)
    return np.linspace(low - room, high + room, points)
