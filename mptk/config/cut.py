"""cut: the settings of what is cut: budget, families, layers, widths. ``settings.py`` has all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mptk.config.cases import (
    ALL_STAY,
    CHOOSES,
    CHOOSING,
    CUT,
    ENGINED,
    LADDER,
    NO_CLASS,
    NO_LADDER,
    PHASED,
    PLANNED,
    PRUNE,
    SEARCH,
    TIMED,
    UNCACHED,
    UNREAD,
    UNTIMED,
)
from mptk.config.choices import (
    ENGINE_CHOICES,
    LAYERS,
    MOST_SPARSITY,
    UNIFORM,
)
from mptk.config.setting import COUNT, Choices, Record, declare_setting, parse_numbers
from mptk.cost.budgets import BUDGETS, LATENCY, OBJECTIVES
from mptk.errors import MptkError
from mptk.ir.alignment import HARDWARE, KERNEL_BLOCK, read_alignment


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
        (PLANNED, TIMED, LADDER),
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
    context: int = declare_setting(
        4096,
        "Tokens in the KV cache, of one sequence, that the budgets kv-cache and serving count.",
        CUT,
        CHOOSING,
        (UNCACHED,),
        within=(1, COUNT),
    )
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
    vocabulary: str | None = declare_setting(
        None, "Remove the tokens that this text never uses; same forms as --data.", CUT, PRUNE
    )
    kv_heads: int | None = declare_setting(
        None, "Merge the KV heads of each layer to this number; all query heads stay.", CUT, SEARCH, within=(1, 1 << 20)
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
    )
    shared: bool = declare_setting(
        False,
        "One set of weights for all sizes of --ladder, in one folder; `mptk rung` writes each smaller one.",
        CUT,
        PRUNE,
        (NO_LADDER,),
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
    tolerance: float = declare_setting(0.01, "Largest deviation from the sparsity.", within=(0.0, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        read_alignment(self.align)
        if self.max_ms is not None and self.budget != LATENCY:
            raise MptkError(f"milliseconds are given, but the budget is {self.budget}; set budget to {LATENCY}")
        if len(set(self.families)) < len(self.families):
            raise MptkError(f"families names one twice: {', '.join(self.families)}; give each once")
        for name in self.keep:
            if name in self.families or name in self.widths:
                other = "families" if name in self.families else "width"
                raise MptkError(f"{name} is in --keep and in --{other}; leave it out of one of them")

    @property
    def only_layers(self) -> frozenset[int] | None:
        """The numbers of the layers that may be cut; None: all."""
        return None if self.layers in LAYERS else parse_numbers(self.layers)
