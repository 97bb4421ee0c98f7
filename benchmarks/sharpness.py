"""Hessian-vector products against gradients, one-step SAL against the paper's solver, and that against a PyTorch loop.

    python benchmarks/sharpness.py --data cifar10.npz [--only products|solvers|torch]

Ratios come from sides that run in turn, compiled before, and are medians of the pairs. `torch` needs `.[bench]`.
"""

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from audit import seconds
from certify import in_torch_order

from dememo_jax import curvature, data, models, nets, sharpness, sources

HERE, PAIRS = Path(__file__).resolve(), 3


def in_turn(*calls, pairs=PAIRS) -> tuple[list[float], float]:
    """Median seconds of each, and the median ratio of the last to the first."""
    for call in calls:
        call()
    times = [[seconds(call) for call in calls] for _ in range(pairs)]
    return [statistics.median(one) for one in zip(*times)], statistics.median(row[-1] / row[0] for row in times)


def head(*names) -> None:
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")


def network(net, x):
    model = models.from_linen(net)
    return models.freeze(model, model.init(jax.random.key(0), x[:1]))


def some(path, count):
    full, _ = sources.load(path)
    return data.take(full, jnp.arange(count))


def products(path):
    head("network, images", "gradient, ms", "Hessian-vector product", "ratio", "of 8 vectors, each", "ratio")
    cases = [("MLP 64-128-128-10", nets.mlp(10, (128, 128)), "digits", 1024), ("CNN (16, 32)", nets.cnn(10), "digits", 1024)]
    cases += (
        [("CNN (16, 32, 64)", nets.cnn(10, (16, 32, 64)), path, 256), ("ResNet-18", nets.resnet18(10), path, 64)]
        if path
        else []
    )
    for name, net, where, count in cases:
        examples = some(where, count)
        apply, params = network(net, examples.x)
        batch = min(count, 128)
        gradient = jax.jit(functools.partial(curvature.mean_gradient, batch=batch))
        gradient = functools.partial(gradient, jax.tree_util.Partial(apply), params, examples)
        product = curvature.operator(apply, params, examples, batch=batch)
        run = jax.jit(lambda product, vectors: product(vectors))
        one, eight = (jax.tree.map(lambda p, n=n: jnp.ones((n, *p.shape)), params) for n in (1, 8))
        (g, h), ratio = in_turn(gradient, functools.partial(run, product, one))
        (_, e), many = in_turn(gradient, functools.partial(run, product, eight))
        cells = (f"{1e3 * g:.1f}", f"{1e3 * h:.1f}", f"{ratio:.2f}", f"{1e3 * e / 8:.1f}", f"{many / 8:.2f}")
        print(f"| {name}, {count:,} | " + " | ".join(cells) + " |", flush=True)


def solvers(path):
    """ResNet-18 in full at a quarter of its width; every number is all 21 layers."""
    head("network, images", "solver", "seconds", "the paper's over it")
    cases = [("MLP 64-128-128-10, 1,347", nets.mlp(10, (128, 128)), "digits", 1347)]
    cases += [("ResNet-18 of width 16, 64", nets.resnet18(10, 16), path, 64)] if path else []
    for name, net, where, count in cases:
        examples = some(where, count)
        apply, params = network(net, examples.x)
        took = {}
        for solver in ("ball", "one_step", "hvp", "diagonal", "normalized"):
            call = functools.partial(sharpness.sal, apply, params, examples, solver=solver, batch=64)
            call()
            took[solver] = min(seconds(call) for _ in range(2))
            print(f"| {name} | {solver} | {took[solver]:.3f} | {took['ball'] / took[solver]:.1f} |", flush=True)


def torch(path):
    head("network, images, layers", "PyTorch, s", "ours", "PyTorch over ours", "over ours, channels last")
    cases = [("digits", nets.mlp(10, (128,)), "digits", 1347, 10, None)]
    cases += (
        [("cnn", nets.cnn(10, (32, 64, 128)), path, 256, 2, None), ("resnet18", nets.resnet18(10), path, 64, 1, 5)]
        if path
        else []
    )
    for name, net, where, count, rounds, every in cases:
        examples = some(where, count)
        apply, params = network(net, examples.x)
        order = sharpness.learnable_layers(apply, params, examples.x[:1])
        at = list(range(0, len(order), every or 1))
        only = "|".join(f"^{re.escape(order[i])}$" for i in at)
        how = {"rounds": rounds, "batch": 64, "only": only, "width": 1}
        call = functools.partial(sharpness.sal, apply, params, examples, **how)
        found = call()
        with tempfile.TemporaryDirectory() as folder:
            kernels = {f"w{i}": np.asarray(leaf) for i, leaf in enumerate(in_torch_order(params))}
            np.savez(Path(folder) / "net.npz", x=examples.x, y=examples.y, **kernels)

            def loop(layout, folder=folder, at=at, name=name, rounds=rounds):
                command = [
                    sys.executable,
                    str(HERE.with_name("torch_sharpness.py")),
                    name,
                    f"{folder}/net.npz",
                    "64",
                    str(rounds),
                ]
                done = subprocess.run([*command, json.dumps(at), layout], capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                return json.loads(done.stdout.splitlines()[-1])

            layouts = ("default", "channels-last") if name != "digits" else ("default",)
            rounds_ = [
                ({layout: loop(layout) for layout in layouts}, seconds(call)) for _ in range(PAIRS if every is None else 2)
            ]
        one = rounds_[0][0]["default"]
        theirs = [max(pair) for pair in one["found"]]
        mine = [found.value[order[i]] for i in at]
        print(
            f"<!-- {name}: loss {one['loss']:.5f} and {found.loss:.5f}; SAL {np.round(theirs, 4)} and {np.round(mine, 4)} -->"
        )
        ratios = {layout: statistics.median(sum(t[layout]["seconds"]) / o for t, o in rounds_) for layout in layouts}
        t, o = sum(one["seconds"]), statistics.median(o for _, o in rounds_)
        last = f"{ratios['channels-last']:.2f}" if len(layouts) > 1 else "-"
        print(f"| {name}, {count:,}, {len(at)} | {t:.2f} | {o:.2f} | {ratios['default']:.2f} | {last} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("products", "solvers", "torch"))
    parser.add_argument("--data", help="an .npz of CIFAR-10, for the convolutional rows")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, part in {"products": products, "solvers": solvers, "torch": torch}.items():
        if arguments.only in (None, name):
            part(arguments.data)


if __name__ == "__main__":
    main()
