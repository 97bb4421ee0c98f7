"""Ask whether a model truly forgot: membership inference and recovery."""

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
    "Group",
    "Recovery",
    "attack",
    "calibrate",
    "descended",
    "halves",
    "membership_gap",
    "membership_scores",
    "recover",
    "score",
    "shadow_scores",
    "shadows",
    "then_unlearn",
    "usual_width",
]
