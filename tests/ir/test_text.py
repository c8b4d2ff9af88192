"""Programs as text: what each transformation does to a small program, and ``mptk.show``."""

from __future__ import annotations

import pytest
import torch
from made_modules import Made
from torch import Tensor, nn

import mptk
from mptk import FamilyPlan, Plan, analyze, trace
from mptk.errors import InputError
from mptk.ir import Analysis, describe_program
from mptk.testing import expect_error, make_decoder
from passes.pipelines import lowering


def gate(m: Made, ids: Tensor) -> Tensor:
    x = m.embed(ids)
    h = m.norm(x)
    return m.head(x + m.down(torch.sigmoid(m.gate(h)) * m.up(h)))


def make_gated() -> Made:
    """Tokens → 6 channels → 10 gated ones → 6 → 4 scores, with an RMS norm."""
    layers = {"embed": nn.Embedding(11, 6), "norm": nn.RMSNorm(6, eps=1e-3), "gate": nn.Linear(6, 10, bias=False)}
    layers |= {"up": nn.Linear(6, 10, bias=False), "down": nn.Linear(10, 6, bias=False), "head": nn.Linear(6, 4)}
    return Made(gate, **layers)


def analysed(net: nn.Module, example: Tensor) -> Analysis:
    return analyze(trace(net, (example,), dynamic=True))


def shown(analysis: Analysis, after: str | None = None, **widths: int) -> str:
    """The program after a pass, by the first units of the families."""
    families = {}
    for family in analysis.families:
        width = widths.get(family.name)
        if width is not None:
            keep = {group.layer: (tuple(range(width)),) for group in family.groups}
            families[family.name] = FamilyPlan(width, family.size, keep)
    return mptk.show(analysis.program, after=after, plan=Plan(families) if after else None)


@pytest.fixture(scope="module")
def gated():
    return analysed(make_gated(), torch.ones(2, 3, dtype=torch.long))


TRACED = """\
embed.weight : [11, hidden(6)]
norm.weight : [hidden(6)]
gate.weight : [ffn(10), hidden(6)]
up.weight : [ffn(10), hidden(6)]
down.weight : [hidden(6), ffn(10)]
head.weight : [4, hidden(6)]
head.bias : [4]
%inputs_0 : [batch, seq]
%embedding : [batch, seq, hidden(6)] = aten.embedding(embed.weight, %inputs_0)
%rms_norm : [batch, seq, hidden(6)] = aten.rms_norm(%embedding, [6], norm.weight, 0.001)
%linear : [batch, seq, ffn(10)] = aten.linear(%rms_norm, gate.weight)
%sigmoid : [batch, seq, ffn(10)] = aten.sigmoid(%linear)
%linear_1 : [batch, seq, ffn(10)] = aten.linear(%rms_norm, up.weight)
%mul : [batch, seq, ffn(10)] = aten.mul.Tensor(%sigmoid, %linear_1)
%linear_2 : [batch, seq, hidden(6)] = aten.linear(%mul, down.weight)
%add : [batch, seq, hidden(6)] = aten.add.Tensor(%embedding, %linear_2)
%linear_3 : [batch, seq, 4] = aten.linear(%add, head.weight, head.bias)
return %linear_3
"""


def test_a_traced_program_names_its_axes(gated):
    assert shown(gated) == TRACED


def test_rewriting_changes_sizes_alone(gated):
    assert shown(gated, "rewrite", ffn=7) == TRACED.replace("ffn(10)", "ffn(7)")


def test_folding_moves_a_norms_scale_out_of_the_graph(gated):
    rewritten, folded = (shown(gated, step, hidden=4).splitlines() for step in ("rewrite", "fold norms"))
    assert rewritten[9:11] == [
        "%rms_norm : [batch, seq, hidden(4)] = aten.rms_norm(%embedding, [4], norm.weight, 0.0015)",
        "%mul_tensor : [batch, seq, 4] = aten.mul.Tensor(%rms_norm, 1.224744871391589)",
    ]
    whole = TRACED.replace("hidden(6)", "hidden(4)").replace("[6], norm.weight, 0.001", "[4], norm.weight, 0.0015")
    assert folded == whole.splitlines()


