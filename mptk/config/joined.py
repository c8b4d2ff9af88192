"""joined: ``Settings``, the core's settings and those of the installed features in one record."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from mptk.config.setting import record
from mptk.config.settings import CoreSettings
from mptk.errors import PackageError
from mptk.plugins import list_features


def join_settings() -> type[CoreSettings]:
    """A class with all settings. Features extend ``CoreSettings``, so theirs have its fields and properties, too.

    Raises:
        MptkError: a feature has a setting that the core or another feature has.
    """
    owners = dict.fromkeys((each.name for each in fields(CoreSettings)), "mptk itself")
    kinds = []
    for feature in list_features().values():
        if feature.settings is None:
            continue
        own = [each.name for each in fields(feature.settings) if each.name in feature.settings.__annotations__]
        for name in own:
            if name in owners:
                raise PackageError(
                    f"the feature {feature.name} has a setting {name}, as {owners[name]} has; remove one",
                    name=feature.name,
                )
            owners[name] = f"the feature {feature.name}"
        kinds.append(feature.settings)
    made = type("Settings", (*kinds, CoreSettings), {"__doc__": CoreSettings.__doc__, "__module__": __name__})
    return record(dataclass(frozen=True)(made))


if TYPE_CHECKING:

    class Settings(CoreSettings):
        """The core's settings. Those of a feature are read through its own class: ``KvHeadsSettings.of(settings)``."""

else:
    Settings = join_settings()
