"""What a certificate says, in tables, plots and plain words."""

from dememo_jax import certify
from dememo_jax.cli.configs import Certify
from dememo_jax.report import Cell, Plot, Section, Table

THIS, CONTROL = "this model", "clean control"
ABSTAINS = "abstains (n): the draws do not support a bound there; n draws would."


def shown(bound: float | None, needed: int | None) -> Cell:
    """A bound, or the abstention with the number of draws that would end it."""
    return bound if bound is not None else f"abstains ({'no count' if needed is None else f'{needed:,}'})"


def _cell(row: certify.Row, side: str) -> Cell:
    if side != "both" or None in (row.lower, row.upper):
        return shown(row.upper if side != "lower" else row.lower, row.draws_needed)
    return f"{row.lower:.3f} to {row.upper:.3f}"


def _sides(config: Certify) -> tuple[str, ...]:
    return ("upper", "lower") if config.side == "both" else (config.side,)


def certified(config: Certify, certificates: dict[str, certify.DepthCertificate], looks: list[int]) -> Section:
    first, sides = certificates[THIS], _sides(config)
    several = len(config.q) > 1
    what = {"both": "lower to upper", "upper": "upper", "lower": "lower"}[config.side]
    head = ("group", *(("q",) if several else ()), "eta", "eta / sigma", *(f"{name}: {what}" for name in certificates))
    rows = tuple(
        (r[0].group, *((r[0].q,) if several else ()), r[0].eta, r[0].shift, *(_cell(row, config.side) for row in r))
        for r in zip(*(c.rows for c in certificates.values()))
    )
    table = Table("Certified bounds on accuracy", head, rows, _meaning(config, first, looks, CONTROL in certificates))
    plots = tuple(
        _plot(config, certificates, group, q) for group in dict.fromkeys(r.group for r in first.rows) for q in config.q
    )
    side, sign = ("lower", ">=") if config.side == "lower" else ("upper", "<=")
    best = {row.group: row for row in first.rows if getattr(row, side) is not None}
    claims = "; ".join(f"{name} {sign} {getattr(row, side):.3f} within eta {row.eta:g}" for name, row in best.items())
    abstained = sum(getattr(row, s) is None for row in first.rows for s in sides)
    said = f"{claims or 'no row can be certified'}; {abstained} of {len(first.rows) * len(sides)} bounds abstain"
    return Section(f"certify: {config.run.name}", said, (table,), plots)


def _meaning(config: Certify, first: certify.DepthCertificate, looks: list[int], control: bool) -> str:
    q = ", ".join(f"{value:g}" for value in config.q)
    noise = f"N(0, {config.sigma:g}^2) noise" if not config.relative else f"noise of {config.sigma:g} of each tensor's RMS"
    parts = [
        f"For every move of the weights by at most eta ({first.radius}), accuracy under {noise} stays within each bound with "
        f"probability q = {q}, at confidence {1 - config.alpha:g} for all {first.statements} bounds of a model together; "
        f"{first.draws:,} draws, {first.precision}; expected noise length {first.noise_norm:.2f}.",
        "It bounds a quantile over noise, not the accuracy of one attacked network.",
    ]
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
    curves = []
    for name, certificate in certificates.items():
        rows = [row for row in certificate.rows if row.group == group and row.q == q]
        for side, quantile, level in (("upper", "quantile", q), ("lower", "lower_quantile", 1 - q)):
            if side in _sides(config):
                curves.append((f"{name}: {side}", config.eta, tuple(getattr(row, side) for row in rows)))
                known = tuple(getattr(row, quantile) for row in rows)
                curves.append((f"{name}: {level:.3g}-quantile", config.eta, known))
    slug = f"certificate-{group.replace(' ', '-')}" + ("" if len(config.q) == 1 else f"-q{q:g}")
    note = "Quantiles are those of the draws at eta = 0, without confidence. Where a curve ends the draws do not suffice."
    return Plot(slug, f"Certified bounds against eta: {group}, q = {q:g}", "eta", "accuracy", tuple(curves), note)


def answered(config: Certify, found: dict[str, tuple[certify.Answer, ...]]) -> Section:
    def cell(answer: certify.Answer) -> str:
        if answer.verdict == "undecided":
            need = "no count" if answer.draws_needed is None else f"{answer.draws_needed:,}"
            return f"undecided: {answer.exceedances} of {answer.draws:,} above, at least {need} needed"
        return f"{answer.verdict}, at draw {answer.stopped:,}"

    rows = tuple((row[0].group, row[0].q, row[0].eta, *map(cell, row)) for row in zip(*found.values()))
    note = (
        f"below: for every move of the weights by at most eta, accuracy under the noise stays at or below {config.tau:g} with "
        f"probability q. above: the draws refute that they can show it. Either is wrong with probability at most "
        f"{found[THIS][0].alpha:.3g} ({config.alpha:g} over all rows), however often one looks. The test stops when every row "
        f"is decided, so bounds of a fixed number of draws must not be read off these."
    )
    said = "; ".join(f"{a.group} {a.verdict} {a.tau:g} within eta {a.eta:g}" for a in found[THIS])
    table = Table(f"Is the bound below {config.tau:g}?", ("group", "q", "eta", *found), rows, note)
    return Section(f"certify: {config.run.name}", said, (table,))
