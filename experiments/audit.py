"""What the audits say of unlearning methods and of plain training, from the networks of `audit_models.py`.

    python experiments/audit_models.py --data cifar10.npz
    python experiments/audit.py [--data cifar10.npz]

Membership: LiRA, RMIA, the population attack and the bare log-odds on shadow models trained on random halves. Unlearning:
U-LiRA, KLoM, epsilon-hat, both sides and the relative test, for every method, for no unlearning at all, and for retraining as
the null. Numbers go to `experiments/results/audit.json` and `.md`, the ROC to `docs/roc.png`.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from audit_models import CASES, DELTA, EPSILON, WORK, Case, certified, forgotten, load

from dememo_jax import audit, bounds, files, keys, report
from dememo_jax.cli import runs
from dememo_jax.report import Plot

RESULTS, PICTURES = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs"
METHODS = (
    "retrained again",
    "no unlearning",
    "finetune",
    "gradient ascent",
    "NPO",
    "certified",
    "certified, against its comparator",
)
FILES = {"no unlearning": "original", "certified, against its comparator": "certified"}


def scores(name: str, block: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds [M, N] and what was right [M, N], of the rows that are finished."""
    with np.load(WORK / f"{name}-{block.replace(' ', '-')}.npz", allow_pickle=False) as file:
        done = file["scores"][file["done"]]
    return done[..., 0], done[..., 1]


def membership(name: str, case: Case, count: int, key) -> tuple[dict, list]:
    """Every attack on every shadow model by all the others, and points of its ROC."""
    odds, right = scores(name, "halves")
    masks = audit.halves(keys.named(key, "halves"), case.halves, count)[: len(odds)]
    known, strangers = odds[:, :count], odds[:, count:]
    a = audit.rmia_interpolation(known, masks, strangers)
    begun = time.monotonic()
    attacks = {
        "LiRA, online": audit.lira(known, masks),
        "LiRA, offline": audit.lira(known, masks, form="offline"),
        f"RMIA, offline (a = {a:g})": audit.rmia(known, masks, strangers, interpolation=a),
        "RMIA, online": audit.rmia(known, masks, strangers, form="online"),
        "population": audit.population_attack(known, strangers),
        "log-odds alone": known,
    }
    found = {"models": len(odds), "accuracy": [float(right[:, :count][masks].mean()), float(right[:, :count][~masks].mean())]}
    curves = []
    for attack, made in attacks.items():
        found[attack] = {
            "area": dataclasses.asdict(bounds.auc(made, masks)),
            "tpr": [dataclasses.asdict(bounds.tpr_at(made, masks, fpr)) for fpr in (0.01, 0.001)],
        }
        false, true, _ = bounds.roc(made, masks)
        at = np.unique(np.searchsorted(false, np.geomspace(1e-3, 1, 150), side="right") - 1)
        at = at[true[at] > 0]
        curves.append((attack, tuple(np.maximum(false[at], 1e-3).tolist()), tuple(true[at].tolist())))
    return found | {"seconds": time.monotonic() - begun}, curves


def unlearning(name: str, case: Case, count: int, key) -> dict:
    """Every test on every method, and what the models are worth."""
    forget = forgotten(key, count)
    rest, tested = ~forget, slice(count, None)
    retrained, original = scores(name, "retrained"), scores(name, "original")
    half = len(retrained[0]) // 2
    found = {}
    for method in METHODS:
        odds, right = (
            (part[half:] for part in retrained) if method == "retrained again" else scores(name, FILES.get(method, method))
        )
        against = retrained[0][:half]
        if "comparator" in method:
            against, _ = scores(name, "certified-retrained")
        before = None if method == "no unlearning" else original[0][:, :count][:, forget]
        verdict = audit.compare(odds[:, :count][:, forget], against[:, :count][:, forget], before, delta=DELTA)
        sets = {"forgotten": right[:, :count][:, forget], "retained": right[:, :count][:, rest], "test": right[:, tested]}
        found[method] = {
            "accuracy": {part: float(values.mean()) for part, values in sets.items()},
            **dataclasses.asdict(verdict),
        }
        print(f"{name}: {method}, epsilon of all together >= {verdict.joint.epsilon_low:.2f}", flush=True)
    guarantee = certified(case, count, int(rest.sum()), None)[1]
    return found | {"guarantee": {"epsilon": guarantee.epsilon, "delta": guarantee.delta, "mu": guarantee.mu}}


