"""settings: what ``prune`` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mptk.cost.latency import phase
from mptk.cost.model import LATENCY
from mptk.errors import MptkError
from mptk.methods.maskprune.learner import Learning
from passes.targets import legalize

MASKPRUNE = "maskprune"


@dataclass(frozen=True)
class Settings:
    """What ``prune`` is asked for. ``widths`` fixes families' widths, ``plan`` fixes everything.

    ``rehome``: where the model's own config class refuses the cut, another class may hold it (``rehome.py``).
    ``budget``: what sparsity is a share of (``cost.BUDGETS``). ``objective`` is the phase that the ONNX graph is to be
    fast in, and whose latency is budgeted; of this, ``threads`` are those of ONNX Runtime (0: all cores), and
    ``max_ms``, if given, is what to reach in place of a sparsity.
    ``keep``: families that stay whole. ``reconstruct``:
    whether what is left of a layer takes over for what was removed (``methods/reconstruct.py``); None: for MaskPrune
    only. ``logits`` and ``quantize`` are as in ``api.export``. ``learning`` says how to train; a one-shot method trains
    only after the cut. ``resume`` goes on with an unfinished run. ``proof_length``: tokens of
    the longest sequence that the proof may run, to go beyond the model's windows.

    Raises:
        MptkError: an unknown objective, or milliseconds for another budget than latency.
    """

    sparsity: float = 0.3
    method: str = "maskprune"
    data: str = "self"
    samples: int = 32
    length: int = 256
    eval_data: str | None = None
    eval_windows: int = 40
    eval_length: int = 512
    budget: str = "params"
    objective: str = "decode"
    max_ms: float | None = None
    threads: int = 1
    families: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    plan: str | None = None
    target: str = "stock"
    multiple: int = legalize.MULTIPLE
    tolerance: float = 0.01
    onnx: bool = True
    logits: Literal["all", "last"] = "all"
    quantize: tuple[str, ...] = ()
    seed: int = 0
    trust_remote_code: bool = False
    rehome: bool = False
    reconstruct: bool | None = None
    learning: Learning = field(default_factory=Learning)
    resume: bool = False
    proof_length: int = 1024

    def __post_init__(self) -> None:
        phase(self.objective)
        if self.max_ms is not None and self.budget != LATENCY:
            raise MptkError(f"milliseconds are no budget of {self.budget}; set budget to {LATENCY}")
