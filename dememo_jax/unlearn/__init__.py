"""Make a trained model forget: methods over masks of the examples to forget."""

from dememo_jax.bounds import published_sigma
from dememo_jax.unlearn import ensemble, heads, langevin, sharded, shards
from dememo_jax.unlearn.dampening import Dampening, dampen, importance, ssd
from dememo_jax.unlearn.descent import Progress, Stage, Term, Unlearner, descent
from dememo_jax.unlearn.drive import run
from dememo_jax.unlearn.guarantees import (
    COMPARATORS,
    INDEPENDENT,
    MEANING,
    calibrate,
    calibrate_model_clipping,
    compose,
    in_words,
)
from dememo_jax.unlearn.heads import Released, certified_head
from dememo_jax.unlearn.images import boundary_expand, boundary_shrink, unsir
from dememo_jax.unlearn.langevin import langevin_head
from dememo_jax.unlearn.masks import last_layers, salient
from dememo_jax.unlearn.newton import Influence, correct, influence
from dememo_jax.unlearn.noisy import (
    check_network,
    noisy_descent,
    noisy_model_clipping,
    output_perturbation,
    released,
)
from dememo_jax.unlearn.objective_perturbation import BudgetSpent, published_head
from dememo_jax.unlearn.recipes import (
    bad_teacher,
    catastrophic_forgetting,
    exact_last_layers,
    finetune,
    gradient_ascent,
    l1_sparse,
    negative_gradient,
    npo,
    published_sgd,
    random_labels,
    retrain,
    salun,
    scrub,
    simnpo,
)
from dememo_jax.unlearn.rewind import Rewound, keeping, rewind

__all__ = [
    "COMPARATORS",
    "INDEPENDENT",
    "MEANING",
    "BudgetSpent",
    "Dampening",
    "Influence",
    "Progress",
    "Released",
    "Rewound",
    "Stage",
    "Term",
    "Unlearner",
    "bad_teacher",
    "boundary_expand",
    "boundary_shrink",
    "calibrate",
    "calibrate_model_clipping",
    "catastrophic_forgetting",
    "certified_head",
    "check_network",
    "compose",
    "correct",
    "dampen",
    "descent",
    "ensemble",
    "exact_last_layers",
    "finetune",
    "gradient_ascent",
    "heads",
    "importance",
    "in_words",
    "influence",
    "keeping",
    "l1_sparse",
    "langevin",
    "langevin_head",
    "last_layers",
    "negative_gradient",
    "noisy_descent",
    "noisy_model_clipping",
    "npo",
    "output_perturbation",
    "published_head",
    "published_sgd",
    "published_sigma",
    "random_labels",
    "released",
    "retrain",
    "rewind",
    "run",
    "salient",
    "salun",
    "scrub",
    "sharded",
    "shards",
    "simnpo",
    "ssd",
    "unsir",
]
