"""advice: the view of ``mptk advise``: which cuts are safe, and what each costs on each text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mptk.protocols.advice import STANDARD_ERRORS, Advice, Figures, Point, Recovery
from mptk.report.runs import model_name
from mptk.report.view import Bad, Good, Name, Section, Table, View, figure, large, megabytes, plural

SAFE, CUTS, BY_FAMILY, SENSITIVE, UNKNOWN = (
    "What is safe",
    "Cuts of growing size",
    "Each family by itself",
    "Sensitive layers",
    "What this does not know",
)
SHOWN_LAYERS = 5
"""Layers that are named as the most and the least sensitive."""


def advice_view(found: Advice) -> View:
    """The view of an advice."""
    parts = [
        Section(SAFE, [safe(found), *map(Name, sentences(found))]),
        Section(CUTS, [costs(found), figures(found), Name(found.protocol)]),
        Section(BY_FAMILY, [by_family(found)]),
    ]
    if found.layers:
        parts.append(Section(SENSITIVE, [layers(found.layers), HALVED]))
    return View([*parts, Section(UNKNOWN, list(unknown(found)))], f"How far can {model_name(found.model)} be cut?")


HALVED = (
    "A layer's figure is the rise of the loss (nats a token) on calibration text if that layer keeps half of its units "
    "and nothing is fitted."
)


def safe(found: Advice) -> Table:
    """The largest safe cut of each text."""
    own, rows = _columns(found), []
    trained = found.recovery is not None
    for text in found.texts:
        point = found.safe(text)
        after = [_limit(found.safe(text, recovered=True))] if trained else []
        figures = [""] * len(own) if point is None else _measured(found, point, text)
        rows.append([Name(short(text)), _limit(point), *after, *figures])
    columns = ["text", "safe", *["after training"] * trained, *own]
    return Table("l" + "r" * (len(columns) - 1), columns, rows)


def _limit(point: Point | None) -> str:
    return Bad("none") if point is None else Good(share(point))


def sentences(found: Advice) -> list[str]:
    """The advice in words."""
    best, first = found.recommended, found.division[0]
    said = [
        f"Safe: {MEASURED[found.measure]} at most {found.tolerance:.0%} with {STANDARD_ERRORS:.0f} standard errors."
    ]
    if best is not None:
        worse = [short(text) for text in found.texts if (at := found.safe(text)) is not None and at is not best]
        more = f" {', '.join(worse)} would take more." if worse else ""
        said.append(f"Recommended: remove {share(best)}.{more}")
    else:
        bad = [text for text in found.texts if found.safe(text) is None]
        worst = max(first.texts[text].change for text in bad)
        said.append(
            f"Without training no measured cut is safe for {', '.join(map(short, bad))}: the smallest, {share(first)}, "
            f"already costs {worst:.1%}. Give a larger --tolerance or smaller --sparsities, or plan for recovery."
        )
    if found.recovery is not None:
        said += trained(found, found.recovery)
    if found.knee is not None:
        said.append(f"Beyond {share(found.knee)} each further cut costs more than the ones before.")
    return said


def trained(found: Advice, recovery: Recovery) -> list[str]:
    """What training gave back, in words, and the advice after it."""
    about = f"{plural(recovery.steps, 'step')} on {recovery.tokens:,} tokens"
    said = [f"With a training of {about}, part of the rise of the loss comes back:"]
    for point in recovery.points:
        shares = ", ".join(f"{found.given_back(point, text):.0%} on {short(text)}" for text in found.texts)
        said.append(f"{share(point)} removed: {shares}.")
    best = found.recommended_after
    if best is None:
        return [*said, "With this training no measured cut is safe on every text."]
    how = "which was trained and measured" if found.trained(best) is not None else "as estimated"
    return [*said, f"Recommended with this training: remove {share(best)}, {how}."]


def commands(found: Advice) -> list[str]:
    """The commands of the recommended cuts, each after a line that says which cut it makes."""
    said = ["The largest cut that is safe without training:", found.command] if found.command else []
    if found.recovery is not None and found.recovery.command:
        steps = plural(found.recovery.steps, "step")
        said += [f"The largest cut that is safe after a training of {steps}:", found.recovery.command]
    return said


MEASURED = {
    "perplexity": "the perplexity rises by",
    "disagreement": "the share of samples with another prediction is",
    "loss": "the mean loss against the dense outputs is",
}


def unknown(found: Advice) -> Sequence[str]:
    """What the advice does not say."""
    training = (
        "Recovery: training brings back part of the loss, more of it for larger cuts. `--calibrate` measures it."
        if found.recovery is None
        else "Recovery: a longer training gives back more. The range of a cut that was not trained assumes that it "
        "gets back about as much as the trained ones."
    )
    return (
        training,
        "Tasks: perplexity and agreement say little of how well a model answers; `mptk eval --tasks` measures that.",
        "Other texts: a text unlike these may lose more.",
        *(["Latency: `--budget latency` predicts it."] if found.dense.latency_ms is None else []),
    )


def costs(found: Advice) -> Table:
    """The widths and the cost of each cut: first the dense model."""
    points = (found.dense, *found.division)
    names = [n for n in found.dense.widths if any(p.widths[n] != found.dense.widths[n] for p in points)]
    timed = found.dense.latency_ms is not None
    columns = ["removed", *map(Name, names), "parameters", "size", *["ms"] * timed]
    rows = []
    for point in points:
        ms = [] if point.latency_ms is None else [f"{point.latency_ms:.2f}"]
        removed = "dense" if point is found.dense else share(point)
        rows.append([removed, *_widths(point, names), large(point.parameters), megabytes(point.bytes), *ms])
    return Table("r" * len(columns), columns, rows, ends=[0])


def figures(found: Advice) -> Table:
    """The figures of each cut on each text: first the dense model's."""
    own, rows, ends = _columns(found), list[list[str]](), []
    for text in found.texts:
        for number, point in enumerate((found.dense, *found.division)):
            removed = share(point) if number else "dense"
            after = [] if found.recovery is None else [recovered(found, point, text) if number else ""]
            rows.append([Name("" if number else short(text)), removed, *_measured(found, point, text), *after])
        ends.append(len(rows) - 1)
    columns = ["text", "removed", *own, *["after training"] * (found.recovery is not None)]
    return Table("lr" + "r" * (len(columns) - 2), columns, rows, ends)


