"""What Unlearnable Distance measures: by every solver, with three seeds, controls, and test accuracy beside it.

    python experiments/sharpness.py --data digits
    python experiments/sharpness.py --data cifar10-2000.npz          # 2,000 training images; about an hour on two CPU cores

Networks are trained on clean and on protected images, on noise of the same budget, on random labels, and with a rising share of
protected images; after some of the epochs SAL of every layer is measured on the images they train on. One JSON a network is
kept in `runs/sharpness`, so that a killed run goes on; the tables go to `experiments/results/sharpness-DATA.json` and `.md`.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, cli, data, evaluate, files, keys, loop, models, nets, report, sharpness, train
from dememo_jax.cli import configs, lineage, runs
from dememo_jax.protect import victim

RESULTS, PICTURES = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs"


class Setting(NamedTuple):
    net: object
    epochs: tuple[int, ...]  # after which SAL is measured
    batch: int
    lr: float
    images: int  # of the training set, that SAL is measured on
    methods: dict[str, dict]
    shares: tuple[float, ...]
    solvers: dict[str, dict]


CO = {"batch": 128, "learner_steps": 20}
NORMAL = {"solver": "normalized", "rounds": 5, "stride": 0.5}
LOCAL = {
    "one_step": {"solver": "one_step"},
    "hvp": {"solver": "hvp"},
    "diagonal": {"solver": "diagonal", "granularity": "layer"},
}
SOLVERS = {"ball": {"solver": "ball"}, "normalized": NORMAL, **LOCAL}
SETTINGS = {
    "digits": Setting(
        nets.mlp(10, (128, 128, 128, 64, 64)), (4, 8, 12, 16, 20), 64, 0.1, 1437,
        {name: {} for name in ("em", "rem", "tap", "lsp", "ops", "pue", "random")}, (0.2, 0.4, 0.6, 0.8),
        {**SOLVERS, "ball, published mode": {"solver": "ball", "mixed": True},
         "ball, radius 0.01": {"solver": "ball", "radius": 0.01}, "ball, radius 0.1": {"solver": "ball", "radius": 0.1},
         "one_step, radius 0.01": {"solver": "one_step", "radius": 0.01},
         "one_step, radius 0.1": {"solver": "one_step", "radius": 0.1}},
    ),
    "cifar": Setting(
        nets.ResNet(10, (1, 1, 1), 8), (3, 20), 64, 0.1, 256,
        {"em": {"epochs": 8, "inner_steps": 5}, "rem": {"epochs": 4, "inner_steps": 5, "draws": 2, "attack_steps": 3},
         "tap": {"epochs": 20, "inner_steps": 60, "restarts": 1}, "lsp": {}, "ops": {},
         "pue": {**CO, "passes": 10, "draws": 2, "learner_steps": 10}, "random": {}},
        (), SOLVERS,
    ),
}  # fmt: skip


def made(root: Path, name: str, path: str, how: dict):
    """The perturbation of a method, by `dememo protect`; made once, and learned with every seed."""
    net = {} if path == "digits" else {"model": "cnn3"}
    cli.execute(configs.Protect(root / f"protect-{name}-0", name, path, **net, **how))
    return lineage.protected(root / f"protect-{name}-0").perturbation


def seen(kind: str, clean, perturbations: dict, seed: int):
    """The training set that a network of this kind meets."""
    if kind == "clean":
        return clean
    if kind == "random labels":
        return victim.random_labels(jax.random.key(seed), clean)
    name, _, share = kind.partition(" ")
    noise = perturbations[name]
    if share:
        part = data.share_of(jax.random.key(seed), np.ones(len(clean.y), bool), clean.y, float(share.strip("%")) / 100)
        noise = noise._replace(mask=jnp.asarray(part))
    return data.perturb(clean, noise)


def measured(setting: Setting, training, test, seed: int) -> list[dict]:
    """One network, and what was measured after each of the epochs."""
    model, key = models.from_linen(setting.net) if setting.net not in MODELS else MODELS[setting.net], jax.random.key(seed)
    MODELS[setting.net] = model
    per_epoch = data.steps(len(training.y), setting.batch, 1)
    transform = train.clipped_sgd(setting.lr, 0.9, 5e-4, per_epoch * setting.epochs[-1])
    method = LEARNERS.setdefault(setting.net, train.sgd(model, transform))
    at = np.sort(np.asarray(jax.random.permutation(jax.random.key(0), len(training.y)))[: setting.images])
    part, found = data.take(training, jnp.asarray(at)), []

    def after(done, state, info):
        epoch = done // per_epoch
        if epoch not in setting.epochs:
            return
        apply, params = models.freeze(model, state.weights)
        entry = {"epoch": epoch, "running": float(info["loss"].mean()), "test": float(evaluate.accuracy(apply, params, test))}
        for name, how in setting.solvers.items():
            how, started = dict(how), time.monotonic()
            running = entry["running"] if how.pop("mixed", False) else None
            sal = sharpness.sal(apply, params, part, test=test, key=keys.at(key, epoch), batch=64, running_loss=running, **how)
            entry[name] = dataclasses.asdict(sal) | {"seconds": time.monotonic() - started}
        found.append(entry)

    state = method.init(key, training.x[:1])
    loop.run(
        method, key, state, training, steps=per_epoch * setting.epochs[-1], every=per_epoch, after=after, batch=setting.batch
    )
    return found


MODELS, LEARNERS = {}, {}


def gather(name: str, setting: Setting, path: str, root: Path, seeds: int) -> dict:
    """kind -> seed -> what was measured; new networks only where no file stands."""
    source = lineage.clean(path, None)
    mains = ["clean", *setting.methods, "random labels"]
    shares = [f"em {100 * share:g}%" for share in setting.shares]
    jobs = [(kind, seed) for seed in range(seeds) for kind in mains] + [
        (kind, seed) for seed in range(seeds) for kind in shares
    ]
    found: dict = {}
    for kind, seed in jobs:
        file = root / name / f"{kind.replace(' ', '-').replace('%', '')}-{seed}.json"
        if not file.exists():
            method = kind.partition(" ")[0]
            noise = {method: made(root / name, method, path, setting.methods[method])} if method in setting.methods else {}
            done = measured(setting, seen(kind, source.train, noise, seed), source.test, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write(file, report.to_json(done))
            print(f"{kind}, seed {seed}: test accuracy {done[-1]['test']:.3f}", flush=True)
        kept = [entry for entry in json.loads(file.read_text()) if entry["epoch"] in setting.epochs]
        found.setdefault(kind, []).append(kept)
    return found


# --- tables ------------------------------------------------------------------------------------------------------


def sals(entries: list[dict], solver: str) -> list[sharpness.Sal]:
    return [sharpness.from_plain({k: v for k, v in entry[solver].items() if k != "seconds"}) for entry in entries]


def distances(found: dict, solver: str, **how) -> dict[str, list[sharpness.Distance]]:
    """UD of every kind and seed, against the clean network of the same seed."""

    return {
        kind: [
            sharpness.unlearnable_distance(sals(one, solver), sals(found["clean"][seed], solver), **how)
            for seed, one in enumerate(each)
        ]
        for kind, each in found.items()
    }


def spread(values) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def correlations(by: dict, kinds: list[str], number: str = "distance", other: dict | None = None) -> list[float | None]:
    """Spearman's correlation, seed by seed, of UD (or the SAL ratio) with test accuracy, or with the UD of another measure."""
    found = []
    for seed in range(min(len(by[kind]) for kind in kinds)):
        mine = [getattr(by[kind][seed], number) for kind in kinds]
        theirs = [by[kind][seed].test_accuracy if other is None else other[kind][seed].distance for kind in kinds]
        found.append(bounds.rank_correlation(mine, theirs)[0])
    return found


