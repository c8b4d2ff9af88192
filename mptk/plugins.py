"""plugins: what packages add to mptk, found by their entry points. docs/plugins.md says how to write one.

An entry point names one object (``mptk.criteria``, ``mptk.targets``, …) or a whole ``Feature`` (``mptk.features``).
mptk's own features are found in the same way, so that nothing else in mptk lists them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from pkgutil import resolve_name
from typing import Any, TypeVar

from mptk.errors import InputError, PackageError, list_close_names, suggest_name

Plugin = TypeVar("Plugin")
FEATURES = "mptk.features"
"""The group of entry points that name features."""
OWN = "mptk"
"""The package whose features may be taken away by removing their folder."""


@dataclass(frozen=True)
class Command:
    """A command that a feature adds. Importing ``module`` registers it (``mptk.cli.app.register_command``).

    ``panel``: its panel in ``mptk --help``; ``after``: the command below which it stands there; empty: at the end.
    ``roles``: what it does, of ``mptk.config.cases``: it has the options of all settings for these. ``takes``: further
    settings that are its options.
    """

    name: str
    module: str
    panel: str
    after: str = ""
    roles: Sequence[str] = ()
    takes: Sequence[str] = ()


@dataclass(frozen=True)
class Feature:
    """What a package adds to mptk. Objects are named as entry points name them (``package.module:object``).

    A name is resolved when the object is first used, so that a feature costs nothing at start-up.

    Attributes:
        name: its name, which is also the name of its folder.
        summary: what a user can do with it, in one line.
        page: its page of the documentation.
        settings: further settings: a frozen dataclass that extends ``mptk.config.CoreSettings``. Its fields are
            keywords and options, and its properties may extend those of ``CoreSettings``.
        commands: its commands.
        options: modules that add options to commands (``mptk.cli.app.extend_command``).
        loaders: kinds of files and names that it reads as models (``mptk.io.Loader``).
        tasks: kinds of models (``mptk.protocols.Task``), by name.
        inputs: what models read (``mptk.tasks.inputs.base.Inputs``), by the input's name in ``forward``.
        targets: forms in which a cut model is written (``mptk.protocols.Target``), by name.
        methods: ways to choose what is cut (``mptk.protocols.Method``), by name.
        provers: kinds of files that ``verify`` proves against a folder (``mptk.protocols.Prover``).
        predictors: what predicts the figure of a budget from widths (``mptk.methods.division.budget``), by the budget.
        conversions: changes of a model before the cut (``mptk.protocols.Conversion``), by name.
        stages: further stages of a run (``mptk.protocols.Stage``), by name.
        rows: its rows of ``report.json``, by name: the type that a row is checked against.
        views: what reports show of its rows, by the row's name (``mptk.report.row_view.RowView``).
        subfolders: subfolders of a result with parts of other results, which share files with it; and the command that
            makes a whole folder of one.
    """

    name: str
    summary: str
    page: str = ""
    settings: type[Any] | None = None
    commands: Sequence[Command] = ()
    options: Sequence[str] = ()
    loaders: Sequence[str] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    provers: Sequence[str] = ()
    predictors: Mapping[str, str] = field(default_factory=dict)
    conversions: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, str] = field(default_factory=dict)
    subfolders: Mapping[str, str] = field(default_factory=dict)


# ---- features ----


@functools.cache
def list_features() -> Mapping[str, Feature]:
    """The installed features by name, in the order of their names.

    Raises:
        MptkError: a package's feature cannot be imported.
    """
    found = {}
    for entry in find_entries(FEATURES):
        if not is_absent(entry):
            found[entry.name] = load_entry(entry)
    return dict(sorted(found.items()))


def name_owner(feature: str) -> str:
    """The package that brings a feature, and its version."""
    (owner,) = [entry.dist for entry in find_entries(FEATURES) if entry.name == feature]
    return "" if owner is None else f"{owner.name} {owner.version}"


def list_absent_features() -> list[str]:
    """mptk's features whose folder is not there."""
    return sorted(entry.name for entry in find_entries(FEATURES) if is_absent(entry))


def is_absent(entry: EntryPoint) -> bool:
    """Whether an entry point names a feature of mptk whose folder is not there. Another package's must be there."""
    try:
        import_module(entry.module)
    except ModuleNotFoundError as error:
        gone = error.name is not None and f"{entry.module}.".startswith(f"{error.name}.")
        return gone and entry.dist is not None and entry.dist.name == OWN  # the name is read from a file: asked last
    except ImportError:
        return False  # `load_entry` says what is wrong
    return False


