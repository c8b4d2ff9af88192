"""Seeded damage to the content of a file: to its bytes, its lines, or its JSON values."""

from __future__ import annotations

import json
import random
from typing import Any

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1e308,
    0.1,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "\x1b[31m",
    [],
    {},
    [[]],
    {"a": 1},
)
PIECES = (
    b"",
    b"\x00",
    b"\xff",
    b"\xff" * 8,
    b"\x00" * 8,
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b"\n",
    b"NaN",
    b"Infinity",
    b"-",
    b"e9999",
    b"9" * 400,
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"*a",
    b"&a",
    b"{" * 3000,
    b"[" * 3000,
)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Other content, by one to four changes."""
    for _ in range(rng.randint(1, 4)):
        content = rng.choice(CHANGES)(content, rng)
    return content


def flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\x01"
    at = rng.randrange(min(len(content), rng.choice((16, 200, 1 << 40))))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def drop(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.randint(1, 40) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(PIECES) * rng.choice((1, 1, 1, 7)) + content[at + rng.choice((0, 1, 8)) :]


def double(content: bytes, rng: random.Random) -> bytes:
    return content[:100_000] * rng.randint(2, 5)


def value(content: bytes, rng: random.Random) -> bytes:
    """Another value, a missing or a new name somewhere in the JSON of a file, or of one of its lines."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        try:
            whole = json.loads(lines[at])
        except (ValueError, RecursionError):
            return flip(content, rng)
        return b"\n".join([*lines[:at], dumped(changed(whole, rng)), *lines[at + 1 :]])
    return dumped(changed(whole, rng))


def dumped(content: object) -> bytes:
    try:
        return json.dumps(content).encode()
    except (ValueError, RecursionError):
        return b"{}"


def changed(content: Any, rng: random.Random) -> Any:
    if isinstance(content, dict | list) and content and rng.random() < 0.85:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(keys)
        if rng.random() < 0.15:
            del content[key]
        else:
            content[key] = changed(content[key], rng)
        return content
    if isinstance(content, dict) and rng.random() < 0.2:
        return {**content, rng.choice(("", "x", "format")): rng.choice(VALUES)}
    if isinstance(content, int) and rng.random() < 0.3:
        return content * rng.choice((-1, 2, 1000, 10**9)) + rng.choice((0, 1))
    return rng.choice(VALUES)


CHANGES = (flip, flip, cut, drop, insert, double, value, value, value)
