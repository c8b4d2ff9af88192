"""sources: turn the model of a call of the Python API, by name or in memory, into what a run starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.chain.estimate import estimated_for, estimator
from mptk.chain.job import Given, Job
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate
from mptk.errors import MptkError
from mptk.io import models
from mptk.io.live import name_of, open_live, unwrapped
from mptk.io.models import Loaded
from mptk.io.resident import Resident
from mptk.protocols.chain import Prepared
from mptk.protocols.task import Task
from mptk.tasks import open_task, task_of
from mptk.tasks.module import Module, example_samples, read_inputs
from mptk.trust import Trust

Model = str | Path | nn.Module
"""A hub id, a folder, a ``.gguf`` file, a packaged alias, or a model in memory."""
GivenInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Tensors for ``forward``, by position or by the argument's name, samples in the first dimension."""


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
    model: Model, *, trust: Trust, tokenizer: PreTrainedTokenizerBase | None, example_inputs: GivenInputs | None
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
                loaded, task = open_task(name, resident, trust=trust)
                return replace(loaded, path=loaded.path.absolute()), task  # the current folder may change
            loaded = models.open_weights(name, resident, trust=trust)
            loaded = replace(loaded, path=loaded.path.absolute(), tokenizer=tokenizer or loaded.tokenizer)
            return loaded, _task(loaded, example_inputs)

        return Source(name, opened, estimator(name), plain=False)
    model = unwrapped(model)
    plain = not isinstance(model, PreTrainedModel)
    if plain and example_inputs is None:
        raise MptkError(
            f"{type(model).__name__} is not a transformers model, so mptk cannot know its inputs; give "
            "example_inputs, the tensors that forward() takes"
        )
    loaded = open_live(model, tokenizer, trust=trust)
    task = _task(loaded, example_inputs)
    needs = None if plain else partial(estimated_for, loaded.model, loaded.dtype)
    return Source(name_of(model), lambda _: (loaded, task), needs, plain)


def source_for(
    model: Model, settings: Settings, tokenizer: PreTrainedTokenizerBase | None, example_inputs: GivenInputs | None
) -> tuple[Source, Settings]:
    """What a run starts from, and its settings. By default a file of example inputs is also the data.

    A module that has no stock class is written as a graph.

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
    trust = settings.trust
    source = source_of(model, trust=trust, tokenizer=tokenizer, example_inputs=example_inputs)
    return source, replace(settings, target="graph") if source.plain and settings.target == "stock" else settings


def _task(loaded: Loaded, example_inputs: GivenInputs | None) -> Task:
    return task_of(loaded) if example_inputs is None else Module(example_samples(loaded.model, example_inputs))