@functools.cache
def load_parts(kind: str) -> Mapping[str, Any]:
    """All objects that features name in a field of ``Feature``, by name; objects without names by ``module:object``.

    Raises:
        MptkError: one cannot be imported, or two features bring one of the same name.
    """
    found, owners = dict[str, Any](), dict[str, str]()
    for feature in list_features().values():
        named = getattr(feature, kind)
        for name, path in (named if isinstance(named, Mapping) else {each: each for each in named}).items():
            # Which one counts may not depend on what else is installed: a recipe would mean something else.
            if (other := owners.setdefault(name, feature.name)) != feature.name:
                raise PackageError(
                    f"the features {other} and {feature.name} both bring {name} ({kind}); remove one", name=feature.name
                )
            found[name] = load_part(feature, path)
    return found


def with_features(own: Mapping[str, Plugin], kind: str) -> dict[str, Plugin]:
    """The objects of one kind (a field of ``Feature``), by name: the core's own and those of all features.

    Raises:
        MptkError: as ``load_parts``; or a feature brings one with the name of the core's.
    """
    parts = load_parts(kind)
    for feature in list_features().values():
        if taken := sorted(own.keys() & {*getattr(feature, kind)}):
            raise PackageError(
                f"the feature {feature.name} brings {taken[0]} ({kind}), which mptk has itself; remove it",
                name=feature.name,
            )
    return {**own, **parts}


def load_part(feature: Feature, path: str) -> Any:
    """The object that a feature names. Raises MptkError if it cannot be imported."""
    try:
        return resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise PackageError(
            f"{path} of the feature {feature.name} does not load: {error}; update or remove it", name=feature.name
        ) from error


def list_part_names(kind: str) -> list[str]:
    """The names in a field of all features, without importing what they name."""
    return [name for feature in list_features().values() for name in getattr(feature, kind)]


def explain_absent() -> str:
    """A hint for what no installed part of mptk knows; empty if all of mptk's features are installed."""
    absent = list_absent_features()
    return f"not installed here are the features {', '.join(absent)}" if absent else ""


# ---- single objects ----


@functools.cache
def load_plugins(group: str) -> Mapping[str, Any]:
    """Name → object of every entry point of ``group`` (``mptk.rules``, ``mptk.criteria``, ``mptk.targets``, …).

    Raises:
        MptkError: a package's entry point cannot be imported.
    """
    return {entry.name: load_entry(entry) for entry in find_entries(group)}


def load_entry(entry: EntryPoint) -> Any:
    """The object that an entry point names. Raises MptkError if it cannot be imported."""
    # A plugin that fails names its package: the user has to repair or remove that, not mptk.
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        package = entry.dist.name if entry.dist else entry.value
        raise PackageError(
            f"the plugin {entry.name} of {package} does not load: {error}; update or remove it", name=package
        ) from error


@functools.cache
def find_entries(group: str) -> Sequence[EntryPoint]:
    """The entry points of a group. A package that is on the path twice counts where it comes first.

    Raises:
        MptkError: two packages bring one of the same name.
    """
    # ``importlib.metadata.entry_points`` parses the files of all packages, which takes three times as long: every
    # command waits for it.
    found = dict[str, EntryPoint]()
    for package in distributions():
        if f"[{group}]" in (package.read_text("entry_points.txt") or ""):
            for entry in package.entry_points.select(group=group):
                first = found.setdefault(entry.name, entry)
                if first is not entry and first.dist is not None and first.dist.name != package.name:
                    names = f"{first.dist.name} and {package.name}"
                    raise PackageError(
                        f"{names} both bring {entry.name} ({group}); remove one of them", name=entry.name
                    )
    return tuple(found.values())


def with_plugins(own: Mapping[str, Plugin], group: str) -> dict[str, Plugin]:
    """mptk's own objects and the plugins of ``group``, by name.

    A plugin cannot replace one of mptk's own: else an installed package would change what a recipe means.
    """
    return {**own, **{name: made for name, made in load_plugins(group).items() if name not in own}}


def find_entry(kind: str, name: str, known: Mapping[str, Plugin]) -> Plugin:
    """The entry of that name. Raises MptkError with the known names."""
    if name not in known:
        absent, meant = explain_absent(), suggest_name(name, known, "")
        raise InputError(
            f"no {kind} {name!r}; {meant and f'{meant} '}choose one of {', '.join(known)}{absent and f' ({absent})'}",
            name=name,
            nearest=list_close_names(name, known, cutoff=0),
        )
    return known[name]
