"""Every sentence that the product can raise, as ``tests/messages.txt`` has it: ``python -m tests.messages`` writes it.

They are found in the source: the text of each ``raise``, and the reasons that other sentences hold as a part. ``{…}`` is
an expression whose value goes in there; the texts that a name in it may have stand below the sentence.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "messages.txt"
HEADER = """\
# Every sentence that mptk can raise, file by file: its class and its words. A reviewer reads what a change does to them.
# {…} is an expression whose value goes in there. Below a sentence, at "name =", are the texts that it may be, and with
# "…name:" a reason that other sentences hold. `make messages` writes this file.
"""
REASONS = re.compile(
    r"explain|refus|_fault|_wrong|disturbance|not_alone|_bound_error|_describe_memory|why_not|describe_levers"
)
"""Names of functions that return a reason, or a whole sentence, for others to raise."""
OTHERS = {"reword": "(as it was caught)", "_print_error": "(printed)"}
"""Functions that take a sentence → what stands in the place of its class."""
Scope = ast.FunctionDef | ast.Module


@dataclass(frozen=True)
class Sentence:
    """``kind``: the class that is raised; empty for a reason. ``parts``: a name in it → the texts that it may have."""

    path: str
    kind: str
    text: str
    parts: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        below = [f"    {name} = {text}" for name, texts in self.parts.items() for text in texts]
        return "\n".join([f"{self.kind}: {self.text}", *below])


def find_sentences() -> list[Sentence]:
    """All sentences, by module and in its order."""
    return [each for path in list_product_files() for each in _Reader(path).read()]


def list_product_files() -> list[Path]:
    """The files of the product."""
    return sorted(file for folder in ("mptk", "passes") for file in (ROOT / folder).rglob("*.py"))


@cache
def list_error_classes() -> frozenset[str]:
    """The names of MptkError and of all classes under it, and of the command line's own for a wrong option."""
    found = {"MptkError", "BadParameter"}
    below = [c for file in list_product_files() for c in ast.walk(_parse(file)) if isinstance(c, ast.ClassDef)]
    while more := {c.name for c in below if {ast.unparse(base) for base in c.bases} & found} - found:
        found |= more
    return frozenset(found)


def write_golden(sentences: Sequence[Sentence]) -> str:
    """The content of the file."""
    lines = [HEADER]
    for path in dict.fromkeys(each.path for each in sentences):
        lines += [f"\n## {path}", *(str(each) for each in sentences if each.path == path)]
    return "\n".join(lines) + "\n"


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def _list_constants() -> Mapping[str, str]:
    """Texts that modules name in capitals → their words. One with two meanings stays a name."""
    found = dict[str, set[str]]()
    for file in list_product_files():
        for node in _parse(file).body:
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name) and target.id.isupper():
                found.setdefault(target.id, set()).add(_write(node.value, {}) if _has_words(node.value) else "")
    return {name: next(iter(texts)) for name, texts in found.items() if len(texts) == 1 and "" not in texts}


