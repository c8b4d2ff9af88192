"""Cost of a training step: MaskPrune's against a plain LoRA distillation step written with transformers and peft alone.

    python -m benchmarks.training [--rounds N] [--json FILE] [--quick]

Steps alternate in one process; ratios are of medians. Variants: `plain` (LoRA, language-model loss, KL to a live
teacher, AdamW), `masks` (the same, learning masks), `cached` (masks, with a cached teacher), `recovery` (after a cut of
30 %), `recovery, cached`. Peak memory of `plain` and `masks` is taken in a process each.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import passes.frontend.trace
from benchmarks.common import result_header, write_result
from mptk.config import Learning, Settings, Training
from mptk.io import models
from mptk.ir import Log, make_token_samples, resolve_plan
from mptk.methods import criteria
from mptk.methods.maskprune.learner import Learner, start_training
from mptk.progress import show_nothing
from mptk.protocols import Analysed, DenseModel, Opened, Prepared, RunFolder
from mptk.run.prepare import resolve_widths
from mptk.run.run import Run
from mptk.tasks import CAUSAL_LM
from passes.analysis import group
from passes.pipelines import cut_program

MODEL = "smollm2-135m"
BATCH, MICRO, LENGTH, RANK = 4, 4, 256, 16
Step = Callable[[], Any]


def windows() -> Tensor:
    return torch.randint(0, 49152, (16, LENGTH), generator=torch.Generator().manual_seed(0))


def plain() -> Step:
    """As a user would write it with transformers and peft."""
    model = models.load(MODEL).model
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    student = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linear))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    text, state = windows(), {"step": 0}

    def step() -> None:
        first = state["step"] * BATCH % len(text)
        ids = text[first : first + BATCH]
        with torch.no_grad(), student.disable_adapter():
            teacher = student(input_ids=ids, use_cache=False).logits
        logits = student(input_ids=ids, use_cache=False).logits
        lm = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        flat, target = log_softmax(logits.flatten(0, 1), -1), log_softmax(teacher.flatten(0, 1), -1)
        (lm + kl_div(flat, target, reduction="batchmean", log_target=True)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1

    return step


def settings(teacher: str) -> Settings:
    training = Training(batch=BATCH, micro=MICRO, save_every=10**6)
    learning = Learning(steps=10_000, rank=RANK, teacher=teacher, training=training)
    return Settings(sparsity=0.3, portable=False, learning=learning)


def prepare_model(asked: Settings) -> Prepared:
    """The model as `prune` prepares it for MaskPrune."""
    loaded = models.load(MODEL)
    analysis = group.analyze_program(passes.frontend.trace.trace_to_program(loaded.model, dynamic=True))
    run = Run(log=Log(), progress=show_nothing, source=MODEL, out=Path("out"), settings=asked)
    return resolve_widths(run, asked, DenseModel(Opened(loaded, CAUSAL_LM), Analysed(loaded, CAUSAL_LM, analysis)))


def learner(run: Prepared, learning: Learning) -> Learner:
    folder = RunFolder(Path(tempfile.mkdtemp()) / "out", {}, resume=False)
    samples = make_token_samples(windows())
    return Learner(start_training(learning, folder), run, samples, learning, folder, show_nothing)


def learn(asked: Settings) -> Step:
    """A step of the mask phase, with some units removed already."""
    run = prepare_model(asked)
    _, _, _, loop = learner(run, run.mask_learning).begin()
    return counted(loop)


def recover(asked: Settings) -> Step:
    """A step of recovery, after a cut by magnitudes to the narrowest FFN."""
    run = prepare_model(asked)
    analysis = run.analysis
    scores = criteria.score_units(analysis, "magnitude", families=run.families)
    ffn = min(run.candidates, key=lambda c: c.widths["ffn"])
    widths = {n: w for n, w in ffn.widths.items() if w < analysis.family(n).size}
    plan = criteria.select_units(analysis, scores, widths)
    cut = cut_program(analysis, resolve_plan(analysis, plan), Log()).program
    assert run.legal.stock is not None
    stock = run.legal.stock.build_config(widths)
    small = stock.build(cut.state_dict(), shared=True)
    return counted(learner(run, run.recovery).make_recovery(small, 10_000))


def counted(loop: Any) -> Step:
    state = {"step": 0}

    def step() -> None:
        loop._step(state["step"])
        state["step"] += 1

    return step


VARIANTS: dict[str, Callable[[], Step]] = {
    "plain": plain,
    "masks": lambda: learn(settings("live")),
    "masks, cached teacher": lambda: learn(settings("cached")),
    "recovery": lambda: recover(settings("live")),
    "recovery, cached teacher": lambda: recover(settings("cached")),
}


def peak_memory(variant: str) -> int:
    """Largest resident size, bytes, of a process that makes three steps."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_three_steps, (variant,)))


def _three_steps(variant: str) -> int:
    step = VARIANTS[variant]()
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    rounds: int = 7,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/training.json"),
    quick: Annotated[bool, typer.Option("--quick")] = False,
) -> None:
    rounds = 2 if quick else rounds
    # First: a process starts with its parent's largest size.
    memory = {name: peak_memory(name) for name in ("plain", "masks")}
    steps = {name: make() for name, make in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    epochs = len(windows()) // BATCH
    for name in ("masks, cached teacher", "recovery, cached teacher"):
        for _ in range(0 if quick else epochs):
            steps[name]()
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    rows = [
        {
            "variant": name,
            "median_s": round(median, 3),
            "ratio": round(median / medians["plain"], 3),
            "spread": round(max(seconds[name][1:]) / min(seconds[name][1:]), 3),
            "tokens": BATCH * LENGTH,
        }
        for name, median in medians.items()
    ]
    for row in rows:
        if row["variant"] in memory:
            row["peak_bytes"] = memory[row["variant"]]
            row["peak_ratio"] = round(memory[row["variant"]] / memory["plain"], 3)
    write_result(json_file, result_header(), rows)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