def recovered(found: Advice, point: Point, text: str) -> str:
    """The change of a cut after training: as measured, or as a range."""
    own = found.trained(point)
    if own is not None:
        return f"{own.texts[text].change:+.1%} ±{own.texts[text].error:.1%}"
    after = found.after(point, text)
    return f"{after.least:+.0%} to {after.most:+.0%}"


def by_family(found: Advice) -> Table:
    """The cuts of each family, with the mean rise of the loss over all texts."""
    rows, ends = [], []
    for name, points in found.families.items():
        for number, point in enumerate(points):
            own = [n for n in point.widths if point.widths[n] != found.dense.widths[n]]
            widths = ", ".join(_widths(point, own))
            rows.append([Name("" if number else name), widths, share(point), f"{point.rise:+.3f}"])
        ends.append(len(rows) - 1)
    return Table("lrrr", ["family", "width", "removed", "loss"], rows, ends)


def layers(found: Mapping[str, Sequence[float]]) -> Table:
    """The most and the least sensitive layers of each family."""
    rows = []
    for name, rises in found.items():
        order = sorted(range(len(rises)), key=lambda i: -rises[i])
        ends = order[:SHOWN_LAYERS], order[SHOWN_LAYERS:][-SHOWN_LAYERS:]
        rows.append([Name(name), *(", ".join(f"{i} ({rises[i]:+.3f})" for i in each) for each in ends)])
    return Table("lll", ["family", "most sensitive", "least sensitive"], rows)


def share(point: Point) -> str:
    """The share of the budget that a cut removes."""
    return f"{point.sparsity:.1%}"


def short(text: str) -> str:
    """The name of a text as tables show it."""
    return Path(text).name if "/" in text else text


def _widths(point: Point, names: Sequence[str]) -> list[str]:
    return [str(point.widths[name]) for name in names]


def _columns(found: Advice) -> list[str]:
    agrees = any(each.agreement is not None for each in found.dense.texts.values())
    first = "perplexity" if found.measure == "perplexity" else "loss"
    return [first, *([] if found.measure == "loss" else ["change"]), *["same top-1"] * agrees]


def _measured(found: Advice, point: Point, text: str) -> list[str]:
    """A point's figures on a text, as ``_columns``."""
    own: Figures = point.texts[text]
    first = math.exp(min(own.loss, 700.0)) if found.measure == "perplexity" else own.loss
    change = [] if found.measure == "loss" else [f"{own.change:+.1%} ±{own.error:.1%}"]
    return [figure(first), *change, *([] if own.agreement is None else [f"{own.agreement:.0%}"])]
