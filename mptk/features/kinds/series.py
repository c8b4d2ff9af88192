"""series: CSV files of a folder, a column for each channel and a row for each step, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mptk.errors import FileError, ModelError, MptkError, take_first_line
from mptk.io import Loaded
from mptk.progress import Count
from mptk.reading import read_text
from mptk.tasks.inputs.base import EXAMPLES, FileInputs, Named


class Series(FileInputs):
    """``past_values``, float32 [samples, steps, channels]: the first window of each file."""

    what, suffixes = "CSV files of numbers", (".csv",)

    def make_example(self, model: nn.Module) -> Named:
        config = model.config
        steps, channels = getattr(config, "context_length", None), getattr(config, "num_input_channels", 1)
        if steps is None:
            raise ModelError(
                f"{type(model).__name__} does not say how many steps it reads; give --inputs (docs/kinds.md)",
                name=type(model).__name__,
            )
        generator = torch.Generator().manual_seed(0)
        return {"past_values": torch.randn(EXAMPLES, steps, channels, generator=generator)}

    def prepare(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        _, steps, channels = self.make_example(loaded.model)["past_values"].shape
        windows = []
        for done, file in enumerate(files, 1):
            windows.append(read_series(file, steps, channels))
            progress(done, len(files))
        return {"past_values": torch.stack(windows)}


def read_series(file: Path, steps: int, channels: int) -> Tensor:
    """The first ``steps`` rows of a CSV file, float32 [steps, channels]; a first row of names is left out."""

    def make_error(why: str) -> MptkError:
        return FileError(f"{file} is not a series of {steps} rows and {channels} columns of numbers ({why})", name=file)

    rows = read_text(file, make_error).splitlines()
    # A row of names has letters; a number may have the e of its exponent.
    named = bool(rows) and any(character.isalpha() for character in rows[0].replace("e", ""))
    try:
        found = np.loadtxt(rows[named : named + steps], np.float32, delimiter=",", ndmin=2)
    except ValueError as error:
        raise make_error(take_first_line(error)) from error
    if found.shape != (steps, channels):
        raise make_error(f"it has {found.shape[0]} and {found.shape[1]}")
    return torch.from_numpy(found)


PAST_VALUES = Series()
