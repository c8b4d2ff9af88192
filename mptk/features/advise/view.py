"""view: what ``mptk advise`` shows: which cuts are safe, and what each costs on each text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mptk.features.advise.advice import STANDARD_ERRORS, Advice, Ceiling, Figures, Point, Recovery, Way
from mptk.protocols import Row
from mptk.reading import make_typed
from mptk.report.row_view import RowView
from mptk.report.runs import shorten_model_name
from mptk.report.view import (
    Bad,
    CommandLine,
    Good,
    Name,
    Section,
    Table,
    View,
    format_count,
    format_figure,
    format_large,
    format_megabytes,
)

WAYS, SAFE, CUTS, BY_FAMILY, SENSITIVE, UNKNOWN = (
    "Round or cut",
    "What is safe",
    "Cuts of growing size",
    "Each family by itself",
    "Sensitive layers",
    "What this does not know",
)
SHOWN_LAYERS = 5
"""Layers that are named as the most and the least sensitive."""
HALVED = (
    "A layer's figure is the rise of the loss (nats a token) on calibration text if that layer keeps half of its units "
    "and nothing is fitted."
)
MEASURED = {
    "perplexity": "the perplexity rises by",
    "disagreement": "the share of samples with another prediction is",
    "loss": "the mean loss against the dense outputs is",
}
"""What is measured → the beginning of the sentence that says what counts as safe."""
PREDICTED_WAYS = (
    "Times are predicted, and a type's loss is added to a cut's; --measure makes the best ways and measures them."
)
CHOSEN_WAYS = (
    "Compared before units were chosen, on held-out text and without training: times are predicted, and a type's loss "
    "is added to a cut's."
)
MEASURED_WAYS = (
    "Ways with measured figures were made and run in ONNX Runtime, and count as measured; the others are predicted, "
    "with a type's loss added to a cut's."
)


def build_advice_view(found: Advice) -> View:
    """The view of an advice."""
    parts = [
        Section(SAFE, [build_safe_table(found), *map(Name, describe_advice(found))]),
        Section(CUTS, [build_cut_table(found), build_figure_table(found), Name(found.protocol)]),
        Section(BY_FAMILY, [build_family_table(found)]),
    ]
    if found.ways:
        parts.insert(
            0, Section(WAYS, [build_way_table(found), *map(Name, describe_ways(found) + describe_sources(found))])
        )
    if found.layers:
        parts.append(Section(SENSITIVE, [build_layer_table(found.layers), HALVED]))
    return View(
        [*parts, Section(UNKNOWN, list(list_unknowns(found)))], f"How far can {shorten_model_name(found.model)} be cut?"
    )


class ChoiceView(RowView):
    """The ways among which a run with ``--quantize auto`` chose."""

    def build_sections(self, row: Row) -> Sequence[Section]:
        found = make_typed(Advice, row)
        return [Section(WAYS, [build_way_table(found), *map(Name, describe_ways(found)), CHOSEN_WAYS])]


def build_way_table(found: Advice) -> Table:
    """The front of types and cuts: what each takes, and its change on each text. A star: the best within the limits.

    Of ways that were made, times are shown twice: as predicted and as measured. Sizes and changes are then measured.
    """
    best, timed, made = found.find_way(), list(found.ways[0].ms), any(way.measured for way in found.ways)
    columns = ["type", "removed"]
    for phase in timed:
        columns += [f"{phase} ms", *["measured"] * made]
    limited = found.limits.memory is not None
    columns += [*["memory", *["measured"] * made] * limited, "size", *(Name(name_text(text)) for text in found.texts)]
    rows = []
    for way in list_shown_ways(found):
        row = [f"★ {way.type}" if way is best else way.type, f"{way.sparsity:.1%}" if way.sparsity else "dense"]
        for phase in timed:
            own = "" if way.measured is None else f"{way.measured.ms[phase]:.2f}"
            row += [f"{way.ms[phase]:.2f}", *[own] * made]
        if way.memory is not None:
            held = None if way.measured is None else way.measured.memory
            row += [format_megabytes(way.memory), *["" if held is None else format_megabytes(held)] * made]
        changes = [f"{each.change:+.1%} ±{each.error:.1%}" for each in way.known.texts.values()]
        rows.append([*row, format_megabytes(way.known.bytes), *changes])
    return Table("ll" + "r" * (len(columns) - 2), columns, rows)


def list_shown_ways(found: Advice) -> list[Way]:
    """The front; the dense model in each type, which is what everybody knows; and what was made; by falling price."""
    others = [way for way in found.ways if not way.sparsity or way.measured is not None]
    shown = [*found.front, *(way for way in others if way not in found.front)]
    return sorted(shown, key=lambda way: -way.price)


def describe_ways(found: Advice) -> list[str]:
    """Which way meets the limits, on each text, and what the next step would buy and cost."""
    best, said = found.find_way(), []
    limit = describe_limits(found.limits)
    if best is None:
        least = min(found.ways, key=lambda way: way.price)
        return [
            f"No way that was measured meets {limit}: the cheapest, {describe_way(least)}, takes "
            f"{describe_price(least)}. Give larger --sparsities, or a higher limit."
        ]
    if limit:
        said.append(f"Best within {limit}: {describe_way(best)} ({describe_price(best)}).")
        others = {text: way for text in found.texts if (way := found.find_way(text)) not in (None, best)}
        said += [f"For {name_text(text)} by itself: {describe_way(way)}." for text, way in others.items() if way]
        if not best.sparsity:
            said.append("No cut is needed.")
    if (cheaper := found.cheaper_way) is not None:
        said.append(f"The next cheaper way: {describe_step(best, cheaper)}.")
    if (better := found.better_way) is not None:
        said.append(f"The next better way: {describe_step(best, better)}.")
    return said


def describe_step(best: Way, other: Way) -> str:
    """What another way than the best one would buy and cost."""
    change = other.price / best.price - 1
    price = f"{abs(change):.0%} {'less' if change < 0 else 'more'} ({describe_price(other)})"
    changes = ", ".join(
        f"{each.change:+.1%} on {name_text(text)} in place of {best.known.texts[text].change:+.1%}"
        for text, each in other.known.texts.items()
    )
    return f"{describe_way(other)} takes {price}, and costs {changes}"


def describe_sources(found: Advice) -> list[str]:
    """Which figures of ways are measured, and how far predicted ones are off."""
    if not any(way.measured for way in found.ways):
        return [PREDICTED_WAYS]
    return [*map(partial(describe_miss, found), found.checked), MEASURED_WAYS]


def describe_miss(found: Advice, way: Way) -> str:
    """How far the predicted perplexity of a way is off, in words."""
    assert way.measured is not None
    figures = ", ".join(
        f"{math.exp(min(each.loss, 700.0)):.2f} on {name_text(text)} is {math.exp(min(own.loss, 700.0)):.2f} "
        f"({way.compute_miss(text):+.2%})"
        for (text, each), own in zip(way.texts.items(), way.measured.texts.values(), strict=True)
    )
    return f"{describe_way(way)}: the predicted perplexity of {figures} in ONNX Runtime."


def describe_way(way: Way) -> str:
    """A way in words."""
    return f"{way.type}, {f'{way.sparsity:.1%} removed' if way.sparsity else 'nothing removed'}"


def describe_price(way: Way) -> str:
    """What a way takes, in words."""
    known = way.known
    said = [f"{ms:.2f} ms of {phase}" for phase, ms in known.ms.items()]
    said += [] if known.memory is None else [f"{format_megabytes(known.memory)} of memory"]
    return ", ".join([*said, format_megabytes(known.bytes)])


def describe_limits(limits: Ceiling) -> str:
    """The limits in words; empty without one."""
    pairs = (("decode", limits.decode_ms), ("prefill", limits.prefill_ms))
    said = [f"{most:g} ms of {phase}" for phase, most in pairs if most is not None]
    said += [] if limits.bytes is None else [format_megabytes(limits.bytes)]
    said += [] if limits.memory is None else [f"{format_megabytes(limits.memory)} of memory"]
    return ", ".join(said) + (f" at {limits.context:,} tokens" if said and limits.decodes else "")


def build_safe_table(found: Advice) -> Table:
    """The largest safe cut of each text."""
    own, rows = _name_columns(found), []
    trained = found.recovery is not None
    for text in found.texts:
        point = found.find_safe(text)
        after = [_format_limit(found.find_safe(text, recovered=True))] if trained else []
        figures = [""] * len(own) if point is None else _format_figures(found, point, text)
        rows.append([Name(name_text(text)), _format_limit(point), *after, *figures])
    columns = ["text", "safe", *["after training"] * trained, *own]
    return Table("l" + "r" * (len(columns) - 1), columns, rows)


def _format_limit(point: Point | None) -> str:
    return Bad("none") if point is None else Good(format_share(point))


def describe_advice(found: Advice) -> list[str]:
    """The advice in words."""
    best, first = found.recommended, found.division[0]
    # What safe means, then the recommended cut or why there is none, then what training would change.
    said = [
        f"Safe: {MEASURED[found.measure]} at most {found.tolerance:.0%} with {STANDARD_ERRORS:.0f} standard errors."
    ]
    if best is not None:
        # The weakest text decides. A reader may not need that text, so the others are named.
        worse = [
            name_text(text) for text in found.texts if (at := found.find_safe(text)) is not None and at is not best
        ]
        more = f" {', '.join(worse)} would take more." if worse else ""
        said.append(f"Recommended: remove {format_share(best)}.{more}")
    else:
        bad = [text for text in found.texts if found.find_safe(text) is None]
        worst = max(first.texts[text].change for text in bad)
        said.append(
            f"Without training no measured cut is safe for {', '.join(map(name_text, bad))}: the smallest, "
            f"{format_share(first)}, already costs {worst:.1%}. Give a larger --tolerance or smaller --sparsities, or "
            "plan for recovery."
        )
    if found.recovery is not None:
        said += describe_training(found, found.recovery)
    if found.knee is not None:
        said.append(f"Beyond {format_share(found.knee)} each further cut costs more than the ones before.")
    return said


def describe_training(found: Advice, recovery: Recovery) -> list[str]:
    """What training gave back, in words, and the advice after it."""
    about = f"{format_count(recovery.steps, 'step')} on {recovery.tokens:,} tokens"
    said = [f"With a training of {about}, part of the rise of the loss comes back:"]
    for point in recovery.points:
        shares = ", ".join(f"{found.compute_recovered(point, text):.0%} on {name_text(text)}" for text in found.texts)
        said.append(f"{format_share(point)} removed: {shares}.")
    best = found.recommended_after
    if best is None:
        return [*said, "With this training no measured cut is safe on every text."]
    how = "which was trained and measured" if found.find_trained(best) is not None else "as estimated"
    return [*said, f"Recommended with this training: remove {format_share(best)}, {how}."]


def list_commands(found: Advice) -> list[str]:
    """The commands of the recommended cuts, each after a line that says which cut it makes."""
    said = ["The largest cut that is safe without training:", CommandLine(found.command)] if found.command else []
    if found.recovery is not None and found.recovery.command:
        steps = format_count(found.recovery.steps, "step")
        said += [f"The largest cut that is safe after a training of {steps}:", CommandLine(found.recovery.command)]
    if found.way_command:
        said += [
            "The best way within the limits:" if describe_limits(found.limits) else "The best way:",
            CommandLine(found.way_command),
        ]
    return said


def list_unknowns(found: Advice) -> Sequence[str]:
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
        *(["Latency: `--budget latency` predicts it."] if found.dense.latency_ms is None and not found.ways else []),
    )


def build_cut_table(found: Advice) -> Table:
    """The widths and the cost of each cut, after the dense model's. Families that no cut touches have no column."""
    points = (found.dense, *found.division)
    names = [n for n in found.dense.widths if any(p.widths[n] != found.dense.widths[n] for p in points)]
    timed = found.dense.latency_ms is not None
    columns = ["removed", *map(Name, names), "parameters", "size", *["ms"] * timed]
    rows = []
    for point in points:
        ms = [] if point.latency_ms is None else [f"{point.latency_ms:.2f}"]
        removed = "dense" if point is found.dense else format_share(point)
        rows.append(
            [removed, *_format_widths(point, names), format_large(point.parameters), format_megabytes(point.bytes), *ms]
        )
    return Table("r" * len(columns), columns, rows, ends=[0])


