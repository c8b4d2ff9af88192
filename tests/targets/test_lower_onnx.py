"""Operators that ONNX lacks: made functional, written by others, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx_checks import Apply, alone, cache_inputs
from tiny_decoders import GROUPED, tiny_decoder
from torch import Tensor
from transformers import PreTrainedModel

from mptk.errors import TargetError
from mptk.ort.decoder import OrtDecoder
from mptk.testing import expect_error
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx


def norm_of(*functions: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A tiny decoder that computes these, one after the other, in place of its last norm."""
    model = tiny_decoder(GROUPED, num_hidden_layers=1)
    model.model.norm = torch.nn.Sequential(*map(Apply, functions))
    return model


def test_operator_that_onnx_lacks_is_named(tmp_path):
    """``special_zeta`` has no counterpart in ONNX."""
    with expect_error(TargetError):
        emit_onnx(trace_decoder(norm_of(lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 2))), tmp_path)
    assert not list(tmp_path.iterdir())


def write_checked(folder: Path, *functions: Callable[[Tensor], Tensor]) -> Path:
    """The file of such a decoder's ONNX graph, which gives the decoder's logits."""
    model = norm_of(*functions)
    file = emit_onnx(trace_decoder(model), folder)
    ids = torch.randint(3, 97, (1, 5))
    logits = OrtDecoder(file, threads=1).compute_logits(ids.numpy())
    torch.testing.assert_close(torch.from_numpy(logits[0]), alone(model, ids[0]), atol=2e-3, rtol=1e-5)
    return file


def add_in_place(x: Tensor) -> Tensor:
    doubled = x * 2.0
    doubled += x
    return doubled


def read_around_writes(x: Tensor) -> Tensor:
    """What is written to is read before, by the write and after it."""
    top, _ = x.topk(48, dim=-1)
    doubled = top * 2.0
    doubled /= doubled.abs().sum(-1, keepdim=True)
    doubled += 1.0
    return doubled * 3.0 + doubled


def write_to_a_view(x: Tensor) -> Tensor:
    copy = x * 1.5
    copy[..., 3:7] += 5.0
    return copy


def view_before_a_write(x: Tensor) -> Tensor:
    """A view that was taken before the write shows what is written."""
    copy = x * 1.5
    part = copy[..., :1]
    copy += 5.0
    return copy + part


@pytest.mark.parametrize(
    ("functions", "quick"),
    [((add_in_place, read_around_writes), True), ((write_to_a_view, view_before_a_write), False)],
)
def test_ops_that_write_to_their_input_are_made_functional(tmp_path, functions, quick):
    """On a tensor that has no view the quick way, which keeps the cache in Attention; else as torch decomposes it."""
    file = write_checked(tmp_path, *functions)
    if quick:
        assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]


def differ(x: Tensor) -> Tensor:
    """``diff`` twice over, with numbers before and after."""
    return torch.diff(x, n=2, dim=-1, prepend=x[..., :1] - 1.0, append=x[..., :1])


def reverse(x: Tensor) -> Tensor:
    """``1 - x``, and squeezing a dimension that is not 1, which changes nothing."""
    return 1 - torch.rsub(x, 3, alpha=2).squeeze(2)


def attend_by_one_mask(x: Tensor) -> Tensor:
    """Attention whose mask has one row for all queries, as a mask of padding has."""
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    mask = torch.where(x.sum(-1) > 0, 0.0, -3.0)[:, None, None]
    found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    return found.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("functions", [(differ, reverse), (attend_by_one_mask,)])
def test_an_operator_that_torch_cannot_write_is_written_by_ours(tmp_path, functions):
    """The quick way: the attention keeps its cache."""
    file = write_checked(tmp_path, *functions)
    assert cache_inputs(file)[:1] == [["past_key_values.0.key", "past_key_values.0.value"]]


def turn(x: Tensor) -> Tensor:
    """Rotates pairs of channels as some rotary embeddings do."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 24, 2)).unsqueeze(1)
    angles = torch.arange(24.0) * 0.1 + x[..., :1]
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1) * 0.5
    return torch.view_as_real(pairs * turns.index_select(-1, torch.arange(23, -1, -1))).flatten(3).squeeze(1)


def turn_and_write(x: Tensor) -> Tensor:
    """And writes halves of the result into an empty tensor, as DeepSeek-V2 does."""
    turned, result = turn(x.to(torch.complex64).to(x.dtype)), torch.empty_like(x)
    result[..., :24] = turned[..., :24]
    result[..., 24:] = turned[..., 24:]
    return result


@pytest.mark.parametrize(
    "functions",
    [
        (lambda x: torch.max(torch.min(torch.square(x), x + 2.0), x - 1.0), lambda x: torch.sinc(x) + x),
        (turn, turn_and_write),
    ],
    ids=["ops that the exporter lacks", "complex numbers"],
)
def test_others_are_written_by_other_ops_and_complex_numbers_as_pairs(tmp_path, functions):
    write_checked(tmp_path, *functions)
