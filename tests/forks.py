"""Forks of this process, which has imported everything, so that another process starts at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from accelerate.state import AcceleratorState
from torch.multiprocessing import start_processes


def on_two(run: Callable[[], object], **environment: str) -> None:
    """``run`` in two processes that are to work together, told of each other as torchrun and accelerate tell theirs.

    Raises:
        ProcessRaisedException: what one of them raised, with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    start_processes(_ranked, (run, meeting | {"ACCELERATE_USE_CPU": "1"} | environment), 2, start_method="fork")


def _ranked(rank: int, run: Callable[[], object], environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    AcceleratorState._reset_state(reset_partial_state=True)  # what this process was before
    run()
