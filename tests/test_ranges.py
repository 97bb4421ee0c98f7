"""What the doors of the Python library take: ranges, labels, positions, masks; and what they say where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import audit, certify, evaluate, loop, models, projected, protect, release, train, unlearn
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Perturbation

KEY = jax.random.key(0)
X, Y = np.random.default_rng(0).random((12, 3, 3, 1)), np.arange(12) % 4
TABLE = np.random.default_rng(1).normal(2.0, 3.0, (12, 5))


def with_entry(value):
    x = X.copy()
    x[2, 1, 1, 0] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (255 * X, Y, "divide by 255"),
        (X - 0.5, Y, "negative"),
        (with_entry(np.nan), Y, "NaN"),
        (with_entry(np.inf), Y, "above 1"),
        (X / 255 / 255, Y, "divided by 255 twice"),
        ((X > 0.5).astype(np.uint8), Y, "no byte above 1"),
        ((255 * X).astype(int), Y, "uint8"),
        (X > 0.5, Y, "uint8 or float"),
        (TABLE, Y, r"box=\(low, high\)"),
        (X, Y[:7], r"\[12\], one label an image; got \[7\]"),
        (X[:7], Y, r"\[7\], one label an image; got \[12\]"),
        (X, np.eye(4)[Y], r"one-hot rows, pass y.argmax\(1\)"),
        (X, Y[:, None], r"pass y\[:, 0\]"),
        (X, Y + 0.7, "integers"),
        (X, Y * np.nan, "integers"),
        (X, Y - 1, "negative"),
        (X, Y + 2**40, "out of range"),
        (X, np.array(["cat", "dog", "cow", "ant"])[Y], r"np.unique\(y, return_inverse=True\)"),
        (0.5, 1, "single number"),
    ],
)
def test_make_refuses(x, y, says):
    with pytest.raises(BadInput, match=says):
        sets.make(x, y)
    if np.ndim(x) and x.dtype.kind != "u" and np.asarray(y).dtype.kind not in "US" and np.abs(np.nan_to_num(y)).max() < 99:
        with pytest.raises(BadInput, match=says.replace("uint8 or float", "uint8")):
            sets.make(jnp.asarray(x), jnp.asarray(y))  # arrays of either library


@pytest.mark.parametrize("kind", [">f4", ">f8", np.longdouble, np.float16, np.float64])
def test_make_takes_floats_of_every_kind(kind):
    made = sets.make(X.astype(kind), Y.astype(">i8"))
    assert made.x.dtype == np.float32
    np.testing.assert_allclose(made.x, X, atol=1e-3 if kind == np.float16 else 1e-7)
    np.testing.assert_array_equal(made.y, Y)


@pytest.mark.parametrize("y", [Y.astype(float), (Y > 1), list(Y), Y.astype(np.uint8)])
def test_make_takes_whole_labels(y):
    np.testing.assert_array_equal(sets.make(X, y).y, np.asarray(y).astype(int))


def test_nothing_is_known_under_jit():
    made = jax.jit(lambda x, y: sets.make(x, y).x)(255 * X, Y)
    np.testing.assert_allclose(made, 255 * X, rtol=1e-6)


# --- boxes -------------------------------------------------------------------------------------------------------


def test_a_box_brings_features_to_the_unit():
    low, high = TABLE.min(0), TABLE.max(0)
    made = np.asarray(sets.make(TABLE, Y, box=(low, high)).x)
    np.testing.assert_allclose(made, (TABLE - low) / (high - low), atol=1e-6)
    assert (made.min(0) == 0).all()
    np.testing.assert_allclose(made.max(0), 1, atol=1e-6)
    assert made.max() <= 1
    np.testing.assert_allclose(sets.make(X, Y, box=(-1, 3)).x, (X + 1) / 4, atol=1e-6)
    np.testing.assert_allclose(sets.make(TABLE, Y, box=None).x, TABLE, rtol=1e-6)
    np.testing.assert_allclose(sets.make(X / 400, Y, box=(0, 1 / 400)).x, X, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "box", "says"),
    [
        (TABLE, (0.0, 3.0), "outside of its box"),
        (TABLE, (3.0, 0.0), "low < high"),
        (TABLE, (-np.inf, np.inf), "finite"),
        (TABLE * np.inf, None, "infinite|NaN"),
        (np.where(TABLE > 2, np.nan, TABLE), None, "NaN"),
        (np.full((12, 2), 9, np.uint8), (0, 9), "bytes"),
    ],
)
def test_boxes_that_are_refused(x, box, says):
    with pytest.raises(BadInput, match=says):
        sets.make(x, Y, box=box)


def linear(classes=4, size=5):
    return models.from_apply(
        lambda key, x: {"w": 0.1 * jax.random.normal(key, (x[0].size, classes))}, lambda p, x: x.reshape(len(x), -1) @ p["w"]
    )


FEATURES = sets.make(TABLE, Y, box=None)
NOISE = Perturbation(jnp.full((12, 5), 0.1), jnp.arange(12), jnp.ones(12, bool))
WAYS = {
    "perturb": lambda: sets.perturb(FEATURES, NOISE),
    "run": lambda: run(FEATURES, perturbation=NOISE),
    "scan": lambda: loop.scan(SGD, KEY, SGD.init(KEY, FEATURES.x), FEATURES, steps=1, batch=4, perturbation=NOISE),
    "learned": lambda: protect.generate(protect.error_minimizing(linear(), classes=4), KEY, FEATURES),
    "kernel": lambda: protect.ntga(classes=4).init(KEY, FEATURES),
    "random": lambda: protect.random_noise(KEY, FEATURES, ball=projected.linf(0.1)),
    "victim": lambda: protect.learned(linear(), KEY, FEATURES, FEATURES, epochs=1),
    "quantise": lambda: release.quantise(FEATURES, NOISE),
    "measure": lambda: release.measure(TABLE, np.zeros((12, 5), np.uint8), np.ones(12, bool)),
    "boundary": lambda: unlearn.boundary_shrink(linear()).init(KEY, linear().init(KEY, FEATURES.x), FEATURES, Y == 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_clips_refuses_data_beyond_the_unit(way):
    with pytest.raises(BadInput, match=r"\[0, 1\].*box=\(low, high\)"):
        WAYS[way]()


SGD = train.sgd(linear(), optax.sgd(0.1))


def run(data, model=None, steps=2, **how):
    method = SGD if model is None else train.sgd(model, optax.sgd(0.1))
    return loop.run(method, KEY, method.init(KEY, data.x), data, steps=steps, every=1, batch=4, after=lambda *_: None, **how)


def test_what_does_not_clip_takes_any_features():
    state = run(FEATURES)
    assert np.isfinite(state.weights.params["w"]).all()
    kept = unlearn.finetune(linear(), optax.sgd(0.1), batch=4).init(KEY, state.weights, FEATURES, Y == 0)
    assert kept.weights.params["w"].shape == (5, 4)


def test_noise_for_a_table_stays_in_its_box():
    data = sets.make(TABLE, Y, box=(TABLE.min(0), TABLE.max(0)))
    recipe = protect.error_minimizing(linear(), radius=0.2, classes=4, batch=6, passes=1, stop=None)
    noise = protect.generate(recipe, KEY, data)
    moved = np.asarray(sets.perturb(data, noise).x)
    assert np.abs(moved - data.x).max() <= 0.2 + 1e-3
    assert np.abs(moved - data.x).max() > 0.01
    assert moved.min() >= 0
    assert moved.max() <= 1


# --- labels and outputs ------------------------------------------------------------------------------------------


def test_labels_without_an_output():
    data, narrow = sets.make(X, Y), linear(classes=3)
    weights = narrow.init(KEY, data.x)
    with pytest.raises(BadInput, match="labels run to 3, and the network has 3 outputs"):
        evaluate.accuracy(*models.freeze(narrow, weights), data)
    with pytest.raises(BadInput, match="labels run to 3, and the network has 3 outputs"):
        run(data, narrow, steps=9)  # before any step
    bare = train.sgd(narrow, optax.sgd(0.1))._replace(check=None)
    with pytest.raises(NonFinite, match=r"labels run to 3: has the network an output for each"):
        loop.run(bare, KEY, bare.init(KEY, data.x), data, steps=9, every=3, batch=4, after=lambda *_: None)
    grown = sets.make(1e4 * TABLE, Y, box=None)
    with pytest.raises(NonFinite) as diverged:
        loop.run(train.sgd(linear(), optax.sgd(1e36)), KEY, SGD.init(KEY, grown.x), grown, steps=50, every=1, batch=4,
                 start=3, after=lambda *_: None)  # fmt: skip
    assert "labels" not in str(diverged.value)  # labels fit, and the first pass is over


@pytest.mark.parametrize("labels", [[7, 1], [-1, 1], [1.5, 1], [1], [[1], [1]]])
def test_audits_refuse_labels_that_are_no_class(labels):
    logits = np.random.default_rng(0).normal(size=(2, 5))
    with pytest.raises(BadInput, match="label"):
        audit.signals(logits, labels)
    good = (np.repeat(logits, 3, 0), np.arange(6) % 5)
    with pytest.raises(BadInput, match="label"):
        audit.membership_scores(good, good, (logits, labels))


# --- positions and masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[0, 5, 7], [True, False], np.ones(12, int), np.ones((12, 1), bool)])
def test_select_takes_masks_only(mask):
    with pytest.raises(BadInput, match=r"mask must be boolean.*\[12\]"):
        sets.select(sets.make(X, Y), mask)
    if np.asarray(mask).dtype != bool:
        with pytest.raises(BadInput, match=r"np.isin\(np.arange\(12\), positions\)"):
            sets.check_forget(mask, 12)


@pytest.mark.parametrize("at", [[12], [-1], [0, 99], [0.5], [True, False]])
def test_take_refuses_positions_that_are_not_there(at):
    with pytest.raises(BadInput, match="position"):
        sets.take(sets.make(X, Y), np.array(at))


def test_tokens():
    for x, says in (
        (np.array([[0, -1]]), "tokens must lie"),
        (np.array([[2**40, 1]]), "tokens must lie"),
        (X, r"tokens \[N, L\]"),
    ):
        with pytest.raises(BadInput, match=says):
            sets.rows(x, [0])
    with pytest.raises(BadInput, match="one label"):
        sets.rows(np.array([[1, 2]]), [0, 1])


# --- what is taken from data and network, and what is printed ----------------------------------------------------


def test_numbers_of_classes_come_from_labels_and_outputs():
    data = sets.make(X, Y)
    for made in (protect.one_pixel, lambda d, **how: protect.linear_patches(KEY, d, patch=1, **how)):
        for found, expected in zip(made(data), made(data, classes=4)):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(BadInput, match="classes="):
        jax.jit(lambda d: protect.one_pixel(d).delta)(data)
    weights = linear().init(KEY, data.x)
    for recipe in (unlearn.random_labels, unlearn.salun):
        steps = [recipe(linear(size=9), optax.sgd(0.1), batch=4, **how) for how in ({}, {"classes": 4})]
        states = [one.step(KEY, one.init(KEY, weights, data, Y == 0), data)[0] for one in steps]
        np.testing.assert_array_equal(*(state.weights.params["w"] for state in states))


def test_data_and_noise_print_shapes():
    assert repr(NOISE) == "Perturbation(delta=float32[12, 5], row=int32[12], mask=bool[12])"
    assert str(sets.make(X, Y)) == "Dataset(x=float32[12, 3, 3, 1], y=int32[12], index=int32[12])"
    assert "y=None" in repr(FEATURES._replace(y=None))


def test_a_certificate_prints_its_rows():
    data = sets.make(X, Y)
    apply, params = models.freeze(linear(size=9), linear(size=9).init(KEY, data.x))
    depth = certify.depth(apply, params, data, KEY, sigma=0.1, eta=(0.01, 9.0), draws=200)
    lines = str(depth).splitlines()
    assert "sigma 0.1" in lines[0]
    assert "200 draws" in lines[0]
    assert len(lines) == 1 + len(depth.rows)
    assert f"eta 0.01: score from {depth.rows[0].lower:.4g} to {depth.rows[0].upper:.4g}" in lines[1]
    assert "no bound" in lines[2]
