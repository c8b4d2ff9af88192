"""attempt: make a config, or a class from one, and give a refusal if that raises."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.compat.torch import FakeTensorMode

Forward = Callable[[PreTrainedModel], object]
"""Runs a model once on inputs without numbers."""
TORCH = str(Path(torch.__file__).parent)
"""Where torch's own lines are: they say less about a refusal than the model's line that called them."""


@dataclass(frozen=True)
class Refusal:
    """Why the stock class cannot hold the model. A value, not an exception: the caller prints it or tries another way.

    Attributes:
        kind: the step that refused. "validator": the config's own check. "constructor": the model's, or its forward
            pass. "names": the set of parameters differs. "shape": no config field gives a parameter its shape.
            "shared": one field serves several families, which must be cut together. "numeric": the shapes fit, but the
            class computes another function.
        where: the validator, the line of the constructor, or the parameter.
        config: for "validator", the complete config that was refused (``rehome`` starts from it).
    """

    kind: Literal["validator", "constructor", "names", "shape", "shared", "numeric"]
    where: str
    reason: str
    config: PreTrainedConfig | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    def to_sentence(self, name: str) -> str:
        """The refusal for a sentence that already says ``name``."""
        return self.reason if self.where == name else str(self)


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | Refusal:
    """The model of a config, without memory for its weights."""
    with hide_warnings(), torch.device("meta"):
        try:
            return model_class(copy.deepcopy(config))
        except Exception as error:  # noqa: BLE001 (a model class may raise anything: it is the refusal)
            return make_refusal(error, model_class)


def list_weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def find_forward_failure(forward: Forward, model: PreTrainedModel) -> Refusal | None:
    """Why a forward pass of a model on the meta device raises, or None."""
    with hide_warnings(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"), torch.no_grad():
        try:
            forward(model.eval())
        except Exception as error:  # noqa: BLE001 (as above)
            return make_refusal(error, type(model))
    return None


def build_config(
    template: PreTrainedConfig, body: dict[str, object]
) -> tuple[PreTrainedConfig, Refusal | None] | Refusal:
    """The config of ``template``'s class with the fields of ``body``, and its validators' refusal or None.

    If a field's own check raises, there is no config object, and the result is only a Refusal.
    """
    with hide_warnings():
        try:
            return _build_inner_first(template, body)
        except Exception as error:  # noqa: BLE001 (a config class may raise anything: it is the refusal)
            return make_refusal(error, type(template))


def build_unchecked_config(template: PreTrainedConfig, body: dict[str, object]) -> PreTrainedConfig:
    """The config of ``template``'s class with the fields of ``body``, whatever they are."""
    return _build_inner_first(template, body, checked=False)[0]


def _build_inner_first(
    template: PreTrainedConfig, body: dict[str, object], *, checked: bool = True
) -> tuple[PreTrainedConfig, Refusal | None]:
    """Build ``template``'s class from ``body``, inner configs first, even if a validator refuses.

    ``checked``: whether the validators of single fields run.
    """
    # Inner dictionaries become configs here. The outer constructor would make them itself, and stop at a refusal.
    refused = None
    for key, inner in vars(template).items():
        own = body.get(key)
        if isinstance(inner, PreTrainedConfig) and isinstance(own, dict):
            body[key], inner_refused = _build_inner_first(inner, own, checked=checked)
            refused = refused or inner_refused
    # Validators of a field run when it is set. Those of the class run when the object is complete, so a model can be
    # built from an object that they refuse. A call of the class would not return that object, so it is made first.
    config = type(template).__new__(type(template))
    if not checked:
        vars(config)["__validators__"] = {}
    construct: Callable[..., None] = type(template).__init__
    try:
        construct(config, **body)
    except StrictDataclassClassValidationError as error:
        refused = refused or make_refusal(error, type(template))
    if refused is not None:
        refused = Refusal(refused.kind, refused.where, refused.reason, config)
    return config, refused


def make_refusal(error: Exception, cls: type) -> Refusal:
    """``error`` as a refusal of a validator, or of the innermost line outside torch that raised."""
    # huggingface_hub wraps the error of a validator in one of its own, which names the validator.
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    if issubclass(cls, PreTrainedConfig):
        place = re.search(r"for (?:validator|field) '(\w+)'", str(error))
        return Refusal("validator", f"{cls.__name__}.{place[1] if place else '__init__'}", reason)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((TORCH, __file__))] or list(frames)
    return Refusal("constructor", f"{cls.__name__}, {Path(own[-1].filename).name}:{own[-1].lineno}", reason)


@contextlib.contextmanager
def hide_warnings() -> Iterator[None]:
    """No warnings while unusual configs are tried."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
