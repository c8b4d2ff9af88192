"""What both files about ladders ask for and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from mptk import Plan
from mptk.testing import draw_tokens

SIZES = [0.2, 0.4, 0.6]
ASKED = {
    "method": "wanda",
    "samples": 4,
    "length": 32,
    "align": 8,
    "onnx": False,
    "eval_length": 32,
    "eval_windows": 4,
    "progress": None,
}
TRAINED = {**ASKED, "reconstruct": True, "steps": 4, "batch": 2}
TWO = SIZES[:2]


def require_nested(larger: Plan, smaller: Plan) -> None:
    """Every unit of the smaller model is one of the larger model's, in the dense model's numbers."""
    assert larger.families.keys() <= smaller.families.keys()
    for name, family in larger.families.items():
        assert smaller.widths[name] <= family.width
        assert smaller.families[name].of == family.of
        for layer, rows in family.keep.items():
            for kept, left in zip(rows, smaller.families[name].keep[layer], strict=True):
                assert set(left) <= set(kept), (name, layer)


def read_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(draw_tokens(), use_cache=False).logits
    return found


def digest_folders(folders: Sequence[Path]) -> list[str]:
    files = [folder / name for folder in folders for name in ("model.safetensors", "plan.json")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


OPTIONS = ["--method", "magnitude", "--align", "8", "--no-onnx", "--eval-length", "32", "--eval-windows", "2"]