def tables(found: dict, setting: Setting) -> tuple[str, dict]:
    each = {solver: distances(found, solver) for solver in setting.solvers}
    each |= {f"ball, threshold {rule}": distances(found, "ball", rule=rule) for rule in ("pooled", "median")}
    each["ball, by parameters"] = distances(found, "ball", weighting="parameter")
    others = [name for name in each if name not in SOLVERS]

    def rows(names, more):
        for kind, seeds in found.items():
            accuracy = spread([one[-1]["test"] for one in seeds])
            yield [kind, str(len(seeds)), accuracy, *(spread([d.distance for d in each[n][kind]]) for n in names), *more(kind)]

    def beside(kind):
        ball, worse = each["ball"][kind], each["normalized"][kind]
        ratios = (spread([d.ratio for d in by]) for by in (ball, worse))
        return [*ratios, f"{np.mean([d.stalled for d in ball]):.0%}"]

    first = ["training data", "seeds", "test accuracy"]
    text = "Unlearnable Distance by solver, mean ± standard deviation over seeds; mean SAL over the clean network's.\n\n"
    text += markdown(
        [*first, *SOLVERS, "SAL ratio, ball", "SAL ratio, normalized", "stalled, ball"], list(rows(SOLVERS, beside))
    )
    text += "\nSensitivity of UD.\n\n" + markdown([*first, *others], list(rows(others, lambda kind: [])))
    protections, everything = list(setting.methods)[:-1], ["clean", *setting.methods, "random labels"]
    agreement, lines = {}, []
    ways = [(name, by, "distance") for name, by in each.items()]
    ways += [(f"SAL ratio, {name}", each[name], "ratio") for name in ("ball", "normalized")]
    for name, by, number in ways:
        took = (
            [entry[name]["seconds"] for k in found for one in found[k] for entry in one[1:]] if name in setting.solvers else []
        )
        agreement[name] = {
            "with accuracy, all": correlations(by, everything, number),
            "with accuracy, protections alone": correlations(by, protections, number),
            "with the paper's solver, all": correlations(by, everything, number, each["ball"]),
        }
        told = [", ".join("-" if v is None else f"{v:.2f}" for v in values) for values in agreement[name].values()]
        lines.append([name, *told, f"{np.median(took):.2f}" if took else "-"])
    head = ["measured by", *agreement["ball"], "seconds a measurement"]
    text += "\nRank correlations of UD, one a seed.\n\n" + markdown(head, lines)
    plain = {name: {k: [dataclasses.asdict(d) for d in ds] for k, ds in by.items()} for name, by in each.items()}
    return text, {"distances": plain, "agreement": agreement}


