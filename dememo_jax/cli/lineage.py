"""What a run stands on: its data, perturbation, network and weights, found by following --from."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import checkpoint, evaluate, files, losses, models, report, sources
from dememo_jax import data as sets
from dememo_jax.cli import console, networks, runs, texts
from dememo_jax.cli.configs import TEXT, Sisa, Text, Train
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Apply, Dataset, Loss, Model, Params, Perturbation, Weights

NOISE, WEIGHTS, FORGET, EPOCHS = "perturbation.npz", "weights", "forget.npy", "epochs"


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of every data set."""

    name: str
    test: Dataset
    classes: int
    digest: str  # of the arrays, or of the run that this comes from
    language: texts.Language | None = None  # where the examples are texts
    names: tuple[str, ...] = ()  # of the classes, where they have any

    def called(self, label: int) -> str:
        """A class by its number, and its name where that is another."""
        name = self.names[label] if 0 <= label < len(self.names) else str(label)
        return f"class {label}" if name == str(label) else f"class {label} ({name})"

    def model_of(self, name: str, outputs: int | None = None, precision: str = "float32") -> Model:
        """The network of that name for images of this size, with an output a class where nothing else is said; or for texts.

        BadInput for a network of the other kind.
        """
        if self.language is not None:
            require(name == networks.DECODER, f"{name} is a network for images; for texts give --model decoder")
            require(outputs in (None, self.classes), "a decoder answers with the labels that there are, and no others")
            return texts.network(self.language, precision)
        require(name != networks.DECODER, f"decoder is a network for texts, a .tsv or .jsonl; {self.name} has images")
        return networks.model(name, self.classes if outputs is None else outputs, self.test.x.shape[1:-1], precision)

    @property
    def loss(self) -> Loss:
        """What networks are trained by: of a text the likelihood of the label among all tokens, so that it is also written."""
        return losses.cross_entropy if self.language is None else losses.label_nll

    def told(self, section: report.Section) -> report.Section:
        """The section, in the words for this kind of data."""
        return section if self.language is None else texts.told(section)


@dataclass(frozen=True, kw_only=True)
class Streamed(Known):
    """Clean data that stays on disk."""

    stream: sources.Stream


@dataclass(frozen=True, kw_only=True)
class Source(Known):
    """Data to train on: clean, or with a perturbation beside it."""

    train: Dataset  # clean
    perturbation: Perturbation | None = None

    @functools.cached_property
    def seen(self) -> Dataset:
        """The training set as a model sees it."""
        return sets.perturb(self.train, self.perturbation)

    @property
    def protected(self) -> np.ndarray:
        """Mask [N] of the protected training examples."""
        return np.zeros(len(self.train.y), bool) if self.perturbation is None else np.asarray(self.perturbation.mask)


@dataclass(frozen=True, kw_only=True)
class Trained(Source):
    """A model, and the data that it was trained on."""

    trained: dict  # configuration of the train run
    weights: Weights
    forget: np.ndarray | None  # [N], after an unlearn run
    unlearned: str | None  # by which method

    @property
    def model(self) -> Model:
        return self.model_of(self.trained["model"])

    @property
    def trainee(self) -> Model:
        """The same in the precision that it was trained in, for whatever trains it further or anew."""
        return self.model_of(self.trained["model"], precision=self.trained["precision"])

    @property
    def frozen(self) -> tuple[Apply, Params]:
        return models.freeze(self.model, self.weights)


def check_origin(config: Train | Sisa) -> None:
    """BadInput for a protect run and data of one's own at once."""
    known = config.source is None or (config.data is None is config.side and config.text == TEXT)
    require(known, "give --from (a protect run, which knows its data) or --data and what belongs to it, not both")


