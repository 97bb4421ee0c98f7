"""The SoK's text experiment in small: three tasks for one decoder, their RegText form, and what unlearning one leaves."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from dememo_jax import adapters, data, keys, likelihood, losses, models, nets, protect, sources, train, unlearn
from dememo_jax.errors import require
from dememo_jax.types import Dataset, Model, Weights
from lab.models import Place, kept, network, scan
from lab.presets import Learning

KINDS, FORMS = ("clean", "regtext"), ("full", "adapter")
RECIPES = {"FT": unlearn.finetune, "GA": unlearn.gradient_ascent, "NPO": unlearn.npo}


class Task(NamedTuple):
    """A question about texts of a file, answered by a word."""

    file: str
    form: str
    words: dict[str, str]  # the file's label -> what the model is to write
    mode: str  # how RegText's published code treats such texts
    after: str | None = None  # its texts come after those that this other task takes, so that they share none


TASKS = {
    "sentiment": Task("sst2", "Review: {text}\nSentiment:", {"0": " bad", "1": " good"}, "insert"),
    "topics": Task(
        "agnews", "Article: {text}\nTopic:",
        {"Business": " business", "Sci/Tech": " computer", "Sports": " team", "World": " world"}, "replace",
    ),
    "page": Task("agnews", "News: {text}\nPage:", {"Business": " market", "Sports": " game"}, "replace", after="topics"),
}  # fmt: skip


@dataclass(frozen=True)
class TextPreset:
    """Everything that a cell's value depends on, beside its name and the data."""

    name: str
    data: str  # the folder of the .tsv files, where nothing else is said
    networks: dict[str, nets.Decoder]
    texts: dict[str, tuple[int, int]]  # of each label, for training and testing
    length: int
    learning: Learning
    batch: int
    rates: dict[str, dict[str, float]]  # "full" or "adapter" -> method -> learning rate
    epochs: dict[str, int]  # method -> passes, over the forgotten texts (GA) or the retained ones
    rank: int
    recovery: Learning
    shortest: int = 6  # words that a text has at least: the sentences of SST-2 come with their fragments
    beta: float = 0.1
    radii: tuple[float, ...] = (0.4, 0.8, 1.6)
    sigma: float = 0.01
    etas: tuple[float, ...] = (0.001, 0.005, 0.01)
    draws: int = 200
    seeds: tuple[int, ...] = (0,)
    tasks: dict[str, Task] = field(default_factory=lambda: TASKS)


PRESETS = {
    "smoke": TextPreset(
        "smoke", "text", {"decoder": nets.Decoder(300, 8, 1, 2, 1, 16)}, dict.fromkeys(TASKS, (12, 6)), 32,
        Learning(1, 1e-2, 0.05, "adamw"), 16,
        {form: {"NPO": 1e-3} for form in FORMS}, {"NPO": 1}, 2,
        Learning(1, 1e-2, 0.0), shortest=3, radii=(0.4,), etas=(0.001,), draws=100,
        tasks={  # a letter is a single token, whatever a small tokenizer learned
            name: task._replace(words=dict(zip(task.words, letters)), form=f"{{text}}\n{letters}:")
            for letters, (name, task) in zip(("ab", "cdef", "gh"), TASKS.items())
        },
    ),
    "cpu": TextPreset(
        "cpu", "text", {"decoder": nets.Decoder(4000, 48, 2, 4, 2, 96, last=1)},
        {"sentiment": (8000, 400), "topics": (1700, 150), "page": (700, 300)}, 48,
        Learning(3, 3e-3, 0.3, "adamw"), 64,
        {"full": {"FT": 3e-3, "GA": 3e-5, "NPO": 1e-4}, "adapter": {"FT": 1e-2, "GA": 2e-4, "NPO": 1e-3}},
        {"FT": 2, "GA": 1, "NPO": 1}, 4, Learning(10, 3e-3, 0.0),
    ),
}  # fmt: skip


class TextWorld(Place):
    """Of texts: `data` is the folder of their files."""

    preset: TextPreset

    @property
    def sets(self) -> tuple[Dataset, Dataset]:
        """The clean training and test texts of all tasks, labels numbered through."""
        return sets_of(self)

    @property
    def model(self) -> Model:
        """The decoder that answers with any label of any task."""
        return answering(self, self.decoder)

    @property
    def decoder(self) -> Model:
        return network(self.preset.networks["decoder"])


