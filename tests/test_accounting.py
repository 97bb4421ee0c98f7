"""Noise accounting against dp_accounting, brute force and densities propagated on a grid."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from dememo_jax import bounds, unlearn
from dememo_jax.errors import BadInput

DELTA = 1e-5


def integrated(mu, epsilon):
    """E_{e^epsilon} of N(mu, 1) and N(0, 1): an integral over where p exceeds e^epsilon q, in which nothing cancels."""
    edge = epsilon / mu - mu / 2  # of that set, seen from the mean of p

    def tail(u):
        return math.exp(-edge * u - u * u / 2 - min(0.0, edge) ** 2 / 2) * -math.expm1(-mu * u)

    middle = max(0.0, -edge)
    cuts = [0.0, middle / 2, middle, middle + 1 / max(1.0, edge), middle + 6 / max(1.0, edge), middle + 40 / max(1.0, edge)]
    total = sum(integrate.quad(tail, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in itertools.pairwise(cuts) if b > a)
    return total * math.exp(-(max(0.0, edge) ** 2) / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("mu", [1e-3, 0.05, 0.268, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.03, 1.0, 8.0, 60.0, 900.0])
def test_delta_is_the_integral(mu, epsilon):
    assert bounds.gdp_delta(mu, epsilon) == pytest.approx(integrated(mu, epsilon), rel=1e-7, abs=1e-300)


@pytest.mark.parametrize(
    ("mu", "epsilon", "expected"),  # in eighty digits
    [(0.27, 1, 1.1269803625e-5), (0.05, 1, 1.1290332271e-91), (1, 30, 4.7093263181e-193), (100, 5100, 0.156259738969)],
)
def test_delta_at_the_edges(mu, epsilon, expected):
    assert bounds.gdp_delta(mu, epsilon) == pytest.approx(expected, rel=1e-8, abs=0)
    assert bounds.gdp_delta(mu, 1e6) == 0.0  # no overflow
    assert bounds.gdp_delta(0.0, epsilon) == 0.0
    assert bounds.gdp_delta(1e9, 1.0) == 1.0


@pytest.mark.parametrize(("epsilon", "mu"), [(0.5, 0.1422), (1, 0.2681), (2, 0.5016), (4, 0.9249), (8, 1.666)])
def test_mu_by_hand_and_by_dp_accounting(epsilon, mu):
    import dp_accounting

    found = bounds.gdp_mu(epsilon, DELTA)
    assert found == pytest.approx(mu, rel=4e-4)
    assert found == pytest.approx(1 / dp_accounting.get_sigma_gaussian(epsilon, DELTA), rel=1e-6)
    assert integrated(found, epsilon) == pytest.approx(DELTA, rel=1e-6)
    assert bounds.gdp_epsilon(found, DELTA) == pytest.approx(epsilon, rel=1e-6)
    assert bounds.gdp_epsilon(found, DELTA) == pytest.approx(dp_accounting.get_epsilon_gaussian(1 / found, DELTA), rel=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(1e-3, 1e-5), (0.1, 1e-12), (40, 1e-5), (500, 0.3), (1, 0.9)])
def test_mu_and_epsilon_are_inverse(epsilon, delta):
    mu = bounds.gdp_mu(epsilon, delta)
    assert integrated(mu, epsilon) == pytest.approx(delta, rel=1e-5)
    assert bounds.gdp_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-5)
    assert bounds.gdp_epsilon(0.0, delta) == 0.0


def test_privacy_loss_distributions_agree():
    import dp_accounting
    from dp_accounting import pld

    one = pld.privacy_loss_distribution.from_gaussian_mechanism(1 / 0.25, value_discretization_interval=1e-3)
    four = one.self_compose(4)
    mu = bounds.compose_gdp([0.25] * 4)
    assert mu == 0.5
    for epsilon in (0.5, 1.0, 2.0):
        assert bounds.gdp_delta(0.25, epsilon) == pytest.approx(one.get_delta_for_epsilon(epsilon), rel=0.01)
        assert bounds.gdp_delta(mu, epsilon) == pytest.approx(four.get_delta_for_epsilon(epsilon), rel=0.02)
    sigma = dp_accounting.calibrate_dp_mechanism(
        lambda: pld.PLDAccountant(value_discretization_interval=1e-2),
        dp_accounting.GaussianDpEvent,
        2.0,
        DELTA,
        dp_accounting.ExplicitBracketInterval(1.0, 5.0),
        tol=1e-4,
    )
    assert 1 / bounds.gdp_mu(2.0, DELTA) == pytest.approx(sigma, rel=1e-3)


def test_composition_adds_squares():
    assert bounds.compose_gdp((0.3, 0.0, 0.4)) == pytest.approx(0.5)
    for bad in ([], [0.1, -0.2], [0.1, math.nan]):
        with pytest.raises(BadInput, match="mu"):
            bounds.compose_gdp(bad)


# --- noisy iterations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
@pytest.mark.parametrize(("start", "shift", "sigma"), [(2.0, 0.3, 0.7), (0.0, 0.1, 2.0), (1.0, 0.0, 0.1)])
def test_constant_rates_have_closed_forms(steps, start, shift, sigma):
    def mu(c):
        return bounds.noisy_iteration_mu(start, np.full(steps, c), np.full(steps, shift), np.full(steps, sigma))

    assert mu(1.0) == pytest.approx((start + shift * steps) / (sigma * math.sqrt(steps)), rel=1e-9)
    for c in (0.97, 0.4):
        z = c**steps * start + shift * (1 - c**steps) / (1 - c)
        assert mu(c) == pytest.approx(z * math.sqrt((1 - c * c) / (1 - c ** (2 * steps))) / sigma, rel=1e-9)
    assert mu(0.0) == pytest.approx(shift / sigma)  # the last step alone is left
    assert mu(0.999999) == pytest.approx(mu(1.0), rel=1e-3)


def brute_force(start, c, shift, sigma):
    """The least sqrt(sum (a_t / sigma_t)^2) that brings the distance z_t = c_t z_{t-1} + s_t - a_t >= 0 to nothing."""
    steps = len(c)

    def distances(a):
        z, found = start, []
        for t in range(steps):
            z = c[t] * z + shift[t] - a[t]
            found.append(z)
        return np.array(found)

    slope = np.array([distances(row) - distances(np.zeros(steps)) for row in np.eye(steps)]).T
    limits = [
        {"type": "ineq", "fun": lambda a: distances(a)[:-1], "jac": lambda a: slope[:-1]},
        {"type": "eq", "fun": lambda a: distances(a)[-1], "jac": lambda a: slope[-1]},
    ]
    begin, z = np.zeros(steps), start
    for t in range(steps):  # feasible: every step hides all that it can
        begin[t], z = c[t] * z + shift[t], 0.0
    found = optimize.minimize(
        lambda a: ((a / sigma) ** 2).sum(),
        begin,
        jac=lambda a: 2 * a / sigma**2,
        constraints=limits if steps > 1 else limits[1:],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-13},
    )
    assert found.success
    assert distances(found.x).min() > -1e-6
    return math.sqrt(found.fun)


def naive(start, c, shift, sigma):
    """The same without the condition that distances stay positive: what a schedule can break."""
    later = np.array([np.prod(c[t + 1 :]) for t in range(len(c))])
    return (np.prod(c) * start + (later * shift).sum()) / math.sqrt(((later * sigma) ** 2).sum())


def test_schedules_equal_a_constrained_program():
    rng, binds = np.random.default_rng(0), 0
    for trial in range(24):
        steps = int(rng.integers(1, 7))
        start, shift = rng.choice([0.0, 0.5, 3.0]), rng.uniform(0, 1, steps)
        c, sigma = rng.uniform(0.4, 1, steps), rng.uniform(0.3, 2, steps)
        if trial % 2:  # little to hide at first, and most of the noise there
            order = np.argsort(shift)
            shift, sigma = shift[order] * np.linspace(0.1, 1, steps), np.sort(sigma)[::-1]
        found = bounds.noisy_iteration_mu(start, c, shift, sigma)
        assert found == pytest.approx(brute_force(start, c, shift, sigma), rel=2e-4), (start, c, shift, sigma)
        assert found >= naive(start, c, shift, sigma) * (1 - 1e-12)
        binds += found > 1.02 * naive(start, c, shift, sigma)
    assert binds >= 6


def test_single_steps_and_silent_ones():
    mu = bounds.noisy_iteration_mu
    assert mu(2.0, [0.5], [0.3], [0.1]) == pytest.approx(13.0)
    assert mu(0.0, [1, 1], [0, 0], [1, 1]) == 0.0
    assert mu(0.0, [1, 1], [0, 0], [0, 0]) == 0.0  # nothing to hide
    assert mu(1.0, [0], [0], [1]) == 0.0
    assert mu(3.0, [1, 1, 1], [0, 1, 0], [0, 0, 2]) == pytest.approx(2.0)  # silent at first: all is left to the last
    assert mu(3.0, [1, 1, 1], [0, 0, 0], [2, 0, 0]) == pytest.approx(1.5)  # silent afterwards, with nothing new
    assert mu(1.0, [1, 0, 1], [9, 9, 1], [1, 1, 1]) == pytest.approx(math.sqrt(50))  # what stood before 0 is gone
    assert mu(1.0, [1, 1, 1], [0, 0, 1], [1, 0, 1]) == pytest.approx(math.sqrt(2))
    for c, shift, sigma in (([1], [0], [0]), ([1, 1], [0, 1], [1, 0]), ([1, 0.5], [0, 1e-9], [1, 0])):
        assert mu(1.0, c, shift, sigma) == math.inf
    assert mu(5.0, [1, 0], [0, 0], [1, 0]) == 0.0  # contracted to a point


def test_more_of_anything_costs_more_and_noise_less():
    rng = np.random.default_rng(1)
    for _ in range(20):
        start, steps = rng.uniform(0, 2), 6
        c, shift, sigma = rng.uniform(0, 0.9, steps), rng.uniform(0, 1, steps), rng.uniform(0.1, 2, steps)
        base = bounds.noisy_iteration_mu(start, c, shift, sigma) * (1 + 1e-12)
        assert bounds.noisy_iteration_mu(start + 0.1, c, shift, sigma) * (1 + 1e-12) >= base
        assert bounds.noisy_iteration_mu(start, c, shift, 2 * sigma) == pytest.approx(base / 2)
        for t in range(steps):
            bump = 0.1 * (np.arange(steps) == t)
            assert bounds.noisy_iteration_mu(start, c + bump, shift, sigma) * (1 + 2e-12) >= base
            assert bounds.noisy_iteration_mu(start, c, shift + bump, sigma) * (1 + 2e-12) >= base
            assert bounds.noisy_iteration_mu(start, c, shift, sigma + bump) <= base


@pytest.mark.parametrize(
    ("start", "c", "shift", "sigma"),
    [
        (-1.0, [1], [0], [1]),
        (1.0, [1.1], [0], [1]),
        (1.0, [-0.1], [0], [1]),
        (1.0, [1], [-1], [1]),
        (1.0, [1], [0], [-1]),
        (1.0, [1], [math.nan], [1]),
        (math.nan, [1], [0], [1]),
        (1.0, [math.nan], [0], [1]),
        (1.0, [], [], []),
        (1.0, [1, 1], [0], [1]),
        (1.0, 1.0, 0.0, 1.0),
    ],
)
def test_iterations_out_of_range_are_refused(start, c, shift, sigma):
    with pytest.raises(BadInput):
        bounds.noisy_iteration_mu(start, c, shift, sigma)


def test_noise_that_falls_with_the_rate():
    # Rates and noise that halve every step: each step's difference is hidden by noise of its own size.
    halves = 0.5 ** np.arange(20)
    assert bounds.noisy_iteration_mu(1.0, np.ones(20), halves, halves) == pytest.approx(
        brute_force(1.0, np.ones(20), halves, halves), rel=1e-3
    )


def test_noise_that_falls_far_with_the_rate():
    # The same a little longer. A first step of 2 and then one of its own noise a step: 4 + 39.
    halves = 0.5 ** np.arange(40)
    assert bounds.noisy_iteration_mu(1.0, np.ones(40), halves, halves) == pytest.approx(math.sqrt(43), rel=1e-9)
    assert bounds.noisy_iteration_mu(1.0, [1, 1], [0, 1e-17], [1, 1e-20]) == pytest.approx(math.sqrt(1 + 1e6))


# --- densities on a grid -----------------------------------------------------------------------------------------

GRID = np.arange(-512, 512) / 64 + 1 / 128  # midpoints of cells; zero and the eighths are edges
CELL = GRID[1] - GRID[0]
EPSILONS = np.array([0.0, 0.3, 1.0, 2.0, 4.0])


def propagated(maps, start, sigma):
    """The density of x after steps x <- map_t(x) + N(0, sigma_t^2) from a point."""
    density = None
    for psi, noise in zip(maps, sigma, strict=True):
        if density is None:
            density = stats.norm.pdf(GRID, psi(np.array(start)), noise)
        else:
            away = (GRID[:, None] - psi(GRID)[None, :]) / noise
            density = np.exp(-away * away / 2) @ density * (CELL / noise / math.sqrt(2 * math.pi))
    assert density.sum() * CELL == pytest.approx(1.0, abs=1e-6)  # all on the grid
    return density


def hockey_sticks(p, q):
    """E_{e^epsilon} in the worse direction at EPSILONS."""
    scale = np.exp(EPSILONS)[:, None]
    return np.maximum(np.maximum(p - scale * q, 0).sum(axis=1), np.maximum(q - scale * p, 0).sum(axis=1)) * CELL


def promised(mu):
    return np.array([bounds.gdp_delta(mu, epsilon) for epsilon in EPSILONS])


FIELDS = {  # gradients that are not smooth, or steep: they push the two runs apart
    "outward": lambda x: -9.0 * np.sign(x),
    "saw": lambda x: 9.0 * np.sign(np.floor(x * 4) % 2 - 0.5),
    "steep": lambda x: -60.0 * x,
    "late": lambda x: np.where(np.abs(x) > 0.5, -9.0 * np.sign(x), 0.0),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("decay", "comparator"), [(0.0, "same_procedure"), (0.5, "same_procedure"), (0.5, "from_centre")])
def test_no_run_exceeds_the_bound(field, decay, comparator):
    lr, clip_grad, clip_init, sigma = 0.4, 0.5, 0.5, 0.6

    def psi(x):
        return x - lr * (np.clip(FIELDS[field](x), -clip_grad, clip_grad) + decay * x)

    apart, each = unlearn.COMPARATORS[comparator]
    other = -clip_init if comparator == "same_procedure" else 0.0
    for steps in (1, 2, 4):
        mu = bounds.noisy_iteration_mu(
            apart * clip_init, [1 - lr * decay] * steps, [each * lr * clip_grad] * steps, [sigma] * steps
        )
        one, two = (propagated([psi] * steps, start, [sigma] * steps) for start in (clip_init, other))
        found, bound = hockey_sticks(one, two), promised(mu)
        assert (found <= bound + 1e-4).all(), (steps, found, bound)
        if steps == 1 and field == "outward" and comparator == "same_procedure":
            np.testing.assert_allclose(found, bound, atol=1e-4)  # attained
        assert found[0] > 0.05  # a run worth the test


def test_the_random_walk_that_sees_no_data():
    lr, clip_grad, clip_init, sigma, steps, decay = 0.4, 0.5, 0.5, 0.6, 4, 0.5
    runs = [lambda x: x - lr * (clip_grad * np.sign(-x) + decay * x), lambda x: x - lr * decay * x]
    one, two = (propagated([psi] * steps, x, [sigma] * steps) for psi, x in zip(runs, (clip_init, 0.0)))
    mu = bounds.noisy_iteration_mu(clip_init, [1 - lr * decay] * steps, [lr * clip_grad] * steps, [sigma] * steps)
    assert (hockey_sticks(one, two) <= promised(mu) + 1e-4).all()
    constant = [lambda x: x + lr * clip_grad - lr * decay * x, runs[1]]
    one, two = (propagated([psi] * steps, x, [sigma] * steps) for psi, x in zip(constant, (clip_init, 0.0)))
    np.testing.assert_allclose(hockey_sticks(one, two), promised(mu), atol=1e-4)  # attained: the same push everywhere


@pytest.mark.parametrize("c", [1.0, 0.8])
def test_equality_without_gradients_and_with_constant_ones(c):
    steps, sigma = 4, [0.4, 0.8, 0.6, 0.5]
    for push in (0.0, 0.2):
        maps = [[lambda x, push=push * sign: c * x + push] * steps for sign in (1, -1)]
        one, two = (propagated(psi, start, sigma) for psi, start in zip(maps, (0.5, -0.5)))
        mu = bounds.noisy_iteration_mu(1.0, [c] * steps, [2 * push] * steps, sigma)
        np.testing.assert_allclose(hockey_sticks(one, two), promised(mu), atol=1e-4)


def test_early_noise_does_not_hide_what_comes_later():
    # Both runs stay together, then are collapsed to two points: |psi(x) - psi'(x')| = 0.8 whatever x and x' are.
    sigma, shift = [1.0, 0.5], [0.0, 0.8]
    one, two = (propagated([lambda x: x, lambda x, p=p: 0 * x + p], 0.0, sigma) for p in (0.4, -0.4))
    found = hockey_sticks(one, two)
    np.testing.assert_allclose(found, promised(bounds.noisy_iteration_mu(0.0, [1, 1], shift, sigma)), atol=1e-4)
    assert (found > promised(naive(0.0, np.ones(2), np.array(shift), np.array(sigma))) + 0.01)[:3].all()


# --- model clipping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "steps"), [(0.35, 385), (0.4, 137), (0.5, 40), (0.75, 10), (1, 6), (2, 3)])
def test_steps_of_model_clipping(radius, steps):
    delta = [bounds.model_clipping_delta(1.0, steps=t, diameter=2.0, sigma=radius) for t in (steps, steps - 1)]
    assert delta[0] <= DELTA < delta[1]


def test_model_clipping_recursion_by_hand():
    epsilon, sigma, delta = 0.7, 0.9, integrated(0.6 / 0.4, 0.7)
    for steps in range(5):
        found = bounds.model_clipping_delta(epsilon, steps=steps, diameter=2.0, sigma=sigma, start=0.6, sigma_init=0.4)
        assert found == pytest.approx(delta, rel=1e-7)
        delta *= integrated(2.0 / sigma, math.log(1 + math.expm1(epsilon) / delta))
    assert bounds.model_clipping_delta(1.0, steps=0, diameter=1.0, sigma=1.0) == 1.0
    assert bounds.model_clipping_delta(0.0, steps=2, diameter=1.0, sigma=1.0) == pytest.approx(integrated(1.0, 0.0) ** 2)
    assert bounds.model_clipping_delta(300.0, steps=2, diameter=1.0, sigma=1.0) == 0.0  # no overflow


def clipped(field, ceiling):
    return lambda x: np.clip(x - 3 * FIELDS[field](x), -ceiling, ceiling)


@pytest.mark.parametrize("field", FIELDS)
def test_no_clipped_run_exceeds_the_recursion(field):
    ceiling, sigma = 1.0, 0.8
    for steps in (1, 2, 4):
        one, two = (propagated([clipped(field, ceiling)] * steps, start, [sigma] * steps) for start in (0.7, -0.7))
        found = hockey_sticks(one, two)
        bound = [bounds.model_clipping_delta(e, steps=steps, diameter=2 * ceiling, sigma=sigma) for e in EPSILONS]
        assert (found <= np.array(bound) + 1e-4).all(), (steps, found, bound)
        if steps == 1 and field == "outward":
            np.testing.assert_allclose(found, bound, atol=1e-4)


def test_a_clipped_run_and_a_walk_that_sees_no_data():
    # A gradient that always points one way holds the run at the rim for ever; no walk around the centre goes there.
    ceiling, sigma, steps = 1.0, 1.0, 6
    method = unlearn.noisy_model_clipping
    run = propagated([lambda x: 0 * x + ceiling] * steps, 0.5, [sigma] * steps)
    walk = propagated([lambda x: np.clip(x, -ceiling, ceiling)] * steps, 0.0, [sigma] * steps)
    still = propagated([lambda x: 0 * x] * steps, 0.0, [sigma] * steps)
    for i in (0, 2):
        how = {"lr": 0.1, "clip_init": 0.5, "clip_model": ceiling, "sigma": sigma}
        try:
            asked = method(None, epsilon=float(EPSILONS[i]) or 1e-9, comparator="data_independent", **how)
            delta = asked.guarantee(steps).delta
        except BadInput:
            return
        assert delta >= min(hockey_sticks(run, other)[i] for other in (walk, still)) - 1e-4


@pytest.mark.parametrize("comparator", ["same_procedure", "from_centre"])
@pytest.mark.parametrize(("epsilon", "delta", "steps"), [(1.0, 1e-5, 1), (1.0, 1e-5, 40), (4.0, 1e-3, 6), (0.2, 1e-6, 5)])
def test_model_clipping_is_calibrated(epsilon, delta, steps, comparator):
    sigma = unlearn.calibrate_model_clipping(epsilon, delta, steps=steps, clip_model=1.5, comparator=comparator)
    least, less = (
        bounds.model_clipping_delta(epsilon, steps=steps, diameter=3.0, sigma=s) for s in (sigma, sigma * (1 - 1e-5))
    )
    assert least <= delta < less
    method = unlearn.noisy_model_clipping(
        None, lr=0.1, clip_init=9.0, clip_model=1.5, sigma=sigma, epsilon=epsilon, comparator=comparator
    )
    promise = method.guarantee(steps)
    assert (promise.delta, promise.epsilon, promise.mu, promise.comparator) == (least, epsilon, None, comparator)
    if steps == 1:
        assert sigma == pytest.approx(3.0 / bounds.gdp_mu(epsilon, delta), rel=1e-5)


# --- calibration, and the published constant -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "factor"),
    [(0.1, "61.5"), (0.5, "14.06"), (1, "7.461"), (2, "3.99"), (4, "2.162"), (8, "1.200"), (10, "1.000"), (20, ".580")],
)
def test_noise_by_exact_accounting(epsilon, factor):
    half = 0.5001 * 10.0 ** -len(factor.partition(".")[2])
    for steps, lr, clip_init, clip_grad in ((1, 1.0, 1.0, 0.0), (100, 0.1, 2.0, 0.7)):
        sigma = unlearn.calibrate(epsilon, DELTA, steps=steps, lr=lr, clip_init=clip_init, clip_grad=clip_grad)
        found = sigma * math.sqrt(steps) / (clip_init + lr * clip_grad * steps)
        assert found == pytest.approx(float(factor), abs=half)


def test_the_published_constant_where_it_holds():
    how = {"steps": 25, "lr": 0.2, "clip_init": 1.0, "clip_grad": 0.5}
    ratio = {}
    for epsilon in (0.1, 0.5, 1, 2, 4, 8, 10, 10.97):
        published = bounds.published_sigma(epsilon, DELTA, **how)
        assert published == pytest.approx(3 * math.sqrt(math.log(1e5)) * 3.5 / (epsilon * 5))
        ratio[epsilon] = unlearn.calibrate(epsilon, DELTA, **how) / published
        assert ratio[epsilon] < 1
    assert [ratio[e] for e in (0.1, 0.5, 1, 2, 4, 8, 10)] == pytest.approx(
        [0.60, 0.69, 0.73, 0.78, 0.85, 0.94, 0.98], abs=0.006
    )
    assert ratio[10.97] == pytest.approx(1, abs=1e-3)
    assert bounds.published_sigma(8.89, 1e-3, **how) > unlearn.calibrate(8.89, 1e-3, **how)


@pytest.mark.parametrize(("epsilon", "delta"), [(10.99, 1e-5), (20.0, 1e-5), (30.0, 1e-5), (8.91, 1e-3), (34.0, 1e-5)])
def test_the_published_constant_is_refused_where_it_fails(epsilon, delta):
    with pytest.raises(BadInput, match="does not hold"):
        bounds.published_sigma(epsilon, delta, steps=4, lr=0.1, clip_init=1.0, clip_grad=1.0)


def test_one_step_at_the_published_noise_breaks_its_promise():
    clip_init, push, epsilon = 0.3, 0.2, 20.0
    sigma = 3 * math.sqrt(math.log(1e5)) * (clip_init + push) / epsilon
    one, two = (propagated([lambda x: x + push * np.sign(x)], start, [sigma]) for start in (clip_init, -clip_init))
    delivered = np.maximum(one - math.exp(epsilon) * two, 0).sum() * CELL
    assert delivered == pytest.approx(4.7e-4, rel=0.02)
    with pytest.raises(BadInput, match=r"0\.000469"):
        bounds.published_sigma(epsilon, DELTA, steps=1, lr=1.0, clip_init=clip_init, clip_grad=push)
    exact = unlearn.calibrate(epsilon, DELTA, steps=1, lr=1.0, clip_init=clip_init, clip_grad=push)
    one, two = (propagated([lambda x: x + push * np.sign(x)], start, [exact]) for start in (clip_init, -clip_init))
    assert np.maximum(one - math.exp(epsilon) * two, 0).sum() * CELL == pytest.approx(DELTA, rel=0.02)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1, 0), (1, 1), (1, -1)]
)
def test_promises_out_of_range_are_refused(epsilon, delta):
    how = {"steps": 2, "lr": 0.1, "clip_init": 1.0, "clip_grad": 1.0}
    for ask in (
        lambda: bounds.gdp_mu(epsilon, delta),
        lambda: bounds.published_sigma(epsilon, delta, **how),
        lambda: unlearn.calibrate(epsilon, delta, **how),
        lambda: unlearn.calibrate_model_clipping(epsilon, delta, steps=2, clip_model=1.0),
    ):
        with pytest.raises(BadInput, match="epsilon" if epsilon != 1 else "delta"):
            ask()


def test_the_bounds_refuse_what_they_cannot_use():
    for ask in (
        lambda: bounds.gdp_delta(-1.0, 1.0),
        lambda: bounds.gdp_delta(1.0, -1.0),
        lambda: bounds.gdp_delta(math.nan, 1.0),
        lambda: bounds.gdp_epsilon(math.inf, 1e-5),
        lambda: bounds.gdp_epsilon(1.0, 1.0),
        lambda: bounds.published_sigma(1, 1e-5, steps=0, lr=0.1, clip_init=1.0, clip_grad=1.0),
        lambda: bounds.published_sigma(1, 1e-5, steps=1, lr=0.0, clip_init=1.0, clip_grad=1.0),
        lambda: bounds.published_sigma(1, 1e-5, steps=1, lr=0.1, clip_init=-1.0, clip_grad=1.0),
        lambda: bounds.model_clipping_delta(1.0, steps=1, diameter=1.0, sigma=0.0),
        lambda: bounds.model_clipping_delta(1.0, steps=1, diameter=-1.0, sigma=1.0),
        lambda: bounds.model_clipping_delta(1.0, steps=-1, diameter=1.0, sigma=1.0),
    ):
        with pytest.raises(BadInput):
            ask()
