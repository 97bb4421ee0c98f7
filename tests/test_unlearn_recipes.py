"""The unlearning recipes against steps taken by hand, in float64, on a linear softmax model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import expit, log_softmax, softmax

from dememo_jax import data as sets
from dememo_jax import loop, losses, models, nets, unlearn
from dememo_jax.errors import BadInput
from dememo_jax.types import Dataset, Weights
from dememo_jax.unlearn.rewind import KeptState

N, K, RATE, KEY = 24, 3, 0.3, jax.random.key(0)
RANDOM = np.random.default_rng(11)
DATA = sets.make(RANDOM.uniform(size=(N, 2, 2, 1)).astype(np.float32), RANDOM.integers(0, K, N))
FORGET = np.arange(N) % 4 == 1  # 6 of 24: a batch of 18 is all of the retain set, or the whole forget set three times
GIVEN, OTHER, RANDOM_NET = (2 * RANDOM.normal(size=(3, 4, K))).astype(np.float32)
X, Y = np.asarray(DATA.x, np.float64).reshape(N, -1), np.asarray(DATA.y)
SETS = {"forget": (X[FORGET], Y[FORGET]), "retain": (X[~FORGET], Y[~FORGET])}
SGD = optax.sgd(RATE)
DECAYED = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))


def linear(outputs=K, fresh=RANDOM_NET):
    fresh = np.concatenate([fresh, 7 * np.ones((len(fresh), outputs - K), np.float32)], axis=1)
    return models.from_apply(lambda key, x: {"w": jnp.asarray(fresh)}, lambda p, x: x.reshape(len(x), -1) @ p["w"])


def two_layers():
    def init(key, x):
        one, other = jax.random.split(key)
        return {"z": jax.random.normal(one, (x[0].size, 5)), "a": jax.random.normal(other, (5, K))}  # used last, named first

    return models.from_apply(init, lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["z"]) @ p["a"])


MODEL, DEEP = linear(), two_layers()


def of(w):
    return Weights({"w": jnp.asarray(w)}, ())


scan = jax.jit(loop.scan, static_argnames=("method", "steps"))


def run(method, steps, *, weights=None, start=None, data=DATA, forget=FORGET):
    """From `start`, with `weights` as the given ones; operation by operation, which costs less than so many programs."""
    infos = []
    with jax.disable_jit():
        state = method.init(KEY, of(GIVEN) if weights is None else weights, data, forget)
        state = state if start is None else state._replace(weights=of(start))
        for t in range(steps):
            state, info = method.step(jax.random.fold_in(KEY, t), state, data)
            infos.append(info)
    return state, {name: np.asarray([info[name] for info in infos]) for name in infos[0]} if steps else {}


def same(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


# --- by hand -----------------------------------------------------------------------------------------------------


def nll(w, x, y):
    return -log_softmax(x @ w, axis=1)[np.arange(len(y)), y]


def nll_slope(w, x, y, each=1.0):
    """Gradient of the mean of `each` [B] times the negative log-likelihoods."""
    return x.T @ (np.reshape(each, (-1, 1)) * (softmax(x @ w, axis=1) - np.eye(w.shape[1])[y])) / len(y)


def kl(w, teacher, x, heat):
    log_p, log_q = (log_softmax(x @ one.astype(np.float64) / heat, axis=1) for one in (teacher, w))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def kl_slope(w, teacher, x, heat):
    return x.T @ ((softmax(x @ w / heat, axis=1) - softmax(x @ teacher.astype(np.float64) / heat, axis=1)) / heat) / len(x)


def preference_slope(w, beta):
    x, y = SETS["forget"]
    apart = nll(w, x, y) - nll(GIVEN.astype(np.float64), x, y)
    return -nll_slope(w, x, y, 2 * expit(-beta * apart))


def simple_slope(w, beta, gamma):
    x, y = SETS["forget"]
    return -nll_slope(w, x, y, 2 * expit(gamma - beta * nll(w, x, y)))


def neighbours(other):
    """Labels of the forgotten images one step of 0.2 along the sign of the given network's gradient."""
    (x, y), w = SETS["forget"], GIVEN.astype(np.float64)
    moved = np.clip(x + 0.2 * np.sign((softmax(x @ w, axis=1) - np.eye(K)[y]) @ w.T), 0, 1)
    logits = moved @ w
    if other:
        logits[np.arange(len(y)), y] = -np.inf
    return logits.argmax(axis=1)


def of_retain(w, each=1.0):
    return each * nll_slope(w, *SETS["retain"])


