"""parse: typed words that hold several values: lists, widths and sizes."""

from __future__ import annotations

import re

from mptk.errors import MptkError

_BASES = {"B": 1000, "iB": 1024}


def parse_names(text: str) -> tuple[str, ...]:
    """``heads,ffn`` → ("heads", "ffn")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_width(text: str) -> tuple[str, int]:
    """``ffn=1024`` → ("ffn", 1024)."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[0-9]{1,9}", value) or not int(value) or not name.strip():
        raise MptkError(f"--width {text}: write FAMILY=UNITS, as ffn=1024")
    return name.strip(), int(value)


_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base**power for power, prefix in enumerate("KMGT", 1) for unit, base in _BASES.items()
}


def parse_size(text: str | None) -> int | None:
    """``8GB`` → 8,000,000,000 bytes; ``8GiB`` → 8 · 2³⁰."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) *([KMGT]?I?B)", text.strip(), re.I | re.ASCII)
    unit = {known.upper(): size for known, size in _UNITS.items()}.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if not size:
        raise MptkError(f"{shorten_typed(text)!r} is not a size; write a number and KB, MB, GB or GiB, as 8GB")
    return size


def parse_share(text: str, option: str = "") -> float:
    """``30%`` or ``0.3`` → 0.3. ``option``: its name, for the error."""
    found = re.fullmatch(r"([0-9]{0,15}\.?[0-9]{1,15}(?:e-?[0-9]{1,2})?) *(%?)", text.strip(), re.ASCII)
    if found is None:
        raise MptkError(f"{option} {shorten_typed(text)}: write a share, as 0.3 or 30%".strip())
    return float(found[1]) / 100 if found[2] else float(found[1])


def shorten_typed(text: str) -> str:
    """A typed value as an error repeats it."""
    return text if len(text) <= 40 else f"{text[:40]}…"


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """``128,512`` → (128, 512). Raises MptkError if a number is below 1; ``option`` is its name."""
    counts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,7}", count.strip()) and int(count) for count in counts):
        raise MptkError(f"{option} {shorten_typed(text)}: write numbers of at least 1 and at most 9999999, as 128,512")
    if len({*map(int, counts)}) < len(counts):
        raise MptkError(f"{option} {shorten_typed(text)}: a number is repeated; give each once")
    return tuple(map(int, counts))
