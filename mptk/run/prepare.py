"""prepare: the first stage of a run: open model and data, trace, analyse, find legal widths."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mptk.compile.trace import has_same_sizes, trace_loaded
from mptk.config import FREE, IN_MEMORY, Settings
from mptk.conversions import convert_model, find_conversions
from mptk.cost.budgets import CACHED
from mptk.cost.model import CostModel, is_layered
from mptk.distributed.processes import run_once
from mptk.errors import BudgetError, ChangedError, InputError, MachineError, TargetError
from mptk.files.outputs import check_apart
from mptk.io import Loaded, can_write_text, data, measure_free_memory
from mptk.ir import Plan, Samples, resolve_plan, split_layer
from mptk.methods import find_method
from mptk.methods.division.budget import apply_budget, build_alignment, check_any, find_widths
from mptk.methods.division.selection import Tying, expand_parts, tie_layers
from mptk.proof.same_class import check_same_class
from mptk.protocols import (
    Analysed,
    Chosen,
    DenseModel,
    Opened,
    Origin,
    Prepared,
    compute_origin,
    find_imitated,
    find_stored_type,
    read_file_states,
    read_kept_tensors,
)
from mptk.run.checks import check_divides, check_ragged
from mptk.run.larger import keep_reachable, read_larger
from mptk.run.open import open_named
from mptk.run.pruned_folder import PrunedFolder
from mptk.run.run import Run, Start
from mptk.run.samples import KEPT_SAMPLES
from mptk.targets import find_target
from mptk.tasks.onnx_export import check_form
from passes.analysis import group
from passes.targets.legalize import keep_portable_families


def prepare(model: Start, run: Run) -> tuple[Prepared, Run]:
    """Load, trace, analyse and find legal widths. Returns the run with what was found, and with its folder.

    A run that has a dense model already, of an earlier run on it, begins with that.
    """
    # What can be refused without the model: an unfinished run that is another one, a machine that is too small.
    run.check_unfinished_run()
    run.announce()
    settings = run.settings
    with run.stage("load"):
        given, origin = open_unchanged(model, run)
    dense = run.dense or analyse(given, run)
    # A program of one length takes no other windows, whatever the settings say.
    if (length := dense.model.task.find_fixed_length(dense.model.analysis.program)) is not None:
        settings = replace(settings, length=length, eval_length=length)
    with run.stage("legalise"):
        larger = read_larger(settings, dense.model, dense.conversions, origin)
        prepared = keep_reachable(resolve_widths(run, settings, dense, larger), run.further)
    # The cut changes these norms' weights and epsilons, which must not change again: only LoRA leaves them as they are.
    # A graph's module has no layers for LoRA.
    under = prepared.norms_change
    if settings.trains and under and (settings.learning.rank == 0 or not prepared.target.classed):
        remedy = "leave out --rank 0" if prepared.target.classed else "use --target stock, or train nothing"
        raise InputError(
            f"all weights cannot be trained where {under[0]} is cut, as norms follow it; {remedy}", name="rank"
        )
    return prepared, replace(run, settings=prepared.settings, dense=dense, origin=origin).open_folder()


def analyse(given: Opened, run: Run) -> DenseModel:
    """Trace and analyse an open model, and convert it as the settings and the plan ask."""
    # Data, ONNX and memory first: tracing and what follows take minutes, and these checks seconds.
    settings, loaded, task = run.settings, given.loaded, given.task
    like = check_data(given, run)
    if settings.onnx and task.onnx is not None:
        check_form(task.onnx, settings)
    check_memory(loaded, settings)
    target = find_target(settings.target)
    with run.stage("trace"):
        like = like if target.classed else None  # a graph that is written takes other sizes
        program = trace_loaded(loaded, task, run.executor, settings.length, like, not target.classed)
        target.check_program(program)
    if target.classed:
        # The folder will be loaded as the class. A model that was changed in memory computes something else.
        check_same_class(loaded, task, task.make_example(loaded.model))
    if (length := task.find_fixed_length(program)) is not None:
        check_classed(loaded, settings, length)
    with run.stage("analyse"):
        model = Analysed(loaded, task, group.analyze_program(program))
    changes = find_conversions(settings, run.plan, run.inputs.texts)
    found = convert_model(model, changes, run, run.executor, length or settings.length, like)
    return DenseModel(given, *found, run.executor)


def open_unchanged(model: Start, run: Run) -> tuple[Opened, Origin]:
    """The dense model and its task, and digests of the run's inputs. Refuses files that change while they are read."""
    before = read_file_states(run.source)
    given = run.dense.given if run.dense is not None else open_start(model, run)
    origin = run_once(lambda: compute_origin(run.source, given.loaded, run.settings, run.start, run.plan))
    if before and not given.loaded.live and read_file_states(run.source) != before:
        raise ChangedError(f"{run.source} changed while it was opened; start again", name=run.source)
    return given, origin


