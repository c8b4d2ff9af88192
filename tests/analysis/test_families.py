"""The families of nine architectures: what they are, where their units lie, that cutting them is masking them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from decoder_analyses import analyze_decoder

import mptk
from mptk import FamilyPlan, Plan, analyze, trace
from mptk.errors import PlanError
from mptk.ir import Analysis, list_axes, name_op, read_alignment, resolve_plan
from mptk.targets import find_target
from mptk.testing import DECODERS, cut_and_compare, draw_plan, draw_tokens, expect_error, make_decoder, measure_largest
from mptk.testing.decoders import FFN_SIZE, HEAD_COUNT, HEAD_SIZE, HIDDEN_WIDTH, KV_COUNT, LAYER_COUNT, VOCAB_SIZE
from passes.frontend.trace_decoder import trace_decoder
from passes.targets.stock.config import StockConfig
from passes.transforms.masked_reference import mask

Positions = npt.NDArray[np.int64]
EACH = pytest.mark.parametrize("architecture", DECODERS)


# ---- where units lie, by hand ----


def units(shape: Sequence[int], axis: int, scope: Sequence[int] = (), start: int = 0) -> Positions:
    """Positions by unit of one axis of a row-major ``shape`` that begins at ``start``: [scopes, units, k]."""
    grid = start + np.arange(np.prod(shape)).reshape(shape)
    rest = [d for d in range(len(shape)) if d != axis and d not in scope]
    scopes = int(np.prod([shape[d] for d in scope]))
    return np.sort(grid.transpose(*scope, axis, *rest).reshape(scopes, shape[axis], -1))


def joined(*parts: Positions) -> Positions:
    return np.sort(np.concatenate(parts, -1))


Golden = dict[str, dict[str, Positions]]
"""Family → member of layer 0 → positions by unit."""
GROUP = HEAD_COUNT // KV_COUNT


def linear(name: str, positions: Positions, bias: bool = False) -> dict[str, Positions]:
    return {f"{name}.weight[0]": positions} | ({f"{name}.bias[0]": positions} if bias else {})


def grouped(head: int, bias: bool = False, norms: bool = False) -> Golden:
    """Separate projections; query heads by KV head; channel i of a head turns with channel i + head/2."""
    half = head // 2
    q, k, v, o = (KV_COUNT, GROUP, 2, half), (KV_COUNT, 2, half), (KV_COUNT, head), (KV_COUNT, GROUP, head)
    at = "self_attn."
    norm = {f"{at}{n}_norm.weight[0]": units((2, half), 1) for n in "qk"} if norms else {}
    return {
        "kv_groups": linear(f"{at}q_proj", units(q, 0), bias)
        | linear(f"{at}k_proj", units(k, 0), bias)
        | linear(f"{at}v_proj", units(v, 0), bias)
        | {f"{at}o_proj.weight[1]": units(o, 0)},
        "q_heads": linear(f"{at}q_proj", units(q, 1, [0]), bias) | {f"{at}o_proj.weight[1]": units(o, 1, [0])},
        "rotary_pairs": linear(f"{at}q_proj", units(q, 3), bias) | linear(f"{at}k_proj", units(k, 2), bias) | norm,
        "v_dim": linear(f"{at}v_proj", units(v, 1, [0]), bias) | {f"{at}o_proj.weight[1]": units(o, 2, [0])},
    }


CHANNELS = units((FFN_SIZE,), 0)
GATED = {
    "ffn": {"mlp.gate_proj.weight[0]": CHANNELS, "mlp.up_proj.weight[0]": CHANNELS, "mlp.down_proj.weight[1]": CHANNELS}
}


def fused_grouped() -> Golden:
    """One projection: query heads, then key heads, then value heads; one projection for gate and up."""
    q, k, v, o = (KV_COUNT, GROUP, 2, 4), (KV_COUNT, 2, 4), (KV_COUNT, 8), (KV_COUNT, GROUP, 8)
    qkv, out = "self_attn.qkv_proj.weight[0]", "self_attn.o_proj.weight[1]"
    key, value = HIDDEN_WIDTH, HIDDEN_WIDTH + 16
    return {
        "kv_groups": {qkv: joined(units(q, 0), units(k, 0, start=key), units(v, 0, start=value)), out: units(o, 0)},
        "q_heads": {qkv: units(q, 1, [0]), out: units(o, 1, [0])},
        "rotary_pairs": {qkv: joined(units(q, 3), units(k, 2, start=key))},
        "v_dim": {qkv: units(v, 1, [0], value), out: units(o, 2, [0])},
        "ffn": {"mlp.gate_up_proj.weight[0]": units((2, FFN_SIZE), 1), "mlp.down_proj.weight[1]": CHANNELS},
    }


def fused_heads() -> Golden:
    """Weights stored [in, out]; queries, keys and values of all heads one after the other."""
    heads, out = (HEAD_COUNT, 8), "attn.c_proj.weight[0]"

    def fused(positions: Positions) -> dict[str, Positions]:
        return {"attn.c_attn.weight[1]": positions, "attn.c_attn.bias[0]": positions}

    def third(axis: int, part: int, scope: Sequence[int] = ()) -> Positions:
        return units(heads, axis, scope, part * HIDDEN_WIDTH)

    return {
        "heads": fused(joined(*(third(0, part) for part in range(3)))) | {out: units(heads, 0)},
        "qk_dim": fused(joined(third(1, 0, [0]), third(1, 1, [0]))),
        "v_dim": fused(third(1, 2, [0])) | {out: units(heads, 1, [0])},
        "ffn": {"mlp.c_fc.weight[1]": CHANNELS, "mlp.c_fc.bias[0]": CHANNELS, "mlp.c_proj.weight[0]": CHANNELS},
    }


def separate_heads() -> Golden:
    heads, at, out = (HEAD_COUNT, 8), "self_attn.", "self_attn.out_proj.weight[1]"
    whole, inner = units(heads, 0), units(heads, 1, [0])
    return {
        "heads": {key: p for n in "qkv" for key, p in linear(f"{at}{n}_proj", whole, bias=True).items()} | {out: whole},
        "qk_dim": {key: p for n in "qk" for key, p in linear(f"{at}{n}_proj", inner, bias=True).items()},
        "v_dim": linear(f"{at}v_proj", inner, bias=True) | {out: inner},
        "ffn": {"fc1.weight[0]": CHANNELS, "fc1.bias[0]": CHANNELS, "fc2.weight[1]": CHANNELS},
    }


def interleaved_heads() -> Golden:
    """Each head's query, key and value stand together; the first half of a head's channels turns, by pairs (i, i + 2)."""
    qkv, out, heads = "attention.query_key_value", "attention.dense.weight[1]", np.arange(HEAD_COUNT) * 24
    turned = np.array([[0, 2, 8, 10], [1, 3, 9, 11]])  # in a head's 24 rows: q is 0-7, k is 8-15, v is 16-23
    passed = np.array([[4, 12], [5, 13], [6, 14], [7, 15]])
    return {
        "heads": linear(qkv, units((HEAD_COUNT, 24), 0), bias=True) | {out: units((HEAD_COUNT, 8), 0)},
        "rotary_pairs": linear(
            qkv, np.sort((heads[:, None, None] + turned).transpose(1, 0, 2).reshape(1, 2, -1)), bias=True
        ),
        "qk_dim": linear(qkv, heads[:, None, None] + passed, bias=True),
        "v_dim": linear(qkv, units((HEAD_COUNT, 24), 1, [0])[:, 16:], bias=True)
        | {out: units((HEAD_COUNT, 8), 1, [0])},
        "ffn": linear("mlp.dense_h_to_4h", CHANNELS, bias=True) | {"mlp.dense_4h_to_h.weight[1]": CHANNELS},
    }


def mixture() -> Golden:
    """Packed experts: [expert, gate and up, hidden] and [expert, hidden, ffn]; channels may differ by expert."""
    expert = units((5,), 0)
    by_expert = np.tile(units((2, FFN_SIZE), 1), (5, 1, 1))
    return grouped(8) | {
        "experts": {f"mlp.{name}[0]": expert for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")},
        "ffn": {"mlp.experts.gate_up_proj[1]": by_expert, "mlp.experts.down_proj[2]": np.tile(CHANNELS, (5, 1, 1))},
    }


GOLDEN: dict[str, tuple[str, Golden]] = {
    "llama": ("model.layers.", grouped(HEAD_SIZE) | GATED),
    "qwen2": ("model.layers.", grouped(8, bias=True) | GATED),
    "qwen3": ("model.layers.", grouped(HEAD_SIZE, norms=True) | GATED),
    "gemma3": ("model.layers.", grouped(HEAD_SIZE, norms=True) | GATED),
    "phi3": ("model.layers.", fused_grouped()),
    "gpt2": ("transformer.h.", fused_heads()),
    "opt": ("model.decoder.layers.", separate_heads()),
    "gptneox": ("gpt_neox.layers.", interleaved_heads()),
    "mixtral": ("model.layers.", mixture()),
}


@EACH
def test_members_and_the_exact_positions_of_their_units(architecture):
    layers, golden = GOLDEN[architecture]
    families = {f.name: f for f in analyze_decoder(architecture).families}
    assert families.keys() == {"hidden", *golden}
    for name, expected in golden.items():
        family = families[name]
        assert len(family.groups) == LAYER_COUNT
        for i, group in enumerate(family.groups):
            assert f"{group.layer}.".startswith(f"{layers}{i}.")
            found = {f"{m.weight.removeprefix(f'{layers}{i}.')}[{m.dim}]": group.positions(m) for m in group.members}
            assert found.keys() == expected.keys(), name
            for member, positions in expected.items():
                assert np.array_equal(found[member], positions), (name, member)
        scopes, size, _ = next(iter(expected.values())).shape
        assert (family.scopes, family.size) == (scopes, size)


@EACH
def test_the_residual_width_has_every_dimension_of_its_size_that_is_nothing_else(architecture):
    layers, golden = GOLDEN[architecture]
    found = analyze_decoder(architecture)
    others = {f"{layers}{i}.{m}" for members in golden.values() for m in members for i in range(LAYER_COUNT)}
    expected = {
        f"{name}[{d}]"
        for name, dims in found.weights.items()
        for d, term in enumerate(dims)
        if term.size == HIDDEN_WIDTH and f"{name}[{d}]" not in others
    }
    (hidden,) = found.family("hidden").groups
    assert {f"{m.weight}[{m.dim}]" for m in hidden.members} == expected
    assert all(np.array_equal(hidden.positions(m), np.arange(HIDDEN_WIDTH)[None, :, None]) for m in hidden.members)


@EACH
def test_every_axis_of_every_weight_is_offered_or_blocked_with_a_reason(architecture):
    found = analyze_decoder(architecture)
    offered = {g.axis for f in found.families for g in f.groups}
    blocked = {w for b in found.blocked for w in b.weights}
    names = {found.program.aliases.get(name, name) for name, _ in make_decoder(architecture).named_parameters()}
    assert names == set(found.program.parameters)
    for name in found.program.parameters:
        for d, term in enumerate(found.weights[name]):
            assert offered.issuperset(list_axes(term)) or f"{name}[{d}]" in blocked
    assert all(b.reasons for b in found.blocked)
    assert {b.size for b in found.blocked} <= {VOCAB_SIZE, 64, 66}  # and tables of positions


@EACH
def test_families_cut_at_random_equal_the_masked_model(architecture):
    """All together, and of three architectures each by itself."""
    found = analyze_decoder(architecture)
    single = found.families if architecture in ("llama", "gpt2", "mixtral") else ()
    for names in [*([f.name] for f in single), None]:
        difference = cut_and_compare(found, draw_plan(found, names), (draw_tokens(),))
        assert difference.error <= 1e-5, (names, difference)
        assert difference.moved > 0.1, (names, difference)


@functools.cache
def analyze_half_mixtral() -> Analysis:
    return analyze(trace(make_decoder("mixtral").bfloat16(), (draw_tokens(),)))


def test_experts_in_bfloat16_take_another_op():
    """The same families; equal up to the format's rounding."""
    found = analyze_half_mixtral()
    assert "aten._grouped_mm.default" in {name_op(n) for n in found.facts.results}
    assert "transformers.grouped_mm_fallback.default" in {name_op(n) for n in analyze_decoder("mixtral").facts.results}
    assert listing(found) == listing(analyze_decoder("mixtral"))