@functools.lru_cache(maxsize=4)
def clean(name: str, data_dir: Path | None, side: int | None = None, text: Text = TEXT) -> Source:
    """The data set that everything starts from: images, or the texts of a `.tsv` or `.jsonl`."""
    if sources.is_texts(name):
        require(data_dir is None, "--data-dir is where TFDS data sets lie: leave it away with texts")
        require(side is None, "--side resizes images: leave it away with texts")
        train, test, language, digest = texts.read(name, text)
        names = language.train.names
        return Source(
            name=name, train=train, test=test, classes=len(names), digest=digest, language=language, names=names
        )  # fmt: skip
    require(text == TEXT, f"--text.* are the settings of texts, a .tsv or .jsonl; {name} has images")
    train, test = sources.load(name, data_dir, side=side)
    digest = runs.digest(train.x, train.y, test.x, test.y)
    classes = sources.classes(train)
    names = _names(name, data_dir, classes)
    return Source(name=name, train=train, test=test, classes=classes, digest=digest, names=names)


def streamed(name: str, data_dir: Path | None, side: int | None, *, batch: int, seed: int) -> Streamed:
    """The same, with the training images on disk; only the test images are in memory."""
    stream = sources.stream(name, data_dir, side=side, batch=batch, seed=seed)
    test = sources.load_split(name, data_dir, split="test", side=side)
    names = _names(name, data_dir, stream.classes)
    return Streamed(name=name, stream=stream, test=test, classes=stream.classes, digest=stream.digest, names=names)


def _names(name: str, data_dir: Path | None, classes: int) -> tuple[str, ...]:
    found = sources.class_names(name, data_dir)
    require(len(found) in (0, classes), f"{name}: {len(found)} names of classes, and there are {classes}")
    return found


def protected(folder: Path) -> Source:
    """The data of a finished protect run."""
    config, digest = _finished(folder, ("protect",))
    with np.load(folder / NOISE, allow_pickle=False) as noise:
        perturbation = Perturbation(*(jnp.asarray(noise[name]) for name in Perturbation._fields))
    return dataclasses.replace(clean(*_located(folder, config)), perturbation=perturbation, digest=digest)


def save(path: Path, perturbation: Perturbation) -> None:
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in perturbation._asdict().items()}
    np.savez(path, allow_pickle=False, **arrays)


def trained(folder: Path, *, expected: tuple[str, ...] = ("train", "unlearn")) -> Trained:
    """The model of a finished train or unlearn run."""
    config, digest = _finished(folder, expected)
    if config["command"] == "unlearn":
        base = trained(folder / config["source"])
        forget = np.load(folder / FORGET, allow_pickle=False)
        return dataclasses.replace(
            base, weights=_weights(folder, base.model, base), forget=forget, unlearned=config["method"], digest=digest
        )
    source = clean(*_located(folder, config)) if config["source"] is None else protected(folder / config["source"])
    source = dataclasses.replace(source, perturbation=narrowed(source, config["protected_classes"]), digest=digest)
    weights = _weights(folder, source.model_of(config["model"]), source)
    config = {"optimizer": "sgd", "schedule": "cosine", "precision": "float32"} | config  # older runs knew no others
    return Trained(**vars(source), trained=config, weights=weights, forget=None, unlearned=None)


def kept(folder: Path, base: Trained) -> dict[int, Weights]:
    """The weights after the epochs that `dememo train --every` kept; of another run those at its end, as its last epoch."""
    store = checkpoint.store(folder / EPOCHS, base.weights, console.warn)
    found = {int(name): store.load(name) for name in store.names()}
    return {epoch: weights for epoch, weights in found.items() if weights is not None} or {base.trained["epochs"]: base.weights}


def _finished(folder: Path, expected: tuple[str, ...]) -> tuple[dict, str]:
    """Configuration and digest of a finished run of an expected command."""
    config = runs.result(folder)["config"]
    wanted = " or ".join(expected)
    require(config["command"] in expected, f"{folder} is a run of `dememo {config['command']}`; expected one of {wanted}")
    return config, runs.digest((folder / runs.CONFIG).read_bytes())


def narrowed(base: Source, classes: Any) -> Perturbation | None:
    """The perturbation, on the given classes only."""
    if base.perturbation is None or not classes:
        require(not classes, "--protected-classes needs a protect run as --from: clean data has no protected classes")
        return base.perturbation
    mask = base.perturbation.mask & sets.of_classes(base.train.y, classes)
    require(mask.any(), f"the protect run protects no example of the classes {list(classes)}")
    return base.perturbation._replace(mask=mask)


