"""Which parameters could learn at all (SAL), how far data are from learnable (UD), and what the loss looks like around."""

from dememo_jax.sharpness.distance import (
    Compared,
    Distance,
    compared,
    learnable_threshold,
    two_means,
    unlearnable_distance,
)
from dememo_jax.sharpness.landscape import (
    Surface,
    Trajectory,
    line,
    loss_and_accuracy,
    plane,
    random_directions,
    trajectory,
)
from dememo_jax.sharpness.learnability import SOLVERS, learnable_layers, sal
from dememo_jax.sharpness.results import Measure, Sal, from_plain, tracked

__all__ = [
    "SOLVERS",
    "Compared",
    "Distance",
    "Measure",
    "Sal",
    "Surface",
    "Trajectory",
    "compared",
    "from_plain",
    "learnable_layers",
    "learnable_threshold",
    "line",
    "loss_and_accuracy",
    "plane",
    "random_directions",
    "sal",
    "tracked",
    "trajectory",
    "two_means",
    "unlearnable_distance",
]
