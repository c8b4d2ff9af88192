"""base: the protocol of a kind of inputs, and random inputs of any kind."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mptk.config import Settings
from mptk.errors import DataError, FileError, MptkError, take_first_line
from mptk.files import expand_path
from mptk.io import RANDOM_DATA, RANDOM_NAME, Loaded, count_aside
from mptk.ir import Samples
from mptk.progress import Count

PIXELS, POSITIONS = "pixel_values", "position_ids"
"""Inputs that models of several kinds read."""
EXAMPLES = 2
"""Samples of an example: a trace takes a size of 1 for a constant."""
Named = dict[str, Tensor]
"""Argument of ``forward`` → tensor, samples in the first dimension."""


class Inputs(Protocol):
    """A kind of inputs."""

    def make_example(self, model: nn.Module) -> Named:
        """Two small samples, from only the model's config."""
        ...

    def draw_calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        """``count`` samples of ``settings.data``.

        Raises:
            MptkError: there is no such data, or the model lacks what prepares it.
        """
        ...

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        """``settings.eval_windows`` samples of ``settings.eval_data``, else ``settings.data``. Errors as above."""
        ...

    def name_data(self, data: str) -> str:
        """``data`` as the protocol of a measurement names it."""
        return RANDOM_NAME if data == RANDOM_DATA else data


def draw_inputs(example: Mapping[str, Tensor], count: int, bounds: Mapping[str, int], seed: int) -> Named:
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
            # Integers without a bound, such as sizes, must stay what they are.
            made[name] = tensor[:1].expand(shape).clone()
    return made


def count_measured_only(there: int, settings: Settings) -> int:
    """How many samples of ``data``, the first ones, a run only measures on; 0 if it measures on other data."""
    return count_aside(settings.eval_windows, there) if settings.eval_data is None else 0


class FileInputs(Inputs):
    """Inputs made from the files of a folder. ``what``: the kind of file, for errors; ``suffixes``: of their names."""

    what: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def prepare(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        """The inputs that the model's own preprocessor makes of the files."""

    def draw_calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        if settings.data == RANDOM_DATA:
            return draw_inputs(self.make_example(loaded.model), count, {}, settings.seed)
        files = self.find(settings.data)
        files = files[count_measured_only(len(files), settings) :]
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(settings.seed))
        return self.prepare(loaded, [files[i] for i in order[:count]], progress)

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        data = settings.eval_data or settings.data
        if data == RANDOM_DATA:  # another seed, so that it is not measured on what it was calibrated on
            return draw_inputs(self.make_example(loaded.model), settings.eval_windows, {}, settings.seed + 1)
        files = self.find(data)
        measured = files[: count_measured_only(len(files), settings) or settings.eval_windows]
        return self.prepare(loaded, measured, lambda done, total: None)

    def find(self, data: str) -> list[Path]:
        """All such files in the folder ``data`` and below, in the order of their paths."""
        folder, what = expand_path(data), self.what
        if not folder.is_dir():
            raise DataError(
                f"this model reads {what}, and {data} is not a folder of them; give one with --data, or random",
                name=data,
            )
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes and path.is_file())
        if not found:
            ends = ", ".join(self.suffixes)
            raise DataError(f"{data} holds no {what} ({ends}); give a folder with some, or convert them", name=data)
        return found


def load_preprocessor(loaded: Loaded, auto: Any, what: str, packages: str = "") -> Any:
    """What ``auto``, a class of transformers, loads to prepare files for a model.

    For the error if the model has none: ``what``: its name; ``packages``: a remedy of its own.
    """
    try:
        return auto.from_pretrained(loaded.path, trust_remote_code=loaded.trust.allows_code)
    except (OSError, ValueError, ImportError) as error:
        raise FileError(
            f"{loaded.source} has no {what} that transformers can load ({take_first_line(error)}); add its "
            f"preprocessor_config.json,{packages} or give --data random",
            name=loaded.source,
        ) from error


def select_accepted(model: nn.Module, inputs: Mapping[str, Tensor]) -> Named:
    """The ``inputs`` that the model's ``forward`` takes."""
    names = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name in names}


def order_samples(samples: Samples, like: Mapping[str, Tensor]) -> Samples:
    """The samples with only the model's inputs, in the order of ``like``, examples of them."""
    for name in like:
        if name not in samples.inputs:
            raise make_missing_error(name, like)
    check_dimensions(samples.inputs, like)
    return Samples({name: samples.inputs[name] for name in like}, samples.targets)


def check_dimensions(inputs: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise MptkError unless there are samples with the dimensions of the examples ``like``, and finite as these."""
    for name in inputs.keys() & like.keys():
        tensor, wanted = inputs[name], ["n", *like[name].shape[1:]]
        if tensor.ndim != len(wanted) or not tensor.numel():
            raise DataError(
                f"{name} in data is {list(tensor.shape)}, not like {wanted}; put the samples in the first dimension",
                name=name,
            )
        if tensor.isinf().any() and not like[name].isinf().any():
            raise DataError(f"{name} in data holds inf, and the example inputs do not; give finite numbers", name=name)


def make_missing_error(name: str, like: Mapping[str, Tensor]) -> MptkError:
    """The error for samples without the input ``name``."""
    return DataError(
        f"the samples in data lack the input {name!r}; the model takes {', '.join(like)}", name=name, nearest=like
    )
