"""conversions: change a dense model before the cut, as its vocabulary or its KV heads. Features bring the kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from mptk.compile.trace import trace_loaded
from mptk.config import Settings
from mptk.errors import InputError, PlanError
from mptk.io import Loaded
from mptk.ir import Plan, Samples, Weights
from mptk.plugins import explain_absent, load_parts
from mptk.protocols import Analysed, Change, Chosen, Context, Conversion, Prepared, Task, shorten_samples
from mptk.staged.staged import Executor
from passes.analysis import group

Changes = Sequence[tuple[type[Conversion], Change]]


def list_conversions() -> list[type[Conversion]]:
    """The kinds of conversions, in the order in which they change a model."""
    # Kinds that fit weights come last: they fit the model that will be cut.
    return sorted(load_parts("conversions").values(), key=lambda kind: (bool(kind.fits), kind.name))


def find_conversions(
    settings: Settings, plan: Plan | None, texts: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Changes:
    """The conversions that the settings and the plan ask for. ``texts``: the caller's texts in memory, by setting.

    Raises:
        MptkError: the settings and the plan both decide the same; or one of them asks for something impossible.
    """
    changes = dict[type[Conversion], Change]() if plan is None else dict(read_plan_conversions(plan))
    for kind in list_conversions():
        if (change := kind.find_change(settings, texts)) is None:
            continue
        if kind in changes:
            option = kind.name.replace("_", "-")
            raise InputError(
                f'the plan says {kind.settles}; leave out --{option}, or the plan\'s "{kind.name}"', name=kind.name
            )
        changes[kind] = change
    return [(kind, changes[kind]) for kind in list_conversions() if kind in changes]


def read_plan_conversions(plan: Plan) -> Changes:
    """The conversions that a plan asks for. Raises MptkError for an unknown entry or a wrong one."""
    known = {kind.name: kind for kind in list_conversions()}
    if unknown := plan.conversions.keys() - known.keys():
        raise PlanError(
            f'plan: "{min(unknown)}" is not an entry of a plan; {explain_absent() or "see docs/plan.md"}',
            name=min(unknown),
        )
    return [(kind, kind.from_entry(plan.conversions[name])) for name, kind in known.items() if name in plan.conversions]


def needs_fit(settings: Settings, plan: Plan | None = None) -> bool:
    """Whether a conversion that the settings or the plan ask for fits weights to samples."""
    asked = [kind for kind in list_conversions() if kind.fits and kind.find_change(settings, {}) is not None]
    return bool(asked) or any(kind.fits for kind, _ in ([] if plan is None else read_plan_conversions(plan)))


def count_dense_models(settings: Settings) -> int:
    """Number of dense models that training masks holds: the student's own, and the teacher if it has other weights.

    It has other weights after a conversion that fits some, and if the run begins with a larger cut.
    """
    return 1 + (needs_fit(settings) or settings.larger is not None)


def convert_model(
    model: Analysed, changes: Changes, context: Context, executor: Executor, length: int, like: Samples | None = None
) -> tuple[Analysed, tuple[Conversion, ...]]:
    """The model after all conversions, and these conversions. ``length``, ``like``: as in ``traced``."""
    made = list[Conversion]()
    for kind, change in changes:
        with context.stage(kind.stage):
            made.append(change(model, partial(analyze_loaded, model.task, executor, length, like)))
        # The next conversion changes what this one made.
        model = made[-1].after
    return model, tuple(made)


def analyze_loaded(task: Task, executor: Executor, length: int, like: Samples | None, loaded: Loaded) -> Analysed:
    """Trace and analyse a model. ``task``: the task of the model before a conversion."""
    # A task may hold something of its model, so it is bound to the changed one.
    task = task.bind(loaded)
    return Analysed(loaded, task, group.analyze_program(trace_loaded(loaded, task, executor, length, like)))


def fit_conversions(prepared: Prepared, samples: Samples, context: Context) -> Prepared:
    """``prepared`` after its conversions fitted their weights to ``samples``."""
    for each in prepared.conversions:
        if not each.fits:
            continue
        with context.stage(each.fits):
            # All samples for the fit; few and short ones to find out how heads can be merged.
            made = each.fit_weights(samples, shorten_samples(samples, prepared.task.sequences), prepared.executor)
        weights = Weights(made.weights)
        # From here on the fitted weights are the model's own, and the analysis counts with them.
        model = replace(
            prepared.model,
            loaded=prepared.loaded.with_changes(weights, each.before.analysis.program.aliases),
            analysis=prepared.analysis.with_weights(weights),
        )
        conversions = tuple(made if other is each else other for other in prepared.conversions)
        prepared = replace(prepared, model=model, dense=replace(prepared.dense, conversions=conversions))
    return prepared


def with_conversions(prepared: Prepared, chosen: Chosen) -> Chosen:
    """The choice with the conversions' entries in its plan and their weights among the trained ones."""
    for each in prepared.conversions:
        # The method's changes lie on top: they were made of the converted model.
        if each.weights:
            chosen = replace(chosen, changes=each.weights).with_weights(chosen.changes)
    entries = {each.name: each.entry for each in prepared.conversions}
    return replace(chosen, plan=replace(chosen.plan, conversions=entries))
