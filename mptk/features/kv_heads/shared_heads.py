"""shared_heads: attention layers whose query heads share keys and values in groups, found by the axes of their weights.

A group's keys and values have its axis and no axis of query heads; its queries and the layer that sums over its outputs
have both. If each query head has keys of its own, there is no axis of query heads, and keys look as queries do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mptk.errors import AnalysisError
from mptk.ir import Analysis, Axis, Group, Member, list_axes


@dataclass(frozen=True)
class SharedHeads:
    """One layer's projections: weights and biases. ``groups``: the axis of KV heads; ``heads``: of each one's queries.

    ``heads`` is None if each KV head has one query head.
    """

    layer: str
    groups: Axis
    heads: Axis | None
    queries: tuple[Member, ...]
    keys: tuple[Member, ...]
    values: tuple[Member, ...]
    outputs: tuple[Member, ...]

    @property
    def scope(self) -> tuple[Axis, ...]:
        """The axes of a query head's number."""
        return (self.groups,) if self.heads is None else (self.groups, self.heads)


def find_shared_heads(analysis: Analysis, name: str) -> list[tuple[SharedHeads, ...]]:
    """Each layer of the family ``name`` of KV heads; two ways to read a layer if its keys and queries look alike.

    Raises:
        MptkError: a layer's projections are not one weight each.
    """
    found = []
    for group in analysis.family(name).groups:
        ways = tuple(_list_readings(group))
        if not ways:
            where = group.layer or "the model"
            raise AnalysisError(
                f"queries, keys, values and outputs of {where} are not one weight each; leave out --kv-heads, and cut "
                "heads",
                name=where,
            )
        found.append(ways)
    return found


def _list_readings(group: Group) -> Iterator[SharedHeads]:
    """The ways to tell what each member is."""
    # Outputs sum over query heads and value channels. Values have the group's axis and those channels, and no more.
    outputs = tuple(m for m in group.members if m.role == "consumer")
    rest = [m for m in group.members if m.role != "consumer"]
    summed = {leaf for m in outputs for leaf in list_axes(m.term)} - {group.axis}
    values = tuple(
        m for m in rest if set(list_axes(m.term)) - summed == {group.axis} and len(set(list_axes(m.term))) == 2
    )
    # What outputs sum over besides the group and the value channels is the axis of query heads.
    others = [m for m in rest if m not in values]
    heads = summed - {leaf for m in values for leaf in list_axes(m.term)}
    if len(outputs) != 1 or len(heads) > 1 or not _is_one_matrix(values):
        return
    # Queries have the axis of query heads, and keys do not.
    if heads:
        (axis,) = heads
        parts = [tuple(m for m in others if (axis in list_axes(m.term)) == asked) for asked in (True, False)]
        if all(map(_is_one_matrix, parts)):
            yield SharedHeads(group.layer, group.axis, axis, parts[0], parts[1], values, outputs)
        return
    # One query head for each KV head: queries and keys look alike, so the caller gets both readings to try.
    modules = list(dict.fromkeys(m.weight.rpartition(".")[0] for m in others))
    parts = [tuple(m for m in others if m.weight.startswith(f"{module}.")) for module in modules]
    if len(parts) == 2 and all(map(_is_one_matrix, parts)):
        yield SharedHeads(group.layer, group.axis, None, parts[0], parts[1], values, outputs)
        yield SharedHeads(group.layer, group.axis, None, parts[1], parts[0], values, outputs)


def _is_one_matrix(members: Sequence[Member]) -> bool:
    """Whether they are one weight, or one with its bias."""
    return sum(m.role == "producer" for m in members) == 1 and len({m.weight for m in members}) == len(members) <= 2
