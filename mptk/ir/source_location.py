"""source_location: the line in the model's source that made a call of the graph, if export recorded it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import fx

from mptk.ir.ops import name_op

_ROOT = Path(__file__).parents[2]
_TRANSFORMERS = find_spec("transformers")
assert _TRANSFORMERS is not None
assert _TRANSFORMERS.origin is not None
_TRANSFORMERS_FOLDER = Path(_TRANSFORMERS.origin).parent  # found without importing transformers, which is slow
LIBRARIES = tuple(
    f"{folder}/" for folder in (Path(torch.__path__[0]), _TRANSFORMERS_FOLDER, _ROOT / "mptk", _ROOT / "passes")
)
"""Folders whose files are not part of a model: layers, dispatch, wrappers for tracing."""
MODELS = f"{_TRANSFORMERS_FOLDER}/models/"


@dataclass(frozen=True)
class SourceLocation:
    """Prints as ``op in module.path, file.py:12``. The text is made only when it is printed."""

    node: fx.Node

    def __str__(self) -> str:
        modules, call = list_module_paths(self.node), self.node.name
        if modules:
            call = f"{name_op(self.node)} in {modules[-1] or 'the model'}"
        line = find_source_line(self.node.meta.get("stack_trace") or "")
        return f"{call}, {line}" if line else call


def list_module_paths(node: fx.Node) -> list[str]:
    """The modules in which a call was made, outermost first, as the user names them; "" is the model itself."""
    modules = (node.meta.get("nn_module_stack") or {}).values()
    return [_SLICED.sub(_remove_slice, path.removeprefix("module").removeprefix(".")) for path, *_ in modules]


_SLICED = re.compile(r"\.slice\((None|\d+), [^()]*\)(?:\.(\d+))?")
"""What export calls a part of a list, ``layers[1:3]``, if two names have the same module."""


def _remove_slice(found: re.Match[str]) -> str:
    first = 0 if found[1] == "None" else int(found[1])
    return "" if found[2] is None else f".{first + int(found[2])}"


def find_source_line(stack_trace: str) -> str:
    """``file.py:12`` of the innermost frame in the model's own files; of the innermost one if all are libraries'."""
    frames = re.findall(r'^\s*File "(.+)", line (\d+)', stack_trace, re.MULTILINE)
    if not frames:
        return ""
    # transformers' models are the user's model, although they are in a library's folder.
    own = [(file, line) for file, line in frames if file.startswith(MODELS) or not file.startswith(LIBRARIES)]
    file, line = (own or frames)[-1]
    return f"{Path(file).name}:{line}"
