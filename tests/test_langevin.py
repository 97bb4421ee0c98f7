"""Langevin unlearning: accounts against exact Gaussian laws and the published numbers, steps against numpy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from dememo_jax import bounds, checkpoint, data, loop
from dememo_jax.errors import BadInput
from dememo_jax.types import Dataset
from dememo_jax.unlearn import langevin, langevin_head

N, F, K, S = 60, 4, 3, 6
KEY = jax.random.key(0)
RUN = {"n": 100, "forget": 5, "gradient_bound": 1.2, "convexity": 0.3, "smoothness": 1.0, "lr": 0.4, "sigma": 0.05}
LONG = RUN | {"learning_steps": 200}
COMMON = {"classes": K, "n": N, "forget": S, "learning_steps": 20, "lr": 0.5, "sigma": 0.02, "weight_decay": 0.1}


# --- accounts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", bounds.langevin.RELATIONS)
@pytest.mark.parametrize(("learned", "steps", "lr"), [(1, 0, 0.4), (7, 3, 0.4), (200, 12, 0.4), (30, 4, 1.9), (5, 9, 1.0)])
def test_mu_is_the_noisy_iterations(relation, learned, steps, lr):
    c = max(abs(1 - 0.3 * lr), abs(1 - lr))
    each = {"removal": 1, "replacement": 2}[relation] * lr * 5 * 1.2 / 100
    total = learned + steps
    shift = np.where(np.arange(total) < learned, each, 0.0)
    expected = bounds.noisy_iteration_mu(0.0, np.full(total, c), shift, np.full(total, math.sqrt(2 * lr) * 0.05))
    got = bounds.langevin_mu(steps, **RUN | {"lr": lr, "learning_steps": learned}, relation=relation)
    assert got == pytest.approx(expected, rel=1e-9)


def exact_delta(epsilon, one, other):
    """Of two Gaussians (mean, sd), by quadrature over the set where the ratio of densities exceeds e^epsilon."""
    reach = 12 * max(one[1], other[1])
    grid = np.linspace(min(one[0], other[0]) - reach, max(one[0], other[0]) + reach, 40_001)
    excess = stats.norm.pdf(grid, *one) - math.exp(epsilon) * stats.norm.pdf(grid, *other)
    return integrate.simpson(np.maximum(excess, 0.0), x=grid)


def gaussian_run(bends, pulls, learned, steps, lr, sigma):
    """Mean and sd of w after T steps on bends[0] w^2 / 2 + pulls[0] w, then K steps on bends[1] and pulls[1]."""
    mean, variance = 0.0, 0.0
    for t in range(learned + steps):
        bend, pull = bends[t >= learned], pulls[t >= learned]
        mean, variance = (1 - lr * bend) * mean - lr * pull, (1 - lr * bend) ** 2 * variance + 2 * lr * sigma**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(("learned", "steps"), [(1, 0), (10, 0), (10, 2), (60, 5)])
def test_delta_is_attained_by_a_quadratic(learned, steps):
    """Losses S M / n of gradient apart, of one curvature: the bound is exact, so any smaller one would be wrong."""
    pull = 5 * 1.2 / 100
    released = gaussian_run((0.3, 0.3), (pull, 0.0), learned, steps, 0.4, 0.05)
    anew = gaussian_run((0.3, 0.3), (0.0, 0.0), learned, steps, 0.4, 0.05)
    mu = bounds.langevin_mu(steps, **RUN | {"learning_steps": learned})
    for epsilon in (0.0, 0.3, 1.0):
        exact, bound = exact_delta(epsilon, released, anew), bounds.gdp_delta(mu, epsilon)
        assert exact == pytest.approx(bound, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("relation", "radius"), [("removal", math.inf), ("replacement", math.inf), ("removal", 0.1)])
def test_delta_is_never_exceeded_by_logistic_regression(relation, radius):
    """One feature: the laws of every iterate on a grid, by the kernel of a step, with no sampling and no bound."""
    n, lr, m, sigma = 20, 1.0, 0.3, 0.02
    run = {"n": n, "forget": 2, "gradient_bound": 1.0, "convexity": m, "smoothness": 0.25 + m, "lr": lr, "sigma": sigma}
    sd, grid = math.sqrt(2 * lr) * sigma, np.linspace(-0.8, 0.8, 1601)
    kept = np.linspace(-1.0, 0.2, n - 2)  # of one class, so that the loss pulls; the first two pull the other way
    other = {"removal": np.zeros(2), "replacement": -np.ones(2)}[relation]

    def kernel(rows):
        slope = m * grid - (rows[:, None] / (1 + np.exp(rows[:, None] * grid))).sum(axis=0) / n
        return stats.norm.pdf(grid[:, None], grid - lr * slope, sd) * (grid[1] - grid[0])  # [to, from]

    def project(law):
        if radius < 1:  # the mass outside comes to stand on the rim
            inside = np.abs(grid) < radius - 1e-9
            law, rim = np.where(inside, law, 0.0), (law[grid <= -radius + 1e-9].sum(), law[grid >= radius - 1e-9].sum())
            law[np.argmin(abs(grid + radius))], law[np.argmin(abs(grid - radius))] = rim
        return law

    with_them, without = kernel(np.append(np.ones(2), kept)), kernel(np.append(other, kept))
    worst = 0.0
    for learned, steps in ((1, 0), (12, 0), (12, 1), (12, 4)):
        laws = []
        for first in (with_them, without):
            law = (np.arange(len(grid)) == len(grid) // 2) * 1.0
            for t in range(learned + steps):
                law = project((first if t < learned else without) @ law)
            assert law.sum() == pytest.approx(1.0, abs=1e-6)
            laws.append(law)
        mu = bounds.langevin_mu(steps, **run, learning_steps=learned, relation=relation, radius=radius)
        for epsilon in (0.0, 0.5, 1.0):
            exact = max(np.maximum(a - math.exp(epsilon) * b, 0.0).sum() for a, b in (laws, laws[::-1]))
            bound = bounds.gdp_delta(mu, epsilon)
            assert exact <= bound + 1e-6
            worst = max(worst, exact / bound)
    assert worst > (0.3 if math.isinf(radius) else 0.1)  # and it is no wild overestimate


def test_account_grows_and_falls_as_it_must():
    mus = [bounds.langevin_mu(steps, **LONG) for steps in range(20)]
    assert (np.diff(mus) < 0).all()
    assert bounds.langevin_mu(3, **LONG, relation="replacement") == pytest.approx(2 * mus[3])
    assert bounds.langevin_mu(3, **LONG | {"forget": 10}) == pytest.approx(2 * mus[3])
    endless = bounds.langevin_mu(3, **LONG | {"learning_steps": math.inf})
    assert mus[3] <= endless == pytest.approx(mus[3], rel=1e-9)
    assert bounds.langevin_mu(3, **LONG | {"learning_steps": 0}) == 0.0
    assert bounds.langevin_mu(3, **LONG | {"forget": 0}) == 0.0


@pytest.mark.parametrize("radius", [1e-4, 0.02, 0.3])
def test_a_small_ball_caps_what_is_left(radius):
    """The least over windows of the noisy iteration that starts 2 R apart, or from one start."""
    sd, c, each = math.sqrt(2 * 0.4) * 0.05, 0.88, 0.4 * 5 * 1.2 / 100

    def window(j, apart):
        shift = np.where(np.arange(j + 4) < j, each, 0.0)
        return bounds.noisy_iteration_mu(apart, np.full(j + 4, c), shift, np.full(j + 4, sd))

    expected = min([window(200, 0.0), *(window(j, 2 * radius) for j in range(201))])
    got = bounds.langevin_mu(4, **LONG, radius=radius)
    assert expected * (1 - 1e-9) <= got <= 1.001 * expected
    assert (got < bounds.langevin_mu(4, **LONG)) == (radius < 0.1)


PUBLISHED = {"n": 11_982, "gradient_bound": 1.0, "convexity": 0.011982, "smoothness": 0.261982, "lr": 1 / 0.261982}
PUBLISHED |= {"sigma": 0.03, "learning_steps": math.inf, "relation": "replacement"}


@pytest.mark.parametrize(
    ("forget", "steps", "epsilon"), [(1, 0, 0.31), (100, 0, 57), (100, 100, 14.6), (100, 500, 3.4), (100, 1000, 1.8)]
)
def test_published_numbers(forget, steps, epsilon):
    run = PUBLISHED | {"forget": forget}
    renyi = bounds.langevin_epsilon(steps, 1 / 11_982, accountant="renyi", **run)
    assert renyi == pytest.approx(epsilon, rel=0.02)

    def at(log_above):  # the formula of the paper, minimised by another routine
        alpha = 1 + math.exp(log_above)
        decay = math.exp(-steps * 0.011982 / 0.261982 / alpha)
        return decay * 4 * alpha * forget**2 / (0.011982 * 0.03**2 * 11_982**2) + math.log(11_982) / (alpha - 1)

    found = min(optimize.minimize_scalar(at, bounds=(a, a + 2), method="bounded").fun for a in range(-8, 12, 2))
    assert renyi == pytest.approx(found, rel=1e-5)
    assert bounds.langevin_epsilon(steps, 1 / 11_982, **run) < renyi


@pytest.mark.parametrize("accountant", bounds.langevin.ACCOUNTANTS)
def test_the_least_number_of_steps(accountant):
    run, delta = PUBLISHED | {"forget": 10, "accountant": accountant}, 1 / 11_982
    steps = bounds.langevin_steps(1.0, delta, **run)
    assert bounds.langevin_epsilon(steps, delta, **run) <= 1.0 < bounds.langevin_epsilon(steps - 1, delta, **run)
    assert bounds.langevin_steps(100.0, delta, **run) == 0


# --- the method --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    x = langevin.clip_rows(jnp.asarray(random.normal(size=(N, F)), jnp.float32), 1.5)
    return Dataset(x, jnp.asarray(np.arange(N) % K, jnp.int32), jnp.arange(N))


@pytest.fixture(scope="module")
def forget():
    return np.arange(N) < S


scan = jax.jit(partial(loop.scan, batch=None), static_argnames=("method", "steps"))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "relation"), [("softmax", "removal"), ("ovr", "replacement")])
def test_steps_by_hand(examples, forget, loss, relation):
    method = langevin_head(**COMMON | {"sigma": 1e-9, "radius": 0.2}, loss=loss, relation=relation)
    poisoned = examples
    if relation == "removal":  # what is left out may hold anything
        poisoned = examples._replace(x=jnp.where(forget[:, None], jnp.nan, examples.x))
    begin = np.random.default_rng(1).normal(size=(F, K)).astype(np.float32) * 0.01
    state, info = scan(method, KEY, method.init(KEY, begin, poisoned, forget), poisoned, steps=25)
    w, x, y = begin.astype(np.float64), np.asarray(examples.x, np.float64), np.asarray(examples.y)
    kept = range(S, N) if relation == "removal" else range(N)
    losses = []
    for _ in range(25):
        slope, value = 0.1 * w, 0.0
        for i in kept:
            z, own = x[i] @ w, np.eye(K)[y[i]]
            p = np.exp(z) / np.exp(z).sum() if loss == "softmax" else 1 / (1 + np.exp(-z))
            value -= np.log(p @ own) if loss == "softmax" else np.log(np.where(own, p, 1 - p)).sum()
            slope = slope + np.outer(x[i], p - own) / N  # by the n of learning, whatever is left
        losses.append(value / len(kept))
        w = w - 0.5 * slope
        w = w * min(1.0, 0.2 / np.linalg.norm(w))
    np.testing.assert_allclose(state.params, w, atol=1e-6)
    np.testing.assert_allclose(info["loss"], losses, rtol=1e-5)
    assert np.linalg.norm(w) == pytest.approx(0.2)  # the ball was reached


@pytest.mark.parametrize("loss", langevin.LOSSES)
def test_constants_bound_what_they_say(loss):
    """Largest gradient of one example, and the ends of the Hessian's spectrum, over many heads and rows 1 long."""
    constants, random = langevin.smooth(classes=K, loss=loss, weight_decay=0.1), np.random.default_rng(0)
    rows = random.normal(size=(60, 2))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    heads = random.normal(size=(60, 2 * K)) * np.repeat([0.0, 0.3, 30.0], 20)[:, None]

    def of_one(flat, row):
        one = Dataset(row[None], jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
        return langevin._mean_loss(loss, flat.reshape(2, K), one, jnp.ones(1, bool), 1)

    def value(flat, row):
        return of_one(flat, row)[0]

    measured = jax.jit(jax.vmap(lambda w, x: (of_one(w, x)[1].ravel(), jax.grad(value)(w, x), jax.hessian(value)(w, x))))
    gradients, slopes, hessians = measured(jnp.asarray(heads, jnp.float32), jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(gradients, slopes, atol=1e-5)
    steepest = np.linalg.norm(gradients, axis=1).max()
    bends = np.linalg.eigvalsh(np.asarray(hessians, np.float64)) + 0.1
    assert steepest <= constants["gradient_bound"] * (1 + 1e-6)
    assert steepest > (0.97 if loss == "softmax" else 0.8) * constants["gradient_bound"]
    assert bends.min() >= 0.1 - 1e-5
    assert bends.max() <= constants["smoothness"] + 1e-5
    assert bends.max() > 0.7 * constants["smoothness"]


@pytest.mark.slow
def test_noise_has_its_law(examples):
    """One step of many keys less the step without noise: N(0, 2 lr sigma^2), anew in every step and for every set."""
    noisy, still = langevin_head(**COMMON), langevin_head(**COMMON | {"sigma": 1e-9})
    step = jax.jit(lambda key, state: noisy.step(key, state, examples)[0].params)
    state = noisy.init(KEY, None, examples)
    quiet = jax.jit(still.step)(KEY, state, examples)[0].params
    many = jax.jit(jax.vmap(step, (0, None)))(jax.random.split(KEY, 500), state)
    drawn = np.asarray(many - quiet, np.float64).ravel()  # 6000
    sd = math.sqrt(2 * 0.5) * 0.02
    assert stats.kstest(drawn / sd, "norm").pvalue > 1e-3
    square = np.square(drawn / sd).sum()
    assert 1e-3 < stats.chi2.cdf(square, drawn.size) < 1 - 1e-3
    for wrong in (0.93, 1.07):  # of the scale
        assert not 1e-3 < stats.chi2.cdf(square / wrong**2, drawn.size) < 1 - 1e-3
    first, again = (step(KEY, state._replace(forget=jnp.arange(N) < gone)) for gone in (1, 2))
    assert np.abs(first - again).max() > sd / 2  # not the noise of learning once more


@pytest.mark.slow
def test_stationary_spread_of_a_long_run(examples):
    """Rows of zeros leave the quadratic weight_decay / 2 |w|^2: the sd of w settles where the recursion says."""
    zeros = examples._replace(x=jnp.zeros_like(examples.x))
    method = langevin_head(**COMMON)
    one = jax.jit(jax.vmap(lambda key: loop.scan(method, key, method.init(key, None, zeros), zeros, steps=80)[0].params))
    drawn = np.asarray(one(jax.random.split(KEY, 400)), np.float64).ravel()
    sd = 0.02 * math.sqrt((1 - 0.95**160) / (1 - 0.95**2))
    square = np.square(drawn / sd).sum()
    assert 1e-3 < stats.chi2.cdf(square, drawn.size) < 1 - 1e-3
    assert not 1e-3 < stats.chi2.cdf(square / 1.06**2, drawn.size) < 1 - 1e-3


@pytest.mark.slow
def test_forgetting_goes_from_the_learned_head_to_the_retrained(examples, forget):
    labels = jnp.where(jnp.asarray(forget), 0, examples.y)  # the forgotten are all of one class, on one side
    x = jnp.where(forget[:, None], jnp.asarray([1.0, 0, 0, 0]), examples.x)
    marked = examples._replace(x=x, y=labels.astype(jnp.int32))
    method = langevin_head(**COMMON | {"sigma": 1e-4, "learning_steps": 200})
    learned, _ = scan(method, KEY, method.init(KEY, None, marked), marked, steps=200)
    forgot, _ = scan(method, KEY, method.init(KEY, learned.params, marked, forget), marked, steps=60)
    anew, _ = scan(method, jax.random.key(5), method.init(KEY, None, marked, forget), marked, steps=260)
    far, near = (np.linalg.norm(state.params - anew.params) for state in (learned, forgot))
    assert near < 0.1 * far


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(examples, forget, tmp_path):
    method = langevin_head(**COMMON, radius=1.0)
    begin = method.init(KEY, None, examples, forget)
    whole, _ = scan(method, KEY, begin, examples, steps=8)
    chunks = {"every": 4, "after": lambda *_: None}
    half = loop.run(method, KEY, begin, examples, steps=4, **chunks)
    checkpoint.save(tmp_path, 4, half)
    like = jax.eval_shape(partial(method.init, KEY, None), examples, jnp.asarray(forget))
    restored = checkpoint.restore(tmp_path, 4, like).state
    rest = loop.run(method, KEY, restored, examples, steps=8, start=4, **chunks)
    jax.tree.map(np.testing.assert_array_equal, rest, whole)
    assert int(whole.step) == 8


def test_guarantee(examples):
    got = langevin_head(**COMMON, delta=1e-3).guarantee(5)
    constants = langevin.smooth(classes=K, loss="softmax", weight_decay=0.1)
    mu = bounds.langevin_mu(5, n=N, forget=S, learning_steps=20, lr=0.5, sigma=0.02, **constants)
    assert (got.mu, got.delta, got.comparator) == (mu, 1e-3, "retraining")
    assert bounds.gdp_delta(got.mu, got.epsilon) == pytest.approx(1e-3, rel=1e-3)
    assert got.epsilon < langevin_head(**COMMON, delta=1e-3, relation="replacement").guarantee(5).epsilon
    renyi = langevin_head(**COMMON | {"learning_steps": math.inf}, accountant="renyi").guarantee(5)
    assert renyi.mu is None
    assert "stationary" in renyi.assumptions[-1]


def test_clip_rows():
    x = np.random.default_rng(0).normal(size=(50, F)).astype(np.float32)
    x[0] = 0
    got, lengths = np.asarray(langevin.clip_rows(x, 2.0), np.float64), np.linalg.norm(x, axis=1)
    assert np.linalg.norm(got, axis=1).max() <= 1.0
    np.testing.assert_allclose(got, x / np.maximum(lengths, 2.0)[:, None], rtol=1e-5)
    assert (lengths > 2).any()
    assert (lengths < 2).any()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"lr": 5.0}, "expand"),
        ({"sigma": 0.0}, "sigma"),
        ({"forget": N + 1}, "forget"),
        ({"learning_steps": 1.5}, "learning_steps"),
        ({"radius": 0.0}, "radius"),
        ({"loss": "hinge"}, "loss"),
        ({"relation": "other"}, "relation"),
        ({"accountant": "rdp"}, "accountant"),
        ({"accountant": "renyi"}, "stationarity"),
        ({"accountant": "renyi", "learning_steps": math.inf, "lr": 2.5}, "1 / smoothness"),
        ({"classes": 1}, "classes"),
    ],
)
def test_bad_hyperparameters(arguments, match):
    with pytest.raises(BadInput, match=match):
        langevin_head(**COMMON | arguments)


