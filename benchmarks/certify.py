"""How fast certification draws are made, as ratios measured side by side in one run.

    python benchmarks/certify.py [--data cifar10.npz] [--only noisy torch limits memory devices gpu]

noisy: images a second of noisy evaluation over those of one plain jitted forward pass at its best batch. torch: the
seconds of a draw in a sequential PyTorch loop over ours (needs `.[bench]`). limits: those seconds over the ones that XLA
needs for the matrix products alone. memory: peak of 10,000 draws over 1,000.
devices: eight fake CPU devices. gpu: 1,000 draws of ResNet-18 on 10,000 images, where JAX has a GPU. Each measurement runs in
a process of its own, the two sides in turn. Without --data the images are random, which costs the same time.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerator
import jax
import numpy as np
import train

from dememo_jax import certify, data, evaluate, mesh, models, nets, sources

# name -> (network, draws in one timing, rounds, image batches tried for the plain pass)
CASES = {
    "digits": (lambda: nets.mlp(10, (128,)), 512, 5, (128, 512, 1797)),
    "mlp": (lambda: nets.mlp(10, (256,)), 10, 5, (100, 500, 1000, 2000, 10_000)),
    "cnn": (lambda: nets.cnn(10, (32, 64, 128)), 3, 3, (50, 100, 200, 500, 1000)),
    "resnet18": (lambda: nets.resnet18(10), 1, 0, (25, 50, 100, 200, 500)),
}
TITLES = {
    "digits": "MLP 64-128-10, digits (1,797 images)",
    "mlp": "MLP 3072-256-10, CIFAR-10 (10,000)",
    "cnn": "three-layer CNN (32, 64, 128), CIFAR-10 (10,000)",
    "resnet18": "ResNet-18, CIFAR-10 (10,000)",
}
HERE = Path(__file__).resolve()
CHECKED = 1024  # images on which both frameworks must agree


def images(name, path):
    if name == "digits":
        parts = sources.load("digits")
        return data.make(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
    if path is None:
        random = np.random.default_rng(0)
        return data.make(random.random((10_000, 32, 32, 3), np.float32), random.integers(0, 10, 10_000))
    with np.load(path, allow_pickle=False) as file:
        return data.make(file["x_test"], file["y_test"])


def network(name, path):
    examples, model = images(name, path), models.from_linen(CASES[name][0]())
    return examples, *models.freeze(model, model.init(jax.random.key(1), examples.x[:1]))


def clock(fn, rounds):
    fn()  # compiles
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        fn()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# --- what runs in a process of its own -------------------------------------------------------------------------------


def ours(name, path, draws, rounds, precision="float32", over=None):
    """Seconds of a draw, a digest of the scores, and the plain accuracy on the first images, to compare networks by."""
    examples, apply, params = network(name, path)
    cloud = certify.cloud(apply, params, examples, jax.random.key(2), sigma=0.01, precision=precision)
    speed = certify.calibrate(cloud, over=over)
    seconds, digest = speed.seconds, ""  # of one long draw, where no rounds are asked for
    if rounds:
        made = {}

        def draw():
            made["scores"] = certify.draw(cloud, draws=draws, strategy="vmap", width=speed.width, over=over).scores

        seconds = clock(draw, rounds) / draws
        digest = hashlib.blake2b(made["scores"].tobytes(), digest_size=8).hexdigest()
    clean = float(evaluate.accuracy(apply, params, data.take(examples, np.arange(CHECKED))))
    return {"seconds": seconds, "width": speed.width, "clean": clean, "digest": digest, "images": len(examples.y)}


def plain(name, path, rounds):
    """Seconds of one jitted forward pass over all images, at the fastest of several image batches."""
    examples, apply, params = network(name, path)
    few = examples.x[: 500 if name == "resnet18" else None]

    def forward(x, batch):
        evaluate.logits(apply, params, x, batch=batch).block_until_ready()

    tried = {batch: clock(functools.partial(forward, few, batch), 2) for batch in CASES[name][3]}
    best = min(tried, key=tried.get)
    return {"seconds": clock(functools.partial(forward, examples.x, best), rounds), "batch": best}


def work(arguments):
    kind, name, path, draws, rounds = arguments[0], arguments[1], arguments[2] or None, *map(int, arguments[3:5])
    if kind == "plain":
        return plain(name, path, rounds)
    if kind == "products":
        return products(name)
    if kind == "memory":
        import resource

        ours(name, path, draws, 1)
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return ours(name, path, draws, rounds, kind, mesh.mesh() if jax.device_count() > 1 else None)


def start(*arguments, **environment):
    command = [sys.executable, str(HERE), "--work", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def torch_loop(name, path, folder, layout):
    examples, _, params = network(name, path)
    kernels = [np.asarray(leaf) for leaf in in_torch_order(params)]
    np.savez(folder / f"{name}.npz", x=examples.x, y=examples.y, **{f"w{i}": w for i, w in enumerate(kernels)})
    command = [sys.executable, str(HERE.with_name("torch_loop.py")), name, str(folder / f"{name}.npz")]
    draws = {"digits": 300, "mlp": 15, "cnn": 3, "resnet18": 1}[name]
    done = subprocess.run([*command, str(draws), layout], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def in_torch_order(params):
    """Kernels and dense biases, layer by layer in the order in which PyTorch lists its modules."""
    order = sorted(params, key=lambda n: ("Dense" in n, "Block" in n, int(n.rpartition("_")[2])))
    for name in order:
        layer = params[name]
        if "Block" in name:
            yield from (layer[f"Conv_{i}"]["kernel"] for i in range(3) if f"Conv_{i}" in layer)
        elif "kernel" in layer:
            yield layer["kernel"]
            if "bias" in layer:
                yield layer["bias"]


# --- the table -------------------------------------------------------------------------------------------------------


def show(rows, head):
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def noisy(path, names):
    rows = []
    for name in names:
        _, draws, rounds, _ = CASES[name]
        pairs = [
            (start("plain", name, path, 0, 3 if name != "resnet18" else 1), start("float32", name, path, draws, rounds))
            for _ in range(2 if name != "resnet18" else 1)
        ]
        ratio = statistics.median(p["seconds"] / o["seconds"] for p, o in pairs)
        p, o = pairs[-1]
        speed = o["images"] / o["seconds"]
        rows.append(
            (
                TITLES[name],
                f"{o['images'] / p['seconds']:,.0f} (batch {p['batch']})",
                f"{speed:,.0f} (width {o['width']})",
                f"{ratio:.2f}",
            )
        )
    show(rows, ("network", "plain forward, images/s", "noisy draws, images/s", "ratio"))


def torch(path, names):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            _, draws, rounds, _ = CASES[name]
            turns = 3 if name != "resnet18" else 2
            pairs = [
                (torch_loop(name, path, Path(folder), "default"), start("float32", name, path, draws, rounds))
                for _ in range(turns)
            ]
            same = abs(pairs[0][0]["clean"] - pairs[0][1]["clean"])
            assert same < 1e-3, f"the two networks disagree by {same}"
            ratio = statistics.median(t["seconds"] / o["seconds"] for t, o in pairs)
            t, o = pairs[-1]
            row = (TITLES[name], f"{t['seconds'] * 1e3:,.3g}", f"{o['seconds'] * 1e3:,.3g}", f"{ratio:.2f}")
            last = torch_loop(name, path, Path(folder), "channels-last") if name in ("cnn", "resnet18") else None
            rows.append((*row, "-" if last is None else f"{last['seconds'] / o['seconds']:.2f}"))
    show(rows, ("network", "PyTorch, ms a draw", "ours, ms a draw", "ratio", "ratio to PyTorch in channels-last layout"))


def products(name):
    """Seconds of nothing but the matrix products of a draw, at the fastest of several ways to lay them out."""
    count, inputs, hidden = {"digits": (1797, 64, 128), "mlp": (10_000, 3072, 256)}[name]
    many = {"digits": 64, "mlp": 4}[name]
    random = np.random.default_rng(0)
    x = jax.device_put(random.random((count, inputs), np.float32))
    first = jax.device_put(random.random((many, inputs, hidden), np.float32))
    second = jax.device_put(random.random((many, hidden, 10), np.float32))

    @functools.partial(jax.jit, static_argnames="width")
    def run(x, first, second, *, width):
        return jax.lax.map(lambda w: (x @ w[0] @ w[1])[0], (first, second), batch_size=width)

    ways = [clock(lambda w=w: run(x, first, second, width=w).block_until_ready(), 5) / many for w in (None, 2, 4)]
    return {"seconds": min(ways), "flops": 2 * count * hidden * (inputs + 10)}


def limits(path, names):
    """How much faster than PyTorch a dense network could be, if a draw were its matrix products and nothing else."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("digits", "mlp"):
            pairs = [(torch_loop(name, path, Path(folder), "default"), start("products", name, path, 0, 0)) for _ in range(3)]
            ratio = statistics.median(t["seconds"] / o["seconds"] for t, o in pairs)
            own = pairs[-1][1]
            speed = own["flops"] / own["seconds"] / 1e9
            rows.append((TITLES[name], f"{own['seconds'] * 1e3:.3g}", f"{speed:.0f}", f"{ratio:.2f}"))
    show(rows, ("network", "XLA, matrix products alone, ms", "GFLOP/s", "PyTorch's draw over them"))


