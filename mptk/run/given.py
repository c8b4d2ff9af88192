"""given: the samples that the caller of a run gives in memory: to calibrate, train and measure on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.config import IN_MEMORY
from mptk.errors import DataError, InputError, MptkError
from mptk.io import ASIDE_PARTS, Loaded, check_positions, count_aside, find_position_limit, read_row_texts
from mptk.io import data as text
from mptk.ir import Program, Samples, is_tokens
from mptk.protocols import Prepared, Task
from mptk.run.amounts import count_samples
from mptk.run.inputs import Data, Inputs, is_in_memory
from mptk.tasks.inputs.base import check_dimensions, make_missing_error, order_samples
from mptk.tasks.inputs.text import limit_length, make_text_rows
from mptk.tasks.module import name_tensors
from passes.check_cut import find_table_size

_NOTHING = object()


def check_texts(**given: Data | None) -> None:
    """Raise MptkError if samples in memory hold token ids: ``vocabulary`` gives tokens other ids."""
    for name, data in given.items():
        if not is_in_memory(data):
            continue
        # An iterator loses what is looked at, so it is refused unseen.
        once = isinstance(data, Iterator)
        first = None if once or isinstance(data, Tensor | Samples | Mapping) else next(_iterate_data(data), None)
        if not (isinstance(first, str) or _is_row(first)):
            raise InputError(
                f"{name} must be texts beside vocabulary, which gives tokens other ids; give a list of texts", name=name
            )


def collect_given(prepared: Prepared, inputs: Inputs) -> tuple[Samples | None, Samples | None]:
    """The caller's samples to train and calibrate on, and to measure on; None: as the settings say."""
    s, program = prepared.settings, prepared.analysis.program
    training = evaluation = None
    given = inputs.data
    if given is not None:
        apart = s.eval_data in (None, IN_MEMORY) and inputs.eval_data is None
        rows, given = set_texts_aside(given, prepared) if apart else (None, given)
        apart = apart and rows is None
        # As many as show that a quarter is more than is measured on.
        count = max(count_samples(s) + s.eval_windows, ASIDE_PARTS * s.eval_windows) if apart else count_samples(s)
        training = collect_samples(given, prepared.loaded, prepared.task, count, s.length, s.seed)
        check_fits(training, program)
        if apart:
            border = count_aside(s.eval_windows, len(training))
            evaluation = training[: border or s.eval_windows]
            training = training[border:][: count_samples(s)]
        else:
            evaluation = rows
    if inputs.eval_data is not None:
        texts, given = find_texts(inputs.eval_data, prepared.loaded, prepared.task, program)
        if texts is not None:
            evaluation = make_text_rows(prepared.loaded, islice(texts, s.eval_windows), s.eval_length)
        else:
            evaluation = collect_samples(given, prepared.loaded, prepared.task, s.eval_windows, s.eval_length)
            check_fits(evaluation, program)
    return training, evaluation


def set_texts_aside(data: Any, prepared: Prepared) -> tuple[Samples | None, Any]:
    """Single texts of ``data`` to measure on, None if the task is measured on windows; and what is left of it."""
    s, loaded = prepared.settings, prepared.loaded
    texts, rest = find_texts(data, loaded, prepared.task, prepared.analysis.program)
    if texts is None:
        return None, rest
    first = list(islice(texts, ASIDE_PARTS * s.eval_windows))
    border = count_aside(s.eval_windows, len(first))
    rest = chain(first[border:], texts)
    # A list is in memory, so windows are chosen from all of it.
    return make_text_rows(loaded, first[:border] or first, s.eval_length), list(rest) if _is_list(data) else rest


def find_texts(
    data: Any, loaded: Loaded, task: Task, program: Program | None = None
) -> tuple[Iterator[str] | None, Any]:
    """The texts in memory, None if these are no texts or are not measured on; and all of ``data``.

    An iterator loses what is looked at, so what is returned takes its place.
    """
    if isinstance(data, Samples | Tensor | Mapping) or not takes_texts(loaded, task, program):
        return None, data
    each = _iterate_data(data)
    if (first := next(each, _NOTHING)) is _NOTHING:
        return None, data
    every = chain([first], each)
    texts = _find_texts(every, first, task.make_example(loaded.model).inputs, loaded)
    return texts, data if _is_list(data) else every


def _is_list(data: object) -> bool:
    return isinstance(data, list | tuple)


