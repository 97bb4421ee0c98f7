"""One frozen dataclass for each command; what stands here is what `--help` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dememo_jax.cli.flags import (
    REGTEXT,
    TEXT,
    Attack,
    Augmentation,
    Class,
    Comparator,
    Counter,
    Folder,
    Forget,
    From,
    MaybeFrom,
    Net,
    Optimizer,
    Perturb,
    Precision,
    RegText,
    Schedule,
    Text,
)
from dememo_jax.cli.questions import Audit, Certify, Join, Sharpness

__all__ = [
    "COMMANDS", "REGTEXT", "TEXT", "Attack", "Audit", "Augmentation", "Certify", "Comparator", "Counter", "Forget", "Join",
    "Net", "Perturb", "Protect", "Quickstart", "RegText", "Report", "Sharpness", "Sisa", "Text", "Train", "Unlearn",
]  # fmt: skip


@dataclass(frozen=True)
class Protect:
    """Make data unlearnable: perturb the training images, or texts, before they are released."""

    run: Folder
    """Run folder: configuration, checkpoints, release, result. Started again, the same command goes on where it stopped."""
    method: Perturb = "ue-s"
    """Error-minimizing: ue-s, ue-c, em, gray, aue, rem, sem, lock. Against a clean surrogate: tap, tap-untargeted, hypo, sep,
    entf-push, entf-pull, clog, pil. Features: tue, tue-paper, mi. Certified surrogate: pue. Kernel: ntga. Without gradients:
    ops, lsp, ar, cuda. Controls: random, random-class. For texts: regtext."""
    data: str = "digits"
    """digits, a TFDS name such as cifar10, a path to an .npz with x_train, y_train, x_test, y_test, or to a folder of images,
    train/CLASS/ and test/CLASS/ or val/CLASS/. Texts: a .tsv (text and label) or .jsonl with "train" in its name, and the
    test texts in the file beside it, "test" in the place of "train"."""
    data_dir: Path | None = None
    """Where TFDS data sets lie."""
    side: int | None = None
    """Pixels: resize the images of a folder, or of TFDS, and keep the middle square."""
    classes: tuple[Class, ...] = ()
    """Classes to protect, by number or name; none means all."""
    share: float = 1.0
    """Share of those classes' examples to protect."""
    radius: float | None = None
    """Budget in the method's norm, pixels being in [0, 1]. Default as published (8/255 in l-inf for most); on the 8 x 8
    digits 6.4 times as much."""
    pixels: int = 2
    """How many pixels of an image ops overwrites."""
    passes: int | None = None
    """Most passes over the data of ue, gray, aue, lock, pue, tue, mi and ntga; those that watch the training error stop
    earlier. Default as published; on digits 15 at most."""
    epochs: int | None = None
    """Epochs of the surrogate of tap, hypo, sep, entf, clog and pil on clean data, or of the learner of em, rem and sem."""
    inner_steps: int | None = None
    """Gradient steps of an image in one pass; default as published."""
    restarts: int | None = None
    """How often tap starts anew; published: 8."""
    draws: int | None = None
    """Draws that a gradient is the mean of: weight noise of pue (published: 100 for the surrogate, 10 for the noise),
    augmentations of rem and sem (5), checkpoints of sep (30)."""
    attack_steps: int | None = None
    """Steps of the adversary in rem, sem and entf; published: 10."""
    sharpness: float = 0.0
    """Take gradients at worst-case weights, this far away in l2 (SAPA)."""
    model: Net = "cnn"
    """Surrogate network, and the network of victims; for texts decoder, of victims alone."""
    batch: int | None = None
    """Default as published (512 or 128); on digits 64."""
    learner_steps: int | None = None
    """Batches the surrogate of ue, gray, lock and pue learns between passes. Default a tenth of the data, as published."""
    images: bool = False
    """Release a folder of PNG files as well, images/LABEL/INDEX.png."""
    evaluate: bool = False
    """Train victims on clean and on released data, under the countermeasures, and on the controls."""
    countermeasures: tuple[Counter, ...] = ("cutout", "mixup", "gray", "jpeg", "ueraser-lite", "at")
    """What the victims of --evaluate try."""
    victim_epochs: int = 20
    """Epochs of the victims of --evaluate."""
    victim_augment: Augmentation = "none"
    """Augmentation of the victims of --evaluate."""
    text: Text = TEXT
    regtext: RegText = REGTEXT
    seed: int = 0
    checkpoint_seconds: float = 20.0
    """Least time between checkpoints."""