def build_figure_table(found: Advice) -> Table:
    """The figures of each cut on each text: first the dense model's."""
    own, rows, ends = _name_columns(found), list[list[str]](), []
    for text in found.texts:
        for number, point in enumerate((found.dense, *found.division)):
            removed = format_share(point) if number else "dense"
            after = [] if found.recovery is None else [format_recovered(found, point, text) if number else ""]
            rows.append(
                [Name("" if number else name_text(text)), removed, *_format_figures(found, point, text), *after]
            )
        ends.append(len(rows) - 1)
    columns = ["text", "removed", *own, *["after training"] * (found.recovery is not None)]
    return Table("lr" + "r" * (len(columns) - 2), columns, rows, ends)


def format_recovered(found: Advice, point: Point, text: str) -> str:
    """The change of a cut after training: as measured, or as a range."""
    own = found.find_trained(point)
    if own is not None:
        return f"{own.texts[text].change:+.1%} ±{own.texts[text].error:.1%}"
    after = found.estimate_after(point, text)
    return f"{after.least:+.0%} to {after.most:+.0%}"


def build_family_table(found: Advice) -> Table:
    """The cuts of each family, with the mean rise of the loss over all texts."""
    rows, ends = [], []
    for name, points in found.families.items():
        for number, point in enumerate(points):
            own = [n for n in point.widths if point.widths[n] != found.dense.widths[n]]
            widths = ", ".join(_format_widths(point, own))
            rows.append([Name("" if number else name), widths, format_share(point), f"{point.rise:+.3f}"])
        ends.append(len(rows) - 1)
    return Table("lrrr", ["family", "width", "removed", "loss"], rows, ends)


