"""How large an experiment is: the paper's settings, a reduced one for CPU, and one that only shows that everything runs."""

from dataclasses import dataclass, field, replace
from typing import Any

from dememo_jax import nets


@dataclass(frozen=True)
class Learning:
    """How a network is trained: SGD at a cosine, or AdamW."""

    epochs: int
    lr: float
    weight_decay: float
    optimizer: str = "sgd"


@dataclass(frozen=True)
class Certified:
    """Certified unlearning by noisy descent around a fresh initialisation, then free training; and how it is transferred."""

    epsilon: float = 1.0
    delta: float = 1e-5
    steps: int = 10
    clip_init: float = 0.01  # chosen once, on no data
    lr: float = 1e-3
    clip_grad: float = 1.0
    epochs: int = 60  # of the free training
    references: int = 50
    runs: int = 5
    tau: float = 0.1  # accuracy on the class that a reference is to stay below


@dataclass(frozen=True)
class Sharpness:
    """Where Unlearnable Distance is measured, by the paper's solver."""

    networks: tuple[str, ...] = ("resnet18", "densenet121", "vit_tiny")
    countermeasures: tuple[str, ...] = ("none", "crop-flip", "gray", "jpeg", "ueraser-lite", "orthogonal")
    epochs: tuple[int, ...] = (10, 20, 30, 40, 50, 60)  # after which; the last ends the training
    images: int = 2000
    batch: int = 128


Rates = dict[str, tuple[float, float]]  # method -> small and large scale


@dataclass(frozen=True)
class Preset:
    """Everything that a cell's value depends on, beside its name and the data."""

    name: str
    data: str  # where nothing else is said
    dataset: str  # as the paper's tables name it
    images: tuple[int, int] | None  # of each class, for training and testing; None: all
    networks: dict[str, Any]  # the paper's name -> ours
    learning: dict[str, Learning]  # the same names; "victim": the one that is to forget
    batch: int
    surrogate: str
    protect: dict[str, dict[str, Any]]  # perturbation -> what differs from the published settings
    augment: str = "crop-flip"
    side: int | None = None  # pixels, where images are resized
    finetune_epochs: int = 10
    ascent_epochs: int = 5
    samples: int | None = None  # of the retain set, behind the influence function's curvature
    rates: dict[str, Rates] = field(default_factory=dict)  # "LEVEL PERTURBATION", or "*" for all that are not named
    forgotten: tuple[int, ...] = tuple(range(8))  # classes: 0-3 are protected, 4-7 clean
    recovery: Learning = Learning(60, 0.01, 5e-4)
    radii: tuple[float, ...] = (0.4, 0.8)
    sweep: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)  # radii of Figure 9
    sigma: float = 0.02  # of the weight noise of Theorem 1
    etas: tuple[float, ...] = (0.002, 0.005, 0.01)
    draws: int = 1000
    certified: Certified = Certified()
    sharpness: Sharpness = Sharpness()
    seeds: tuple[int, ...] = (0,)


def _level(influence: float, du: float, dc: float, coarse: float = 2.5e-2) -> tuple[Rates, Rates]:
    """A row of the SoK's Table 8: rates for forgetting Du and Dc; influence and ascent at the large scale."""
    found = {"IF": (influence / 10, influence)}
    return (
        {"FT": (5e-3, 6e-2), "GA": (3e-5, du), **found},
        {"FT": (5e-3, coarse), "GA": (3e-5, dc), **found},
    )


_TABLE8 = {
    "tue": _level(5.0, 6e-5, 1.5e-4),
    "ue-s": _level(3.0, 3.5e-5, 8e-5, coarse=2e-2),
    "pue": _level(6.0, 8e-5, 2e-4),
    "ops": _level(3.0, 1e-4, 1.5e-4),
}
_TABLE9 = {"tue": (1.5e-5, 1.1e-4), "ue-s": (1.1e-5, 2.6e-5), "pue": (1.7e-5, 4.8e-5), "ops": (1.7e-5, 6.7e-5)}
_PUBLISHED: dict[str, Rates] = {
    **{f"subset-{part} {kind}": row[i] for kind, row in _TABLE8.items() for i, part in enumerate(("Du", "Dc"))},
    **{f"class {kind}": {"FT": (1.5e-2, 3e-2), "GA": ascent, "IF": (2.0, 7.0)} for kind, ascent in _TABLE9.items()},
}
_CO: dict[str, Any] = {"batch": 128, "learner_steps": 20}


def _networks(classes: int, stem: str = "small", patch: int = 4) -> dict[str, Any]:
    return {
        "resnet18": nets.resnet18(classes, stem=stem),
        "densenet121": nets.densenet121(classes, stem=stem),
        "vit_tiny": nets.vit_tiny(classes, patch),
    }


