"""options: the options of the commands. An option that sets a field of ``Settings`` is declared once, in ``FIELDS``.

``with_settings`` adds these options to a command. Their defaults are those of ``Settings``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.models import OptionInfo

from mptk.cli import choices
from mptk.cli.parse import names, parse_size, parse_width
from mptk.cli.places import file_to_write, folder_to_write
from mptk.config.bounds import BOUNDS, COUNT, outside, shown
from mptk.config.settings import Learning, LossWeights, Settings, Training
from mptk.errors import MptkError

Record = TypeVar("Record", Settings, Learning, Training, LossWeights)

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or an alias of `mptk models`.")]
Folder = Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")]
Out = Annotated[
    Path, typer.Option("--out", callback=folder_to_write, help="Folder for the result; an earlier result is replaced.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=file_to_write(dash=True),
        help="Also write the result to this file; - prints it in place of the table.",
    ),
]
Dense = Annotated[str | None, typer.Option("--model", help="The dense model, if it has moved.")]
CUT, CHOICE, DATA, TRAIN, WRITE, MACHINE = "What to cut", "How to choose", "Data", "Training", "Output", "Machine"


def text_of(path: Path | None) -> str | None:
    """A path as text."""
    return None if path is None else str(path)


def same(value: object) -> object:
    """The value itself."""
    return value


@dataclass(frozen=True)
class Field:
    """An option that sets a field of ``Settings``.

    ``path``: the field, with dots. ``kind``: the type that typer parses. ``read`` converts the parsed value to the
    field's, and ``empty`` is then the default. ``switch``: no negative form, as ``--resume``. ``choices``: arguments of
    the option from ``choices.py``. Limits of a number are those of ``mptk.config.bounds``.
    """

    path: str
    kind: object
    panel: str
    help: str
    read: Callable[[Any], object] = same
    switch: bool = False
    empty: object = None
    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def default(self) -> object:
        """The option's default, before ``read``."""
        return self.empty if self.read is not same else attrgetter(self.path)(Settings())


