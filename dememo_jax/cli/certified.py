"""Certified unlearning as a run: calibrate, take the noisy steps, train on freely, and say what is promised."""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import checkpoint, files, keys, loop, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import identity, networks, runs
from dememo_jax.cli.forgetting import Job, chunk
from dememo_jax.errors import require
from dememo_jax.report import Table
from dememo_jax.types import CertifiedMethod, Key, Method, Params, Weights

NOT_ALL = "The promise is about the weights: this folder also tells how the model did before, which is not for publication."
PROTECTED = (
    "the protective noise of this run's data does not depend on the forgotten examples: noise that was made on the whole set "
    "does, and then the comparator sees retained examples that know of them, and is not training without them"
)
SECRET = "noise.key"  # while a run lasts, so that it can be resumed; its owner's alone


def make(job: Job) -> tuple[CertifiedMethod, dict[str, Any]]:
    """The method, calibrated, and its numbers; BadInput for what cannot be certified."""
    config = job.config
    epsilon, steps = job.get("epsilon", 1.0), 1 if config.method == "output-noise" else job.get("steps", 10)
    unlearn.check_network(job.base.model, job.base.weights, job.base.train.x[:1])
    known: dict[str, Any] = {"clip_init": job.get("clip_init", 0.01), "comparator": config.comparator}
    numbers: dict[str, Any] = {"epsilon": epsilon, "delta": config.delta, "steps": steps, **known}
    augment = networks.augmentation(job.base.trained["augment"])
    often: dict[str, Any] = {"batch": job.batch, "augment": augment, "loss": job.base.loss}
    moves: dict[str, Any] = {"lr": job.lr, "weight_decay": job.get("noise_decay", 0.0)}
    if config.method == "noisy":
        moves |= {"clip_grad": job.get("clip_grad", 1.0)}
        sigma = unlearn.calibrate(epsilon, config.delta, steps=steps, **moves, **known)
        method = unlearn.noisy_descent(job.base.model, sigma=sigma, delta=config.delta, **moves, **known, **often)
    elif config.method == "noisy-clip":
        clip = job.get("clip_model", 0.1)
        sigma = unlearn.calibrate_model_clipping(
            epsilon, config.delta, steps=steps, clip_model=clip, comparator=config.comparator
        )
        moves |= {"clip_model": clip}
        method = unlearn.noisy_model_clipping(job.base.model, sigma=sigma, epsilon=epsilon, **moves, **known, **often)
    else:
        moves = {}
        sigma = unlearn.calibrate(epsilon, config.delta, steps=1, lr=0.0, clip_grad=0.0, **known)
        method = unlearn.output_perturbation(job.base.model, sigma=sigma, delta=config.delta, **known)
    return method, numbers | moves | {"sigma": sigma}


def run(
    job: Job, method: CertifiedMethod, numbers: dict, record: Callable[[Weights], dict]
) -> tuple[Weights, list[dict], dict, Table]:
    """Weights after the noise and the free training, accuracies on the way, what is promised, and a table of it."""
    config, base, key = job.config, job.base, _secret(job.config.run, job.config.noise_seed)
    centre = _centre(job)
    steps, seconds = numbers["steps"], config.checkpoint_seconds
    state, _ = runs.resumable(
        config.run, Method(method.init, method.step), key, (key, base.weights, base.seen, job.mask, centre), base.seen,
        title=_noise(config.run), steps=steps, every=chunk(steps, 10), seconds=seconds,
        record=lambda state, info: {"gradient_norm": float(np.mean(info["gradient_norm"]))} if "gradient_norm" in info else {},
    )  # fmt: skip
    weights = unlearn.released(base.model, state.weights, base.seen, job.mask)
    history = [record(weights)]
    if job.epochs:
        (tuned, total), public = _freely(job), jax.random.key(config.seed)
        last, after = runs.resumable(
            config.run, Method(tuned.init, tuned.step), public, (public, weights, base.seen, job.mask), base.seen,
            title=f"train on {config.run.name}", steps=total, every=chunk(total, job.epochs), seconds=seconds,
            record=lambda state, info: record(state.weights),
        )  # fmt: skip
        weights, history = last.weights, history + after
    guarantee = method.guarantee(steps)
    assumptions = guarantee.assumptions
    if base.perturbation is not None:
        assumptions = tuple(PROTECTED if line == unlearn.INDEPENDENT else line for line in assumptions)
    if config.noise_seed is not None:
        seeded = f"the noise was drawn from the seed {config.noise_seed}: nothing holds against who knows it"
        assumptions = tuple(seeded if "noise key is secret" in line else line for line in assumptions)
    promised = {
        **numbers, "epsilon": guarantee.epsilon, "delta": guarantee.delta, "mu": guarantee.mu, "assumptions": assumptions,
        "words": unlearn.in_words(guarantee), "free_epochs": job.epochs,
    }  # fmt: skip
    names = ("epsilon", "delta", "mu", "sigma", "steps", "comparator")
    table = Table(
        "Guarantee",
        names,
        ((promised["epsilon"], f"{promised['delta']:.3g}", *(promised[n] for n in names[2:])),),
        f"{promised['words']} Provided that: {'; '.join(assumptions)}. {NOT_ALL}",
    )
    return weights, history, promised, table


