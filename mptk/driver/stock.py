"""stock: the transformers class and config that a plan asks for, found from the dense model alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from mptk.errors import MptkError
from mptk.io.models import Loaded
from mptk.ir.families import Analysis
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from passes.targets import legalize
from passes.targets.stock.config import StockConfig
from passes.targets.stock.rehome import find_home, logits_check, rehome
from passes.verify import TOLERANCE


@dataclass(frozen=True)
class Written:
    """What is written as a checkpoint: ``stock`` is its class and config, ``loaded`` the dense model.

    ``cut``: the dense model's own config after the cut; that of ``stock`` unless another class holds the weights.
    ``note``: why it is another class; empty if it is not.
    """

    stock: StockConfig
    loaded: Loaded
    cut: PreTrainedConfig
    note: str = ""


def find_stock(
    analysis: Analysis,
    loaded: Loaded,
    plan: Plan,
    pruned: Program,
    epsilons: Mapping[float, float],
    *,
    tokens: Tensor,
    elsewhere: bool = False,
) -> Written:
    """The class and config for a plan.

    Args:
        pruned: the cut program; ``epsilons``: the norms' epsilons that the cut changed, old → new.
        tokens: token ids [1, sequence] on which another class must give equal logits.
        elsewhere: whether another class than the model's own may hold the cut.

    Raises:
        MptkError: the class refuses these widths, and no other class may or can hold them.
    """
    model = loaded.model
    found = legalize.discover(analysis, model).config(plan.widths, scalars=epsilons)
    if isinstance(found, StockConfig):
        return Written(found, loaded, found.config)
    if elsewhere and found.config is not None:
        shapes = legalize.cut_shapes(analysis, plan.widths)
        other = rehome(found.config, shapes, logits_check(pruned, tokens), tolerance=TOLERANCE)
        if isinstance(other, StockConfig):
            note = f"written as {other.model_class.__name__}, with equal logits, since {found}"
            return Written(other, loaded, found.config, note)
        raise MptkError(f"the stock class refuses these widths: {found}; no other class will do: {other}")
    home: Any = find_home(analysis, model, plan.widths)
    hint = "" if home is None else f", or give --rehome: {home} holds them with equal logits"
    raise MptkError(f"the stock class refuses these widths: {found}; choose others or use --target graph{hint}")