FIELDS: dict[str, Field] = {
    "sparsity": Field("sparsity", float, CUT, "Share of the budget to remove."),
    "budget": Field("budget", str, CUT, "What is budgeted; params: those of blocks.", choices=choices.BUDGET),
    "objective": Field("objective", str, CUT, "Phase whose latency counts.", choices=choices.OBJECTIVE),
    "threads": Field("threads", int, CUT, "Threads of an operator; 0: all cores."),
    "families": Field(
        "families", str, CUT, "Families to cut, comma-separated; by default those of single layers.", names, empty=""
    ),
    "keep": Field("keep", str, CUT, "Families that stay whole, comma-separated.", names, empty=""),
    "vocabulary": Field(
        "vocabulary", str | None, CUT, "Remove the tokens that this text, named as --data, never uses."
    ),
    "kv_heads": Field("kv_heads", int | None, CUT, "KV heads of each layer afterwards; all query heads stay."),
    "width": Field(
        "widths",
        list[str] | None,
        CUT,
        "Fix a family's width, as ffn=1024. May be repeated.",
        lambda texts: dict(map(parse_width, texts or [])),
    ),
    "layers": Field(
        "layers", str, CUT, "uniform: all layers get the same widths; free: each its own.", choices=choices.LAYER_WIDTHS
    ),
    "plan": Field("plan", Path | None, CUT, "Cut to this plan.json instead of choosing.", text_of),
    "portable": Field(
        "portable", bool, CUT, "Cut only what every program reads rightly, not transformers alone.", switch=True
    ),
    "multiple_of": Field("multiple", int, CUT, "If a sum over channels is a multiple of this, it stays one."),
    "method": Field(
        "method", str, CHOICE, "maskprune learns what to cut; the others score once.", choices=choices.METHOD
    ),
    "reconstruct": Field(
        "reconstruct", bool | None, CHOICE, "Fit the kept weights to the dense layers' outputs; default of maskprune."
    ),
    "distil_epochs": Field(
        "distil_epochs",
        int,
        CHOICE,
        "After reconstruction, train block by block to the dense blocks' outputs: so many epochs, as 3.",
    ),
    "distil_lr": Field("distil_lr", float, CHOICE, "Learning rate of that."),
    "search": Field(
        "search", bool, CHOICE, "First rank ways to divide the budget, as `mptk shapes`; cut to the best.", switch=True
    ),
    "search_shapes": Field("search_shapes", int, CHOICE, "Most shapes that the search measures without training."),
    "search_finalists": Field("search_finalists", int, CHOICE, "How many of them it trains."),
    "search_tokens": Field("search_tokens", int, CHOICE, "Tokens of text that it trains on in all; 0: none."),
    "data": Field(
        "data",
        str,
        DATA,
        "Text to calibrate and train on: file, FILE:COLUMN, folder, data set, A=0.7,B=0.3; self: the model writes it.",
    ),
    "inputs": Field(
        "inputs",
        Path | None,
        DATA,
        "Other inputs than text, images or sound: a .safetensors file of forward's tensors.",
        text_of,
    ),
    "samples": Field("samples", int, DATA, "Calibration windows."),
    "length": Field("length", int, DATA, "Tokens in a window."),
    "seed": Field("seed", int, CHOICE, "Seed of the random choices."),
    "steps": Field("learning.steps", int | None, TRAIN, "Training steps, in total."),
    "mask_share": Field("learning.mask_share", float | None, TRAIN, "Share of steps that learn masks; else 8 steps."),
    "batch": Field("learning.training.batch", int, TRAIN, "Windows in a step, over all processes."),
    "micro": Field("learning.training.micro", int, TRAIN, "Windows in one forward pass of one process."),
    "lr": Field(
        "learning.training.lr",
        float | None,
        TRAIN,
        "Peak learning rate; by default 0.0003 for all weights, 0.003 for LoRA.",
    ),
    "rank": Field(
        "learning.rank",
        int | None,
        TRAIN,
        "Rank of LoRA; without it, or if it is 0, all weights are trained after the cut.",
    ),
    "lm": Field("learning.training.losses.lm", float, TRAIN, "Weight of the language-model loss."),
    "kl": Field(
        "learning.training.losses.kl",
        float,
        TRAIN,
        "Weight of the KL divergence from the dense model.",
    ),
    "hidden": Field("learning.training.losses.hidden", float, TRAIN, "Weight of the hidden states' error."),
    "teacher": Field(
        "learning.teacher", str, TRAIN, "cached: keep the dense model's top logits on disk.", choices=choices.TEACHER
    ),
    "teacher_cache": Field(
        "learning.teacher_cache",
        Path | None,
        TRAIN,
        "Folder of a cached teacher's outputs; runs may share it.",
        text_of,
    ),
    "precision": Field(
        "learning.precision", str, TRAIN, "no: float32; fp16: in recovery only.", choices=choices.PRECISION
    ),
    "gradient_checkpointing": Field(
        "learning.gradient_checkpointing",
        bool,
        TRAIN,
        "Less memory for more time.",
        switch=True,
    ),
    "tracker": Field("learning.tracker", str, TRAIN, "Where training is logged.", choices=choices.TRACKER),
    "save_every": Field("learning.training.save_every", int, TRAIN, "Steps between checkpoints."),
    "target": Field(
        "target", str, WRITE, "stock: the model's own transformers class; graph: any widths.", choices=choices.TARGET
    ),
    "dtype": Field("dtype", str, WRITE, "Type of the stored weights; auto: as the model.", choices=choices.DTYPE),
    "max_shard_size": Field(
        "max_shard_size", str | None, WRITE, "Largest file of weights, as 5GB; then there are several.", parse_size
    ),
    "rehome": Field(
        "rehome",
        bool,
        WRITE,
        "If the model's own class refuses the cut, write another class that holds it.",
        switch=True,
    ),
    "onnx": Field("onnx", bool, WRITE, "Write ONNX with a KV cache."),
    "logits": Field(
        "logits",
        Literal["all", "last"],
        WRITE,
        "Logits of the ONNX graph: all positions, or the last.",
    ),
    "quantize": Field(
        "quantize", str, WRITE, "More ONNX graphs to write, comma-separated.", names, empty="", choices=choices.QUANTIZE
    ),
    "onnx_dtype": Field(
        "onnx_dtype", str, WRITE, "Type of the ONNX graph; auto: as it computes.", choices=choices.ONNX_DTYPE
    ),
    "overwrite": Field(
        "overwrite",
        bool,
        WRITE,
        "Replace an earlier result although files were added to it, which stay, or changed.",
        switch=True,
    ),
    "strict": Field(
        "strict", bool, WRITE, "Fail if an optional file, as a quantised graph, fails; else leave it out.", switch=True
    ),
    "resume": Field("resume", bool, WRITE, "Continue the unfinished run beside --out.", switch=True),
    "eval_data": Field("eval_data", str | None, DATA, "Text for the perplexity in the report."),
    "eval_windows": Field("eval_windows", int, DATA, "Windows for the perplexity in the report."),
    "eval_length": Field("eval_length", int, DATA, "Tokens in such a window."),
    "proof_length": Field("proof_length", int, WRITE, "Most tokens of a sequence in the proof."),
    "memory": Field(
        "memory",
        str | None,
        MACHINE,
        "Bound on weights in memory, as 8GB; by default half of what is free.",
        parse_size,
    ),
    "device": Field("device", str, MACHINE, "Where it runs.", choices=choices.DEVICE),
    "compute_dtype": Field(
        "compute_dtype", str, MACHINE, "Type in which scores and training compute.", choices=choices.COMPUTE_DTYPE
    ),
    "trust_remote_code": Field(
        "trust_remote_code",
        bool,
        MACHINE,
        "Run the Python code in the model's repository.",
        switch=True,
    ),
}