def _located(folder: Path, config: dict) -> tuple[str, Path | None, int | None, Text]:
    name, where = config["data"], config["data_dir"]
    path, text = str(folder / name) if sources.is_path(name) else name, runs.wording(folder, config)
    return path, folder / where if where else None, config.get("side"), text


def keep_tokenizer(folder: Path, base: Known) -> None:
    """The run folder holds the tokenizer that its weights or its perturbation belong to; of images nothing."""
    if base.language is not None:
        files.write(folder / runs.TOKENIZER, base.language.tokenizer.to_str(pretty=True))


def _weights(folder: Path, net: Model, base: Source) -> Weights:
    like = jax.eval_shape(net.init, jax.random.key(0), base.train.x[:1])
    restored, damaged = checkpoint.newest(folder / WEIGHTS, like)
    if restored is None:
        raise BadInput(
            f"{folder}: its weights cannot be read ({'; '.join(damaged) or 'none there'}); run it again in a new folder"
        )
    return restored.state


def companion(base: Trained, folder: Path, flag: str) -> Trained:
    """Another model of the same data, for comparison."""
    other = trained(folder)
    pairs = [(getattr(one, part), getattr(two, part)) for one, two in ((base.train, other.train), (base.test, other.test))
             for part in ("x", "y")]  # fmt: skip
    same = all(a is b or np.array_equal(a, b) for a, b in pairs)
    require(same, f"{flag} {folder} is of other data, or of another split of it, than the model in question")
    return other


def retrained(base: Trained, folder: Path) -> Trained:
    """The --reference: a network trained anew on part of the very data that `base` saw."""
    other = companion(base, folder, "--reference")
    require(other.unlearned == "retrain", f"--reference {folder} must be a run of `dememo unlearn --method retrain`")
    alike = all(base.trained[name] == other.trained[name] for name in ("source_digest", "protected_classes"))
    require(alike, f"--reference {folder} was trained on other data, or on other protected classes")
    return other


# --- the sets of the paper ---------------------------------------------------------------------------------------


def splits(base: Source, forget: np.ndarray, observed: tuple[int, ...]) -> dict[str, tuple[str, np.ndarray]]:
    """name -> (which images, mask), as the SoK names them.

    Du protected examples as the model saw them, Duc their clean counterparts, Dc clean ones: those to forget, or where only
    the other kind is forgotten, what stays of the same classes. Dut and Dct test images of the classes of forgotten
    protected and clean examples, Dtr those of the observed classes.
    """
    labels, test_labels = np.asarray(base.train.y), np.asarray(base.test.y)
    concerned = np.isin(labels, labels[forget])
    hidden, open_ = forget & base.protected, forget & ~base.protected
    du, dc = (part if part.any() else concerned & kind for part, kind in ((hidden, base.protected), (open_, ~base.protected)))
    found = {
        "Du": ("seen", du),
        "Duc": ("train", du),
        "Dut": ("test", np.isin(test_labels, labels[hidden])),
        "Dc": ("train", dc),
        "Dct": ("test", np.isin(test_labels, labels[open_])),
        "Dtr": ("test", np.isin(test_labels, observed) if observed else ~np.isin(test_labels, labels[forget])),
    }
    return {name: part for name, part in found.items() if part[1].any()}


def accuracies(base: Trained, weights: Weights, parts: dict[str, tuple[str, np.ndarray]]) -> dict[str, float]:
    """Accuracy on each of the splits, and on the whole test set (Dt)."""
    apply, params = models.freeze(base.model, weights)
    return _shares(base, parts, lambda data: np.asarray(evaluate.correct(apply, params, data)))


def written(base: Trained, weights: Weights, parts: dict[str, tuple[str, np.ndarray]]) -> dict[str, float] | None:
    """The same of the texts whose label the model writes; None for images."""
    language = base.language
    return None if language is None else _shares(base, parts, lambda data: texts.written(language, weights, data))


def _shares(
    base: Trained, parts: dict[str, tuple[str, np.ndarray]], right: Callable[[Dataset], np.ndarray]
) -> dict[str, float]:
    found = {where: right(getattr(base, where)) for where in {where for where, _ in parts.values()} | {"test"}}
    return {name: float(found[where][mask].mean()) for name, (where, mask) in parts.items()} | {
        "Dt": float(found["test"].mean())
    }