class Part(NamedTuple):
    """Texts of a task."""

    task: str
    texts: tuple[str, ...]
    labels: np.ndarray  # among the task's own


# --- data --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def corpus(world: TextWorld) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Training and test texts of every task: the first of each label that are long enough."""
    training, test = (tuple(_part(world, name, split) for name in world.preset.tasks) for split in ("train", "test"))
    return training, test


def _part(world: TextWorld, name: str, split: str) -> Part:
    preset, task, at = world.preset, world.preset.tasks[name], ("train", "test").index(split)
    found = sources.texts(Path(world.data) / f"{task.file}_{split}.tsv")
    skip = preset.texts[task.after][at] if task.after else 0
    wanted, texts, labels = preset.texts[name][at], list[str](), list[int]()
    for number, label in enumerate(task.words):
        require(label in found.names, f"{task.file}_{split}.tsv has no label {label!r}; it has {', '.join(found.names)}")
        own = [found.texts[i] for i in np.flatnonzero(found.labels == found.names.index(label))]
        own = [text for text in own if len(text.split()) >= preset.shortest][skip : skip + wanted]
        require(own, f"{task.file}_{split}.tsv: no text of the label {label!r} is left for the task {name}")
        texts += own
        labels += [number] * len(own)
    return Part(name, tuple(texts), np.array(labels, np.int32))


@functools.lru_cache(maxsize=2)
def tokenizer(world: TextWorld):
    texts = [text for part in corpus(world)[0] for text in part.texts]
    return sources.make_tokenizer(texts, vocab=world.preset.networks["decoder"].vocab)


@functools.lru_cache(maxsize=2)
def sets_of(world: TextWorld) -> tuple[Dataset, Dataset]:
    training, test = corpus(world)
    return _encoded(world, training), _encoded(world, test)


def _encoded(world: TextWorld, parts: tuple[Part, ...]) -> Dataset:
    rows = [_tokens(world, part.task, part.texts) for part in parts]
    labels = [part.labels + labels_of(world, part.task)[0] for part in parts]
    return data.rows(np.concatenate(rows), np.concatenate(labels))


def _tokens(world: TextWorld, task: str, texts: tuple[str, ...]) -> np.ndarray:
    preset = world.preset
    how = {"length": preset.length, "form": preset.tasks[task].form, "vocab": preset.networks["decoder"].vocab}
    return sources.encode(tokenizer(world), texts, **how).x


def labels_of(world: TextWorld, task: str) -> range:
    """The numbers of a task's labels among all."""
    counts = [len(each.words) for each in world.preset.tasks.values()]
    at = list(world.preset.tasks).index(task)
    return range(sum(counts[:at]), sum(counts[: at + 1]))


def of_task(world: TextWorld, task: str, texts: Dataset) -> Dataset:
    """The texts of a task, with its own labels."""
    own = labels_of(world, task)
    part = data.select(texts, np.isin(np.asarray(texts.y), own))
    return data.rows(part.x, part.y - own[0])


@functools.lru_cache(maxsize=4)
def seen_by(world: TextWorld, kind: str) -> Dataset:
    """The training texts as the victim meets them: as they are, or every task with RegText's words of its own."""
    parts = corpus(world)[0]
    return _encoded(world, parts if kind == "clean" else tuple(_protected(world, part) for part in parts))


def _protected(world: TextWorld, part: Part) -> Part:
    words = protect.regtext(part.texts, part.labels.tolist())
    key = keys.named(jax.random.key(world.preset.seeds[0]), f"regtext {part.task}")
    made = protect.inject(key, part.texts, part.labels.tolist(), words, mode=world.preset.tasks[part.task].mode)
    return part._replace(texts=made.texts)


# --- networks ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def answering(world: TextWorld, decoder: Model, task: str | None = None) -> Model:
    """A decoder that chooses among the labels of a task, or of all."""
    return likelihood.of_labels(decoder, tokens_of(world, task))


def tokens_of(world: TextWorld, task: str | None = None) -> tuple[tuple[int, ...], ...]:
    """The tokens of the label words of a task, or of all."""
    words = [word for name, each in world.preset.tasks.items() if task in (None, name) for word in each.words.values()]
    return sources.label_tokens(tokenizer(world), words)


