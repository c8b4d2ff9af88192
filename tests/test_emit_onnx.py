"""The ONNX decoder against torch: prefill, decoding steps, padding, names, operators, files."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_decoders import BIASED, CONFIGS, FUSED, GROUPED, SLIDING, tiny_decoder
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DogeConfig,
    FalconConfig,
    GPTNeoConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    RobertaConfig,
)

from mptk.errors import MptkError
from mptk.ir.program import Program
from mptk.runtime.decoder import OrtDecoder
from passes.frontend.trace_decoder import cache_shapes, trace_decoder
from passes.pipelines import emit_onnx

LENGTHS = (9, 6, 4)
STEPS = 3
TOLERANCE = 1e-4
SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 6, "vocab_size": 97}


@dataclass
class Emitted:
    kind: str
    model: PreTrainedModel
    program: Program
    file: Path
    decoder: OrtDecoder


@pytest.fixture(scope="module", params=list(CONFIGS))
def emitted(request, tmp_path_factory) -> Emitted:
    model = tiny_decoder(request.param)
    program = trace_decoder(model)
    file = emit_onnx(program, tmp_path_factory.mktemp("onnx"), metadata={"plan_sha256": "0a1b"})
    return Emitted(request.param, model, program, file, OrtDecoder(file, threads=1))


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [sequence, vocab] of one sequence, without cache and padding."""
    return model(ids[None], use_cache=False).logits[0]


def padded(prompts: list[Tensor], side: str) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), 3), np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt.numpy(), 1
    return ids, mask


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


