"""Random search, relearning and smoothed quantiles against loops, and against laws that can be worked out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dememo_jax import audit, certify, evaluate, keys, loop, losses, models, sources, train, tree
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Dataset, Model, Weights

KEY = jax.random.key(4)


@functools.cache
def linear():
    return models.from_apply(lambda key, x: {"w": None}, lambda p, x: x.reshape(len(x), -1) @ p["w"])


@pytest.fixture(scope="module")
def digits():
    train_set, test_set = sources.load("digits")
    return sets.take(train_set, np.arange(120)), sets.take(test_set, np.arange(100))


@pytest.fixture(scope="module")
def start():
    return Weights({"w": jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (64, 10)), jnp.float32)}, ())


def right(w, data):
    """How many a linear model gets right, in float64."""
    return int((np.argmax(np.float64(data.x).reshape(len(data.y), -1) @ w, axis=1) == np.asarray(data.y)).sum())


# --- random search -----------------------------------------------------------------------------------------------

HINTS = np.arange(120) % 4 == 1


def points(start, draws):
    w = np.float64(start.params["w"])
    for i in range(draws):
        way = np.float64(tree.gaussian_like(keys.at(keys.named(KEY, "random"), i), start.params)["w"])
        yield w + 1.5 * way / np.linalg.norm(way)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["map", "vmap"])
def test_random_search_is_the_loop_over_its_draws(digits, start, strategy):
    data, evaluation = digits
    found = audit.random_search(linear(), start, data, evaluation, KEY, radius=1.5, hints=HINTS, draws=40, strategy=strategy)
    hinted = sets.select(data, HINTS)
    scores = [(right(point, hinted), right(point, evaluation)) for point in points(start, 40)]
    on_hints, on_all = np.array(scores).T
    assert (found.radius, found.draws) == (1.5, 40)
    assert found.before == pytest.approx(right(np.float64(start.params["w"]), evaluation) / 100)
    assert found.chosen == on_all[on_hints.argmax()] / 100
    assert found.oracle == on_all.max() / 100
    assert found.chosen < found.oracle  # here; never the other way round
    assert len(set(on_all)) > 5


def told_by(question):
    """A model of two leaves that is right, on labels of 0, where its params answer the question with yes."""
    return models.from_apply(
        lambda key, x: None, lambda p, x: jnp.where(question(p), 1.0, -1.0) * jnp.array([1.0, 0.0]) + jnp.zeros((len(x), 1))
    )


PAIR = {"a": np.linspace(-1, 1, 30, dtype=np.float32), "b": np.ones((2, 3), np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("only", [None, "^a$"])
@pytest.mark.parametrize("yes", [True, False])
def test_all_points_lie_on_the_sphere(only, yes):
    def lies(p):
        off = jnp.abs(tree.distance(p, PAIR) / 0.7 - 1) < 1e-5
        stays = jnp.all(p["b"] == PAIR["b"])
        return off & (stays if only else ~stays) & jnp.any(p["a"] != PAIR["a"])

    question = lies if yes else lambda p: ~lies(p)
    data = Dataset(np.zeros((3, 1), np.float32), np.zeros(3, np.int32), np.arange(3))
    found = audit.random_search(told_by(question), Weights(PAIR, ()), data, data, KEY, radius=0.7, draws=30, only=only)
    assert (found.before, found.chosen, found.oracle) == ((0.0, 1.0, 1.0) if yes else (1.0, 0.0, 0.0))


def test_a_tie_on_the_hints_goes_to_the_first(digits, start):
    data, evaluation = digits
    alike = data._replace(x=jnp.zeros_like(data.x))  # every point is as good on these
    found = audit.random_search(linear(), start, alike, evaluation, KEY, radius=1.5, draws=38, strategy="map")
    first, *_, last = (right(point, evaluation) / 100 for point in points(start, 38))
    assert last != first == found.chosen < found.oracle


@pytest.mark.parametrize(
    "wrong",
    [{"radius": 0.0}, {"radius": float("inf")}, {"hints": np.zeros(120, bool)}, {"only": "tail"}, {"draws": 0}],
)
def test_random_search_refuses(digits, start, wrong):
    with pytest.raises(BadInput):
        audit.random_search(linear(), start, *digits, KEY, **{"radius": 1.0, "draws": 4, **wrong})


# --- relearning --------------------------------------------------------------------------------------------------

TX, STILL = optax.sgd(0.5, momentum=0.9), optax.sgd(0.0)


@pytest.fixture(scope="module")
def curve(digits, start):
    """Accuracies after 0, 4, 8 and 10 steps, by the documented keys; the last look is a short one."""
    data, evaluation = digits
    method, state, found = (
        train.sgd(linear(), TX, mode="frozen"),
        train.start(TX, start),
        [right(start.params["w"], evaluation)],
    )
    step = jax.jit(functools.partial(loop.scan, method, keys.named(KEY, "relearn"), data=data, steps=2, batch=16))
    for t in range(0, 10, 2):
        state, _ = step(state=state, start=t, mask=HINTS)
        found.append(right(np.float64(state.weights.params["w"]), evaluation))
    return [found[at // 2] / 100 for at in (0, 4, 8, 10)]


def relearned(digits, start, goal, **how):
    how = {"hints": HINTS, "most": 10, "every": 4, "batch": 16, "tx": TX} | how
    return audit.relearn(linear(), start, *digits, KEY, goal=goal, **how)


@pytest.mark.slow
def test_a_goal_that_is_not_reached_leaves_the_whole_curve(digits, start, curve):
    told = []
    found = relearned(digits, start, 1.0, after=lambda done, accuracy: told.append((done, accuracy)))
    assert (found.goal, found.steps, found.hints) == (1.0, None, 30)
    assert found.looks == (0, 4, 8, 10)
    np.testing.assert_allclose(found.accuracy, curve, atol=0.011)  # one image on the edge may flip
    assert told == list(zip(found.looks, found.accuracy))[1:]
    assert curve[0] < curve[1] < max(curve[2:])


def test_the_first_look_at_which_the_goal_is_reached(digits, start, curve):
    for reached, goal in ((4, (curve[0] + curve[1]) / 2), (8, (curve[1] + curve[2]) / 2)):
        found = relearned(digits, start, goal)
        assert found.steps == reached
        assert found.looks == tuple(range(0, reached + 1, 4))
        assert len(found.accuracy) == len(found.looks)
        assert found.accuracy[-1] >= goal > found.accuracy[-2]


def test_an_accuracy_that_is_the_goal_is_enough(digits, start):
    goal = relearned(digits, start, 1.0).accuracy[1]
    assert relearned(digits, start, goal).looks == (0, 4)


def test_nothing_is_done_where_the_goal_is_reached(digits, start, curve):
    found = relearned(digits, start, curve[0] - 0.02, after=lambda *call: pytest.fail("took a step"))
    assert (found.steps, found.looks, len(found.accuracy)) == (0, (0,), 1)


@pytest.mark.parametrize("count", [10, 25])
def test_an_accuracy_that_is_the_goal_reaches_it(count):
    # Shares such as 7 of 10 are no float32 numbers: the mean of 0 and 1 in that type may lie below.
    identity = models.from_apply(lambda key, x: None, lambda p, x: x + 0 * p["w"])
    for hits in range(1, count):
        x = np.eye(2, dtype=np.float32)[np.where(np.arange(count) < hits, 0, 1)]
        data = Dataset(x, np.zeros(count, np.int32), np.arange(count))
        weights = Weights({"w": np.zeros(2, np.float32)}, ())
        found = audit.relearn(identity, weights, data, data, KEY, goal=hits / count, most=1, every=1, tx=STILL, batch=count)
        assert found.steps == 0, hits


@pytest.mark.parametrize(("how", "reached"), [({}, None), ({"statistics": "fit"}, 1)])
def test_statistics_are_frozen_unless_asked(how, reached):
    model = Model(
        init=lambda key, x: None,
        apply=lambda weights, x: x + weights.params["w"] + weights.stats * jnp.array([1.0, 0.0]),
        fit=lambda weights, x, key: (x + weights.params["w"], weights._replace(stats=weights.stats + 1)),
    )
    data = Dataset(np.tile(np.float32([0, 0.5]), (4, 1)), np.zeros(4, np.int32), np.arange(4))
    weights = Weights({"w": np.zeros(2, np.float32)}, np.float32(0))  # right once the statistics have moved
    found = audit.relearn(model, weights, data, data, KEY, goal=1.0, most=2, every=1, tx=STILL, batch=4, **how)
    assert found.steps == reached


def test_the_loss_is_the_one_that_is_asked_for(digits, start, curve):
    def other(logits, y):
        return losses.cross_entropy(logits, 9 - y)

    found = relearned(digits, start, 1.0, loss=other).accuracy
    assert found[0] == curve[0]
    assert max(found[1:]) < curve[0] < max(curve[1:])


def test_only_the_hints_are_learned_from(digits, start):
    data, evaluation = digits
    poisoned = data._replace(x=jnp.where(HINTS[:, None, None, None], data.x, jnp.nan))
    assert relearned((poisoned, evaluation), start, 1.0).accuracy == relearned(digits, start, 1.0).accuracy
    with pytest.raises(NonFinite):
        relearned((poisoned, evaluation), start, 1.0, hints=~HINTS[::-1])


@pytest.mark.parametrize(
    "wrong",
    [{"goal": 0.0}, {"goal": 1.1}, {"every": 0}, {"most": 3}, {"hints": np.zeros(120, bool)}, {"hints": np.ones(3, bool)}],
)
def test_relearn_refuses(digits, start, wrong):
    with pytest.raises(BadInput):
        relearned(digits, start, **{"goal": 1.0, **wrong})


# --- smoothed quantiles ------------------------------------------------------------------------------------------
# One weight t, images x in (0, 1) of class 1, and class 1 said where x > t: the accuracy falls with t, so its quantiles are
# those of a Gaussian, and moving t down is the worst that a move can do.

GRID = Dataset(((np.arange(200) + 0.5) / 200).astype(np.float32)[:, None], np.ones(200, np.int32), np.arange(200))
SIGMA, Q = 0.2, 0.9


@functools.cache
def threshold():
    return jax.tree_util.Partial(lambda p, x: jnp.concatenate([jnp.zeros_like(x), x - p["t"]], axis=1))


def smoothed(key, at=0.5, **how):
    how = {"sigma": SIGMA, "q": Q, "draws": 300, "strategy": "map", **how}
    return audit.smoothed(threshold(), {"t": jnp.float32(at)}, GRID, key, **how)


def accuracies(key, draws, at=0.5):
    noise = [float(tree.gaussian_like(keys.at(key, i), {"t": jnp.float32(0)})["t"]) for i in range(draws)]
    return np.array([(GRID.x[:, 0] > np.float32(at) + SIGMA * n).mean() for n in noise])


def test_the_limits_are_order_statistics():
    found, scores = smoothed(KEY), np.sort(accuracies(KEY, 300))
    ranks = np.arange(1, 301)  # of the k-th smallest: below the quantile with P[Bin >= k], above it with P[Bin < k]
    high = scores[(stats.binom.cdf(ranks - 1, 300, Q) >= 0.995).argmax()]
    low = scores[np.flatnonzero(stats.binom.sf(ranks - 1, 300, Q) >= 0.995)[-1]]
    np.testing.assert_allclose((found.low, found.high), (low, high), atol=1e-6)
    assert found.quantile == pytest.approx(scores[269])  # 270 of 300 lie at or below
    assert found.low < found.quantile < found.high < found.low + 0.2
    assert (found.sigma, found.draws, found.q, found.confidence) == (SIGMA, 300, Q, 0.99)
    assert (found.below, found.below_low, found.below_high) == (None, None, None)


def test_the_limits_cover_the_quantile():
    true = (GRID.x[:, 0] > 0.5 + SIGMA * stats.norm.ppf(1 - Q)).mean()
    found = [smoothed(keys.at(KEY, run)) for run in range(60)]
    assert sum(one.low <= true <= one.high for one in found) >= 57  # of 60 at 99 percent: fewer has probability 1e-4
    narrow = [smoothed(keys.at(KEY, run), alpha=0.5) for run in range(60)]
    assert sum(one.low <= true <= one.high for one in narrow) < 57  # and 50 percent are not 99


def test_the_share_that_keeps_to_a_bound():
    scores = accuracies(KEY, 300)
    bound = float(np.sort(scores)[200])  # itself a score: it counts as kept to
    found, kept = smoothed(KEY, bound=bound, alpha=0.05), int((scores <= bound).sum())
    assert found.below == kept / 300
    limits = stats.beta.ppf(0.025, kept, 301 - kept), stats.beta.ppf(0.975, kept + 1, 300 - kept)
    np.testing.assert_allclose((found.below_low, found.below_high), limits, rtol=1e-9)
    assert found.confidence == 0.95


def test_draws_that_are_too_few_have_no_limits():
    two, fifty, more = (smoothed(KEY, draws=draws) for draws in (2, 50, 51))
    assert (two.low, two.high) == (None, None)  # even 0.1 ** 2 is above alpha / 2
    assert fifty.high is None  # 0.9 ** 50 > 0.005 >= 0.9 ** 51
    assert fifty.low is not None
    assert more.high == pytest.approx(accuracies(KEY, 51).max())


def test_a_certificate_holds_within_its_radius_and_not_far_beyond():
    eta = 0.1
    certificate = certify.depth(
        threshold(), {"t": jnp.float32(0.5)}, GRID, KEY, sigma=SIGMA, eta=[eta], q=Q, draws=600, side="upper", strategy="map"
    )
    upper = certificate.rows[0].upper
    assert 0.5 < upper < 1
    for move, holds in ((eta, True), (-eta, True), (0.0, True), (-4 * eta, False)):
        found = smoothed(keys.named(KEY, "other"), 0.5 + move, bound=upper, draws=600)
        assert (found.below_high >= Q) == holds
    tight = smoothed(keys.named(KEY, "other"), 0.5 - eta, bound=upper, draws=600)
    assert tight.below < 0.99  # the bound is not empty: some of the moved neighbours do lie above it
    own = evaluate.accuracy(threshold(), {"t": jnp.float32(0.5 - 4 * eta)}, GRID)
    assert own > 0.8


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"draws": 0}, {"q": 1.0}, {"alpha": 0.0}])
def test_smoothed_refuses(wrong):
    with pytest.raises(BadInput):
        smoothed(KEY, **wrong)


def test_neighbours_without_answers_are_no_baseline(digits, start):
    data, evaluation = digits

    def apply(params, x):
        away = params["w"][0, 0] != start.params["w"][0, 0]
        return x.reshape(len(x), -1) @ params["w"] + jnp.where(away, jnp.nan, 0.0)

    model = models.from_apply(lambda key, x: start.params, apply)
    with pytest.raises(NonFinite, match="draw 0 is not finite"):
        audit.random_search(model, start, data, evaluation, KEY, radius=1.5, draws=4)
    with pytest.raises(NonFinite, match="draw 0 is not finite"):
        audit.smoothed(apply, start.params, evaluation, KEY, sigma=0.1, draws=4)
