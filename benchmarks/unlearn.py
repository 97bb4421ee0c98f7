"""An epoch of every unlearning recipe against a bare training epoch times the passes that it needs by count.

    python benchmarks/unlearn.py --data cifar10.npz [--net cnn3|resnet18]

A forward pass counts one, a backward pass two: a training step is three, a step with a teacher four, one with a retain and
a forget batch six. The bare epoch is `loop.scan` of `train.sgd` over the retain set; both sides run in turn, compiled before,
and the median of the pairs is printed. A ratio of 1 means that the machinery costs nothing.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import optax

from dememo_jax import data as sets
from dememo_jax import loop, models, nets, sources, train, unlearn

NETS = {"cnn3": lambda n: nets.cnn(n, (16, 32, 64)), "resnet18": nets.resnet18, "mlp": lambda n: nets.mlp(n, (512, 512))}


def recipes(net: str, batch: int) -> dict:
    """name -> (method, passes of a step; of the forget and of the retain stage where they differ)."""
    model, wider = (models.from_linen(NETS[net](n)) for n in (10, 11))
    tx, how = optax.sgd(0.01, momentum=0.9), {"batch": batch}
    certified = unlearn.noisy_descent(model, lr=0.01, clip_init=1.0, clip_grad=1.0, sigma=0.01, batch=batch)
    return {
        "retrain": (unlearn.retrain(model, tx, **how), 3),
        "finetune": (unlearn.finetune(model, tx, **how), 3),
        "l1-sparse": (unlearn.l1_sparse(model, tx, steps=100, **how), 3),
        "CF-1": (unlearn.catastrophic_forgetting(model, tx, **how), 3),
        "EU-1": (unlearn.exact_last_layers(model, tx, **how), 3),
        "gradient ascent": (unlearn.gradient_ascent(model, tx, **how), 3),
        "NegGrad+": (unlearn.negative_gradient(model, tx, **how), 6),
        "NPO": (unlearn.npo(model, tx, **how), 7),
        "NPO alone": (unlearn.npo(model, tx, retain=0.0, **how), 4),
        "NPO, KL": (unlearn.npo(model, tx, hold="kl", **how), 8),
        "random labels": (unlearn.random_labels(model, tx, classes=10, **how), 3),
        "SalUn": (unlearn.salun(model, tx, classes=10, **how), 3),
        "SCRUB": (unlearn.scrub(model, tx, batches=(batch, batch)), 4),
        "bad teacher": (unlearn.bad_teacher(model, tx, **how), 8),
        "boundary shrink": (unlearn.boundary_shrink(model, tx, **how), 6),
        "boundary expand": (unlearn.boundary_expand(model, wider, tx, classes=10, **how), 3),
        "UNSIR": (unlearn.unsir(model, tx, **how), 3),
        "noisy descent (certified)": (certified, 3),
    }


def seconds(call) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10.npz")
    parser.add_argument("--net", choices=NETS, default="cnn3")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    data, _ = sources.load(arguments.data)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.net}, {len(data.y):,} images, "
        f"batch {arguments.batch}\n"
    )
    forget = np.asarray(data.y) == 5
    counts, key = (int(forget.sum()), int((~forget).sum())), jax.random.key(0)
    scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))
    model = models.from_linen(NETS[arguments.net](10))
    learner, per_epoch = train.sgd(model, optax.sgd(0.01, momentum=0.9)), sets.steps(counts[1], arguments.batch, 1)
    start = learner.init(key, data.x[:1])

    def bare():
        return scan(learner, key, start, data, steps=per_epoch, batch=arguments.batch, mask=jax.numpy.asarray(~forget))

    bare()
    print("| recipe | steps of an epoch | passes a step | seconds | bare training times passes | ratio |\n" + "|---" * 6 + "|")
    for name, (method, passes) in recipes(arguments.net, arguments.batch).items():
        state = jax.jit(method.init)(key, start.weights, data, forget)
        steps = method.steps(*counts, 1) if hasattr(method, "steps") else per_epoch

        def one(method=method, state=state, steps=steps):
            return scan(method, key, state, data, steps=steps)

        one()
        times = [(seconds(one), seconds(bare) * steps / per_epoch * passes / 3) for _ in range(arguments.pairs)]
        own, expected = (statistics.median(side) for side in zip(*times))
        ratio = statistics.median(a / b for a, b in times)
        print(f"| {name} | {steps} | {passes} | {own:.2f} | {expected:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
