"""selection: which widths are chosen, from the names of families, layers and parts of a model in the settings.

Layers of a family get one width, unless the settings keep some whole, give them widths of their own, or leave all free.
A model of several networks has parts, by their modules: vision tower, projector, language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from mptk.config import Settings
from mptk.cost.model import is_layered
from mptk.errors import AnalysisError, DataError, InputError, list_close_names, suggest_name
from mptk.ir import Analysis, Family, Variable, Variables, read_alignment
from passes.targets.legalize import LegalWidths
from passes.targets.width_choices import find_missing_partners


@dataclass(frozen=True)
class Tying:
    """The variables whose values are searched, in which layers that are to have equal widths are tied.

    ``variables``: all of the model. ``whole``: those that stay whole. ``families``, ``keep``, ``widths``: the settings
    of that name, in names of these variables: of a family whose layers are tied, they name no layer.
    """

    variables: Variables
    whole: frozenset[str]
    families: tuple[str, ...]
    keep: tuple[str, ...]
    widths: Mapping[str, int]

    @property
    def untied(self) -> frozenset[str]:
        """The families whose layers are not all tied."""
        return frozenset(v.family.name for v in self.variables.values() if not v.uniform)


def tie_layers(analysis: Analysis, settings: Settings) -> Tying:
    """Tie the layers of each family that ``settings`` let be cut to one width; each other layer is by itself.

    Raises:
        MptkError: there is no such family or layer; or settings contradict each other.
    """
    s = settings
    cut, given, kept = ([find_named(analysis, name) for name in names] for names in (s.families, s.widths, s.keep))
    inside = {f.name: list_layers_inside(f, s) for f in analysis.all_families}
    _check(analysis, inside, s)
    found, whole = dict[str, Variable](), set[str]()
    for family in analysis.all_families:
        named, own, stay = ([v for v in each if v.family is family] for each in (cut, given, kept))
        layers = list(range(len(family.groups)))  # all, if nothing asks for a cut: then its layers do not differ
        if (named or own or not s.families) and not any(v.uniform for v in stay):
            asked = [*named, *(v for v in own if v.uniform)] if s.families else [family.tie()]
            alone = _collect_layers(v for v in (*own, *stay) if not v.uniform)
            layers = [i for i in inside[family.name] if i in _collect_layers(asked) - alone]
        tied = [family.tie(layers)] if layers else []
        others = [v for v in family.tie().list_layers() if v.layers[0] not in layers]
        found.update({v.name: v for v in (*tied, *others)})
        whole |= {v.name for v in others if v.name not in s.widths}
        whole |= {v.name for v in tied if not inside[family.name]}
    families = _name_cut(found, cut, [name for name in s.widths if name in found])
    if s.families and not families:
        raise InputError("--keep leaves nothing of --families to cut; leave out one of them", name="keep")
    widths = {name: width for name, width in s.widths.items() if name in found}
    return Tying(found, frozenset(whole), families, tuple(v.name for v in kept if v.uniform), widths)


def _name_cut(variables: Variables, named: Iterable[Variable], fixed: Sequence[str]) -> tuple[str, ...]:
    """The names, among ``variables``, of what the settings name to be cut; ``fixed``: those with a given width."""
    found = dict[str, None]()
    for each in named:
        own = [name for name in fixed if variables[name].family is each.family] if each.uniform else [each.name]
        found |= dict.fromkeys(name for name in (each.family.name, *own) if name in variables)
    return tuple(found)


def _collect_layers(variables: Iterable[Variable]) -> set[int]:
    return {layer for variable in variables for layer in variable.layers}


def tie_as_planned(analysis: Analysis, names: Iterable[str]) -> Variables:
    """All variables of a model, with those that a plan names: a family of which it names layers has one for each."""
    named = map(analysis.variable, names)
    return analysis.make_variables({v.family.name for v in named if not v.uniform})


def find_named(analysis: Analysis, name: str) -> Variable:
    """The variable that ``name`` names, a family or one of its layers, as ``ffn.7``.

    Raises:
        MptkError: there is no such family or layer.
    """
    with suppress(KeyError):
        return analysis.variable(name)
    families = {f.name: f for f in analysis.all_families}
    whole = families.get(name.rpartition(".")[0])
    if whole is not None and len(layers := whole.tie().list_layers()) > 1:
        raise InputError(
            f"no layer {name!r}; there are {layers[0].name} to {layers[-1].name}",
            name=name,
            nearest=list_close_names(name, [layer.name for layer in layers], cutoff=0),
        )
    if fixed := next((axis for axis in analysis.blocked if axis.name == name), None):
        why = fixed.reasons[0].partition(" (")[0]
        raise InputError(f"{name} is no family, and keeps its {fixed.size} channels: {why}; leave it out", name=name)
    first = next((f.tie().list_layers()[0].name for f in analysis.families if is_layered(f)), "")
    example = first and f" (and layers of them, as {first})"
    close = list_close_names(name, families, cutoff=0)
    meant = suggest_name(name, families, "")
    raise InputError(
        f"no family {name!r}; {meant and f'{meant} '}there are {', '.join(families)}{example}", name=name, nearest=close
    )


def check_aligned(analysis: Analysis, settings: Settings) -> None:
    """Raise MptkError unless each name in ``--align`` is a family's."""
    for name in read_alignment(settings.align).own:
        if not find_named(analysis, name).uniform:
            raise InputError(f"--align {name}: layers share the divisor of their family; name the family", name="align")


