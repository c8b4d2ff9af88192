"""idle: options that were typed and would do nothing, or that contradict each other. They are refused before any work.

Options from a recipe file are not looked at: a run writes all of its options into its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

from mptk.config.settings import Settings
from mptk.cost.budgets import LATENCY
from mptk.errors import MptkError

TYPED: ContextVar[frozenset[str]] = ContextVar("typed", default=frozenset())
"""The names of the options of the running command that stand in its command line."""

TRAINING = (
    *("batch", "micro", "lr", "rank", "lm", "kl", "hidden", "teacher", "teacher_cache", "precision"),
    *("gradient_checkpointing", "tracker", "save_every"),
)
ONNX = ("logits", "quantize", "onnx_dtype")
CHOOSING = (
    *("sparsity", "families", "keep", "width", "layers", "method", "budget", "max_decode_ms", "max_prefill_ms"),
    "rehome",
)
ALONE = ("keep", "layers", "method", "budget", "rehome", "reconstruct", "distil_epochs")
SEARCHING = ("search_shapes", "search_finalists", "search_tokens")
SAMPLING = ("top_k", "top_p", "seed")


def refuse(names: Iterable[str], why: str, remedy: str) -> None:
    """Raise MptkError if one of the options ``names`` was typed."""
    for name in names:
        if name in TYPED.get():
            raise MptkError(f"--{name.replace('_', '-')} would do nothing: {why}; {remedy}")


def check_prune(settings: Settings, learns: bool, estimate: bool) -> None:
    """Check the options of ``prune``. ``settings`` are settled; ``learns``: the method learns in steps."""
    if settings.plan is not None:
        refuse((*CHOOSING, "reconstruct", "distil_epochs"), "--plan says which units stay", "leave out one of both")
    elif settings.fixed:
        refuse(ALONE, "with --sparsity 0 tokens or KV heads alone go", "give a --sparsity, or leave it out")
    if settings.fixed and not settings.steps:
        refuse(("resume",), "a run that neither chooses nor trains keeps no stages", "leave it out")
    _check_budget(settings)
    if not learns:
        refuse(("mask_share",), "this method learns no masks", "give --method maskprune, or leave it out")
    if not settings.search:
        refuse(SEARCHING, "no shapes are searched", "give --search, or leave it out")
    elif not settings.search_tokens:
        refuse(("search_finalists",), "the search trains nothing", "give --search-tokens, or leave it out")
    if not settings.distil_epochs:
        refuse(("distil_lr",), "no block is distilled", "give --distil-epochs, as 3, or leave it out")
    _check_training(settings)
    _check_onnx(settings)
    if settings.target != "stock":
        refuse(("rehome",), f"the target {settings.target} needs no class", "leave it out")
    if estimate:
        refuse(("resume",), "--estimate runs nothing", "leave out one of both")


def check_shapes(settings: Settings, writes: bool) -> None:
    """Check the options of ``shapes``. ``writes``: it has a folder."""
    _check_budget(settings)
    if not settings.search_tokens:
        refuse((*TRAINING, "finalists"), "nothing is trained", "give --tokens, or leave it out")
    if settings.target != "stock":
        refuse(("rehome",), f"the target {settings.target} needs no class", "leave it out")
    if not writes:
        refuse(("resume",), "without --out no results are kept", "give --out, or leave it out")


def check_recover(settings: Settings) -> None:
    """Check the options of ``recover``."""
    if not settings.steps:
        raise MptkError("recover trains, and --steps 0 leaves nothing to do; give 1 or more")
    _check_onnx(settings)


def _check_budget(settings: Settings) -> None:
    if TYPED.get() & {"max_decode_ms", "max_prefill_ms"}:
        refuse(("sparsity", "budget"), "a latency is the budget", "leave out one of both")
        refuse(("objective",), "the option of the latency names the phase", "leave it out")
    if settings.budget != LATENCY:
        refuse(("threads",), "they are those of a predicted latency", "give --max-decode-ms, or leave it out")
        if not settings.onnx:
            refuse(("objective",), "neither a latency is predicted nor a graph written", "leave it out")


def _check_training(settings: Settings) -> None:
    if not settings.trains:
        refuse(TRAINING, "nothing is trained", "give --steps, or leave it out")


def _check_onnx(settings: Settings) -> None:
    if not settings.onnx:
        refuse(ONNX, "--no-onnx writes no graph", "leave out one of both")


def check_generate(temperature: float) -> None:
    """Check the options of ``generate``."""
    if not temperature:
        refuse(SAMPLING, "temperature 0 takes the likeliest token", "give --temperature, or leave it out")


def check_eval(data: str | None, tasks: str, runtime: str) -> None:
    """Check the options of ``eval``."""
    if data is None:
        refuse(("length", "windows"), "there is no text to measure on", "give --data, or leave it out")
    if not tasks:
        refuse(("limit", "include_path"), "no lm-eval task is run", "give --tasks, or leave it out")
    if runtime == "onnx":
        refuse(("trust_remote_code",), "ONNX Runtime runs a graph, and no code of a model", "leave it out")
    else:
        refuse(("threads",), "torch uses all cores", "give --runtime onnx, or leave it out")
