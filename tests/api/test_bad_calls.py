"""Every call of ``tests/bad_inputs/calls.py``: an error of its class in one line; what was given is as it was."""

from __future__ import annotations

import re

import pytest
import torch

import mptk
from tests.bad_inputs.calls import CALLS, Parts
from tests.bad_inputs.table import listing

REMEDY = re.compile(r"[;:,.(] ?\S|give|do not use|check|write|choose|see|add|remove", re.I)


@pytest.fixture(scope="module")
def parts(tiny_folders, tmp_path_factory):
    return Parts(dict(tiny_folders), tmp_path_factory.mktemp("calls"))


def state(parts: Parts) -> list[tuple[str, torch.Tensor, bool]]:
    """The weights of what calls are given, and the modes that its modules are in."""
    modules = (parts.module, parts.two, parts.model)
    return [(n, t.clone(), m.training) for m in modules for n, t in m.state_dict().items()]


@pytest.mark.features
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_bad_call(call, parts, go_to):
    go_to(parts.root)
    before, files = state(parts), listing(parts.root)
    with pytest.raises(call.kind) as told:
        call.run(parts)
    if issubclass(call.kind, mptk.MptkError):
        said = str(told.value)
        assert type(told.value) is call.kind
        assert told.value.name == call.about.format(root=parts.root, tiny=parts.folders["model"].parent)
        assert "\n" not in said
        assert REMEDY.search(said), said
    assert listing(parts.root) == files
    for (name, tensor, mode), (_, now, later) in zip(before, state(parts), strict=True):
        assert torch.equal(tensor, now), name
        assert mode == later
