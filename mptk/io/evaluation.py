"""evaluation: perplexity with its protocol, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mptk.errors import DataError, FileError, InputError, ModelError, PackageError, take_first_line
from mptk.io import models
from mptk.ir import Samples, make_token_samples
from mptk.progress import Count
from mptk.trust import NO_CODE, Trust

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LogitsFn = Callable[[Tensor], Tensor]
"""Token ids, int64 [B, T] → logits [B, T, V]. A torch module, a graph or an ONNX Runtime session."""

Runs = Callable[[Sequence[Samples], Count], Iterator[tuple[str, int, Tensor]]]
"""Batches of samples → (name of a run, number of the batch, outputs), for each batch and each run."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its protocol.

    ``nll``: mean negative log-likelihood in nats over the ``tokens`` predicted. ``value`` = exp(``nll``). Windows of
    ``length`` tokens do not overlap. The first token of each is not predicted. ``dtype``: the logits' type, before
    the conversion to float32.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    length: int
    dtype: str
    data: str

    @property
    def protocol(self) -> str:
        """The protocol in one line."""
        return (
            f"{self.data}: {self.windows} windows of {self.length} tokens, stride {self.length}, in the text's order, "
            f"first token of each not predicted, {self.tokens:,} predicted, {self.dtype}"
        )


@torch.no_grad()
def measure_perplexity(logits_fn: LogitsFn, windows: Tensor, *, data: str, progress: Count | None = None) -> Perplexity:
    """The perplexity of next-token predictions on ``windows``.

    Args:
        logits_fn: token ids, int64 [1, T] → logits [1, T, V], on any device.
        windows: tokens, int64 [n, T], T ≥ 2. Each window is predicted by itself.
        data: origin of the windows, for the protocol.
        progress: called with (windows done, all windows).

    Raises:
        MptkError: there is no window, windows have one token, or logits are not finite.
    """

    def run_batches(batches: Sequence[Samples], progress: Count) -> Iterator[tuple[str, int, Tensor]]:
        for i, batch in enumerate(batches):
            yield "", i, logits_fn(batch.tensors[0])
            progress(i + 1, len(batches))

    (found,) = _measure_runs(run_batches, windows, data, progress or (lambda done, total: None)).values()
    if not math.isfinite(found.nll):
        raise ModelError(
            f"the logits on {data} are not finite; the model's weights are damaged, or too large for "
            f"torch.{found.dtype}",
            name=data,
        )
    return found


def measure_perplexities(runs: Runs, windows: Tensor, *, data: str, progress: Count) -> dict[str, float | str]:
    """Name → perplexity of each of ``runs``, to 4 decimals, and their ``protocol``. ``windows``: int64 [n, T]."""
    found = _measure_runs(runs, windows, data, progress)
    protocol = next(iter(found.values())).protocol
    values = {name: round(each.value, 4) for name, each in found.items()}
    return {**values, "metric": "perplexity", "protocol": protocol}


def _measure_runs(runs: Runs, windows: Tensor, data: str, progress: Count) -> dict[str, Perplexity]:
    """Name → perplexity of each of ``runs``."""
    count, length = windows.shape
    if count == 0 or length < 2:
        raise DataError(f"no token to predict in {count} windows of {length} tokens; give more text", name="data")
    # One window at a time: its logits may take gigabytes. Sums are Python's floats, so their order hardly matters.
    rows, totals, dtype, tokens = windows.split(1), dict[str, float](), torch.float32, count * (length - 1)
    for name, i, logits in runs([make_token_samples(row) for row in rows], progress):
        predicted, target = logits[:, :-1].flatten(0, 1).float(), rows[i][:, 1:].flatten().to(logits.device)
        loss = F.cross_entropy(predicted, target, reduction="sum").item()
        totals[name], dtype = totals.get(name, 0.0) + loss, logits.dtype
    kind = str(dtype).removeprefix("torch.")
    # By torch, which gives infinity where ``math.exp`` raises an error.
    values = {name: torch.tensor(total / tokens, dtype=torch.float64).exp().item() for name, total in totals.items()}
    return {
        name: Perplexity(values[name], total / tokens, tokens, count, length, kind, data)
        for name, total in totals.items()
    }


def zero_shot(
    model: str | Path | models.Loaded,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    trust: Trust = NO_CODE,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness. Returns task → metric (``acc,none``, ``acc_stderr,none``, ...) → value.

    Args:
        model: anything that :func:`mptk.io.models.load` takes or returns.
        tasks: names of tasks or groups.
        include_path: folder with more task files. They can run code: functions that they name, and templates.
        limit: use only this many examples of each task, from the first on; all if None.
        trust: whether the code of these files may run.

    Raises:
        MptkError: lm-eval is not installed, has no such task, or fails at one; the model has no tokenizer; or the files
            of ``include_path`` are not trusted.
    """
    check_trusted(include_path, trust)
    # lm-eval is optional, and slow to import.
    if importlib.util.find_spec("lm_eval") is None:
        raise PackageError(
            "lm-eval is not installed, and it runs the tasks; run: pip install 'mptk[eval]'", name="lm-eval"
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    loaded = model if isinstance(model, models.Loaded) else models.load(str(model))
    if loaded.tokenizer is None:
        raise FileError(
            f"{loaded.source} has no tokenizer, which tasks need; add its tokenizer files", name=loaded.source
        )
    manager = _make_task_manager(tasks, include_path)
    try:
        report = lm_eval.simple_evaluate(
            model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
        )
    except Exception as error:  # a task's data, templates and functions fail in any way
        raise InputError(
            f"lm-eval cannot run {', '.join(tasks)}: {take_first_line(error)}; check the network, the task's data and "
            "its files",
            name="tasks",
        ) from error
    # The numbers of each task. lm-eval's rows also have names and counts.
    return {
        task: {key: value for key, value in row.items() if isinstance(value, float)}
        for task, row in report["results"].items()
    }


def check_trusted(include_path: str | Path | None, trust: Trust) -> None:
    """Raise MptkError for task files that the caller does not trust: functions and templates in them are code."""
    if include_path is not None and not trust.allows_code:
        raise InputError(
            f"the task files in {include_path} can run Python code on this machine; read them, and if you trust them "
            "pass --trust-remote-code (trust_remote_code=True)",
            name="trust_remote_code",
        )


def _make_task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """A manager that knows ``tasks``."""
    # Tasks may all be in ``include_path``: then lm-eval's own thousands of files need not be read.
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    unknown = tasks
    for with_own in (False, True) if path else (True,):
        manager = TaskManager(include_path=path, include_defaults=with_own)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise InputError(
        f"lm-eval has no task {unknown[0]!r}; see `lm-eval ls tasks`, or give --include-path", name=unknown[0]
    )