RECOVERY = (
    "data",
    "eval_data",
    "eval_windows",
    "eval_length",
    "length",
    "onnx",
    "logits",
    "quantize",
    "onnx_dtype",
    "strict",
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
    "overwrite",
    "seed",
    "proof_length",
    "max_shard_size",
    "memory",
    "device",
    "compute_dtype",
    "trust_remote_code",
)
"""The ``FIELDS`` that ``mptk recover`` takes."""


def within(least: float, most: float = COUNT) -> dict[str, Any]:
    """Arguments of ``typer.Option`` for a finite number from ``least`` to ``most``, which the help shows of shares."""

    def check(value: float | None) -> float | None:
        if value is not None and (wrong := outside(value, least, most)) is not None:
            raise typer.BadParameter(f"{wrong}. Give a number from {shown(least)} to {shown(most)}.")
        return value

    return {"min": least, "max": most if most <= 1 else None, "callback": check}


def option(name: str, *, panel: bool = False) -> OptionInfo:
    """The typer option of an entry of ``FIELDS``. ``panel``: show it in its panel of the help."""
    found = FIELDS[name]
    flags = [f"--{name.replace('_', '-')}"] if found.switch else []
    shown = found.panel if panel else None
    leaf = found.path.rpartition(".")[2]
    number = leaf in BOUNDS and found.kind not in (str, str | None)
    more: dict[str, Any] = {**(within(*BOUNDS[leaf]) if number else {}), **found.choices}
    made: OptionInfo = typer.Option(..., *flags, help=found.help, rich_help_panel=shown, **more)
    return made


ExampleInputs = Annotated[Path | None, option("inputs")]
Portable = Annotated[bool, option("portable")]
MaxMs = Annotated[
    float | None,
    typer.Option(help="Cut until the predicted latency is this low.", rich_help_panel=CUT, **within(*BOUNDS["max_ms"])),
]
TargetName = Annotated[str, option("target")]
MultipleOf = Annotated[int, option("multiple_of")]
ProofLength = Annotated[int, option("proof_length")]
Memory = Annotated[str | None, option("memory")]
Device = Annotated[str, option("device")]
Logits = Annotated[Literal["all", "last"], option("logits")]
Quantize = Annotated[str, option("quantize")]
OnnxDtype = Annotated[str, option("onnx_dtype")]
Strict = Annotated[bool, option("strict")]
Objective = Annotated[str, option("objective")]
Threads = Annotated[int, option("threads")]
Overwrite = Annotated[bool, option("overwrite")]
Trust = Annotated[bool, option("trust_remote_code")]


def with_settings(*wanted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**options`` the options of these names; all options if no name is given."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=FIELDS[name].default,
                annotation=Annotated[FIELDS[name].kind, option(name, panel=True)],
            )
            for name in wanted or FIELDS
        ]
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if p.default is not p.empty else p for p in kept]
        command.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*named, *more)}
        return command

    return wrap


def settings_from(options: Mapping[str, object]) -> Settings:
    """The settings that these options give."""
    settings = Settings()
    values = {FIELDS[name].path: FIELDS[name].read(value) for name, value in options.items()}
    if "seed" in options:
        values["learning.training.seed"] = options["seed"]
    for path, value in values.items():
        settings = _set(settings, path.split("."), value)
    return settings


def _set(record: Record, path: Sequence[str], value: object) -> Record:
    """A copy of the dataclass with the field at ``path`` replaced."""
    first, *rest = path
    changes: dict[str, Any] = {first: _set(getattr(record, first), rest, value) if rest else value}
    return replace(record, **changes)


def with_latency(settings: Settings, decode_ms: float | None, prefill_ms: float | None) -> Settings:
    """``settings`` with the budget of the latency option that is given, in milliseconds; unchanged if none is."""
    if decode_ms is not None and prefill_ms is not None:
        raise MptkError("only one latency can be budgeted; give --max-decode-ms or --max-prefill-ms")
    for objective, ms in (("decode", decode_ms), ("prefill", prefill_ms)):
        if ms is not None:
            return replace(settings, budget="latency", objective=objective, max_ms=ms)
    return settings
