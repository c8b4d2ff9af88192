"""settings: what ``prune`` is asked for, each setting declared once. A leaf: importing it imports no library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mptk.config.cases import (
    ALL_STAY,
    CHOICE,
    CHOOSES,
    CUT,
    DATA,
    MACHINE,
    NO_CLASS,
    NO_GRAPH,
    NO_SEARCH,
    ON_DEVICE,
    PHASED,
    PLANNED,
    PRUNE,
    QUICK,
    RUNS,
    SEARCH,
    TIMED,
    TRAINING,
    UNKEPT,
    UNTIMED,
    WHOLE_BLOCKS,
    WRITE,
)
from mptk.config.learning import (
    DEFAULT_STEPS,
    Learning,
    LossWeights,
    Rates,
    Training,
)
from mptk.config.setting import COUNT, SEED, Choices, Record, record, setting
from mptk.cost.budgets import BUDGETS, LATENCY, OBJECTIVES
from mptk.errors import MptkError

__all__ = [
    "DEFAULT_STEPS",
    "FREE",
    "INPUTS",
    "IN_MEMORY",
    "MOST",
    "Learning",
    "LossWeights",
    "Rates",
    "Settings",
    "Training",
]

IN_MEMORY = "samples given in Python"
"""What settings and reports call ``data`` that was given in memory."""
INPUTS = ".safetensors"
"""How the name of a file of inputs ends."""
UNIFORM, FREE = LAYERS = ("uniform", "free")
"""Whether all layers get the same widths, or each its own."""
METHODS = Choices(
    ("maskprune", "random", "magnitude", "wanda", "flap", "reap", "fisher", "taylor", "influence", "greedy"),
    plugins=("mptk.methods", "mptk.criteria"),
)
TARGETS = Choices(("stock", "graph"), plugins=("mptk.targets",))
SCHEMES = Choices(("int8", "int4", "fp16"))
DTYPES = Choices(("auto", "float32", "bfloat16", "float16"))
COMPUTE_DTYPES = Choices(("float32", "bfloat16"))
ONNX_DTYPES = Choices(("auto", "float32", "float16"))  # ONNX Runtime has no bfloat16 kernels for the CPU
DEVICES = Choices(("auto", "cpu", "cuda", "mps", "xpu"), numbered=("cuda", "xpu"))
MOST = 0.99
"""The largest sparsity."""


@record
@dataclass(frozen=True)
class Settings(Record):
    """What ``prune`` is asked for. docs/settings.md has the bounds, and the names of the options.

    Raises:
        MptkError: a value outside its bounds or not among its choices; a family that is to be kept and cut; a search
            beside a plan; quantised graphs beside one in float16; or milliseconds for another budget than latency.
    """

    sparsity: float = setting(0.3, "Share of the budget to remove.", CUT, SEARCH, (PLANNED, TIMED), within=(0.0, MOST))
    budget: str = setting(
        "params",
        "What is budgeted; params: those of blocks.",
        CUT,
        SEARCH,
        (PLANNED, ALL_STAY, TIMED),
        choices=Choices(tuple(BUDGETS)),
    )
    max_ms: float | None = setting(
        None, "Cut until the predicted latency is this low, in milliseconds.", within=(1e-6, 1e9)
    )
    objective: str = setting(
        "decode", "Phase whose latency counts.", CUT, (*SEARCH, "export"), PHASED, choices=Choices(tuple(OBJECTIVES))
    )
    threads: int = setting(
        1, "Threads of an operator; 0: all cores.", CUT, (*SEARCH, "generate", "eval"), (UNTIMED,), within=(0, 1024)
    )
    families: tuple[str, ...] = setting(
        (), "Families to cut, comma-separated; by default those of single layers.", CUT, SEARCH, (PLANNED,)
    )
    keep: tuple[str, ...] = setting((), "Families that stay whole, comma-separated.", CUT, SEARCH, CHOOSES)
    vocabulary: str | None = setting(None, "Remove the tokens that this text, named as --data, never uses.", CUT, PRUNE)
    kv_heads: int | None = setting(
        None, "KV heads of each layer afterwards; all query heads stay.", CUT, SEARCH, within=(1, 1 << 20)
    )
    widths: Mapping[str, int] = setting(
        {}, "Fix a family's width, as ffn=1024. May be repeated.", CUT, SEARCH, (PLANNED,), option="width"
    )
    layers: str = setting(
        UNIFORM,
        "uniform: all layers get the same widths; free: each its own.",
        CUT,
        PRUNE,
        CHOOSES,
        choices=Choices(LAYERS),
    )
    plan: str | None = setting(None, "Cut to this plan.json instead of choosing.", CUT, PRUNE, form="path")
    portable: bool = setting(
        False, "Cut only what every program reads rightly, not only transformers.", CUT, (*SEARCH, "analyze")
    )
    multiple: int = setting(
        32,
        "Keep sizes that are multiples of this as multiples of this.",
        CUT,
        (*SEARCH, "analyze"),
        within=(1, 1 << 20),
        option="multiple_of",
    )
    tolerance: float = setting(0.01, "How far the sparsity may miss.", within=(0.0, 1.0))
    method: str = setting(
        "maskprune", "maskprune learns what to cut; the others score once.", CHOICE, SEARCH, CHOOSES, choices=METHODS
    )
    reconstruct: bool | None = setting(
        None,
        "Fit the kept weights to the dense layers' outputs; default of maskprune and of --distil-epochs.",
        CHOICE,
        SEARCH,
        CHOOSES,
    )
    distil_epochs: int = setting(
        0,
        "After reconstruction, train block by block to the dense blocks' outputs, for this many epochs, as 3.",
        CHOICE,
        PRUNE,
        CHOOSES,
        within=(0, COUNT),
    )
    distil_lr: float = setting(
        1e-3, "Learning rate of --distil-epochs.", CHOICE, PRUNE, (WHOLE_BLOCKS,), within=(0.0, 100.0)
    )
    search: bool = setting(
        False, "First rank ways to divide the budget, as `mptk shapes`; cut to the best.", CHOICE, PRUNE
    )
    search_shapes: int = setting(
        64,
        "Most shapes that are measured without training.",
        CHOICE,
        SEARCH,
        (NO_SEARCH,),
        within=(1, 100_000),
        renamed={"shapes": "shapes"},
    )
    search_finalists: int = setting(
        6,
        "How many of them are trained.",
        CHOICE,
        SEARCH,
        (NO_SEARCH, QUICK),
        within=(1, 100_000),
        renamed={"shapes": "finalists"},
    )
    search_tokens: int = setting(
        131_072,
        "Tokens of text that they are trained on in all; 0: none.",
        CHOICE,
        SEARCH,
        (NO_SEARCH,),
        within=(0, 10**12),
        renamed={"shapes": "tokens"},
    )
    seed: int = setting(0, "Seed of the random choices.", CHOICE, RUNS, within=SEED)
    data: str = setting(
        "self",
        "Text to calibrate and train on: file, FILE:COLUMN, folder, data set, A=0.7,B=0.3; self: the model writes it.",
        DATA,
        RUNS,
    )
    inputs: str | None = setting(
        None,
        f"Other inputs than text, images or sound: a {INPUTS} file of forward's tensors, samples first.",
        DATA,
        (*SEARCH, "analyze"),
        form="path",
    )
    samples: int = setting(32, "Calibration windows.", DATA, SEARCH, within=(1, COUNT))
    length: int = setting(256, "Tokens in a window.", DATA, RUNS, within=(8, COUNT))
    eval_data: str | None = setting(
        None, "Text for the perplexity in the report; by default that of --data.", DATA, TRAINING
    )
    eval_windows: int = setting(16, "Windows for the perplexity in the report.", DATA, TRAINING, within=(1, COUNT))
    eval_length: int = setting(512, "Tokens in such a window.", DATA, TRAINING, within=(2, COUNT))
    learning: Learning = field(default_factory=Learning)
    target: str = setting(
        "stock",
        "stock: the model's own transformers class; graph: any widths.",
        WRITE,
        (*SEARCH, "analyze"),
        choices=TARGETS,
    )
    dtype: str = setting("auto", "Type of the stored weights; auto: as the model.", WRITE, PRUNE, choices=DTYPES)
    max_shard_size: int | None = setting(
        None,
        "Largest file of weights, as 5GB; then there are several.",
        WRITE,
        TRAINING,
        within=(1, 2**60),
        form="size",
        resumable=True,
    )
    rehome: bool = setting(
        False,
        "If the model's own class refuses the cut, write another class that holds it.",
        WRITE,
        SEARCH,
        (PLANNED, ALL_STAY, NO_CLASS),
    )
    onnx: bool = setting(True, "Write ONNX with a KV cache.", WRITE, TRAINING)
    logits: Literal["all", "last"] = setting(
        "all",
        "Logits of the ONNX graph: all positions, or the last.",
        WRITE,
        (*TRAINING, "export"),
        (NO_GRAPH,),
        choices=Choices(("all", "last")),
    )
    quantize: tuple[str, ...] = setting(
        (), "More ONNX graphs to write, comma-separated.", WRITE, (*TRAINING, "export"), (NO_GRAPH,), choices=SCHEMES
    )
    onnx_dtype: str = setting(
        "auto",
        "Type of the ONNX graph; auto: as it computes.",
        WRITE,
        (*TRAINING, "export"),
        (NO_GRAPH,),
        choices=ONNX_DTYPES,
    )
    overwrite: bool = setting(
        False,
        "Replace an earlier result although files were added to it, which stay, or changed.",
        WRITE,
        (*RUNS, "export", "rerun"),
        recipe="refused",
        resumable=True,
    )
    strict: bool = setting(
        False,
        "Fail if an optional file, as a quantised graph, fails; else leave it out.",
        WRITE,
        (*TRAINING, "export"),
        resumable=True,
    )
    resume: bool = setting(
        False, "Continue the unfinished run beside --out.", WRITE, RUNS, UNKEPT, recipe="read", resumable=True
    )
    proof_length: int = setting(
        1024,
        "Most tokens of a sequence in the proof.",
        WRITE,
        (*TRAINING, "verify"),
        within=(48, COUNT),
        resumable=True,
    )
    memory: int | None = setting(
        None,
        "Bound on weights in memory, as 8GB; by default half of what is free.",
        MACHINE,
        (*RUNS, "verify", "export"),
        within=(1, 2**60),
        form="size",
        resumable=True,
    )
    device: str = setting("auto", "Where it runs.", MACHINE, ON_DEVICE, choices=DEVICES, resumable=True)
    compute_dtype: str = setting(
        "float32",
        "Type in which scores and training compute; sums, losses, solves and the proof are float32.",
        MACHINE,
        RUNS,
        choices=COMPUTE_DTYPES,
    )
    trust_remote_code: bool = setting(
        False,
        "Run the Python code in the model's repository.",
        MACHINE,
        (*RUNS, "analyze", "show", "verify", "rerun", "export", "eval"),
        recipe="refused",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.onnx_dtype == "float16" and self.quantize:
            graphs = ", ".join(self.quantize)
            raise MptkError(f"{graphs} is made of a float32 graph; leave out --onnx-dtype or --quantize")
        if self.distil_epochs and self.reconstruct is False:
            raise MptkError("blocks are distilled after reconstruction; leave out --no-reconstruct or --distil-epochs")
        if self.max_ms is not None and self.budget != LATENCY:
            raise MptkError(f"milliseconds are no budget of {self.budget}; set budget to {LATENCY}")
        if self.search and self.plan is not None:
            raise MptkError("--plan says which units stay, so --search has nothing to choose; leave out one of both")
        if self.search and self.layers == FREE:
            raise MptkError("--search ranks shapes whose layers are alike, not --layers free; leave out one of both")
        self._check_inputs()
        if len(set(self.families)) < len(self.families):
            raise MptkError(f"families names one twice: {', '.join(self.families)}; give each once")
        for name in self.keep:
            if name in self.families or name in self.widths:
                other = "families" if name in self.families else "width"
                raise MptkError(f"{name} is to stay whole by --keep and to be cut by --{other}; leave out one of both")

    def _check_inputs(self) -> None:
        if self.inputs is None:
            return
        by_default = {"data": Settings.data, "eval_data": Settings.eval_data}
        for name, default in by_default.items():
            data = getattr(self, name)
            if data not in (default, self.inputs, IN_MEMORY) and not data.endswith(INPUTS):
                raise MptkError(
                    f"{name} {data} is no {INPUTS} file of inputs, as --inputs is; give one, or leave it out"
                )
        if self.vocabulary is not None:
            raise MptkError("vocabulary trimming needs a text model; leave out --inputs or --vocabulary")

    @property
    def fixed(self) -> bool:
        """Whether it is settled which units stay: by a plan, or all of them, if only tokens or KV heads go."""
        other = self.sparsity or self.families or self.widths or self.search or self.max_ms is not None
        smaller = self.vocabulary is not None or self.kv_heads is not None
        return self.plan is not None or (smaller and not other)

    @property
    def steps(self) -> int:
        """Training steps; 0 if they were not settled yet."""
        return self.learning.steps or 0

    @property
    def trains(self) -> bool:
        """Whether weights are trained, if only in a search."""
        return bool(self.steps or (self.search and self.search_tokens))
