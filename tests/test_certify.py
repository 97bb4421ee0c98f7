"""Certificates against closed forms, simulated clouds, tables worked out by hand, and networks of each kind."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special, stats

from dememo_jax import audit, certify, models
from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.types import Weights

SIGMA, Q, ALPHA, DRAWS, ETA = 0.25, 0.9, 0.01, 3000, (0.0625, 0.125, 0.25)
TX = optax.sgd(0.3, momentum=0.9)
U = np.array([0.6, -0.48, 0.0, 0.64])  # a unit vector
W = np.array([0.3, -0.1, 0.2, 0.4])
GRID = U @ W + SIGMA * np.linspace(-4, 4, 401)

# --- a network whose accuracy is a known function of u.w: the share of thresholds below it ----------------------------


def staircase(params, x):
    logit = jnp.tensordot(jnp.asarray(U, jnp.float32), params["w"], 1)
    return jnp.stack([x.reshape(-1), jnp.broadcast_to(logit, len(x))], axis=1)


@pytest.fixture(scope="module")
def stairs():
    return sets.make(GRID.astype(np.float32).reshape(-1, 1, 1, 1), np.ones(401, int), box=None)


def certify_stairs(stairs, **how):
    how = {"sigma": SIGMA, "eta": ETA, "q": Q, "draws": DRAWS, "alpha": ALPHA, "strategy": "map"} | how
    return certify.depth(staircase, {"w": jnp.asarray(W, jnp.float32)}, stairs, jax.random.key(0), **how)


@pytest.fixture(scope="module")
def drawn(stairs):
    params = {"w": jnp.asarray(W, jnp.float32)}
    return certify.draw(certify.cloud(staircase, params, stairs, jax.random.key(0), sigma=SIGMA), draws=DRAWS)


def of_drawn(drawn, **how):
    return certify.bound(drawn, **({"eta": ETA, "q": Q, "alpha": ALPHA} | how))


def share_below(bound, move):
    """P[accuracy <= bound] under the cloud whose u.w is moved by `move`: exact."""
    steps = round(bound * 401)
    return stats.norm.cdf((GRID[steps] - U @ W - move) / SIGMA) if steps < 401 else 1.0


@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize("form", ["corrected", "published"])
def test_exact_coverage_in_the_worst_direction(drawn, side, form):
    certificate = of_drawn(drawn, side=side, form=form)
    promised = 1 - Q if (side, form) == ("lower", "published") else Q
    for row in certificate.rows:
        value = getattr(row, side)
        covered = share_below(value, row.eta) if side == "upper" else 1 - share_below(value - 1 / 401, -row.eta)
        assert promised <= covered <= promised + 0.03 + 0.12 * row.eta  # holds, and is tight: the theorem is attained here
        level = special.ndtr(special.ndtri(promised) + row.eta / SIGMA)
        assert (row.level if side == "upper" else row.lower_level) == pytest.approx(level, rel=1e-12)
        assert row.shift == pytest.approx(row.eta / SIGMA)
        assert getattr(row, {"upper": "lower", "lower": "upper"}[side]) is None  # not asked for
    assert certificate.lower_holds_with == ((1 - Q if form == "published" else Q),)


def test_both_sides_are_the_sides_at_half_of_alpha(drawn):
    both, halved = of_drawn(drawn, q=(0.9, 0.7)), {"alpha": ALPHA / 2, "q": (0.9, 0.7)}
    upper, lower = of_drawn(drawn, side="upper", **halved), of_drawn(drawn, side="lower", **halved)
    assert [(row.q, row.eta) for row in both.rows] == [(q, eta) for q in (0.9, 0.7) for eta in ETA]
    assert [row.upper for row in both.rows] == [row.upper for row in upper.rows]
    assert [row.lower for row in both.rows] == [row.lower for row in lower.rows]
    assert both.statements == 12
    assert upper.statements == lower.statements == 6
    for row in both.rows:
        assert row.alpha == pytest.approx(ALPHA / 12)
        assert row.lower < row.lower_quantile < row.quantile < row.upper


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_simulated_clouds_are_covered(drawn, side):
    rng = np.random.default_rng(5)
    directions = [U, -U, *(v / np.linalg.norm(v) for v in rng.normal(size=(4, 4)))]
    least = 1.0
    for row in of_drawn(drawn, side=side).rows:
        for v in directions:
            cloud = W + row.eta * v + SIGMA * rng.normal(size=(4000, 4))
            accuracy = np.searchsorted(GRID, cloud @ U) / 401
            covered = (accuracy <= row.upper + 1e-6 if side == "upper" else accuracy >= row.lower - 1e-6).mean()
            least = min(least, covered)
            assert covered >= Q - 4 * np.sqrt(Q * (1 - Q) / 4000)
    assert least < Q + 0.05  # one of the directions is the worst, and comes close to the promise


def test_depth_is_cloud_draw_and_bound(stairs, drawn):
    assert certify_stairs(stairs) == of_drawn(drawn)
    assert drawn.scores.shape == (DRAWS, 1)
    # The draws have the law they should: accuracy is the share of the grid below N(u.w, sigma^2).
    expected = np.searchsorted(GRID, U @ W + SIGMA * np.random.default_rng(0).normal(size=DRAWS)) / 401
    assert stats.ks_2samp(np.round(drawn.scores[:, 0] * 401), np.round(expected * 401)).pvalue > 1e-3


def test_groups_share_one_pass(stairs):
    groups = {"low": np.arange(401) < 200, "odd": np.arange(401) % 2 == 1}
    how = {"draws": 500, "simultaneous": False}
    both = certify_stairs(stairs, groups=groups, **how)
    assert [(row.group, row.eta) for row in both.rows] == [(name, eta) for name in groups for eta in ETA]
    for name, mask in groups.items():
        alone = certify_stairs(sets.select(stairs, mask), **how)
        got = [(row.upper, row.lower) for row in both.rows if row.group == name]
        assert got == [(row.upper, row.lower) for row in alone.rows]


# --- what the draws can and cannot support ---------------------------------------------------------------------------


def of_scores(scores, sigma=1.0, **how):
    scores = np.asarray(scores, float)
    scores = scores if scores.ndim == 2 else scores[:, None]
    names = tuple(f"g{j}" for j in range(scores.shape[1]))
    how = {"eta": (0.5,), "side": "upper"} | how
    return certify.bound(certify.Draws(scores, names, sigma), **how)


@pytest.mark.parametrize(
    ("alpha", "q", "needed"),
    [
        (0.01, 0.9, (71, 121, 407, 8_920)),
        (0.01, 0.99, (921, 1_954, 10_465, 607_533)),
        (0.001, 0.9, (107, 182, 611, 13_379)),
        (0.001, 0.99, (1_381, 2_931, 15_698, 911_299)),
    ],
)
def test_draws_needed(alpha, q, needed):
    got = of_scores(np.linspace(0, 1, 50), eta=(0.25, 0.5, 1, 2), q=q, alpha=alpha, simultaneous=False)
    assert tuple(row.draws_needed for row in got.rows) == needed
    for row, count in zip(got.rows, needed, strict=True):
        assert row.upper is None
        assert str(count) in row.reason
        assert "50" in row.reason
        assert row.alpha == alpha


def test_alpha_is_split_over_all_bounds():
    two_by_five = of_scores(np.zeros((10, 2)), eta=(0.25, 0.5, 1, 2, 3))
    assert two_by_five.statements == 10
    assert [row.draws_needed for row in two_by_five.rows][:4] == [107, 182, 611, 13_379]  # alpha = 0.001
    five_both_ways = of_scores(np.zeros((10, 1)), eta=(0.25, 0.5, 1, 2, 3), side="both")
    assert [row.draws_needed for row in five_both_ways.rows][:4] == [107, 182, 611, 13_379]
    many = of_scores(np.zeros((1000, 26)), eta=(0.5,))
    assert {row.draws_needed for row in many.rows} == {207}
    assert many.largest_eta == (pytest.approx(1.135, abs=5e-4),)
    assert of_scores(np.zeros((1000, 26)), simultaneous=False).largest_eta == (pytest.approx(1.323, abs=5e-4),)
    assert of_scores(np.zeros(1000), sigma=0.25).largest_eta == (pytest.approx(0.331, abs=5e-4),)
    assert of_scores(np.zeros(1000), q=(0.9, 0.5), simultaneous=False).largest_eta == pytest.approx((1.323, 2.60), abs=6e-3)


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_abstains_rather_than_showing_the_extreme_draw(side):
    scores = np.random.default_rng(0).uniform(size=121)
    assert getattr(of_scores(scores[:120], side=side).rows[0], side) is None
    extreme = scores.max() if side == "upper" else scores.min()
    assert getattr(of_scores(scores, side=side).rows[0], side) == extreme  # 121 draws are just enough
    assert of_scores(scores, side=side).rows[0].reason is None
    far = of_scores(scores, side=side, eta=(60.0,)).rows[0]
    assert getattr(far, side) is None
    assert far.draws_needed is None
    assert "no count" in far.reason
    assert of_scores(np.zeros(10), side=side).largest_eta == (None,)  # ten draws cannot certify any eta


def test_larger_eta_never_tightens():
    rng = np.random.default_rng(1)
    for sample in (rng.uniform(size=700), rng.integers(0, 8, 700) / 8, rng.beta(0.3, 0.3, 700)):
        for side, sign in (("upper", 1), ("lower", -1)):
            rows = of_scores(sample, eta=tuple(np.linspace(0.01, 1.1, 30)), side=side).rows
            got = [getattr(row, side) for row in rows if getattr(row, side) is not None]
            assert len(got) > 20
            assert (np.diff(got) * sign >= 0).all()
            assert all(getattr(row, side) is None for row in rows[len(got) :])  # once it abstains it stays so


def test_all_bounds_hold_together_with_the_stated_confidence():
    rng = np.random.default_rng(2)
    truth = special.ndtr(special.ndtri(Q) + np.array([0.25, 0.5]))  # quantiles of a uniform score
    held = []
    for _ in range(200):
        rows = of_scores(rng.uniform(size=(250, 2)), eta=(0.25, 0.5), alpha=0.2, side="both").rows
        held.append(all(row.upper >= t and row.lower <= 1 - t for row, t in zip(rows, [*truth, *truth])))
    assert np.mean(held) >= 0.8 - 3 * np.sqrt(0.2 * 0.8 / 200)


def test_ties_and_discrete_scores_are_covered():
    rng = np.random.default_rng(3)
    values, weights = np.arange(4) / 3, np.array([0.5, 0.42, 0.05, 0.03])
    level = special.ndtr(special.ndtri(Q) + 0.25)  # .937: the true quantile is 2 / 3, which 8 % of the draws reach
    held = [
        of_scores(rng.choice(values, p=weights, size=150), eta=(0.25,), alpha=0.1).rows[0].upper >= 2 / 3 for _ in range(400)
    ]
    assert np.cumsum(weights)[1] < level < np.cumsum(weights)[2]
    assert 0.9 - 3 * np.sqrt(0.09 / 400) <= np.mean(held) < 1


# --- part of the images ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_subset_of_the_images_is_paid_for(stairs):
    how = {"draws": 400, "eta": (0.0625,), "groups": {"all": np.ones(401, bool), "odd": np.arange(401) % 2 == 1}}
    part, whole = certify_stairs(stairs, images=200, **how), certify_stairs(stairs, **how)
    assert whole.image_alpha == 0
    assert whole.images == ((401, 401), (200, 200))
    assert part.image_alpha == ALPHA / 2
    assert part.images[0] == (200, 401)
    assert part.images[1][1] == 200
    assert part.rows[0].alpha == pytest.approx(whole.rows[0].alpha)  # half for the draws, half for the images
    for few, all_ in zip(part.rows, whole.rows):
        assert few.lower < all_.lower < all_.upper < few.upper
    # The limits of one draw fail with chance image_alpha / (draws, groups, sides): a Hoeffding bound is a ceiling on them.
    beta = ALPHA / 2 / (400 * 2 * 2)
    widest = np.sqrt(np.log(1 / beta) / (2 * 200))
    level = np.quantile(certify_scores(stairs, 400, 200), part.rows[0].level, method="inverted_cdf")
    assert level < part.rows[0].upper <= level + 0.1 + widest


def certify_scores(stairs, draws, images):
    params = {"w": jnp.asarray(W, jnp.float32)}
    source = certify.cloud(staircase, params, stairs, jax.random.key(0), sigma=SIGMA, images=images)
    return certify.draw(source, draws=draws).scores[:, 0]


def test_limits_from_a_subset_cover_the_quantile():
    """Accuracies of 30 out of 60 images: bounds from the sampled counts, over many worlds."""
    rng = np.random.default_rng(4)
    true = rng.integers(0, 61, 20_000)  # right answers, uniform
    level = special.ndtr(special.ndtri(Q) + 0.25)
    quantile = np.quantile(true, level, method="inverted_cdf") / 60
    held = []
    for _ in range(200):
        counts = rng.hypergeometric(ngood := rng.choice(true, 300), 60 - ngood, 30)
        draws = certify.Draws((counts / 30)[:, None], ("g",), 1.0, images=((30, 60),))
        held.append(certify.bound(draws, eta=(0.25,), alpha=0.2, side="upper").rows[0].upper >= quantile)
    assert np.mean(held) >= 0.8 - 3 * np.sqrt(0.16 / 200)


# --- the sequential question -----------------------------------------------------------------------------------------


def test_the_question_stops_at_the_fewest_draws_or_when_it_is_refuted(stairs):
    params = {"w": jnp.asarray(W, jnp.float32)}
    source = certify.cloud(staircase, params, stairs, jax.random.key(0), sigma=SIGMA)
    seen = []
    how = {"eta": (0.0625,), "every": 10, "after": lambda made: seen.append(len(made.scores))}
    (yes,), made = certify.ask(source, tau=1.0, **how)
    assert (yes.verdict, yes.stopped, yes.draws_needed) == ("below", 71, 71)  # shift .25, alpha .01
    assert len(made.scores) == 71  # cut at the draw that decided, whatever `every` is
    assert seen == list(range(10, 90, 10))
    assert np.array_equal(certify.ask(source, tau=1.0, eta=(0.0625,), every=100)[1].scores, made.scores)
    (no,), _ = certify.ask(source, tau=0.4, **how)
    assert no.verdict == "above"
    assert no.stopped < 71
    (unknown,), made = certify.ask(source, tau=0.7, most=40, **how)
    assert unknown.verdict == "undecided"
    assert len(made.scores) == 40
    again, same = certify.ask(source, tau=1.0, prior=made, **how)
    assert again == (yes,)
    assert len(same.scores) == 71
    longer = certify.draw(source, draws=200)
    assert certify.ask(source, tau=1.0, prior=longer, eta=(0.0625,))[0] == (yes,)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": 0.0},
        {"sigma": -1.0},
        {"sigma": float("nan")},
        {"sigma": float("inf")},
        {"eta": ()},
        {"eta": (0.1, 0.0)},
        {"eta": (-0.1,)},
        {"eta": (float("nan"),)},
        {"q": 0.0},
        {"q": 1.0},
        {"q": ()},
        {"q": (0.9, 1.0)},
        {"q": (0.9, 0.9)},
        {"eta": (0.1, 0.2, 0.1)},
        {"sigma": 1e308},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"draws": 0},
        {"groups": {"some": np.ones(401, bool), "none": np.zeros(401, bool)}},
        {"groups": {"short": np.ones(400, bool)}},
        {"side": "left"},
        {"form": "printed"},
        {"images": 0},
        {"images": 402},
        {"precision": "float8"},
    ],
)
def test_depth_refuses(stairs, wrong):
    with pytest.raises(BadInput):
        certify_stairs(stairs, **{"draws": 500, **wrong})


def test_draws_that_can_certify_nothing_are_refused_before_the_first_is_made(stairs):
    def never(params, x):
        raise AssertionError("evaluated")

    with pytest.raises(BadInput, match="100 draws can certify none of the rows asked for; 122 would do"):
        certify.depth(
            never, {"w": jnp.zeros(4)}, stairs, jax.random.key(0), sigma=1.0, eta=np.arange(0.25, 0.5, 0.01).tolist() + [0.5],
            draws=100, side="upper",
        )  # fmt: skip


@pytest.mark.parametrize("scores", [np.zeros((0, 1)), np.full((500, 1), np.nan)])
def test_bound_refuses(scores):
    with pytest.raises(BadInput):
        certify.bound(certify.Draws(scores, ("all",), 1.0), eta=(0.1,))


# --- one network, written three ways ----------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5)(x.reshape(len(x), -1))
        return nn.Dense(3)(nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x.reshape(len(x), -1)))))


def by_hand(p, x, stats_):
    """Dense, batch norm with running statistics, ReLU, dense: in NumPy."""
    h = x.reshape(len(x), -1) @ p["first"]["kernel"] + p["first"]["bias"]
    h = (h - stats_["mean"]) / np.sqrt(stats_["var"] + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    return np.maximum(h, 0) @ p["last"]["kernel"] + p["last"]["bias"]


def bare(params, x):
    h = x.reshape(len(x), -1) @ params["first"]["kernel"] + params["first"]["bias"]
    h = jax.nn.relu(h * params["norm"]["scale"] + params["norm"]["bias"])
    return h @ params["last"]["kernel"] + params["last"]["bias"]


RENAME = {"first": "Dense_0", "norm": "BatchNorm_0", "last": "Dense_1"}


@functools.cache
def network(kind):
    """(model, weights, params by plain names, running statistics)."""
    rng = np.random.default_rng(7)
    p = {
        "first": {"kernel": rng.normal(size=(4, 5)), "bias": rng.normal(size=5)},
        "norm": {"scale": rng.uniform(0.5, 2, size=5), "bias": rng.uniform(0.5, 1.5, size=5)},
        "last": {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)},
    }
    running = {"mean": 0.5 * rng.normal(size=5), "var": rng.uniform(0.2, 3, size=5)}
    single = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    if kind == "linen":
        model = models.from_linen(Linen())
        weights = Weights({RENAME[name]: part for name, part in p.items()}, {"batch_stats": {"BatchNorm_0": running}})
    elif kind == "nnx":
        model, weights = models.from_nnx(lambda rngs: Nnx(rngs)), Weights(p, {"norm": running})
    else:
        model, weights = models.from_apply(lambda key, x: p, bare), Weights(p, ())
        running = {"mean": np.zeros(5), "var": np.ones(5) - 1e-5}
    return model, single(weights), p, running


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(8)
    y = rng.integers(0, 3, 90)
    return sets.make((0.6 * np.eye(4)[y] + rng.uniform(0, 0.4, size=(90, 4))).reshape(90, 2, 2, 1), y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", pytest.param("nnx", marks=pytest.mark.slow), "apply"])
def test_certify_and_attack_one_network_of_each_kind(blobs, kind):
    model, weights, p, running = network(kind)
    x, y = np.asarray(blobs.x, np.float64), np.asarray(blobs.y)
    like = jax.eval_shape(model.init, jax.random.key(0), blobs.x)
    assert jax.tree.structure(like) == jax.tree.structure(weights)

    def right(params):
        return (by_hand(params, x, running).argmax(axis=1) == y).mean()

    apply, params = models.freeze(model, weights)
    assert jax.tree.leaves(params)[0] is jax.tree.leaves(weights.params)[0]
    still = certify.depth(apply, params, blobs, jax.random.key(1), sigma=1e-6, eta=(1e-7,), draws=400)
    assert (
        still.rows[0].upper == still.rows[0].lower == pytest.approx(right(p), abs=1e-6)
    )  # no noise to speak of: the accuracy itself

    # The noise is N(0, sigma^2) on every parameter, batch norm's scale and bias too, and on no running statistic.
    rng = np.random.default_rng(9)
    source = certify.cloud(apply, params, blobs, jax.random.key(2), sigma=0.5)
    got = certify.draw(source, draws=400).scores[:, 0]
    noisy = [right(jax.tree.map(lambda leaf: leaf + 0.5 * rng.normal(size=leaf.shape), p)) for _ in range(1500)]
    assert stats.ks_2samp(np.round(90 * got), np.round(90 * np.array(noisy))).pvalue > 1e-3
    assert got.std() > 0.02

    attacked = audit.recover(model, weights, blobs, blobs, jax.random.key(3), radius=1.5, epochs=15, batch=30, tx=TX)
    assert attacked.accuracy[0] == pytest.approx(right(p), abs=1e-6)
    assert 0 < max(attacked.distance) <= 1.5 * (1 + 1e-5)
    assert attacked.accuracy[-1] > attacked.accuracy[0] + 0.1