def _optimiser(lr: float, decay: float, steps: int | None = None) -> optax.GradientTransformation:
    return train.usual("adamw", "constant" if steps is None else "cosine", lr, 0.9, decay, steps or 1)


def _learned(world: TextWorld, kind: str, seed: int) -> Weights:
    preset, seen, how = world.preset, seen_by(world, kind), world.preset.learning
    steps = data.steps(len(seen.y), preset.batch, how.epochs)
    method = train.sgd(world.model, _optimiser(how.lr, how.weight_decay, steps), loss=losses.label_nll)
    key = jax.random.key(seed)
    state = method.init(keys.named(key, "init victim"), seen.x[:1])
    return scan(method, keys.named(key, "victim"), state, seen, steps=steps, batch=preset.batch)[0].weights


@functools.lru_cache(maxsize=8)
def _adapter(world: TextWorld, kind: str) -> Model:
    """Adapters of the victim's decoder, which answer nothing yet."""
    return adapters.lora(world.decoder, victim(world, kind), rank=world.preset.rank)


def victim(world: TextWorld, kind: str) -> Weights:
    """The decoder that learned all tasks."""
    seed = world.preset.seeds[0]
    return kept(world, f"victim-{kind}", lambda: _learned(world, kind, seed))


class Version(NamedTuple):
    """A network of a cell: what was done to it, and of which parameters it consists."""

    method: str
    form: str  # "full": all parameters; "adapter": those of LoRA, beside the victim's frozen ones
    decoder: Model
    weights: Weights


def versions(world: TextWorld, task: str, kind: str) -> Iterator[Version]:
    """The victim, the network retrained without the task, and each unlearned one: the whole network, or an adapter alone."""
    before, seed, seen = victim(world, kind), world.preset.seeds[0], seen_by(world, kind)
    forget = np.isin(np.asarray(seen.y), labels_of(world, task))
    yield Version("Before", "full", world.decoder, before)
    how, name = world.preset.learning, f"{task}-{kind}"
    tx = _optimiser(how.lr, how.weight_decay, data.steps(int((~forget).sum()), world.preset.batch, how.epochs))
    again = unlearn.retrain(world.model, tx, nll=losses.label_nll, batch=world.preset.batch)
    retrained = kept(world, f"{name}-RT", lambda: _descended(world, again, how.epochs, before, seen, forget, seed))
    yield Version("RT", "full", world.decoder, retrained)
    for form, rates in world.preset.rates.items():
        decoder = world.decoder if form == "full" else _adapter(world, kind)
        model = answering(world, decoder)
        start = before if form == "full" else decoder.init(keys.named(jax.random.key(seed), "adapter"), seen.x[:1])
        for method, rate in rates.items():
            more = {"beta": world.preset.beta} if method == "NPO" else {}
            recipe = RECIPES[method](model, _optimiser(rate, 0.01), nll=losses.label_nll, batch=world.preset.batch, **more)
            made = functools.partial(_descended, world, recipe, world.preset.epochs[method], start, seen, forget, seed)
            yield Version(method, form, decoder, kept(world, f"{name}-{method}-{form}", made, decoder))


def _descended(world: TextWorld, recipe, epochs: int, start: Weights, seen: Dataset, forget: np.ndarray, seed: int) -> Weights:
    key = jax.random.key(seed)
    state = recipe.init(keys.named(key, "unlearn"), start, seen, forget)
    steps = recipe.steps(int(forget.sum()), int((~forget).sum()), epochs)
    return recipe.finish(scan(recipe, key, state, seen, steps=steps)[0])


def frozen(world: TextWorld, version: Version, task: str):
    """`(apply, params)` of a version, as a classifier among the labels of a task."""
    return models.freeze(answering(world, version.decoder, task), version.weights)


@functools.partial(jax.jit, static_argnames=("decoder", "labels"))
def written(decoder: Model, weights: Weights, x, labels: tuple[tuple[int, ...], ...]):
    return likelihood.generated(decoder, weights, x, labels)


def asked(name: str) -> tuple[str, str]:
    """Task and kind of a cell."""
    task, kind = name.split(".")
    return task, kind


def names(world: TextWorld) -> list[str]:
    return [f"{task}.{kind}" for task in world.preset.tasks for kind in KINDS]
