"""tasks: kinds of models, and how to load a model as one of them. Features bring most kinds.

A kind's ONNX form is data that ``onnx_export`` and ``onnx_proof`` read; it stands beside the kind, or in
``decoder_form`` and ``model_form``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.errors import FileError, ModelError
from mptk.io import Loaded, Resident, find_model_classes, load_tensors, models
from mptk.plugins import with_features, with_plugins
from mptk.protocols import PROVEN_ON, OnnxForm, Report, Task
from mptk.tasks.causal_lm import CausalLM, make_kind_error
from mptk.tasks.encoder import Encoder
from mptk.tasks.module import Module, make_example_samples
from mptk.trust import NO_CODE, Trust

CAUSAL_LM = CausalLM()
TASKS: dict[str, Task] = {task.name: task for task in (CAUSAL_LM, Encoder())}
"""The core's tasks. Features bring all others."""


def list_tasks() -> dict[str, Task]:
    """The core's, features' and plugins' tasks (group ``mptk.tasks``), by name, in the order they are tried in."""
    # The first task that takes a model has it, so the order counts: a vision-language model could also be taken for a
    # decoder, and a dual encoder for a bare encoder.
    found: dict[str, Task] = with_plugins(with_features(TASKS, "tasks"), "mptk.tasks")
    return dict(sorted(found.items(), key=lambda named: -named[1].priority))


def open_task(model: str, resident: Resident, *, trust: Trust = NO_CODE) -> tuple[Loaded, Task]:
    """Open a model (``models.open_weights``) with the first task that takes it.

    Raises:
        MptkError: as ``models.load``; or no task takes the model, which is checked before weights are read.
    """
    config = models.load_config(model, trust=trust)
    task = _find(model, config, find_model_classes(config))
    loaded = models.open_weights(model, resident, trust=trust)
    return loaded, task.bind(loaded)


def find_task(model: str, *, trust: Trust = NO_CODE) -> Task:
    """The task of a model, from only its config. Raises MptkError if there is no such model, or no task takes it."""
    config = models.load_config(model, trust=trust)
    return _find(model, config, find_model_classes(config))


def bind_task(loaded: Loaded) -> Task:
    """The task of a loaded model. Raises MptkError if no task takes it."""
    return _find(loaded.source, loaded.model.config, {type(loaded.model)}).bind(loaded)


def _find(model: str, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> Task:
    reasons: dict[str, str] = {}
    if (task := _find_first(config, classes, reasons)) is not None:
        return task
    said = " and ".join(f"no {what}: {why}" for what, why in reasons.items())
    raise make_kind_error(model, said)


def _find_first(
    config: PreTrainedConfig, classes: set[type[PreTrainedModel]], reasons: dict[str, str] | None = None
) -> Task | None:
    """The first task that takes the classes of a model; ``reasons`` gets why each one before it does not."""
    for task in list_tasks().values():
        if (reason := task.explain_refusal(config, classes)) is None:
            return task
        if reasons is not None:
            reasons[task.summary] = reason
    return None


def find_task_form(model: PreTrainedModel) -> OnnxForm | None:
    """The ONNX form of the first task that takes the model; None if no task does, or it has none."""
    task = _find_first(model.config, {type(model)})
    return None if task is None else task.onnx


def match_task(model: nn.Module) -> Task | None:
    """The first task that takes a transformers model's class; None for another module, or if no task does."""
    return _find_first(model.config, {type(model)}) if isinstance(model, PreTrainedModel) else None


def check_decoder(model: str, *, trust: Trust = NO_CODE) -> None:
    """Raise MptkError if a model is not a causal language model by its config."""
    config = models.load_config(model, trust=trust)
    reason = CAUSAL_LM.explain_refusal(config, find_model_classes(config))
    if reason is not None:
        raise ModelError(
            f"{model} is no {CAUSAL_LM.summary}: {reason}; `mptk analyze` shows what can be cut in it, and "
            "`mptk prune` cuts it",
            name=model,
        )


def load_decoder(model: str, *, trust: Trust = NO_CODE) -> Loaded:
    """Load a causal language model.

    Raises:
        MptkError: as ``models.load``; or it is of another kind, which is checked before weights are read.
    """
    check_decoder(model, trust=trust)
    loaded = models.load_whole(model, trust=trust)
    with torch.no_grad():
        example = CAUSAL_LM.make_example(loaded.model)
        CAUSAL_LM.check(loaded, lambda batch: getattr(loaded.model(**batch.inputs), "logits", None), example)
    return loaded


def find_folder_task(folder: Path, report: Report, loaded: Loaded) -> Task:
    """The task that a folder was pruned as. A module gets the example inputs of its proof."""
    inputs = load_folder_inputs(folder, report)
    return bind_task(loaded) if inputs is None else Module(make_example_samples(loaded.model, inputs))


def load_folder_inputs(folder: Path, report: Report) -> dict[str, Tensor] | None:
    """The example inputs of a folder that was pruned as a module; None if it was not."""
    if report.task != Module.name:
        return None
    return load_tensors(
        folder / PROVEN_ON,
        lambda why: FileError(
            f"{folder} has no {PROVEN_ON} ({why}); do not use the folder, prune again", name=PROVEN_ON
        ),
    )
