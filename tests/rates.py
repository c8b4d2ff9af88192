"""A machine of known rates: what mptk keeps in the cache folder after it measured this one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from mptk.cost.estimate import CPU, RATES, Machine, list_rate_factors, name_rates_file
from mptk.files import write_json


def keep_rates(machine: Machine, *dtypes: torch.dtype) -> None:
    """Let runs find these rates in the cache folder (``MPTK_CACHE``), which should be the test's own.

    ``dtypes``: of which products; by default of float32 and of bfloat16.
    """
    for dtype in dtypes or (torch.float32, torch.bfloat16):
        rates = {name: rate for name, rate in asdict(machine).items() if name in RATES}
        write_json(find_rates(dtype), {"rates": rates})


def find_rates(dtype: torch.dtype = torch.float32) -> Path:
    """The file with the rates of this machine's processor."""
    return name_rates_file(list_rate_factors(CPU, dtype))
