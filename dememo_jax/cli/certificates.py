"""What a certificate says, in tables, plots and plain words."""

from dataclasses import dataclass

from dememo_jax import certify
from dememo_jax.cli.configs import Certify
from dememo_jax.report import Cell, Plot, Section, Table

THIS, CONTROL = "this model", "clean control"
ABSTAINS = "abstains (n): the draws do not support a bound there; n draws would."


@dataclass(frozen=True)
class Lengths:
    """What eta is held against, in its own units: l2 over the noised leaves, or standard deviations of their noise."""

    weights: float | None = None  # length of the weights
    moved: float | None = None  # distance from the weights before unlearning; None where it is not known, or not all noised


def shown(bound: float | None, needed: int | None) -> Cell:
    """A bound, or the abstention with the number of draws that would end it."""
    return bound if bound is not None else f"abstains ({'no count' if needed is None else f'{needed:,}'})"


def _cell(row: certify.Row, side: str) -> Cell:
    if side != "both" or None in (row.lower, row.upper):
        return shown(row.upper if side != "lower" else row.lower, row.draws_needed)
    return f"{row.lower:.3f} to {row.upper:.3f}"


def _sides(config: Certify) -> tuple[str, ...]:
    return ("upper", "lower") if config.side == "both" else (config.side,)


def _noise(config: Certify) -> str:
    return f"sigma {config.sigma:g}" + (" of each tensor's RMS" if config.relative else "")


def _move(config: Certify, eta: float, lengths: Lengths) -> str:
    """The moves that a row is about, with what their length compares to."""
    parts = [(lengths.weights, "of the weights' length"), (lengths.moved, "of what unlearning moved them")]
    shares = ", ".join(f"{100 * eta / length:.2g} % {what}" for length, what in parts if length)
    unit = "at most {:g} standard deviations of the noise" if config.relative else "length <= {:g}"
    return f"for any move of {unit.format(eta)}" + (f" ({shares})" if shares else "")


def _claims(config: Certify, rows: list[certify.Row], lengths: Lengths) -> str:
    """One sentence: what each group's bound is, under which noise, how often and for which moves."""
    said: list[str] = []
    for i, row in enumerate(rows):
        words, bound = ("at least", row.lower) if config.side == "lower" else ("at most", row.upper)
        bounded = f"{words} {bound:.3f}"
        if i and (row.q, row.eta) == (rows[0].q, rows[0].eta):
            said.append(f"on {_named(row.group)} {bounded}")
            continue
        share = 1 - row.q if config.side == "lower" and config.form == "published" else row.q
        often = f"in {100 * share:g} % of draws, {_move(config, row.eta, lengths)}"
        said.append(f"accuracy on {_named(row.group)} under noise {_noise(config)}: {bounded} {often}")
    return "; ".join(said)


def _named(group: str) -> str:
    return f"the {group}" if group == "test set" else group


def _beside(config: Certify, row: certify.Row, control: certify.DepthCertificate) -> str:
    """Whether the bounds tell this model from the control: a low one says little at a noise that destroys any network."""
    (other,) = [r for r in control.rows if (r.group, r.q, r.eta) == (row.group, row.q, row.eta)]
    if config.side != "both" or row.upper is None:
        return ""
    least = "its lower bound abstains" if other.lower is None else f"at least {other.lower:.3f}"
    if other.lower is not None and other.lower > row.upper:
        return f"; the clean control is certified to know {_named(row.group)} better ({least})"
    known = f"the clean control is not certified to know {_named(row.group)} better ({least})"
    return f"; at this sigma {known}, so that the two are not told apart"


def certified(
    config: Certify, certificates: dict[str, certify.DepthCertificate], looks: list[int], lengths: Lengths
) -> Section:
    first, sides = certificates[THIS], _sides(config)
    several = len(config.q) > 1
    what = {"both": "lower to upper", "upper": "upper", "lower": "lower"}[config.side]
    head = ("group", *(("q",) if several else ()), "eta", "eta / sigma", *(f"{name}: {what}" for name in certificates))
    rows = tuple(
        (r[0].group, *((r[0].q,) if several else ()), r[0].eta, r[0].shift, *(_cell(row, config.side) for row in r))
        for r in zip(*(c.rows for c in certificates.values()))
    )
    table = Table("Certified bounds on accuracy", head, rows, _meaning(config, first, looks, CONTROL in certificates, lengths))
    plots = tuple(
        _plot(config, certificates, group, q) for group in dict.fromkeys(r.group for r in first.rows) for q in config.q
    )
    side = "lower" if config.side == "lower" else "upper"
    best = list({row.group: row for row in first.rows if getattr(row, side) is not None}.values())
    claims = _claims(config, best, lengths) or "no row can be certified"
    beside = _beside(config, best[0], certificates[CONTROL]) if best and CONTROL in certificates else ""
    abstained = sum(getattr(row, s) is None for row in first.rows for s in sides)
    said = f"{claims}{beside}; {abstained} of {len(first.rows) * len(sides)} bounds abstain"
    return Section(f"certify: {config.run.name}", said, (table,), plots)