def open_start(model: Start, run: Run) -> Opened:
    """Open what a run starts from, if it is not open yet."""
    trust = run.settings.trust
    if isinstance(model, PrunedFolder):
        return model.open_dense(run.resident, trust)
    return open_named(model, run.resident, trust, run.inputs) if isinstance(model, str) else model


def check_classed(loaded: Loaded, settings: Settings, length: int) -> None:
    """Raise MptkError if the run would write a graph that takes only one length."""
    if not find_target(settings.target).classed:
        raise TargetError(
            f"{type(loaded.model).__name__} can be traced only for {length} tokens, so a graph would take no other "
            "length; use --target stock, or cut it for inputs of one length with mptk.rewrite",
            name=type(loaded.model).__name__,
        )


def check_data(given: Opened, run: Run) -> Samples | None:
    """Read one sample of each source, to fail early; returns one if it is available at once.

    A run that is resumed has samples, and reads only what it measures on.
    """
    # No input may be overwritten by the output.
    settings, loaded, task = run.settings, given.loaded, given.task
    samples = {settings.data, settings.eval_data}
    texts = [source for source in settings.sources if source not in samples and source != IN_MEMORY]
    check_apart(run.out, *data.read_places(*texts), *filter(None, [settings.larger]))
    if run.inputs.has_samples or not run.reads_data:
        return None
    check_apart(run.out, *data.read_places(*samples))
    # One training sample.
    kept = read_kept_tensors(run.out, KEPT_SAMPLES) if settings.resume else None
    like = None if kept is None else Samples.from_tensors(kept, task.make_examples(loaded.model), "training")
    if like is not None:
        like = like[:1]
    elif settings.data != data.SELF or not can_write_text(loaded.model):  # to write text takes time
        like = task.draw_samples(loaded, replace(settings, samples=1), 1, lambda done, total: None)
    # One sample to measure on. If sizes differ, no example is returned: a program traced like one may refuse the other.
    if settings.eval_data is not None:
        other = task.draw_evaluation(loaded, replace(settings, eval_windows=1))
        if like is not None and like.inputs.keys() != other.inputs.keys():
            raise InputError(
                "--data and --eval-data are samples of two kinds; give images with both, or with neither",
                name="eval_data",
            )
        like = like if like is not None and has_same_sizes(like, other) else None
    return like


def check_memory(loaded: Loaded, settings: Settings) -> None:
    """Raise MptkError if the run needs all weights in memory and they do not fit."""
    needed = 4 * sum(p.numel() for p in loaded.model.parameters())  # they are held in float32
    room = measure_free_memory() if settings.memory is None else settings.memory
    if (settings.trains or settings.data == data.SELF) and needed > room:
        what, remedy = (
            ("training holds", "give a one-shot --method without --steps, and for a search --tokens 0")
            if settings.trains
            else ("generating text with the model needs", "give text with --data")
        )
        raise MachineError(
            f"{what} all weights in memory, {needed / 1e9:.1f} GB of {room / 1e9:.1f} GB; {remedy}, or more --memory",
            name="memory",
        )