def build_layer_table(found: Mapping[str, Sequence[float]]) -> Table:
    """The most and the least sensitive layers of each family."""
    rows = []
    for name, rises in found.items():
        # Of fewer than ten layers, the least sensitive are all but the most sensitive.
        order = sorted(range(len(rises)), key=lambda i: -rises[i])
        ends = order[:SHOWN_LAYERS], order[SHOWN_LAYERS:][-SHOWN_LAYERS:]
        rows.append([Name(name), *(", ".join(f"{i} ({rises[i]:+.3f})" for i in each) for each in ends)])
    return Table("lll", ["family", "most sensitive", "least sensitive"], rows)


def format_share(point: Point) -> str:
    """The share of the budget that a cut removes."""
    return f"{point.sparsity:.1%}"


def name_text(text: str) -> str:
    """The name of a text as tables show it: of a path its last part."""
    return Path(text).name if "/" in text else text


def _format_widths(point: Point, names: Sequence[str]) -> list[str]:
    return [str(point.widths[name]) for name in names]


def _name_columns(found: Advice) -> list[str]:
    agrees = any(each.agreement is not None for each in found.dense.texts.values())
    first = "perplexity" if found.measure == "perplexity" else "loss"
    return [first, *([] if found.measure == "loss" else ["change"]), *["same top-1"] * agrees]


def _format_figures(found: Advice, point: Point, text: str) -> list[str]:
    """A point's figures on a text, as ``_name_columns``."""
    own: Figures = point.texts[text]
    first = math.exp(min(own.loss, 700.0)) if found.measure == "perplexity" else own.loss
    change = [] if found.measure == "loss" else [f"{own.change:+.1%} ±{own.error:.1%}"]
    return [format_figure(first), *change, *([] if own.agreement is None else [f"{own.agreement:.0%}"])]
