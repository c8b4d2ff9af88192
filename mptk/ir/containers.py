"""containers: the dicts, lists, named tuples and dataclasses in which ``forward`` returns its tensors.

A graph returns tensors in a row. A template puts them back. It is a tree of plain data that a file holds as JSON.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mptk.compat.torch import list_field_names
from mptk.errors import TraceError

TENSOR, CONSTANT = "tensor", "constant"
CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Container:
    """A place in a tree of outputs.

    Attributes:
        kind: ``tensor``, ``constant``, ``tuple``, ``list``, ``dict``, ``namedtuple`` or ``dataclass``.
        parts: its parts, in order.
        keys: of a dict, or names of fields.
        name: the class's, of a named tuple or a dataclass.
        value: of a constant.
        made: the class itself; None if the template was read from a file.
    """

    kind: str
    parts: tuple[Container, ...] = ()
    keys: tuple[str | int, ...] = ()
    name: str = ""
    value: bool | int | float | str | None = None
    made: type | None = dataclasses.field(default=None, compare=False, repr=False)

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The outputs with ``tensors`` in their places."""
        left = iter(tensors)
        return self._build(lambda: next(left))

    def _build(self, next_tensor: Callable[[], Tensor]) -> Any:
        # Parts are built in their order, which is the order in which ``_build_template`` took the tensors out.
        if self.kind == TENSOR:
            return next_tensor()
        if self.kind == CONSTANT:
            return self.value
        parts = [part._build(next_tensor) for part in self.parts]
        if self.kind == "tuple":
            return tuple(parts)
        if self.kind == "list":
            return parts
        named = dict(zip(self.keys, parts, strict=True))
        if self.kind == "dict":
            return named if self.made is None else self.made(named)
        return self._own_class()(**{str(key): part for key, part in named.items()})

    def _own_class(self) -> Callable[..., Any]:
        """The class that ``forward`` returned; if it is only known from a file, one with the same name and fields."""
        if self.made is not None:
            return self.made
        fields = [str(key) for key in self.keys]
        if self.kind == "namedtuple":
            return collections.namedtuple(self.name, fields)
        return dataclasses.make_dataclass(self.name, fields)

    def to_json(self) -> Any:
        """As plain data."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.kind == CONSTANT:
            return {**found, "value": self.value}
        if self.keys or self.name:
            found |= {"keys": list(self.keys), "name": self.name}
        return {**found, "parts": [part.to_json() for part in self.parts]} if self.kind != TENSOR else found

    @staticmethod
    def from_json(data: Any, depth: int = 0) -> Container:
        """Raises ValueError for what ``to_json`` does not write."""
        if not isinstance(data, Mapping) or depth > DEEPEST:
            raise ValueError("it tells of outputs in no known form")
        # The file may be anyone's: names become those of classes, so they must be identifiers.
        kind, keys, name = data.get("kind"), data.get("keys", []), data.get("name", "")
        value, parts = data.get("value"), data.get("parts", [])
        known = kind in (TENSOR, CONSTANT, "tuple", "list", "dict", "namedtuple", "dataclass")
        named = kind not in ("namedtuple", "dataclass") or all(str(word).isidentifier() for word in (name, *keys))
        if not known or not named or not isinstance(value, CONSTANTS) or not isinstance(keys, list):
            raise ValueError(f"it tells of outputs of kind {str(kind)[:40]!r}")
        if kind in ("dict", "namedtuple", "dataclass") and len(keys) != len(parts):
            raise ValueError("it tells of outputs with other names than parts")
        return Container(
            str(kind), tuple(Container.from_json(p, depth + 1) for p in parts), tuple(keys), str(name), value
        )


DEEPEST = 32
"""How deep outputs may be nested in a file, so that reading a hostile one does not exhaust Python's stack."""


def take_apart(output: object) -> tuple[list[Tensor], Container]:
    """The tensors of what ``forward`` returned, in order, and the template that puts them back.

    Raises:
        MptkError: it holds an object that is neither a tensor, a plain value nor one of the known containers.
    """
    tensors = list[Tensor]()
    return tensors, _build_template(output, tensors)


def _build_template(output: object, tensors: list[Tensor]) -> Container:
    if isinstance(output, Tensor):
        tensors.append(output)
        return Container(TENSOR)
    kind = type(output)
    # A named tuple is a tuple, and transformers' outputs are both mappings and dataclasses: the order decides.
    if isinstance(output, CONSTANTS):
        return Container(CONSTANT, value=output)
    if isinstance(output, tuple) and (fields := list_field_names(output)) is not None:
        parts = tuple(_build_template(part, tensors) for part in output)
        return Container("namedtuple", parts, fields, kind.__name__, made=kind)
    if isinstance(output, tuple | list):
        name = "tuple" if isinstance(output, tuple) else "list"
        return Container(name, tuple(_build_template(part, tensors) for part in output))
    if isinstance(output, Mapping):
        if not all(isinstance(key, str | int) for key in output):
            raise TraceError(
                "forward returns a dict whose keys are neither text nor numbers; return it with text as keys"
            )
        parts = tuple(_build_template(part, tensors) for part in output.values())
        return Container("dict", parts, tuple(output), made=None if kind is dict else kind)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        # Fields without ``init`` are made by the class itself, so ``build`` could not pass them.
        names = [field.name for field in dataclasses.fields(output) if field.init]
        parts = tuple(_build_template(getattr(output, name), tensors) for name in names)
        return Container("dataclass", parts, tuple(names), kind.__name__, made=kind)
    if isinstance(output, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise TraceError("forward returns a size as a number, which a graph holds as one value; return tensors")
    raise TraceError(
        f"forward returns a {kind.__name__}, which a graph cannot give back; return tensors, in dicts, lists, tuples, "
        "named tuples or dataclasses",
        name=kind.__name__,
    )
