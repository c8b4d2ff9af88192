"""options: the commands' options. Those that set a field of ``Settings`` are declared once, in ``FIELDS``.

``with_settings`` gives a command one option for each; the defaults are those of ``Settings``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mptk.errors import MptkError
from mptk.run.settings import Settings

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or an alias of `mptk models`.")]
Folder = Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result; replaced only if mptk made it.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Dense = Annotated[str | None, typer.Option("--model", help="The dense model, if it is no longer where it was.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print each pass's difference as it runs.")]
MaxMs = Annotated[
    float | None, typer.Option(help="Cut until this latency is predicted.", rich_help_panel="What is cut")
]

CUT, CHOICE, TRAIN, WRITE, TEXT = "What is cut", "How it is chosen", "Training", "What is written", "Text and proof"


def names(text: str) -> tuple[str, ...]:
    """``heads,ffn``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_width(text: str) -> tuple[str, int]:
    """``ffn=1024``."""
    name, _, value = text.partition("=")
    if not value.isdigit() or not int(value):
        raise MptkError(f"--width {text}: write FAMILY=UNITS, as ffn=1024")
    return name.strip(), int(value)


def parse_widths(texts: list[str] | None) -> dict[str, int]:
    """``ffn=1024`` of each."""
    return dict(map(parse_width, texts or []))


def text_of(path: Path | None) -> str | None:
    """A path as text."""
    return None if path is None else str(path)


def same(value: Any) -> Any:
    """A value that needs no reading."""
    return value


@dataclass(frozen=True)
class Field:
    """An option that sets a field of ``Settings``.

    ``path``: the field, with dots. ``kind``: what typer reads; ``read`` makes it the field's value, and ``empty`` is
    then the default. ``switch``: only the positive form, as ``--resume``. ``least`` and ``most``: limits of a number.
    """

    path: str
    kind: Any
    panel: str
    help: str
    read: Callable[[Any], Any] = same
    switch: bool = False
    least: float | None = None
    most: float | None = None
    empty: Any = None

    @property
    def default(self) -> Any:
        return self.empty if self.read is not same else reduce(getattr, self.path.split("."), Settings())


FIELDS: dict[str, Field] = {
    "sparsity": Field("sparsity", float, CUT, "Share of the budget to remove.", least=0.0, most=0.99),
    "budget": Field("budget", str, CUT, "What sparsity is a share of: params (of blocks), flops, bytes or latency."),
    "objective": Field("objective", str, CUT, "The phase to be fast in: decode or prefill."),
    "threads": Field("threads", int, CUT, "Threads of an operator; 0: all cores.", least=0),
    "families": Field(
        "families", str, CUT, "Families to cut, comma-separated; all that are legal by default.", names, empty=""
    ),
    "keep": Field("keep", str, CUT, "Families that stay whole, comma-separated.", names, empty=""),
    "width": Field(
        "widths",
        list[str] | None,
        CUT,
        "Fix a family's width, as ffn=1024. May be repeated.",
        lambda given: dict(map(parse_width, given or [])),
    ),
    "plan": Field("plan", Path | None, CUT, "Cut to this plan.json instead of choosing.", text_of),
    "multiple_of": Field("multiple", int, CUT, "Keep sums over channels multiples of this if they are now."),
    "method": Field("method", str, CHOICE, "maskprune, or one-shot: random, magnitude, wanda, flap, taylor."),
    "reconstruct": Field(
        "reconstruct", bool | None, CHOICE, "Fit what is left to the dense layers' outputs; maskprune does."
    ),
    "data": Field("data", str, CHOICE, "Calibration and training text: file, folder, datasets id, or self."),
    "samples": Field("samples", int, CHOICE, "Calibration windows.", least=1),
    "length": Field("length", int, CHOICE, "Tokens in a window.", least=8),
    "seed": Field("seed", int, CHOICE, "Seed of the random choices."),
    "steps": Field("learning.steps", int | None, TRAIN, "Training steps in all.", least=0),
    "mask_share": Field(
        "learning.mask_share", float, TRAIN, "Share of the steps that learns masks.", least=0.0, most=1.0
    ),
    "batch": Field("learning.training.batch", int, TRAIN, "Windows in a step, over all processes.", least=1),
    "micro": Field("learning.training.micro", int, TRAIN, "Windows in one forward pass of one process.", least=1),
    "lr": Field("learning.training.lr", float, TRAIN, "Peak learning rate.", least=0.0),
    "rank": Field("learning.rank", int, TRAIN, "Rank of LoRA; 0 trains all weights after the cut.", least=0),
    "lm": Field("learning.training.losses.lm", float, TRAIN, "Weight of the language-model loss.", least=0.0),
    "kl": Field(
        "learning.training.losses.kl",
        float,
        TRAIN,
        "Weight of the KL divergence from the dense model.",
        least=0.0,
    ),
    "hidden": Field("learning.training.losses.hidden", float, TRAIN, "Weight of the hidden states' error.", least=0.0),
    "teacher": Field("learning.teacher", str, TRAIN, "live, or cached: the dense model's top logits kept on disk."),
    "teacher_cache": Field(
        "learning.teacher_cache",
        Path | None,
        TRAIN,
        "Folder for a cached teacher's outputs that other runs may share.",
        text_of,
    ),
    "precision": Field("learning.precision", str, TRAIN, "no (float32), bf16, or fp16 for recovery alone."),
    "gradient_checkpointing": Field(
        "learning.gradient_checkpointing",
        bool,
        TRAIN,
        "Less memory for more time.",
        switch=True,
    ),
    "tracker": Field("learning.tracker", str, TRAIN, "tensorboard, wandb or none."),
    "save_every": Field("learning.training.save_every", int, TRAIN, "Steps between checkpoints.", least=1),
    "resume": Field("resume", bool, TRAIN, "Go on with the unfinished run beside --out.", switch=True),
    "target": Field("target", str, WRITE, "stock: the model's own transformers class; graph: any."),
    "rehome": Field(
        "rehome", bool, WRITE, "If the config class refuses the cut, find another that holds it.", switch=True
    ),
    "onnx": Field("onnx", bool, WRITE, "Write ONNX with a KV cache."),
    "logits": Field(
        "logits",
        Literal["all", "last"],
        WRITE,
        "Logits that the ONNX graph gives: of all positions, or of the last.",
    ),
    "quantize": Field(
        "quantize", str, WRITE, "ONNX graphs to write as well: int8, int4, fp16, comma-separated.", names, empty=""
    ),
    "eval_data": Field("eval_data", str | None, TEXT, "Text for the perplexity in the report."),
    "proof_length": Field(
        "proof_length", int, TEXT, "Tokens of the longest sequence that the proof may run.", least=48
    ),
    "trust_remote_code": Field(
        "trust_remote_code",
        bool,
        TEXT,
        "Run the Python code that the model's repository brings.",
        switch=True,
    ),
}

