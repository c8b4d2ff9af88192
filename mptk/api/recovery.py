"""recovery: ``mptk.recover``: train a pruned folder against its dense model, by ``prune`` from its plan and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mptk.api.pruned import Pruned, Shown, finished
from mptk.api.samples import Data, given, names_of
from mptk.api.sources import Model
from mptk.api.words import public
from mptk.chain.recovery import recovery
from mptk.config.setting import with_keywords
from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.ir.passes import PassRecord


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
    chosen = with_keywords(base, {**names_of(data=data, eval_data=eval_data), **keywords})
    start = pruned.place if isinstance(pruned, Pruned) else pruned
    dense = None
    if isinstance(pruned, Pruned) and pruned.compiled is not None and model is None:
        pruned.check_dense()
        prepared = pruned.compiled.prepared
        dense = prepared.given, prepared.task
    there, samples = str(model) if isinstance(model, Path) else model, given(data, eval_data)
    return finished(lambda place: recovery(start, place, chosen, there, dense, samples), out, progress, on_stage)