def picture(found: dict, setting: Setting) -> bytes:
    """SAL by the paper's solver, layer by epoch, of the first seed."""
    kinds = [kind for kind in found if "%" not in kind][:8]
    of = {kind: sals(found[kind][0], "ball") for kind in kinds}
    layers = [name.removesuffix("/kernel") for name in of[kinds[0]][0].measure.layers]
    panels = [(f"{kind} ({found[kind][0][-1]['test']:.2f})", sharpness.tracked(of[kind])) for kind in kinds]
    above = sharpness.learnable_threshold(of["clean"])
    return report.heat_maps(panels, layers, [str(epoch) for epoch in setting.epochs], "SAL, nats", above)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or an .npz of CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs/sharpness"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    started, name = time.monotonic(), "digits" if arguments.data == "digits" else "cifar"
    setting = SETTINGS[name]
    found = gather(name, setting, arguments.data, arguments.runs, arguments.seeds)
    text, numbers = tables(found, setting)
    took = sum(e[name]["seconds"] for each in found.values() for one in each for e in one for name in setting.solvers)
    numbers["seconds of measuring SAL"] = round(took)
    kept = {"settings": setting._asdict() | {"net": type(setting.net).__name__}, "measured": runs.measured(started), **numbers}
    files.write(RESULTS / f"sharpness-{name}.json", report.to_json(kept))
    files.write(RESULTS / f"sharpness-{name}.md", text)
    if name == "digits":
        files.write(PICTURES / "sal.png", picture(found, setting))
    print(text)


if __name__ == "__main__":
    main()
