"""What the analysis costs: time and memory for large shapes without weights, growth with layers, beside Torch-Pruning.

    python -m benchmarks.analysis [--json FILE] [--quick]

Each shape is traced and analysed in a process of its own, whose peak resident memory is reported with and without what
importing torch and transformers takes. Torch-Pruning's dependency graph (build, and listing all groups) runs in one
process with mptk's walk and grouping, alternating, median of 5; torch.export's time is shown apart, since Torch-Pruning
runs the model's forward instead of tracing it.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from benchmarks.common import result_header, write_result
from mptk.ir import Analysis
from passes.analysis.group import analyze_program
from passes.frontend.trace import trace_to_program

ROUNDS = 5


def llama(layers: int, **sizes: Any) -> LlamaConfig:
    default: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return LlamaConfig(num_hidden_layers=layers, vocab_size=128256, **(default | sizes))


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama-3-8B": lambda: llama(32),
    "Llama-3-70B": lambda: llama(80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64),
    "64-expert mixture, 48 layers": lambda: Qwen3MoeConfig(num_hidden_layers=48, num_experts=64),
    **{f"Llama-3-8B width, {n} layers": (lambda n=n: llama(n)) for n in (10, 20, 40, 80)},  # type: ignore[misc]
}

SMALL: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: small("llama", n, num_key_value_heads=2, head_dim=8),
    "qwen2": lambda n: small("qwen2", n, num_key_value_heads=2),
    "qwen3": lambda n: small("qwen3", n, num_key_value_heads=2, head_dim=8),
    "opt": lambda n: small("opt", n, ffn_dim=80, word_embed_proj_dim=48, max_position_embeddings=64),
    "gpt_neox": lambda n: small("gpt_neox", n),
    "bert": lambda n: BertForMaskedLM(
        BertConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=n, num_attention_heads=6, vocab_size=97)
    ),
}
DEPTHS = (6, 24)


def small(model_type: str, layers: int, **sizes: Any) -> Any:
    default = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": layers, "num_attention_heads": 6}
    config = AutoConfig.for_model(model_type, vocab_size=97, **(default | sizes))
    return AutoModelForCausalLM.from_config(config)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_shape(name: str) -> dict[str, Any]:
    """Trace and analyse one shape without weights in this process."""
    imported = peak_mib()
    config = SHAPES[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    start = time.perf_counter()
    program = trace_to_program(model)
    traced = time.perf_counter()
    analysis = analyze_program(program)
    analysed = time.perf_counter()
    return {
        "shape": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "nodes": len(program.graph.graph.nodes),
        "export_s": round(traced - start, 3),
        "analysis_s": round(analysed - traced, 3),
        "analysis_share_of_export": round((analysed - traced) / (traced - start), 4),
        "families": [f.name for f in analysis.families],
        "imports_mib": round(imported),
        "peak_mib": round(peak_mib()),
    }


def in_own_process(name: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.analysis", "--shape", name], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def compare(name: str, layers: int) -> dict[str, Any]:
    """mptk's walk and grouping, and Torch-Pruning's build and group listing, on one small model, alternating."""
    import torch_pruning

    torch.manual_seed(0)
    model = SMALL[name](layers).eval()
    ids = torch.randint(97, (2, 7))
    start = time.perf_counter()
    program = trace_to_program(model, (ids,))
    row: dict[str, Any] = {"model": name, "layers": layers, "export_s": round(time.perf_counter() - start, 3)}

    def groups_of_torch_pruning() -> int:
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, example_inputs={"input_ids": ids, "use_cache": False}, forward_fn=lambda m, x: m(**x).logits.sum()
        )
        return sum(1 for _ in graph.get_all_groups(root_module_types=[torch.nn.Linear, torch.nn.Embedding]))

    times: dict[str, list[float]] = {"mptk": [], "torch_pruning": []}
    try:
        for _ in range(ROUNDS):
            for side, work in (("mptk", lambda: analyze_program(program)), ("torch_pruning", groups_of_torch_pruning)):
                start = time.perf_counter()
                result = work()
                times[side].append(time.perf_counter() - start)
                row[f"{side}_groups"] = (
                    result if isinstance(result, int) else sum(len(f.groups) for f in result.families)
                )
    except Exception as error:
        return row | {"torch_pruning": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    medians = {side: statistics.median(values) for side, values in times.items()}
    row |= {f"{side}_s": round(value, 4) for side, value in medians.items()}
    row["ratio"] = round(medians["torch_pruning"] / medians["mptk"], 1)
    return row | {"torch_pruning_families": judge(model, ids, analyze_program(program))}


def judge(model: Any, ids: torch.Tensor, analysis: Analysis) -> dict[str, str]:
    """For each of mptk's families, what Torch-Pruning removes with its first unit in its first layer.

    ``right`` if all linear layers lose exactly the rows and columns that hold the unit; else the first that does not.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs={"input_ids": ids, "use_cache": False}, forward_fn=lambda m, x: m(**x).logits.sum()
    )
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    verdicts = {}
    for family in analysis.families:
        group = family.groups[0]
        unit = {
            (m.weight.removesuffix(".weight"), m.dim): {int(i) for row in group.positions(m)[:, 0] for i in row}
            for m in group.members
            if m.weight.removesuffix(".weight") in modules
        }
        rows = [(name, wanted) for (name, dim), wanted in unit.items() if dim == 0]
        if not rows:
            verdicts[family.name] = "no linear layer makes it"
            continue
        (first, wanted), names = rows[0], {m: n for n, m in modules.items()}
        removed: dict[tuple[str, int], set[int]] = {}
        try:
            found = graph.get_pruning_group(
                modules[first], torch_pruning.prune_linear_out_channels, idxs=sorted(wanted)
            )
        except Exception as error:
            verdicts[family.name] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        for dependency, indices in found:
            if dependency.target.module in names:
                dim = int("in_channels" in dependency.handler.__name__)
                removed.setdefault((names[dependency.target.module], dim), set()).update(map(int, indices))
        wrong = [k for k in sorted(unit.keys() | removed.keys()) if unit.get(k, set()) != removed.get(k, set())]
        verdicts[family.name] = "right" if not wrong else _explain(wrong[0], unit, removed)
    return verdicts


def _explain(
    place: tuple[str, int], unit: dict[tuple[str, int], set[int]], removed: dict[tuple[str, int], set[int]]
) -> str:
    mine, theirs = unit.get(place, set()), removed.get(place, set())
    side = ("rows", "columns")[place[1]]
    return (
        f"{place[0]}: {len(theirs)} {side} go, not {len(mine)}"
        if len(mine) != len(theirs)
        else (f"{place[0]}: {side} {min(theirs)}… go, not {min(mine)}…")
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    shape: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if shape is not None:
        print(json.dumps(measure_shape(shape)))
        return
    chosen = [n for n in SHAPES if not quick or "10 layers" in n or "20 layers" in n]
    rows: list[dict[str, Any]] = []
    for name in chosen:
        rows.append(in_own_process(name))
        r = rows[-1]
        print(
            f"{name}: export {r['export_s']:.1f} s, analysis {r['analysis_s']:.2f} s "
            f"({r['analysis_share_of_export']:.1%}), {r['nodes']} nodes, peak {r['peak_mib']} MiB "
            f"(imports {r['imports_mib']})",
            flush=True,
        )
    for name, layers in [(n, d) for n in SMALL for d in DEPTHS if not quick or (n, d) == ("llama", 6)]:
        rows.append(compare(name, layers))
        print(rows[-1], flush=True)
    if json_file is not None:
        write_result(json_file, result_header(), rows)


if __name__ == "__main__":
    typer.run(main)