def test_program_runs_in_torch_at_other_sizes(emitted):
    """The traced step itself, at sizes other than the example's, with an empty past and with one token."""
    torch.manual_seed(3)
    ids = torch.randint(3, 97, (4, 8))
    empty = [
        torch.zeros(4, shape.heads, 0, dim)
        for shape in cache_shapes(emitted.model)
        for dim in (shape.key_dim, shape.value_dim)
    ]
    positions = torch.arange(8).expand(4, -1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        _, *past = emitted.program(ids[:, :7], mask[:, :7], positions[:, :7], *empty)
        logits, *_ = emitted.program(ids[:, 7:], mask, positions[:, 7:], *past)
    for row in range(4):
        torch.testing.assert_close(logits[row, -1], alone(emitted.model, ids[row])[-1], atol=TOLERANCE, rtol=0)


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
    assert sorted(p.name for p in emitted.file.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_cache_is_folded_into_attention(emitted):
    graph = onnx.load(emitted.file, load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    assert [list(node.input[4:6]) for node in attention] == [
        [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"] for layer in (0, 1)
    ]
    heads = {GROUPED: [2, 2], SLIDING: []}.get(emitted.kind, [6, 6])
    flat = [a.i for node in attention for a in node.attribute if a.name == "q_num_heads"]
    assert flat == heads, "with nothing between projection and attention, no transposes; a group's queries are rows"
    count = collections.Counter(node.op_type for node in graph.node)
    expected = {
        GROUPED: {"RMSNormalization": 5, "RotaryEmbedding": 4, "LayerNormalization": 0, "Reshape": 5, "Where": 1},
        SLIDING: {"RMSNormalization": 13, "RotaryEmbedding": 4, "LayerNormalization": 0},
        FUSED: {"LayerNormalization": 5, "RMSNormalization": 0},
        BIASED: {"LayerNormalization": 5, "RMSNormalization": 0},
    }[emitted.kind]
    assert {name: count[name] for name in expected} == expected


def test_no_path_or_stack_trace_of_this_machine_is_in_the_file(emitted):
    content = emitted.file.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_tied_table_is_written_once(tmp_path):
    model = tiny_decoder(GROUPED, num_hidden_layers=1, tie_word_embeddings=True)
    file = emit_onnx(trace_decoder(model), tmp_path)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size <= file.with_name("model.onnx.data").stat().st_size + file.stat().st_size < size + 97 * 48 * 4


def test_last_logits_only(tmp_path):
    model = tiny_decoder(GROUPED, num_hidden_layers=1)
    decoder = OrtDecoder(emit_onnx(trace_decoder(model, logits="last"), tmp_path), threads=1)
    ids = torch.randint(3, 97, (2, 7))
    logits = decoder.logits(ids.numpy())
    assert logits.shape == (2, 1, 97)
    for row in range(2):
        torch.testing.assert_close(torch.from_numpy(logits[row, 0]), alone(model, ids[row])[-1], atol=TOLERANCE, rtol=0)


def test_trace_on_meta_gives_the_same_graph():
    real = tiny_decoder(GROUPED, num_hidden_layers=1)
    with torch.device("meta"):
        model = type(real)(real.config).eval()
    program = trace_decoder(model)
    assert [n.target for n in program.graph.graph.nodes] == [n.target for n in trace_decoder(real).graph.graph.nodes]
    with pytest.raises(MptkError, match="without weights"):
        emit_onnx(program, Path("never-made"))
    assert not Path("never-made").exists()


def test_trace_leaves_the_model_as_it_was():
    model = tiny_decoder(FUSED)
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    trace_decoder(model)
    assert not any(module.training for module in model.modules())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names


def test_model_with_another_state_is_refused():
    """Also a hybrid whose layers are all recurrent, which fails on its own cache."""
    mamba = MambaConfig(hidden_size=48, state_size=6, num_hidden_layers=1, vocab_size=97)
    bamba = BambaConfig(**SIZES, num_key_value_heads=2, mamba_n_heads=12, mamba_d_head=8)
    for config in (mamba, bamba):
        model = AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(MptkError, match="only if every layer caches its keys and values"):
            trace_decoder(model)


def test_operator_that_onnx_lacks_is_named(tmp_path):
    """``special_zeta`` has no counterpart in ONNX."""

    class Odd(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.zeta(x.abs() + 2, x.abs() + 2)

    model = tiny_decoder(GROUPED, num_hidden_layers=1)
    model.model.norm = Odd()
    with pytest.raises(MptkError, match="special_zeta"):
        emit_onnx(trace_decoder(model), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def with_norm(tmp_path_factory):
    """Writes a tiny model with another last norm as ONNX; compares logits and returns the file."""

    def write(norm: torch.nn.Module) -> Path:
        model = tiny_decoder(GROUPED, num_hidden_layers=1)
        model.model.norm = norm
        file = emit_onnx(trace_decoder(model), tmp_path_factory.mktemp("norm"))
        ids = torch.randint(3, 97, (1, 5))
        logits = OrtDecoder(file, threads=1).logits(ids.numpy())
        torch.testing.assert_close(torch.from_numpy(logits[0]), alone(model, ids[0]), atol=2e-3, rtol=1e-5)
        return file

    return write


def cache_inputs(file: Path) -> list[list[str]]:
    """The cache inputs of each Attention operator."""
    nodes = [node for node in onnx.load(file, load_external_data=False).graph.node if node.op_type == "Attention"]
    return [list(node.input[4:6]) for node in nodes]


class Fresh(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2.0
        doubled += x
        return doubled


class Read(torch.nn.Module):
    """What is written to is read before, by the write and after it."""

    def forward(self, x: Tensor) -> Tensor:
        top, _ = x.topk(48, dim=-1)
        doubled = top * 2.0
        doubled /= doubled.abs().sum(-1, keepdim=True)
        doubled += 1.0
        return doubled * 3.0 + doubled


class View(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        copy = x * 1.5
        copy[..., 3:7] += 5.0
        return copy


class ViewBefore(torch.nn.Module):
    """A view that was taken before the write shows what is written."""

    def forward(self, x: Tensor) -> Tensor:
        copy = x * 1.5
        part = copy[..., :1]
        copy += 5.0
        return copy + part


@pytest.mark.parametrize("norm", [Fresh, Read, View, ViewBefore])
def test_ops_that_write_to_their_input_are_made_functional(with_norm, norm):
    """On a tensor that has no view the quick way, which keeps the cache in Attention; else as torch decomposes it."""
    file = with_norm(norm())
    if norm in (Fresh, Read):
        assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]


class Renamed(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.max(torch.min(torch.square(x), x + 2.0), x - 1.0)


class Decomposed(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sinc(x) + x


@pytest.mark.parametrize("norm", [Renamed, Decomposed])
def test_ops_that_the_exporter_lacks_are_written_by_others(with_norm, norm):
    with_norm(norm())


class Turned(torch.nn.Module):
    """Rotates pairs of channels as some rotary embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 24, 2)).unsqueeze(1)
        angles = torch.arange(24.0) * 0.1 + x[..., :1]
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1) * 0.5
        return torch.view_as_real(pairs * turns.index_select(-1, torch.arange(23, -1, -1))).flatten(3).squeeze(1)


class TurnedAndWritten(Turned):
    """And writes halves of the result into an empty tensor, as DeepSeek-V2 does."""

    def forward(self, x: Tensor) -> Tensor:
        turned = super().forward(x.to(torch.complex64).to(x.dtype))
        result = torch.empty_like(x)
        result[..., :24] = turned[..., :24]
        result[..., 24:] = turned[..., 24:]
        return result


@pytest.mark.parametrize("norm", [Turned, TurnedAndWritten])
def test_complex_numbers_become_pairs(with_norm, norm):
    with_norm(norm())


def assert_padded_rows_decode_as_alone(model: PreTrainedModel, file: Path) -> None:
    """A row of 8 tokens and one of 5, padded on the left: prompt and one step."""
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


def test_positions_start_where_the_model_starts_them(tmp_path):
    """RoBERTa reserves the first positions for padding; the graph takes the usual ones, from 0."""
    config = RobertaConfig(**SIZES, is_decoder=True, pad_token_id=1, max_position_embeddings=64)
    model = tiny_decoder(config)
    assert_padded_rows_decode_as_alone(model, emit_onnx(trace_decoder(model), tmp_path))


def test_step_that_computes_something_else_is_refused():
    """A mean over the tokens of a call is another one when they come in two calls."""

    class Centred(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(1, keepdim=True)

    model = tiny_decoder(GROUPED, num_hidden_layers=1)
    model.model.norm = Centred()
    with pytest.raises(MptkError, match="computes other logits than the whole sequence"):
        trace_decoder(model)


def test_one_key_head_for_all_query_heads(tmp_path):
    """Falcon lets scaled_dot_product_attention broadcast it."""
    config = FalconConfig(**SIZES, alibi=False, new_decoder_architecture=False, multi_query=True)
    model = tiny_decoder(config)
    file = emit_onnx(trace_decoder(model), tmp_path)
    assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]
    assert_padded_rows_decode_as_alone(model, file)


def test_model_with_a_table_as_long_as_its_positions(tmp_path):
    """GPT-Neo slices its mask from one, and caches keys after a change of dtype that changes nothing."""
    config = GPTNeoConfig(
        hidden_size=48,
        num_heads=6,
        num_layers=1,
        attention_types=[[["global"], 1]],
        max_position_embeddings=64,
        vocab_size=97,
    )
    model = tiny_decoder(config)
    assert_padded_rows_decode_as_alone(model, emit_onnx(trace_decoder(model), tmp_path))


def test_mask_made_from_cached_values(tmp_path):
    """Doge's mask reads all values before it attends; the cache is in Attention all the same."""
    model = tiny_decoder(DogeConfig(**SIZES, num_key_value_heads=2, keep_window_size=4))
    file = emit_onnx(trace_decoder(model), tmp_path)
    assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]
    assert_padded_rows_decode_as_alone(model, file)


def test_mixture_of_experts(tmp_path):
    """Grouped products of experts, some of which get no token; the writes of the router keep the cache in Attention."""
    model = tiny_decoder(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=9, head_dim=10))
    file = emit_onnx(trace_decoder(model), tmp_path)
    assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]
    assert_padded_rows_decode_as_alone(model, file)
