"""Ask whether a model truly forgot: membership inference and recovery."""

from dememo_jax.audit.distributions import (
    EpsilonHat,
    TwoSided,
    Verdict,
    compare,
    epsilon_hat,
    epsilon_points,
    forgetting_quality,
    joint_epsilon,
    klom,
    two_sided,
)
from dememo_jax.audit.lanes import usual_lanes
from dememo_jax.audit.likelihood import lira, population_attack, rmia, rmia_interpolation, u_lira
from dememo_jax.audit.membership import (
    called_members,
    class_thresholds,
    membership_gap,
    membership_scores,
    sequence_signals,
    signals,
)
from dememo_jax.audit.recovery import Recovery, absolute_radius, attack, recover, sweep
from dememo_jax.audit.relearning import RandomSearch, Relearning, Smoothed, random_search, relearn, smoothed
from dememo_jax.audit.shadows import (
    Group,
    calibrate,
    descended,
    score,
    shadow_scores,
    then_unlearn,
    train_shadows,
    usual_width,
)
from dememo_jax.audit.splits import folds, halves

__all__ = [
    "EpsilonHat",
    "Group",
    "RandomSearch",
    "Recovery",
    "Relearning",
    "Smoothed",
    "TwoSided",
    "Verdict",
    "absolute_radius",
    "attack",
    "calibrate",
    "called_members",
    "class_thresholds",
    "compare",
    "descended",
    "epsilon_hat",
    "epsilon_points",
    "folds",
    "forgetting_quality",
    "halves",
    "joint_epsilon",
    "klom",
    "lira",
    "membership_gap",
    "membership_scores",
    "population_attack",
    "random_search",
    "recover",
    "relearn",
    "rmia",
    "rmia_interpolation",
    "score",
    "sequence_signals",
    "shadow_scores",
    "signals",
    "smoothed",
    "sweep",
    "then_unlearn",
    "train_shadows",
    "two_sided",
    "u_lira",
    "usual_lanes",
    "usual_width",
]