@dataclass(frozen=True)
class Train:
    """Train a victim on clean data, or on the protected data of a protect run."""

    run: Folder
    """Run folder."""
    source: MaybeFrom = None
    """A protect run, to train on its data; without it, the clean data."""
    data: str | None = None
    """Clean data, as in protect. Default digits; not together with --from."""
    data_dir: Path | None = None
    """Where TFDS data sets lie."""
    side: int | None = None
    """Pixels: resize the images of a folder, or of TFDS, and keep the middle square."""
    stream: bool = False
    """Read the training images from disk as they are needed, for data that does not fit into memory."""
    protected_classes: tuple[Class, ...] = ()
    """Use the perturbation on these classes only; none means all that the protect run covers."""
    model: Net = "cnn"
    """decoder, for texts: two blocks of width 64, trained from nothing to write the label after the text."""
    epochs: int = 20
    batch: int = 64
    optimizer: Optimizer | None = None
    """sgd clips the gradient at norm 5; adamw decays all parameters, apart from the gradient. Default sgd, of decoder adamw."""
    schedule: Schedule = "cosine"
    """Of the learning rate: cosine falls to zero, step tenfold after half and three quarters of the run."""
    lr: float | None = None
    """Peak learning rate. Default 0.1, of adamw 3e-4, of decoder and adamw 1e-3."""
    momentum: float = 0.9
    """Of sgd; of adamw's mean gradient."""
    weight_decay: float | None = None
    """Default 5e-4, of adamw 0.05."""
    precision: Precision = "float32"
    """Of the arithmetic in training, here and when this run is retrained or unlearned; parameters, batch-norm statistics and
    logits are float32. What is evaluated, audited or certified is computed in float32."""
    augment: Augmentation = "none"
    """Rotation by up to 15 degrees; resized crop of 8 % to all of the area, jitter of brightness, contrast and saturation by
    up to 0.4."""
    countermeasure: tuple[Counter, ...] = ()
    """What the victim does against protection; several are composed. They follow the augmentation."""
    random_labels: bool = False
    """A control: deal the labels out at random."""
    every: int | None = None
    """Keep the weights after every so many epochs, and the last, for `dememo sharpness`."""
    text: Text = TEXT
    seed: int = 0
    checkpoint_seconds: float = 20.0


@dataclass(frozen=True)
class Unlearn:
    """Make a trained model forget classes, a share of them, or any set of training examples."""

    run: Folder
    """Run folder."""
    source: From
    """A train run, or an unlearn run to forget more."""
    method: Forget = "finetune"
    """Exact: retrain. On the retain set alone: finetune, l1-sparse, cf-k, eu-k. On the forget set alone: gradient-ascent,
    boundary-shrink, boundary-expand. On both: neggrad-plus, npo, simnpo, random-labels, salun, scrub, bad-teacher, unsir. In
    one step: influence, ssd. Certified: noisy, noisy-clip, output-noise."""
    forget_class: tuple[Class, ...] = ()
    """Classes to forget, by number or name."""
    forget_share: float = 1.0
    """Share of those classes' training examples to forget."""
    forget_part: Literal["all", "protected", "clean"] = "all"
    """Of those, all, the protected (Du) or the clean ones (Dc)."""
    forget_index: Annotated[Path | None, arg(metavar="FILE")] = None
    """Instead of classes: a .npy of indices or with a mask [N], or a text file with one index a line. N zeros and ones are
    a mask."""
    observed_classes: tuple[Class, ...] = ()
    """Classes whose test images show what is left of the rest (Dtr); none means all that are not forgotten."""
    reference: Annotated[Path | None, arg(metavar="DIR")] = None
    """The retrained model (an unlearn run with retrain, of the same examples): the gap to it is shown, and its seconds."""
    epochs: int | None = None
    """Passes over the retain set; over the forget set for methods that see no other. Default as published; retrain as the
    victim was trained; after the noise of a certified method, free fine-tuning."""
    lr: float | None = None
    """Learning rate; default as published, on digits a tuned one. These are for sgd: after a victim by adamw it must be given.
    Of a certified method: in the noisy steps."""
    batch: int | None = None
    """Default 64; of the passes of influence and ssd 128."""
    statistics: Literal["fit", "frozen"] = "fit"
    """Batch norm while descending: in training mode, as published, or left as it is."""
    retain_weight: float | None = None
    """neggrad-plus: share of the retain loss (0.9). npo, simnpo: weight of the retain term (1); 0 is without it."""
    beta: float | None = None
    """Inverse temperature of npo (0.1), of simnpo (4.5)."""
    hold: Literal["nll", "kl"] | None = None
    """npo: what the retain term is, the loss or the divergence from the given model."""
    share: float | None = None
    """salun: share of the weights that may move (0.5). bad-teacher: share of the retain set in an epoch (0.3)."""
    forget_rounds: int | None = None
    """scrub: epochs with a pass over the forget set (3)."""
    rewind: bool = False
    """scrub: go back to the epoch that errs on the forgotten as on test images of their classes (SCRUB+R)."""
    strength: float | None = None
    """l1-sparse: weight of the l1 norm (5e-4). ssd: lambda (1)."""
    layers: int | None = None
    """cf-k, eu-k: how many of the last layers move (1)."""
    radius: float | None = None
    """boundary-shrink: step to the neighbour, in pixels of [0, 1] (0.1)."""
    alpha: float | None = None
    """influence: scale of the step (0.3). ssd: how much more important to the forget set (10, on digits 100)."""
    inverse: Literal["fisher", "ggn", "hessian", "diagonal", "identity", "published"] | None = None
    """influence: of which curvature; published is no inverse (fisher)."""
    damping: float | None = None
    """influence: added to the curvature (0.1)."""
    samples: int | None = None
    """influence: examples the curvature is taken from."""
    epsilon: float | None = None
    """Certified: the guarantee (1)."""
    delta: float = 1e-5
    """Certified: the guarantee's remainder."""
    comparator: Comparator = "same_procedure"
    """Certified: what the released model cannot be told from."""
    steps: int | None = None
    """Certified: noisy steps (10)."""
    clip_init: float | None = None
    """Certified: radius of the ball that the given weights are clipped into (0.01)."""
    clip_grad: float | None = None
    """noisy: largest l2 norm of a gradient (1)."""
    clip_model: float | None = None
    """noisy-clip: largest distance from the centre (0.1)."""
    noise_decay: float | None = None
    """noisy, noisy-clip: weight decay towards the centre in the noisy steps (0)."""
    centre: Literal["init", "zero"] | None = None
    """Certified: the ball lies around a fresh initialisation (the default), or around zero."""
    noise_seed: int | None = None
    """Certified, for experiments: noise from this seed instead of a secret key, so that the run can be repeated. Whoever knows
    the seed can take the noise away: no guarantee against them."""
    seed: int = 1
    checkpoint_seconds: float = 20.0