RECOVERY = (
    "data",
    "eval_data",
    "length",
    "onnx",
    "logits",
    "quantize",
    "steps",
    "batch",
    "micro",
    "lr",
    "rank",
    "lm",
    "kl",
    "hidden",
    "teacher",
    "teacher_cache",
    "precision",
    "gradient_checkpointing",
    "tracker",
    "save_every",
    "resume",
    "seed",
    "proof_length",
    "trust_remote_code",
)
"""What ``mptk recover`` takes of ``FIELDS``."""


def told(name: str, *, panel: bool = False) -> Any:
    """What typer is told of an option of ``FIELDS``. ``panel``: show it in its panel of the help."""
    f = FIELDS[name]
    flags = [f"--{name.replace('_', '-')}"] if f.switch else []
    return typer.Option(*flags, help=f.help, rich_help_panel=f.panel if panel else None, min=f.least, max=f.most)


TargetName = Annotated[str, told("target")]
MultipleOf = Annotated[int, told("multiple_of")]
ProofLength = Annotated[int, told("proof_length")]
Logits = Annotated[Literal["all", "last"], told("logits")]
Quantize = Annotated[str, told("quantize")]
Objective = Annotated[str, told("objective")]
Threads = Annotated[int, told("threads")]
Trust = Annotated[bool, told("trust_remote_code")]


def with_settings(*wanted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**options`` the options of these names, all if none is named."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                n,
                inspect.Parameter.KEYWORD_ONLY,
                default=FIELDS[n].default,
                annotation=Annotated[FIELDS[n].kind, told(n, panel=True)],
            )
            for n in wanted or FIELDS
        ]
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if p.default is not p.empty else p for p in kept]
        command.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*named, *more)}
        return command

    return wrap


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Settings with the values of these options."""
    settings = Settings()
    values = {FIELDS[name].path: FIELDS[name].read(value) for name, value in options.items()}
    if "seed" in options:
        values["learning.training.seed"] = options["seed"]
    for path, value in values.items():
        settings = _set(settings, path.split("."), value)
    return settings


def _set(record: Any, path: list[str], value: Any) -> Any:
    """The dataclass with one field, of it or of what it holds, replaced."""
    first, *rest = path
    return replace(record, **{first: _set(getattr(record, first), rest, value) if rest else value})


def latency_budget(decode_ms: float | None, prefill_ms: float | None) -> dict[str, Any]:
    """The settings that the latency options mean: one that gives milliseconds says what is budgeted, too."""
    if decode_ms is not None and prefill_ms is not None:
        raise MptkError("one latency can be reached at a time; give --max-decode-ms or --max-prefill-ms")
    for objective, ms in (("decode", decode_ms), ("prefill", prefill_ms)):
        if ms is not None:
            return {"budget": "latency", "objective": objective, "max_ms": ms}
    return {}


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """``128,512``: numbers of at least 1."""
    counts = text.split(",")
    if not all(count.strip().isdigit() and int(count) for count in counts):
        raise MptkError(f"{option} {text}: write numbers of at least 1, separated by commas")
    return tuple(map(int, counts))