def test_a_stock_class_of_experts_gets_rows_of_multiples_of_16_bytes_though_a_float32_trace_needs_none():
    """The class calls torch's kernel, in whatever type its checkpoint is loaded."""
    given = analyze_decoder("mixtral"), make_decoder("mixtral"), read_alignment("1")
    legal, free = find_target("stock").find_legal(*given), find_target("graph").find_legal(*given).ladders
    for name in ("hidden", "ffn"):
        assert {width % 8 for width in legal.ladders[name]} == {0}
        assert {width % 8 for width in free[name]} == {*range(8)}
        found = legal.stock.build_config({name: legal.ladders[name][0]})
        assert isinstance(found, StockConfig)
        assert found.model_class(found.config).bfloat16()(draw_tokens()).logits.isfinite().all()


def test_the_rows_of_a_grouped_product_stay_whole_multiples_of_16_bytes():
    found = analyze_half_mixtral()
    assert {f.name: f.multiple for f in found.families if f.multiple > 1} == {"hidden": 8, "ffn": 8}
    difference = cut_and_compare(found, draw_plan(found), (draw_tokens(),))
    assert difference.error <= 0.03 * difference.moved
    keep = {g.layer: (tuple(range(41)),) for g in found.family("ffn").groups}
    with expect_error(PlanError, name="ffn"):
        resolve_plan(found, Plan({"ffn": FamilyPlan(41, FFN_SIZE, keep)}))


