"""Quantised checkpoints are read as floats, whatever format they are in, and pruned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lab import fields
from safetensors.torch import load_file, save_file
from torch import Tensor

import mptk
from mptk import testing
from mptk.errors import FileError, ModelError
from mptk.io import models
from mptk.testing import expect_error

GROUP = 16
Quantised = tuple[dict[str, Tensor], Tensor]
"""The tensors that hold a matrix, by the ending of the name, and the matrix that they stand for."""


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Rows of whole numbers as rows of int32 words, the first in the lowest bits: written out, number by number."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * i) for i, number in enumerate(row))
        words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def in_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers [out, in], scales and zeros [out, groups] of an asymmetric quantisation."""
    parts = weight.unflatten(1, (-1, GROUP))
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    q = (parts / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return q.flatten(1).long(), scale, zero.long()


def back(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((q.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale[..., None]).flatten(1)


def gptq(bits: int, less: int, order: Tensor | None = None) -> Callable[[Tensor], Quantised]:
    """``less``: what is taken from the zeros. ``order``: the inputs in the order in which they were quantised."""

    def store(weight: Tensor) -> Quantised:
        at = torch.arange(weight.shape[1]) if order is None else order[: weight.shape[1]].argsort().argsort()
        q, scale, zero = in_groups(weight[:, at.argsort()], bits)
        tensors = {
            "qweight": packed(q[:, at], bits).T.contiguous(),
            "qzeros": packed((zero.T - less), bits),
            "scales": scale.T.half().contiguous(),
            "g_idx": (at // GROUP).int(),
        }
        return tensors, back(q, scale, zero)[:, at]

    return store


def awq(weight: Tensor) -> Quantised:
    q, scale, zero = in_groups(weight, 4)

    def shuffled(numbers: Tensor) -> Tensor:  # as AutoAWQ packs them
        return packed(numbers.T.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    tensors = {"qweight": shuffled(q), "qzeros": shuffled(zero), "scales": scale.T.half().contiguous()}
    return tensors, back(q, scale, zero)


def fp8(weight: Tensor) -> Quantised:
    """Blocks of 32 · 16, the last ones smaller."""
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % 16, 0, -rows % 32))
    blocks = blocks.unflatten(1, (-1, 16)).unflatten(0, (-1, 32))
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn)
    whole = torch.nn.functional.pad(stored.float(), (0, -columns % 16, 0, -rows % 32))
    whole = whole.unflatten(1, (-1, 16)).unflatten(0, (-1, 32)) * scale[:, None, :, None]
    return {"weight": stored, "weight_scale_inv": scale}, whole.flatten(2).flatten(0, 1)[:rows, :columns]


def rowwise(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}, stored.float() * scale


def by_row(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(1) / 127
    stored = (weight / scale[:, None]).round()
    return {"weight": stored.to(torch.int8), "SCB": scale * 127}, stored * scale[:, None]


CODES = torch.cat([-torch.logspace(0, -1, 8), torch.logspace(-1, 0, 8)])
"""Any values may stand for 4 bits: the file says which."""
STEPS = torch.linspace(0, 1, 256)


def bits4(nested: bool) -> Callable[[Tensor], Quantised]:
    """As bitsandbytes: blocks of 64 numbers, two numbers in a byte; nested: the largest of each block in 8 bits."""

    def store(weight: Tensor) -> Quantised:
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(1)
        state = {"blocksize": 64, "shape": list(weight.shape)}
        tensors = {"weight.quant_map": CODES, "weight.absmax": largest}
        if nested:
            state |= {"nested_blocksize": 256, "nested_offset": 0.01}
            outer = torch.nn.functional.pad(largest - 0.01, (0, -len(largest) % 256)).unflatten(0, (-1, 256))
            scale = outer.abs().amax(1)
            numbers = (outer / scale[:, None]).sub(STEPS[:, None, None]).abs().argmin(0)
            largest = (STEPS[numbers] * scale[:, None]).flatten()[: len(largest)] + 0.01
            tensors["weight.absmax"] = numbers.flatten()[: len(largest)].to(torch.uint8)
            tensors |= {"weight.nested_absmax": scale, "weight.nested_quant_map": STEPS}
        numbers = (blocks / largest[:, None]).sub(CODES[:, None, None]).abs().argmin(0)
        pairs = numbers.flatten().unflatten(0, (-1, 2))
        tensors["weight"] = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None]
        said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors["weight.quant_state.bitsandbytes__nf4"] = said
        return tensors, (CODES[numbers] * largest[:, None]).reshape(weight.shape)

    return store


PACKED = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP},
}