def _meaning(config: Certify, first: certify.DepthCertificate, looks: list[int], control: bool, lengths: Lengths) -> str:
    q = ", ".join(f"{value:g}" for value in config.q)
    noise = f"N(0, {config.sigma:g}^2) noise" if not config.relative else f"noise of {config.sigma:g} of each tensor's RMS"
    parts = [
        f"For every move of the weights by at most eta ({first.radius}), accuracy under {noise} stays within each bound with "
        f"probability q = {q}, at confidence {1 - config.alpha:g} for all {first.statements} bounds of a model together; "
        f"{first.draws:,} draws, {first.precision}; expected noise length {first.noise_norm:.2f}.",
        "It bounds a quantile over noise, not the accuracy of one attacked network.",
    ]
    known = {"the weights are": lengths.weights, "unlearning moved them by": lengths.moved}
    compared = " and ".join(f"{what} {length:.3g}" for what, length in known.items() if length is not None)
    if compared:
        parts.append(f"In the units of eta, {compared}.")
    if config.form == "published":
        parts.append("Lower bounds in the paper's printed form: they hold with probability 1 - q only.")
    if first.images is not None and any(m < n for m, n in first.images):
        parts.append(f"Accuracies from {config.images:,} sampled images, whose limits take half of alpha.")
    if len(looks) > 1:
        seen = ", ".join(f"{n:,}" for n in looks)
        parts.append(
            f"Looked at after {seen} draws: whichever look is quoted, the chance that it fails is at most "
            f"{len(looks)} alpha = {len(looks) * config.alpha:g}."
        )
    if not control:
        parts.append(
            "No clean-trained control was given (--control): at a noise that destroys any network a low bound says little."
        )
    return " ".join([*parts, ABSTAINS])


def _plot(config: Certify, certificates: dict[str, certify.DepthCertificate], group: str, q: float) -> Plot:
    """Bounds against eta, and at eta = 0 the quantiles of the draws themselves."""
    bands, series = [], []
    for name, certificate in certificates.items():
        rows = sorted((row for row in certificate.rows if row.group == group and row.q == q), key=lambda row: row.eta)
        etas = tuple(row.eta for row in rows)
        ends = {side: tuple(getattr(row, side) for row in rows) for side in _sides(config)}
        if config.side == "both":
            bands.append((f"{name}: bounds", etas, ends["lower"], ends["upper"]))
        else:
            series.append((f"{name}: {config.side} bound", etas, ends[config.side]))
        known = {"upper": rows[0].quantile, "lower": rows[0].lower_quantile}
        points = tuple(known[side] for side in _sides(config))
        series.append((f"{name}: draws, without confidence", (0.0,) * len(points), points))
    slug = f"certificate-{group.replace(' ', '-')}" + ("" if len(config.q) == 1 else f"-q{q:g}")
    note = "At eta = 0 stand the quantiles of the draws, without confidence. Where bounds end the draws do not suffice."
    title = f"Certified bounds against eta: {group}, q = {q:g}"
    return Plot(slug, title, "eta", "accuracy", tuple(series), note, bands=tuple(bands), ticks=(0.0, *sorted(config.eta)))


VERDICTS = {"below": "shown to be at most", "above": "refuted to be at most", "undecided": "not decided to be at most"}


def answered(config: Certify, found: dict[str, tuple[certify.Answer, ...]], lengths: Lengths) -> Section:
    def cell(answer: certify.Answer) -> str:
        if answer.verdict == "undecided":
            need = "no count" if answer.draws_needed is None else f"{answer.draws_needed:,}"
            return f"undecided: {answer.exceedances} of {answer.draws:,} above, at least {need} needed"
        return f"{answer.verdict}, at draw {answer.stopped:,}"

    rows = tuple((row[0].group, row[0].q, row[0].eta, *map(cell, row)) for row in zip(*found.values()))
    part = config.images is not None
    images = f" Accuracies from {config.images:,} sampled images, whose limits take half of that chance." if part else ""
    alpha = f"{found[THIS][0].alpha:.3g} ({config.alpha:g} over all rows)"
    note = (
        f"below: for every move of the weights by at most eta, accuracy under noise {_noise(config)} stays at or below "
        f"{config.tau:g} with probability q. above: the draws refute that they can show it. Either is wrong with probability "
        f"at most {alpha}, however often one looks and however many draws are added.{images} The test stops when every row "
        f"is decided, so bounds of a fixed number of draws must not be read off these."
    )
    said = "; ".join(
        f"accuracy on {_named(a.group)} under noise {_noise(config)}: {VERDICTS[a.verdict]} {config.tau:g} in {100 * a.q:g} % "
        f"of draws, {_move(config, a.eta, lengths)}"
        for a in found[THIS]
    )
    table = Table(f"Is the bound below {config.tau:g}?", ("group", "q", "eta", *found), rows, note)
    return Section(f"certify: {config.run.name}", said, (table,))