@EACH
def test_masks_and_slices_follow_the_positions(architecture):
    """Of each weight, a mask made from the units' positions alone; a slice is what the mask leaves, in order."""
    found = analyze_decoder(architecture)
    for family in found.families:
        plan = draw_plan(found, [family.name])
        cut = resolve_plan(found, plan)
        for group in family.groups:
            rows = plan.families[family.name].keep[group.layer]
            for member in group.members:
                dims, tensor = found.weights[member.weight], found.program.state[member.weight]
                expected = torch.ones(tensor.shape, dtype=torch.bool)
                for s, kept in enumerate(rows):
                    removed = np.setdiff1d(np.arange(family.size), kept)
                    positions = torch.from_numpy(group.positions(member)[s, removed].ravel())
                    apart = [d for d, t in enumerate(dims) if d != member.dim and t in group.scope]
                    part = expected[s] if apart == [0] else expected
                    part.index_fill_(member.dim - len(apart), positions, False)
                others = [m.dim for m in group.members if m.weight == member.weight]
                if others == [member.dim]:
                    assert torch.equal(cut.mask_tensor(dims), expected)
                    assert torch.equal(cut.slice(tensor, dims).flatten(), tensor[expected])


# ---- one analysis for all traces ----


def listing(found: Analysis) -> dict[str, list[object]]:
    """Everything that a plan or a cut depends on."""
    return {
        f.name: [
            (g.layer, g.scopes, sorted((m.weight, m.dim, g.positions(m).tolist()) for m in g.members)) for g in f.groups
        ]
        for f in found.families
    }


