"""The ONNX decoder against torch: prefill, decoding steps, padding, names, operators, files, details of some models."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_checks import SIZES, TOLERANCE, Apply, alone, cache_inputs, padded
from tiny_decoders import BIASED, CONFIGS, FUSED, GROUPED, SLIDING, graphs_of, tiny_decoder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mptk.errors import TraceError
from mptk.ir import Program
from mptk.ort.decoder import OrtDecoder
from mptk.testing import expect_error
from passes.frontend.trace_decoder import cache_shapes, trace_decoder
from passes.pipelines import emit_onnx

LENGTHS = (9, 6, 4)
STEPS = 3


@dataclass
class Emitted:
    kind: str
    model: PreTrainedModel
    program: Program
    file: Path
    decoder: OrtDecoder


@pytest.fixture(scope="module", params=list(CONFIGS))
def emitted(request, decoder_graphs):
    model, file = tiny_decoder(request.param), graphs_of(decoder_graphs(request.param))["float"]
    return Emitted(request.param, model, trace_decoder(model), file, OrtDecoder(file, threads=1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_gets_the_logits_it_gets_alone(emitted, side):
    torch.manual_seed(1)
    prompts = [torch.randint(3, 97, (length,)) for length in LENGTHS]
    new = torch.randint(3, 97, (len(prompts), STEPS))
    ids, mask = padded(prompts, side)
    logits, cache = emitted.decoder.prefill(ids, mask)
    for row, prompt in enumerate(prompts):
        found = torch.from_numpy(logits[row][mask[row] == 1])
        torch.testing.assert_close(found, alone(emitted.model, prompt), atol=TOLERANCE, rtol=0)
    if emitted.kind == SLIDING and side == "right":
        return  # the window spans cache slots, so padding between prompt and new tokens shortens it, in torch as well
    for step in range(STEPS):
        logits, cache = emitted.decoder.decode(new[:, step : step + 1].numpy(), cache)
        for row, prompt in enumerate(prompts):
            expected = alone(emitted.model, torch.cat([prompt, new[row, : step + 1]]))[-1]
            torch.testing.assert_close(torch.from_numpy(logits[row, -1]), expected, atol=TOLERANCE, rtol=0)
    assert cache.length == max(LENGTHS) + STEPS


def test_several_tokens_after_a_cache(emitted):
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (1, 13))
    _, cache = emitted.decoder.prefill(ids[:, :6].numpy())
    logits, _ = emitted.decoder.decode(ids[:, 6:].numpy(), cache)
    torch.testing.assert_close(torch.from_numpy(logits[0]), alone(emitted.model, ids[0])[6:], atol=TOLERANCE, rtol=0)


def test_names_axes_and_metadata_follow_the_ecosystem(emitted):
    model = onnx.load(emitted.file, load_external_data=False)
    onnx.checker.check_model(emitted.file, full_check=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    shape = cache_shapes(emitted.model)[0]
    past = ["batch_size", shape.heads, "past_sequence_length", shape.key_dim]
    present = ["batch_size", shape.heads, "total_sequence_length", shape.key_dim]
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{part}": past for layer in (0, 1) for part in ("key", "value")},
        "logits": ["batch_size", "sequence_length", 97],
        **{f"present.{layer}.{part}": present for layer in (0, 1) for part in ("key", "value")},
    }
    assert emitted.decoder.metadata == {"plan_sha256": "0a1b"}
    assert {entry.domain for entry in model.opset_import} == {""}
    assert sorted(p.name for p in emitted.file.parent.glob("model.*")) == ["model.onnx", "model.onnx_data"]
    assert not [word for word in (b"site-packages", b".py") if word in emitted.file.read_bytes()], "a place in the code"


def test_cache_is_folded_into_attention(emitted):
    graph = onnx.load(emitted.file, load_external_data=False).graph
    caches = [[f"past_key_values.{layer}.{part}" for part in ("key", "value")] for layer in (0, 1)]
    assert cache_inputs(emitted.file) == caches
    heads = {GROUPED: [2, 2], SLIDING: []}.get(emitted.kind, [6, 6])
    flat = [a.i for node in graph.node for a in node.attribute if a.name == "q_num_heads"]
    assert flat == heads, "with nothing between projection and attention, no transposes; a group's queries are rows"
    count = collections.Counter(node.op_type for node in graph.node)
    expected = {
        GROUPED: {"RMSNormalization": 5, "RotaryEmbedding": 4, "LayerNormalization": 0, "Reshape": 5, "Where": 1},
        SLIDING: {"RMSNormalization": 13, "RotaryEmbedding": 4, "LayerNormalization": 0},
        FUSED: {"LayerNormalization": 5, "RMSNormalization": 0},
        BIASED: {"LayerNormalization": 5, "RMSNormalization": 0},
    }[emitted.kind]
    assert {name: count[name] for name in expected} == expected


def test_tied_table_is_written_once(tmp_path):
    model = tiny_decoder(GROUPED, num_hidden_layers=1, tie_word_embeddings=True)
    file = emit_onnx(trace_decoder(model), tmp_path)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size <= file.with_name("model.onnx_data").stat().st_size + file.stat().st_size < size + 97 * 48 * 4


def test_trace_on_meta_gives_the_same_graph_and_leaves_the_model_as_it_was():
    real = tiny_decoder(GROUPED, num_hidden_layers=1)
    with torch.device("meta"):
        model = type(real)(real.config).eval()
    program, names = trace_decoder(model), {name: id(parameter) for name, parameter in real.named_parameters()}
    assert [n.target for n in program.graph.graph.nodes] == [n.target for n in trace_decoder(real).graph.graph.nodes]
    assert not any(module.training for module in real.modules())
    assert {name: id(parameter) for name, parameter in real.named_parameters()} == names
    with expect_error(TraceError):
        emit_onnx(program, Path("never-made"))
    assert not Path("never-made").exists()


def test_model_with_another_state_is_refused():
    """Also a hybrid whose layers are all recurrent, which fails on its own cache."""
    mamba = AutoConfig.for_model("mamba", hidden_size=48, state_size=6, num_hidden_layers=1, vocab_size=97)
    bamba = AutoConfig.for_model("bamba", **SIZES, num_key_value_heads=2, mamba_n_heads=12, mamba_d_head=8)
    for config in (mamba, bamba):
        model = AutoModelForCausalLM.from_config(config).eval()
        with expect_error(TraceError):
            trace_decoder(model)


def test_step_that_computes_something_else_is_refused():
    """A mean over the tokens of a call is another one when they come in two calls."""
    model = tiny_decoder(GROUPED, num_hidden_layers=1)
    model.model.norm = Apply(lambda x: x - x.mean(1, keepdim=True))
    with expect_error(TraceError, name=type(model).__name__):
        trace_decoder(model)


POSITIONS = {"max_position_embeddings": 64}
NEO = {"hidden_size": 48, "num_heads": 6, "num_layers": 1, "vocab_size": 97, "attention_types": [[["global"], 1]]}
OTHERS: dict[str, PreTrainedConfig] = {
    # It reserves the first positions for padding; the graph takes the usual ones, from 0.
    "positions from 2": AutoConfig.for_model("roberta", **SIZES, **POSITIONS, is_decoder=True, pad_token_id=1),
    # It attends by hand, slices its mask from a table, and caches keys after a change of dtype that changes nothing.
    "a table as long as its positions": AutoConfig.for_model("gpt_neo", **NEO, **POSITIONS),
    # scaled_dot_product_attention broadcasts it.
    "one key head": AutoConfig.for_model(
        "falcon", **SIZES, alibi=False, new_decoder_architecture=False, multi_query=True
    ),
    # Its mask reads all values before it attends; the cache is in Attention all the same.
    "a mask made from cached values": AutoConfig.for_model("doge", **SIZES, num_key_value_heads=2, keep_window_size=4),
    # Some get no token; the writes of the router keep the cache in Attention.
    "experts": AutoConfig.for_model("mixtral", **SIZES, num_key_value_heads=2, num_local_experts=9, head_dim=10),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_padded_rows_decode_as_alone_with_the_cache_in_attention(kind, tmp_path):
    """A row of 8 tokens and one of 5, padded on the left: prompt and one step."""
    model = tiny_decoder(OTHERS[kind])
    file = emit_onnx(trace_decoder(model), tmp_path)
    attention = [["past_key_values.0.key", "past_key_values.0.value"]]
    assert cache_inputs(file) == ([] if kind == "a table as long as its positions" else attention)
    torch.manual_seed(1)
    prompts = [torch.randint(3, 97, (length,)) for length in (8, 5)]
    ids, mask = padded([prompt[:-1] for prompt in prompts], "left")
    decoder = OrtDecoder(file, threads=1)
    logits, cache = decoder.prefill(ids, mask)
    last, _ = decoder.decode(np.stack([prompt[-1:].numpy() for prompt in prompts]), cache)
    for row, prompt in enumerate(prompts):
        expected = alone(model, prompt)
        found = torch.from_numpy(np.concatenate([logits[row][mask[row] == 1], last[row]]))
        torch.testing.assert_close(found, expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)
