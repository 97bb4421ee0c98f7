"""The commands that ask something of a trained model: audit, certify and join, sharpness."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dememo_jax.cli.flags import Attack, Class, Folder, From, Landscape, Solver


@dataclass(frozen=True)
class Audit:
    """Attack a model: is it told that it was trained on something, and does that come back?"""

    run: Folder
    """Run folder."""
    source: From
    """An unlearn or train run."""
    against: Annotated[Path | None, arg(metavar="RUN")] = None
    """The retrained model (an unlearn run with retrain), attacked the same way: only the gap to it means anything."""
    attack: tuple[Attack, ...] = ("sok", "signals", "recovery")
    """On this model alone: sok (the SoK's three), signals (confidence, entropies, with a ROC), thresholds (of each class),
    recovery, random (points on the ball's sphere), relearn. With shadow models: lira, rmia. With many models of the same
    recipe, unlearned the same way, and as many retrained: u-lira, klom, epsilon, two-sided, relative."""
    target_class: Class | None = None
    """The class in question, by number or name; default the examples that the run forgot, or all that it was trained on."""
    radii: tuple[float, ...] = (0.4, 0.8)
    """l2 radii of the recovery attack."""
    relative: bool = False
    """Radii as shares of the length of the weights that may move."""
    only: str | None = None
    """Attack only the tensors whose names match this regular expression, such as 'Dense'."""
    hints: Literal["target", "train", "test"] = "target"
    """What the attacker holds: clean training examples in question, of all classes, or the very test images that are
    evaluated, as the published code does by default."""
    hint_share: float = 0.1
    """Share of those training examples that the attacker holds."""
    epochs: int = 60
    batch: int = 128
    lr: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    """Rate of the recovery attack: constant is the stronger attack, cosine (to 0, after every epoch) the published one."""
    statistics: Literal["frozen", "fit"] = "frozen"
    """Batch-norm statistics while attacking; fit is what the published code does."""
    shape: Literal["ball", "sphere"] = "ball"
    """sphere is what the published code does."""
    goal: float = 0.5
    """The accuracy that counts as having come back, in the verdict on recovery and for relearn."""
    draws: int = 1000
    """random: points. With --certificate: neighbours of each attacked model."""
    certificate: Annotated[Path | None, arg(metavar="RUN")] = None
    """A certify run of the same model: each attacked model's neighbours are held against its bound."""
    shadows: int = 64
    """Models of each kind that lira, rmia, u-lira, klom, epsilon, two-sided and relative train."""
    width: int | None = None
    """Shadow models in one vmap; default by network and device."""
    alpha: float = 0.05
    """Chance that a confidence interval misses."""
    seed: int = 2


@dataclass(frozen=True)
class Certify:
    """Bound what the neighbourhood of a model's weights can know (SoK Theorem 1), by Monte-Carlo weight noise."""

    run: Folder
    """Run folder."""
    source: From
    """An unlearn or train run."""
    control: Annotated[Path | None, arg(metavar="DIR")] = None
    """A model trained on clean data, certified the same way beside it: without one a low bound means little."""
    target_class: Class | None = None
    """The class, by number or name, to bound beside the whole test set; default the class that the run forgot."""
    sigma: float = 0.05
    """Standard deviation of the weight noise."""
    relative: bool = False
    """Times the root mean square of each parameter tensor; eta is then in standard deviations, not l2."""
    only: str | None = None
    """Noise on the tensors whose names match this regular expression only, such as 'Dense|kernel'."""
    eta: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05, 0.1)
    """l2 radii to certify."""
    q: tuple[float, ...] = (0.9,)
    """Share of the noise that a bound covers."""
    alpha: float = 0.01
    """Chance that the draws mislead, over all bounds of a model together."""
    draws: int = 1000
    """How many; the same command with more goes on from those made."""
    first: int | None = None
    """Make only the draws from FIRST to DRAWS: a part, for `dememo join`."""
    tau: float | None = None
    """Ask instead whether the upper bound lies below TAU, and stop as soon as that is known."""
    side: Literal["both", "upper", "lower"] = "both"
    form: Literal["corrected", "published"] = "corrected"
    """published: the paper's printed lower bound, which holds with probability 1 - q only."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; float32 is true float32 on every device."""
    statistics: Literal["frozen", "batch"] = "frozen"
    """Batch-norm statistics: held fixed, or computed anew under each noise from 512 fixed training images."""
    images: int | None = None
    """Evaluate a random subset of so many test images, and pay for it with half of alpha."""
    strategy: Literal["auto", "map", "vmap"] = "auto"
    """One network after another, many in one vmap, or whichever is timed to be faster."""
    width: int | None = None
    """Networks in one vmap."""
    plan: bool = False
    """Only tell what draws and time this takes, after a short calibration."""
    seed: int = 3
    checkpoint_seconds: float = 5.0
    """Length of a chunk of draws; each is saved when it ends."""


@dataclass(frozen=True)
class Join:
    """One certificate of draws that were made in parts, by `dememo certify --first`, on several machines."""

    parts: Positional[tuple[Path, ...]]
    """Run folders of the parts, in any order."""
    run: Folder
    """Run folder."""


@dataclass(frozen=True)
class Sharpness:
    """Which layers could still learn (SAL), how far data are from learnable (UD), and what the loss looks like around."""

    run: Folder
    """Run folder."""
    source: From
    """A train or unlearn run. Epochs are those that `dememo train --every` kept; without, the end alone."""
    clean: Annotated[Path | None, arg(metavar="RUN")] = None
    """The same network trained on clean data, its weights kept after the same epochs: UD is against it."""
    control: Annotated[tuple[Path, ...], arg(metavar="RUN ...")] = ()
    """More train runs to measure beside it: noise of the same budget, random labels, other protections."""
    solver: tuple[Solver, ...] = ("ball", "one_step")
    """How SAL is found: ball (the paper's descent), normalized (a stronger search), one_step (as SAM), hvp (quadratic model),
    diagonal (parameter by parameter). Numbers of different solvers are never compared."""
    radius: float = 0.05
    """Of the ball, as a share of the length of each weight tensor."""
    on: Literal["train", "clean", "test"] = "train"
    """Whose loss: the training images as each model met them, their clean counterparts, or test images."""
    images: int = 2000
    """At most so many of them, chosen at random."""
    mode: Literal["evaluation", "mixed"] = "evaluation"
    """mixed, published: the ball's losses against the running training loss of the epoch."""
    rounds: int = 10
    """Passes of ball, steps of normalized."""
    lr: float = 0.1
    """Of the ball's descent."""
    probes: int | None = None
    """Random probes of hvp (default none: exact) and diagonal (16)."""
    batch: int = 256
    only: str | None = None
    """The tensors whose names match this regular expression; default all kernels."""
    weighting: Literal["layer", "parameter"] = "layer"
    """What UD counts."""
    rule: Literal["epochs", "pooled", "median"] = "epochs"
    """The threshold: two-means of each epoch (published), of all together, or the median."""
    landscape: tuple[Landscape, ...] = ()
    """Draw loss and accuracy on the plane of the training trajectory, of two random filter-normalised directions, or of the top
    two eigenvectors of the Hessian."""
    points: int = 21
    """Of a landscape along each axis."""
    span: float = 1.0
    """Half width of a random landscape in lengths of the weights; of top a tenth of it."""
    width: int | None = None
    """Layers in one vmap; default one for convolutions, all for dense networks."""
    seed: int = 4