def test_bad_data(examples, forget):
    method = langevin_head(**COMMON)
    for data_, mask, match in (
        (examples._replace(x=1.01 * examples.x / jnp.linalg.norm(examples.x, axis=1, keepdims=True)), None, "clip_rows"),
        (examples._replace(x=examples.x.at[9, 1].set(jnp.nan)), forget, "row .9."),
        (examples._replace(y=examples.y + 1), None, "labels must lie"),
        (data.take(examples, jnp.arange(10)), None, "n = 60"),
        (examples, np.arange(N) < S + 1, "the guarantee is for 6"),
        (examples, np.arange(N), "boolean"),
    ):
        with pytest.raises(BadInput, match=match):
            method.init(KEY, None, data_, mask)
    with pytest.raises(BadInput, match="every example would be removed"):
        langevin_head(**COMMON | {"forget": N}).init(KEY, None, examples, np.ones(N, bool))
    with pytest.raises(BadInput, match="weights must be"):
        method.init(KEY, np.zeros((F, K + 1), np.float32), examples)
    with pytest.raises(BadInput, match="steps must be"):
        method.guarantee(-1)
    with pytest.raises(BadInput, match="epsilon"):
        bounds.langevin_steps(0.0, 1e-5, **LONG)
    with pytest.raises(BadInput, match="longest"):
        langevin.clip_rows(examples.x, 0.0)
