"""settings: what ``prune`` is asked for. A leaf: importing it imports no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mptk.config.bounds import check_bounds
from mptk.conform import made
from mptk.cost.budgets import LATENCY, phase
from mptk.errors import MptkError

DEFAULT_STEPS = 200
"""Training steps of a method that learns, if no number is given."""

MASK_STEPS = 8
"""Steps in which masks are learned, of as many as there may be (``docs/maskprune.md``)."""
LORA_RANK = 16
"""Rank of LoRA, if none is given."""
MASK_RATE, LORA_RATE, FULL_RATE = 1e-3, 3e-3, 3e-4
"""Peak learning rates beside masks, and in recovery of adapters and of all weights (``docs/recovery.md``)."""

IN_MEMORY = "samples given in Python"
"""What settings and reports call ``data`` that was given in memory."""

INPUTS = ".safetensors"
"""How the name of a file of inputs ends."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types of stored weights; ``auto`` is the checkpoint's own."""

UNIFORM, FREE = LAYERS = ("uniform", "free")
"""Whether all layers get the same widths, or each its own."""

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Types in which a model runs while units are chosen and weights are trained."""

ONNX_DTYPES = ("auto", "float32", "float16")
"""Types of the ONNX graph; ``auto`` is the one in which the model computes, float32 on the command line."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses; 0 leaves one out.

    ``lm``: next-token cross entropy. ``kl``: KL divergence from the dense teacher's distribution. ``hidden``: error of
    the hidden states of all layers over their variance.
    """

    lm: float = 1.0
    kl: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)
        if not (self.lm or self.kl or self.hidden):
            raise MptkError(
                "all three losses have weight 0, so that training has no aim; give one of --lm, --kl, --hidden"
            )


@dataclass(frozen=True)
class Training:
    """How long and how a student is trained.

    ``batch`` windows a step over all processes, ``micro`` of them in one forward pass of one process. ``lr`` is the
    peak learning rate (AdamW), reached after ``warmup``, a share of the steps, and falling to 0 along a cosine; None:
    ``MASK_RATE`` beside masks, ``LORA_RATE`` for adapters, ``FULL_RATE`` for all weights.
    ``clip``: largest norm of a step's gradient. ``save_every``: steps between checkpoints.
    """

    batch: int = 8
    micro: int = 4
    lr: float | None = None
    warmup: float = 0.05
    clip: float = 1.0
    losses: LossWeights = field(default_factory=LossWeights)
    save_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Rates:
    """Step sizes. All are free of units, and totals over the steps that learn masks.

    ``mask``: Newton steps of the masks. ``prox``: strength of the
    proximal shrinkage. ``width``: largest change of a family's width, as a share of it. ``dual``: growth of y.
    ``price``: change of ln z for a budget missed by a tenth of the model; ``urgency``: the same at once, for as long as
    it is missed. ``fisher`` and ``drift``: memories of the moving averages F and d, what is left of a value after an
    eighth of the steps.
    """

    mask: float = 8.0
    prox: float = 8.0
    width: float = 6.0
    dual: float = 1.0
    price: float = 20.0
    urgency: float = 2.0
    fisher: float = 0.98
    drift: float = 0.9

    def over(self, steps: int) -> Rates:
        """The same with the memories of one of so many steps."""
        return replace(self, fisher=self.fisher ** (8 / steps), drift=self.drift ** (8 / steps))


@dataclass(frozen=True)
class Learning:
    """How a model is trained while it is pruned and after.

    ``steps`` in all (None: ``DEFAULT_STEPS`` if the method learns, else none); MaskPrune learns masks in the first
    ``mask_steps`` of them, a ``mask_share`` of all. ``rank``: of LoRA. With 0 or None recovery trains all weights, and
    masks are learned with ``LORA_RANK``. ``teacher``: ``live`` or ``cached``, for this run or, in ``teacher_cache``,
    for others too. ``precision``: ``no``, ``bf16`` or ``fp16``.

    Raises:
        MptkError: an unknown teacher, precision or tracker, or a cached teacher with a hidden-state loss.
    """

    steps: int | None = None
    mask_share: float | None = None
    rank: int | None = None
    teacher: str = "live"
    teacher_cache: str | None = None
    precision: str = "no"
    gradient_checkpointing: bool = False
    tracker: str = "none"
    training: Training = field(default_factory=Training)
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        check_bounds(self)
        for what, chosen, known in (
            ("teacher", self.teacher, ("live", "cached")),
            ("precision", self.precision, ("no", "bf16", "fp16")),
            ("tracker", self.tracker, ("none", "tensorboard", "wandb")),
        ):
            if chosen not in known:
                raise MptkError(f"no {what} {chosen!r}; choose {', '.join(known[:-1])} or {known[-1]}")
        if self.teacher_cache is not None and self.teacher != "cached":
            raise MptkError("a folder for the teacher's outputs is of use to a cached teacher; add --teacher cached")
        if self.teacher == "cached" and self.training.losses.hidden:
            raise MptkError("a cached teacher keeps logits only; use --teacher live with a hidden-state loss")

    @property
    def mask_steps(self) -> int:
        """How many steps learn masks: ``mask_share`` of all. None: ``MASK_STEPS``, and at most 0.4 of all."""
        steps = self.steps or 0
        share = min(0.4 * steps, MASK_STEPS) if self.mask_share is None else self.mask_share * steps
        return max(2, round(share))

    def of_masks(self) -> Learning:
        """The same with the rank and the rate with which masks are learned."""
        return self._with(self.rank or LORA_RANK, MASK_RATE)

    def of_recovery(self, frozen: bool) -> Learning:
        """The same with the rank and the rate of recovery. ``frozen``: the model's own weights must stay."""
        rank = LORA_RANK if self.rank is None and frozen else self.rank or 0
        return self._with(rank, LORA_RATE if rank else FULL_RATE)

    def _with(self, rank: int, lr: float) -> Learning:
        training = self.training if self.training.lr is not None else replace(self.training, lr=lr)
        return replace(self, rank=rank, training=training)


