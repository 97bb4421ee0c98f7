"""Ask whether a model truly forgot: membership inference and recovery."""

from dememo_jax.audit.membership import membership_gap, membership_scores
from dememo_jax.audit.recovery import Recovery, attack, recover

__all__ = ["Recovery", "attack", "membership_gap", "membership_scores", "recover"]