@dataclass(frozen=True)
class Sisa:
    """Exact unlearning (SISA): train shards of the data in slices, and delete examples by retraining only what saw them."""

    run: Folder
    """Run folder. Called again with deletions, the same command carries them out; without, it finishes what is open."""
    source: MaybeFrom = None
    """A protect run, to train on its data; without it, the clean data."""
    data: str | None = None
    """Clean data, as in protect. Default digits; not together with --from."""
    data_dir: Path | None = None
    """Where TFDS data sets lie."""
    side: int | None = None
    """Pixels: resize the images of a folder, or of TFDS, and keep the middle square."""
    model: Net = "cnn"
    shards: int = 5
    """Networks, each on its own share of the data; they vote."""
    slices: int = 4
    """Parts of a shard, added one after another; each leaves a checkpoint to go back to."""
    epochs: int = 20
    """What each network would train on all of its shard; the stages share out as many example passes."""
    batch: int = 64
    optimizer: Optimizer | None = None
    """As in train, at a constant rate."""
    lr: float | None = None
    """Learning rate. Default as in train."""
    momentum: float = 0.9
    weight_decay: float | None = None
    """Default 5e-4, of adamw 0.05."""
    precision: Precision = "float32"
    """Of the arithmetic in training, as in train."""
    augment: Augmentation = "none"
    vote: Literal["votes", "mean"] = "votes"
    """The class that most networks put first, or the mean of their softmax outputs."""
    voters: Literal["uniform", "proportional"] = "uniform"
    """All networks alike, or by what remains of their shards."""
    width: int = 1
    """Shards trained at once in one vmap."""
    delete: tuple[int, ...] = ()
    """Indices of training examples to delete."""
    delete_index: Annotated[Path | None, arg(metavar="FILE")] = None
    """More of them: a .npy of indices or with a boolean mask [N], or a text file with one index a line."""
    text: Text = TEXT
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """Make one page of finished runs: report.html and the pictures."""

    sources: Positional[tuple[Path, ...]]
    """Run folders, in the order of the page."""
    run: Folder = Path("report")
    """Folder to write to."""


@dataclass(frozen=True)
class Quickstart:
    """The whole life of dememorization on 1,797 real images: protect, train, unlearn, audit, certify, report."""

    run: Folder = Path("runs/quickstart")
    """Run folder."""
    radius: float = 0.2
    """l-infinity budget: 8 x 8 images have 64 pixels, and 8/255 hides nothing in them."""
    model: Net = "cnn"
    """Network of surrogate and victims."""
    pixels: int = 2
    passes: int = 15
    epochs: int = 20
    forget: tuple[int, int] = (0, 5)
    """One protected class (0-3) and one clean class (4-7)."""
    recovery_epochs: int = 60
    radii: tuple[float, float] = (0.4, 0.8)
    draws: int = 1000
    sigma: float = 0.05
    eta: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05, 0.1)
    seed: int = 0
    checkpoint_seconds: float = 20.0


Config = Protect | Train | Unlearn | Sisa | Audit | Certify | Join | Sharpness | Report | Quickstart
COMMANDS: dict[str, Any] = {
    kind.__name__.lower(): kind for kind in (Quickstart, Protect, Train, Unlearn, Sisa, Audit, Certify, Join, Sharpness, Report)
}