def test_masking_keeps_every_size_and_masks_the_softmax():
    """5 → 8 → softmax over the 8 → 3."""
    layers = {"up": nn.Linear(5, 8, bias=False), "head": nn.Linear(8, 3, bias=False)}
    analysis = analysed(Made(lambda m, x: m.head(m.up(x).softmax(-1)), **layers), torch.ones(2, 5))
    (family,) = analysis.families
    channels = f"{family.name}(8)"
    assert shown(analysis, "mask", **{family.name: 6}) == (
        f"up.weight : [{channels}, 5]\n"
        f"head.weight : [3, {channels}]\n"
        "%inputs_0 : [batch, 5]\n"
        "%mul_tensor : [8, 5] = aten.mul.Tensor(up.weight, keep(6 of 8))\n"
        f"%linear : [batch, {channels}] = aten.linear(%inputs_0, %mul_tensor)\n"
        "%_fill : [batch, 8] = _fill(%linear, keep(6 of 8), -inf)\n"
        f"%softmax : [batch, {channels}] = aten.softmax.int(%_fill, -1)\n"
        "%mul_tensor_1 : [3, 8] = aten.mul.Tensor(head.weight, keep(6 of 8))\n"
        "%linear_1 : [batch, 3] = aten.linear(%softmax, %mul_tensor_1)\n"
        "return %linear_1\n"
    )


def test_lowering_for_onnx_leaves_no_write_no_cast_and_no_complex_number():
    """Channels in pairs, as complex numbers, doubled. A write in place to a fresh tensor, and a cast to its own type."""

    def forward(m: Made, x: Tensor) -> Tensor:
        h = m.up(x)
        h += 1.0
        return torch.view_as_real(torch.view_as_complex(h.reshape(2, 3, 2).to(h.dtype)) * 2.0)

    program = trace(Made(forward, up=nn.Linear(5, 6)), (torch.ones(2, 5),))
    for step in lowering():
        program = step(program).program
    assert describe_program(program) == LOWERED


LOWERED = """\
up.weight : [6, 5]
up.bias : [6]
%inputs_0 : [2, 5]
%linear : [2, 6] = aten.linear(%inputs_0, up.weight, up.bias)
%add_ : [2, 6] = aten.add.Tensor(%linear, 1.0)
%reshape : [2, 3, 2] = aten.reshape(%add_, [2, 3, 2])
%mul_tensor : [2, 3, 2] = aten.mul.Tensor(%reshape, 2.0)
return %mul_tensor
"""


def test_products_of_axes_and_source_lines_of_a_model_without_weights():
    text = mptk.show(make_decoder("llama", meta=True, num_hidden_layers=1), source=True)
    lines = dict(line.split(" : ", 1) for line in text.splitlines() if " : " in line)
    assert lines["model.layers.0.mlp.up_proj.weight"] == "[ffn(80), hidden(48)]"
    assert "kv_groups(2)·q_heads(3)" in lines["model.layers.0.self_attn.q_proj.weight"]
    assert lines["%linear"].startswith("[batch, seq, kv_groups(2)·q_heads(3)·")
    assert "  # modeling_llama.py:" in lines["%linear"]


def test_a_static_program_shows_sizes():
    text = mptk.show(trace(make_gated(), (torch.ones(2, 3, dtype=torch.long),)))
    assert "%add : [2, 3, hidden(6)] = " in text


def test_an_axis_is_not_named_if_its_size_is_another(gated):
    (ffn,) = gated.family("ffn").groups
    text = describe_program(gated.program, gated, {ffn.axis: 7})
    assert "up.weight : [10, hidden(6)]" in text
    assert "ffn" not in text


def test_an_unknown_pass_is_named_with_those_there_are(gated):
    with expect_error(InputError, name="fold") as refused:
        mptk.show(gated.program, after="fold", plan=Plan({}))
    assert sorted(refused.value.nearest) == ["fold norms", "mask", "remove blocks", "rewrite", "store"]
