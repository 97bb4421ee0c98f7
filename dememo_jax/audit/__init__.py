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
from dememo_jax.audit.likelihood import lira, population_attack, rmia, rmia_interpolation, u_lira
from dememo_jax.audit.membership import membership_gap, membership_scores
from dememo_jax.audit.recovery import Recovery, attack, recover
from dememo_jax.audit.shadows import (
    Group,
    calibrate,
    descended,
    halves,
    score,
    shadow_scores,
    shadows,
    then_unlearn,
    usual_width,
)

__all__ = [
    "EpsilonHat",
    "Group",
    "Recovery",
    "TwoSided",
    "Verdict",
    "attack",
    "calibrate",
    "compare",
    "descended",
    "epsilon_hat",
    "epsilon_points",
    "forgetting_quality",
    "halves",
    "joint_epsilon",
    "klom",
    "lira",
    "membership_gap",
    "membership_scores",
    "population_attack",
    "recover",
    "rmia",
    "rmia_interpolation",
    "score",
    "shadow_scores",
    "shadows",
    "then_unlearn",
    "two_sided",
    "u_lira",
    "usual_width",
]
