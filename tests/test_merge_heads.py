"""KV heads are merged in closed form: exact if nothing is lost, near the dense model if something is, and proven."""

from __future__ import annotations

import json
from pathlib import Path

import architectures
import pytest
import torch
import toy_checkpoints as toys
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import mptk
from mptk.cli.main import app
from mptk.driver import merging
from mptk.errors import MptkError, ProofError

TEXTS = [toys.TEXT]
HOW = {"samples": 4, "length": 24, "progress": None}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(toys.TEXT * 20)
    return str(tmp_path / "text.txt")


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return str(folder)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(architectures.tokens(), use_cache=False).logits
    return found


def redundant(model: PreTrainedModel) -> PreTrainedModel:
    """The same with second KV heads that are turned first ones: each rotary pair by an angle, values by a matrix."""
    for layer in model.model.layers:
        attention = layer.self_attn
        key, value, size = attention.k_proj, attention.v_proj, attention.head_dim
        turn = torch.polar(torch.rand(size // 2) + 0.5, 6 * torch.rand(size // 2))
        mix = torch.randn(size, size)
        with torch.no_grad():
            for mixed, name in ((key, "weight"), (value, "weight"), (key, "bias"), (value, "bias")):
                tensor = getattr(mixed, name)
                if tensor is None:
                    continue
                first = tensor[:size]
                if mixed is key:
                    pairs = torch.complex(first[: size // 2], first[size // 2 :])
                    pairs = turn.reshape(-1, *[1] * (first.ndim - 1)) * pairs
                    tensor[size : 2 * size] = torch.cat([pairs.real, pairs.imag])
                else:
                    tensor[size : 2 * size] = mix @ first
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_heads_that_are_one_head_turned_become_it_and_nothing_changes(name: str, tmp_path: Path, text: str) -> None:
    dense = redundant(architectures.model(name, vocab_size=300))
    found = mptk.merge_heads(saved(dense, tmp_path / "dense"), tmp_path / "out", 1, data=text, **HOW)
    assert (found.heads, found.keys, found.values) == ((2, 1), "fit", "fit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.num_key_value_heads == 1
    assert merged.config.num_attention_heads == dense.config.num_attention_heads
    assert (logits(merged) - logits(dense)).abs().max() < 1e-3 * logits(dense).abs().max()
    assert found.losses[1] == pytest.approx(found.losses[0], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "kv_heads"),
    [
        ("llama", {"num_key_value_heads": 6}, 2),  # keys look like queries: the class says which are shared
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, 2),
    ],
)
def test_principal_components_lose_less_than_means(
    name: str, changes: dict[str, int], kv_heads: int, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = architectures.model(name, vocab_size=300, **changes)
    source = saved(dense, tmp_path / "dense")
    merged_heads, far = merging.merged_heads, []
    for ways in ({}, {"keys": "mean", "values": "mean"}):
        monkeypatch.setattr(
            merging,
            "merged_heads",
            lambda *given, ways=ways: merged_heads(*given[:4], *(ways.values() or given[4:])),
        )
        mptk.merge_heads(source, tmp_path / str(len(ways)), kv_heads, data=text, **HOW)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(len(ways)))
        assert merged.config.num_key_value_heads == kv_heads
        far.append(float((logits(merged) - logits(dense)).square().mean()))
    assert far[0] < 0.9 * far[1]


def test_keys_that_a_norm_follows_are_merged_by_their_mean(tmp_path: Path, text: str) -> None:
    source = saved(architectures.model("qwen3", vocab_size=300), tmp_path / "dense")
    found = mptk.merge_heads(source, tmp_path / "out", 1, data=text, **HOW)
    assert (found.keys, found.values) == ("mean", "fit")
    assert found.proof.ok


def test_the_result_is_pruned_as_any_model(tmp_path: Path, text: str) -> None:
    source = saved(toys.llama(), tmp_path / "dense")
    mptk.merge_heads(source, tmp_path / "merged", 1, data=text, **HOW)
    pruned = mptk.prune(
        str(tmp_path / "merged"),
        method="wanda",
        families="ffn",
        sparsity=0.2,
        multiple=4,
        data=TEXTS * 8,
        samples=4,
        length=24,
    )
    assert pruned is not None
    assert pruned.model.config.num_key_value_heads == 1
    assert all(row["ok"] for row in pruned.report.proof)


def test_weights_that_are_not_the_merged_ones_are_not_written(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sliced = saved(toys.llama(), tmp_path / "dense"), merging.sliced
    name = "model.layers.1.self_attn.v_proj.weight"
    monkeypatch.setattr(merging, "sliced", lambda *given: sliced(*given).changed({name: lambda weight: weight * 1.01}))
    with pytest.raises(ProofError, match="reloaded checkpoint"):
        mptk.merge_heads(source, tmp_path / "out", 1, data=text, **HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kv_heads", "message"),
    [
        ("llama", 3, "2 KV heads, which cannot become 3; give one of 1"),
        ("gpt2", 2, "not one weight each"),
        ("opt", 2, "holds no 2 KV heads"),
    ],
)
def test_what_cannot_be_merged_is_said(name: str, kv_heads: int, message: str, tmp_path: Path, text: str) -> None:
    source = saved(architectures.model(name, vocab_size=300), tmp_path / "dense")
    with pytest.raises(MptkError, match=message):
        mptk.merge_heads(source, tmp_path / "out", kv_heads, data=text, **HOW)
    assert not (tmp_path / "out").exists()


def test_text_of_its_own_that_needs_more_memory_is_refused_at_once(tmp_path: Path) -> None:
    model = saved(toys.llama(), tmp_path / "dense")
    with pytest.raises(MptkError, match=r"text that the model writes needs all weights in memory, .*--data"):
        mptk.merge_heads(model, tmp_path / "out", 1, memory=1000)


def test_the_command_says_what_was_lost(tmp_path: Path, text: str) -> None:
    source = saved(toys.llama(), tmp_path / "dense")
    line = ["merge-heads", source, "--kv-heads", "1", "--data", text, "--samples", "4", "--length", "24"]
    result = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "out"), "--json", "-"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["heads"] == [2, 1]
    assert said["proof"]["ok"]
    assert len(said["losses"]) == 2
