"""Draws of a cloud: made in any pieces they are those of one run, and pieces of different clouds do not fit."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import certify, loop, models, montecarlo, tree
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite

KEY = jax.random.key(3)
RANDOM = np.random.default_rng(0)
DATA = sets.make(RANDOM.random((60, 6), np.float32), np.arange(60) % 3)
PARAMS = {"head": jnp.asarray(RANDOM.normal(size=(6, 3)), jnp.float32), "bias": jnp.asarray([0.1, -0.2, 0.3])}
GROUPS = {"all": np.ones(60, bool), "class 1": np.arange(60) % 3 == 1}


def network(params, x):
    return (x - 0.5) @ params["head"] + params["bias"]


def clouded(apply=network, params=PARAMS, data=DATA, key=KEY, **how):
    return certify.cloud(apply, params, data, key, **{"sigma": 0.4, "groups": GROUPS, **how})


def same(a, b):
    np.testing.assert_array_equal(a.scores, b.scores)
    assert replace(a, scores=0) == replace(b, scores=0) or vars(replace(a, scores=0)) == vars(replace(b, scores=0))


@pytest.fixture(scope="module")
def cloud():
    return clouded()


@pytest.fixture(scope="module")
def whole(cloud):
    return certify.draw(cloud, draws=12, every=3)


@pytest.fixture(scope="module")
def parts(cloud):
    return [certify.draw(cloud, start=a, draws=b, every=3) for a, b in ((0, 2), (2, 7), (7, 12))]


def test_scores_are_the_accuracies_of_noisy_networks(whole):
    sizes = [(6, 3), (3,)]  # in tree order: bias, head
    for i, row in enumerate(whole.scores):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), (21,)))
        noisy = {"bias": PARAMS["bias"] + 0.4 * noise[:3], "head": PARAMS["head"] + 0.4 * noise[3:].reshape(sizes[0])}
        right = np.asarray(network(noisy, DATA.x)).argmax(axis=1) == np.asarray(DATA.y)
        np.testing.assert_array_equal(row, [right[mask].sum() / mask.sum() for mask in GROUPS.values()])  # exact shares
    assert whole.scores.std(axis=0).min() > 0
    assert (whole.groups, whole.sigma, whole.start) == (("all", "class 1"), 0.4, 0)
    assert (whole.precision, whole.images, whole.scales) == ("float32", ((60, 60), (20, 20)), ())


@pytest.mark.parametrize("how", [{"strategy": "vmap"}, {"strategy": "vmap", "width": 5, "every": 7}, {"every": 1}])
def test_accuracies_are_equal_to_the_bit_however_they_are_made(cloud, how):
    one_by_one = certify.draw(cloud, draws=40, strategy="map").scores
    assert len(np.unique(one_by_one)) > 12  # else equality says little
    np.testing.assert_array_equal(certify.draw(cloud, draws=40, **how).scores, one_by_one)


# --- joining ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parts_join_in_any_order(whole, parts, order):
    same(certify.join(*(parts[i] for i in order)), whole)
    tail = certify.join(parts[2], parts[1])
    assert tail.start == 2
    np.testing.assert_array_equal(tail.scores, whole.scores[2:])


def test_gaps_and_overlaps_are_named(cloud, parts):
    with pytest.raises(BadInput, match=r"draws 2\.\.7 are missing"):
        certify.join(parts[2], parts[0])
    with pytest.raises(BadInput, match=r"draws 2\.\.7 are in two parts"):
        certify.join(*parts, parts[1])
    with pytest.raises(BadInput, match=r"draws 6\.\.7 are in two parts"):
        certify.join(*parts[:2], certify.draw(cloud, start=6, draws=9))
    with pytest.raises(BadInput, match="at least one part"):
        certify.join()


OTHERS = [
    ("key", {"key": jax.random.key(4)}),
    ("sigma", {"sigma": 0.41}),
    ("sigma", {"only": "head"}),
    ("weights", {"params": {**PARAMS, "bias": PARAMS["bias"] + 1e-6}}),
    ("data", {"data": sets.make(DATA.x, (DATA.y + 1) % 3)}),
    ("data", {"data": sets.make(DATA.x.at[7].add(1e-6), DATA.y)}),
    ("data", {"groups": {**GROUPS, "class 1": np.arange(60) % 3 == 2}}),
    ("groups", {"groups": {"all": GROUPS["all"], "class one": GROUPS["class 1"]}}),
    ("metric", {"precision": "as given"}),
    ("metric", {"images": 59}),
]


@pytest.mark.parametrize(("field", "how"), OTHERS)
def test_draws_of_another_cloud_do_not_fit(whole, field, how):
    other = replace(clouded(**how).blank, start=12)
    named = "differ in .*" + field if field != "groups" else "other groups.*class 1.*class one"
    for pair in ((whole, other), (other, whole)):
        with pytest.raises(BadInput, match=named if pair[0] is whole else field):
            certify.join(*pair)
    with pytest.raises(BadInput, match=field):
        certify.draw(clouded(**how), draws=20, prior=whole)
    if field != "groups":  # nothing but the field itself is blamed
        assert [name for name in whole.fingerprint if whole.fingerprint[name] != other.fingerprint[name]] == [field]


def test_statistics_of_batch_norm_count_as_weights(whole):
    def shifted(mean):
        return clouded(jax.tree_util.Partial(lambda mean, params, x: network(params, x - mean), jnp.float32(mean)))

    assert shifted(0.0).blank.fingerprint["weights"] != shifted(0.5).blank.fingerprint["weights"]
    assert shifted(0.5).blank.fingerprint == shifted(0.5).blank.fingerprint


# --- going on -----------------------------------------------------------------------------------------------------


def test_a_prior_is_extended_and_nothing_is_repeated(whole, monkeypatch):
    cloud, asked = clouded(), []
    true = montecarlo._evaluate
    monkeypatch.setattr(montecarlo, "_evaluate", lambda *given: asked.extend(given[1]) or true(*given))
    prior = certify.draw(cloud, draws=5)
    same(certify.draw(cloud, draws=12, prior=prior), whole)
    assert asked == list(range(12))
    assert len(prior.scores) == 5  # untouched
    for enough in (5, 3):
        with pytest.raises(BadInput, match="draws up to 5 are made"):
            certify.draw(cloud, draws=enough, prior=prior)
    tail = certify.draw(cloud, draws=9, prior=certify.draw(cloud, start=3, draws=6))
    assert tail.start == 3
    np.testing.assert_array_equal(tail.scores, whole.scores[3:9])


def test_after_gets_growing_draws_and_may_stop(cloud, whole):
    seen = []
    found = certify.draw(
        cloud, draws=12, every=3, after=lambda made: seen.append(made) or (loop.STOP if len(made.scores) >= 8 else None)
    )
    assert [len(made.scores) for made in seen] == [3, 6, 9]
    for made in seen:
        np.testing.assert_array_equal(made.scores, whole.scores[: len(made.scores)])
    same(found, seen[-1])
    same(certify.draw(cloud, draws=12, every=3, prior=found, after=seen.append), whole)
    same(seen[-1], whole)  # what is saved after the last chunk holds the prior too


def test_an_interrupted_run_goes_on_from_the_last_chunk(cloud, whole):
    saved = []

    def save(made):
        saved.append(made)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify.draw(cloud, draws=12, every=3, after=save)
    assert len(saved[-1].scores) == 6
    same(certify.draw(cloud, draws=12, prior=saved[-1]), whole)


def test_a_metric_that_is_not_finite_is_named_and_the_rest_is_kept():
    def noise(params, data):  # exact in any program: no sum, no product
        return params[:1] - 0.0

    params = jnp.zeros(3)
    every = certify.draw(certify.cloud_of(noise, params, None, KEY, groups=["x"], sigma=1.0), draws=12).scores[:, 0]
    worst = int(np.argmax(every[4:])) + 4
    limit = np.sort(every[4:])[-2]

    def spoilt(params, data):
        return jnp.where(noise(params, data) > limit, jnp.nan, noise(params, data))

    seen = []
    source = certify.cloud_of(spoilt, params, None, KEY, groups=["x"], sigma=1.0)
    with pytest.raises(NonFinite, match=f"draw {worst} is not finite"):
        certify.draw(source, start=4, draws=12, every=2, after=seen.append)
    before = 4 + (worst - 4) // 2 * 2
    assert [made.start + len(made.scores) for made in seen] == list(range(6, before + 1, 2))
    if seen:
        np.testing.assert_array_equal(seen[-1].scores[:, 0], every[4:before])


# --- where the noise falls ----------------------------------------------------------------------------------------


def moved(params, origin):
    """How far each leaf has moved: largest step of any entry."""
    return jnp.stack([jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(origin))])


def moving(**how):
    return certify.cloud_of(moved, PARAMS, PARAMS, KEY, groups=tree.names(PARAMS), **how)


NAMELESS = 7  # the one image of class 1 that the network below cannot name


def overflowing(params, x):
    """A network whose answer to one image is NaN where the noise has moved the first bias up."""
    bad = (jnp.arange(len(x)) == NAMELESS) & (params["bias"][0] > 0.3)
    return jnp.where(bad[:, None], jnp.sqrt(-1.0 - jnp.abs(params["head"][0])), network(params, x))


def biases(draws):
    return [0.1 + 0.4 * float(jax.random.normal(jax.random.fold_in(KEY, i), (21,))[0]) for i in range(draws)]


@pytest.mark.parametrize("strategy", ["map", "vmap"])
def test_a_draw_whose_network_names_no_class_is_no_forgetting(strategy, whole):
    worst = next(i for i, bias in enumerate(biases(12)) if bias > 0.3)
    assert worst > 0
    found = certify.draw(clouded(overflowing, batch=60), draws=worst, strategy=strategy)  # those before it are as ever
    np.testing.assert_array_equal(found.scores, whole.scores[:worst])
    for groups in (None, {"class 1": np.arange(60) % 3 == 1}):
        with pytest.raises(NonFinite, match=f"draw {worst} is not finite"):
            certify.draw(clouded(overflowing, groups=groups, batch=60), draws=12, strategy=strategy)
    other = clouded(overflowing, groups={"class 0": np.arange(60) % 3 == 0}, batch=60)  # of its images it names all
    assert np.isfinite(certify.draw(other, draws=12, strategy=strategy).scores).all()


def nowhere(params, x):
    return network(params, x) + jnp.where(params["bias"][0] == PARAMS["bias"][0], 0.0, jnp.nan)  # at the centre all is well


@pytest.mark.parametrize("images", [None, pytest.param(30, marks=pytest.mark.slow)])
def test_noisy_networks_without_answers_certify_nothing(images):
    with pytest.raises(NonFinite, match="draw 0 is not finite"):
        certify.depth(nowhere, PARAMS, DATA, KEY, sigma=0.4, eta=(0.01,), draws=200, images=images)
    with pytest.raises(NonFinite, match="draw 0 is not finite"):
        certify.ask(clouded(nowhere, images=images), tau=0.5, eta=(0.01,), most=200)


def test_only_some_leaves_get_noise():
    found = certify.draw(moving(sigma=0.4, only="^head$"), draws=5)
    assert found.groups == ("bias", "head")
    np.testing.assert_array_equal(found.scores[:, 0], 0)
    np.testing.assert_allclose(found.scores[:, 1], certify.draw(moving(sigma=0.4), draws=5).scores[:, 1], rtol=1e-5)
    assert found.scores[:, 1].min() > 0.2
    assert found.noise_norm == pytest.approx(0.4 * np.sqrt(18), rel=1e-9)
    assert found.scales == (("bias", 0.0), ("head", 0.4))
    with pytest.raises(BadInput, match="no leaf matches 'tail'; the leaves are bias, head"):
        moving(sigma=0.4, only="tail")
    with pytest.raises(BadInput, match="give `only` with one number"):
        moving(sigma={"bias": 0.1, "head": 0.2}, only="head")


def test_leaves_may_have_scales_of_their_own():
    one, own = (certify.draw(moving(sigma=s), draws=5) for s in (1.0, {"bias": 0.01, "head": 3.0}))
    np.testing.assert_allclose(own.scores, one.scores * [0.01, 3.0], rtol=1e-3)
    assert own.sigma is None
    assert one.sigma == 1.0
    assert own.scales == (("bias", 0.01), ("head", 3.0))
    assert own.noise_norm == pytest.approx(np.sqrt(3 * 0.01**2 + 18 * 3.0**2), rel=1e-9)
    assert one.noise_norm == pytest.approx(np.sqrt(21), rel=1e-9)
    with pytest.raises(BadInput, match="differ in sigma"):
        certify.join(one, replace(own, start=5))


def test_entries_of_a_leaf_may_have_scales_of_their_own():
    scale = {"bias": jnp.asarray([0.0, 1.0, 2.0]), "head": 0.5}
    source = certify.cloud_of(lambda p, o: jnp.abs(p["bias"] - o["bias"]), PARAMS, PARAMS, KEY, groups="abc", sigma=scale)
    found = certify.draw(source, draws=400)
    assert not found.scores[:, 0].any()
    np.testing.assert_allclose(np.square(found.scores).mean(axis=0), [0, 1, 4], rtol=0.3)
    assert found.noise_norm == pytest.approx(np.sqrt(1 + 4 + 18 * 0.25), rel=1e-9)


def test_the_noise_norm_is_the_length_of_the_noise():
    source = certify.cloud_of(lambda p, o: tree.distance(p, o)[None], PARAMS, PARAMS, KEY, groups=["d"], sigma=0.3)
    found = certify.draw(source, draws=2000, strategy="vmap")
    assert np.sqrt(np.square(found.scores, dtype=np.float64).mean()) == pytest.approx(found.noise_norm, rel=0.02)


# --- precision ----------------------------------------------------------------------------------------------------


def dense(dtype=None):
    model = models.from_linen(nn.Sequential([nn.Dense(32, dtype=dtype), nn.relu, nn.Dense(3, dtype=dtype)]))
    return models.freeze(model, model.init(jax.random.key(0), DATA.x[:1]))


@pytest.mark.slow
def test_bfloat16_is_the_arithmetic_of_bfloat16():
    apply, params = dense()

    def cast(params, x):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return apply(low, x.astype(jnp.bfloat16))

    def drawn(apply, precision):
        return certify.draw(clouded(apply, params, precision=precision), draws=10, strategy="map")

    low, explicit, high = drawn(apply, "bfloat16"), drawn(cast, "as given"), drawn(apply, "float32")
    assert np.ptp(low.scores[:, 0]) > 0.05
    assert np.abs(low.scores - explicit.scores).max() < 0.04  # the compiler may keep a sum in float32
    assert (low.precision, high.precision, explicit.precision) == ("bfloat16", "float32", "as given: float32")


@pytest.mark.parametrize("rounded", ["weights", "images"])
def test_bfloat16_loses_what_lies_behind_its_eight_bits(rounded):
    pair = np.float32([1.0, 1.0 + 2**-10])  # the second is larger in float32, and they are equal in bfloat16
    ones = np.ones(2, np.float32)
    weights, image = (pair, ones) if rounded == "weights" else (ones, pair)
    images = sets.make(np.tile(image, (5, 1)), np.ones(5, int), box=None)  # of class 1; the first of equal logits wins

    def scores(precision, weights=weights):
        params = {"pair": jnp.asarray(weights), "rest": jnp.zeros(1)}
        source = clouded(lambda p, x: x * p["pair"], params, images, precision=precision, groups=None, only="rest")
        return certify.draw(source, draws=3).scores

    np.testing.assert_array_equal(scores("float32"), 1)
    np.testing.assert_array_equal(scores("as given"), 1)
    np.testing.assert_array_equal(scores("bfloat16"), 0)


def test_precisions_that_cannot_be_kept_are_refused():
    with pytest.raises(BadInput, match=r"100\.0% of its multiplications in float32"):
        clouded(*dense(jnp.float32), precision="bfloat16")
    with pytest.raises(BadInput, match="precision must be one of float32, bfloat16, as given"):
        clouded(precision="float16")


def test_what_the_network_sees():
    seen = []

    def watched(params, x):
        seen.append((params["head"].dtype, x.dtype))
        return network(params, x)

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    for params, precision, wanted in (
        (half, "float32", (jnp.float32, jnp.float32)),
        (PARAMS, "bfloat16", (jnp.bfloat16, jnp.bfloat16)),
        (half, "as given", (jnp.bfloat16, jnp.float32)),
    ):
        seen.clear()
        assert certify.draw(clouded(watched, params, precision=precision), draws=1).scores.dtype == np.float64
        assert set(seen) == {tuple(map(jnp.dtype, wanted))}


def test_float32_products_are_asked_for_in_full():
    def products(precision):
        source = clouded(precision=precision)
        return str(jax.make_jaxpr(source.metric)(source.params, source.data))

    assert "HIGHEST" in products("float32")
    assert "HIGHEST" not in products("as given")


def test_noise_on_bfloat16_is_added_in_float32_and_not_rounded():
    half = jnp.asarray(RANDOM.normal(size=8), jnp.bfloat16)
    source = certify.cloud_of(lambda p, _: p.astype(jnp.float32), half, None, KEY, groups="abcdefgh", sigma=0.3)
    found = certify.draw(source, draws=50).scores
    noise = np.stack([jax.random.normal(jax.random.fold_in(KEY, i), (8,)) for i in range(50)]).astype(np.float64)
    np.testing.assert_allclose(found, np.asarray(half, np.float64) + 0.3 * noise, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_noise_on_weights_in_half_precision_is_not_rounded_away():
    # Steps of two between the numbers of bfloat16: a noise of 0.3 was rounded to nothing, and the bound was 1.000.
    random = np.random.default_rng(0)
    x, base = random.random((200, 4)).astype(np.float32), np.full((4, 3), 256.0) + random.choice([-2, 0, 2], (4, 3))
    examples = sets.make(x, (x @ base).argmax(1))

    def certified(dtype):
        weights = {"w": jnp.asarray(base, dtype)}
        how = {"sigma": 0.3, "eta": (0.05,), "draws": 300}
        return certify.depth(lambda p, x: x @ p["w"].astype("float32"), weights, examples, KEY, **how)

    low, half, full = (certified(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
    assert full.rows[0].lower < 0.99
    assert (low.rows, half.rows) == (full.rows, full.rows)
    assert (full.precision, low.precision) == ("float32", "float32; weights stored in bfloat16, noise added in float32")


# --- a subset of the images ---------------------------------------------------------------------------------------


def test_a_subset_of_the_images_is_one_for_all_draws_and_recorded():
    source = clouded(images=30)
    chosen = np.asarray(source.data[0].index)
    assert len(set(chosen)) == 30
    ones = int((chosen % 3 == 1).sum())
    found = certify.draw(source, draws=10)
    assert found.images == ((30, 60), (ones, 20))
    part = sets.take(DATA, jnp.asarray(chosen))
    there = clouded(data=part, groups={name: mask[chosen] for name, mask in GROUPS.items()})
    np.testing.assert_allclose(found.scores, certify.draw(there, draws=10).scores, rtol=1e-6)
    other = np.asarray(clouded(images=30, key=jax.random.key(5)).data[0].index)
    assert set(other) != set(chosen)
    assert chosen.max() > 40  # not the first thirty
    assert set(np.asarray(clouded(images=30, sigma=0.1).data[0].index)) == set(chosen)


def test_subsets_that_are_none():
    rare = {**GROUPS, "rare": np.arange(60) == int(np.setdiff1d(np.arange(60), clouded(images=30).data[0].index)[0])}
    with pytest.raises(BadInput, match="none of the 30 images is of group 'rare'"):
        clouded(images=30, groups=rare)
    for images in (0, 61):
        with pytest.raises(BadInput, match="between 1 and 60"):
            clouded(images=images)
    assert clouded(images=60).blank.images == clouded().blank.images


# --- any metric ---------------------------------------------------------------------------------------------------


def test_a_metric_of_the_caller():
    def losses(params, data):
        logits = network(params, data.x)
        return jnp.stack([jnp.mean(jax.nn.logsumexp(logits, axis=1)), logits.max()])

    source = certify.cloud_of(losses, PARAMS, DATA, KEY, groups=["mean", "max"], sigma=0.2)
    found = certify.draw(source, draws=4)
    assert (found.groups, found.images, found.sigma) == (("mean", "max"), None, 0.2)
    for i, row in enumerate(found.scores):
        noise = tree.gaussian_like(jax.random.fold_in(KEY, i), PARAMS, 0.2)
        np.testing.assert_allclose(row, losses(tree.add(PARAMS, noise), DATA), rtol=1e-4)
    for wrong in (["one"], ["one", "two", "three"]):
        with pytest.raises(BadInput, match=rf"must give {len(wrong)} scores.*shape \(2,\)"):
            certify.cloud_of(losses, PARAMS, DATA, KEY, groups=wrong, sigma=0.2)
    with pytest.raises(BadInput, match=r"shape \(\)"):
        certify.cloud_of(lambda params, data: losses(params, data)[0], PARAMS, DATA, KEY, groups=["one"], sigma=0.2)


def test_clouds_refuse_what_montecarlo_refuses():
    for how, message in (
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"key": jax.random.PRNGKey(0)}, "threefry2x32"),
        ({"params": {**PARAMS, "head": jnp.full((6, 3), jnp.nan)}}, "head holds NaN"),
        ({"groups": {"short": np.ones(59, bool)}}, "'short' must be a mask"),
    ):
        with pytest.raises(BadInput, match=message):
            clouded(**how)


def test_prepare_sees_every_noisy_tree_before_the_network():
    def turned(params):
        return jax.tree.map(lambda leaf: jnp.abs(leaf) - 0.2, params)

    found = certify.draw(clouded(prepare=turned), draws=5)
    inside = certify.draw(clouded(lambda params, x: network(turned(params), x)), draws=5)
    np.testing.assert_allclose(found.scores, inside.scores, rtol=1e-6)
    assert (found.scores != certify.draw(clouded(), draws=5).scores).any()


def test_calibrate_takes_a_cloud(cloud):
    ticks = iter([0.0, 1000.0])  # so long a draw is timed once
    assert certify.calibrate(cloud, clock=lambda: next(ticks)) == (1, 1000.0, ((1, 1000.0),))


# --- inputs that would pass for others -------------------------------------------------------------------------------


def test_metrics_are_told_apart_by_name():
    clouds = [
        certify.cloud_of(metric, PARAMS, DATA.x, KEY, groups=["g"], sigma=0.4, name=name)
        for metric, name in ((lambda p, x: p["bias"][:1], "plus"), (lambda p, x: -p["bias"][:1], "minus"))
    ]
    one, two = (certify.draw(c, draws=b, start=a) for c, a, b in zip(clouds, (0, 2), (2, 4)))
    with pytest.raises(BadInput, match="differ in metric"):
        certify.join(one, two)
    bare = certify.Draws(np.zeros((2, 1)), ("g",), 0.4)  # without a fingerprint: nobody knows what it is of
    with pytest.raises(BadInput, match="differ in data, key"):
        certify.join(bare, two)


def test_a_prior_begins_where_it_begins(cloud, parts):
    with pytest.raises(BadInput, match="begins at draw 2, not at start=1"):
        certify.draw(cloud, draws=12, start=1, prior=parts[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_network_with_a_dtype_of_its_own_is_not_called_float32(dtype):
    with pytest.raises(BadInput, match="sets a dtype of its own; take precision='as given'"):
        clouded(lambda params, x: network(params, x).astype(dtype))
    assert clouded(lambda params, x: network(params, x).astype(dtype), precision="as given").blank.precision.startswith(
        "as given"
    )


@pytest.mark.parametrize("sigma", ["0.1", True, {"head": "0.1", "bias": 0.1}])
def test_sigma_that_is_no_number(sigma):
    with pytest.raises(BadInput, match="sigma must be a number"):
        clouded(sigma=sigma)


def test_one_key_not_several():
    with pytest.raises(BadInput, match="one jax"):
        clouded(key=jax.random.split(KEY))


def test_labels_without_an_output_and_groups_of_numbers_are_refused():
    data = sets.make(np.full((6, 3), 0.5, np.float32), np.arange(6) % 5)
    cloud = functools.partial(certify.cloud, lambda p, x: x @ p["w"], {"w": np.ones((3, 2), np.float32)}, data, KEY, sigma=0.1)
    with pytest.raises(BadInput, match="2 outputs"):
        cloud()
    with pytest.raises(BadInput, match="group 'first' must be a mask"):
        cloud(groups={"first": np.arange(6) % 2})