@dataclass(frozen=True)
class Settings:
    """What ``prune`` is asked for.

    What is cut: ``sparsity`` is a share of the ``budget`` (``cost.budgets.BUDGETS``), or ``max_ms`` is the latency to
    reach, in milliseconds of ``objective`` with ``threads`` of ONNX Runtime (0: all cores). ``families`` are cut,
    ``keep`` stay whole, ``widths`` fixes some, ``plan`` (a file) fixes everything. ``vocabulary``: text, named as
    ``data`` is; tokens that are not in it go (docs/vocabulary.md). ``kv_heads``: of each layer afterwards; keys and
    values of several become those of one, and query heads stay (docs/how-to/kv-heads.md). ``layers``: ``uniform``, all
    get the same widths; or ``free``, the budget is divided over the layers, too. ``portable``: only cuts that every
    program reads rightly, not transformers alone. Sums over cut channels stay multiples of ``multiple``.
    ``tolerance``: how far the sparsity may miss.

    ``inputs``: a safetensors file with a tensor for each argument of ``forward``, samples in the first dimension, for a
    transformers model that reads other things than text, images or sound. ``data`` and ``eval_data`` are then such
    files, by default this one, and what counts is the distance of the outputs from the dense model's.

    How it is chosen: ``method``, on ``samples`` windows of ``length`` tokens of ``data`` (``self``: text that the model
    writes). ``reconstruct``: fit the consumers to the dense layers' outputs (None: if the method does by itself, or
    ``distil_epochs`` is given). ``distil_epochs``: then train each block to give the dense block's outputs, in so many
    passes over the windows, at ``distil_lr``. ``learning``: training with the method and after the cut. ``resume``: go
    on with an unfinished run, if there is one.

    ``search``: rank ways to divide the budget first, and cut to the best one
    (``methods/division/search.py``). At most ``search_shapes`` of them are measured without training.
    ``search_tokens`` are spent on a short recovery of the best ``search_finalists`` (0: none is trained).

    What is written: ``target``. ``dtype``: type of the stored weights (``auto``: the checkpoint's own).
    ``max_shard_size``: bytes of the largest file of weights (None: 5 GB). ``rehome``: if the model's config class
    refuses the cut, another class may hold it. ``onnx`` with ``logits``, ``quantize``, ``objective`` and ``onnx_dtype``
    as in ``mptk.export``. ``strict``: an optional file that cannot be made or proven fails the run; else the file is
    left out, with a note (docs/report.md). ``overwrite``: replace an earlier result although files were added to it,
    which stay where they are, or changed, which are replaced.

    What is measured: ``eval_windows`` windows of ``eval_length`` tokens of ``eval_data`` (None: of ``data``). Text that
    the model writes has at most ``samples`` windows of ``length`` tokens. The defaults cost no more than the rest of a
    one-shot run.
    ``proof_length``: tokens of the longest sequence that the proof may run, to go beyond the model's windows.

    Where it is computed: ``device`` (``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``, ``xpu``), with ``memory`` bytes
    for weights and for values between stages (None: half of what is free). ``compute_dtype``: the type in which the
    model runs for scores, the choice of widths, reconstruction and training. Sums, losses, solves and the proof are
    float32.

    Raises:
        MptkError: a number outside of its bounds (``config/bounds.py``); an unknown objective or dtype; a family that
            is to be kept and cut; a search beside a plan; quantised graphs beside one in float16, or milliseconds for
            another budget than latency.
    """

    sparsity: float = 0.3
    method: str = "maskprune"
    data: str = "self"
    samples: int = 32
    length: int = 256
    eval_data: str | None = None
    eval_windows: int = 16
    eval_length: int = 512
    budget: str = "params"
    objective: str = "decode"
    max_ms: float | None = None
    threads: int = 1
    families: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    vocabulary: str | None = None
    kv_heads: int | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    layers: str = UNIFORM
    plan: str | None = None
    inputs: str | None = None
    portable: bool = False
    target: str = "stock"
    dtype: str = "auto"
    multiple: int = 32
    tolerance: float = 0.01
    onnx: bool = True
    logits: Literal["all", "last"] = "all"
    quantize: tuple[str, ...] = ()
    onnx_dtype: str = "auto"
    strict: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    rehome: bool = False
    reconstruct: bool | None = None
    distil_epochs: int = 0
    distil_lr: float = 1e-3
    search: bool = False
    search_shapes: int = 64
    search_finalists: int = 6
    search_tokens: int = 131_072
    learning: Learning = field(default_factory=Learning)
    resume: bool = False
    overwrite: bool = False
    memory: int | None = None
    device: str = "auto"
    compute_dtype: str = "float32"
    max_shard_size: int | None = None
    proof_length: int = 1024

    def __post_init__(self) -> None:
        check_bounds(self)
        phase(self.objective)
        for name, known in (("layers", LAYERS), ("dtype", DTYPES), ("compute_dtype", COMPUTE_DTYPES)):
            if getattr(self, name) not in known:
                raise MptkError(f"no {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        check_onnx_dtype(self.onnx_dtype, self.quantize)
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
            raise MptkError("what reads --inputs has no vocabulary to trim; leave out --inputs or --vocabulary")

    @property
    def fixed(self) -> bool:
        """Whether it is settled which units stay: by a plan, or all of them, where tokens or KV heads alone go."""
        other = self.sparsity or self.families or self.widths or self.search or self.max_ms is not None
        alone = self.vocabulary is not None or self.kv_heads is not None
        return self.plan is not None or (alone and not other)

    @property
    def steps(self) -> int:
        """Training steps; 0 if they were not settled yet."""
        return self.learning.steps or 0

    @property
    def trains(self) -> bool:
        """Whether weights are trained, be it in a search alone."""
        return bool(self.steps or (self.search and self.search_tokens))


def check_onnx_dtype(dtype: str, quantize: Sequence[str]) -> None:
    """Check the type of an ONNX graph, and that the graphs ``quantize`` can be made of it.

    Raises:
        MptkError: ONNX Runtime does not run the type; or graphs are to be quantised that are not float32.
    """
    if dtype == "bfloat16":
        raise MptkError("ONNX Runtime has no bfloat16 kernels for the CPU; use --onnx-dtype float32 or float16")
    if dtype not in ONNX_DTYPES:
        raise MptkError(f"no type {dtype!r} of an ONNX graph; choose one of {', '.join(ONNX_DTYPES)}")
    if dtype == "float16" and quantize:
        raise MptkError(f"{', '.join(quantize)} is made of a float32 graph; leave out --onnx-dtype or --quantize")


def settings_from_json(data: object) -> Settings:
    """Settings as ``dataclasses.asdict`` and JSON give them back; fields that this version lacks are left out.

    Raises:
        ValueError: ``data`` does not hold settings; with the place.
    """
    outer = _object(data, "settings")
    learning = _object(outer.get("learning"), "settings.learning")
    training = _object(learning.get("training"), "settings.learning.training")
    try:
        training["losses"] = made(LossWeights, training.get("losses"), "settings.learning.training.losses")
        learning["training"] = made(Training, training, "settings.learning.training")
        learning["rates"] = made(Rates, learning.get("rates"), "settings.learning.rates")
        outer["learning"] = made(Learning, learning, "settings.learning")
        for name in ("families", "keep", "quantize"):
            if isinstance(found := outer.get(name), list):
                outer[name] = tuple(found)
        return made(Settings, outer, "settings")
    except MptkError as error:  # a value that no settings take
        raise ValueError(f"settings: {error}") from error


def _object(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is no object")
    return dict(data)
