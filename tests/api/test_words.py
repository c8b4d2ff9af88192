"""Errors of the Python API speak of keywords (tests/run/test_budgets.py), those of the command line of options.

It reaches for mptk.api.words: flags of other programs, in errors that need several processes or a network.
"""

from __future__ import annotations

import pytest

from mptk.api.words import to_python_words


@pytest.mark.parametrize("said", ["add --fsdp_version 2", "run: pip install --no-deps x", "`mptk prune m --estimate`"])
def test_flags_of_other_programs_and_whole_commands_stay(said):
    assert to_python_words(said) == said


@pytest.mark.features
def test_a_command_reads_options(run_words, capsys):
    assert run_words("prune", "smollm2-135m", "--layers", "1", "--method", "wanda", "--out", "x") == 1
    assert "--target graph" in capsys.readouterr().err
