"""A tiny checkpoint, and command lines in this process."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from command_lines import Files, Result
from transformers.utils import logging

from mptk.testing import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of 2 layers, 2 key/value heads for 3 queries each, 64 channels; and a text it can read."""
    folder = tmp_path_factory.mktemp("cli")
    model = make_llama()
    for parameter in model.parameters():
        parameter.data.mul_(6)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "text.raw").write_text(" ".join(f"wizard {n} has {n * n} jars of honey\n" for n in range(150)))
    return Files(str(folder / "model"), str(folder / "text.raw"))


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """No bars of transformers, as ``main`` sets it."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def mptk(inside, run_words, capsys):
    """Runs a command line in this process, as the console script does."""

    def run(*arguments: str | Path) -> Result:
        inside.bound("mptk.cli.console.out.width", 2000)
        capsys.readouterr()
        with warnings.catch_warnings():
            code = run_words(*arguments)
        return Result(code, *capsys.readouterr())

    return run
