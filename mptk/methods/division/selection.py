"""selection: the layers that may be cut, from the names of families, layers and parts of a model in the settings.

A family is taken apart if some of its layers stay whole or have a width of their own. While widths are searched, its
other layers are one family, with one width (``Analysis.apart``). A model of several networks has parts, by their
modules: vision tower, projector, language model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from mptk.config.settings import Settings
from mptk.cost.model import is_layered
from mptk.errors import MptkError
from mptk.ir.alignment import read_alignment
from mptk.ir.families import Analysis, Family
from passes.targets.legalize import LegalWidths
from passes.targets.width_choices import find_missing_partners


@dataclass(frozen=True)
class LayerSelection:
    """What may be cut.

    ``alike``: family that is taken apart → its layers that get one width. ``whole``: the families that stay whole after
    that. ``families``, ``keep``, ``widths``: the settings of that name, with the names of families after that.
    ``named``: the first layer that the settings name.
    """

    alike: Mapping[str, Sequence[int]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    families: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    named: str = ""

    def restrict_widths(self, legal: LegalWidths) -> LegalWidths:
        """Legal widths without the narrower ones of families that stay whole."""
        stay = {name: legal.ladders[name][-1:] for name in self.whole}
        return replace(legal, ladders={**legal.ladders, **stay})

    def layers(self, family: Family, free: bool) -> list[str]:
        """The layers of ``family`` that are cut, as families of their own; itself if it is not divided.

        ``free``: whether each layer gets a width of its own.
        """
        if family.name in self.alike:
            return [family.parts[i].name for i in self.alike[family.name]]
        return [part.name for part in family.parts if free] or [family.name]


def select_layers(analysis: Analysis, settings: Settings) -> LayerSelection:
    """The layers that ``settings`` let be cut.

    Raises:
        MptkError: there is no such family or layer; or settings contradict each other.
    """
    s = settings
    cut, own, kept = (collect_named_layers(analysis, names) for names in (s.families, s.widths, s.keep))
    inside = {f.name: list_layers_inside(f, s) for f in analysis.all_families}
    _check(analysis, inside, s)
    alike = dict[str, list[int]]()
    for name, layers in inside.items():
        asked = (cut[name] if s.families else {None}) | (own[name] & {None})
        if None in kept[name] or not (asked or own[name]) or not analysis.family(name).parts:
            continue
        together = [i for i in layers if asked & {None, i} and i not in own[name] | kept[name]]
        if len(together) < len(analysis.family(name).parts):
            alike[name] = together
    return _rename_selection(analysis, s, alike, {name for name, layers in inside.items() if not layers})


def parse_family_name(analysis: Analysis, name: str) -> tuple[str, int | None]:
    """The family that ``name`` names, and the number of the layer, if it names one, as ``ffn.7``.

    Raises:
        MptkError: there is no such family or layer.
    """
    known = [f.name for f in analysis.all_families]
    if name in known:
        return name, None
    whole, _, number = name.rpartition(".")
    parts = analysis.family(whole).parts if whole in known else ()
    if number.isdecimal() and int(number) < len(parts):
        return whole, int(number)
    if parts:
        raise MptkError(f"no layer {name!r}; there are {parts[0].name} to {parts[-1].name}")
    if fixed := next((axis for axis in analysis.blocked if axis.name == name), None):
        why = fixed.reasons[0].partition(" (")[0]
        raise MptkError(f"{name} is no family, and keeps its {fixed.size} channels: {why}; leave it out")
    example = next((f" (and layers of them, as {f.parts[0].name})" for f in analysis.families if f.parts), "")
    raise MptkError(f"no family {name!r}; there are {', '.join(known)}{example}")


def check_aligned(analysis: Analysis, settings: Settings) -> None:
    """Raise MptkError unless each name in ``--align`` is a family's."""
    for name in read_alignment(settings.align).own:
        if parse_family_name(analysis, name)[1] is not None:
            raise MptkError(f"--align {name}: layers share the divisor of their family; name the family")


def collect_named_layers(analysis: Analysis, names: Iterable[str]) -> Mapping[str, set[int | None]]:
    """Family → its layers that are named; None stands for the family as a whole.

    Raises MptkError as ``parse_family_name``.
    """
    found = defaultdict[str, set[int | None]](set)
    for name in names:
        family, layer = parse_family_name(analysis, name)
        found[family].add(layer)
    return found


def list_layers_inside(family: Family, settings: Settings) -> list[int]:
    """The layers of ``family`` that ``--layers`` lets be cut.

    A family without layers, as the residual width, is inside only if all layers are.
    """
    only = settings.only_layers
    if only is None:
        return list(range(len(family.groups)))
    return [i for i, block in enumerate(number_blocks(family)) if family.parts and block in only]


