"""Certify how deep the forgetting is: around one model, and for all models indistinguishable from a reference."""

from dememo_jax.certify.coverage import Coverage, coverage
from dememo_jax.certify.draws import Cloud, Draws, calibrate, cloud, cloud_of, draw, join
from dememo_jax.certify.indistinguishable import Transfer, transfer_attack, transfer_ball, transfer_event, transfer_gdp
from dememo_jax.certify.neighbourhood import DepthCertificate, Row, bound, depth
from dememo_jax.certify.planning import Demand, Plan, check, plan
from dememo_jax.certify.question import Answer, answers, ask

__all__ = [
    "Answer", "Cloud", "Coverage", "Demand", "DepthCertificate", "Draws", "Plan", "Row", "Transfer", "answers", "ask", "bound",
    "calibrate", "check", "cloud", "cloud_of", "coverage", "depth", "draw", "join", "plan", "transfer_attack", "transfer_ball",
    "transfer_event", "transfer_gdp",
]  # fmt: skip
