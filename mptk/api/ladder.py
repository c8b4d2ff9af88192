"""ladder: ``mptk.ladder``, which prunes a model to several sizes in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mptk.api.changed import FirstRun
from mptk.api.pruned import Pruned, Shown, defaults, job_of, reporting, resolve_place
from mptk.api.samples import Data
from mptk.api.sources import GivenInputs, Model
from mptk.api.words import public
from mptk.chain.estimate import estimator
from mptk.chain.job import Finished
from mptk.chain.ladder import LadderRun, climb, name_of, rungs, share
from mptk.compile.rungs import restore_rung, sizes_in
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate, total
from mptk.distributed.processes import leads, once
from mptk.errors import MptkError
from mptk.files import scratch
from mptk.files.outputs import check_apart
from mptk.ir.passes import Log, PassRecord
from mptk.protocols.report import Report
from mptk.protocols.values import Context
from mptk.publish.folder import publish
from mptk.publish.manifest import check_manifest
from mptk.trust import Trust, trust_by_caller


@public
def ladder(
    model: Model,
    out: str | Path,
    sparsities: Sequence[float],
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    on_stage: Callable[[PassRecord], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    vocabulary: str | Path | Sequence[str] | None = None,
    **keywords: object,
) -> list[Pruned]:
    """Prune a model to several sizes, each cut further from the next larger one, and prove each::

        small, smaller = mptk.ladder(model, "runs/m", [0.2, 0.4], method="wanda", data=texts)

    The units of a smaller model are among those of each larger one. A smaller model begins with the weights of the next
    larger one, trained if there are steps. The dense model is the teacher of all.

    Args:
        out: folder for the results, each in a folder named after its sparsity: ``runs/m/0.2``.
        sparsities: shares of the budget to remove, ascending.
        keywords: as in ``prune``, like all other arguments. All models share ``steps`` or ``minutes``, in equal parts.
            With ``shared`` all are one set of weights: ``out`` is the largest's folder, and ``rung`` makes the others'.

    Returns:
        The pruned models, the largest first. If several processes work on one run, only the first gets them.

    Raises:
        MptkError: as ``prune``; or the sparsities or the settings do not suit a ladder. Finished models stay.
    """
    if "sparsity" in keywords:
        raise MptkError("sparsities names the sizes of a ladder; leave out sparsity")
    inputs = tokenizer, example_inputs, data, eval_data, vocabulary
    job, chosen = job_of(model, defaults(settings, out, model, example_inputs), keywords, *inputs)
    ready = job(place := resolve_place(out))
    with reporting(progress) as say:
        if chosen.shared:
            found = share(ready, chosen, sparsities, Context(Log(on_record=on_stage), say))
            return [
                _read_rung(place, found, chosen.trust),
                *(rung(place, size, trust_remote_code=chosen.trust_remote_code) for size in sparsities[1:]),
            ]
        steps = once(lambda: rungs(place, chosen, sparsities, ready.needs))

        def context(step: LadderRun) -> Context:
            say(f"sparsity {step.out.name}", 0, 0)
            return Context(Log(on_record=on_stage), say)

        return [
            _read_rung(step.out, found, chosen.trust) for step, found in climb(ready, place, steps, context) if leads()
        ]


def _read_rung(place: Path, found: Finished | None, trust: Trust) -> Pruned:
    report = Report.read(place)
    compiled = found.compiled if found is not None and report.live else None  # else the folder says enough
    return Pruned(report, place, compiled=compiled, origin=FirstRun(trust=trust))


def needed(model: str, settings: Settings, sparsities: Sequence[float]) -> Estimate:
    """What a ladder needs. No model runs. Raises the errors of ``mptk.ladder``."""
    needs = estimator(model)
    return total([needs(rung.settings) for rung in rungs(Path(), settings, sparsities, needs)])


@public
def rung(
    folder: str | Path,
    size: float,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Pruned:
    """A smaller size of a ladder whose sizes share weights, as the ordinary folder that the ladder proved::

        small = mptk.rung("runs/m", 0.4, "runs/small").model

    It is made from the largest size's weights and the size's own. No model runs; each file has the digest of the proven
    one.

    Args:
        folder: the ``out`` folder of ``ladder(…, shared=True)``.
        size: its sparsity, as the ladder was given it.
        out: the folder to write; None: a temporary one, which lives as long as the result.
        overwrite: as in ``Settings``.
        trust_remote_code: as in ``Pruned.open``.

    Raises:
        MptkError: the folder was changed, or has no such size; or ``out`` cannot be written.
    """
    place, name = Path(folder), name_of(size)
    sizes = checked_sizes(place)
    if name not in sizes:
        raise MptkError(f"{place} has no size {name}; give {' or '.join(sizes)}")
    kept = scratch() if out is None else None
    made = kept.folder / name if kept is not None else resolve_place(str(out))
    check_apart(made, place)
    with publish(made, overwrite=overwrite) as new:
        restore_rung(place, name, new)
    origin = FirstRun(trust=trust_by_caller(trust_remote_code))
    return Pruned(Report.read(made), made, kept=kept, origin=origin)


def checked_sizes(folder: Path) -> list[str]:
    """The names of the sizes within the folder of the largest, as it was published.

    Raises:
        MptkError: the folder was changed, or has no other sizes.
    """
    check_manifest(folder)
    if not (sizes := sizes_in(folder)):
        raise MptkError(f"{folder} has one size; give the --out folder of `mptk prune --ladder 0.2,0.4 --shared`")
    return sizes
