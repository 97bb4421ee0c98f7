"""The words that the commands' flags take, how paths are shown, and the settings of texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

Perturb = Literal[
    "ue-s", "ue-c", "em", "gray", "aue", "rem", "sem", "lock", "tap", "tap-untargeted", "hypo", "sep", "entf-push", "entf-pull",
    "clog", "pil", "tue", "tue-paper", "mi", "pue", "ntga", "ops", "lsp", "ar", "cuda", "random", "random-class",
    "regtext",
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
    "retrain", "finetune", "gradient-ascent", "neggrad-plus", "npo", "simnpo", "random-labels", "salun", "scrub", "bad-teacher",
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
Net = Literal["mlp", "cnn", "cnn3", "resnet18", "resnet50", "densenet121", "senet18", "vit-tiny", "decoder"]
if TYPE_CHECKING:
    Class = int  # as `classes.numbered` leaves it
else:
    Class = int | str  # as it is given: its number, or its name
From = Annotated[Path, arg(name="from", metavar="DIR")]
MaybeFrom = Annotated[Path | None, arg(name="from", metavar="DIR")]
Folder = Annotated[Path, arg(metavar="DIR")]


@dataclass(frozen=True)
class Text:
    """How labelled texts become rows of tokens. In a form, \\n is a line break."""

    length: int = 64
    """Tokens of a row, those of the form included: what does not fit is cut off the text's end, and counted."""
    vocab: int = 2000
    """Tokens at most of the tokenizer, which is trained on the clean training texts."""
    tokenizer: Annotated[Path | None, arg(metavar="FILE")] = None
    """Instead of training one: a tokenizer.json, or the folder of a released model that holds one."""
    pad: int = 0
    """The token of that tokenizer which fills rows up, on the left."""
    form: str = r"{text}\nLabel:"
    """What stands around a text. After it the model writes the label."""
    labels: tuple[str, ...] = ()
    """Words of the labels, in the order of the labels' names. Default these names. A space is put before each, unless the form
    ends with white space."""


@dataclass(frozen=True)
class RegText:
    """Which words give a class away, and how they are put into its texts."""

    mode: Literal["insert", "replace"] = "insert"
    """Put a word before another one, or in its place."""
    share: float | None = None
    """Share of a text's words to touch. Default as published: 0.05 where words are inserted, 0.1 where they are replaced."""
    most: int = 10
    """Words of a text to touch, at most."""
    shortest: int = 1
    """Texts with fewer words stay as they are; the published code for insertion has 10."""
    words: int = 10
    """How many words a class has."""
    k: float = 3.0
    """Power of a word's share of its class, in its rank."""
    penalty: float = 2.0
    """Weight of a word's frequency, against it."""
    estimates: Literal["probabilities", "published", "published-polarity"] = "probabilities"
    """Shares of the words counted, or one of the published codes' quotients."""


TEXT, REGTEXT = Text(), RegText()  # as they are where nothing is asked
