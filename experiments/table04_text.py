"""SoK Table 4 in small: a decoder learns three tasks, as they are or as RegText, and forgets one of them.

    python experiments/table04_text.py --preset cpu --data FOLDER   # with sst2_{train,test}.tsv and agnews_{train,test}.tsv

A cell is a task and what the victim learned from, clean texts or RegText of all three tasks. In it: the victim, the network
retrained without the task (RT), fine-tuning (FT), gradient ascent (GA) and NPO, each by descent of all parameters and of a LoRA
adapter. Accuracies among the task's own labels: on its clean test texts (and on how many of them the label word is what the
network writes), on the forgotten texts as they were seen and in their clean form; and the mean of the other tasks on theirs.
Membership: area under the ROC of the label's likelihood, forgotten texts in clean form against test texts. Weights are kept.
"""

import numpy as np

from dememo_jax import audit, bounds, evaluate, losses, tree
from dememo_jax.models import freeze
from lab import table, texts
from lab.texts import TextWorld


def compute(world: TextWorld, name: str) -> dict:
    task, kind = texts.asked(name)
    training, test = world.sets
    parts = {"test": test, "seen": texts.seen_by(world, kind), "clean": training}
    rows = []
    for version in texts.versions(world, task, kind):
        row = {"method": version.method, "form": version.form}
        if not tree.finite(version.weights.params):
            rows.append(row | {"accuracy": None, "membership": None, "reason": "diverged"})
            continue
        apply, params = freeze(texts.answering(world, version.decoder), version.weights)
        told = {part: (np.asarray(evaluate.logits(apply, params, of.x)), np.asarray(of.y)) for part, of in parts.items()}
        found = {part: _accuracy(world, task, *each) for part, each in told.items()}
        others = [_accuracy(world, other, *told["test"]) for other in world.preset.tasks if other != task]
        found |= {"generated": _written(world, version, task, test), "others": float(np.mean(others))}
        mine = texts.labels_of(world, task)
        rows.append(
            row | {"accuracy": found, "membership": _membership(*(_of(mine, *told[part]) for part in ("clean", "test")))}
        )
    return {"value": rows, "texts": [len(training.y), len(test.y)]}


def _of(own: range, likelihoods: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the texts with one of those labels."""
    mine = np.isin(labels, own)
    return likelihoods[mine], labels[mine]


def _accuracy(world: TextWorld, task: str, likelihoods: np.ndarray, labels: np.ndarray) -> float:
    """Among the task's own labels, on its own texts."""
    own = texts.labels_of(world, task)
    shown, truth = _of(own, likelihoods, labels)
    return float(np.mean(shown[:, own].argmax(axis=1) + own[0] == truth))


def _written(world: TextWorld, version: texts.Version, task: str, test) -> float:
    """Share of the task's test texts after which the network writes the label's word."""
    own = texts.of_task(world, task, test)
    found = texts.written(version.decoder, version.weights, own.x, texts.tokens_of(world, task))
    return float(np.mean(np.asarray(found) == np.asarray(own.y)))


def _membership(learned: tuple[np.ndarray, np.ndarray], strange: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """How well the label's likelihood, sequence by sequence, tells texts that were learned from others."""
    member = np.repeat([True, False], [len(learned[1]), len(strange[1])])
    signals = {
        "sequence": [-np.asarray(losses.label_nll(*side)) for side in (learned, strange)],
        "among labels": [audit.signals(*side)["confidence"] for side in (learned, strange)],
    }
    return {name: bounds.auc(np.concatenate(sides), member).value for name, sides in signals.items()}


def main(argv=None):
    return table.main("table04", __doc__, texts.names, compute, argv, presets=texts.PRESETS, make=TextWorld)


if __name__ == "__main__":
    main()
