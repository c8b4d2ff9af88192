"""family_names: what families are called, so that a misspelt name is found before a model is opened.

The analysis guesses names from structure (``passes/analysis/group.py``). Lists of residual blocks are named after their
module, so others occur, and only the analysis can refuse a name for certain.
"""

from __future__ import annotations

from mptk.errors import list_close_names

FAMILY_NAMES = (
    *("experts", "q_heads", "kv_groups", "heads", "rotary_pairs", "head_dim", "qk_dim", "v_dim", "hidden"),
    *("conv", "ffn", "channels", "layers"),
)
BLOCKED_NAMES = ("vocab", "rows", "output", "axis")
"""What axes are called that cannot be cut: named by a user, they get the reason why."""


def guess_family_name(name: str) -> str:
    """The name that was meant, if ``name`` is none that the analysis gives and is close to one; else an empty text.

    Only the part before a dot is compared: ``fnn.7`` gives ``ffn.7``.
    """
    stem, _, number = name.partition(".")
    if stem in (*FAMILY_NAMES, *BLOCKED_NAMES) or stem.endswith("_layers"):
        return ""
    close = list_close_names(stem, FAMILY_NAMES)
    return ".".join([*close[:1], *([number] if number else [])]) if close else ""
