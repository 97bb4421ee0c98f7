"""SAL where the loss is a quadratic and everything is known, against a plain loop, and on networks of every kind."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dememo_jax import data as sets
from dememo_jax import keys, loop, losses, models, nets, protect, report, sharpness, sources, train
from dememo_jax.errors import BadInput, NonFinite

KEY = jax.random.key(3)
C = 2.0  # curvature
PARAMS = {"first": jnp.asarray([[1.0, -2.0], [0.5, 0.0]]), "last": jnp.asarray([[3.0], [1.0]]), "bias": jnp.ones(2)}
SLOPE = jax.tree.map(lambda leaf: 0.3 * jnp.cos(leaf + 1), PARAMS)
DATA = sets.make(np.zeros((6, 1), np.float32), np.zeros(6, int))


def bowl(params, x):
    """C |theta|^2 / 2 + slope . theta as a single logit, for every example."""
    parts = [(0.5 * C * p**2 + s * p).sum() for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(SLOPE))]
    return jnp.full((len(x), 1), sum(parts))


def itself(logits, y):
    return logits[:, 0]


def known(radius, name):
    """Radius, and largest rise and fall within it, of one tensor."""
    p = np.asarray(PARAMS[name], np.float64)
    g = np.linalg.norm(C * p + np.asarray(SLOPE[name], np.float64))
    r = radius * np.linalg.norm(p)
    return r, r * g + C * r**2 / 2, r * g - C * r**2 / 2


quadratic = functools.partial(sharpness.sal, bowl, PARAMS, DATA, loss=itself, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["normalized", "one_step"])
@pytest.mark.parametrize("width", [1, 3])
def test_two_sides_of_a_quadratic(solver, width):
    found = quadratic(solver=solver, radius=0.1, width=width, rounds=6)
    assert list(found.value) == ["first", "last"]  # no biases
    for name in found.value:
        _, rise, fall = known(0.1, name)
        assert found.rise[name] == pytest.approx(rise, rel=1e-4)
        assert found.fall[name] == pytest.approx(fall, rel=1e-4)
        assert found.value[name] == pytest.approx(rise, rel=1e-4)
        assert found.radius_fraction[name] == pytest.approx(1, rel=1e-5)
    assert not found.stalled


@pytest.mark.slow
def test_quadratic_model_and_diagonal_of_a_quadratic():
    found = quadratic(solver="hvp", radius=0.1)
    sampled = quadratic(solver="hvp", radius=0.1, probes=3, key=KEY)
    for name in ("first", "last"):
        assert found.value[name] == pytest.approx(known(0.1, name)[1], rel=1e-5)
        assert sampled.value[name] == pytest.approx(found.value[name], rel=1e-5)  # blocks are not coupled: no noise
        assert sampled.error[name] == pytest.approx(0, abs=1e-6)
    assert found.error is None
    for probes in (1, 0):  # one probe is exact where the Hessian is diagonal; 0 asks for exact products
        each = quadratic(solver="diagonal", radius=0.1, probes=probes)
        assert each.measure.granularity == "parameter"
        for name in ("first", "last"):
            p, s = (np.asarray(tree[name], np.float64) for tree in (PARAMS, SLOPE))
            rho = 0.1 * np.abs(p)
            np.testing.assert_allclose(each.value[name], rho * np.abs(C * p + s) + C * rho**2 / 2, rtol=1e-4, atol=1e-7)
    by_layer = quadratic(solver="diagonal", granularity="layer", radius=0.1, probes=0)
    assert by_layer.value["last"] == pytest.approx(each.value["last"].mean(), rel=1e-5)


def test_ball_descends_with_the_gradient_as_it_is():
    # One example a batch and a constant mean: SGD on a quadratic is d <- d -+ lr (g + C d), projected once a pass.
    found = quadratic(solver="ball", radius=0.1, lr=0.01, rounds=4)
    for name in found.value:
        p, s = (np.asarray(tree[name], np.float64) for tree in (PARAMS, SLOPE))
        radius, ends = known(0.1, name)[0], []
        for sign in (1, -1):
            d, best = np.zeros_like(p), 0.0
            for _ in range(4):
                for _ in range(3):  # 6 examples in batches of 2
                    d = d + sign * 0.01 * (C * (p + d) + s)
                d = d * min(1, radius / np.linalg.norm(d))
                best = max(best, sign * ((C * p + s) * d + C * d**2 / 2).sum())
            ends.append((best, np.linalg.norm(d) / radius))
        assert found.rise[name] == pytest.approx(ends[0][0], rel=1e-4)
        assert found.fall[name] == pytest.approx(ends[1][0], rel=1e-4)
        assert found.radius_fraction[name] == pytest.approx(ends[0][1], rel=1e-4)
        assert found.fall_fraction[name] == pytest.approx(ends[1][1], rel=1e-4)


def test_a_stall_is_flagged():
    found = quadratic(solver="ball", radius=0.1, lr=1e-5)
    assert found.stalled == ("first", "last")
    assert max(found.radius_fraction.values()) < 0.01


def test_dead_layer():
    def dead(params, x):
        return bowl({**params, "last": jnp.zeros_like(params["last"])}, x) + 0 * params["last"].sum()

    for solver in ("ball", "normalized", "one_step", "hvp"):
        found = sharpness.sal(dead, PARAMS, DATA, loss=itself, batch=2, solver=solver)
        assert found.value["last"] == pytest.approx(0, abs=1e-6 * found.loss)  # rounding of the loss itself
        assert "last" in found.stalled
        assert found.value["first"] > 0


def test_mixed_mode_counts_from_the_running_loss():
    plain, mixed = quadratic(radius=0.1), quadratic(radius=0.1, running_loss=float(bowl(PARAMS, DATA.x)[0, 0]) - 0.05)
    assert plain.measure.mode == "evaluation"
    assert mixed.measure.mode == "mixed"
    for name in plain.value:
        assert mixed.rise[name] == pytest.approx(plain.rise[name] + 0.05, abs=1e-4)
        assert mixed.fall[name] == pytest.approx(max(0, plain.fall[name] - 0.05), abs=1e-4)


# --- networks ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(3, (3, 3))(x)))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def digits():
    full, _ = sources.load("digits")
    return sets.take(full, jnp.arange(60))


@pytest.mark.slow
def test_ball_against_a_plain_loop_on_a_convolutional_network(digits):
    apply, params = models.freeze(model := models.from_linen(Small()), model.init(KEY, digits.x[:1]))
    batch, rounds, lr, radius = 16, 3, 3.0, 0.2  # 60 examples: the last 12 of a pass are left out
    found = sharpness.sal(apply, params, digits, radius=radius, key=KEY, rounds=rounds, lr=lr, batch=batch)
    together = sharpness.sal(apply, params, digits, radius=radius, key=KEY, rounds=rounds, lr=lr, batch=batch, width=2)

    def mean(p, x, y):
        return losses.cross_entropy(apply(p, x), y).mean()

    slope, value = jax.jit(jax.grad(mean)), jax.jit(mean)
    start = float(value(params, digits.x, digits.y))
    for layer in ("Conv_0", "Dense_0"):
        kernel, name = params[layer]["kernel"], f"{layer}/kernel"
        reach, best = radius * float(jnp.linalg.norm(kernel)), []
        for sign in (1, -1):
            moved, top = kernel, 0.0
            for r in range(rounds):
                own = keys.named(keys.at(KEY, r), "draw")
                order = np.asarray(sets.pass_order(own, 0, jnp.ones(60, bool)))
                for b in range(60 // batch):
                    at = order[b * batch : (b + 1) * batch]
                    now = {**params, layer: {**params[layer], "kernel": moved}}
                    moved = moved + sign * lr * slope(now, digits.x[at], digits.y[at])[layer]["kernel"]
                d = moved - kernel
                moved = kernel + d * min(1.0, reach / float(jnp.linalg.norm(d)))
                now = {**params, layer: {**params[layer], "kernel": moved}}
                top = max(top, sign * (float(value(now, digits.x, digits.y)) - start))
            best.append(top)
        assert found.rise[name] == pytest.approx(best[0], abs=1e-5)
        assert found.fall[name] == pytest.approx(best[1], abs=1e-5)
        assert together.rise[name] == pytest.approx(best[0], abs=1e-5)
        assert min(best) > 1e-3


@pytest.mark.slow
def test_monotone_in_the_radius_and_a_better_maximiser(digits):
    apply, params = models.freeze(model := models.from_linen(nets.mlp(10, (16,))), model.init(KEY, digits.x[:1]))
    for solver in ("normalized", "one_step", "hvp"):
        found = [sharpness.sal(apply, params, digits, solver=solver, radius=r) for r in (0.02, 0.05, 0.2)]
        values = np.array([list(one.value.values()) for one in found])
        assert (np.diff(values, axis=0) > 0).all()
    one, many = (sharpness.sal(apply, params, digits, solver=s, radius=0.2) for s in ("one_step", "normalized"))
    assert all(many.value[name] >= one.value[name] - 1e-5 for name in one.value)


class Bare(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 8, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@pytest.mark.slow
def test_nnx_and_bare_functions_agree(digits):
    apply, params = models.freeze(model := models.from_nnx(lambda rngs: Bare(rngs)), model.init(KEY, digits.x[:1]))

    def plain(p, x):
        hidden = jax.nn.relu(x.reshape(len(x), -1) @ p["hidden"]["kernel"] + p["hidden"]["bias"])
        return hidden @ p["head"]["kernel"] + p["head"]["bias"]

    for solver in ("ball", "one_step", "diagonal"):
        how = {"solver": solver, "batch": 16, "rounds": 2, "granularity": "layer", "probes": 2}
        one, two = (sharpness.sal(f, params, digits, key=KEY, **how) for f in (apply, plain))
        assert list(one.value) == ["hidden/kernel", "head/kernel"]  # in the order of use, not of the alphabet
        for name in one.value:
            assert one.value[name] == pytest.approx(two.value[name], rel=1e-4, abs=1e-8)


@pytest.mark.slow
def test_record(digits):
    apply, params = models.freeze(model := models.from_linen(nets.mlp(10, (8,))), model.init(KEY, digits.x[:1]))
    seen = []
    found = sharpness.sal(
        apply, params, digits, test=digits, batch=20, on="clean", rounds=2, width=1, after=lambda *a: seen.append(a)
    )
    assert seen == [(1, 2), (2, 2)]
    assert found.test_accuracy == found.accuracy
    assert found.loss == pytest.approx(float(losses.cross_entropy(apply(params, digits.x), digits.y).mean()), rel=1e-5)
    assert found.sizes == {"Dense_0/kernel": 64 * 8, "Dense_1/kernel": 80}
    assert found.measure.on == "clean"
    assert found.measure.settings == (("batch", 20), ("rounds", 2), ("lr", 0.1))
    assert sharpness.from_plain(json.loads(report.to_json(dataclasses.asdict(found)))) == found
    with pytest.raises(BadInput, match="Dense_0/bias, Dense_1/bias: all zero"):  # as initialised
        sharpness.sal(apply, params, digits, only="bias", solver="one_step")
    assert sharpness.tracked([found, found]).shape == (2, 2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"radius": 0.0}, "radius.*positive"),
        ({"radius": float("nan")}, "radius.*positive"),
        ({"only": "nothing"}, "no leaf matches 'nothing'"),
        ({"solver": "sgd"}, "ball, normalized, one_step, hvp, diagonal"),
        ({"granularity": "parameter"}, "solver='diagonal'"),
        ({"batch": 7}, "6 examples, less than one batch of 7"),
        ({"solver": "hvp", "running_loss": 1.0}, "compares no losses"),
        ({"rounds": 0}, "rounds >= 1"),
        ({"running_loss": float("nan")}, "must be a number"),
    ],
)
def test_bad_input(how, message):
    with pytest.raises(BadInput, match=message):
        quadratic(**{"batch": 2, **how})


def test_bad_weights():
    with pytest.raises(BadInput, match="first: all zero"):
        sharpness.sal(bowl, {**PARAMS, "first": jnp.zeros((2, 2))}, DATA, loss=itself, batch=2)
    with pytest.raises(BadInput, match="no weight tensor of rank two"):
        sharpness.sal(lambda p, x: bowl({**PARAMS, "bias": p["bias"]}, x), {"bias": jnp.ones(2)}, DATA, loss=itself, batch=2)
    with pytest.raises(NonFinite, match=r"first.*not finite"):
        quadratic(lr=1e30, rounds=1)


def test_attention_has_kernels_and_no_biases_as_layers():
    net = nets.vit_tiny(5, width=8, depth=2, heads=2)
    x = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(net.init, KEY, x)["params"]
    found = sharpness.learnable_layers(lambda p, x: net.apply({"params": p}, x), params, x)
    assert {name.rpartition("/")[2] for name in found} == {"kernel"}  # of rank two and more are 6 biases, token and position
    assert len(found) == 2 + 6 * 2  # 74 at a depth of 12
    assert found[0] == "Conv_0/kernel"
    assert found[-1] == "Dense_0/kernel"
    named = sharpness.learnable_layers(lambda p, x: net.apply({"params": p}, x), params, x, only="query/bias")
    assert len(named) == 2


# --- UD ----------------------------------------------------------------------------------------------------------


def measured(values, *, solver="ball", sizes=(1, 1, 1, 1), **how):
    names = tuple(f"layer {i}" for i in range(len(values)))
    measure = sharpness.Measure(solver, "layer", 0.05, (("rounds", 10),), "evaluation", "train", 100, names)
    return sharpness.Sal(measure, dict(zip(names, map(float, values))), 0.1, 0.9, dict(zip(names, sizes)), **how)


CLEAN = [measured([5, 4, 0.2, 0.1], test_accuracy=0.9), measured([9, 8, 1, 0], test_accuracy=0.95)]
POISONED = [measured([5, 1, 0.2, 6], test_accuracy=0.4), measured([1, 1, 0, 0], test_accuracy=0.3, stalled=("layer 2",))]


def test_distance_by_hand():
    beta = np.mean([(4.5 + 0.15) / 2, (8.5 + 0.5) / 2])
    assert sharpness.learnable_threshold(CLEAN) == pytest.approx(beta)
    found = sharpness.unlearnable_distance(POISONED, CLEAN)
    assert found.threshold == pytest.approx(beta)
    assert (found.poisoned, found.clean) == ((2, 0), (2, 2))
    assert found.distance == 0.5
    assert found.ratio == pytest.approx(14.2 / 27.3)
    assert (found.test_accuracy, found.clean_test_accuracy) == (0.3, 0.95)
    assert (found.epochs, found.stalled, found.clean_stalled) == (2, 1 / 8, 0)
    assert found.measure.solver == "ball"


def test_distance_weighted_by_parameters():
    def sized(parts):
        return [dataclasses.replace(one, sizes=dict(zip(one.sizes, (10, 30, 5, 60)))) for one in parts]

    found = sharpness.unlearnable_distance(sized(POISONED), sized(CLEAN), weighting="parameter")
    assert found.distance == pytest.approx((10 + 60) / (40 + 40))
    assert found.ratio == pytest.approx((50 + 30 + 1 + 360 + 40) / (50 + 120 + 1 + 6 + 90 + 240 + 5))


def test_distance_of_single_parameters():
    def scalars(a, b):
        names = ("first", "last")
        measure = sharpness.Measure("diagonal", "parameter", 0.05, (), "evaluation", "train", 9, names)
        return sharpness.Sal(measure, {"first": np.array(a), "last": np.array(b)}, 0.1, 0.9, {"first": 3, "last": 1})

    clean, poisoned = [scalars([1.0, 2.0, 9.0], [8.0])], [scalars([9.0, 0.0, 0.0], [0.0])]
    assert sharpness.unlearnable_distance(poisoned, clean, weighting="parameter").distance == 0.5
    with pytest.raises(BadInput, match="no layers to count"):
        sharpness.unlearnable_distance(poisoned, clean)


def test_distance_of_the_clean_model_is_one_and_nothing_depends_on_order_or_scale():
    assert sharpness.unlearnable_distance(CLEAN, CLEAN).distance == 1
    turned = [[measured(list(one.value.values())[::-1]) for one in part] for part in (POISONED, CLEAN)]
    assert sharpness.unlearnable_distance(*turned).distance == 0.5
    for factor in (1e-3, 7.0):
        scaled = [[measured([factor * v for v in one.value.values()]) for one in part] for part in (POISONED, CLEAN)]
        assert sharpness.unlearnable_distance(*scaled).distance == 0.5


def test_rules_and_rounding():
    together = sharpness.learnable_threshold(CLEAN, rule="pooled")
    assert together == pytest.approx((np.mean([4, 5, 8, 9]) + np.mean([0.2, 0.1, 1, 0])) / 2)
    assert sharpness.learnable_threshold(CLEAN, rule="median") == pytest.approx(2.5)
    close = [measured([0.30004, 0.30001, 0.1, 0.1])]
    assert sharpness.learnable_threshold([measured([0.3, 0.3, 0.1, 0.1])]) == pytest.approx(
        sharpness.unlearnable_distance(close, close, decimals=4).threshold
    )


def test_two_means_is_the_best_of_all_splits():
    from sklearn.cluster import KMeans

    random = np.random.default_rng(0)
    for _ in range(20):
        values = random.exponential(size=9) * 10
        fits = KMeans(2, n_init=50, random_state=0).fit(values[:, None]).cluster_centers_
        assert sharpness.two_means(values) == pytest.approx(fits.mean(), rel=1e-6)
    assert sharpness.two_means([0.1] * 7) == 0.1  # to the bit
    assert sharpness.two_means([1e6, 1e6 + 1, 1e6 + 10, 1e6 + 11]) == pytest.approx(1e6 + 5.5, abs=1e-6)


def test_comparisons():
    all_ = {
        name: sharpness.unlearnable_distance([measured(v, test_accuracy=a)], CLEAN[:1])
        for name, v, a in (("EM", [0, 0, 0, 0], 0.1), ("LSP", [9, 0, 0, 0], 0.3), ("TAP", [9, 9, 9, 0], 0.2))
    }
    found = sharpness.compared(all_)
    assert found.order == ("EM", "LSP", "TAP")
    assert found.correlation == pytest.approx(0.5)
    fast = sharpness.unlearnable_distance(*[[measured([3, 2, 1, 0], solver="one_step")]] * 2)
    with pytest.raises(BadInput, match=r"cannot be compared: EM: ball.*SAM: one_step"):
        sharpness.compared({**all_, "SAM": fast})
    with pytest.raises(TypeError):
        _ = all_["EM"] < fast


@pytest.mark.parametrize(
    ("poisoned", "clean", "message"),
    [
        (POISONED[:1], CLEAN, "same epochs of both models, got 1 and 2"),
        ([measured([1, 2, 3, 4], solver="hvp")], CLEAN[:1], "solver 'hvp' and 'ball'"),
        ([measured([1, 2, 3])], CLEAN[:1], "cannot be compared: layers"),
        (CLEAN[:1], [measured([0.1, 0.1, 0.1, 0.1])], "no layer of the clean model is learnable.*undefined"),
        ([], [], "at one epoch at least"),
    ],
)
def test_undefined_distances(poisoned, clean, message):
    with pytest.raises(BadInput, match=message):
        sharpness.unlearnable_distance(poisoned, clean)


@pytest.mark.slow
def test_trained_networks_learn_through_their_layers():
    """The paper's qualitative claim on a toy: a shortcut leaves little to learn through, by its own solver."""
    full, test = sources.load("digits")
    model = models.from_linen(nets.mlp(10, (64, 64)))
    method = train.sgd(model, train.clipped_sgd(0.1, 0.9, 5e-4))
    scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))
    everyone = np.ones(len(full.y), bool)
    shortcut = sets.perturb(full, protect.linear_patches(KEY, full, everyone, classes=10, patch=2, radius=1.5))
    found = {}
    for name, seen in (("clean", full), ("shortcut", shortcut)):
        state, _ = scan(method, KEY, method.init(KEY, full.x[:1]), seen, steps=220, batch=64)
        found[name] = [sharpness.sal(*models.freeze(model, state.weights), seen, test=test, batch=64)]
    distance = sharpness.unlearnable_distance(found["shortcut"], found["clean"])
    assert distance.clean_test_accuracy > 0.9
    assert distance.test_accuracy < 0.9
    assert distance.ratio < 0.1
    assert (distance.stalled, distance.clean_stalled) == (1, 0)  # which is why
