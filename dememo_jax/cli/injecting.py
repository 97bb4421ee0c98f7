"""`dememo protect --method regtext`: choose the words of each class, put them into its texts, release the texts."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import files, keys, protect, report, sources
from dememo_jax.cli import artefacts, classes, identity, lineage, runs, texts, victims
from dememo_jax.cli.configs import Protect
from dememo_jax.errors import require
from dememo_jax.report import Section, Table
from dememo_jax.types import Perturbation

PLACED = "placed.jsonl"
READ = (
    "run", "method", "data", "classes", "share", "text", "regtext", "evaluate", "model", "victim_epochs", "seed",
    "checkpoint_seconds",
)  # fmt: skip
SHOWN = 6  # texts on the page
SECRET = (
    "Whoever knows the words can take them out: manifest.json, which names them, is the owner's; train and test are what "
    "others need."
)


def protect_texts(config: Protect) -> dict:
    """`dememo protect` on texts."""
    started = runs.clock(config.run)
    _check(config)
    base = lineage.clean(config.data, config.data_dir, config.side, config.text)
    language, labels, key = _of(base), np.asarray(base.train.y), jax.random.key(config.seed)
    config = classes.numbered(config, base)
    if config.evaluate:
        base.model_of(config.model)
    everyone = sets.of_classes(labels, config.classes or range(base.classes))
    mask = sets.share_of(keys.named(key, "share"), everyone, labels, config.share)
    require(mask.any(), "--share leaves no text to protect; raise it")
    how, given = config.regtext, (language.train.texts, language.train.labels.tolist())
    words = protect.regtext(
        *given, words=how.words, k=how.k, penalty=how.penalty, estimates=how.estimates, classes=base.classes
    )
    placing: dict[str, Any] = {"mode": how.mode, "share": how.share, "most": how.most, "shortest": how.shortest}
    made = protect.inject(keys.named(key, "places"), *given, words, mask=mask.tolist(), **placing)
    rows = language.rows(made.texts)
    described = runs.describe(config, **identity.record("data", base.inputs))
    if done := runs.begin(config.run, described):
        return done
    lineage.keep_tokenizer(config.run, base)
    noise = jnp.asarray(rows.x) - base.train.x
    perturbation = Perturbation(noise, jnp.arange(len(labels), dtype=jnp.int32), jnp.asarray(mask))
    artefacts.save_perturbation(config.run / identity.NOISE, perturbation)
    lines = [{"index": i, "placed": placed} for i, placed in enumerate(made.placed) if placed]
    files.write(config.run / PLACED, "".join(f"{json.dumps(line)}\n" for line in lines))
    counts = {
        "train": len(labels), "protected": int(mask.sum()), "changed": len(lines), "placed": sum(map(len, made.placed)),
        "cut": int((rows.cut > 0).sum()), "test": len(base.test.y),
    }  # fmt: skip
    manifest = _release(config, language, described, words, made, counts)
    section, values = _result(config, language, words, made, counts, manifest)
    if config.evaluate:
        tables, plot, values["evaluation"] = victims.evaluate_texts(config, base, perturbation)
        section = Section(section.title, section.summary, (*section.tables, *tables), (plot,))
    return runs.finish(config.run, described, values, [section], started)


def _check(config: Protect) -> None:
    """BadInput, before anything is read, for what is made for images, and for numbers out of range."""
    require(config.method == "regtext", f"{config.method} perturbs images; texts are protected by --method regtext")
    usual = {field.name: field.default for field in dataclasses.fields(Protect)}
    strange = [name for name in usual if name not in READ and getattr(config, name) != usual[name]]
    listed = ", ".join("--" + name.replace("_", "-") for name in strange)
    require(not strange, f"regtext does not read {listed}: leave {'it' if len(strange) == 1 else 'them'} away")
    how = config.regtext
    numbers = {name: getattr(how, name) for name in ("share", "most", "shortest", "words", "k")}
    runs.positive(victim_epochs=config.victim_epochs, **{f"regtext.{name}": value for name, value in numbers.items()})


def _of(base: lineage.Source) -> texts.Language:
    assert base.language is not None
    return base.language


def _release(
    config: Protect, language: texts.Language, described: dict, words: protect.Words, made: protect.Injected, counts: dict
) -> dict:
    """Write `train` and `test` in the form of the given files, then `manifest.json`, and return it."""
    folder, names = config.run / "release", tuple(f"{name}{language.files[0].suffix}" for name in (texts.TRAIN, texts.TEST))
    released = (sources.rewritten(language.files[0], made.texts).encode(), language.files[1].read_bytes())
    hashes = {
        "clean": {name: _hash(file.read_bytes()) for name, file in zip(names, language.files)},
        "released": {name: _hash(content) for name, content in zip(names, released)},
    }
    manifest = {
        "method": config.method,
        "configuration": {n: value for n, value in described.items() if n in READ or not hasattr(config, n)},
        "seed": config.seed,
        "dememo_jax": runs.__version__,
        "counts": counts,
        "hash": hashes,
        "words": [
            {"label": name, "words": listed, "ranks": ranks}
            for name, listed, ranks in zip(language.train.names, words.lists, words.scores)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # complete when it is there
    for name, content in zip(names, released):
        files.write(folder / name, content)
    files.write(folder / "manifest.json", report.to_json(manifest))
    return manifest


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _result(
    config: Protect, language: texts.Language, words: protect.Words, made: protect.Injected, counts: dict, manifest: dict
) -> tuple[Section, dict]:
    clean, names = language.train, language.train.names
    of_class = [
        (names[c], sum(len(placed) for placed, label in zip(made.placed, clean.labels) if label == c), ", ".join(listed))
        for c, listed in enumerate(words.lists)
    ]
    changed = [i for i, placed in enumerate(made.placed) if placed]
    first = [next((i for i in changed if clean.labels[i] == c), None) for c in range(len(names))]
    shown = [i for i in dict.fromkeys([*first, *changed]) if i is not None][:SHOWN]
    before = tuple((names[clean.labels[i]], clean.texts[i], made.texts[i]) for i in shown)
    done = "inserted" if config.regtext.mode == "insert" else "replaced"
    tables = (
        Table("Words of each class", ("label", f"{done} in all", "words, the best first"), tuple(of_class), SECRET),
        Table("Texts", ("label", "before", "after"), before, f"The first of {counts['changed']:,} changed texts."),
        Table("Counts", tuple(counts), (tuple(counts.values()),), _cut(language, counts)),
    )
    summary = (
        f"{counts['placed']:,} words {done} in {counts['changed']:,} of {counts['train']:,} texts; "
        f"{', '.join(f'{name}: {listed[0]}' for name, listed in zip(names, words.lists))}, ..."
    )
    values: dict[str, Any] = {"method": config.method, **counts, "words": manifest["words"], "hash": manifest["hash"]}
    return Section(f"protect: {config.method}", summary, tables), values


def _cut(language: texts.Language, counts: dict) -> str:
    return (
        f"protected: texts that were chosen; changed: those with words in them now; cut: those that lose their last tokens, "
        f"since a row has {language.settings.length} with the form ({language.cut[0]:,} before)."
    )
