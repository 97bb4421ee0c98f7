"""Unlearning by descent: one engine that minimises weighted retain and forget losses; recipes inject the rest."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dememo_jax import data as sets
from dememo_jax import keys, losses, train
from dememo_jax.augment import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Info, Key, Model, Params, Weights

GIVEN, FRESH = "given", "fresh"  # teachers: the weights to unlearn, a random network


class Progress(NamedTuple):
    """Where a run stands, for weights that change or depend on the sets: whole numbers, traced."""

    step: Array
    round: Array
    forget: Array  # examples
    retain: Array


Relabel = Callable[[Key, Weights, Dataset], Array]  # (key, the given weights, batch) -> labels [B]
Draw = Callable[[Key, Array, Any, Dataset, int], Dataset]  # (key, number of the batch, state, data, batch size) -> batch
TermLoss = Callable[..., Array]  # (logits, labels) -> [B]; with a teacher (logits, labels, the teacher's logits) -> [B]


class Term(NamedTuple):
    """One summand of the objective: `weight` times the mean `loss` of a batch."""

    on: str | Draw  # whose shuffled passes the batches come from, "retain" or "forget"; or a sampler
    weight: float | Callable[[Progress], Array] = 1.0
    loss: TermLoss = losses.cross_entropy
    teacher: str | None = None  # whose logits, in evaluation mode, the loss gets as well: "given" or "fresh"
    relabel: Relabel | None = None  # labels other than the examples' own
    batch: int | None = None  # size, where it differs from the method's


class Stage(NamedTuple):
    """Terms that are minimised together for a `share` of a pass `over` the retain or the forget set."""

    terms: tuple[Term, ...]
    over: str = "retain"
    share: float = 1.0
    rounds: int | None = None  # only in the first so many rounds


class DescentState(NamedTuple):
    weights: Weights
    opt: Any
    forget: Array  # [N] bool
    order: Key
    step: Array
    round: Array
    stage: Array  # place in the round
    place: Array  # step in the stage
    drawn: Array  # batches that each term has had, [terms]
    latest: Array  # the last loss of each term, [terms]
    teachers: dict[str, Weights]
    trainable: Params | None  # True where the weights may move
    extra: Any


class Unlearner(NamedTuple):
    """A Method over the whole set that knows its epochs, and how its last state becomes the weights to use."""

    init: Callable[..., Any]  # key, weights, data, forget [N] -> state
    step: Callable[[Key, Any, Dataset], tuple[Any, Info]]
    steps: Callable[[int, int, int], int]  # examples to forget, examples to retain, epochs -> steps
    finish: Callable[[Any], Weights]
    check: Callable[[Any, Dataset], None] | None = None


def descent(
    model: Model,
    tx: optax.GradientTransformation,
    *parts: Term | Stage,
    batch: int = 256,
    mode: str = "fit",
    augment: Augment | None = None,
    fresh: bool = False,
    trainable: Callable[[Key, Weights, Dataset, Array], Params] | None = None,
    penalty: Callable[[Params, Array], Array] | None = None,
    prepare: Callable[[Key, Weights, Dataset, Array], Any] | None = None,
    eval_params: train.EvalParams | None = None,
) -> Unlearner:
    """Descend through the stages in turn, round after round; a round is what the recipes call an epoch.

    parts: stages, or terms that make one stage over the retain set (over the forget set when no term looks at another).
    Every term walks through its own set in shuffled passes, so a small forget set is never starved; terms of one stage
    are minimised in one step. Batch norm is updated on the batches in the order of the terms (`mode="fit"`, as
    published) or left as it is (`"frozen"`).

    trainable(key, weights, data, forget): a tree of booleans, each broadcast to its leaf; weights where it is False
    never move, whatever weight decay and momentum want. fresh: begin at `model.init` wherever weights may move.
    penalty(params, step): added to the objective. prepare(key, weights, data, forget): arrays kept in `state.extra` for
    samplers. eval_params: of `train.result`, for `finish(state)`.

    init(key, weights, data, forget): `forget` is a mask [N] over `data`. step(key, state, data) gets the whole set. Info:
    the mean loss of each term, unweighted, such as `retain_loss`, numbered where several share a name; a term whose
    stage is not at work shows its last value, 0 before its first.
    step raises BadInput, while tracing, for data of another length than the mask: a batch, say.
    init raises BadInput for a forget mask of another length or type, and outside jit for one that is empty or covers all data.
    """
    stages = _stages(parts)
    terms = tuple(term for stage in stages for term in stage.terms)
    teachers = {term.teacher for term in terms if term.teacher} | {GIVEN for term in terms if term.relabel}
    require(teachers <= {GIVEN, FRESH}, f"a teacher is {GIVEN!r} or {FRESH!r}, got {sorted(teachers)}")
    sizes = tuple(batch if term.batch is None else term.batch for term in terms)
    require(min(batch, *sizes) >= 1, f"a batch needs at least one example, got {min(batch, *sizes)}")
    require(mode in ("fit", "frozen"), f"mode must be 'fit' or 'frozen', got {mode!r}")
    plan = _Plan(model, tx, stages, terms, sizes, batch, mode, augment, penalty)

    def init(key: Key, weights: Weights, data: Dataset, forget: Array) -> DescentState:
        forget, zero = jnp.asarray(sets.check_forget(forget, len(data.y))), jnp.zeros((), jnp.int32)
        moving = None if trainable is None else trainable(keys.named(key, "trainable"), weights, data, forget)
        extra = () if prepare is None else prepare(keys.named(key, "prepare"), weights, data, forget)
        known = {GIVEN: lambda: weights, FRESH: lambda: model.init(keys.named(key, "teacher"), data.x[:1])}
        shown = {name: known[name]() for name in sorted(teachers)}
        if fresh:
            random = model.init(keys.named(key, "weights"), data.x[:1])
            weights = random if moving is None else weights._replace(params=_where(moving, random.params, weights.params))
        counts, values = jnp.zeros(len(terms), jnp.int32), jnp.zeros(len(terms))
        opt, order = train.begun(tx, weights, eval_params), keys.named(key, "order")
        return DescentState(weights, opt, forget, order, zero, zero, zero, zero, counts, values, shown, moving, extra)

    def step(key: Key, state: DescentState, data: Dataset) -> tuple[DescentState, Info]:
        return _step(plan, key, state, data)

    finish = partial(train.result, eval_params=eval_params)
    return Unlearner(init, step, partial(_total, plan), finish, train.label_check(model, augment))


# --- a step ------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What every step of a method knows."""

    model: Model
    tx: optax.GradientTransformation
    stages: tuple[Stage, ...]
    terms: tuple[Term, ...]  # of all stages
    sizes: tuple[int, ...]  # of the batches of each
    batch: int
    mode: str
    augment: Augment | None
    penalty: Callable[[Params, Array], Array] | None