def resolve_widths(run: Run, settings: Settings, dense: DenseModel, larger: Chosen | None = None) -> Prepared:
    """The widths that the settings and the target allow, or the given plan, resolved.

    ``larger``: a larger cut, which the run begins with.
    """
    model, compared = dense.model, find_imitated(dense.conversions)
    loaded, analysis = model.loaded, model.analysis
    before = None if compared is None else compared.analysis
    # All widths that the target can hold.
    method, target = find_method(settings.method), find_target(settings.target)
    legal = target.find_legal(analysis, loaded.model, build_alignment(settings))
    if settings.portable and not (settings.families or settings.fixed or settings.engines):
        legal = keep_portable_families(analysis, legal, {*settings.widths, *settings.keep})
    # Names that the settings use: of families, their layers, or parts of the model. What contradicts itself or the
    # model is refused here, before text is read.
    stored = find_stored_type(settings, loaded)
    plan = run.plan or Plan({})
    parts = model.task.name_parts(loaded.model)
    families, keep = (expand_parts(names, analysis, legal, parts) for names in (settings.families, settings.keep))
    settings = replace(settings, families=families, keep=keep)
    tying = None if settings.fixed else tie_layers(analysis, settings)
    if tying is not None and tying.untied:
        named = (*settings.families, *settings.keep, *settings.widths)
        layer = next((name for name in named if not analysis.variable(name).uniform), f"--layers {settings.layers}")
        check_divides(settings, layer)
    known = {family.name for family in analysis.all_families}
    if layer := next((n for n in plan.families if n not in known and split_layer(n)[0] in known), ""):
        check_ragged(target, f"{layer} of the plan")
    if settings.budget in CACHED and not model.task.caches:
        raise InputError(
            f"a {model.task.summary} keeps no KV cache; give another --budget than {settings.budget}", name="budget"
        )
    # What widths cost, and the sparsity that milliseconds mean; then the widths that meet it.
    cost, settings = apply_budget(analysis, legal, settings, run.progress, stored.itemsize, before, list(plan.families))
    prepared = Prepared(dense, model, settings, method, target, legal, cost, start=larger)
    if tying is None:
        return replace(prepared, planned=Chosen(plan, resolve_plan(analysis, plan)))
    check_any(analysis, cost)
    check_left(cost, settings)
    return name_layers(add_candidates(prepared, tying), tying)


def check_left(cost: CostModel, settings: Settings) -> None:
    """Raise MptkError if merging KV heads already meets the budget, so that nothing is left to cut."""
    if (gone := cost.compute_sparsity({})) > settings.sparsity - settings.tolerance and cost.dense is not cost.whole:
        raise BudgetError(
            f"merging KV heads already removes {gone:.1%} of the {settings.budget}, and --sparsity asks for "
            f"{settings.sparsity:.1%}; ask for more, or give --sparsity 0 to cut nothing else",
            name="sparsity",
            nearest=(gone,),
        )


def add_candidates(prepared: Prepared, tying: Tying) -> Prepared:
    """``prepared`` with the candidates that ``tying`` allows."""
    p = prepared
    legal = p.legal.tie(tying.variables).keep_whole(tying.whole)
    settings = replace(p.settings, families=tying.families, keep=tying.keep, widths=tying.widths)
    tied = replace(p, legal=legal, cost=p.cost.tie(tying.variables), settings=settings)
    return replace(p, candidates=tuple(run_once(partial(find_widths, tied))))


def name_layers(prepared: Prepared, tying: Tying) -> Prepared:
    """Give each layer of a family whose widths may differ a variable of its own; in candidates they stay equal."""
    p, cut = prepared, [tying.variables[name] for name in prepared.families]
    free = {v.family.name for v in cut if p.settings.layers == FREE and is_layered(v.family)} | tying.untied
    if not free:
        return p
    variables = p.analysis.make_variables(free)
    layers = {v.name: [each.name for each in (v.list_layers() if v.family.name in free else [v])] for v in cut}
    given = {layer: (width,) for name, width in tying.widths.items() for layer in layers[name]}
    legal = p.legal.tie(variables)
    candidates = [
        replace(c, widths={layer: width for name, width in c.widths.items() for layer in layers[name]})
        for c in p.candidates
    ]
    return replace(
        p,
        legal=replace(legal, ladders={**legal.ladders, **given}),
        cost=p.cost.tie(variables),
        candidates=tuple(candidates),
    )
