"""What is written of a module of one's own: it opens without its class, in plain torch too, and nothing in it can run."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mptk
from mptk.errors import DataError, FileError, InputError, ProofError, TargetError
from mptk.io import read_archive
from mptk.io.archive import EXAMPLE_INPUTS, MODEL, is_size_expression
from mptk.ort.sessions import OrtGraph
from mptk.publish.manifest import update_manifest
from mptk.targets.archive import ARCHIVE
from mptk.testing import expect_error
from tests.damage import mutated

PLAIN = """
import sys, torch
from safetensors.torch import load_file

folder, inputs = sys.argv[1], load_file(sys.argv[2])
module = torch.export.load(f"{folder}/model.pt2").module()
module.load_state_dict(load_file(f"{folder}/model.safetensors"), assign=True)
for found, name in zip(module(inputs["x"]), ("y", "h"), strict=True):
    assert torch.equal(found, inputs[name])
assert "mptk" not in sys.modules

import mptk  # a new process, which has not the module's class either

whole = torch.load(f"{folder}/../whole.pt", weights_only=False)
for small in (mptk.Pruned.open(folder).model, whole):
    for name, found in small(x=inputs["x"]).items():
        assert torch.equal(found, inputs[name])
"""


class Odd(nn.Module):
    """Tied, frozen and unsaved tensors, a state, a condition on sizes, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 7, 3)
        self.one, self.back, self.tied = nn.Linear(7, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.tied.weight = self.one.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("scale", torch.rand(5), persistent=False)
        self.shift = torch.randn(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        h = self.second(self.first(x).relu())
        if x.shape[2] % 2 == 0 and x.shape[2] * x.shape[3] > 40:
            h = h * 2 / (x.shape[3] + 1) ** 0.5
        h = h.mean((2, 3))
        return {"y": self.tied(self.back(self.one(h))) * self.scale + self.shift + self.calls, "h": h}


X = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pruned():
    return mptk.prune(Odd(), sparsity=0.33, tolerance=0.1, example_inputs=X, progress=None)


@pytest.fixture(scope="module")
def folder(pruned, tmp_path_factory):
    return pruned.save(tmp_path_factory.mktemp("archive") / "out")


def test_a_new_process_opens_it_with_plain_torch_and_with_mptk(pruned, folder, fresh):
    small, x, inputs = copy.deepcopy(pruned.model), torch.randn(3, 3, 12, 8), folder.parent / "x.safetensors"
    torch.save(small, folder.parent / "whole.pt")
    save_file({"x": x, **{name: found.detach() for name, found in small(x).items()}}, inputs)
    done = fresh.run(PLAIN, folder, inputs)
    assert done.code == 0, done.err


def test_an_opened_module_is_the_one_that_was_saved_and_can_be_pruned_again(pruned, folder):
    opened, small = mptk.Pruned.open(folder).model, pruned.model
    assert {n: t.shape for n, t in opened.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    assert opened.state_dict().keys() == Odd().state_dict().keys()
    assert opened.one.weight is opened.tied.weight
    assert [n for n, p in opened.named_parameters() if not p.requires_grad] == ["first.bias"]
    given = torch.randn(3, 3, 12, 8)
    expected = copy.deepcopy(small)(given)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened(given).items())
    assert opened.calls == 1
    with expect_error(DataError):
        opened(torch.randn(1, 3, 8, 4))
    opened.train()(given)["y"].sum().backward()
    assert opened.tied.weight.grad is not None
    again = mptk.prune(opened, sparsity=0.25, tolerance=0.1, example_inputs=X, progress=None)
    assert again.model.first.weight.shape[0] < opened.first.weight.shape[0]


def test_an_archive_of_other_outputs_fails_the_proof(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / ARCHIVE).write_bytes(changed(folder, lambda name, part: replaced(name, part, "relu.def", "sin.def")))
    update_manifest(copied, ARCHIVE)
    with expect_error(ProofError, name=ARCHIVE):
        mptk.verify(copied, model=Odd())


def changed(folder: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> bytes:
    """The archive with each part changed, and more parts."""
    place = folder.parent / "changed.pt2"
    with zipfile.ZipFile(folder / ARCHIVE) as old, zipfile.ZipFile(place, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename.partition("/")[2], old.read(info)))
        for name, part in more.items():
            new.writestr(f"model/{name}", part)
    return place.read_bytes()


def replaced(name: str, part: bytes, old: str, new: str) -> bytes:
    if name != MODEL and not name.endswith(".json"):
        return part
    return part.replace(old.encode(), new.encode())


CALL = "__import__('os').system('true')"
ATTACKS: dict[str, tuple[str, str]] = {
    "an expression": ("Symbol('s", f"{CALL}+Symbol('s"),
    "an expression in a symbol": ("Symbol('s", "Symbol('exit() s"),
    "a function": ("torch.ops.aten.relu.default", "torch.hub.load"),
    "a file that is mapped": ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"),
    "a name": ('"relu"', json.dumps(f"relu, x={CALL}")),
    "a pickled weight": ('"use_pickle": false', '"use_pickle": true'),
    "a class": ("builtins.tuple", "collections.defaultdict"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_could_run_code_is_refused(attack, folder, tmp_path):
    old, new = ATTACKS[attack]
    file = tmp_path / "model.pt2"
    file.write_bytes(changed(folder, lambda name, part: replaced(name, part, old, new)))
    assert file.read_bytes() != changed(folder, lambda _, part: part)
    with expect_error(FileError, name=file) as refused:
        read_archive(file)
    # Refused by the check of the text, before torch reads any of it.
    assert refused.value.__cause__ is None


def test_pickles_and_other_files_are_not_read(folder, tmp_path):
    file, ran = tmp_path / "model.pt2", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    torch.save(Evil(), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    file.write_bytes(changed(folder, lambda name, part: evil if name == EXAMPLE_INPUTS else part))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_archive(file)
    assert not ran.exists()
    more = changed(folder, lambda _, part: part, **{"data/weights/model.pt": evil})
    for wrong in (more, more[:2000]):
        file.write_bytes(wrong)
        with expect_error(FileError, name=file):
            read_archive(file)


def test_a_damaged_archive_is_read_or_refused(folder, tmp_path):
    good, file, refused = (folder / ARCHIVE).read_bytes(), tmp_path / "model.pt2", 0
    for seed in range(0, 48, 4):
        file.write_bytes(mutated(good, random.Random(seed)))
        try:
            read_archive(file)
        except FileError:
            refused += 1
    assert refused > 6


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("Add(Symbol('s0', positive=True, integer=True), Integer(-2))", True),
        ("Pow(Symbol('s0'), Integer(2))", True),
        ("FloatPow(ToFloat(Symbol('s0')), Float('0.5', precision=53))", True),
        ("Pow(Symbol('s0'), Rational(1, 2))", True),
        ("Pow(Integer(9), Pow(Integer(9), Integer(9)))", False),
        ("Pow(Integer(9), Float('1e9', precision=53))", False),
        ("PowByNatural(Integer(2), Add(Symbol('s0'), Integer(-1)))", True),
        ("Pow(Integer(9), Mul(Symbol('s0'), Symbol('s0')))", False),
        ("Pow(Integer(11), Symbol('s0'))", False),
        ("Integer(9)**9", False),
        ("Symbol('s0').name", False),
        ("exit()", False),
        ("Symbol('exit()')", False),
        ("(" * 2000, False),
    ],
)
def test_only_sizes_are_expressions(text, holds):
    assert is_size_expression(text) is holds


class Several(nn.Module):
    """Two outputs of any number of samples and of steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x).relu()
        return self.down(h), h.mean((1, 2))


def test_a_modules_onnx_graph_has_its_outputs_and_open_sizes(tmp_path):
    inputs = {"example_inputs": torch.randn(2, 5, 6)}
    found = mptk.prune(Several(), tmp_path / "out", sparsity=0.25, tolerance=0.1, progress=None, **inputs)
    assert {row["stage"] for row in found.report.proof} >= {ARCHIVE, "ONNX Runtime"}
    again, x = mptk.export(found.model, tmp_path / "again", **inputs), torch.randn(3, 7, 6)
    for folder in (tmp_path / "out" / "onnx", again):
        graph = OrtGraph(folder / "model.onnx")
        assert [value.name for value in graph.session.get_outputs()] == ["output_0", "output_1"]
        for one, other in zip(graph.run_all({"x": x}), found.model(x), strict=True):
            torch.testing.assert_close(one, other.detach())


def test_a_module_that_onnx_would_change_is_refused(tmp_path, inside):
    with expect_error(InputError, name="example_inputs"):
        mptk.export(Several(), tmp_path)
    with expect_error(TargetError, name="onnx"):
        mptk.export(Odd(), tmp_path, example_inputs=X)
    inside.spoil("mptk.api.graphs.cut_to_plan", lambda program: program.with_state({"down.bias": torch.ones(4)}))
    with expect_error(ProofError, name="ONNX Runtime"):
        mptk.export(Several(), tmp_path, example_inputs=torch.randn(2, 5, 6))