FX, RX = SETS["forget"][0], SETS["retain"][0]
OBEY = {"forget_rounds": 1, "gamma": 0.7, "alpha": 0.4, "temperature": 2.0, "batches": (18, 18)}
# name -> (method, the gradient of its objective at w in step t)
BY_HAND = {
    "neggrad+": (
        unlearn.negative_gradient(MODEL, SGD, retain=0.7, batch=18),
        lambda w, t: of_retain(w, 0.7) - 0.3 * nll_slope(w, *SETS["forget"]),
    ),
    "l1-sparse": (
        unlearn.l1_sparse(MODEL, SGD, strength=0.2, steps=2, batch=18),
        lambda w, t: of_retain(w) + 0.2 * (1.0, 0.5, 0.0)[t] * np.sign(w),
    ),
    "npo": (
        unlearn.npo(MODEL, SGD, beta=0.7, retain=0.8, batch=18),
        lambda w, t: preference_slope(w, 0.7) + of_retain(w, 0.8),
    ),
    "npo-kl": (
        unlearn.npo(MODEL, SGD, beta=0.7, retain=0.8, hold="kl", batch=18),
        lambda w, t: preference_slope(w, 0.7) + 0.8 * kl_slope(w, GIVEN, RX, 1.0),
    ),
    "npo alone": (unlearn.npo(MODEL, SGD, beta=2.0, retain=0, batch=18), lambda w, t: preference_slope(w, 2.0)),
    "simnpo": (
        unlearn.simnpo(MODEL, SGD, beta=1.7, gamma=0.4, forget=0.6, retain=0.8, batch=18),
        lambda w, t: 0.6 * simple_slope(w, 1.7, 0.4) + of_retain(w, 0.8),
    ),
    "simnpo alone": (
        unlearn.simnpo(MODEL, SGD, beta=2.0, forget=1.0, retain=0, batch=18),
        lambda w, t: simple_slope(w, 2.0, 0.0),
    ),
    "scrub": (  # away from the teacher on the forget set in the first round only, then back in every round
        unlearn.scrub(MODEL, SGD, **OBEY),
        lambda w, t: -4 * kl_slope(w, GIVEN, FX, 2.0) if t == 0 else of_retain(w, 0.7) + 0.4 * 4 * kl_slope(w, GIVEN, RX, 2.0),
    ),
    "bad teacher": (  # 6 forgotten against half of 18 retained; no squared temperature
        unlearn.bad_teacher(MODEL, SGD, share=0.5, temperature=1.5, batch=18),
        lambda w, t: 0.4 * kl_slope(w, RANDOM_NET, FX, 1.5) + 0.6 * kl_slope(w, GIVEN, RX, 1.5),
    ),
    "boundary shrink": (
        unlearn.boundary_shrink(MODEL, SGD, radius=0.2, batch=18),
        lambda w, t: nll_slope(w, FX, neighbours(False)),
    ),
    "boundary shrink, other": (
        unlearn.boundary_shrink(MODEL, SGD, radius=0.2, other=True, batch=18),
        lambda w, t: nll_slope(w, FX, neighbours(True)),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_three_steps_by_hand(name):
    method, slope = BY_HAND[name]
    w, path = OTHER.astype(np.float64), []
    for t in range(3):
        w = w - RATE * slope(w, t)
        path.append(w)
    state, _ = run(method, 3, start=OTHER)
    np.testing.assert_allclose(state.weights.params["w"], w, rtol=2e-5, atol=2e-6)
    for teacher in state.teachers:  # frozen
        same(state.teachers[teacher], of({"given": GIVEN, "fresh": RANDOM_NET}[teacher]))
    assert all(np.abs(b - a).max() > 1e-3 for a, b in zip([OTHER, *path], path))  # every step tells


def test_hand_made_labels_differ():
    assert (neighbours(False) != neighbours(True)).any()
    assert (neighbours(True) != SETS["forget"][1]).all()


def test_reported_losses_by_hand():
    _, info = run(BY_HAND["npo-kl"][0], 1, start=OTHER)
    w, given = OTHER.astype(np.float64), GIVEN.astype(np.float64)
    apart = nll(w, *SETS["forget"]) - nll(given, *SETS["forget"])
    assert float(info["forget_loss"][0]) == pytest.approx(-2 / 0.7 * np.log(expit(0.7 * apart)).mean(), rel=1e-5)
    assert float(info["retain_loss"][0]) == pytest.approx(kl(w, GIVEN, RX, 1.0).mean(), rel=1e-4)  # unweighted
    _, info = run(BY_HAND["scrub"][0], 3, start=OTHER)
    assert float(info["forget_loss"][0]) == pytest.approx(4 * kl(w, GIVEN, FX, 2.0).mean(), rel=1e-4)
    assert np.ptp(info["forget_loss"]) == 0  # away from the forget set, the last value stays
    assert info["retain_loss"][0] == 0


def test_npo_of_small_beta_is_gradient_ascent():
    mild, _ = run(unlearn.npo(MODEL, SGD, beta=1e-3, retain=0, batch=18), 3, start=OTHER)
    ascent, _ = run(unlearn.gradient_ascent(MODEL, SGD, batch=18), 3, start=OTHER)
    assert np.abs(ascent.weights.params["w"] - OTHER).max() > 0.1
    np.testing.assert_allclose(mild.weights.params["w"], ascent.weights.params["w"], rtol=5e-3, atol=5e-3)


def test_distillation_and_sequences_by_hand():
    z, teacher = RANDOM.normal(size=(2, 5, 4, K))
    for heat, scale in ((1.0, None), (3.0, None), (3.0, 0.5)):
        log_p, log_q = (log_softmax(one / heat, axis=-1) for one in (teacher, z))
        wanted = (heat**2 if scale is None else scale) * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        np.testing.assert_allclose(losses.distillation(heat, scale)(z, None, teacher), wanted, rtol=1e-4, atol=1e-6)
    labels = RANDOM.integers(-1, K, (5, 4))
    labels[2] = -1
    wanted = [-sum(log_softmax(z[b, t])[v] for t, v in enumerate(row) if v >= 0) for b, row in enumerate(labels)]
    np.testing.assert_allclose(losses.sequence_nll(z, labels), wanted, rtol=1e-5, atol=1e-6)
    assert wanted[2] == 0


@pytest.mark.parametrize("hold", ["nll", "kl"])
def test_npo_of_sequences_by_hand(hold):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(N, 5, 4)).astype(np.float32), rng.integers(0, K, (N, 5))
    real = np.arange(5) < rng.integers(1, 6, (N, 1))
    tokens = Dataset(jnp.asarray(np.where(real[..., None], x, 1e3)), jnp.asarray(np.where(real, y, -1)), jnp.arange(N))
    model = models.from_apply(lambda key, x: {"w": jnp.asarray(RANDOM_NET)}, lambda p, x: x @ p["w"])
    method = unlearn.npo(model, SGD, beta=0.4, retain=0.5, hold=hold, nll=losses.sequence_nll, batch=18)
    state, info = run(method, 1, start=OTHER, data=tokens)

    w, given, values, total = OTHER.astype(np.float64), GIVEN.astype(np.float64), {"forget": [], "retain": []}, 0.0
    tokens_retained = real[~FORGET].sum()  # as the loss of a language model: the mean over all tokens of the batch
    for n in range(N):
        a, b = x[n][real[n]].astype(np.float64), y[n][real[n]]
        if FORGET[n]:
            apart = nll(w, a, b).sum() - nll(given, a, b).sum()
            values["forget"].append(-2 / 0.4 * np.log(expit(0.4 * apart)))
            total -= 2 * expit(-0.4 * apart) * nll_slope(w, a, b) * len(a) / 6
        else:
            values["retain"].append((nll(w, a, b) if hold == "nll" else kl(w, given, a, 1.0)).sum())
            slope = nll_slope(w, a, b) if hold == "nll" else kl_slope(w, given, a, 1.0)
            total += 0.5 * slope * len(a) / tokens_retained
    np.testing.assert_allclose(state.weights.params["w"], w - RATE * total, rtol=2e-5, atol=1e-5)
    assert float(info["forget_loss"][0]) == pytest.approx(np.mean(values["forget"]), rel=1e-4)
    assert float(info["retain_loss"][0]) == pytest.approx(np.sum(values["retain"]) / tokens_retained, rel=1e-4)


@pytest.mark.parametrize("hold", ["nll", "kl"])
def test_long_answers_do_not_make_the_retain_term_of_npo_longer(hold):
    """Answers of five equal tokens hold the rest exactly as answers of one."""
    x, y = RANDOM.normal(size=(N, 1, 4)).astype(np.float32), RANDOM.integers(0, K, (N, 1))
    model = models.from_apply(lambda key, x: {"w": jnp.asarray(RANDOM_NET)}, lambda p, x: x @ p["w"])
    method = unlearn.npo(model, SGD, beta=0.4, retain=0.5, hold=hold, nll=losses.sequence_nll, batch=18)
    held = []
    for times in (1, 5):
        tokens = Dataset(jnp.asarray(x.repeat(times, axis=1)), jnp.asarray(y.repeat(times, axis=1)), jnp.arange(N))
        held.append(float(run(method, 1, start=OTHER, data=tokens)[1]["retain_loss"][0]))
    assert held[0] == pytest.approx(held[1], rel=1e-5)
    assert held[0] > 0.1 if hold == "nll" else held[0] > 1e-3


def test_token_mean_is_the_mean_over_tokens():
    z, labels = RANDOM.normal(size=(5, 4, K)), RANDOM.integers(-1, K, (5, 4))
    each = [-log_softmax(z[b, t])[v] for b, row in enumerate(labels) for t, v in enumerate(row) if v >= 0]
    found = losses.token_mean(losses.sequence_nll)(jnp.asarray(z), jnp.asarray(labels))
    assert float(found.mean()) == pytest.approx(np.mean(each), rel=1e-5)
    nothing = losses.token_mean(losses.sequence_nll)(jnp.asarray(z), jnp.full((5, 4), -1))
    np.testing.assert_array_equal(nothing, 0.0)
    likelihoods, names = -RANDOM.random((4, 3)), np.array([0, 2, 2, 1])  # of labels with 1, 4 and 2 tokens
    found = losses.token_mean(losses.label_nll, (1, 4, 2))(jnp.asarray(likelihoods), jnp.asarray(names))
    wanted = -likelihoods[np.arange(4), names].sum() / (1 + 2 + 2 + 4)
    assert float(found.mean()) == pytest.approx(wanted, rel=1e-5)
    logits = jnp.asarray(RANDOM.normal(size=(5, K)))
    np.testing.assert_array_equal(
        losses.token_mean(losses.cross_entropy)(logits, jnp.arange(5) % K), losses.cross_entropy(logits, jnp.arange(5) % K)
    )


# --- labels and images -------------------------------------------------------------------------------------------


def own_rows(count, forgotten):
    """Examples with a row of the weights each, so that the weights tell what every example was taught."""
    data = sets.make(np.eye(count, dtype=np.float32), np.arange(count) % K)
    return data, np.arange(count) < forgotten, linear(fresh=np.zeros((count, K), np.float32)), of(np.zeros((count, K)))


@pytest.mark.parametrize("wrong", [False, True])
def test_random_labels_law(wrong):
    data, forget, model, zero = own_rows(1000, 900)
    method = unlearn.random_labels(model, SGD, classes=K, wrong=wrong, batch=900)
    state, step = method.init(KEY, zero, data, forget), jax.jit(method.step)
    data = data._replace(x=jnp.where(forget[:, None], data.x, jnp.nan))  # the retain set has a stage of its own
    taught = [np.asarray(step(jax.random.key(s), state, data)[0].weights.params["w"]) for s in (0, 1)]
    np.testing.assert_array_equal(taught[0][900:], 0)
    np.testing.assert_allclose(np.sort(taught[0][:900], axis=1), [np.array([-1, -1, 2]) * RATE / 3 / 900] * 900, rtol=1e-5)
    labels = [one[:900].argmax(axis=1) for one in taught]
    assert (labels[0] != labels[1]).mean() > 0.3  # drawn anew
    pairs = np.zeros((K, K))
    np.add.at(pairs, (np.asarray(data.y)[:900], labels[0]), 1)
    wanted = np.full((K, K), 100.0) if not wrong else 150 * (1 - np.eye(K))
    assert np.abs(pairs - wanted).max() < 5 * np.sqrt(100)
    assert not wrong or np.trace(pairs) == 0


def test_boundary_expand_by_hand():
    method = unlearn.boundary_expand(MODEL, linear(K + 1), SGD, classes=K, batch=18)
    state = method.init(KEY, of(GIVEN), DATA, FORGET)
    np.testing.assert_array_equal(state.weights.params["w"], np.concatenate([GIVEN, np.full((4, 1), 7)], axis=1))
    same(method.finish(state), of(GIVEN))  # nothing learned yet: the given network, bit for bit
    state, _ = scan(method, KEY, state, DATA, steps=2)
    w = np.concatenate([GIVEN, np.full((4, 1), 7)], axis=1).astype(np.float64)
    for _ in range(2):
        w = w - RATE * nll_slope(w, FX, np.full(6, K))
    np.testing.assert_allclose(state.weights.params["w"], w, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(method.finish(state).params["w"], w[:, :K], rtol=2e-5, atol=2e-6)


def test_boundary_expand_needs_the_number_of_classes():
    for classes in (2, 5):  # a class that exists, and one beyond the last output, whose loss is NaN
        with pytest.raises(BadInput):
            unlearn.boundary_expand(MODEL, linear(4), SGD, classes=classes).init(KEY, of(GIVEN), DATA, FORGET)


def test_unsir_learns_its_noise():
    forget = Y == 2
    found = {}
    for steps in (0, 2, 12):  # at a rate of zero the noise stays what was drawn
        rate = 0.1 if steps else 0.0
        method = unlearn.unsir(MODEL, SGD, images=8, noise_steps=max(steps, 1), noise_lr=rate, decay=0.1)
        found[steps] = run(method, 0, forget=forget)[0].extra
        np.testing.assert_array_equal(found[steps][1], 2)
    assert found[0][0].shape == (8, 2, 2, 1)
    w, labels, noise = GIVEN.astype(np.float64), np.full(8, 2), np.asarray(found[0][0], np.float64).reshape(8, 4)
    first = nll(w, noise, labels).mean()
    m = v = 0.0
    for t in (1, 2):  # Adam on -nll + 0.1 |noise|^2, means over the images
        slope = (-(softmax(noise @ w, axis=1) - np.eye(K)[labels]) @ w.T + 0.2 * noise) / 8
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        noise = noise - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(np.asarray(found[2][0]).reshape(8, 4), noise, rtol=1e-4, atol=1e-5)
    assert nll(w, np.asarray(found[12][0], np.float64).reshape(8, 4), labels).mean() > first + 0.5


def test_unsir_mixes_noise_with_retained_images():
    # Logits that do not look at the images: the loss of a batch tells how many of its labels are of the forgotten class.
    model = models.from_apply(lambda key, x: {"b": jnp.zeros(K)}, lambda p, x: jnp.zeros((len(x), 1)) + p["b"])
    weights, forget = Weights({"b": jnp.asarray([0.0, 0.0, 3.0])}, ()), Y == 2
    kept = int((~forget).sum())
    method = unlearn.unsir(model, optax.sgd(0.0), share=1.0, noisy=0.36, noise_steps=1, batch=40)
    with jax.disable_jit():
        state = method.init(KEY, weights, DATA, forget)
    _, info = scan(method, KEY, state, DATA, steps=60)
    common, rare = -log_softmax([0, 0, 3])[[0, 2]]
    impair = np.asarray(info["mixed_loss"])[::3]  # ceil(1.563 passes of one batch) = 2 steps, then 1 of repair
    assert 9 <= kept <= 20
    assert method.steps(N - kept, kept, 7) == 21
    share = (common - impair) / (common - rare)
    np.testing.assert_allclose(40 * share, np.round(40 * share), atol=1e-3)
    assert abs(share.mean() - 0.36) < 5 * np.sqrt(0.36 * 0.64 / (40 * len(share)))
    np.testing.assert_allclose(info["retain_loss"][2:], common, rtol=1e-5)


# --- stages, batches, epochs -------------------------------------------------------------------------------------


def schedule(method, masks, steps):
    """Stage before and round after every one of the steps, for all masks at once: [masks, steps]."""
    data = sets.make(np.zeros((masks.shape[1], 1), np.float32), np.zeros(masks.shape[1]))

    def of_mask(mask):
        def body(state, t):
            new, _ = method.step(jax.random.fold_in(KEY, t), state, data)
            return new, (state.stage, new.round)

        return jax.lax.scan(body, method.init(KEY, Weights({"w": jnp.zeros((1, K))}, ()), data, mask), jnp.arange(steps))[1]

    return [np.asarray(part) for part in jax.jit(jax.vmap(of_mask))(jnp.asarray(masks))]


def term(on="retain", batch=None):
    return unlearn.Term(on, batch=batch)


NARROW = linear(fresh=np.zeros((1, K), np.float32))
# name -> (method, the share in thousandths, set, batch and rounds of every stage)
SCHEDULES = {
    "scrub": (unlearn.scrub(NARROW, SGD, batches=(4, 3)), [(1000, "forget", 4, 3), (1000, "retain", 3, 99)]),
    "bad teacher": (unlearn.bad_teacher(NARROW, SGD, share=0.37, batch=2), [(370, "retain", 2, 99)]),
    "odd": (
        unlearn.descent(
            NARROW, SGD, unlearn.Stage((term("retain", 5), term("forget", 2)), "forget", 1.5, 1),
            unlearn.Stage((term(),), "retain", 0.101), unlearn.Stage((term("forget"),), "forget", 1.0, 2), batch=3,
        ),
        [(1500, "forget", 2, 1), (101, "retain", 3, 99), (1000, "forget", 3, 2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_follow_one_another(name):
    method, stages = SCHEDULES[name]
    counts = np.arange(1, 31, 2 if name == "scrub" else 3)
    places = np.random.default_rng(1).permuted(np.tile(np.arange(31), (len(counts), 1)), axis=1)
    found = schedule(method, places < counts[:, None], 130)
    for n, stage, rounds in zip(counts, *found):
        wanted, ends = [], []
        for epoch in range(4):
            for i, (thousandths, over, batch, until) in enumerate(stages):
                passes = -(-(n if over == "forget" else 31 - n) // batch)
                wanted += [i] * (-(-passes * thousandths // 1000) if epoch < until else 0)
            ends.append(len(wanted))
            if len(wanted) <= 130:
                assert method.steps(int(n), 31 - int(n), epoch + 1) == np.argmax(rounds > epoch) + 1 == ends[-1]
        np.testing.assert_array_equal(stage[: len(wanted)], wanted[:130])


def test_steps_of_published_runs():
    assert unlearn.scrub(MODEL).steps(4500, 45500, 10) == 3 * 71 + 10 * 1422
    assert unlearn.scrub(MODEL, forget_rounds=2).steps(64, 32, 1) == 2
    assert unlearn.npo(MODEL).steps(4500, 45500, 5) == unlearn.finetune(MODEL).steps(4500, 45500, 5) == 5 * 178
    assert unlearn.npo(MODEL, retain=0).steps(4500, 45500, 5) == unlearn.boundary_shrink(MODEL).steps(4500, 45500, 5) == 5 * 18
    assert unlearn.simnpo(MODEL).steps(4500, 45500, 5) == 5 * 178
    assert unlearn.simnpo(MODEL, retain=0).steps(4500, 45500, 5) == 5 * 18
    assert unlearn.bad_teacher(MODEL).steps(4500, 45500, 1) == 54  # 53.4
    assert unlearn.random_labels(MODEL, classes=K).steps(4500, 45500, 10) == 10 * (18 + 178)


def test_three_of_five_hundred_are_never_starved():
    data, forget, model, zero = own_rows(500, 3)
    method = unlearn.npo(model, SGD, retain=0.5, batch=71)
    assert method.steps(3, 497, 1) == 7
    state = method.init(KEY, zero, data, forget)
    for _ in range(7):
        before = np.asarray(state.weights.params["w"])[:3]
        state, _ = scan(method, KEY, state, data, steps=1)
        assert (np.asarray(state.weights.params["w"])[:3] != before).all()
    # Every retained row is moved by exactly one step, 1/71 of a batch: its example was seen once.
    once = 0.5 * RATE / 71 * (np.eye(K)[np.arange(3, 500) % K] - 1 / K)
    np.testing.assert_allclose(state.weights.params["w"][3:], once, rtol=1e-5)


def test_scrub_resumes_in_the_middle_of_a_stage():
    tx = optax.adamw(0.05, weight_decay=0.1)
    method = unlearn.scrub(MODEL, tx, batches=(2, 4), forget_rounds=2)  # 3 and 5 steps
    begin = method.init(KEY, of(GIVEN), DATA, FORGET)._replace(weights=of(OTHER))
    whole, _ = scan(method, KEY, begin, DATA, steps=20)
    state = begin
    for start in range(0, 20, 5):
        state, _ = scan(method, KEY, state, DATA, steps=5, start=start)
        assert start != 5 or (int(state.stage), int(state.place)) == (0, 2)
    same(whole, state)
    assert (int(whole.round), int(whole.stage), int(whole.place)) == (2, 1, 4)
    np.testing.assert_array_equal(whole.drawn, [6, 14])


# --- weights that may move ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_salient_is_the_largest_summed_gradient(share):
    far = DATA._replace(x=jnp.where(FORGET[:, None, None, None], DATA.x, jnp.nan))  # the forget set alone is looked at
    with jax.disable_jit():
        mask = unlearn.salient(MODEL, share, batch=4)(KEY, of(GIVEN), far, jnp.asarray(FORGET))["w"]
    size = np.abs(nll_slope(GIVEN.astype(np.float64), *SETS["forget"])).ravel()
    wanted = np.zeros(12, bool)
    wanted[np.argsort(-size)[: round(share * 12)]] = True
    np.testing.assert_array_equal(np.asarray(mask).ravel(), wanted)
    assert mask.dtype == bool


def test_salun_freezes_the_rest():
    method = unlearn.salun(MODEL, DECAYED, classes=K, share=0.3, batch=4)
    state = jax.jit(method.init)(KEY, of(GIVEN), DATA, jnp.asarray(FORGET))
    state, _ = scan(method, KEY, state, DATA, steps=30)
    free, w = np.asarray(state.trainable["w"]), np.asarray(state.weights.params["w"])
    assert free.sum() == round(0.3 * 12)
    np.testing.assert_array_equal(w[~free], GIVEN[~free])
    assert (np.abs(w - GIVEN)[free] > 1e-3).all()


@pytest.mark.parametrize("recipe", [unlearn.catastrophic_forgetting, unlearn.exact_last_layers])
def test_only_the_last_layers_move(recipe):
    weights = DEEP.init(jax.random.key(4), DATA.x)
    data = DATA._replace(x=jnp.where(FORGET[:, None, None, None], jnp.nan, DATA.x))  # the retain set alone is looked at
    forget, exact = jnp.asarray(FORGET), recipe is unlearn.exact_last_layers
    method = recipe(DEEP, DECAYED, layers=1, batch=7)
    begin = method.init(KEY, weights, data, forget)
    np.testing.assert_array_equal(begin.weights.params["z"], weights.params["z"])
    assert np.array_equal(begin.weights.params["a"], weights.params["a"]) != exact
    state, _ = scan(method, KEY, begin, data, steps=20)
    np.testing.assert_array_equal(state.weights.params["z"], weights.params["z"])
    assert (np.abs(state.weights.params["a"] - begin.weights.params["a"]) > 1e-4).all()  # and no NaN
    both = recipe(DEEP, DECAYED, layers=2, batch=7).init(KEY, weights, data, forget)
    assert all(bool(free) for free in jax.tree.leaves(both.trainable))
    assert np.array_equal(both.weights.params["z"], weights.params["z"]) != exact


# --- what is never looked at, and statistics ---------------------------------------------------------------------

UNSEEN = {"boundary shrink": "retain", "npo alone": "retain", "l1-sparse": "forget"}


@pytest.mark.parametrize("name", UNSEEN)
def test_the_other_set_is_never_touched(name):
    mask = FORGET if UNSEEN[name] == "forget" else ~FORGET

    def after(poisoned):
        data = DATA._replace(x=jnp.where(poisoned[:, None, None, None], 1 - DATA.x, DATA.x))
        return run(BY_HAND[name][0], 3, data=data)[0].weights

    alone = after(np.zeros(N, bool))
    same(after(mask), alone)
    assert (after(~mask).params["w"] != alone.params["w"]).any()


class Normed(nn.Module):
    classes: int = K

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(len(x), -1))
        return nn.Dense(self.classes, use_bias=False)(x)


def normed():
    """Weights with statistics that are not those of the images."""
    mean, var = np.full(4, 0.3, np.float32), np.full(4, 2.0, np.float32)
    params = {"BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "Dense_0": {"kernel": jnp.asarray(GIVEN)}}
    return Weights(params, {"batch_stats": {"BatchNorm_0": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}}), mean, var


@pytest.mark.parametrize("mode", ["fit", "frozen"])
def test_teachers_evaluate_and_statistics_follow_the_mode(mode):
    model = models.from_linen(Normed())
    weights, mean, var = normed()
    for recipe, order in ((unlearn.npo, (FX, RX)), (unlearn.negative_gradient, (RX, FX))):
        method = recipe(model, SGD, batch=18, mode=mode)
        state, info = run(method, 1, weights=weights)
        wanted = mean.astype(np.float64)
        for x in order if mode == "fit" else ():
            wanted = 0.9 * wanted + 0.1 * x.mean(axis=0)
        np.testing.assert_allclose(state.weights.stats["batch_stats"]["BatchNorm_0"]["mean"], wanted, rtol=1e-5)
        if recipe is unlearn.npo:
            given, evaluated = GIVEN.astype(np.float64), (FX - mean) / np.sqrt(var + 1e-5)
            student = (FX - FX.mean(axis=0)) / np.sqrt(FX.var(axis=0) + 1e-5) if mode == "fit" else evaluated
            apart = nll(given, student, SETS["forget"][1]) - nll(given, evaluated, SETS["forget"][1])
            assert float(info["forget_loss"][0]) == pytest.approx(-20 * np.log(expit(0.1 * apart)).mean(), rel=1e-5)
            same(state.teachers["given"], weights)


def test_boundary_expand_of_linen():
    weights, _, _ = normed()
    big = models.from_linen(Normed(K + 1))
    method = unlearn.boundary_expand(models.from_linen(Normed()), big, SGD, classes=K)
    state, _ = run(method, 0, weights=weights)
    same(method.finish(state), weights)
    logits, small = (np.asarray(big.apply(state.weights, DATA.x)), models.from_linen(Normed()).apply(weights, DATA.x))
    np.testing.assert_allclose(logits[:, :K], small, rtol=1e-5, atol=1e-6)


# --- layers ------------------------------------------------------------------------------------------------------


def heads(model, x):
    """The first name of every layer; weights are shapes until now, which is all that is looked at."""
    shapes = jax.eval_shape(model.init, KEY, x)
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    found = models.layers(*models.freeze(model, weights), x)
    assert sorted(name for group in found for name in group) == sorted(models.tree.names(weights.params))
    return [[name.rpartition("/")[0] for name in group if name.endswith(("kernel", "scale"))] for group in found]


def test_layers_of_linen():
    found = heads(models.from_linen(nets.cnn(3, (4, 8))), jnp.zeros((1, 8, 8, 1)))
    assert found == [["Conv_0", "BatchNorm_0"], ["Conv_1", "BatchNorm_1"], ["Dense_0"]]
    for depths, shortcuts in (((2, 2, 2, 2), (2, 4, 6)), ((1, 11, 2), (1, 12))):
        wanted = [["Conv_0", "BatchNorm_0"]]
        for block in range(sum(depths)):
            for i in range(3 if block in shortcuts else 2):
                wanted.append([f"BasicBlock_{block}/Conv_{i}", f"BasicBlock_{block}/BatchNorm_{i}"])
        found = heads(models.from_linen(nets.ResNet(3, depths, 2)), jnp.zeros((1, 8, 8, 1)))
        assert found == [*wanted, ["Dense_0"]]


class Names(nnx.Module):  # in alphabetical order the last comes first
    def __init__(self, rngs):
        self.zeta, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(11)])
        self.alpha = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.zeta(x.reshape(len(x), -1)))
        for block in self.blocks:
            x = block(x)
        return self.alpha(x)


def test_layers_of_nnx():
    wanted = [["zeta", "norm"], *([f"blocks/{i}"] for i in range(11)), ["alpha"]]
    assert heads(models.from_nnx(lambda rngs: Names(rngs)), jnp.zeros((1, 2, 2, 1))) == wanted


FLAT = {"a": np.zeros((5, K)), "b": np.zeros(5), "c": np.zeros(K), "z": np.zeros((4, 5))}


def flat(p, x):
    return jnp.tanh(x.reshape(len(x), -1) @ p["z"] + p["b"]) @ p["a"] + p["c"]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["bare", "jit", "remat"])
def test_layers_of_a_bare_function(wrap):
    found = models.layers(wrap(flat), jax.tree.map(jnp.asarray, FLAT), DATA.x[:1])
    assert found == [["z", "b"], ["a", "c"]]


# --- keeping and going back --------------------------------------------------------------------------------------


def test_keeping_stores_every_epoch():
    plain = unlearn.scrub(MODEL, DECAYED, batches=(2, 9), forget_rounds=1)  # 3 and 2 steps, then 2
    method = unlearn.keeping(plain, 3)
    assert method.steps(6, 18, 3) == 9
    state, _ = run(method, 9)
    for epoch, steps in ((0, 5), (2, 9)):
        np.testing.assert_array_equal(state.kept.params["w"][epoch], run(plain, steps)[0].weights.params["w"])
    assert len(np.unique(np.asarray(state.kept.params["w"])[:, 0, 0])) == 3
    same(method.finish(state), state.inner.weights)


def kept(errors, wrong_held_out, rounds):
    """Networks that err on so many of eight forgotten examples, the last one finished on so many of eight held out."""
    data, _, model, _ = own_rows(16, 8)
    right = np.eye(K, dtype=np.float32)[np.asarray(data.y)]
    stack = np.stack([np.where((np.arange(16) < n)[:, None], -right, right) for n in errors])
    last = stack[min(rounds, len(errors)) - 1]
    last[8 : 8 + wrong_held_out] *= -1
    inner = unlearn.finetune(model, SGD).init(KEY, of(stack[-1]), data, np.arange(16) < 8)
    state = KeptState(inner._replace(round=jnp.asarray(rounds)), of(stack))
    method = unlearn.keeping(unlearn.finetune(model, SGD), len(errors))
    return model, method, state, sets.select(data, np.arange(16) < 8), sets.select(data, np.arange(16) >= 8)


@pytest.mark.parametrize(
    ("errors", "held_out", "rounds", "epoch"),
    [
        ([0, 2, 5, 7], 5, 4, 3),
        ([8, 6, 3, 1], 3, 4, 3),
        ([0, 3, 5, 7], 1, 4, 1),
        ([0, 2, 5, 5], 5, 2, 2),  # two epochs have ended
        ([1, 1, 1, 8], 8, 4, 4),
    ],
)
def test_rewind_goes_to_the_right_epoch(errors, held_out, rounds, epoch):
    model, method, state, forgotten, unseen = kept(errors, held_out, rounds)
    found = unlearn.rewind(model, method, state, forgotten, unseen)
    assert found.epoch == epoch
    np.testing.assert_allclose(found.forget_errors, np.asarray(errors[:rounds]) / 8, atol=1e-6)
    assert found.held_out_error == pytest.approx(held_out / 8)
    np.testing.assert_array_equal(found.weights.params["w"], state.kept.params["w"][epoch - 1])


# --- bad input ---------------------------------------------------------------------------------------------------

REFUSED = {
    "a weight of the retain set of 1": lambda: unlearn.negative_gradient(MODEL, retain=1.0),
    "a weight of the retain set of 0": lambda: unlearn.negative_gradient(MODEL, retain=0.0),
    "an unknown teacher": lambda: unlearn.descent(MODEL, SGD, unlearn.Term("retain", teacher="old")),
    "no stage for the second round": lambda: unlearn.descent(MODEL, SGD, unlearn.Stage((term(),), rounds=1)),
    "a stage without terms": lambda: unlearn.descent(MODEL, SGD, unlearn.Stage(())),
    "terms beside stages": lambda: unlearn.descent(MODEL, SGD, term(), unlearn.Stage((term(),))),
    "a share of nothing": lambda: unlearn.descent(MODEL, SGD, unlearn.Stage((term(),), share=0.0)),
    "a stage over both": lambda: unlearn.descent(MODEL, SGD, unlearn.Stage((term(),), "both")),
    "a salient share of 0": lambda: unlearn.salun(MODEL, classes=K, share=0.0),
    "a salient share above 1": lambda: unlearn.salun(MODEL, classes=K, share=1.1),
    "a teacher's share": lambda: unlearn.bad_teacher(MODEL, share=0.0),
    "noise alone": lambda: unlearn.unsir(MODEL, noisy=1.0),
    "no noise": lambda: unlearn.unsir(MODEL, images=0),
    "one class": lambda: unlearn.random_labels(MODEL, classes=1),
    "no radius": lambda: unlearn.boundary_shrink(MODEL, radius=0.0),
    "no beta": lambda: unlearn.npo(MODEL, beta=0.0),
    "an unknown hold": lambda: unlearn.npo(MODEL, hold="l2"),
    "no strength": lambda: unlearn.l1_sparse(MODEL, strength=0.0, steps=3),
    "no forget round": lambda: unlearn.scrub(MODEL, forget_rounds=0),
    "no layer": lambda: unlearn.catastrophic_forgetting(MODEL, layers=0),
    "no epoch to keep": lambda: unlearn.keeping(unlearn.finetune(MODEL), 0),
    "too many layers": lambda: unlearn.exact_last_layers(DEEP, layers=3).init(KEY, DEEP.init(KEY, DATA.x), DATA, FORGET),
    "a network as wide": lambda: unlearn.boundary_expand(MODEL, MODEL, classes=K).init(KEY, of(GIVEN), DATA, FORGET),
    "a network wider by two": lambda: unlearn.boundary_expand(MODEL, linear(5), classes=K).init(KEY, of(GIVEN), DATA, FORGET),
    "another network": lambda: unlearn.boundary_expand(MODEL, DEEP, classes=K).init(KEY, of(GIVEN), DATA, FORGET),
    "nothing to forget": lambda: unlearn.scrub(MODEL).init(KEY, of(GIVEN), DATA, np.zeros(N, bool)),
    "everything to forget": lambda: unlearn.keeping(unlearn.npo(MODEL), 2).init(KEY, of(GIVEN), DATA, np.ones(N, bool)),
    "a mask of another length": lambda: unlearn.unsir(MODEL).init(KEY, of(GIVEN), DATA, FORGET[1:]),
    "a mask of numbers": lambda: unlearn.salun(MODEL, classes=K).init(KEY, of(GIVEN), DATA, FORGET.astype(int)),
    "no epoch to go back to": lambda: unlearn.rewind(*kept([1, 1], 1, 0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(BadInput):
        REFUSED[name]()