def once(job: Job, method: CertifiedMethod, numbers: dict, key: Key) -> Weights:
    """The same in one go, with a key that is given: for the audit, which does it to many models."""
    base = job.base
    state = method.init(key, base.weights, base.seen, job.mask, _centre(job))
    state, _ = _scan(Method(method.init, method.step), key, state, base.seen, steps=numbers["steps"])
    weights = unlearn.released(base.model, state.weights, base.seen, job.mask)
    if job.epochs:
        tuned, total = _freely(job)
        state = tuned.init(key, weights, base.seen, job.mask)
        weights = tuned.finish(_scan(tuned, key, state, base.seen, steps=total)[0])
    return weights


_scan = jax.jit(loop.scan, static_argnames=("method", "steps"))


def _freely(job: Job) -> tuple[unlearn.Unlearner, int]:
    """The free training after the noise, and its steps."""
    total = sets.steps(job.counts[1], job.batch, job.epochs)
    return job.descend(unlearn.finetune, job.usual(total, job.base.trained["lr"])), total


def forget_key(folder: Path) -> None:
    """The run is over: nobody needs the key of its noise any more."""
    (folder / SECRET).unlink(missing_ok=True)


def _secret(folder: Path, seed: int | None) -> Key:
    """A fresh key from the operating system, the same one for a run that is resumed; or that of a seed, which is no secret.

    Raises BadInput for a key that is not as it was written, or is gone although noise was drawn from it.
    """
    if seed is not None:
        return keys.named(jax.random.key(seed), "noise")
    path, kept = folder / SECRET, folder / runs.CHECKPOINTS
    lost = "and the noise already added cannot be continued; choose another --run"
    if not path.exists():
        require(not checkpoint.steps(kept / _noise(folder).replace(" ", "-")), f"{path} is missing, {lost}")
        kept.mkdir(mode=0o700, exist_ok=True)  # the order of the batches follows from the key, and lies in there
        part = path.with_suffix(files.PART)  # a whole key or none, whenever this process dies
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            text = secrets.token_hex(8)
            file.write(f"{text} {identity.digest(text.encode())}")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    text, _, sum_ = path.read_bytes().decode(errors="replace").strip().partition(" ")
    whole = re.fullmatch("[0-9a-f]{16}", text) and sum_ in ("", identity.digest(text.encode()))  # older runs wrote no digest
    require(whole, f"{path} is damaged, {lost}")
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(bytes.fromhex(text), np.uint32)))


def _noise(folder: Path) -> str:
    """What the noisy steps are called, on the terminal and among the checkpoints."""
    return f"noise {folder.name}"


def _centre(job: Job) -> Params:
    """A fresh initialisation, of a seed that knows no data, or zero."""
    fresh = job.base.model.init(keys.named(jax.random.key(job.config.seed), "centre"), job.base.train.x[:1]).params
    return jax.tree.map(np.zeros_like, fresh) if job.config.centre == "zero" else fresh
