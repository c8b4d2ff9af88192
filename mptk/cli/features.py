"""features: the command that lists the installed features, whose they are, and what they bring."""

from __future__ import annotations

import inspect
from typing import Any

from rich.table import Table
from rich.text import Text

from mptk.cli.app import COMMANDS, EXTENSIONS, list_further_parameters, register_command, show_result
from mptk.cli.console import out
from mptk.cli.options import JsonOption
from mptk.config import Settings
from mptk.plugins import Feature, list_absent_features, list_features, name_owner

FEATURES_FORMAT = "mptk-features/1"
LISTED_PARTS = ("loaders", "tasks", "inputs", "targets", "methods", "conversions", "stages", "rows")
"""Fields of a feature that are listed by the names of what they hold."""


@register_command("features", examples=("features", "features --json -"))
def show_features(json_file: JsonOption = None) -> None:
    """List the installed features: whose they are, and which commands and options they bring."""
    found, absent = [describe_feature(feature) for feature in list_features().values()], list_absent_features()
    table = Table("feature", "of", "what it does", "commands and options")
    for each in found:
        words = each["name"], each["of"], each["summary"], ", ".join([*each["commands"], *each["options"]])
        table.add_row(*map(Text, words))
    show_result(json_file, {"format": FEATURES_FORMAT, "features": found, "absent": absent}, table)
    if absent and json_file is None:
        out.print(f"not installed: {', '.join(absent)}")


def describe_feature(feature: Feature) -> dict[str, Any]:
    """A feature as JSON."""
    parts = {kind: list(getattr(feature, kind)) for kind in LISTED_PARTS if getattr(feature, kind)}
    return {
        "name": feature.name,
        "of": name_owner(feature.name),
        "summary": feature.summary,
        "page": feature.page,
        "commands": [command.name for command in feature.commands],
        "options": [*list_setting_options(feature), *list_further_options(feature)],
        **parts,
    }


def list_setting_options(feature: Feature) -> list[str]:
    """The options of its settings."""
    own = {} if feature.settings is None else feature.settings.__annotations__
    named = [each.name_option() for each in Settings.declared if each.name in own and each.setting.panel]
    return [f"--{name.replace('_', '-')}" for name in named]


def list_further_options(feature: Feature) -> list[str]:
    """The options that it adds to commands of others, behind the command's name."""
    return [
        f"{command} --{parameter.name.replace('_', '-')}"
        for command, extensions in EXTENSIONS.items()
        for each in extensions
        if each.function.__module__ in feature.options
        for parameter in list_further_parameters(each, inspect.signature(COMMANDS[command].function).parameters)
    ]
