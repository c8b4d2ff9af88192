"""alignment: the divisors that narrower widths keep, for the kernels that multiply them. Imports no library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mptk.errors import InputError, list_close_names, suggest_name

KERNEL_BLOCK = 32
"""Block of the common 4- and 8-bit quantisers, which pad sums to it; and of the kernels for CPUs."""
HARDWARE: Mapping[str, int] = {"cpu": KERNEL_BLOCK, "a100": 64, "h100": 128, "mps": 64}
"""Hardware → divisor of the lengths of sums (``docs/shapes.md`` has the sources)."""
_PART = re.compile(r"(?:(?P<name>[^\s=,]+)=)?(?P<divisor>[a-z0-9]{1,7})", re.ASCII)


@dataclass(frozen=True)
class Alignment:
    """Which multiples narrower widths keep.

    If the dense sum over a family's units is a multiple of a divisor, the narrower one is, too. If it is not, the
    divisor's half is tried, and so on, down to ``KERNEL_BLOCK``.

    Attributes:
        every: the divisor for all families but ``own``, which have their own.
        blocks: further divisors, of quantisers.
        devices: how many devices share each layer. Each gets the same number of whole units, and its part of a sum is
            a multiple, too.
        engines: the programs that must read the result (``consumers.ENGINES``); empty: as the target chooses.
    """

    every: int = KERNEL_BLOCK
    own: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[int, ...] = ()
    devices: int = 1
    engines: tuple[str, ...] = ()

    def find_divisors(self, family: str, devices: int = 1) -> tuple[int, ...]:
        """The divisors for the sums over a family's units, which ``devices`` share."""
        own = (*list_halves(self.own.get(family, self.every)), *self.blocks)
        return (*own, *(each * devices for each in own if devices > 1))


def list_halves(divisor: int) -> list[int]:
    """512 → 512, 256, 128, 64, 32."""
    # A half is only tried while it is still a multiple of the block: 96 gives 96, and not 48.
    return [divisor, *(list_halves(divisor // 2) if divisor % (2 * KERNEL_BLOCK) == 0 else [])]


def read_alignment(
    text: int | str, blocks: tuple[int, ...] = (), devices: int = 1, engines: tuple[str, ...] = ()
) -> Alignment:
    """``32``, ``h100``, ``ffn=512,hidden=256`` or ``h100,ffn=512``.

    Raises:
        MptkError: ``text`` has another form.
    """
    every, own = KERNEL_BLOCK, dict[str, int]()
    for part in str(text).split(","):
        # A number, or a device's name; 0 if neither, so that all bad parts are refused by one message.
        found = _PART.fullmatch(part.strip())
        text_of = "" if found is None else found["divisor"]
        divisor = int(text_of) if text_of.isdecimal() else HARDWARE.get(text_of, 0)
        if found is None or not 1 <= divisor <= 1 << 20:
            hint = suggest_name(part, HARDWARE, "")
            raise InputError(
                f"align: {part[:40]!r} is not known; {f'{hint} ' if hint else ''}give a number from 1 to {1 << 20}, "
                f"one of {', '.join(HARDWARE)}, or families with theirs, as ffn=512,hidden=256",
                name="align",
                nearest=list_close_names(part, HARDWARE),
            )
        if found["name"]:
            own[found["name"]] = divisor
        else:
            every = divisor
    return Alignment(every, own, blocks, devices, engines)
