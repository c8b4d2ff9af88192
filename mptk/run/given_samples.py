"""given_samples: samples that the caller gives in memory, as texts, token ids, inputs or batches of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.config.choices import IN_MEMORY
from mptk.errors import MptkError
from mptk.io import data as text
from mptk.io.data import check_positions, find_position_limit
from mptk.io.models import Loaded
from mptk.io.text.files import read_row_texts
from mptk.ir.program import Program
from mptk.ir.samples import Samples, is_tokens
from mptk.protocols.chain import Prepared
from mptk.protocols.task import Task
from mptk.run.amounts import count_samples
from mptk.run.inputs import Data, Inputs, is_in_memory
from mptk.tasks.inputs.base import check_dimensions, make_missing_error, order_samples
from mptk.tasks.inputs.text import limit_length
from mptk.tasks.module import name_inputs
from passes.check_cut import find_table_size

_NOTHING = object()


def check_texts(**given: Data | None) -> None:
    """Raise MptkError if samples in memory hold token ids: ``vocabulary`` gives tokens other ids."""
    for name, data in given.items():
        if not is_in_memory(data):
            continue
        once = isinstance(data, Iterator)  # which loses what is looked at
        first = None if once or isinstance(data, Tensor | Samples | Mapping) else next(_iterated(data), None)
        if not (isinstance(first, str) or _is_row(first)):
            raise MptkError(
                f"{name} must be texts beside vocabulary, which gives tokens other ids; give a list of texts"
            )


def collect_given(prepared: Prepared, inputs: Inputs) -> tuple[Samples | None, Samples | None]:
    """The caller's samples to train and calibrate on, and to measure on; None: as the settings say.

    Raises:
        MptkError: they are not of this model's kind, do not fit its program, or there are none.
    """
    s, program = prepared.settings, prepared.analysis.program
    training = evaluation = None
    if inputs.data is not None:
        training = collect_samples(inputs.data, prepared.loaded, prepared.task, count_samples(s), s.length, s.seed)
        check_fits(training, program)
    if inputs.eval_data is not None:
        evaluation = collect_samples(inputs.eval_data, prepared.loaded, prepared.task, s.eval_windows, s.eval_length)
        check_fits(evaluation, program)
    elif training is not None and s.eval_data in (None, IN_MEMORY):
        evaluation = training[: s.eval_windows]
    return training, evaluation


def collect_samples(data: Any, loaded: Loaded, task: Task, count: int, length: int, seed: int | None = None) -> Samples:
    """At most ``count`` samples of ``data``; windows of text have ``length`` tokens.

    ``seed``: shuffles them; None keeps the order of the text.

    Raises:
        MptkError: they are not of this model's kind, or there are none.
    """
    like = task.make_example(loaded.model).inputs
    names = list(like)
    if isinstance(data, Samples):
        name_inputs(names, data.inputs)
        return order_samples(data, like)[:count]
    if isinstance(data, Tensor | Mapping):
        inputs = name_inputs(names, data, like)
    else:
        each = _iterated(data)
        if (first := next(each, _NOTHING)) is _NOTHING:
            raise MptkError("data is empty; give texts, token ids [n, length], or batches of inputs")
        batches = chain([first], each)
        texts = _texts(batches, first, like, loaded)
        if texts is None:
            inputs = _batched(batches, like, count)
        else:
            inputs = {"input_ids": _windows(texts, loaded, count, length, seed, whole=isinstance(data, list | tuple))}
    if inputs.keys().isdisjoint(like):
        raise make_missing_error(names[0], like)
    check_dimensions(inputs, like)
    if (ids := inputs.get("input_ids")) is not None and isinstance(loaded.model, PreTrainedModel) and is_tokens(ids):
        check_positions(find_position_limit(loaded.model.config), ids.shape[1], f"{ids.shape[1]} tokens of data")
    try:
        made = task.made(loaded, {name: tensor[:count] for name, tensor in inputs.items()})
    except KeyError as error:
        raise make_missing_error(error.args[0], like) from error
    return order_samples(made, like)


def check_fits(samples: Samples | None, program: Program) -> None:
    """Raise MptkError if samples in memory do not fit this program: their type differs, or token ids are too large."""
    if samples is None:
        return
    nodes = {node.name: node for node in program.list_placeholders()}
    for (name, tensor), given_name in zip(samples.inputs.items(), program.user_inputs, strict=True):
        node = nodes[given_name]
        like = node.meta["val"]
        if tensor.is_floating_point() != like.is_floating_point():
            raise MptkError(
                f"{name} in data has type {tensor.dtype}, but the model was traced for {like.dtype}; convert it"
            )
        table = None if tensor.is_floating_point() else find_table_size(node)
        if table is not None and not 0 <= int(tensor.min()) <= int(tensor.max()) < table:
            raise MptkError(
                f"{name} in data has ids from {int(tensor.min())} to {int(tensor.max())}, and the model's table has "
                f"{table} rows; give ids from 0 to {table - 1}"
            )


def _iterated(data: Any) -> Iterator[Any]:
    try:
        return iter(data)
    except TypeError as error:
        raise _wrong_form(error) from error


def _is_row(first: object) -> bool:
    """Whether this is a row of a data set with text in it: it holds no tensors."""
    return isinstance(first, Mapping) and not any(isinstance(value, Tensor) for value in first.values())


def _texts(each: Iterable[Any], first: object, like: Mapping[str, Tensor], loaded: Loaded) -> Iterator[str] | None:
    """The texts in ``each``, which are strings or rows of a data set; None if it holds something else."""
    if isinstance(first, str | bytes):
        return _only_strings(each)
    reads = loaded.tokenizer is not None and "input_ids" in like
    if reads and isinstance(first, Mapping) and _is_row(first) and like.keys().isdisjoint(first):
        return read_row_texts(each, "data", None, loaded.tokenizer)
    return None


def _only_strings(each: Iterable[object]) -> Iterator[str]:
    for one in each:
        if not isinstance(one, str):
            raise MptkError("data mixes strings with other values, or holds bytes; give a list that holds only strings")
        yield one


def _windows(texts: Iterable[str], loaded: Loaded, count: int, length: int, seed: int | None, *, whole: bool) -> Tensor:
    """Windows of texts. ``whole``: they are chosen from all texts; else no more is read than it takes to choose."""
    if loaded.tokenizer is None:
        raise MptkError(f"{loaded.source} has no tokenizer to read texts with; give tokenizer=, or token ids as data")
    return text.make_token_windows(texts, loaded.tokenizer, limit_length(loaded, length), count, seed, whole=whole)


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
            inputs = name_inputs(names, one, like)
            inputs = {name: x[None] if x.ndim == like[name].ndim - 1 else x for name, x in inputs.items()}
            for name, tensor in inputs.items():
                parts.setdefault(name, []).append(tensor)
            found += min((len(tensor) for tensor in inputs.values()), default=0)
            if found >= count:
                break
        return {name: torch.cat(each) for name, each in parts.items()}
    except (TypeError, RuntimeError) as error:
        raise _wrong_form(error) from error


def _wrong_form(error: Exception) -> MptkError:
    return MptkError(
        f"data has a wrong form ({str(error).partition(chr(10))[0]}); give texts, token ids [n, length], or "
        "batches of inputs of one shape, with the samples in the first dimension"
    )
