"""The model and the text of both files about ladders."""

from __future__ import annotations

import pytest
import torch

from mptk.testing import WORDS


@pytest.fixture(scope="module")
def llama(laboratory):
    return str(laboratory.open_model())


@pytest.fixture(scope="module")
def text(laboratory):
    order = torch.randint(len(WORDS), [4000], generator=torch.Generator().manual_seed(0))
    said = " ".join(WORDS[i] for i in order)
    return str(laboratory.keep("ladders/text.txt", lambda file: file.write_text(said)))
