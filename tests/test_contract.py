"""What every Method keeps: deterministic in the key, stable under scan, one trace, vmappable, restorable."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kinds import some
from small_recipes import RECIPES, network

from dememo_jax import adapters, audit, checkpoint, data, likelihood, losses, models, nets, projected, train, unlearn

MODEL = models.from_linen(nets.cnn(3, (4, 8)))
TX = optax.sgd(0.05, momentum=0.9)
KEY = jax.random.key(0)
SMALL, WIDER = network(3)[0], network(4)[0]
AVERAGED = optax.contrib.schedule_free_sgd(0.5)
BARE = models.from_apply(  # with a running mean and noise for dropout
    lambda key, x: {"w": jnp.full((x[0].size, 3), 0.1, jnp.float32)},
    lambda params, mean, x: (x.reshape(len(x), -1) - mean) @ params["w"],
    fit=lambda params, mean, x, key: (
        (x.reshape(len(x), -1) + 0.1 * jax.random.normal(key, (len(x), x[0].size))) @ params["w"],
        0.9 * mean + 0.1 * x.mean(),
    ),
    stats=lambda key, x: jnp.zeros(()),
)


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    return data.make(random.random((24, 8, 8, 1), np.float32), np.arange(24) % 3)


def unlearned(recipe):
    method = recipe(MODEL, TX, batch=8)
    return method, lambda key, d: method.init(key, MODEL.init(key, d.x[:1]), d, d.y == 1)


def forgotten(recipe, *args, batches=None, **how):
    """On a network quick to compile, since there are many."""
    method = recipe(SMALL, *args, TX, **({"batch": 8} if batches is None else {"batches": batches}), **how)
    return method, lambda key, d: method.init(key, SMALL.init(key, d.x[:1]), d, d.y == 1), None


def learned(method):
    return method, lambda key, d: method.init(key, d.x[:1])


def noise(recipe):
    return recipe, lambda key, d: recipe.init(key, d, d.y < 2)


def attacked(**how):
    method = audit.attack(MODEL, TX, **how)
    return method, lambda key, d: method.init(MODEL.init(key, d.x[:1]), 0.3)


def within():
    inner = train.sgd(MODEL, TX)
    method = projected.within(inner)
    return method, lambda key, d: method.init(inner.init(key, d.x[:1]), 0.3)


def certified(recipe, **how):
    method = recipe(SMALL, clip_init=0.5, sigma=0.1, **how)
    return method, lambda key, d: method.init(key, SMALL.init(key, d.x[:1]), d, d.y == 1), None


# name -> (method, init(key, data), batch or None for the whole set)
METHODS = {
    "train.sgd": (*learned(train.sgd(MODEL, TX)), 8),
    "train.sgd polyak": (*learned(train.sgd(SMALL, optax.polyak_sgd(0.1))), 8),  # looks at the loss
    "train.sgd schedule-free": (*learned(train.sgd(SMALL, AVERAGED, eval_params=optax.contrib.schedule_free_eval_params)), 8),
    "train.sgd bare functions": (*learned(train.sgd(BARE, TX)), 8),
    "train.sgd frozen": (*learned(train.sgd(MODEL, TX, mode="frozen")), 8),
    "projected.within": (*within(), 8),
    "audit.attack": (*attacked(), 8),
    "audit.attack only": (*attacked(only="Dense"), 8),
    "train.weight_noise": (*learned(train.weight_noise(MODEL, TX, sigmas=(0.0, 0.1), draws=2)), 8),
    **{f"protect {name}": (*noise(recipe), None) for name, recipe in RECIPES.items()},
    "unlearn.retrain": (*unlearned(unlearn.retrain), None),
    "unlearn.finetune": (*unlearned(unlearn.finetune), None),
    "unlearn.gradient_ascent": (*unlearned(unlearn.gradient_ascent), None),
    "unlearn.negative_gradient": forgotten(unlearn.negative_gradient),
    "unlearn.l1_sparse": forgotten(unlearn.l1_sparse, steps=4),
    "unlearn.npo": forgotten(unlearn.npo),
    "unlearn.npo kl": forgotten(unlearn.npo, hold="kl"),
    "unlearn.npo alone": forgotten(unlearn.npo, retain=0),
    "unlearn.random_labels": forgotten(unlearn.random_labels, classes=3),
    "unlearn.salun": forgotten(unlearn.salun, classes=3),
    "unlearn.scrub": forgotten(unlearn.scrub, batches=(8, 8)),
    "unlearn.bad_teacher": forgotten(unlearn.bad_teacher),
    "unlearn.boundary_shrink": forgotten(unlearn.boundary_shrink),
    "unlearn.boundary_expand": forgotten(unlearn.boundary_expand, WIDER, classes=3),
    "unlearn.unsir": forgotten(unlearn.unsir, images=4, noise_steps=2),
    "unlearn.catastrophic_forgetting": forgotten(unlearn.catastrophic_forgetting),
    "unlearn.exact_last_layers": forgotten(unlearn.exact_last_layers),
    "unlearn.keeping scrub": forgotten(lambda *args, **how: unlearn.keeping(unlearn.scrub(*args, **how), 2), batches=(8, 8)),
    "unlearn.noisy_descent": certified(unlearn.noisy_descent, lr=lambda t: 0.1 / (1.0 + t), clip_grad=0.2, batch=8),
    "unlearn.noisy_model_clipping": certified(unlearn.noisy_model_clipping, lr=0.1, clip_model=0.5, sigma_init=0.1, batch=8),
    "unlearn.output_perturbation": certified(unlearn.output_perturbation),
}


# --- on text, of the whole network and of an adapter -----------------------------------------------------------

DECODER = likelihood.of_labels(models.from_linen(nets.Decoder(12, 8, 1, 2, 1, 12)), ((3,), (7,), (4,)))


def on_text(model):
    nll, descents = losses.label_nll, {}
    recipes = {"retrain": unlearn.retrain, "finetune": unlearn.finetune, "gradient_ascent": unlearn.gradient_ascent}
    for name, recipe in (recipes | {"npo": unlearn.npo, "npo kl": unlearn.npo}).items():
        descents[name] = recipe(model, TX, nll=nll, batch=8, **({"hold": "kl"} if name == "npo kl" else {}))
    descents["simnpo"] = unlearn.simnpo(model, TX, nll=nll, lengths=(1, 1, 1), batch=8)
    descents["noisy"] = unlearn.noisy_descent(model, clip_init=0.5, sigma=0.1, lr=0.1, clip_grad=0.2, batch=8, loss=nll)
    found = {
        name: (method, lambda key, d, method=method: method.init(key, model.init(key, d.x[:1]), d, d.y == 1), None)
        for name, method in descents.items()
    }
    attack = audit.attack(model, TX, loss=nll)
    return found | {
        "train.sgd": (*learned(train.sgd(model, TX, loss=nll)), 8),
        "attack": (attack, lambda key, d: attack.init(model.init(key, d.x[:1]), 0.3), 8),
    }


@pytest.fixture(scope="module")
def texts():
    return data.rows(np.random.default_rng(0).integers(1, 12, (24, 5)).astype(np.int32), np.arange(24) % 3)


QUICK_ON_TEXT = ("npo adapter",)
ALL_ON_TEXT = [f"{name}{kind}" for kind in ("", " adapter") for name in on_text(DECODER)]


@pytest.mark.parametrize("name", some(ALL_ON_TEXT, QUICK_ON_TEXT))
def test_contract_on_text(name, texts, tmp_path):
    model = DECODER
    if name.endswith(" adapter"):
        model = adapters.lora(model, model.init(KEY, texts.x[:1]), rank=2, only="query|out")
    keeps(*on_text(model)[name.removesuffix(" adapter")], texts, tmp_path)


QUICK = (
    "train.sgd frozen", "audit.attack", "protect ue-s", "protect tue", "unlearn.npo", "unlearn.scrub", "unlearn.noisy_descent",
)  # fmt: skip


@pytest.mark.parametrize("name", some(METHODS, QUICK))
def test_contract(name, examples, tmp_path):
    keeps(*METHODS[name], examples, tmp_path)


def keeps(method, init, batch, examples, tmp_path):
    chex.clear_trace_counter()  # it counts by name, and every step is called step
    like = jax.eval_shape(lambda key: init(key, examples), KEY)
    state = jax.jit(init)(KEY, examples)
    chex.assert_trees_all_equal_shapes_and_dtypes(like, state)
    given = examples if batch is None else data.uniform(jax.random.key(1), 0, examples, batch)
    step = jax.jit(chex.assert_max_traces(method.step, n=1))
    new, info = step(jax.random.key(2), state, given)
    again, _ = step(jax.random.key(2), state, given)
    chex.assert_trees_all_equal(new, again)  # deterministic in the key
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)  # stable under scan
    step(jax.random.key(3), new, given)  # no retrace
    assert info
    assert all(jnp.isfinite(value).all() for value in info.values())
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), new, state))
    assert any(moved)  # a step that changes nothing would pass all the rest
    many, _ = jax.eval_shape(jax.vmap(lambda key: method.step(key, state, given)), jax.random.split(jax.random.key(3), 3))
    assert jax.tree.leaves(many)[0].shape[0] == 3
    checkpoint.save(tmp_path, 0, new)
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 0, like).state, new)