def collect_samples(data: Any, loaded: Loaded, task: Task, count: int, length: int, seed: int | None = None) -> Samples:
    """At most ``count`` samples of ``data``; windows of text have ``length`` tokens.

    ``seed``: shuffles them; None keeps the order of the text.

    Raises:
        MptkError: they are not of this model's kind, or there are none.
    """
    # By form: samples; one tensor or inputs by name; else texts, rows or batches, which their first item tells apart.
    like = task.make_example(loaded.model).inputs
    names = list(like)
    if isinstance(data, Samples):
        name_tensors(names, data.inputs)
        return order_samples(data, like)[:count]
    if isinstance(data, Tensor | Mapping):
        inputs = name_tensors(names, data, like)
    else:
        each = _iterate_data(data)
        if (first := next(each, _NOTHING)) is _NOTHING:
            raise DataError("data is empty; give texts, token ids [n, length], or batches of inputs", name="data")
        batches = chain([first], each)
        texts = _find_texts(batches, first, like, loaded)
        if texts is None:
            inputs = _join_batches(batches, like, count)
        else:
            inputs = {"input_ids": _make_windows(texts, loaded, count, length, seed, whole=_is_list(data))}
    # Check names, dimensions and positions here: an error of the program would name none of the caller's words.
    if inputs.keys().isdisjoint(like):
        raise make_missing_error(names[0], like)
    check_dimensions(inputs, like)
    if (ids := inputs.get("input_ids")) is not None and isinstance(loaded.model, PreTrainedModel) and is_tokens(ids):
        check_positions(find_position_limit(loaded.model.config), ids.shape[1], f"{ids.shape[1]} tokens of data")
    try:
        made = task.make_samples(loaded, {name: tensor[:count] for name, tensor in inputs.items()})
    except KeyError as error:  # the task needs an input that is not there
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
            raise DataError(
                f"{name} in data has type {tensor.dtype}, but the model was traced for {like.dtype}; convert it",
                name=name,
            )
        table = None if tensor.is_floating_point() else find_table_size(node)
        if table is not None and not 0 <= int(tensor.min()) <= int(tensor.max()) < table:
            raise DataError(
                f"{name} in data has ids from {int(tensor.min())} to {int(tensor.max())}, and the model's table has "
                f"{table} rows; give ids from 0 to {table - 1}",
                name=name,
            )


def _iterate_data(data: Any) -> Iterator[Any]:
    try:
        # A table of pandas iterates over the names of its columns.
        return iter(data.to_dict("records") if hasattr(data, "itertuples") else data)
    except TypeError as error:
        raise _make_form_error(error) from error


def _is_row(first: object) -> bool:
    """Whether this is a row of a data set with text in it: it holds no tensors."""
    return isinstance(first, Mapping) and not any(isinstance(value, Tensor) for value in first.values())


def _find_texts(each: Iterable[Any], first: object, like: Mapping[str, Tensor], loaded: Loaded) -> Iterator[str] | None:
    """The texts in ``each``, which are strings or rows of a data set; None if it holds something else."""
    if isinstance(first, str | bytes):
        return _check_strings(each)
    reads = loaded.tokenizer is not None and "input_ids" in like
    if reads and isinstance(first, Mapping) and _is_row(first) and like.keys().isdisjoint(first):
        return read_row_texts(each, "data", None, loaded.tokenizer)
    return None


def _check_strings(each: Iterable[object]) -> Iterator[str]:
    for one in each:
        if not isinstance(one, str):
            raise DataError(
                "data mixes strings with other values, or holds bytes; give a list that holds only strings", name="data"
            )
        yield one


def _make_windows(
    texts: Iterable[str], loaded: Loaded, count: int, length: int, seed: int | None, *, whole: bool
) -> Tensor:
    """Windows of texts. ``whole``: they are chosen from all texts; else no more is read than it takes to choose."""
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source} has no tokenizer to read texts with; give tokenizer=, or token ids as data",
            name="tokenizer",
        )
    return text.make_token_windows(texts, loaded.tokenizer, limit_length(loaded, length), count, seed, whole=whole)


def _join_batches(batches: Iterable[Any], like: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """At most ``count`` samples of batches of inputs: tensors, tuples by position, or dicts by name.

    Other entries of a batch, such as labels, are left out. An item with one dimension less than ``like`` is one sample:
    data sets give such items.
    """
    names = list(like)
    parts: dict[str, list[Tensor]] = {}
    found = 0
    # torch's own errors are of the caller's data here: `cat` of unlike shapes, `len` of a number.
    try:
        for batch in islice(batches, count):
            one = batch[: len(names)] if isinstance(batch, list | tuple) else batch
            one = {n: x for n, x in one.items() if n in names} if isinstance(one, Mapping) else one
            inputs = name_tensors(names, one, like)
            inputs = {name: x[None] if x.ndim == like[name].ndim - 1 else x for name, x in inputs.items()}
            for name, tensor in inputs.items():
                parts.setdefault(name, []).append(tensor)
            found += min((len(tensor) for tensor in inputs.values()), default=0)
            if found >= count:
                break
        return {name: torch.cat(each) for name, each in parts.items()}
    except (TypeError, RuntimeError) as error:
        raise _make_form_error(error) from error


def _make_form_error(error: Exception) -> MptkError:
    return DataError(
        f"data has a wrong form ({str(error).partition(chr(10))[0]}); give texts, token ids [n, length], or "
        "batches of inputs of one shape, with the samples in the first dimension",
        name="data",
    )


def takes_texts(loaded: Loaded, task: Task, program: Program | None = None) -> bool:
    """Whether single texts of any length are measured on; a program that takes only one length gets windows."""
    return task.should_measure_texts(loaded) and (program is None or task.find_fixed_length(program) is None)
