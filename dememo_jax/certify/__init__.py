"""Certify how deep the forgetting is."""

from dememo_jax.certify.neighbourhood import Bound, Certificate, check, depth, draw_scores, from_scores

__all__ = ["Bound", "Certificate", "check", "depth", "draw_scores", "from_scores"]