PRESETS = {
    "smoke": Preset(
        name="smoke",
        data="digits",
        dataset="digits",
        images=(12, 6),
        networks={
            "resnet18": nets.mlp(10, (16, 16)),  # compiles fast
            "densenet121": nets.DenseNet(10, (1, 1), 4),
            "vit_tiny": nets.ViT(10, 4, 12, 1, 3),
        },
        learning={
            **dict.fromkeys(("resnet18", "densenet121", "victim"), Learning(2, 0.1, 5e-4)),
            "vit_tiny": Learning(2, 3e-4, 0.05, "adamw"),
        },
        batch=32,
        surrogate="mlp",
        protect={
            "ue-c": {"passes": 1},
            "pue": {"passes": 1, "draws": 1, "learner_steps": 1},
            "ops": {},
            "ue-s": {"passes": 1, "inner_steps": 1},
            "tue": {},
            "tap": {"epochs": 1, "inner_steps": 2, "restarts": 1},
        },
        augment="none",
        finetune_epochs=1,
        ascent_epochs=1,
        samples=8,
        recovery=Learning(1, 0.01, 5e-4),
        sweep=(0.4, 1.6),
        etas=(0.002,),
        draws=100,
        certified=Certified(epochs=1, references=2, runs=1),
        sharpness=Sharpness(("resnet18",), ("none", "gray"), (1,), 24, 12),
        rates={"*": {"FT": (0.01, 0.05), "GA": (1e-4, 1e-3), "IF": (0.3, 3.0)}},
    ),
    "cpu": Preset(
        name="cpu",
        data="cifar10.npz",
        dataset="cifar10",
        images=(200, 100),
        networks={
            "resnet18": nets.ResNet(10, (1, 1, 1), 8),
            "densenet121": nets.DenseNet(10, (1, 1, 1), 8),
            "vit_tiny": nets.ViT(10, 8, 48, 2, 3),
        },
        learning={
            **dict.fromkeys(("resnet18", "densenet121", "victim"), Learning(20, 0.1, 5e-4)),
            "vit_tiny": Learning(20, 1e-3, 0.05, "adamw"),
        },
        batch=64,
        surrogate="cnn3",
        protect={
            "ue-c": {**_CO, "passes": 25},
            "pue": {**_CO, "passes": 15, "draws": 2, "learner_steps": 10},
            "ops": {},
            "ue-s": {**_CO, "passes": 10, "inner_steps": 10},
            "tue": {},
            "tap": {"epochs": 20, "inner_steps": 100, "restarts": 1},
        },
        finetune_epochs=3,
        samples=256,
        forgotten=(0, 1, 4, 5),
        recovery=Learning(20, 0.01, 5e-4),
        sweep=(0.2, 0.4, 0.8, 1.6, 3.2),
        draws=200,
        certified=Certified(epochs=3, references=16, runs=4),
        sharpness=Sharpness(("resnet18", "vit_tiny"), ("none", "crop-flip", "jpeg"), (10,), 128, 32),
        rates={"*": {"FT": (0.015, 0.1), "GA": (3e-4, 2e-3), "IF": (0.3, 3.0)}},
    ),
    "paper": Preset(
        name="paper",
        data="cifar10.npz",
        dataset="cifar10",
        images=None,
        networks=_networks(10),
        learning={
            **dict.fromkeys(("resnet18", "densenet121"), Learning(60, 0.1, 5e-4)),
            "vit_tiny": Learning(60, 3e-4, 0.05, "adamw"),
            "victim": Learning(100, 0.01, 5e-4),
        },
        batch=128,
        surrogate="resnet18",
        protect={name: {} for name in ("ue-c", "pue", "ops", "ue-s", "tue", "tap")},
        rates=_PUBLISHED,
    ),
}


def _hundred(name: str, vit: Learning, recovery_lr: float, **how: Any) -> None:
    """The paper's settings for a hundred classes (Tables 6 and 7)."""
    cnn = dict.fromkeys(("resnet18", "densenet121", "victim"), Learning(100, 0.1, 5e-5))
    more = {"learning": {**cnn, "vit_tiny": vit}, "recovery": Learning(100, recovery_lr, 5e-5)}
    PRESETS[f"paper-{name}"] = replace(PRESETS["paper"], name=f"paper-{name}", dataset=name, **more, **how)


_hundred(
    "cifar100", Learning(100, 3e-4, 0.05, "adamw"), 0.01,
    data="cifar100", networks=_networks(100), augment="crop-flip-rotation",
)  # fmt: skip
_hundred(
    "imagenet100", Learning(150, 1e-3, 0.1, "adamw"), 0.1,
    data="imagenet100/", images=(260, 50), side=224, networks=_networks(100, "large", 16), augment="resized-crop-flip-jitter",
)  # fmt: skip
