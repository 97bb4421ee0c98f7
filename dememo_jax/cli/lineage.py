"""What a run stands on: its data, perturbation, network and weights, found by following --from."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dememo_jax import data as sets
from dememo_jax import evaluate, files, losses, models, report, sources, tree
from dememo_jax.cli import artefacts, console, identity, networks, runs, texts
from dememo_jax.cli.configs import TEXT, Sisa, Text, Train
from dememo_jax.cli.identity import EPOCHS, WEIGHTS, Inputs, Named
from dememo_jax.errors import require
from dememo_jax.sources.named import chosen
from dememo_jax.types import Apply, Dataset, Loss, Model, Params, Perturbation, Weights


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of every data set."""

    name: str
    test: Dataset
    classes: int
    inputs: Inputs  # digests of the arrays, or of the run that this comes from and of its parts
    language: texts.Language | None = None  # where the examples are texts
    names: tuple[str, ...] = ()  # of the classes, where they have any
    repeated: int = 0  # test examples that are training examples too, where both are in memory

    def called(self, label: int) -> str:
        """A class by its number, and its name where that is another."""
        name = self.names[label] if 0 <= label < len(self.names) else str(label)
        return f"class {label}" if name == str(label) else f"class {label} ({name})"

    @property
    def digest(self) -> str:
        """Of the arrays, or of the run that this comes from."""
        return self.inputs["digest"].digest

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
        """The section, in the words for this kind of data, with what qualifies its numbers."""
        section = self.qualified(section)
        return section if self.language is None else texts.told(section)

    def qualified(self, section: report.Section) -> report.Section:
        """The section, its first table saying so where test examples are not unseen."""
        if not self.repeated:
            return section
        first, *rest = section.tables
        note = f"{first.note} {_repeated(self.repeated, len(self.test.y))}.".strip()
        return dataclasses.replace(section, tables=(dataclasses.replace(first, note=note), *rest))


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


def clean(name: str, data_dir: Path | None, side: int | None = None, text: Text = TEXT) -> Source:
    """The data set that everything starts from: images, or the texts of a `.tsv` or `.jsonl`."""
    return _clean(name, data_dir, side, text, _stamp(name))


def _stamp(name: str) -> tuple:
    """What changes when the files of a data set do, so that one process does not go on with what it read before."""
    if not sources.is_path(name):
        return ()
    paths = [Path(name)] if not Path(name).is_dir() else sorted(path for path in Path(name).rglob("*") if path.is_file())
    if sources.is_texts(name):
        paths.append(texts.beside(Path(name)))
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists())


@functools.lru_cache(maxsize=4)
def _clean(name: str, data_dir: Path | None, side: int | None, text: Text, stamp: tuple) -> Source:
    if sources.is_texts(name):
        require(data_dir is None, "--data-dir is where TFDS data sets lie: leave it away with texts")
        require(side is None, "--side resizes images: leave it away with texts")
        train, test, language, digest = texts.read(name, text)
        classes, names = len(language.train.names), language.train.names
    else:
        require(text == TEXT, f"--text.* are the settings of texts, a .tsv or .jsonl; {name} has images")
        train, test = sources.load(name, data_dir, side=side)
        language, digest, classes = None, identity.digest(train.x, train.y, test.x, test.y), sources.classes(train)
        names = _names(name, data_dir, classes)
    inputs, repeated = {"digest": Named(name, digest)}, int(sets.repeated(train, test).sum())
    if repeated:
        console.warn(f"{name}: {_repeated(repeated, len(test.y))}")
    return Source(
        name=name, train=train, test=test, classes=classes, inputs=inputs, language=language, names=names, repeated=repeated
    )


def _repeated(count: int, total: int) -> str:
    return f"{count:,} of the {total:,} test examples are training examples too: what is measured on them is not unseen"


def streamed(name: str, data_dir: Path | None, side: int | None, *, batch: int, seed: int) -> Streamed:
    """The same, with the training images on disk; only the test images are in memory."""
    stream = sources.stream(name, data_dir, side=side, batch=batch, seed=seed)
    test = sources.load_split(name, data_dir, split="test", side=side)
    inputs, names = _on_disk(name, stream.digest, test), _names(name, data_dir, stream.classes)
    return Streamed(name=name, stream=stream, test=test, classes=stream.classes, inputs=inputs, names=names)


def _names(name: str, data_dir: Path | None, classes: int) -> tuple[str, ...]:
    found = sources.class_names(name, data_dir)
    require(len(found) in (0, classes), f"{name}: {len(found)} names of classes, and there are {classes}")
    return found


def _on_disk(name: str, digest: str, test: Dataset) -> Inputs:
    """What identifies a streamed set: of the training images what their source says, of the test images their values."""
    return {"digest": Named(name, digest), "test_digest": Named(f"the test set of {name}", identity.digest(test.x, test.y))}


def protected(folder: Path) -> Source:
    """The data of a finished protect run. Raises BadInput when its data or its noise are not what they were."""
    done = _finished(folder, ("protect",))
    source = clean(*_located(folder, done))
    identity.check(folder, done["config"], "data", source.inputs)
    noise = artefacts.perturbation(folder, done, len(source.train.y))
    inputs = _inputs(folder) | {"perturbation_digest": Named(folder / identity.NOISE, files.digest(folder / identity.NOISE))}
    return dataclasses.replace(source, perturbation=noise, inputs=inputs)


