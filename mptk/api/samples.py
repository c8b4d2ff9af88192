"""samples: samples that the caller gives in memory, as texts, token ids, inputs or batches of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.chain.amounts import wanted
from mptk.chain.job import Given
from mptk.config.choices import IN_MEMORY
from mptk.errors import MptkError
from mptk.io import data as text
from mptk.io.data import check_positions, positions_of
from mptk.io.models import Loaded
from mptk.ir.program import Program
from mptk.ir.samples import Samples, is_tokens
from mptk.protocols.chain import Prepared
from mptk.protocols.task import Task
from mptk.tasks.inputs.base import check_dimensions, lacking, ordered
from mptk.tasks.inputs.text import fitting
from mptk.tasks.module import named_inputs
from passes.check_cut import table_size

Data = str | Path | Samples | Tensor | Mapping[str, Tensor] | Iterable[object]
"""A name as in ``--data``; or samples, token ids [n, length], inputs by name, texts, or batches of inputs."""


def in_memory(data: Data | None) -> bool:
    """Whether ``data`` holds samples, not a name."""
    return data is not None and not isinstance(data, str | Path)


def names_of(**given: Data | None) -> dict[str, str]:
    """Argument → its name in settings, for each argument that is given."""
    return {n: IN_MEMORY if in_memory(data) else str(data) for n, data in given.items() if data is not None}


def check_texts(**given: Data | None) -> None:
    """Raise MptkError if samples in memory hold token ids: ``vocabulary`` gives tokens other ids."""
    for name, data in given.items():
        if in_memory(data) and not _is_text(data):
            raise MptkError(
                f"{name} must be texts beside vocabulary, which gives tokens other ids; give a list of texts"
            )


def given(data: Data | None, eval_data: Data | None) -> Callable[[Prepared], Given] | None:
    """A function that gives a run the samples in memory; None if there are none."""
    if not in_memory(data) and not in_memory(eval_data):
        return None

    def collect(prepared: Prepared) -> Given:
        s = prepared.settings
        opened = prepared.loaded, prepared.task
        training = collected(data, *opened, wanted(s), s.length, s.seed) if in_memory(data) else None
        check_fits(training, prepared.analysis.program)
        if in_memory(eval_data):
            measured = collected(eval_data, *opened, s.eval_windows, s.eval_length, None)
            check_fits(measured, prepared.analysis.program)
            return Given(training, measured)
        own = training is not None and s.eval_data in (None, IN_MEMORY)
        return Given(training, training[: s.eval_windows] if own and training is not None else None)

    return collect


def collected(data: Any, loaded: Loaded, task: Task, count: int, length: int, seed: int | None = None) -> Samples:
    """At most ``count`` samples of ``data``; windows of text have ``length`` tokens.

    ``seed``: shuffles them; None keeps the order of the text.

    Raises:
        MptkError: they are not of this model's kind, or there are none.
    """
    like = task.example(loaded.model).inputs
    names = list(like)
    if isinstance(data, Samples):
        named_inputs(names, data.inputs)
        return ordered(data, like)[:count]
    if _is_text(data):
        inputs = {"input_ids": _windows(list(data), loaded, count, length, seed)}
    elif isinstance(data, list | tuple) and any(isinstance(each, str | bytes) for each in data):
        raise MptkError("data mixes strings with other values, or holds bytes; give a list that holds only strings")
    elif isinstance(data, Tensor | Mapping):
        inputs = named_inputs(names, data, like)
    else:
        inputs = _batched(data, like, count)
    if inputs.keys().isdisjoint(like):
        raise lacking(names[0], like)
    check_dimensions(inputs, like)
    if (ids := inputs.get("input_ids")) is not None and isinstance(loaded.model, PreTrainedModel) and is_tokens(ids):
        check_positions(positions_of(loaded.model.config), ids.shape[1], f"{ids.shape[1]} tokens of data")
    try:
        made = task.made(loaded, {name: tensor[:count] for name, tensor in inputs.items()})
    except KeyError as error:
        raise lacking(error.args[0], like) from error
    return ordered(made, like)


def check_fits(samples: Samples | None, program: Program) -> None:
    """Raise MptkError if samples in memory do not fit this program: their type differs, or token ids are too large."""
    if samples is None:
        return
    nodes = {node.name: node for node in program.placeholders()}
    for (name, tensor), given_name in zip(samples.inputs.items(), program.user_inputs, strict=True):
        node = nodes[given_name]
        like = node.meta["val"]
        if tensor.is_floating_point() != like.is_floating_point():
            raise MptkError(
                f"{name} in data has type {tensor.dtype}, but the model was traced for {like.dtype}; convert it"
            )
        table = None if tensor.is_floating_point() else table_size(node)
        if table is not None and not 0 <= int(tensor.min()) <= int(tensor.max()) < table:
            raise MptkError(
                f"{name} in data has ids from {int(tensor.min())} to {int(tensor.max())}, and the model's table has "
                f"{table} rows; give ids from 0 to {table - 1}"
            )


def _is_text(data: object) -> bool:
    return isinstance(data, list | tuple) and bool(data) and all(isinstance(each, str) for each in data)


def _windows(texts: list[str], loaded: Loaded, count: int, length: int, seed: int | None) -> Tensor:
    if loaded.tokenizer is None:
        raise MptkError(f"{loaded.source} has no tokenizer to read texts with; give tokenizer=, or token ids as data")
    return text.token_windows(texts, loaded.tokenizer, fitting(loaded, length), count, seed)


def _batched(batches: Iterable[Any], like: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """At most ``count`` samples of batches of inputs: tensors, tuples by position, or dicts by name.

    Other entries of a batch, as labels, are left out. An item with one dimension less than ``like``, as data sets give,
    is one sample.
    """
    names = list(like)
    parts: dict[str, list[Tensor]] = {}
    found = 0
    try:
        for batch in islice(batches, count):
            one = batch[: len(names)] if isinstance(batch, list | tuple) else batch
            one = {n: x for n, x in one.items() if n in names} if isinstance(one, Mapping) else one
            inputs = named_inputs(names, one, like)
            inputs = {name: x[None] if x.ndim == like[name].ndim - 1 else x for name, x in inputs.items()}
            for name, tensor in inputs.items():
                parts.setdefault(name, []).append(tensor)
            found += min((len(tensor) for tensor in inputs.values()), default=0)
            if found >= count:
                break
        return {name: torch.cat(each) for name, each in parts.items()}
    except (TypeError, RuntimeError) as error:
        raise MptkError(
            f"data has a wrong form ({str(error).partition(chr(10))[0]}); give texts, token ids [n, length], or "
            "batches of inputs of one shape, with the samples in the first dimension"
        ) from error
