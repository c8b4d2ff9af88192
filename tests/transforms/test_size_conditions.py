"""A condition on a size holds wherever a program goes: in memory, copied, pickled, in an archive, in ONNX.

Each case is a body of a module and a size for which its trace does not hold; None if it holds for all.
It reaches for the archive and the ONNX graph of a program, without a run around them.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mptk
from mptk.errors import DataError, ProofError, TargetError
from mptk.ir.size_functions import SizeNumbers
from mptk.targets.archive import ARCHIVE, open_archive, write_archive
from mptk.testing import draw_plan, expect_error
from passes.pipelines import emit_onnx
from passes.targets.onnx.emit import Interface
from tests.programs.oracles import zeroed

Sizes = tuple[int, int]
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[Sizes], list[Sizes]]] = {
    "sqrt": (lambda h, x: h * math.sqrt(x.shape[1] / 2), [(5, 6)], [(3, 9)]),
    "pool": (lambda h, x: F.avg_pool1d(h.mT, int(x.shape[1] / 3)).mT, [(4, 7)], [(3, 9)]),
    "half": (lambda h, x: h[:, : int(x.shape[1] * 0.5)], [(4, 7)], [(3, 9)]),
    "quotient": (lambda h, x: h if x.shape[1] / x.shape[0] > 1.5 else h * 2, [(5, 12)], [(6, 6)]),
    "max of floats": (lambda h, x: h * max(x.shape[1] / 4, 1.0), [(3, 9)], [(3, 3)]),
    "root": (lambda h, x: h * int(x.shape[1] ** 0.5), [(4, 7)], [(3, 9)]),
    "log2": (lambda h, x: h * math.log2(x.shape[1] / 2), [(5, 6)], [(3, 9)]),
    "resize": (lambda h, x: F.interpolate(h.mT, size=int(1.5 * x.shape[1])).mT, [(5, 6)], [(3, 9)]),
    "power": (lambda h, x: h * 2 ** x.shape[1], [(4, 7)], []),
    "bits": (lambda h, x: h if x.shape[1] & 1 == 0 else h * 2, [(5, 12)], [(3, 9)]),
    "absolute": (lambda h, x: h * 2 if abs(x.shape[0] - x.shape[1]) == 3 else h, [(4, 7)], [(3, 9)]),
    "a number": (lambda h, x: h * abs(x.shape[1] - 20), [(3, 40)], []),
    "divisor": (lambda h, x: h * (1.0 if 12 // (x.shape[1] // 5) > 9 else 2.0), [(4, 7)], [(3, 12)]),
    "symbolic root": (lambda h, x: h * torch.sym_sqrt(x.shape[1]), [(4, 7)], []),
    "ceil": (lambda h, x: h[:, : math.ceil(x.shape[1] / 4)], [(3, 9)], []),
    "floor": (lambda h, x: h[:, : math.floor(x.shape[1] / 4)], [(4, 7)], [(3, 9)]),
    "round": (lambda h, x: h[:, : round(x.shape[1] / 4)], [(3, 10), (3, 14), (3, 11)], []),
    "less": (lambda h, x: h * (1.0 if x.shape[1] < 100 else 2.0), [(3, 99)], [(3, 100)]),
    "unequal": (lambda h, x: h * (1.0 if x.shape[0] != 5 else 2.0), [(4, 7)], [(5, 6)]),
    "patches": (lambda h, x: h.reshape(h.shape[0], h.shape[1] // 2, 2, 40).mean(2), [(3, 8)], []),
}
IN_ONNX = ["less", "unequal", "half", "bits", "round", "quotient"]


class Net(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.body = nn.Linear(8, 40), nn.Linear(40, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.body(self.up(x).relu(), x))


def made(sizes: Sizes) -> Tensor:
    return torch.randn(*sizes, 8, generator=torch.Generator().manual_seed(3))


def cut(name: str) -> tuple[Any, nn.Module]:
    """The cut program of a case, and the dense module with zeros for what is gone."""
    net = Net(CASES[name][0]).eval()
    analysis = mptk.analyze(mptk.trace(net, made((3, 6)), dynamic=True))
    plan = draw_plan(analysis)
    return mptk.rewrite(analysis, plan), zeroed(net, analysis, plan)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_condition_holds_in_memory_and_in_every_file(name, tmp_path):
    (program, oracle), (_, taken, refused) = cut(name), CASES[name]
    write_archive(tmp_path / ARCHIVE, program)
    plain = torch.export.load(tmp_path / ARCHIVE).module()
    plain.load_state_dict(program.state_dict(), assign=True)
    opened = open_archive(tmp_path / ARCHIVE, program.state).module()
    forms = {"in memory": program.module(), "opened": opened, "a deep copy": copy.deepcopy(opened)}
    forms |= {"a pickle": pickle.loads(pickle.dumps(opened)), "plain torch": plain}  # noqa: S301
    if name in IN_ONNX:
        file = emit_onnx(program, tmp_path, Interface({"x": ("batch", "steps", None)}, ["y"]))
        session = onnxruntime.InferenceSession(file)
        forms["ONNX"] = lambda x: torch.tensor(session.run(None, {"x": x.numpy()})[0])
    refusals = {"plain torch": RuntimeError, "ONNX": Exception}  # ONNX Runtime has no class of its own for it
    for form, run in forms.items():
        for sizes in [(3, 6), *taken]:
            near = {"atol": 1e-5, "rtol": 1e-5} if form == "ONNX" else {}
            torch.testing.assert_close({form: run(made(sizes))}, {form: oracle(made(sizes))}, **near)
        for sizes in refused:
            with pytest.raises(refusals.get(form, DataError)):
                run(made(sizes))


@pytest.mark.always
def test_a_run_proves_both_sides_of_each_condition(tmp_path, inside):
    """A batch of 1, where the module computes otherwise, too. A graph without its conditions is not published."""

    def centred(h: Tensor, x: Tensor) -> Tensor:
        return (h - h.mean(0) if h.shape[0] > 1 else h) * (1.0 if x.shape[1] < 20 else 2.0)

    asked: dict[str, Any] = {"sparsity": 0.3, "align": 1, "tolerance": 0.2, "method": "magnitude", "progress": None}
    pruned = mptk.prune(Net(centred), tmp_path / "out", example_inputs=made((3, 6)), **asked)
    stages = {row["stage"] for row in pruned.report.proof}
    assert {f"{ARCHIVE} at other sizes", "ONNX Runtime at other sizes"} <= stages
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    for sizes in ((1, 6), (3, 20)):
        with pytest.raises(Exception, match="traced for other sizes"):
            session.run(None, {"x": made(sizes).numpy()})
    # No damage to the file would do: the proof reads the graph before it is written.
    inside.bound("passes.targets.onnx.check_sizes.SizeNodes.require", lambda nodes, value, holds, said: value)
    with expect_error(ProofError):
        mptk.prune(Net(centred), tmp_path / "other", example_inputs=made((3, 6)), **asked)


def test_what_cannot_be_written_is_refused_before_any_work():
    net = Net(lambda h, x: h * (x.shape[1] & 5))
    with expect_error(TargetError):
        mptk.prune(net, sparsity=0.3, align=1, tolerance=0.2, example_inputs=made((3, 6)), progress=None)


def test_functions_of_sizes_are_pythons():
    numbers = SizeNumbers()
    for x in (-7.5, -2.5, -2.0, -0.5, -1e-20, 0.0, 0.5, 1.5, 2.5, 2.4999999999999996, 3.7, 1e9 + 0.5):
        found = numbers.floor_to_int(x), numbers.ceil_to_int(x), numbers.round_to_int(x), numbers.abs(x)
        assert found == (math.floor(x), math.ceil(x), round(x), abs(x)), x
    for a in range(-9, 10):
        for b in (1, 2, 3, 4, 6):
            assert numbers.round_quotient(a, b) == round(a / b)
        assert (numbers.bitwise_and(a, 3), numbers.bitwise_or(a, 7), numbers.bitwise_xor(a, 1)) == (a & 3, a | 7, a ^ 1)