def list_layers_inside(family: Family, settings: Settings) -> list[int]:
    """The layers of ``family`` that ``--layers`` lets be cut.

    A family without layers, as the residual width, is inside only if all layers are.
    """
    only = settings.only_layers
    if only is None:
        return list(range(len(family.groups)))
    return [i for i, block in enumerate(number_blocks(family)) if is_layered(family) and block in only]


def number_blocks(family: Family) -> list[int]:
    """Each layer's block: the first number that tells their modules apart, as 7 of ``layers.7.mlp``; else 0, 1, …"""
    columns = zip(*(group.layer.split(".") for group in family.groups), strict=False)
    differing = next((words for words in columns if len(set(words)) > 1), ())
    if len(set(differing)) == len(family.groups) and all(word.isdecimal() for word in differing):
        return [int(word) for word in differing]
    return list(range(len(family.groups)))


def _check(analysis: Analysis, inside: Mapping[str, Sequence[int]], settings: Settings) -> None:
    s = settings
    check_aligned(analysis, s)
    there = {block for f in analysis.families if is_layered(f) for block in number_blocks(f)}
    if missing := (s.only_layers or frozenset()) - there:
        known = f"0 to {max(there)}" if there else "none"
        raise InputError(f"--layers {s.layers}: there is no layer {min(missing)}; the model has {known}", name="layers")
    for name in (*s.families, *s.widths):
        variable = find_named(analysis, name)
        family = variable.family.name
        if s.only_layers is not None and not set(variable.layers) & set(inside[family]):
            raise InputError(f"{name} is outside of --layers {s.layers}; leave out one of both", name=name)
        if family in s.keep:
            raise InputError(f"{name} is to be cut, and {family} is in --keep; leave it out of one of them", name=name)


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
            raise DataError(
                f"the samples of --data do not run {name}; give data that it reads, or other --families", name=name
            )
        legals = [f for f in inside if len(legal.ladders.get(f, ())) > 1]
        channels = [f for f in legals if analysis.family(f).kind == "channels"]
        layered = [f for f in channels if is_layered(analysis.family(f))]
        if not (cut := _keep_independent(layered, legal) or _keep_independent(channels, legal)):
            raise AnalysisError(
                f"no family of {name} has another legal width; see mptk analyze, or use --target graph", name=name
            )
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
