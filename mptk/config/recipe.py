"""recipe: a run as a YAML file of the command line's options. ``mptk prune --config run.yaml`` repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mptk.config.settings import Learning, Settings
from mptk.errors import MptkError
from mptk.files import write_text
from mptk.io.dense import absolute
from mptk.reading import read_text

FILE = "run.yaml"

OPTIONS = {"widths": "width", "multiple": "multiple_of"}
"""Fields of ``Settings`` whose option has another name."""
LARGEST = 1 << 20
"""Bytes of the largest recipe."""
TYPED_ONLY = ("out", "teacher_cache", "overwrite", "trust_remote_code")
"""Options that no file may give, as others write recipes: what is written where, and whose code runs."""
_ELSEWHERE = ("max_ms", "tolerance", "warmup", "clip", "rates", "resume", *TYPED_ONLY)
_BYTES = ("memory", "max_shard_size")
_SEARCH = ("search", "search_shapes", "search_finalists", "search_tokens")
_OF_THE_FOLDER = (
    *("sparsity", "budget", "objective", "threads", "families", "keep", "width", "plan", "portable", "multiple_of"),
    *("max_decode_ms", "max_prefill_ms", "method", "reconstruct", "distil_epochs", "distil_lr", "samples"),
    *("layers", "mask_share", "target", "dtype", "rehome", "vocabulary", "kv_heads", "inputs"),
    *_SEARCH,
)


def recipe(model: str, settings: Settings) -> dict[str, Any]:
    """Option → value of a run, without what is at its default of None.

    Left out are what has no option, and what no file may give.
    """
    found = {"model": model, **_flat(settings)}
    if settings.max_ms is not None:
        found[f"max_{settings.objective}_ms"] = settings.max_ms
    return found | {name: f"{found[name]}B" for name in _BYTES if name in found}


def recovery_recipe(folder: str, model: str, settings: Settings) -> dict[str, Any]:
    """Option → value of a recovery of ``folder``, which decides what is cut."""
    found = {name: value for name, value in recipe(model, settings).items() if name not in _OF_THE_FOLDER}
    return {"folder": folder, **found}


def write_recipe(folder: Path, source: str, settings: Settings, start: Path | None = None) -> None:
    """Write ``run.yaml`` of a run on the model ``source``, or of a recovery of the folder ``start``."""
    model = absolute(source)
    command, values = "prune", recipe(model, settings)
    if start is not None:
        command, values = "recover", recovery_recipe(str(start.resolve()), model, settings)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(folder / FILE, f"# mptk {command} --config {FILE} --out FOLDER\n{text}")


def command(model: str, settings: Settings, widths: Mapping[str, int]) -> str:
    """The command that prunes ``model`` to ``widths`` with the settings of a search.

    What is at its default is left out, and what concerns training alone if the settings name no number of steps.
    """
    learning = settings.learning if settings.learning.steps else Learning()
    own = recipe(model, replace(settings, widths=dict(widths), search=False, onnx=True, learning=learning))
    plain = recipe(model, Settings())
    skipped = {"model", *_SEARCH, *(("sparsity", "budget", "objective") if settings.max_ms is not None else ())}
    found = ["mptk", "prune", model]
    for name, value in own.items():
        if name not in skipped and value != plain.get(name):
            found += _typed(f"--{name.replace('_', '-')}", value)
    found += ["--trust-remote-code"] if settings.trust_remote_code else []
    return shlex.join([*found, "--out", f"{Path(model).stem}-pruned"])


def _typed(flag: str, value: Any) -> list[str]:
    """An option as it is typed."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [word for name, each in value.items() for word in (flag, f"{name}={each}")]
    return [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]


class _Recipe(yaml.SafeLoader):  # type: ignore[misc]
    """Reads plain values. An alias (``*name``) could stand for more than memory holds, and no recipe needs one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which recipes do not have")
        return super().compose_node(parent, index)


def read_recipe(path: Path) -> dict[str, Any]:
    """Option → value of a recipe file; ``-`` and ``_`` in names are the same.

    Raises:
        MptkError: it cannot be read, or is no mapping.
    """
    text = read_text(path, lambda why: MptkError(f"cannot read {path}: {why}; check its name"), LARGEST)
    try:
        content = yaml.load(text, Loader=_Recipe)  # it is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise MptkError(f"{path} is no YAML: {' '.join(str(error).split())}; write lines as 'sparsity: 0.3'") from error
    except RecursionError as error:
        raise MptkError(f"{path} is nested too deep; write lines as 'sparsity: 0.3'") from error
    if not isinstance(content, dict):
        raise MptkError(f"{path} is no list of options; write lines as 'sparsity: 0.3'")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _flat(record: Any) -> dict[str, Any]:
    """The fields of nested dataclasses by their options' names. What an outer one says goes before an inner one."""
    found: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if each.name in _ELSEWHERE or value is None:
            continue
        if is_dataclass(value):
            found = {**_flat(value), **found}
        else:
            found[OPTIONS.get(each.name, each.name)] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
