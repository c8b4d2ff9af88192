"""naming: names and descriptions of families for people. They are guessed from structure; no code depends on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from mptk.ir.axes import Axis, list_axes
from mptk.ir.families import Group


def name_family(group: Group, layers: int) -> tuple[str, str]:
    """A name and a description of the family of ``group``, which has ``layers`` groups.

    1. If the axis has a role, it is used by attention, a mixture of experts or an embedding.
    2. If weights of one layer make the axis and sum over it, it is the feed-forward width, or the width between
       convolutions if one of them does either.
    3. Otherwise it is just channels.
    """
    roles = group.axis.roles
    if "expert" in roles:
        return "experts", "experts of a mixture, with their router rows"
    if "head" in roles:
        return _name_heads(group)
    if "inner" in roles:
        return _name_query_channels(group)
    if "value" in roles:
        return "v_dim", "value channels in each head"
    if "embedding" in roles:
        return "hidden", "residual width"
    if _is_feed_forward(group, layers):
        return ("conv", "channels between convolutions") if "convolution" in roles else ("ffn", "feed-forward channels")
    return "channels", "channels"


def name_blocked(axis: Axis) -> str:
    """A name of an axis that cannot be cut. Rows of a table are named before its columns: a tied head has both."""

    def is_said(sign: str) -> bool:
        return any(sign in reason for reason in axis.frozen)

    if is_said("indexed by the model's input"):
        return "vocab"
    if "embedding" in axis.roles:
        return "hidden"
    return "output" if is_said("the model's output") else "axis"


def number_duplicates(names: Iterable[str]) -> list[str]:
    """The names, numbered if several are the same: ``ffn.1``, ``ffn.2``."""
    names = list(names)
    total, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if total[name] == 1 else f"{name}.{seen[name]}")
    return found


def _name_heads(group: Group) -> tuple[str, str]:
    producers = [m for m in group.members if m.role == "producer"]
    if group.scope and len(producers) == 1:
        return "q_heads", "query heads in each KV group"
    others = {leaf for m in group.members for leaf in list_axes(m.term)} - {group.axis}
    if any("head" in leaf.roles for leaf in others):
        return "kv_groups", "KV heads with their query heads"
    return "heads", "attention heads"


def _name_query_channels(group: Group) -> tuple[str, str]:
    """Name query channels. A rotation ties the two halves of a head, so the axis occurs twice in query and key."""
    times = [sum(leaf is group.axis for leaf in list_axes(m.term)) for m in group.members if m.role == "producer"]
    tied = "value" in group.axis.roles
    fused = len(times) == 1 and not tied
    what = "query, key and value" if tied else "query and key"
    if max(times, default=0) > (2 if fused else 1):
        return "rotary_pairs", f"rotary pairs of {what} channels"
    return ("head_dim" if tied else "qk_dim"), f"{what} channels in each head"


def _is_feed_forward(group: Group, layers: int) -> bool:
    """Whether weights of one layer make the channels and sum over them."""
    distinct_weights = {re.sub(r"\d+", "*", m.weight) for m in group.members}
    once = layers > 1 or len(distinct_weights) == len(group.members)
    numbers = {tuple(re.findall(r"\.(\d+)\.", m.weight))[:1] for m in group.members}
    return once and {"producer", "consumer"} <= {m.role for m in group.members} and len(numbers) == 1
