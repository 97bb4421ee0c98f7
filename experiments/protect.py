"""Every recipe on CIFAR-10: what a victim learns, beside the controls and the published numbers.

    python experiments/protect.py --data cifar10.npz --scale subset --runs runs/protect
    python experiments/protect.py --data cifar10.npz --scale full --runs runs/protect-full     # a GPU

subset: a three-layer network, few passes and epochs, for CPU: whether each recipe works, not how well.
full: ResNet-18 and the published settings. Killed, the same command goes on. The table and its numbers are written to
`experiments/results/protect-SCALE.json` and `.md`, with device, versions, commit, configuration and seconds of each run.
"""

import argparse
from pathlib import Path

from dememo_jax import cli, files, report
from dememo_jax.cli import configs

RESULTS = Path(__file__).parent / "results"

# Clean test accuracy, %, of ResNet-18 on fully protected CIFAR-10, least and most of the sources.
PUBLISHED = {
    "clean": "94.5-94.7", "ue-s": "19.9-24.2", "ue-c": "13.3-16.4", "em": "13.2", "gray": "-", "aue": "-", "rem": "17.5-27.1",
    "sem": "14.8", "lock": "18.7 (16/255)", "tap": "6.3-22.5", "tap-untargeted": "-", "hypo": "70.4-74.2", "sep": "3.9",
    "entf-push": "71.6 (AT)", "entf-pull": "73.0 (AT)", "clog": "88.7", "pil": "12.8", "tue": "10.1-11.3",
    "tue-paper": "-", "mi": "10.0", "pue": "10.0", "ntga": "12.9-42.5",
    "ops": "13.7-36.6", "lsp": "13.1-19.1", "ar": "11.7-17.4",
    "cuda": "18.5", "random": "-", "random-class": "-",
}  # fmt: skip

# On two CPU cores: a fraction of the published passes, epochs and steps. Everything else is as published.
CO = {"batch": 128, "learner_steps": 20}
SUBSET = {
    "ue-s": {**CO, "passes": 10, "inner_steps": 10}, "ue-c": {**CO, "passes": 25},
    "gray": {**CO, "passes": 10, "inner_steps": 10},
    "em": {"epochs": 10, "inner_steps": 5}, "aue": {"passes": 12}, "mi": {"passes": 12}, "lock": {**CO, "passes": 20},
    "rem": {"epochs": 4, "inner_steps": 5, "draws": 2, "attack_steps": 3},
    "sem": {"epochs": 8, "inner_steps": 5, "draws": 2, "attack_steps": 3},
    "tap": {"epochs": 20, "inner_steps": 100, "restarts": 1},
    "tap-untargeted": {"epochs": 20, "inner_steps": 60, "restarts": 1},
    "hypo": {"epochs": 20, "inner_steps": 20}, "sep": {"epochs": 16, "inner_steps": 15, "draws": 4, "radius": 8 / 255},
    "entf-push": {"epochs": 6, "inner_steps": 40, "attack_steps": 3},
    "entf-pull": {"epochs": 6, "inner_steps": 40, "attack_steps": 3},
    "clog": {"epochs": 10, "inner_steps": 12}, "pil": {}, "tue": {},
    "tue-paper": {"passes": 6, "batch": 256}, "pue": {**CO, "passes": 15, "draws": 2, "learner_steps": 10}, "ntga": {},
    "ops": {}, "lsp": {}, "ar": {}, "cuda": {}, "random": {}, "random-class": {},
}  # fmt: skip
FULL = {name: {} for name in SUBSET} | {"sep": {"radius": 8 / 255}, "tap": {"restarts": 1}, "tap-untargeted": {"restarts": 1}}
SCALES = {
    "subset": (SUBSET, {"model": "cnn3"}, {"epochs": 20, "batch": 128, "augment": "none"}),
    "full": (FULL, {"model": "resnet18"}, {"epochs": 60, "batch": 128, "augment": "crop-flip"}),
}


def measure(root: Path, data: str, scale: str, names: list[str]) -> list[dict]:
    """One protect and one train run for each recipe, and the clean and random-label victims."""
    methods, net, victim = SCALES[scale]
    rows = []
    for name in names:
        row = {"method": name}
        if name in methods:
            made = cli.execute(configs.Protect(root / f"protect-{name}", name, data, **net, **methods[name]))
            row |= {"measured": made["values"]["measured"], "budget": made["values"]["budget"], "protect": made["measured"]}
            start = {"source": root / f"protect-{name}"}
        else:
            start = {"data": data, "random_labels": name == "random labels"}
        learned = cli.execute(configs.Train(root / f"train-{name.replace(' ', '-')}", **start, **net, **victim))
        row |= {key: learned["values"][key] for key in ("final", "peak", "peak_epoch", "history")}
        rows.append(row | {"train": learned["measured"], "configuration": methods.get(name, {})})
    return rows


def table(rows: list[dict]) -> str:
    head = "| recipe | budget | largest change after rounding | final | peak | seconds to make | published, ResNet-18, % |\n"
    lines = [head + "|---|---|---|---|---|---|---|"]
    for row in rows:
        found, made = row.get("measured"), row.get("protect")
        change = f"{found['linf']}/255, l2 {found['l2']:.2f}" if found else "-"
        took = f"{made['seconds']:.0f}" if made else "-"
        accuracies = f"{row['final']:.3f} | {row['peak']:.3f}"
        name, published = row["method"], PUBLISHED.get(row["method"], "-")
        lines.append(f"| {name} | {row.get('budget', '-')} | {change} | {accuracies} | {took} | {published} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an .npz of CIFAR-10")
    parser.add_argument("--scale", choices=SCALES, default="subset")
    parser.add_argument("--runs", type=Path, default=Path("runs/protect"))
    parser.add_argument("--only", nargs="*", help="these recipes; by default all, with the controls")
    arguments = parser.parse_args()
    names = arguments.only or ["clean", "random labels", *SCALES[arguments.scale][0]]
    rows = measure(arguments.runs, arguments.data, arguments.scale, names)
    if not arguments.only:
        RESULTS.mkdir(exist_ok=True)
        _, net, victim = SCALES[arguments.scale]
        result = {"scale": arguments.scale, "surrogate and victim": net, "victim": victim, "rows": rows}
        files.write(RESULTS / f"protect-{arguments.scale}.json", report.to_json(result))
        files.write(RESULTS / f"protect-{arguments.scale}.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