def _step(plan: _Plan, key: Key, state: DescentState, data: Dataset) -> tuple[DescentState, Info]:
    whole, given = len(state.forget), len(data.y)
    require(given == whole, f"expected the whole set of {whole} examples, got {given}: drive this method without batch=")
    forgotten = state.forget.sum()
    progress = Progress(state.step, state.round, forgotten, len(state.forget) - forgotten)
    belongs = [n for n, stage in enumerate(plan.stages) for _ in stage.terms]
    objectives = [
        _objective(plan, [i for i, m in enumerate(belongs) if m == n], key, state, data, progress)
        for n in range(len(plan.stages))
    ]

    def at_work(functions):
        # A single stage needs no switch, and a switch in a vmap would compute every branch.
        return functions[0] if len(functions) == 1 else partial(jax.lax.switch, state.stage, functions)

    gradients = [jax.value_and_grad(objective, has_aux=True) for objective in objectives]
    (value, (stats, latest)), grads = at_work(gradients)(state.weights.params)
    weights = state.weights._replace(stats=stats)
    weights, opt = train.update(plan.tx, grads, state.opt, weights, value, lambda params: at_work(objectives)(params)[0])
    if state.trainable is not None:  # last of all, so that neither decay nor momentum moves the others
        weights = weights._replace(params=_where(state.trainable, weights.params, state.weights.params))
    drawn = state.drawn + (jnp.asarray(belongs) == state.stage)
    state = state._replace(weights=weights, opt=opt, step=state.step + 1, drawn=drawn, latest=latest)
    return _advance(plan, state, progress), dict(zip(_names(plan.terms), latest))


def _objective(plan: _Plan, at_work: list[int], key: Key, state: DescentState, data: Dataset, progress: Progress):
    """`params -> ` the weighted sum of some of the terms, and with it the new statistics and the latest loss of every term."""

    def objective(params):
        weights, total, latest = state.weights._replace(params=params), jnp.zeros(()), state.latest
        for i in at_work:
            value, weights = _value(plan, i, key, state, data, weights)
            weight = plan.terms[i].weight
            total += (weight(progress) if callable(weight) else weight) * value
            latest = latest.at[i].set(value)
        return total if plan.penalty is None else total + plan.penalty(params, state.step), (weights.stats, latest)

    return objective


