"""The words that the commands' flags take, and how paths are shown."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

Perturb = Literal[
    "ue-s", "ue-c", "em", "gray", "aue", "rem", "sem", "lock", "tap", "tap-untargeted", "hypo", "sep", "entf-push", "entf-pull",
    "clog", "pil", "tue", "tue-paper", "mi", "pue", "ntga", "ops", "lsp", "ar", "cuda", "random", "random-class",
]  # fmt: skip
Counter = Literal[
    "rotation", "cutout", "mixup", "cutmix", "jitter", "gaussian", "gray", "bdr", "jpeg", "ueraser-lite", "ueraser-max", "at",
    "at-l2", "orthogonal",
]  # fmt: skip
Augmentation = Literal["none", "crop-flip", "crop-flip-rotation", "resized-crop-flip-jitter"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "step", "constant"]
Precision = Literal["float32", "bfloat16"]
Forget = Literal[
    "retrain", "finetune", "gradient-ascent", "neggrad-plus", "npo", "random-labels", "salun", "scrub", "bad-teacher",
    "l1-sparse", "boundary-shrink", "boundary-expand", "unsir", "cf-k", "eu-k", "ssd", "influence", "noisy", "noisy-clip",
    "output-noise",
]  # fmt: skip
Attack = Literal[
    "sok", "signals", "thresholds", "lira", "rmia", "u-lira", "klom", "epsilon", "two-sided", "relative", "recovery", "random",
    "relearn",
]  # fmt: skip
Solver = Literal["ball", "normalized", "one_step", "hvp", "diagonal"]
Landscape = Literal["trajectory", "random", "top"]
Comparator = Literal["same_procedure", "from_centre", "data_independent"]
Net = Literal["mlp", "cnn", "cnn3", "resnet18", "resnet50", "densenet121", "senet18", "vit-tiny"]
From = Annotated[Path, arg(name="from", metavar="DIR")]
MaybeFrom = Annotated[Path | None, arg(name="from", metavar="DIR")]
Folder = Annotated[Path, arg(metavar="DIR")]
