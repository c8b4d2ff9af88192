"""sources: turn arguments of the Python API, by name or in memory, into a run's model and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.chain.amounts import wanted
from mptk.chain.estimate import estimated_for, estimator
from mptk.chain.job import Given, Job
from mptk.config.choices import IN_MEMORY
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.errors import MptkError
from mptk.io import data as text
from mptk.io import models
from mptk.io.data import check_positions, positions_of
from mptk.io.live import name_of, open_live, unwrapped
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.ir.program import Program
from mptk.ir.samples import Samples, is_tokens
from mptk.protocols.chain import Prepared
from mptk.protocols.task import Task
from mptk.tasks import open_task, task_of
from mptk.tasks.inputs.base import check_dimensions, lacking, ordered
from mptk.tasks.inputs.text import fitting
from mptk.tasks.module import Module, example_samples, named_inputs, read_inputs
from passes.check_cut import table_size

Model = str | Path | nn.Module
"""A hub id, a folder, a ``.gguf`` file, a packaged alias, or a model in memory."""
GivenInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Tensors for ``forward``, by position or by the argument's name, samples in the first dimension."""
Data = str | Path | Samples | Tensor | Mapping[str, Tensor] | Iterable[Any]
"""A name as in ``--data``; or samples, token ids [n, length], inputs by name, texts, or batches of inputs."""


@dataclass(frozen=True)
class Source:
    """A dense model. ``plain``: it is not a transformers model, so it has no stock class."""

    name: str
    load: Callable[[Resident], tuple[Loaded, Task]]
    needs: Callable[..., Estimate] | None
    plain: bool

    def job(
        self, out: Path, samples: Callable[[Prepared], Given] | None, vocabulary: Sequence[str] | None = None
    ) -> Job:
        """A run on it that ends in ``out``."""
        return Job(self.name, out, self.load, needs=self.needs, samples=samples, vocabulary=vocabulary)


def source_of(
    model: Model, *, trust: bool, tokenizer: PreTrainedTokenizerBase | None, example_inputs: GivenInputs | None
) -> Source:
    """Open the model that a run starts from.

    Raises:
        MptkError: example inputs are missing or empty; the weights are not in memory; or, when ``load`` is called, no
            task takes the model.
    """
    if not isinstance(model, nn.Module):
        name = str(model)

        def opened(resident: Resident) -> tuple[Loaded, Task]:
            if example_inputs is None and tokenizer is None:
                return open_task(name, resident, trust_remote_code=trust)
            loaded = models.open_weights(name, resident, trust_remote_code=trust)
            loaded = loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)
            return loaded, _task(loaded, example_inputs)

        return Source(name, opened, estimator(name), plain=False)
    model = unwrapped(model)
    plain = not isinstance(model, PreTrainedModel)
    if plain and example_inputs is None:
        raise MptkError(
            f"{type(model).__name__} is not a transformers model, so mptk cannot know its inputs; give "
            "example_inputs, the tensors that forward() takes"
        )
    loaded = open_live(model, tokenizer, trusted=trust)
    task = _task(loaded, example_inputs)
    needs = None if plain else partial(estimated_for, loaded.model, loaded.dtype)
    return Source(name_of(model), lambda _: (loaded, task), needs, plain)


def source_for(
    model: Model, settings: Settings, tokenizer: PreTrainedTokenizerBase | None, example_inputs: GivenInputs | None
) -> tuple[Source, Settings]:
    """What a run starts from, and its settings. By default a file of example inputs is also the data.

    Raises:
        MptkError: as ``source_of``; the file cannot be read; or example inputs are also given in memory.
    """
    if settings.inputs is not None:
        if example_inputs is not None:
            raise MptkError(
                "example inputs are given twice, in memory and as a file; leave out example_inputs or inputs"
            )
        example_inputs = read_inputs(settings.inputs)
        settings = replace(settings, data=settings.inputs if settings.data == Settings.data else settings.data)
    trust = settings.trust_remote_code
    return source_of(model, trust=trust, tokenizer=tokenizer, example_inputs=example_inputs), settings


def _task(loaded: Loaded, example_inputs: GivenInputs | None) -> Task:
    return task_of(loaded) if example_inputs is None else Module(example_samples(loaded.model, example_inputs))


# ---- samples ----


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


def _is_text(data: Any) -> bool:
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