VARIANTS = {
    "dynamic": lambda name: trace(make_decoder(name), (draw_tokens(),), dynamic=True),
    "eager attention": lambda name: trace(make_decoder(name, attention="eager"), (draw_tokens(),)),
    "no weights": lambda name: trace(make_decoder(name, meta=True), (draw_tokens(),)),
    "with a cache": lambda name: trace_decoder(make_decoder(name)),
    "training": lambda name: trace(make_decoder(name).train(), (draw_tokens(),)),
    "other sizes": lambda name: trace(make_decoder(name), (draw_tokens(3, 11),)),
}
CHOSEN = {
    "dynamic": ("llama", "mixtral"),
    "eager attention": ("llama", "gpt2", "mixtral"),
    "no weights": ("gemma3", "phi3", "mixtral"),
    "with a cache": ("gpt2", "gemma3"),
    "training": ("mixtral",),
    "other sizes": ("llama",),
}


@pytest.mark.parametrize(("variant", "architecture"), [(v, a) for v, chosen in CHOSEN.items() for a in chosen])
def test_families_do_not_depend_on_how_the_model_was_traced(architecture, variant):
    assert listing(analyze(VARIANTS[variant](architecture))) == listing(analyze_decoder(architecture))


def test_a_mask_input_changes_nothing():
    ids = draw_tokens()
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    assert listing(analyze(trace(make_decoder("llama"), (ids, padding)))) == listing(analyze_decoder("llama"))


EQUAL = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
EQUAL |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 8)


@pytest.mark.parametrize("architecture", ["llama", "gptneox"])
def test_equal_sizes_are_not_mixed_up(architecture):
    """hidden = heads·head size = ffn = vocabulary, and heads = head size: the same members by family."""

    def members(found: Analysis) -> dict[str, list[set[tuple[str, int]]]]:
        return {f.name: [{(m.weight, m.dim) for m in g.members} for g in f.groups] for f in found.families}

    changes = {key: EQUAL[key] for key in EQUAL if key in DECODERS[architecture][1]}
    heads = {"num_key_value_heads": 6} if "num_key_value_heads" in changes else {}
    reference = analyze_decoder(architecture, **heads)
    same = {"head_dim": 8} if "head_dim" in DECODERS[architecture][1] else {}
    found = analyze_decoder(architecture, **changes, **same)
    assert members(found) == members(reference)
    assert cut_and_compare(found, draw_plan(found), (draw_tokens() % 64,)).error <= 1e-5


# ---- that these tests can fail ----


def test_query_heads_of_the_wrong_group_are_found_out():
    """As if KV head 0 stood for query rows 0-9: the mistake of a tool that does not see the groups."""
    found = analyze_decoder("llama")
    plan = Plan({"kv_groups": FamilyPlan(1, 2, {g.layer: ((1,),) for g in found.family("kv_groups").groups})})
    masked = mask(found, resolve_plan(found, plan))(draw_tokens())
    query = "model.layers.0.self_attn.q_proj.weight"
    rows = [i for i in range(60) if i // 10 % 2 == 1]
    wrong = mptk.rewrite(found, plan).with_state({query: found.program.state[query][rows]})
    assert measure_largest(mptk.rewrite(found, plan)(draw_tokens()), masked) <= 1e-5
    assert measure_largest(wrong(draw_tokens()), masked) > 0.1
