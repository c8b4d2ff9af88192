"""base: the protocol of a kind of inputs, and random inputs of any kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.io.models import Loaded
from mptk.io.text.sources import RANDOM, RANDOM_NAME
from mptk.ir.samples import Samples
from mptk.progress import Count

Named = dict[str, Tensor]
"""Argument of ``forward`` → tensor, samples in the first dimension."""


class Inputs(Protocol):
    """A kind of inputs."""

    def example(self, model: nn.Module) -> Named:
        """Two small samples, from the model's config alone."""
        ...

    def calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        """``count`` samples of ``settings.data``.

        Raises:
            MptkError: there is no such data, or the model lacks what prepares it.
        """
        ...

    def evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        """``settings.eval_windows`` samples of ``settings.eval_data``, else of ``settings.data``. Errors are those."""
        ...

    def named(self, data: str) -> str:
        """``data`` as the protocol of a measurement names it."""
        return RANDOM_NAME if data == RANDOM else data


def random_inputs(example: Mapping[str, Tensor], count: int, bounds: Mapping[str, int], seed: int) -> Named:
    """``count`` random samples in the shapes of ``example``: normal numbers, integers below their bound."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in example.items():
        shape = (count, *tensor.shape[1:])
        if tensor.is_floating_point():
            made[name] = torch.randn(shape, generator=generator)
        elif name in bounds:
            made[name] = torch.randint(bounds[name], shape, generator=generator)
        else:
            made[name] = tensor[:1].expand(shape).clone()
    return made


def accepted(model: nn.Module, inputs: Mapping[str, Tensor]) -> Named:
    """Those of ``inputs`` that the model's ``forward`` takes."""
    names = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name in names}


def ordered(samples: Samples, like: Mapping[str, Tensor]) -> Samples:
    """The samples with the model's inputs alone, in the order of ``like``, examples of them."""
    for name in like:
        if name not in samples.inputs:
            raise lacking(name, like)
    check_dimensions(samples.inputs, like)
    return Samples({name: samples.inputs[name] for name in like}, samples.targets)


def check_dimensions(inputs: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise MptkError unless there are samples with the dimensions of the examples ``like``, and finite as these."""
    for name in inputs.keys() & like.keys():
        tensor, wanted = inputs[name], ["n", *like[name].shape[1:]]
        if tensor.ndim != len(wanted) or not tensor.numel():
            raise MptkError(
                f"{name} in data is {list(tensor.shape)}, not like {wanted}; put the samples in the first dimension"
            )
        if tensor.isinf().any() and not like[name].isinf().any():
            raise MptkError(f"{name} in data holds inf, and the example inputs do not; give finite numbers")


def lacking(name: str, like: Mapping[str, Tensor]) -> MptkError:
    """The error for samples without the input ``name``."""
    return MptkError(f"the samples in data lack the input {name!r}; the model takes {', '.join(like)}")
