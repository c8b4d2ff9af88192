"""learning: the settings of training: losses, steps, rates, teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mptk.config.cases import ADAPTED, NO_MASKS, PRUNE, RUNS, TRAIN, TRAINING, UNTRAINED
from mptk.config.setting import COUNT, SEED, Choices, Default, Record, declare_setting, record
from mptk.errors import InputError

MINUTES = 20
"""Default minutes of a run that trains by default."""
MOST_STEPS = 200
"""Most training steps that the default minutes choose."""

# Two were too few, and about 32 cost an eighth to a fifth of the perplexity (`benchmarks/maskprune.md`).
MASK_STEPS = 8
"""Default steps that learn masks, however many steps there are in all (``docs/maskprune.md``)."""
MASK_PARTS = 4
"""Most parts into which a step is divided while masks are learned, of two windows or more: smaller steps choose better
units (``docs/maskprune.md``)."""
LORA_RANK = 16
"""Default rank of LoRA."""
MASK_RATE, LORA_RATE, FULL_RATE = 0.0053, 0.016, 0.0016
"""Peak learning rates as shares of the weights' size: while masks are learned; in recovery, of adapters and of all
weights (``docs/recovery.md``).

As shares of the weights' size one rate suits models whose weights differ in size (``benchmarks/recovery.md``). Adapters
take ten times the rate of all weights."""


def of_training(default: Default, help: str, on: tuple[str, ...] = RUNS, **more: object) -> Default:
    """Declare a setting that needs training: without training it does nothing."""
    return declare_setting(default, help, TRAIN, on, UNTRAINED, **more)


@record
@dataclass(frozen=True)
class LossWeights(Record):
    """Weights of the losses; 0 drops a loss."""

    lm: float = of_training(1.0, "Weight of the language-model loss.", within=(0.0, 1e6))
    kl: float = of_training(1.0, "Weight of the KL divergence from the dense model.", within=(0.0, 1e6))
    hidden_loss: float = of_training(
        0.0, "Weight of the hidden states' squared error, relative to their variance.", within=(0.0, 1e6)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lm or self.kl or self.hidden_loss):
            raise InputError(
                "all three losses have weight 0, so training has no objective; give --lm, --kl or --hidden-loss above "
                "0",
                name="lm",
            )


@record
@dataclass(frozen=True)
class Training(Record):
    """Batch size, learning rate and checkpoints of training."""

    batch: int = of_training(8, "Windows in a step, over all processes.", within=(1, 1 << 20))
    micro: int = of_training(4, "Windows in one forward pass of one process.", within=(1, 1 << 20))
    lr: float | None = of_training(
        None,
        f"Peak learning rate of AdamW; by default {FULL_RATE} (LoRA: {LORA_RATE}) of the weights' typical size.",
        within=(0.0, 100.0),
    )
    optimizer: str = declare_setting(
        "adamw",
        "muon: trains the matrices, and AdamW the rest, if all weights are trained.",
        TRAIN,
        RUNS,
        (*UNTRAINED, ADAPTED),
        choices=Choices(("adamw", "muon")),
    )
    warmup: float = declare_setting(
        0.05, "Share of steps for warm-up; then the rate falls to 0 along a cosine.", within=(0.0, 1.0)
    )
    clip: float = declare_setting(1.0, "Largest norm of a step's gradient.", within=(0.0, 1e9))
    losses: LossWeights = field(default_factory=LossWeights)
    save_every: int = of_training(25, "Steps between checkpoints.", TRAINING, within=(1, COUNT))
    seed: int = declare_setting(0, "Seed of training; --seed sets it.", within=SEED)


@record
@dataclass(frozen=True)
class Rates(Record):
    """Step sizes of MaskPrune. They have no unit, and are totals over the steps that learn masks."""

    mask: float = declare_setting(8.0, "Whole Newton steps that proximal masks take towards the loss's minimum.")
    proximal: float = declare_setting(8.0, "Strength of the proximal step, which shrinks masks of units to remove.")
    dual: float = declare_setting(1.0, "Growth of y, the proximal step's dual.")
    width: float = declare_setting(6.0, "Largest change of a family's width, as a share of the width.")
    price: float = declare_setting(20.0, "Change of ln z for a budget missed by a tenth of the model.")
    urgency: float = declare_setting(2.0, "Extra change of ln z while the budget is missed.")
    fisher: float = declare_setting(
        0.98, "Share of a value that the moving average F still holds after an eighth of the steps."
    )
    drift: float = declare_setting(
        0.9, "Share of a value that the moving average d still holds after an eighth of the steps."
    )

    def divide_over(self, steps: int) -> Rates:
        """The rates for one of ``steps`` steps: the memories of the moving averages are per step."""
        # What an average holds after an eighth of the steps stays the same, however many steps there are.
        return replace(self, fisher=self.fisher ** (8 / steps), drift=self.drift ** (8 / steps))


@record
@dataclass(frozen=True)
class Learning(Record):
    """How a model is trained during pruning and afterwards.

    With rank 0 or None, MaskPrune learns masks with ``LORA_RANK``.

    Raises:
        MptkError: an unknown teacher, precision or tracker; a cached teacher with a hidden-state loss; or adapters that
            are to be trained for rounded weights.
    """

    steps: int | None = declare_setting(
        None,
        "Training steps in total; default: as --minutes choose for recover and if the method learns, else 0.",
        TRAIN,
        TRAINING,
        within=(0, COUNT),
    )
    mask_share: float | None = declare_setting(
        None,
        f"Share of steps that learn masks; default: {MASK_STEPS} steps.",
        TRAIN,
        PRUNE,
        (NO_MASKS,),
        within=(0.0, 1.0),
    )
    masks: str = declare_setting(
        "proximal",
        "proximal: masks of units to remove fade; hard: they are 0 or 1.",
        TRAIN,
        PRUNE,
        (NO_MASKS,),
        choices=Choices(("proximal", "hard")),
    )
    training: Training = field(default_factory=Training)
    rank: int | None = of_training(
        None, "Rank of LoRA; by default, or with 0, all weights are trained after the cut.", within=(0, 1 << 16)
    )
    teacher: str = of_training(
        "live",
        "cached: keep the dense model's outputs (of logits: the top ones) on disk.",
        choices=Choices(("live", "cached")),
    )
    teacher_cache: str | None = of_training(
        None, "Folder for a cached teacher's outputs; runs may share it.", form="path", recipe="refused"
    )
    precision: str = of_training("no", "no: float32; fp16: in recovery only.", choices=Choices(("no", "bf16", "fp16")))
    quantize_aware: bool = of_training(False, "Train for the rounded weights of --quantize int8 or int4.", TRAINING)
    gradient_checkpointing: bool = of_training(False, "Recompute activations: less memory, more time.")
    tracker: str = of_training(
        "none", "Where to log training.", TRAINING, choices=Choices(("none", "tensorboard", "wandb"))
    )
    rates: Rates = declare_setting(Rates(), "Step sizes of MaskPrune.")  # noqa: RUF009  # it is frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_cache is not None and self.teacher != "cached":
            raise InputError("--teacher-cache is only for a cached teacher; add --teacher cached", name="teacher_cache")
        if self.quantize_aware and self.rank:
            raise InputError(
                "--rank trains adapters, and --quantize-aware the weights that are rounded; leave out one of both",
                name="quantize_aware",
            )
        if self.teacher == "cached" and self.training.losses.hidden_loss:
            raise InputError(
                "a cached teacher keeps only logits; use --teacher live for a hidden-state loss", name="teacher"
            )

    @property
    def mask_steps(self) -> int:
        """Steps that learn masks: ``mask_share`` of all; if it is None, ``MASK_STEPS``, at most 0.4 of all."""
        steps = self.steps or 0
        share = min(0.4 * steps, MASK_STEPS) if self.mask_share is None else self.mask_share * steps
        return max(2, round(share))

    @property
    def mask_parts(self) -> int:
        """Steps of the solver for each of ``mask_steps``."""
        batch = self.training.batch
        # As many as divide the batch and leave two windows or more in each.
        return next((p for p in range(MASK_PARTS, 1, -1) if batch % p == 0 and batch >= 2 * p), 1)

    def of_masks(self, size: float) -> Learning:
        """The settings for learning masks: their rank, learning rate and batch. ``size``: of the model's weights."""
        found, parts = self._with(self.rank or LORA_RANK, MASK_RATE * size), self.mask_parts
        training = found.training
        # Checkpoints come as often as without parts: `save_every` counts whole steps.
        training = replace(training, batch=training.batch // parts, save_every=training.save_every * parts)
        return replace(found, training=training)

    def of_recovery(self, frozen: bool, size: float) -> Learning:
        """The settings for recovery: rank and learning rate. ``frozen``: the model's own weights must not change.

        ``size``: of the model's weights.
        """
        # Rank 0 is the user's word for all weights. Without a word, frozen weights need adapters.
        rank = LORA_RANK if self.rank is None and frozen else self.rank or 0
        return self._with(rank, (LORA_RATE if rank else FULL_RATE) * size)

    def _with(self, rank: int, lr: float) -> Learning:
        """Settings with these. The rate has one digit, so that rounding on another machine does not change it.

        Adapters are trained by AdamW.
        """
        given = self.training.lr
        optimizer = "adamw" if rank else self.training.optimizer
        training = replace(self.training, lr=float(f"{lr:.0e}") if given is None else given, optimizer=optimizer)
        return replace(self, rank=rank, training=training)
