"""settings: the core's settings of ``prune``, each declared once: what is cut (``CutSettings``), then all others.

``mptk/config/joined.py`` adds those of features. Importing this module imports no library, so that ``--help`` and an
error in an option are quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from mptk.config.cases import (
    ALL_STAY,
    CHOICE,
    CHOOSES,
    CHOOSING,
    CUT,
    DATA,
    DECIDED,
    ENGINED,
    MACHINE,
    NO_CLASS,
    NO_GRAPH,
    ON_DEVICE,
    PHASED,
    PLANNED,
    PRUNE,
    READING,
    RUNS,
    SEARCH,
    TIMED,
    TRAIN,
    TRAINING,
    UNCACHED,
    UNKEPT,
    UNREAD,
    UNTIMED,
    WHOLE_BLOCKS,
    WRITE,
)
from mptk.config.choices import (
    AUTO_SCHEME,
    COMPARED_TYPES,
    COMPUTE_DTYPES,
    DEVICES,
    DTYPES,
    ENGINE_CHOICES,
    IN_MEMORY,
    INPUTS,
    LAYERS,
    METHODS,
    MOST_SPARSITY,
    ONNX_DTYPES,
    SAMPLES,
    SCHEMES,
    TARGET_CHOICES,
    UNIFORM,
)
from mptk.config.learning import MINUTES, MOST_STEPS, Learning
from mptk.config.setting import COUNT, SEED, Choices, Record, declare_setting, parse_numbers
from mptk.cost.budgets import BUDGETS, CACHE_CONTEXT, LATENCY, OBJECTIVES, PROMPT
from mptk.errors import InputError
from mptk.ir import HARDWARE, KERNEL_BLOCK, guess_family_name, read_alignment
from mptk.trust import Trust, trust_by_caller


@dataclass(frozen=True)
class CutSettings(Record):
    """What to cut, and how much of it.

    Raises:
        MptkError: a family is to be both kept and cut, or named twice; or milliseconds are given for a budget that is
            not latency.
    """

    sparsity: float = declare_setting(
        0.3,
        "Share of the budget to remove, as 0.3 or 30%.",
        CUT,
        SEARCH,
        (PLANNED, TIMED),
        within=(0.0, MOST_SPARSITY),
        form="share",
    )
    budget: str = declare_setting(
        "params",
        "What is counted. params: of blocks; total: all parameters; serving: bytes of weights and KV cache.",
        CUT,
        CHOOSING,
        (PLANNED, ALL_STAY, TIMED),
        choices=Choices(tuple(BUDGETS)),
    )
    context: int | None = declare_setting(
        None,
        "Tokens in the KV cache, of one sequence; "
        f"default: {CACHE_CONTEXT} for the budgets kv-cache and serving, {PROMPT} for predicted decoding.",
        CUT,
        CHOOSING,
        (UNCACHED,),
        within=(1, COUNT),
    )
    # Without a panel: the options --max-decode-ms and --max-prefill-ms set it with its budget and phase.
    max_ms: float | None = declare_setting(None, "Target latency in milliseconds, as predicted.", within=(1e-6, 1e9))
    objective: str = declare_setting(
        "decode",
        "Phase whose latency the budget counts.",
        CUT,
        (*SEARCH, "export"),
        PHASED,
        choices=Choices(tuple(OBJECTIVES)),
    )
    threads: int = declare_setting(
        1, "Threads per operator; 0: all cores.", CUT, (*SEARCH, "generate", "eval"), (UNTIMED,), within=(0, 1024)
    )
    families: tuple[str, ...] = declare_setting(
        (),
        "Families to cut, or layers of them, as ffn,q_heads.7, or a part of analyze; default: those inside layers.",
        CUT,
        CHOOSING,
        (PLANNED,),
    )
    keep: tuple[str, ...] = declare_setting(
        (), "Families to leave uncut, or layers of them, as q_heads,ffn.7.", CUT, CHOOSING, CHOOSES
    )
    widths: Mapping[str, int] = declare_setting(
        {},
        "Fix the width of a family or of one layer, as ffn=1024 or ffn.7=1280. May be repeated.",
        CUT,
        SEARCH,
        (PLANNED,),
        option="width",
    )
    layers: str = declare_setting(
        UNIFORM,
        "uniform: all layers get the same widths; free: each gets its own; numbers: only these layers are cut.",
        CUT,
        PRUNE,
        CHOOSES,
        choices=Choices(LAYERS, or_ranges=True),
    )
    plan: str | None = declare_setting(None, "Cut to this plan.json instead of choosing.", CUT, PRUNE, form="path")
    larger: str | None = declare_setting(
        None,
        "Cut this larger pruned folder of the model further: start from its weights, choose among the units it keeps.",
        CUT,
        PRUNE,
        CHOOSES,
        form="path",
        in_plan=True,
    )
    portable: bool = declare_setting(
        True,
        "Leave whole by default what would break widely used programs if cut (docs/deploy.md).",
        CUT,
        CHOOSING,
        (*CHOOSES, ENGINED, NO_CLASS),
    )
    engines: tuple[str, ...] = declare_setting(
        (),
        "Programs that must read the result, comma-separated: only widths that all of them read are legal.",
        CUT,
        (*CHOOSING, "analyze"),
        (UNREAD,),
        choices=ENGINE_CHOICES,
    )
    align: int | str = declare_setting(
        KERNEL_BLOCK,
        f"Keep multiples of a number as multiples: 32, {', '.join(HARDWARE)}, or by family, as ffn=512,hidden=256.",
        CUT,
        (*CHOOSING, "analyze"),
        form="number or text",
    )
    tensor_parallel: int = declare_setting(
        1,
        "Devices that will share each layer: keep heads, KV heads and channels divisible by their number.",
        CUT,
        (*CHOOSING, "analyze"),
        within=(1, 1 << 12),
    )
    # Without a panel, it is a keyword of Python only.
    tolerance: float = declare_setting(0.01, "Largest deviation from the sparsity.", within=(0.0, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        read_alignment(self.align)  # for its errors
        if self.max_ms is not None and self.budget != LATENCY:
            raise InputError(
                f"milliseconds are given, but the budget is {self.budget}; set budget to {LATENCY}", name="max_ms"
            )
        if len(set(self.families)) < len(self.families):
            raise InputError(f"families names one twice: {', '.join(self.families)}; give each once", name="families")
        for name in self.keep:
            if name in self.families or name in self.widths:
                other = "families" if name in self.families else "width"
                raise InputError(f"{name} is in --keep and in --{other}; leave it out of one of them", name="keep")
        for name in (*self.keep, *self.families, *self.widths):
            if meant := guess_family_name(name):
                raise InputError(f"no family {name!r}; did you mean {meant!r}?", name=name, nearest=[meant])

    @property
    def only_layers(self) -> frozenset[int] | None:
        """The numbers of the layers that may be cut; None: all."""
        return None if self.layers in LAYERS else parse_numbers(self.layers)


@dataclass(frozen=True)
class CoreSettings(CutSettings):
    """The settings of ``prune``. docs/settings.md has their bounds and options.

    Raises:
        MptkError: a value is outside its bounds or not among its choices; a family is to be both kept and cut;
            quantised graphs are combined with a float16 graph; or milliseconds are given for a budget that is not
            latency.
    """

    method: str = declare_setting(
        "maskprune",
        "maskprune learns what to cut; the others score each unit once.",
        CHOICE,
        CHOOSING,
        CHOOSES,
        choices=METHODS,
    )
    reconstruct: bool | None = declare_setting(
        None,
        "Fit the kept weights to the dense model's values; default of maskprune, influence, greedy, --distil-epochs.",
        CHOICE,
        CHOOSING,
        CHOOSES,
    )
    distil_epochs: int | None = declare_setting(
        None,
        "After reconstruction, train each block to the dense block's outputs for this many epochs; default: 0, or 3 if "
        "the method learns and minutes allow.",
        CHOICE,
        PRUNE,
        CHOOSES,
        within=(0, COUNT),
    )
    distil_lr: float = declare_setting(
        1e-3, "Learning rate of this block-by-block training.", CHOICE, PRUNE, (WHOLE_BLOCKS,), within=(0.0, 100.0)
    )
    seed: int = declare_setting(0, "Seed of the random choices.", CHOICE, READING, within=SEED)
    data: str = declare_setting(
        "self",
        "Text to calibrate and train on: file, FILE:COLUMN, folder, data set, A=0.7,B=0.3; self: the model writes it.",
        DATA,
        READING,
        form="source",
    )
    inputs: str | None = declare_setting(
        None,
        f"Inputs that are not text, images or sound: a {INPUTS} file of forward's tensors, samples first.",
        DATA,
        (*CHOOSING, "analyze"),
        form="path",
    )
    samples: int | None = declare_setting(
        None,
        f"Calibration windows; default: {SAMPLES}, 3 if only a --plan is cut, or as --minutes choose.",
        DATA,
        CHOOSING,
        within=(1, COUNT),
    )
    length: int = declare_setting(256, "Tokens in a window.", DATA, READING, within=(8, COUNT))
    eval_data: str | None = declare_setting(
        None,
        "Text for the perplexity in the report; default: a part of --data, set aside.",
        DATA,
        TRAINING,
        form="source",
    )
    eval_windows: int = declare_setting(16, "Windows to measure on.", DATA, TRAINING, within=(1, COUNT))
    # Two tokens at least: the first one is not predicted.
    eval_length: int = declare_setting(512, "Tokens in a window of that text.", DATA, TRAINING, within=(2, COUNT))
    minutes: float | None = declare_setting(
        None,
        "Limit of the whole run by the clock: chooses --samples, --search-tokens and, for recover and if the method "
        "learns, --steps that you do not give; "
        f"default: {MINUTES} for recover and if the method learns (60 with --search), for at most "
        f"{MOST_STEPS} steps.",
        TRAIN,
        TRAINING,
        (DECIDED,),
        within=(0.01, 10**6),
        recipe="read",  # a run writes the numbers that they chose: on another machine they would choose others
    )
    learning: Learning = field(default_factory=Learning)
    target: str = declare_setting(
        "stock",
        "stock: the model's own transformers class; nemotron-nas: DeciLM, a width for each layer; graph: any widths.",
        WRITE,
        (*CHOOSING, "analyze"),
        choices=TARGET_CHOICES,
    )
    dtype: str = declare_setting("auto", "Type of the stored weights; auto: the model's.", WRITE, PRUNE, choices=DTYPES)
    max_shard_size: int | None = declare_setting(
        None,
        "Largest file of weights, as 5GB; more weights go into more files.",
        WRITE,
        TRAINING,
        within=(1, 2**60),
        form="size",
        resumable=True,
    )
    rehome: bool = declare_setting(
        False,
        "If the model's own class cannot hold the cut, write another class that can.",
        WRITE,
        SEARCH,
        (PLANNED, ALL_STAY, NO_CLASS),
    )
    onnx: bool = declare_setting(True, "Write ONNX with a KV cache.", WRITE, TRAINING)
    logits: Literal["all", "last"] = declare_setting(
        "all",
        "Positions for which the ONNX graph gives logits: all, or the last.",
        WRITE,
        (*TRAINING, "export"),
        (NO_GRAPH,),
        choices=Choices(("all", "last")),
    )
    quantize: tuple[str, ...] = declare_setting(
        (),
        "More ONNX graphs to write, comma-separated; auto (prune): the type and the sparsity that lose least within "
        "--max-decode-ms or --max-prefill-ms.",
        WRITE,
        (*TRAINING, "export"),
        (NO_GRAPH,),
        choices=SCHEMES,
    )
    onnx_dtype: str = declare_setting(
        "auto",
        "Type of the ONNX graph; auto: the type it computes in.",
        WRITE,
        (*TRAINING, "export"),
        (NO_GRAPH,),
        choices=ONNX_DTYPES,
    )
    overwrite: bool = declare_setting(
        False,
        "Replace an earlier result even if its files were changed; files that were added stay.",
        WRITE,
        (*RUNS, "export"),
        recipe="refused",  # a recipe may be somebody else's, and would decide which of the user's files go
        resumable=True,
    )
    strict: bool = declare_setting(
        False,
        "Fail if an optional file, as a quantised graph, fails; default: leave it out.",
        WRITE,
        (*TRAINING, "export"),
        resumable=True,
    )
    resume: bool = declare_setting(
        False, "Continue the unfinished run beside --out.", WRITE, RUNS, UNKEPT, recipe="read", resumable=True
    )
    proof_length: int = declare_setting(
        1024,
        "Longest sequence in the proof, in tokens.",
        WRITE,
        (*TRAINING, "verify"),
        within=(48, COUNT),  # the proof's short batch has 48 tokens (`PROOF_SHAPE`)
        resumable=True,
    )
    memory: int | None = declare_setting(
        None,
        "Most memory for weights, as 8GB; default: half of the free memory.",
        MACHINE,
        (*READING, "verify", "export"),
        within=(1, 2**60),
        form="size",
        resumable=True,
    )
    device: str = declare_setting("auto", "Device to run on.", MACHINE, ON_DEVICE, choices=DEVICES, resumable=True)
    compute_dtype: str = declare_setting(
        "auto",
        "Type for scoring and training; auto: bfloat16 in a run by minutes if it is faster here, else float32.",
        MACHINE,
        READING,
        choices=COMPUTE_DTYPES,
    )
    trust_remote_code: bool = declare_setting(
        False,
        "Run the Python code in the model's repository.",
        MACHINE,
        (*READING, "analyze", "show", "verify", "report", "export", "eval"),
        recipe="refused",
        said_in_call=True,  # so that no report or recipe lets a model's code run (`mptk/trust.py`)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Settings that contradict each other whatever the model is. `check_settings` and the stages check the rest.
        if self.onnx_dtype == "float16" and self.quantize:
            graphs = ", ".join(self.quantize)
            raise InputError(f"{graphs} needs a float32 graph; leave out --onnx-dtype or --quantize", name="onnx_dtype")
        if self.learning.quantize_aware and len({*self.quantize} - {"fp16"}) != 1:
            raise InputError(
                "--quantize-aware trains for the weights of one graph; give --quantize int8 or int4, or leave it out",
                name="quantize_aware",
            )
        if self.chooses_type and len(self.quantize) > 1:
            raise InputError("auto chooses the type; leave out auto or the other types", name="quantize")
        if self.distil_epochs and self.reconstruct is False:
            raise InputError(
                "--distil-epochs needs reconstruction; leave out --no-reconstruct or --distil-epochs",
                name="distil_epochs",
            )
        if self.larger is not None and self.layers != UNIFORM:
            other = f"--layers {self.layers}"
            raise InputError(
                f"a larger folder is cut further in all layers alike, by one method; leave out {other}", name="larger"
            )
        self._check_inputs()

    def _check_inputs(self) -> None:
        if self.inputs is None:
            return
        # A module that takes tensors has no tokenizer: its data are files of tensors too, by default the same one.
        by_default = {"data": CoreSettings.data, "eval_data": CoreSettings.eval_data}
        for name, default in by_default.items():
            data = getattr(self, name)
            if data not in (default, self.inputs, IN_MEMORY) and not data.endswith(INPUTS):
                raise InputError(
                    f"{name} {data} is not a {INPUTS} file, as --inputs needs; give one, or leave it out", name=name
                )

    @property
    def sources(self) -> list[str]:
        """What is said to be read as samples or texts: files, data sets, or that the caller holds them in memory."""
        found = [each.of(self) for each in type(self).declared if each.setting.form == "source"]
        return [source for source in found if isinstance(source, str)]

    def with_plan(self, plan: str) -> Self:
        """Settings that cut to a plan, without what the plan says already."""
        # What the plan says was done by conversions and others; to do it once more would change the result.
        defaults: dict[str, Any] = {each.path: each.default for each in type(self).declared if each.setting.in_plan}
        return replace(self, **{**defaults, "plan": plan})

    def with_widths(self, widths: Mapping[str, int]) -> Self:
        """Settings that cut to these widths, without another division of the budget. Features extend it."""
        return replace(self, widths=dict(widths))

    @property
    def trust(self) -> Trust:
        """Whether the model's own code may run. Settings of a file never let it (``from_json``)."""
        return trust_by_caller(self.trust_remote_code)

    @property
    def chooses_type(self) -> bool:
        """Whether a feature chooses the type of the graph, and how much is cut, before units are chosen."""
        return AUTO_SCHEME in self.quantize

    def check_free_amount(self) -> None:
        """Raise MptkError if the type is to be chosen, and it is not open how much is cut, or for what time."""
        given = {"--plan": self.plan, "--larger": self.larger, "--width": self.widths or None}
        given[self.divider] = self.divider or None
        other = next((name for name, value in given.items() if value is not None), self.converts and "the conversion")
        if self.chooses_type and other:
            raise InputError(
                f"--quantize auto chooses how much of the dense model is cut; leave out {other}, or name the types",
                name="quantize",
            )
        if self.chooses_type and (self.max_ms is None or not self.onnx):
            raise InputError(
                "--quantize auto chooses by milliseconds of a graph; give --max-decode-ms or --max-prefill-ms, and "
                "leave out --no-onnx",
                name="quantize",
            )

    @property
    def schemes(self) -> tuple[str, ...]:
        """Schemes of the quantised graphs that the result may have."""
        return COMPARED_TYPES if self.chooses_type else self.quantize

    @property
    def fixed(self) -> bool:
        """Whether the units to keep are known: from a plan, or all of them if only a conversion makes it smaller."""
        other = self.sparsity or self.families or self.widths or self.divider or self.max_ms is not None
        return self.plan is not None or (self.converts and not other)

    @property
    def converts(self) -> bool:
        """Whether a conversion makes the model smaller, so that no units need to be removed. Features extend it."""
        return False

    @property
    def renumbers_tokens(self) -> bool:
        """Whether the result has other token ids, so that data must be texts. Features extend it."""
        return False

    @property
    def not_alone(self) -> str:
        """Why no run makes the result by itself; empty if one does. Features extend it."""
        return ""

    @property
    def subfolders(self) -> tuple[str, ...]:
        """Those of the result with parts of others (``mptk.plugins.Feature.subfolders``). Features extend it."""
        return ()

    @property
    def steps(self) -> int:
        """Training steps; 0 if the number is not set yet."""
        return self.learning.steps or 0

    @property
    def windows(self) -> int:
        """Calibration windows; ``SAMPLES`` if the number is not set yet."""
        return SAMPLES if self.samples is None else self.samples

    @property
    def trains(self) -> bool:
        """Whether weights are trained, also if only to compare divisions of the budget. Features extend it."""
        return bool(self.steps)

    @property
    def training_option(self) -> str:
        """The option that makes the run train. Features extend it; ``{name}`` is a setting's option."""
        return "--steps"

    @property
    def divider(self) -> str:
        """The option by which a feature divides the budget among families and blocks, before units are chosen.

        Empty: the method divides it. Features extend it.
        """
        return ""

    @property
    def divisions(self) -> int | None:
        """Most divisions of the budget to try; None: as many as the method does. Features extend it."""
        return None

    @property
    def default_minutes(self) -> float:
        """The time of the whole run if the run trains and nobody gave one. Features extend it."""
        return MINUTES

    @property
    def further_numbers(self) -> Mapping[str, int]:
        """The numbers of features that may be left to the minutes: as given, else as without a time limit."""
        return {}