def number_blocks(family: Family) -> list[int]:
    """Each layer's block: the first number that tells their modules apart, as 7 of ``layers.7.mlp``; else 0, 1, …"""
    columns = zip(*(group.layer.split(".") for group in family.groups), strict=False)
    apart = next((words for words in columns if len(set(words)) > 1), ())
    if len(set(apart)) == len(family.groups) and all(word.isdecimal() for word in apart):
        return [int(word) for word in apart]
    return list(range(len(family.groups)))


def _check(analysis: Analysis, inside: Mapping[str, Sequence[int]], settings: Settings) -> None:
    s = settings
    check_aligned(analysis, s)
    there = {block for f in analysis.families if f.parts for block in number_blocks(f)}
    if missing := (s.only_layers or frozenset()) - there:
        known = f"0 to {max(there)}" if there else "none"
        raise MptkError(f"--layers {s.layers}: there is no layer {min(missing)}; the model has {known}")
    for name in (*s.families, *s.widths):
        family, layer = parse_family_name(analysis, name)
        if s.only_layers is not None and (not inside[family] if layer is None else layer not in inside[family]):
            raise MptkError(f"{name} is outside of --layers {s.layers}; leave out one of both")
        if family in s.keep:
            raise MptkError(f"{name} is to be cut, and {family} is in --keep; leave it out of one of them")


def _rename_selection(
    analysis: Analysis, settings: Settings, alike: Mapping[str, Sequence[int]], outside: Iterable[str]
) -> LayerSelection:
    """The selection, with names of families that are there after ``Analysis.apart``."""
    s = settings
    there = {f.name: f for f in analysis.apart(alike).all_families}
    fixed = {name: width for name, width in s.widths.items() if name in there}

    def after(name: str) -> list[str]:
        family, layer = parse_family_name(analysis, name)
        single = [each for each in fixed if parse_family_name(analysis, each)[0] == family] if layer is None else [name]
        return [each for each in (family, *single) if each in there]

    families = tuple(dict.fromkeys(new for name in s.families for new in after(name)))
    if s.families and not families:
        raise MptkError("--keep leaves nothing of --families to cut; leave out one of them")
    keep = tuple(name for name in s.keep if parse_family_name(analysis, name)[1] is None)
    parts = {part.name for name in alike for part in analysis.family(name).parts}
    whole = {name for name in there if (name in parts and name not in fixed) or name in outside}
    named = (name for name in (*s.families, *s.keep, *s.widths) if parse_family_name(analysis, name)[1] is not None)
    return LayerSelection(alike, frozenset(whole), families, keep, fixed, next(named, ""))


Parts = Mapping[str, Sequence[str]]
"""Part → the names of its modules."""


def list_part_families(analysis: Analysis, parts: Parts, part: str) -> list[str]:
    """The families that lie in a part. One over several parts, as a residual width, is in none."""
    inside = tuple(f"{module}." for module in parts[part])
    return [
        family.name
        for family in analysis.all_families
        if all(f"{group.layer}.".startswith(inside) for group in family.groups)
    ]


def expand_parts(names: Iterable[str], analysis: Analysis, legal: LegalWidths, parts: Parts) -> tuple[str, ...]:
    """Names of families, in which a part stands for its families with a group in each layer that have legal widths.

    A part without such families stands for all that have legal widths. Families that can only be cut together with one
    outside of these are left out.

    Raises:
        MptkError: nothing in a part can be cut.
    """
    found: list[str] = []
    for name in names:
        if name not in parts:
            found.append(name)
            continue
        inside = list_part_families(analysis, parts, name)
        if not inside:
            raise MptkError(f"the samples of --data do not run {name}; give data that it reads, or other --families")
        legals = [f for f in inside if len(legal.ladders.get(f, ())) > 1]
        channels = [f for f in legals if analysis.family(f).kind == "channels"]
        layered = [f for f in channels if is_layered(analysis.family(f))]
        if not (cut := _keep_independent(layered, legal) or _keep_independent(channels, legal)):
            raise MptkError(f"no family of {name} has another legal width; see mptk analyze, or use --target graph")
        found += cut
    return tuple(dict.fromkeys(found))


def _keep_independent(families: Sequence[str], legal: LegalWidths) -> list[str]:
    """Those of ``families`` that can be cut without another one."""
    left = list(families)
    while without := [f for f in left if find_missing_partners(f, left, legal.together)]:
        left = [f for f in left if f not in without]
    return left


def build_part_rows(model: nn.Module, analysis: Analysis, parts: Parts) -> list[dict[str, object]]:
    """A row for each part: ``name``, ``modules``, ``parameters``, ``families``."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def parameters(modules: Sequence[str]) -> int:
        inside = tuple(f"{module}." for module in modules)
        return sum(size for name, size in sizes.items() if name.startswith(inside))

    return [
        {
            "name": part,
            "modules": list(modules),
            "parameters": parameters(modules),
            "families": list_part_families(analysis, parts, part),
        }
        for part, modules in parts.items()
    ]
