"""A machine of known rates: what mptk keeps in the cache folder after it measured this one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from mptk.cost.estimate import CPU, RATES, Machine, describe_measured, name_rates_file
from mptk.files import write_json


def keep_rates(machine: Machine, dtype: torch.dtype = torch.float32) -> Path:
    """Let runs find these rates in the cache folder (``MPTK_CACHE``), which should be the test's own."""
    file = name_rates_file(describe_measured(CPU, dtype))
    write_json(file, {"rates": {name: rate for name, rate in asdict(machine).items() if name in RATES}})
    return file
