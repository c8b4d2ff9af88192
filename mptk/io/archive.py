"""archive: read a torch.export archive of unknown origin such that nothing in it can run.

``torch.export.load`` unpickles, evaluates expressions and compiles names as Python. So it gets another archive, made of
the parts that are data, each checked: plain tensors, names that are words, arithmetic, and operators. What mptk itself
never writes is refused: nobody needs to know whether it is dangerous.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import ExportedProgram

from mptk.compat.torch import hide_exporter_logs
from mptk.errors import take_first_line
from mptk.files import format_json
from mptk.io.untrusted import MOST_JSON
from mptk.reading import Damaged, make_damage_error, parse_json, read_bytes, shorten_text

MOST_ARCHIVE_BYTES = 1 << 31
"""Bytes of the largest archive: it holds a graph and constants, and no weights."""
EXTRA = "program.json"
MODEL, EXAMPLE_INPUTS = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
# Parts whose bytes are data: versions, and the numbers of tensors.
RAW = re.compile(r"archive_format|archive_version|byteorder|\.data/\w+|data/(weights/weight|constants/tensor)_\d+")
DOTTED_NAME = re.compile(r"[\w.]*")
# What a call may be of. ``aten.from_file`` would read any file of the machine.
OPERATOR = re.compile(
    r"torch\.ops\.(?!aten\.from_file)\w+\.\w+\.\w+|_operator\.\w+|torch\._?sym_\w+|torch\._functorch\.predispatch\.\w+"
    r"|math\.(trunc|ceil|floor)"
)
NUMBER_OR_SYMBOL = re.compile(r"[a-z]+\d+|-?\d+(\.\d+)?(e[+-]?\d+)?")
# What ``sympy.srepr`` of a size, or of a condition on sizes, consists of. torch evaluates such text as Python.
FUNCTIONS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv"),
    *("CeilDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow", "ToFloat", "TruncToInt"),
    *("TruncToFloat", "CeilToInt", "FloorToInt", "RoundToInt", "Identity", "ModularIndexing", "Where", "floor"),
    *("ceiling", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And"),
    *("Or", "Not", "Abs", "Piecewise", "ExprCondPair", "ITE", "OpaqueUnaryFn_sqrt"),
    *("BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "BitwiseFn_bitwise_xor"),
}
# Largest exponent that is a number, and largest base of an exponent with sizes. sympy computes powers at once, and a
# tower of large ones would fill the memory.
HIGHEST_POWER, HIGHEST_BASE = 8, 10
# Types of containers in inputs and outputs: others are classes that would be imported.
NESTED = {"builtins.tuple", "builtins.list", "builtins.dict", None}
# Letters of the longest expression.
LONGEST_EXPRESSION = 10_000


def read_archive(file: Path) -> tuple[ExportedProgram, str]:
    """The program of an archive, and the text that mptk put beside it (``EXTRA``).

    Raises:
        MptkError: the file is missing, is not such an archive, or holds what could run code: a pickle, Python, calls
            of anything but operators.
    """
    said, extra = make_damage_error(file), {EXTRA: ""}
    archive = _rebuild_checked(io.BytesIO(read_bytes(file, said, MOST_ARCHIVE_BYTES)), said)
    try:
        with hide_exporter_logs("torch.export"):
            program = torch.export.load(archive, extra_files=extra)
    except Exception as error:  # torch's reader has no base class of errors
        raise said(f"torch.export cannot load it ({take_first_line(error)})") from error
    return program, extra[EXTRA]


def _rebuild_checked(file: io.BytesIO, said: Damaged) -> io.BytesIO:
    """A new archive of the checked parts of ``file``."""
    found = io.BytesIO()
    try:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(found, "w") as new:
            for info in old.infolist():
                # torch stores without compression. So nothing unpacks to more than the file's own size.
                if info.compress_type != zipfile.ZIP_STORED:
                    raise said(f"{info.filename[:80]} is compressed")
                name = info.filename.partition("/")[2]
                new.writestr(f"model/{name}", _check_part(name, old.read(info), said))
    except (zipfile.BadZipFile, ValueError, RuntimeError, OSError, EOFError) as error:  # what zipfile raises
        raise said(take_first_line(error)) from error
    found.seek(0)
    return found


def _check_part(name: str, content: bytes, said: Damaged) -> bytes | str:
    """Check a part of the old archive; returns its content in the new one."""
    if RAW.fullmatch(name):
        return content
    if name == EXAMPLE_INPUTS:  # a pickle
        return b""
    if name not in (MODEL, f"extra/{EXTRA}", *CONFIGS):
        raise said(f"it holds {name[:80]}, which mptk never writes")
    if len(content) > MOST_JSON:
        raise said(f"{name} has {len(content) >> 20} MB")
    text = content.decode("utf-8", "replace")
    if name == f"extra/{EXTRA}":
        return text
    values = parse_json(text, said)
    if not isinstance(values, dict):
        raise said(f"{name} is not an object")
    if name == MODEL:
        values["guards_code"] = []  # Python, which loading would compile
    _check(values, "", said)
    return format_json(values)


def _check(value: object, key: str, said: Damaged) -> None:
    """Raise ``said`` for text under ``key`` that torch could run."""
    if isinstance(value, dict):
        # ``as_custom_obj`` is an object of a class that a library registers: torch unpickles it.
        if wrong := next((name for name in value if not DOTTED_NAME.fullmatch(name) or name == "as_custom_obj"), None):
            raise said(f"{shorten_text(repr(wrong))} is not a name")
        if value.get("use_pickle"):
            raise said("it holds a pickle, which can run code")
        for name, each in value.items():
            _check(each, name, said)
    elif isinstance(value, list):
        for each in value:
            _check(each, key, said)
    elif isinstance(value, str) and not ALLOWED.get(key, DOTTED_NAME.fullmatch)(value):
        raise said(f"{key} is {shorten_text(repr(value))}, which mptk never writes")


def is_size_expression(text: str) -> bool:
    """Whether an expression, as ``sympy.srepr`` writes it, is of symbols, numbers and functions of sizes."""
    try:
        return len(text) < LONGEST_EXPRESSION and _is_arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _is_arithmetic(node.operand)
    if isinstance(node, ast.Name):
        return node.id in ("true", "false")
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) or (
            isinstance(node.value, str) and NUMBER_OR_SYMBOL.fullmatch(node.value) is not None
        )
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    # x ** 2 and 2 ** x are sizes of models; x ** x and 9 ** 9 ** 9 are not.
    if "Pow" in node.func.id and not (
        len(given) == 2 and (_is_small(given[1]) or (_is_small(given[0], HIGHEST_BASE) and _is_linear(given[1])))
    ):
        return False
    return all(map(_is_arithmetic, given))


def _is_small(number: ast.expr, most: int = HIGHEST_POWER) -> bool:
    """Whether this is a number of at most ``most``: Integer(2), Float('0.5', precision=53), Rational(1, 2)."""
    if not isinstance(number, ast.Call) or not isinstance(number.func, ast.Name):
        return False
    if number.func.id not in ("Integer", "Float", "Rational"):
        return False
    numbers = [float(ast.literal_eval(part)) for part in number.args]
    return max(map(abs, numbers), default=most + 1) <= most


def _is_linear(power: ast.expr) -> bool:
    """Whether an exponent grows no faster than sizes do: a symbol, or a sum of symbols, each times a small number."""
    if not isinstance(power, ast.Call) or not isinstance(power.func, ast.Name):
        return False
    if power.func.id == "Add":
        return all(map(_is_linear, power.args))
    if power.func.id == "Mul":
        return len(power.args) == 2 and _is_small(power.args[0]) and _is_linear(power.args[1])
    return power.func.id == "Symbol" or _is_small(power, 1000)


def _has_plain_nesting(text: str) -> bool:
    """Whether the nesting of inputs or outputs is of tuples, lists and dicts."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    # At every depth, so in the text. A "type" in a string would have escaped quotes, and not match.
    types = re.findall(r'"type": *("[^"]*"|null)', text)
    return isinstance(values, list) and all(json.loads(each) in NESTED for each in types)


# Floats that JSON lacks, which torch writes as text.
NOT_FINITE = {"Infinity", "-Infinity", "NaN"}
# Key → whether its text is data. All other text must be a word.
ALLOWED: dict[str, Callable[[str], object]] = {
    # Arguments of operators that are text, such as a mode: they are passed on as they are.
    "as_string": lambda _: True,
    "as_strings": lambda _: True,
    "as_float": NOT_FINITE.__contains__,
    "as_floats": NOT_FINITE.__contains__,
    "expr_str": is_size_expression,
    "target": OPERATOR.fullmatch,
    "as_operator": OPERATOR.fullmatch,
    "torch_version": re.compile(r"[\w.+]*").fullmatch,
    "in_spec": _has_plain_nesting,
    "out_spec": _has_plain_nesting,
}
"""Key → whether its text is data. Other text must be a word."""
