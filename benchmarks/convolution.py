"""How much the patch-product gradient of `dememo_jax.convolution` saves inside a loop on CPU.

    python benchmarks/convolution.py

One training step of each network, as the mean over a scanned run of steps, with XLA's own convolution gradient and
with ours, side by side in one process. Prints milliseconds and the ratio; on other backends the two are the same.
"""

import time

import jax
import jax.numpy as jnp
import optax

from dememo_jax import convolution, data, loop, models, nets, train

CASES = (("cnn, digits", 8, 1, 64, 22), ("resnet18 of width 16, 32 x 32", 32, 3, 64, 2))


def seconds(net, examples, batch, steps):
    """The best of three timed runs, for one step."""
    method = train.sgd(models.from_linen(net), optax.sgd(0.01))
    key = jax.random.key(0)
    state = jax.jit(method.init)(key, examples.x[:1])
    run = jax.jit(lambda state, examples: loop.scan(method, key, state, examples, steps=steps, batch=batch))
    jax.block_until_ready(run(state, examples))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(state, examples))
        times.append(time.perf_counter() - start)
    return min(times) / steps


def main():
    ours = convolution._conv
    for name, side, channels, batch, steps in CASES:
        x = jax.random.uniform(jax.random.key(1), (2 * batch, side, side, channels))
        examples = data.make(x, jnp.arange(2 * batch) % 10)
        took = {}
        for kind, conv in (("xla", convolution._lax), ("ours", ours)):
            convolution._conv = conv
            net = nets.cnn(10) if name.startswith("cnn") else nets.resnet18(10, 16)
            took[kind] = seconds(net, examples, batch, steps)
        convolution._conv = ours
        xla, own = took["xla"], took["ours"]
        print(f"{name}: XLA {xla * 1e3:.1f} ms, ours {own * 1e3:.1f} ms, ratio {xla / own:.1f}")


if __name__ == "__main__":
    main()