def compressed(weight: Tensor) -> Quantised:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    q, scale, zero = in_groups(weight, 4)
    given = {"weight": back(q, scale, zero), "weight_scale": scale, "weight_zero_point": (zero - 8).to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return dict(compressor.compress(given, QuantizationScheme(**PACKED))), given["weight"]


ORDER = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
GPTQ, BITS = {"quant_method": "gptq", "group_size": GROUP}, {"quant_method": "bitsandbytes"}
CASES = {
    "gptq, 4 bits": ({**GPTQ, "bits": 4}, gptq(4, 1)),
    "gptq, 3 bits": ({**GPTQ, "bits": 3}, gptq(3, 1)),
    "gptq, 8 bits, act order": ({**GPTQ, "bits": 8}, gptq(8, 1, ORDER)),
    "gptq, version 2": ({**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, 0)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 16]}, fp8),
    "fp8 by rows": ({"quant_method": "fbgemm_fp8"}, rowwise),
    "bitsandbytes, 8 bits": ({**BITS, "load_in_8bit": True}, by_row),
    "bitsandbytes, 4 bits": ({**BITS, "load_in_4bit": True}, bits4(nested=False)),
    "bitsandbytes, nested": ({**BITS, "load_in_4bit": True}, bits4(nested=True)),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": PACKED}},
        compressed,
    ),
}


def write(folder: Path, settings: Mapping[str, Any], store: Callable[[Tensor], Quantised]) -> dict[str, Tensor]:
    """Write a quantised checkpoint of a tiny model. Returns the weights that it stands for."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    testing.save_model(testing.make_llama(layers=1, tied=False, **sizes), folder)
    state, tensors, meant = load_file(folder / "model.safetensors"), dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in state.items():
        if "_proj.weight" not in name:
            tensors[name] = meant[name] = weight
            continue
        parts, meant[name] = store(weight)
        tensors |= {name.removesuffix("weight") + end: part.contiguous().clone() for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields("config.json", quantization_config=dict(settings))(folder)
    return meant


@pytest.mark.parametrize("case", CASES)
def test_the_floats_that_a_quantised_checkpoint_stands_for(case, tmp_path):
    settings, store = CASES[case]
    meant = write(tmp_path / "q", settings, store)
    loaded = models.load(str(tmp_path / "q"))
    assert settings["quant_method"] in loaded.note
    for name, weight in loaded.model.state_dict().items():
        torch.testing.assert_close(weight, meant[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert not hasattr(loaded.model.config, "quantization_config")


def test_experts_in_mxfp4(tmp_path):
    """A number is one of 16 (E2M1), 32 of them in a row share a power of two (E8M0), and the first is in the low bits."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    config = transformers.GptOssConfig(**sizes, layer_types=["full_attention"])
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "q")
    state = load_file(tmp_path / "q" / "model.safetensors")
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes, meant = torch.cat([values, -values]), dict[str, Tensor]()
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        numbers = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
        powers = torch.randint(120, 130, (experts, outputs, inputs // 32))
        whole = codes[numbers] * torch.exp2(powers[..., None].float() - 127)
        meant[name] = whole.flatten(2).transpose(1, 2)
        state[f"{name}_blocks"] = (numbers[..., 0::2] + 16 * numbers[..., 1::2]).to(torch.uint8)
        state[f"{name}_scales"] = powers.to(torch.uint8)
    save_file(state, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    fields("config.json", quantization_config={"quant_method": "mxfp4"})(tmp_path / "q")
    found = models.load(str(tmp_path / "q")).model.state_dict()
    assert len(meant) == 2
    for name, weight in meant.items():
        assert torch.equal(found[name], weight), name


def test_pruned_to_a_float_model_with_a_note(tmp_path):
    write(tmp_path / "q", *CASES["gptq, 4 bits"])
    asked = {"method": "magnitude", "sparsity": 0.3, "data": [testing.SENTENCES] * 8, "samples": 4, "length": 16}
    asked |= {"eval_windows": 1, "eval_length": 16, "align": 8, "onnx": False}
    pruned = mptk.prune(tmp_path / "q", tmp_path / "out", **asked)
    assert any("is quantised (gptq)" in note for note in pruned.report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert mptk.verify(tmp_path / "out")


def test_what_cannot_be_read_is_refused_and_a_damaged_matrix_named(tmp_path):
    write(tmp_path / "hqq", {"quant_method": "hqq"}, by_row)
    with expect_error(ModelError, name=tmp_path / "hqq"):
        models.load(str(tmp_path / "hqq"))

    def short(weight):
        tensors, meant = gptq(4, 1)(weight)
        return {**tensors, "scales": tensors["scales"][:, :-8]}, meant

    write(tmp_path / "q", CASES["gptq, 4 bits"][0], short)
    with expect_error(FileError) as refused:
        models.load(str(tmp_path / "q"))
    assert refused.value.name.startswith("model.layers.0.")


def test_the_floats_are_made_once_and_again_if_a_file_changes(tmp_path):
    write(tmp_path / "q", *CASES["bitsandbytes, 8 bits"])
    first = models.load(str(tmp_path / "q")).path
    assert models.load(str(tmp_path / "q")).path == first
    write(tmp_path / "q", *CASES["awq"])
    assert models.load(str(tmp_path / "q")).path != first
