"""recipe: a run as a YAML file of the command line's options. ``mptk prune --config run.yaml`` repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from mptk.config.joined import Settings
from mptk.config.setting import Asked, Record, find_idle, find_settings
from mptk.errors import FileError
from mptk.files import write_text
from mptk.reading import read_text

RECIPE_FILE = "run.yaml"

LARGEST_RECIPE = 1 << 20
"""Largest recipe that is read, in bytes."""


def list_refused(kind: type[Record]) -> set[str]:
    """Options that a recipe may not set, because others write recipes: what is replaced, and whose code runs."""
    return {each.name_option() for each in kind.declared if each.setting.recipe == "refused"}


def is_below_current(place: str) -> bool:
    """Whether a path leads into the current folder, links followed: a recipe, which others write, may name no other."""
    here, there = Path.cwd().resolve(), Path(place).resolve()
    return not Path(place).is_absolute() and there != here and there.is_relative_to(here)


def build_recipe(model: str, settings: Settings, command: str = "prune") -> dict[str, object]:
    """Option → value of a command's run, without options that are None or that a recipe may not set."""
    found: dict[str, object] = {"model": model, **collect_recorded(settings, command)}
    # The one setting that has two options, which name its phase.
    if settings.max_ms is not None and command == "prune":
        found[f"max_{settings.objective}_ms"] = settings.max_ms
    return found


def collect_recorded(record: Record, command: str) -> dict[str, object]:
    """Option → value of a record's settings that a command's recipe keeps."""
    found = {}
    for name, each in find_settings(type(record), command).items():
        value = each.of(record)
        if each.setting.recipe == "written" and value is not None:
            # In plain YAML, and a size as it is typed, with a unit.
            plain = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            found[name] = f"{plain}B" if each.setting.form == "size" else plain
    return found


def write_recipe(
    folder: Path,
    source: str,
    settings: Settings,
    start: Path | None = None,
    changes: Mapping[str, object] | None = None,
) -> None:
    """Write the ``run.yaml`` of a run on the model ``source``, or of a recovery of the folder ``start``.

    ``changes``: option → value in place of the settings' one; None: without the option.
    """
    from mptk.io import resolve_model_name  # it imports torch, and a wrong recipe is refused without it

    model = resolve_model_name(source)
    command = "prune" if start is None else "recover"
    values = {**build_recipe(model, settings, command), **(changes or {})}
    values = {name: value for name, value in values.items() if value is not None}
    if start is not None:
        values = {"folder": str(start.resolve()), **values}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(folder / RECIPE_FILE, f"# mptk {command} --config {RECIPE_FILE} --out FOLDER\n{text}")


def format_command(model: str, settings: Settings, widths: Mapping[str, int]) -> str:
    """The command that prunes ``model`` to ``widths`` with the settings of a search.

    Options at their default, and options that would do nothing, are left out.
    """
    # The command cuts, so it compares no divisions and writes graphs, which a comparison does not.
    own = replace(settings.with_widths(widths), onnx=True)
    plain, skipped = build_recipe(model, Settings()), {"model", *find_idle("prune", Asked(own, learns=own.steps > 0))}
    found = ["mptk", "prune", model]
    for name, value in build_recipe(model, own).items():
        if name not in skipped and value != plain.get(name):
            found += _format_option(f"--{name.replace('_', '-')}", value)
    # No recipe has it, but this command is printed for the caller who said it.
    found += ["--trust-remote-code"] if settings.trust_remote_code else []
    return shlex.join([*found, "--out", f"{Path(model).stem}-pruned"])


def _format_option(flag: str, value: object) -> list[str]:
    """An option as the user types it."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [word for name, each in value.items() for word in (flag, f"{name}={each}")]
    return [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]


class _Recipe(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader of plain values. It refuses aliases (``*name``), which could expand to more than memory holds."""

    def compose_node(self, parent: object, index: object) -> object:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a YAML alias, which a recipe may not have")
        return super().compose_node(parent, index)


def read_recipe(path: Path) -> dict[str, object]:
    """Option → value of a recipe file; names may have ``-`` or ``_``.

    Raises:
        MptkError: the file cannot be read, or is not a mapping.
    """
    text = read_text(
        path, lambda why: FileError(f"cannot read {path}: {why}; check its name", name=path), LARGEST_RECIPE
    )
    try:
        content = yaml.load(text, Loader=_Recipe)  # it is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise FileError(
            f"{path} is not YAML: {' '.join(str(error).split())}; write lines as 'sparsity: 0.3'", name=path
        ) from error
    except RecursionError as error:  # PyYAML calls itself once for each level
        raise FileError(f"{path} is nested too deep; write lines as 'sparsity: 0.3'", name=path) from error
    if not isinstance(content, dict):
        raise FileError(f"{path} does not list options; write lines as 'sparsity: 0.3'", name=path)
    return {str(name).replace("-", "_"): value for name, value in content.items()}
