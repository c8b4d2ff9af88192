"""A ragged SmolLM2-135M as a `nemotron-nas` folder, and what vLLM, SGLang, mlx-lm and transformers make of it.

    python -m benchmarks.engines --data FILE [--vllm DIR] [--sglang DIR] [--folder DIR] [--sparsity 0.2] [--json FILE] [--quick]

The plan removes a share of the block parameters, in steps of 256 feed-forward channels, smallest weights first over all
layers. Every row is the largest difference of the logits from ONNX Runtime's on 32 random tokens, relative to the largest
logit. mlx-lm runs as it is (`pip install mlx-lm mlx-cpu`). vLLM and SGLang need a GPU: their own model files read config
and weights and compute, on plain layers in place of their kernels (`benchmarks/engine_layers.py`). DIR is a wheel of
theirs, unpacked: `pip download vllm --no-deps`, then unzip. ``--folder``: a folder that was written before. ``--quick``: a model of
three layers with random weights.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.common import result_header, write_result
from benchmarks.engine_layers import code_of
from mptk import FamilyPlan, Plan, prune
from mptk.features.nemotron_nas.modeling_nemotron_nas import WIDTH_STEP
from mptk.io import models
from mptk.ort.decoder import OrtDecoder

MODEL, TOKENS = "smollm2-135m", 32
OUTSIDE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
assert "mptk" not in sys.modules
"""
"""Stock transformers with the folder's own code."""


def ragged_plan(model: LlamaForCausalLM, sparsity: float) -> Plan:
    """A width for each feed-forward layer: the WIDTH_STEP channels with the smallest weights go first, over all layers."""
    blocks = model.model.layers
    goal = sparsity * sum(p.numel() for p in blocks.parameters())
    orders, steps = [], []
    for i, block in enumerate(blocks):
        own = block.mlp
        scores = own.gate_proj.weight.norm(dim=1) * own.up_proj.weight.norm(dim=1) * own.down_proj.weight.norm(dim=0)
        orders.append(scores.argsort())
        sizes = scores.sort().values.split(WIDTH_STEP)[:-1]
        steps += [(float(size.sum()), i) for size in sizes]
    gone = [0] * len(blocks)
    for _, i in sorted(steps):
        if sum(gone) * 3 * model.config.hidden_size < goal:
            gone[i] += WIDTH_STEP
    size = model.config.intermediate_size
    return Plan(
        {
            f"ffn.{i}": FamilyPlan(
                size - count, size, {f"model.layers.{i}.mlp": (tuple(sorted(order[count:].tolist())),)}
            )
            for i, (count, order) in enumerate(zip(gone, orders, strict=True))
            if count
        }
    )


def written(data: str, sparsity: float, quick: bool, place: Path) -> Path:
    """The folder of the ragged model."""
    source = MODEL
    if quick:
        sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
        config = LlamaConfig(**sizes, intermediate_size=1024, vocab_size=49152, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(place / "dense")
        models.load(MODEL).tokenizer.save_pretrained(place / "dense")
        source = str(place / "dense")
    ragged_plan(models.load(source).model, sparsity).save(place / "plan.json")
    how = {"samples": 4, "length": 128, "eval_windows": 1}
    prune(source, place / "out", plan=str(place / "plan.json"), target="nemotron-nas", data=data, **how)
    return place / "out"


# ---- the engines: folder and token ids [1, n] → logits [n, vocabulary] ----


def in_transformers(folder: Path, ids: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "ids", Path(place) / "logits"
        torch.save(ids, given)
        subprocess.run([sys.executable, "-c", OUTSIDE, folder.resolve(), given, made], check=True, cwd=place)
        found: Tensor = torch.load(made)
    return found[0]


def in_mlx(folder: Path, ids: Tensor) -> Tensor:
    import mlx.core as mx

    code = importlib.import_module("mlx_lm.models.nemotron-nas")
    model = code.Model(code.ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
    weights = {
        name: mx.array(weight.float().numpy()) for name, weight in load_file(folder / "model.safetensors").items()
    }
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    return torch.tensor(model(mx.array(ids.numpy())).astype(mx.float32).tolist())[0]


def in_vllm(root: Path) -> Callable[[Path, Tensor], Tensor]:
    def run(folder: Path, ids: Tensor) -> Tensor:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        code = code_of("vllm", root)
        given = SimpleNamespace(model_config=SimpleNamespace(hf_config=config), cache_config=None, quant_config=None)
        model = code.DeciLMForCausalLM(vllm_config=given)
        model.load_weights(load_file(folder / "model.safetensors").items())
        hidden = model(ids[0], torch.arange(ids.shape[1]))
        return hidden @ model.lm_head.weight.T

    return run


def in_sglang(root: Path) -> Callable[[Path, Tensor], Tensor]:
    def run(folder: Path, ids: Tensor) -> Tensor:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = code_of("sglang", root).DeciLMForCausalLM(config=config)
        model.load_weights(load_file(folder / "model.safetensors").items())
        hidden = model.model(ids[0], torch.arange(ids.shape[1]), SimpleNamespace(residual=None))
        return hidden @ model.lm_head.weight.T

    return run


def main(
    data: Annotated[str, typer.Option()],
    vllm: Annotated[Path | None, typer.Option()] = None,
    sglang: Annotated[Path | None, typer.Option()] = None,
    folder: Annotated[Path | None, typer.Option()] = None,
    sparsity: Annotated[float, typer.Option()] = 0.2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    quick: Annotated[bool, typer.Option()] = False,
) -> None:
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        made = folder or written(data, sparsity, quick, Path(place))
        report = json.loads((made / "report.json").read_text())
        config = AutoConfig.from_pretrained(made)
        ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        expected = OrtDecoder(made).compute_torch_logits(ids)[0]
        runs: dict[str, tuple[str, Callable[[Path, Tensor], Tensor]]] = {
            "transformers": (_version("transformers"), in_transformers)
        }
        if importlib.util.find_spec("mlx_lm"):
            runs["mlx-lm"] = (_version("mlx-lm"), in_mlx)
        if vllm is not None:
            runs["vLLM's model file"] = (_wheel(vllm), in_vllm(vllm))
        if sglang is not None:
            runs["SGLang's model file"] = (_wheel(sglang), in_sglang(sglang))
        rows = []
        for engine, (version, run) in runs.items():
            difference = float((run(made, ids) - expected).abs().max() / expected.abs().max())
            rows.append({"engine": engine, "version": version, "difference": difference})
            print(rows[-1], flush=True)
    widths = {name: family["width"] for name, family in report["families"].items() if name.startswith("ffn")}
    about = {
        "model": report["model"],
        "quick": quick,
        "sparsity": report["sparsity"],
        "widths": widths,
        "proof": report["proof"],
    }
    if json_file is not None:
        write_result(json_file, {**result_header(), **about}, rows)


def _version(package: str) -> str:
    return metadata.version(package)


def _wheel(root: Path) -> str:
    return next(root.glob("*.dist-info")).name.removesuffix(".dist-info").partition("-")[2]


if __name__ == "__main__":
    typer.run(main)