def memory(path, names):
    few, many = (start("memory", "digits", path, draws, 1)["bytes"] for draws in (1_000, 10_000))
    show([(f"{few / 2**20:,.0f}", f"{many / 2**20:,.0f}", f"{many / few:.3f}")], ("MiB at 1,000 draws", "at 10,000", "ratio"))


def devices(path, names):
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    rows = []
    for name in [n for n in ("digits", "cnn") if n in names]:
        draws = {"digits": 4096, "cnn": 16}[name]
        one, many = start("float32", name, path, draws, 1), start("float32", name, path, draws, 1, **eight)
        equal = "equal" if one["digest"] == many["digest"] else "DIFFERENT"
        rows.append(
            (
                TITLES[name],
                f"{one['seconds'] * 1e3:.3g}",
                f"{many['seconds'] * 1e3:.3g}",
                f"{many['seconds'] / one['seconds']:.2f}",
                equal,
            )
        )
    show(rows, ("network", "one device, ms a draw", "eight fake devices", "ratio", "scores"))


def gpu(path, names):
    if jax.default_backend() == "cpu":
        print("\ngpu: none here, not measured")
        return
    rows, kind = [], jax.devices()[0].device_kind
    flops = train.forward_flops(nets.resnet18(10)) * 10_000
    for precision in ("bfloat16", "float32"):
        done = start(precision, "resnet18", path, 100, 1)
        reached = accelerator.share(flops, done["seconds"], kind, precision)
        rows.append(
            (
                precision,
                f"{done['seconds'] * 1000:.1f}",
                f"{done['images'] / done['seconds']:,.0f}",
                "-" if reached is None else f"{reached:.1%}",
            )
        )
    show(rows, ("precision", "seconds for 1,000 draws", "images/s", "MFU"))


PARTS = {"noisy": noisy, "torch": torch, "limits": limits, "memory": memory, "devices": devices, "gpu": gpu}


def main():
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="an .npz with x_test and y_test of CIFAR-10")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    asked = parser.parse_args()
    print(f"{os.cpu_count()} x {platform.processor() or platform.machine()}, jax {jax.__version__}, {jax.default_backend()}")
    for part in asked.only:
        PARTS[part](asked.data, asked.networks)


if __name__ == "__main__":
    main()
