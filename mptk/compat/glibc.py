"""glibc: what its malloc does with the memory of freed tensors."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of ``mallopt``, as malloc.h has them: how many free bytes at the end of the heap stay, and how many blocks
may be mapped, each by itself."""
USUAL_TRIM, USUAL_MMAPS = 64 << 20, 65536
"""What malloc has arrived at by itself in a process that has used torch; MMAP_MAX is the default."""


@contextlib.contextmanager
def retain_memory() -> Iterator[None]:
    """Inside, the memory of freed tensors stays with the process, for the next ones. Without glibc nothing changes.

    By itself malloc maps each tensor of 32 MB or more anew, and gives it back when it is freed. A step of training then
    has a page fault for every 4 KB of its logits, which are slow in a virtual machine (benchmarks/README.md). The main
    thread keeps blocks of any size, others those of less than 64 MB.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, USUAL_MMAPS)
        libc.mallopt(TRIM_THRESHOLD, USUAL_TRIM)
        libc.malloc_trim(0)
