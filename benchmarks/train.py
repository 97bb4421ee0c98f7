"""Whole epochs in one program against a bare jitted training step, and how near a step comes to the matrix peak.

    python benchmarks/train.py [--only epochs|peak] [--data cifar10.npz] [--rounds 5]

Epochs: the bare side is written out below, `value_and_grad` and an optax update called from Python on batches that were made
before, without augmentation; a second one has XLA's own gradient of the convolution. Ours shuffles, crops and flips on the
device, in one program an epoch; all in turn, the best of the rounds. On CPU small networks, on a GPU ResNet-18 in bfloat16
at batch 512. Peak (GPU only): FLOP/s of an epoch against those of a plain bfloat16 matrix product in the same run.
Without --data the images are random: the speeds are the same.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import arithmetic, augment, convolution, data, keys, loop, losses, models, nets, sources, train

KEY = jax.random.key(0)
CROP_FLIP = augment.compose(augment.crop(4), augment.flip())
# name, network, images, batch
SMALL = (
    ("ResNet (1, 1, 1) of width 8", nets.ResNet(10, (1, 1, 1), 8), 2048, 128),
    ("CNN (16, 32)", nets.cnn(10), 2048, 128),
    ("ResNet-18 of width 16", nets.resnet18(10, 16), 512, 64),
)
LARGE = (("ResNet-18, bfloat16", nets.resnet18(10, dtype=jnp.bfloat16), 50_000, 512),)


def examples(path: str | None, count: int) -> data.Dataset:
    if path:
        found = sources.load(path)[0]
        return data.take(found, jnp.arange(count) % len(found.y))
    random = np.random.default_rng(0)
    return data.make(random.integers(0, 256, (count, 32, 32, 3), np.uint8), random.integers(0, 10, count))


def seconds(call) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def best(sides: dict, rounds: int) -> dict[str, float]:
    """The least seconds of each side; they run in turn, compiled before."""
    for call in sides.values():
        jax.block_until_ready(call())
    times = [{name: seconds(call) for name, call in sides.items()} for _ in range(rounds)]
    return {name: min(one[name] for one in times) for name in sides}


# --- epochs ------------------------------------------------------------------------------------------------------


def bare(net, tx, examples, batch):
    """An epoch of a training script without this library's drivers, and its compiled step."""
    variables = jax.jit(net.init)(KEY, examples.x[:1])
    order = np.random.default_rng(0).permutation(len(examples.y))
    batches = [(examples.x[at], examples.y[at]) for at in order.reshape(-1, batch)]
    current = variables["params"], variables.get("batch_stats", {}), tx.init(variables["params"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(current, x, y):
        params, stats, opt = current

        def objective(params):
            logits, new = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return losses.cross_entropy(logits, y).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), stats, opt), value

    program = step.lower(current, *batches[0]).compile()

    def epoch():
        nonlocal current
        for x, y in batches:
            current, value = program(current, x, y)
        return value

    return epoch, program


def without_our_convolution(make, *arguments):
    """The same with XLA's gradient of the convolution, which at the top level of a program is the faster one on CPU."""
    ours, convolution._conv = convolution._conv, convolution._lax
    try:
        return make(*arguments)
    finally:
        convolution._conv = ours


def ours(net, tx, examples, batch) -> dict:
    """Sides of one epoch in one program: as `loop.run` drives it, as `loop.scan` does, and parts of it."""
    model, steps = models.from_linen(net), len(examples.y) // batch
    plain, looking = (train.sgd(model, tx, augment=look) for look in (None, CROP_FLIP))
    state = jax.jit(plain.init)(KEY, examples.x[:1])
    passes = jax.jit(loop.passes, static_argnames=("method", "passes", "batch", "per_pass"))
    scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))

    @jax.jit
    def look(examples):
        def each(total, job):
            return total + CROP_FLIP(keys.at(KEY, job[0]), job[1]).sum(), None

        return jax.lax.scan(each, jnp.zeros(()), (jnp.arange(steps), examples.x.reshape(steps, batch, *examples.x.shape[1:])))

    def passed(method):
        return passes(method, KEY, state, examples, passes=1, batch=batch, per_pass=steps)

    return {
        "passes": lambda: passed(looking),
        "scan": lambda: scan(looking, KEY, state, examples, steps=steps, batch=batch),
        "no augmentation": lambda: passed(plain),
        "augmentation alone": lambda: look(examples),
    }


def epochs(path: str | None, rounds: int) -> None:
    cpu = jax.default_backend() == "cpu"
    print("skipped on CPU: ResNet-18 in bfloat16 at batch 512\n" if cpu else "skipped off the CPU: the small networks\n")
    head = ["network, images, batch", "bare step, ms", "bare, XLA's gradient", "an epoch in one program", "by `loop.scan`"]
    head += ["no augmentation", "augmentation alone", "ratio", "ratio to XLA's", "epoch, s"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, net, count, batch in SMALL if cpu else LARGE:
        tx, seen = train.clipped_sgd(0.1, 0.9, 5e-4, 1000), examples(path, count // batch * batch)
        case = net, tx, seen, batch
        sides = {"bare": bare(*case)[0], "xla": without_our_convolution(bare, *case)[0], **ours(*case)}
        found = best(sides, rounds)
        cells = [f"{1e3 * value / (count // batch):.2f}" for value in found.values()]
        cells += [f"{found[side] / found['passes']:.2f}" for side in ("bare", "xla")] + [f"{found['passes']:.2f}"]
        print(f"| {name}, {count:,}, {batch} | " + " | ".join(cells) + " |", flush=True)


# --- peak --------------------------------------------------------------------------------------------------------


def product_speed(side: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a plain bfloat16 matrix product; two a multiply-add."""
    a = jax.random.normal(KEY, (side, side), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)

    def run():
        b = a
        for _ in range(repeats):
            b = product(a, b)
        return b

    return 2 * side**3 * repeats / best({"product": run}, 5)["product"]


def forward_flops(net, side: int = 32) -> int:
    """Of one image: two for each multiply-add of convolutions and dense layers, from the shapes in the traced program."""
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return arithmetic.flops(arithmetic.products(net.apply, jax.eval_shape(net.init, KEY, x), x))


def peak(path: str | None, rounds: int) -> None:
    if jax.default_backend() == "cpu":
        print("\nskipped on CPU: share of the bfloat16 matrix peak")
        return
    ((name, net, count, batch),) = LARGE
    tx, count = train.clipped_sgd(0.1, 0.9, 5e-4, 1000), count // batch * batch
    seen = examples(path, count)
    _, program = bare(net, tx, seen, batch)
    took, reached = best({"epoch": ours(net, tx, seen, batch)["passes"]}, rounds)["epoch"], product_speed()
    speed = 3 * forward_flops(net) * count / took
    told = (program.cost_analysis() or {}).get("flops", float("nan")) * (count // batch) / took
    print(f"\n{name}, batch {batch}: an epoch of {count:,} images {took:.2f} s")
    print(
        f"counted (three forward passes, two FLOP a multiply-add): {speed / 1e12:.1f} TFLOP/s; by XLA's count {told / 1e12:.1f}"
    )
    print(f"plain bfloat16 product {reached / 1e12:.1f} TFLOP/s, share {speed / reached:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("epochs", "peak"))
    parser.add_argument("--data", help="an .npz of CIFAR-10; random images without it")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; ms a step, best of {arguments.rounds} rounds\n")
    for name, part in {"epochs": epochs, "peak": peak}.items():
        if arguments.only in (None, name):
            part(arguments.data, arguments.rounds)


if __name__ == "__main__":
    main()
