"""travel: which cuts of a model break programs other than transformers, by how its config holds the widths.

Such programs have code of their own for an architecture. They read most numbers of config.json and derive the others as
the class itself does by default. Two kinds of cuts break that:

1. The size of a head was ``hidden_size / num_attention_heads``, and no longer is. Its field says so, but many programs
   do not read it.
2. The class derives a number from others unless its field is set. The dense config leaves it open; the cut needs it.

``mptk/ir/consumers.py`` says which programs derive what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from transformers import PreTrainedConfig

from mptk.compat.transformers import find_config_field, match_configs
from mptk.ir import STOCK, Limit, find_programs_needing
from passes.targets.stock.config import StockConfig
from passes.targets.stock.learn import Stock

HEAD_DIM, HIDDEN_SIZE, HEADS = "head_dim", "hidden_size", "num_attention_heads"
"""Names that every config class with such a field has, itself or through its ``attribute_map``."""


def find_breaking_cuts(
    stock: Stock, ladders: Mapping[str, Sequence[int]], engines: Collection[str] = ()
) -> dict[str, str]:
    """Family → the programs that a cut of only this family breaks; families that travel everywhere have no entry.

    ``ladders``: each family's legal widths, the dense one last. ``engines``: only these programs; empty: all.
    """
    found = {}
    for name, widths in _list_widest_cuts(stock, ladders):
        cut = stock.build_config(widths)
        if isinstance(cut, StockConfig) and (reasons := find_broken_programs(cut, stock.dense, engines)):
            found[name] = "; ".join(reasons)
    return found


def find_broken_programs(cut: StockConfig, dense: PreTrainedConfig, engines: Collection[str] = ()) -> list[str]:
    """The programs that do not read the config of a cut rightly, each named by what it derives.

    ``engines``: only these programs; empty: all.
    """

    def name_deriving(limit: Limit, config: PreTrainedConfig) -> str:
        return ", ".join(each.name for each in find_programs_needing(limit, STOCK, config.model_type, engines))

    # Case 1, in the config and in those within it. Case 2: a field that was open is set, except the one of case 1.
    reasons = [
        f"programs that derive {HEAD_DIM} from {HIDDEN_SIZE} and {HEADS}, as {names}"
        for before, after in match_configs(dense, cut.config)
        if _is_derivable(before) and not _is_derivable(after) and (names := name_deriving("head_dim", before))
    ]
    implied = [name for name, (old, _) in cut.changes.items() if old is None and name.rpartition(".")[2] != HEAD_DIM]
    if implied and (names := name_deriving("open", dense)):
        reasons.append(f"programs that derive {', '.join(implied)}, which the dense config leaves open, as {names}")
    return reasons


def _list_widest_cuts(stock: Stock, ladders: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each family that can be cut, with its widest cut and that of those that can only be cut with it."""
    for name, ladder in ladders.items():
        # The widest cut of one ratio that gives all of them whole widths. Deeper ones change the same fields.
        partners = next((group for group in stock.together if name in group), frozenset((name,)))
        sizes = {partner: ladders[partner][-1] for partner in partners}
        for width in reversed(ladder[:-1]):
            if all(size * width % ladder[-1] == 0 for size in sizes.values()):
                yield name, {partner: size * width // ladder[-1] for partner, size in sizes.items()}
                break


def _is_derivable(config: PreTrainedConfig) -> bool:
    """Whether the size of a head is what programs derive, or the config has no such field."""
    hidden, heads, size = (find_config_field(config, name) for name in (HIDDEN_SIZE, HEADS, HEAD_DIM))
    if not (isinstance(hidden, int) and isinstance(heads, int) and isinstance(size, int)):
        return True
    return hidden // heads == size
