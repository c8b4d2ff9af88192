"""Errors of the Python API speak of keywords, those of the command line of options.

It reaches for mptk.api.words: flags of other programs, in errors that need several processes or a network.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import mptk
from mptk import MptkError
from mptk.api.words import to_python_words


def test_python_reads_keywords() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    asked = {"method": "magnitude", "sparsity": 0.29, "align": 8, "tolerance": 1e-4}
    with pytest.raises(MptkError) as told:
        mptk.prune(net, example_inputs=(torch.ones(2, 8),), progress=None, **asked)
    assert "; or give align=1 for finer widths" in str(told.value)
    assert "--" not in str(told.value)


@pytest.mark.parametrize("said", ["add --fsdp_version 2", "run: pip install --no-deps x", "`mptk prune m --estimate`"])
def test_flags_of_other_programs_and_whole_commands_stay(said: str) -> None:
    assert to_python_words(said) == said


@pytest.mark.features
def test_a_command_reads_options(typed: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("prune", "smollm2-135m", "--layers", "1", "--method", "wanda", "--out", "x") == 1
    assert "use --target nemotron-nas or --target graph" in capsys.readouterr().err
