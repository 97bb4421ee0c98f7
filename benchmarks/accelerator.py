"""What a machine with a GPU is asked first: one command, ten minutes, a JSON file after every step.

    python benchmarks/accelerator.py --out results [--only certify-bfloat16 train ...] [--limit 150] [--small]

certify-*: draws of a certificate of ResNet-18 on 10,000 images, in bfloat16, TF32 and true float32, for --budget seconds or
1,000 draws; torch-*: the same as a PyTorch loop; train: an epoch of ResNet-18 in bfloat16, and which share of the published
matrix peak its products reach; shadows-*: shadow models one by one and side by side; sal-*: the layers of SAL likewise.
Each step is a process of its own under a time limit; it leaves OUT/STEP.json, and a step that is there is not run again
unless its settings or commit differ: give another machine a folder of its own. Needs jax, flax, optax and scikit-learn;
PyTorch where it is installed. --small: tiny sizes, to try the whole on CPU.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve()
PRECISIONS = ("bfloat16", "tf32", "float32")
FULL = {
    "images": 10_000, "width": 64, "draws": 1000, "train": (50_000, 512), "shadows": (16, 4096, 128, 16), "sal": (512, 128, 4),
}  # fmt: skip
SMALL = {"images": 8, "width": 2, "draws": 3, "train": (16, 8), "shadows": (2, 16, 8, 2), "sal": (8, 8, 1)}
# Dense matrix products, FLOP/s, of the published data sheets; None where nothing is known: a share of it is then null.
PEAKS = {
    "H100 PCIe": {"bfloat16": 756e12, "tf32": 378e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12},
    "H200": {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
}


def peak(kind: str, precision: str) -> float | None:
    """FLOP/s of the device at its best, or None."""
    return next((peaks[precision] for name, peaks in PEAKS.items() if name in kind), None)


def share(flops: float, seconds: float, kind: str, precision: str) -> float | None:
    known = peak(kind, precision)
    return None if known is None else flops / seconds / known


# --- what runs in a process of its own -------------------------------------------------------------------------------


def images(count: int):
    """Random images of 32 x 32, as bytes: they cost what others cost."""
    import numpy as np

    from dememo_jax import data

    random = np.random.default_rng(0)
    return data.make(random.integers(0, 256, (count, 32, 32, 3), np.uint8), random.integers(0, 10, count))


def network(width: int, dtype=None):
    """ResNet-18 as a model, freshly initialised weights, and FLOP of a forward pass of one image."""
    import jax

    from dememo_jax import arithmetic, models, nets

    model, x = models.from_linen(nets.resnet18(10, width, dtype=dtype)), jax.numpy.zeros((1, 32, 32, 3))
    weights = jax.jit(model.init)(jax.random.key(1), x)
    return model, weights, arithmetic.flops(arithmetic.products(*models.freeze(model, weights), x))


def certify(sizes: dict, budget: float, precision: str) -> dict:
    """Seconds of a draw, after one that compiles."""
    import contextlib

    import jax

    from dememo_jax import certify, models

    model, weights, flops = network(sizes["width"])
    asked = "as given" if precision == "tf32" else precision
    key, test = jax.random.key(2), images(sizes["images"])
    cloud = certify.cloud(*models.freeze(model, weights), test, key, sigma=0.01, precision=asked)
    times: list[float] = []

    def tell(made) -> bool:
        times.append(time.perf_counter())
        return times[-1] - times[0] > budget

    with jax.default_matmul_precision("tensorfloat32") if precision == "tf32" else contextlib.nullcontext():
        certify.draw(cloud, draws=sizes["draws"] + 1, every=1, strategy="map", after=tell)
    return told(times, sizes, flops, precision) | {"stated": cloud.blank.precision}


def told(times: list[float], sizes: dict, flops: int, precision: str) -> dict:
    """Of the moments at which draws were ready: the first one compiled, the others are timed."""
    import jax

    draws, kind = len(times) - 1, jax.devices()[0].device_kind
    each = (times[-1] - times[0]) / draws
    return {
        "draws": draws, "images": sizes["images"], "seconds_per_draw": each, "seconds_for_1000_draws": 1000 * each,
        "extrapolated": draws < 1000, "images_per_second": sizes["images"] / each, "flops_per_image": flops,
        "share_of_peak": share(flops * sizes["images"], each, kind, precision),
    }  # fmt: skip


def torch(sizes: dict, budget: float, precision: str) -> dict:
    """The same draws by `torch_loop.py`, with the same weights and images."""
    import jax
    import numpy as np
    from certify import in_torch_order

    if importlib.util.find_spec("torch") is None:
        return {"skipped": "PyTorch is not installed"}
    import torch_loop

    gpu = jax.default_backend() != "cpu"
    if reason := torch_loop.missing("cuda" if gpu else "cpu", precision):
        return {"skipped": reason}
    _, weights, flops = network(sizes["width"])
    test = images(sizes["images"])
    leaves = [np.asarray(leaf) for leaf in in_torch_order(weights.params)]
    loop = torch_loop.Noisy(
        torch_loop.resnet18(sizes["width"]), leaves, np.asarray(test.x), np.asarray(test.y),
        device="cuda" if gpu else "cpu", precision=precision,
    )  # fmt: skip
    times: list[float] = []
    while len(times) <= sizes["draws"] and (len(times) < 2 or times[-1] - times[0] < budget):
        loop.draw()
        times.append(time.perf_counter())
    return told(times, sizes, flops, precision)


def train(sizes: dict, budget: float) -> dict:
    """An epoch of training in bfloat16, shuffled, cropped and flipped on the device, in one program."""
    import jax
    import jax.numpy as jnp

    from dememo_jax import augment, loop, train

    count, batch = sizes["train"]
    model, weights, flops = network(sizes["width"], jnp.bfloat16)
    tx, steps, key = train.clipped_sgd(0.1, 0.9, 5e-4, 1000), count // batch, jax.random.key(0)
    method = train.sgd(model, tx, augment=augment.compose(augment.crop(4), augment.flip()))
    run = jax.jit(loop.passes, static_argnames=("method", "passes", "batch", "per_pass"))
    state, examples = train.start(tx, weights), images(steps * batch)
    took = timed(lambda: run(method, key, state, examples, passes=1, batch=batch, per_pass=steps), 3)
    used, kind = 3 * flops * steps * batch, jax.devices()[0].device_kind  # backward twice as much as forward
    found = {"images": steps * batch, "batch": batch, "seconds_of_an_epoch": took, "flops": used}
    return found | {"flops_per_second": used / took, "share_of_peak": share(used, took, kind, "bfloat16")}


def shadows(sizes: dict, budget: float, together: bool) -> dict:
    """One pass of each of several networks, in one program."""
    import jax
    import optax

    from dememo_jax import audit, models, nets
    from dememo_jax import train as training

    many, count, batch, width = sizes["shadows"]
    model, key, examples = models.from_linen(nets.resnet18(10, width)), jax.random.key(0), images(count)
    method, masks = training.sgd(model, optax.sgd(0.1, momentum=0.9)), audit.halves(key, many, count)

    def run():
        made = audit.train_shadows(
            key, model, method, examples, masks, passes=1, batch=batch, width=many if together else 1
        )  # fmt: skip
        return [group.weights for group in made]

    return {"models": many, "images": count, "at_once": many if together else 1, "seconds": timed(run, 2)}


def sal(sizes: dict, budget: float, together: bool) -> dict:
    """The paper's solver on a few layers, two rounds."""
    import re

    import jax.numpy as jnp

    from dememo_jax import models, sharpness

    count, batch, most = sizes["sal"]
    model, weights, _ = network(sizes["width"])
    examples = images(count)
    apply, params = models.freeze(model, weights)
    layers = sharpness.learnable_layers(apply, params, jnp.zeros((1, 32, 32, 3)))
    chosen = [layers[i * (len(layers) - 1) // max(1, most - 1)] for i in range(most)]
    only, width = "|".join(f"^{re.escape(name)}$" for name in chosen), most if together else 1

    def run():
        return list(sharpness.sal(apply, params, examples, only=only, rounds=2, batch=batch, width=width).value.values())

    return {"layers": most, "images": count, "at_once": width, "seconds": timed(run, 2)}


def timed(call, rounds: int) -> float:
    """The least seconds of several calls, after one that compiles."""
    import jax

    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return min(times[1:])


STEPS = {
    **{f"certify-{p}": functools.partial(certify, precision=p) for p in PRECISIONS},
    "train": train,
    **{f"torch-{p}": functools.partial(torch, precision=p) for p in PRECISIONS},
    "shadows-one-by-one": functools.partial(shadows, together=False),
    "shadows-side-by-side": functools.partial(shadows, together=True),
    "sal-one-by-one": functools.partial(sal, together=False),
    "sal-side-by-side": functools.partial(sal, together=True),
}


# --- the command -----------------------------------------------------------------------------------------------------


def surroundings() -> dict:
    """Of this process: device, versions, commit."""
    import jax

    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "versions": versions, "commit": commit()}


def commit() -> str | None:
    done = subprocess.run(
        ["git", "-C", str(HERE.parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )  # fmt: skip
    return done.stdout.strip() or None


def measured(name: str, configuration: dict, limit: float) -> dict:
    """The result of one step in a process of its own: done, skipped, failed or out of time."""
    command = [sys.executable, str(HERE), "--work", name, json.dumps(configuration)]
    begun = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=dict(os.environ))
        failed = done.returncode != 0
        found = {"status": "failed", "reason": done.stderr[-2000:]} if failed else json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"status": "out of time", "reason": f"not done after {limit:g} s"}
    return {"step": name, "configuration": configuration, **found, "wall_seconds": round(time.monotonic() - begun, 2)}


def known(path: Path, configuration: dict, at: str | None) -> bool:
    """Whether the file holds this step, done with these settings at this commit."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    same = found.get("configuration") == configuration and found.get("commit") == at
    return same and found.get("status") in ("done", "skipped")


def work(name: str, configuration: dict) -> None:
    result = STEPS[name](configuration["sizes"], configuration["budget"])
    status = {"status": "skipped", "reason": result["skipped"]} if "skipped" in result else {"status": "done", "result": result}
    print(json.dumps({**surroundings(), **status}))


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--work"]:
        work(given[1], json.loads(given[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for a JSON file of each step")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--limit", type=float, default=150, help="seconds that a step may take, compilation included")
    parser.add_argument("--budget", type=float, default=25, help="seconds of draws that are timed in a step")
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether everything runs")
    asked = parser.parse_args(given)
    configuration = json.loads(json.dumps({"sizes": SMALL if asked.small else FULL, "budget": asked.budget}))
    asked.out.mkdir(parents=True, exist_ok=True)
    bad, here = 0, commit()
    for name in asked.only:
        path = asked.out / f"{name}.json"
        if known(path, configuration, here):
            print(f"{name}: known", flush=True)
            continue
        found = measured(name, configuration, asked.limit)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1))
        part.replace(path)
        bad += found["status"] in ("failed", "out of time")
        print(f"{name}: {found['status']}, {json.dumps(found.get('result', found.get('reason')))}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
