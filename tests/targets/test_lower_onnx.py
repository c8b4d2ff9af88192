"""Operators that ONNX lacks: made functional, written by others, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_checks import alone, cache_inputs
from tiny_decoders import GROUPED, tiny_decoder
from torch import Tensor

from mptk.errors import TargetError
from mptk.ort.decoder import OrtDecoder
from mptk.testing import expect_error
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx


def test_operator_that_onnx_lacks_is_named(tmp_path):
    """``special_zeta`` has no counterpart in ONNX."""

    class Odd(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.zeta(x.abs() + 2, x.abs() + 2)

    model = tiny_decoder(GROUPED, num_hidden_layers=1)
    model.model.norm = Odd()
    with expect_error(TargetError):
        emit_onnx(trace_decoder(model), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def with_norm(tmp_path_factory):
    """Writes a tiny model with other modules for its last norm as ONNX; compares logits and returns the file."""

    def write(*norms: type[torch.nn.Module]) -> Path:
        model = tiny_decoder(GROUPED, num_hidden_layers=1)
        model.model.norm = torch.nn.Sequential(*(norm() for norm in norms))
        file = emit_onnx(trace_decoder(model), tmp_path_factory.mktemp("norm"))
        ids = torch.randint(3, 97, (1, 5))
        logits = OrtDecoder(file, threads=1).compute_logits(ids.numpy())
        torch.testing.assert_close(torch.from_numpy(logits[0]), alone(model, ids[0]), atol=2e-3, rtol=1e-5)
        return file

    return write


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


@pytest.mark.parametrize(("norms", "quick"), [((Fresh, Read), True), ((View, ViewBefore), False)])
def test_ops_that_write_to_their_input_are_made_functional(with_norm, norms, quick):
    """On a tensor that has no view the quick way, which keeps the cache in Attention; else as torch decomposes it."""
    file = with_norm(*norms)
    if quick:
        assert cache_inputs(file) == [["past_key_values.0.key", "past_key_values.0.value"]]


class Differences(torch.nn.Module):
    """``diff`` twice over, with numbers before and after."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.diff(x, n=2, dim=-1, prepend=x[..., :1] - 1.0, append=x[..., :1])


class Reversed(torch.nn.Module):
    """``1 - x``, and squeezing a dimension that is not 1, which changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - torch.rsub(x, 3, alpha=2).squeeze(2)


class OneMask(torch.nn.Module):
    """Attention whose mask has one row for all queries, as a mask of padding has."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        mask = torch.where(x.sum(-1) > 0, 0.0, -3.0)[:, None, None]
        found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return found.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("norms", [(Differences, Reversed), (OneMask,)])
def test_an_operator_that_torch_cannot_write_is_written_by_ours(with_norm, norms):
    """The quick way: the attention keeps its cache."""
    assert cache_inputs(with_norm(*norms))[:1] == [["past_key_values.0.key", "past_key_values.0.value"]]


class Renamed(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.max(torch.min(torch.square(x), x + 2.0), x - 1.0)


class Decomposed(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sinc(x) + x


def test_ops_that_the_exporter_lacks_are_written_by_others(with_norm):
    with_norm(Renamed, Decomposed)


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


def test_complex_numbers_become_pairs(with_norm):
    with_norm(Turned, TurnedAndWritten)
