"""open: the dense model that a run starts from: a name, or what the caller holds in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from mptk.config import Settings
from mptk.errors import InputError
from mptk.io import Loaded, Resident, models, name_live_model, open_live, unwrap_parallel
from mptk.protocols import Opened, Task
from mptk.run.inputs import Inputs
from mptk.tasks import bind_task, open_task
from mptk.tasks.module import Module, make_example_samples, read_inputs
from mptk.trust import Trust

Model = str | Path | nn.Module
"""A hub id, a folder, a ``.gguf`` file, a packaged alias, or a model in memory."""


def read_example_inputs(settings: Settings, inputs: Inputs) -> tuple[Settings, Inputs]:
    """The example inputs of a file, which by default are also the data."""
    if settings.inputs is None:
        return settings, inputs
    if inputs.example_inputs is not None:
        raise InputError(
            "example inputs are given twice, in memory and as a file; leave out example_inputs or inputs",
            name="example_inputs",
        )
    settings = replace(settings, data=settings.inputs if settings.data == Settings.data else settings.data)
    assert settings.inputs is not None
    return settings, replace(inputs, example_inputs=read_inputs(settings.inputs))


def take_model(model: Model, settings: Settings, inputs: Inputs) -> tuple[str | Opened, Settings, Inputs]:
    """What a run starts from, its settings and its inputs. A model in memory is opened at once, a name later.

    By default a file of example inputs is also the data. A module that has no stock class is written as a graph.

    Raises:
        MptkError: as ``open_in_memory``; the file cannot be read; or example inputs are also given in memory.
    """
    settings, inputs = read_example_inputs(settings, inputs)
    if not isinstance(model, nn.Module):
        return str(model), settings, inputs
    # At once, because whether it is plain decides the target, and with that which settings are right.
    opened = open_in_memory(model, settings.trust, inputs)
    graph = opened.plain and settings.target == "stock"
    return opened, replace(settings, target="graph") if graph else settings, inputs


def name_start(model: Model) -> str:
    """The name of a model: as the user gave it, or of its class and config."""
    return name_live_model(unwrap_parallel(model)) if isinstance(model, nn.Module) else str(model)


def open_in_memory(model: nn.Module, trust: Trust, inputs: Inputs) -> Opened:
    """Open a model that the caller holds in memory.

    Raises:
        MptkError: example inputs are missing or empty; the weights are not in memory; or no task takes the model.
    """
    model = unwrap_parallel(model)
    plain = not isinstance(model, PreTrainedModel)
    if plain and inputs.example_inputs is None:
        raise InputError(
            f"{type(model).__name__} is not a transformers model, so mptk cannot know its inputs; give "
            "example_inputs, the tensors that forward() takes",
            name="example_inputs",
        )
    loaded = open_live(model, inputs.tokenizer, trust=trust)
    return Opened(loaded, choose_task(loaded, inputs), plain)


def open_named(name: str, resident: Resident, trust: Trust, inputs: Inputs) -> Opened:
    """Open the model of that name. Raises MptkError as ``open_task``; or example inputs do not fit it."""
    # Without inputs of the caller the task is known from the config, before any weights are read.
    if inputs.example_inputs is None and inputs.tokenizer is None:
        loaded, task = open_task(name, resident, trust=trust)
        return Opened(replace(loaded, path=loaded.path.absolute()), task)  # the current folder may change
    loaded = models.open_weights(name, resident, trust=trust)
    loaded = replace(loaded, path=loaded.path.absolute(), tokenizer=inputs.tokenizer or loaded.tokenizer)
    return Opened(loaded, choose_task(loaded, inputs))


def open_model(model: Model, resident: Resident, trust: Trust, inputs: Inputs) -> Opened:
    """Open a model by its name or in memory. Raises MptkError as ``open_named`` and ``open_in_memory``."""
    if isinstance(model, nn.Module):
        return open_in_memory(model, trust, inputs)
    return open_named(str(model), resident, trust, inputs)


def choose_task(loaded: Loaded, inputs: Inputs) -> Task:
    """The task of a loaded model: by its class, or to give the outputs of example inputs."""
    example = inputs.example_inputs
    return bind_task(loaded) if example is None else Module(make_example_samples(loaded.model, example))