class _Reader(ast.NodeVisitor):
    def __init__(self, file: Path) -> None:
        self.path, self.tree = file.relative_to(ROOT).as_posix(), _parse(file)
        self.scopes: list[Scope] = [self.tree]
        self.found: list[Sentence] = []

    def read(self) -> list[Sentence]:
        self.visit(self.tree)
        return self.found

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scopes.append(node)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Call(self, node: ast.Call) -> None:
        kind = ast.unparse(node.func).rpartition(".")[2]
        if not node.args:
            pass
        elif kind in list_error_classes():
            self._add(kind, node.args[0])
        elif kind in OTHERS:
            self._add(OTHERS[kind], node.args[0])
        elif kind == "append" and _has_words(node.args[0]):
            inside = self.scopes[-1]
            if isinstance(inside, ast.FunctionDef) and REASONS.search(inside.name):
                self._add(f"…{inside.name}", node.args[0])
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        # ``raise damaged("it is empty")``: whoever calls gives the sentence around the reason.
        call = node.exc
        if isinstance(call, ast.Call) and call.args and _has_words(call.args[0]):
            kind = ast.unparse(call.func)
            if kind in ("ValueError", "KeyError") or (kind.islower() and kind.isidentifier()):
                self._add(f"…{kind}", call.args[0])
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        inside = self.scopes[-1]
        if isinstance(inside, ast.FunctionDef) and REASONS.search(inside.name) and node.value is not None:
            for text in _list_texts(node.value):
                self._add(f"…{inside.name}", text)
            for leaf in ast.walk(node.value) if isinstance(node.value, ast.Name | ast.IfExp) else ():
                if isinstance(leaf, ast.Name):
                    for words in self._find_texts(leaf.id, leaf.lineno):
                        self.found.append(Sentence(self.path, f"…{inside.name}", words, {}))
        self.generic_visit(node)

    def _add(self, kind: str, value: ast.expr) -> None:
        texts = dict[str, list[str]]()
        for name in dict.fromkeys(n.id for n in ast.walk(value) if isinstance(n, ast.Name)):
            if found := list(dict.fromkeys(self._find_texts(name, value.lineno))):
                texts[name] = found
        self.found.append(Sentence(self.path, kind, _write(value), texts))

    def _find_texts(self, name: str, line: int) -> Iterator[str]:
        """The texts that a function gives to a name above a line, or that a table of the module has."""
        for node in self.tree.body if name.isupper() or name.startswith("_") else ():
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Dict)
                and ast.unparse(node.targets[0]) == name
            ):
                yield from (_write(text) for value in node.value.values for text in _list_texts(value))
        for node in ast.walk(self.scopes[-1]) if len(self.scopes) > 1 else ():
            if isinstance(node, ast.Assign | ast.AugAssign | ast.NamedExpr) and node.lineno <= line:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        yield from (_write(text) for text in _list_texts(node.value))
                    elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        for one, value in zip(target.elts, node.value.elts, strict=True):
                            if isinstance(one, ast.Name) and one.id == name:
                                yield from (_write(text) for text in _list_texts(value))


def _list_texts(value: ast.expr) -> Iterator[ast.expr]:
    """The texts that an expression may have; none if it is no text with words."""
    if isinstance(value, ast.IfExp):
        for each in (value.body, value.orelse):
            yield from _list_texts(each)
    elif isinstance(value, ast.BoolOp):
        for each in value.values:
            yield from _list_texts(each)
    elif isinstance(value, ast.Call) and ast.unparse(value.func) in list_error_classes():
        return  # it is listed as what it is
    elif _has_words(value) or (isinstance(value, ast.Call) and any(map(_has_words, value.args))):
        yield value


def _has_words(value: ast.expr) -> bool:
    """Whether an expression is a text with a space between two words, or one with values in it."""
    if isinstance(value, ast.BinOp):
        return isinstance(value.op, ast.Add) and (_has_words(value.left) or _has_words(value.right))
    parts = value.values if isinstance(value, ast.JoinedStr) else [value]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return any(re.search(r"[a-z] | [a-z]", text) for text in texts)


def _write(value: ast.expr, constants: Mapping[str, str] | None = None) -> str:
    """A text with ``{expression}`` where a value goes in. ``constants``: by default those of all modules."""
    inner = partial(_write, constants=constants)
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value.replace("\n", "\\n")
    if isinstance(value, ast.JoinedStr):
        return "".join(map(inner, value.values))
    if isinstance(value, ast.BinOp) and _has_words(value):
        return inner(value.left) + inner(value.right)
    if isinstance(value, ast.FormattedValue):
        if value.conversion == -1 and value.format_spec is None:
            return inner(value.value)
        shown = f"!{chr(value.conversion)}" if value.conversion != -1 else ""
        form = "" if value.format_spec is None else f":{inner(value.format_spec)}"
        return f"{{{ast.unparse(value.value)}{shown}{form}}}"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "strip":
        return inner(value.func.value)
    if isinstance(value, ast.Name):
        known = _list_constants() if constants is None and value.id.lstrip("_").isupper() else constants or {}
        return known.get(value.id, f"{{{value.id}}}")
    return f"{{{ast.unparse(value)}}}"


if __name__ == "__main__":
    FILE.write_text(write_golden(find_sentences()))
