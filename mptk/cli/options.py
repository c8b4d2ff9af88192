"""options: what the commands' options are called, what they help with, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mptk.errors import MptkError

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or an alias of `mptk models`.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that the model's repository brings.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Onnx = Annotated[bool, typer.Option(help="Write ONNX with a KV cache.")]
Objective = Annotated[str, typer.Option(help="The phase to be fast in: decode or prefill.")]
LogitsOption = Annotated[
    str, typer.Option(help="What the ONNX graph gives: logits of all positions, or of the last alone.")
]
Quantize = Annotated[str, typer.Option(help="ONNX graphs to write as well: int8, int4, fp16, comma-separated.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of an operator; 0: as many as there are cores.")]
MaxMs = Annotated[float | None, typer.Option(help="Cut until this latency is predicted, instead of a sparsity.")]
Steps = Annotated[int | None, typer.Option(min=0, help="Training steps in all.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows in a step, over all processes.")]
Micro = Annotated[int, typer.Option(min=1, help="Windows in one forward pass of one process.")]
Rate = Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")]
Rank = Annotated[int, typer.Option(min=0, help="Rank of LoRA; 0 trains all weights after the cut.")]
Lm = Annotated[float, typer.Option(min=0.0, help="Weight of the language-model loss.")]
Kl = Annotated[float, typer.Option(min=0.0, help="Weight of the KL divergence from the dense model.")]
Hidden = Annotated[float, typer.Option(min=0.0, help="Weight of the hidden states' error.")]
Teacher = Annotated[str, typer.Option(help="live, or cached: the dense model's top logits kept on disk.")]
TeacherCache = Annotated[
    Path | None, typer.Option(help="Folder for a cached teacher's outputs that other runs may share.")
]
Precision = Annotated[str, typer.Option(help="no (float32), bf16, or fp16 for recovery alone.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")]
Tracker = Annotated[str, typer.Option(help="tensorboard, wandb or none.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Dense = Annotated[str | None, typer.Option("--model", help="The dense model, if it is no longer where it was.")]
ProofLength = Annotated[int, typer.Option(min=48, help="Tokens of the longest sequence that the proof may run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run beside --out.")]


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """``128,512``: numbers of at least 1."""
    counts = text.split(",")
    if not all(count.strip().isdigit() and int(count) for count in counts):
        raise MptkError(f"{option} {text}: write numbers of at least 1, separated by commas")
    return tuple(map(int, counts))


def names(text: str) -> tuple[str, ...]:
    """``heads,ffn``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def latency_budget(budget: str, objective: str, decode_ms: float | None, prefill_ms: float | None) -> dict[str, Any]:
    """The settings that the latency options mean: one that gives milliseconds says what is budgeted, too."""
    if decode_ms is not None and prefill_ms is not None:
        raise MptkError("one latency can be reached at a time; give --max-decode-ms or --max-prefill-ms")
    if decode_ms is not None:
        return {"budget": "latency", "objective": "decode", "max_ms": decode_ms}
    if prefill_ms is not None:
        return {"budget": "latency", "objective": "prefill", "max_ms": prefill_ms}
    return {"budget": budget, "objective": objective}


def learning(training: tuple[Any, ...], weights: tuple[float, float, float], **settings: Any) -> Any:
    """``Learning`` from the options that `prune` and `recover` share."""
    from mptk.methods.maskprune.learner import Learning
    from mptk.methods.maskprune.losses import LossWeights
    from mptk.methods.maskprune.train import Training

    steps, batch, micro, lr, save_every, seed = training
    losses = LossWeights(*weights)
    loop = Training(batch=batch, micro=micro, lr=lr, save_every=save_every, seed=seed, losses=losses)
    return Learning(steps=steps, training=loop, **settings)


def parse_logits(text: str) -> Any:
    """``all`` or ``last``."""
    if text not in ("all", "last"):
        raise MptkError(f"--logits {text}: choose all or last")
    return text


def parse_width(text: str) -> tuple[str, int]:
    """``ffn=1024``."""
    name, _, value = text.partition("=")
    if not value.isdigit() or not int(value):
        raise MptkError(f"--width {text}: write FAMILY=UNITS, as ffn=1024")
    return name.strip(), int(value)
