"""recovery: ``mptk.recover``: train a pruned folder against its dense model, by ``prune`` from its plan and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from mptk.api.pruned import Pruned, Shown, make_pruned, reporting, resolve_place
from mptk.api.words import public
from mptk.config.setting import with_keywords
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.errors import MptkError
from mptk.files import make_scratch
from mptk.ir.passes import Log, PassRecord
from mptk.protocols.conversion import Opened
from mptk.protocols.values import Context
from mptk.run.inputs import Data, Inputs, name_inputs
from mptk.run.minutes import complete_settings
from mptk.run.open import Model
from mptk.run.prune import prune as prune_model
from mptk.run.pruned_folder import PrunedFolder
from mptk.run.run import open_run


@public
def recover(
    pruned: Pruned | str | Path,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    model: Model | None = None,
    progress: Shown = "auto",
    on_stage: Callable[[PassRecord], None] | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    **keywords: object,
) -> Pruned | None:
    """Train a pruned model against its dense model and prove the result.

    Args:
        pruned: a ``Pruned``, or an ``--out`` folder of ``prune``.
        out, progress, on_stage, data, eval_data: as in ``prune``.
        settings: only fields that do not decide what is cut count: ``learning``, ``length``, ``device``, …
        model: the dense model, if it has moved since the report was written. A ``Pruned`` from ``prune`` knows it.
        keywords: as in ``prune``.

    Raises:
        MptkError: as ``prune``; the folder was changed; or the dense model is missing or was changed.
    """
    settled = {each.path for each in Settings.declared if "recover" not in each.setting.on}
    if refused := sorted(settled & keywords.keys()):
        raise MptkError(
            f"recover cannot change {refused[0]}, which was decided when the model was pruned; prune again to change it"
        )
    base = settings or Settings(onnx=out is not None)
    asked = with_keywords(base, {**name_inputs(data=data, eval_data=eval_data), **keywords})
    folder = pruned.place if isinstance(pruned, Pruned) else pruned
    dense: str | nn.Module | Opened | None = str(model) if isinstance(model, Path) else model
    if isinstance(pruned, Pruned) and pruned.compiled is not None and model is None:
        pruned.check_dense()
        prepared = pruned.compiled.prepared
        dense = Opened(prepared.given, prepared.task)
    inputs = Inputs.of(data=data, eval_data=eval_data)
    kept = make_scratch() if out is None else None
    place = kept.folder / "pruned" if kept is not None else resolve_place(str(out))
    start = PrunedFolder.read(folder, dense)
    settings = start.take_settings(asked)
    with (
        reporting(progress) as say,
        open_run(start, start.source, place, settings, inputs, Context(Log(on_record=on_stage), say)) as run,
    ):
        result = prune_model(start, run)
    return make_pruned(result, place, kept)


def estimate_recovery(folder: str | Path, settings: Settings, model: str | None = None) -> Estimate:
    """What a recovery of ``folder`` needs. No model runs. Raises the errors of ``mptk.recover``."""
    start = PrunedFolder.read(folder, model)
    settings = start.take_settings(settings)
    estimator = start.read_estimator(settings.trust)
    assert estimator is not None
    return estimator.estimate(complete_settings(settings, estimator, recovers=True)[0])