# --- tables ------------------------------------------------------------------------------------------------------


def limits(estimate: dict) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def rate(point: dict) -> str:
    return "-" if point["tpr"] is None else f"{point['tpr']:.3f} [{point['low']:.3f}, {point['high']:.3f}]"


def lines(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def membership_table(found: dict) -> str:
    rows = [[attack, limits(one["area"]), *map(rate, one["tpr"])] for attack, one in found.items() if isinstance(one, dict)]
    return lines(["attack", "area", "TPR at 1 % FPR", "TPR at 0.1 % FPR"], rows)


def unlearning_table(found: dict) -> str:
    head = ["method", "accuracy: forgotten, test", "U-LiRA area", "of every model, p", "too familiar", "too strange"]
    head += ["area above retrained"]
    head += ["KLoM (chance), p", "F (chance), p", "epsilon of one example >=", "of all together >=", "nearer to"]
    rows = []
    for method in METHODS:
        one = found[method]
        names = ("accuracy", "two_sided", "u_lira_all", "klom", "quality", "relative")
        accuracy, sides, everyone, klom, quality, near = (one[n] for n in names)
        words = "neither"
        for side in ("first", "second"):
            if near and near[f"p_nearer_{side}"] < 0.01:
                words = {"first": "retrained", "second": "original"}[side]
        rows.append([
            method, f"{accuracy['forgotten']:.3f}, {accuracy['test']:.3f}", limits(one["u_lira"]),
            f"{everyone['value']:.3f}, {everyone['p_value']:.3f}", f"{sides['under']:.2f}",
            f"{sides['over']:.2f}", limits(sides["area"]), f"{klom['value']:.2f} ({klom['null']:.2f}), {klom['p_value']:.3f}",
            f"{one['epsilon']['score']:.3f} ({1 - quality['null']:.3f}), {quality['p_value']:.3f}",
            f"{one['epsilon']['largest_low']:.2f}", f"{one['joint']['epsilon_low']:.2f}", words,
        ])  # fmt: skip
    return lines(head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the .npz of CIFAR-10 that the networks were trained on; without it digits alone")
    arguments = parser.parse_args()
    started, found, text, curves = time.monotonic(), {}, "", []
    for name, case in CASES.items():
        if name == "cifar" and not arguments.data:
            continue
        data, _ = load(name, arguments.data)
        key, count = jax.random.key(0), len(data.y)
        attacked, points = membership(name, case, count, key)
        curves += [(f"{name}: {attack}", *xy) for attack, *xy in points if attack[:4] in ("LiRA", "RMIA", "log-")]
        found[name] = {"membership": attacked, "unlearning": unlearning(name, case, case.count or count, key)}
        mu = found[name]["unlearning"]["guarantee"]["mu"]
        models = found[name]["unlearning"]["finetune"]["models"][0]
        text += f"## {name}\n\nMembership, {attacked['models']} models on halves; accuracy on their own half "
        text += f"{attacked['accuracy'][0]:.3f}, on the other {attacked['accuracy'][1]:.3f}:\n\n{membership_table(attacked)}\n"
        text += f"Unlearning of a random twentieth, {models} models of a kind; guarantee of certified descent: epsilon "
        text += f"{EPSILON:g} at delta {DELTA:g}, mu {mu:.3f}:\n\n{unlearning_table(found[name]['unlearning'])}\n"
        RESULTS.mkdir(exist_ok=True)
        settings = {
            n: {"halves": c.halves, "worlds": c.worlds, "batch": c.batch, "epochs": c.epochs, "rates": c.rates}
            for n, c in CASES.items()
        }
        kept = {"settings": settings, "measured": runs.measured(started), "found": found}
        files.write(RESULTS / "audit.json", report.to_json(kept))
        files.write(RESULTS / "audit.md", text)
    plot = Plot(
        "roc", "Membership attacks by shadow models", "false-positive rate", "true-positive rate", tuple(curves), scale="roc"
    )
    files.write(PICTURES / "roc.png", report.draw(plot))
    print(text)


if __name__ == "__main__":
    main()