def trained(folder: Path, *, expected: tuple[str, ...] = ("train", "unlearn")) -> Trained:
    """The model of a finished train or unlearn run.

    Raises BadInput, naming it, when anything that the run was made from, or left, is not what it was.
    """
    done = _finished(folder, expected)
    config = done["config"]
    if config["command"] == "unlearn":
        base = trained(folder / config["source"])
        identity.check(folder, config, "source", base.inputs)
        forget = artefacts.forget(folder, done, len(base.train.y))
        weights, inputs = _weights(folder, done, base.model, base)
        return dataclasses.replace(base, weights=weights, forget=forget, unlearned=config["method"], inputs=inputs)
    source = _learned_from(folder, done)
    source = dataclasses.replace(source, perturbation=narrowed(source, config["protected_classes"]))
    weights, inputs = _weights(folder, done, source.model_of(config["model"]), source)
    known = {**vars(source), "inputs": inputs}
    config = {"optimizer": "sgd", "schedule": "cosine", "precision": "float32"} | config  # older runs knew no others
    return Trained(**known, trained=config, weights=weights, forget=None, unlearned=None)


def _learned_from(folder: Path, done: dict) -> Source:
    """The data of a train run, which are those that it was made from."""
    config = done["config"]
    if config["source"] is not None:
        source = protected(folder / config["source"])
        identity.check(folder, config, "source", source.inputs)
        return source
    located = _located(folder, done)
    source, inputs = clean(*located), None
    if config.get("stream"):  # which has digests of its own
        inputs = _on_disk(source.name, chosen(*located[:2], "train", located[2]).digest, source.test)
    identity.check(folder, config, "source", inputs or source.inputs)
    return source


def kept(folder: Path, base: Trained) -> dict[int, Weights]:
    """The weights after the epochs that `dememo train --every` kept; of another run those at its end, as its last epoch."""
    done, names = runs.result(folder), sorted(path.name for path in (folder / EPOCHS).glob("*"))
    recorded = [name.removeprefix(f"{EPOCHS}/") for name in done.get(identity.LEFT, {}) if name.startswith(f"{EPOCHS}/")]
    wanted = recorded or names
    found = {int(name): identity.restored(folder, done, f"{EPOCHS}/{name}", base.weights).state for name in wanted}
    return found or {base.trained["epochs"]: base.weights}


def _finished(folder: Path, expected: tuple[str, ...]) -> dict:
    """The result of a finished run of an expected command."""
    done = runs.result(folder)
    wanted = " or ".join(expected)
    require(
        done["config"]["command"] in expected,
        f"{folder} is a run of `dememo {done['config']['command']}`; expected one of {wanted}",
    )
    return done


def _inputs(folder: Path) -> dict[str, Named]:
    """What identifies a run: its configuration, with the digests of all that it was made from."""
    return {"digest": Named(folder / runs.CONFIG, identity.digest((folder / runs.CONFIG).read_bytes()))}


def narrowed(base: Source, classes: Any) -> Perturbation | None:
    """The perturbation, on the given classes only."""
    if base.perturbation is None or not classes:
        require(not classes, "--protected-classes needs a protect run as --from: clean data has no protected classes")
        return base.perturbation
    mask = base.perturbation.mask & sets.of_classes(base.train.y, classes)
    require(mask.any(), f"the protect run protects no example of the classes {list(classes)}")
    return base.perturbation._replace(mask=mask)


def _located(folder: Path, done: dict) -> tuple[str, Path | None, int | None, Text]:
    """The arguments of `clean` that lead to a run's data."""
    config = done["config"]
    name, where = config["data"], config["data_dir"]
    if sources.is_texts(name) and (folder / runs.TOKENIZER).exists():
        identity.intact(folder, done, runs.TOKENIZER)
    path, text = str(folder / name) if sources.is_path(name) else name, runs.wording(folder, config)
    return path, folder / where if where else None, config.get("side"), text


def keep_tokenizer(folder: Path, base: Known) -> None:
    """The run folder holds the tokenizer that its weights or its perturbation belong to; of images nothing."""
    if base.language is not None:
        files.write(folder / runs.TOKENIZER, base.language.tokenizer.to_str(pretty=True))


def _weights(folder: Path, done: dict, net: Model, base: Source) -> tuple[Weights, Inputs]:
    """The weights that a run left, and what identifies the model."""
    like = jax.eval_shape(net.init, jax.random.key(0), base.train.x[:1])
    found = identity.restored(folder, done, WEIGHTS, like)
    of_values = found.digest or tree.digest(found.state)
    return found.state, _inputs(folder) | {"weights_digest": Named(folder / WEIGHTS, of_values)}


def companion(base: Trained, folder: Path, flag: str) -> Trained:
    """Another model of the same data, for comparison."""
    other = trained(folder)
    pairs = [(getattr(one, part), getattr(two, part)) for one, two in ((base.train, other.train), (base.test, other.test))
             for part in ("x", "y")]  # fmt: skip
    same = all(a is b or np.array_equal(a, b) for a, b in pairs)
    require(same, f"{flag} {folder} is of other data, or of another split of it, than the model in question")
    return other


def retrained(base: Trained, folder: Path, flag: str) -> Trained:
    """What `flag` names: a network retrained on part of the very data that `base` saw."""
    other = companion(base, folder, flag)
    require(other.unlearned == "retrain", f"{flag} {folder} must be a run of `dememo unlearn --method retrain`")
    alike = all(base.trained[name] == other.trained[name] for name in ("source_digest", "protected_classes"))
    require(alike, f"{flag} {folder} was trained on other data, or on other protected classes")
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