def _value(plan: _Plan, i: int, key: Key, state: DescentState, data: Dataset, weights: Weights) -> tuple[Array, Weights]:
    """The mean loss of term i on its next batch, and the weights with the statistics after it."""
    term, to_draw = plan.terms[i], keys.at(state.order, i)
    to_augment, to_fit = jax.random.split(keys.at(key, i))
    if callable(term.on):
        examples = term.on(to_draw, state.drawn[i], state, data, plan.sizes[i])
    else:
        mask = state.forget if term.on == "forget" else ~state.forget
        examples = sets.shuffled(to_draw, state.drawn[i], data, plan.sizes[i], mask)
    x = examples.x if plan.augment is None else plan.augment(to_augment, examples.x)
    labels = examples.y
    if term.relabel is not None:
        labels = term.relabel(keys.named(to_augment, "relabel"), state.teachers[GIVEN], examples._replace(x=x))
    logits, weights = train.forward(plan.model, plan.mode, weights, x, to_fit)
    if term.teacher is None:
        return term.loss(logits, labels).mean(), weights
    shown = jax.lax.stop_gradient(plan.model.apply(state.teachers[term.teacher], x))
    return term.loss(logits, labels, shown).mean(), weights


# --- stages ------------------------------------------------------------------------------------------------------


def _stages(parts: tuple[Term | Stage, ...]) -> tuple[Stage, ...]:
    terms = tuple(part for part in parts if isinstance(part, Term))
    stages = tuple(part for part in parts if isinstance(part, Stage))
    require(parts and len(parts) in (len(terms), len(stages)), "give terms, or stages of terms, at least one and not both")
    if terms:
        stages = (Stage(terms, "forget" if {term.on for term in terms} == {"forget"} else "retain"),)
    require(any(stage.rounds is None for stage in stages), "at least one stage must be in every round")
    for stage in stages:
        require(stage.over in ("retain", "forget"), f"a stage goes over 'retain' or 'forget', got {stage.over!r}")
        require(stage.share >= 0.001, f"the share of a pass must be at least 0.001, got {stage.share}")
        require(stage.rounds is None or stage.rounds >= 1, f"a stage must be in a round or more, got {stage.rounds}")
        sides = [term.on for term in stage.terms]
        good = sides and all(callable(side) or side in ("retain", "forget") for side in sides)
        require(good, f"need terms on 'retain' or 'forget', got {sides}")
    return stages


def _names(terms: tuple[Term, ...]) -> list[str]:
    base = [term.on if isinstance(term.on, str) else getattr(term.on, "__name__", "drawn").strip("_") for term in terms]
    return [f"{name}_loss" + f"_{i}" * (base.count(name) > 1) for i, name in enumerate(base)]


def _where(mask: Params, one: Params, other: Params) -> Params:
    return jax.tree.map(jnp.where, mask, one, other)


def _lengths(plan: _Plan, forget, retain) -> list:
    """Steps of each stage; of whole numbers or of traced ones."""
    lengths, first = [], 0
    for stage in plan.stages:
        own = [s for s, term in zip(plan.sizes[first:], stage.terms) if term.on == stage.over]
        size, count = own[0] if own else plan.batch, retain if stage.over == "retain" else forget
        thousandths = round(1000 * stage.share)  # whole numbers, the same on the host and in a program
        lengths.append(-(-(-(-count // size) * thousandths) // 1000))
        first += len(stage.terms)
    return lengths


def _advance(plan: _Plan, state: DescentState, progress: Progress) -> DescentState:
    """One step further; at the end of a stage on to the next that is in this round, or to the next round."""
    lengths = jnp.stack([jnp.asarray(n, jnp.int32) for n in _lengths(plan, progress.forget, progress.retain)])
    place = state.place + 1
    over = place >= lengths[state.stage]
    until = jnp.asarray([jnp.iinfo(jnp.int32).max if stage.rounds is None else stage.rounds for stage in plan.stages])
    numbers = jnp.arange(len(plan.stages))
    later = (numbers > state.stage) & (state.round < until)
    new_round = ~later.any()
    following = jnp.where(new_round, jnp.argmax(state.round + 1 < until), jnp.argmax(later))
    return state._replace(
        place=jnp.where(over, 0, place),
        stage=jnp.where(over, following, state.stage).astype(jnp.int32),
        round=state.round + (over & new_round),
    )


def _total(plan: _Plan, forget: int, retain: int, epochs: int) -> int:
    lengths = [int(n) for n in _lengths(plan, forget, retain)]
    return sum(n * (epochs if stage.rounds is None else min(epochs, stage.rounds)) for n, stage in zip(lengths, plan.stages))
