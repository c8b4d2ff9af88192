"""What is dear or could come out otherwise the second time is done once in a run of ``prune``.

It reaches for what must run once, to count its calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inside import Inside

import mptk
import mptk.proof.verification
import mptk.run.prune
from mptk import testing
from mptk.config.learning import Learning, Training
from mptk.ir.resolved_plan import resolve_plan
from passes.targets.legalize import discover
from passes.transforms.insert_masks import find_mask_sites

LEARNING = Learning(steps=4, mask_share=0.5, rank=2, training=Training(batch=2, micro=2))
SETTINGS = mptk.Settings(sparsity=0.3, samples=4, length=32, align=4, learning=LEARNING)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = testing.make_tokenizer(begin=True)
    return testing.save_model(testing.make_llama(), tmp_path_factory.mktemp("model"), words)


def counted(inside: Inside, function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """The arguments of every call of ``function``, wherever it was imported to."""
    calls: list[tuple[Any, ...]] = []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("mptk", "passes") and getattr(module, function.__name__, None) is function:
            inside.around(
                f"{name}.{function.__name__}", lambda real, *given, **o: calls.append(given) or real(*given, **o)
            )
    return calls


def test_learned_plan_is_resolved_once_for_each_analysis(model: str, tmp_path: Path, inside: Inside) -> None:
    resolved, discovered, sites = (counted(inside, f) for f in (resolve_plan, discover, find_mask_sites))
    report = mptk.prune(model, tmp_path / "out", SETTINGS).report
    assert report.trained
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()
    analyses = [id(analysis) for analysis, _ in resolved]
    assert len(analyses) == len(set(analyses)) == 2  # of the whole model, and of a decoding step for ONNX
    assert len(discovered) == 1
    assert len(sites) == 1


def test_given_plan_is_resolved_once_for_each_analysis(model: str, tmp_path: Path, inside: Inside) -> None:
    one_shot = replace(SETTINGS, method="magnitude", learning=Learning(steps=0), onnx=False)
    mptk.prune(model, tmp_path / "first", one_shot)
    resolved, discovered, sites = (counted(inside, f) for f in (resolve_plan, discover, find_mask_sites))
    given = replace(one_shot, plan=str(tmp_path / "first" / "plan.json"), reconstruct=True, onnx=True)
    mptk.prune(model, tmp_path / "out", given)
    assert (len(resolved), len(discovered), len(sites)) == (2, 1, 1)
    mptk.verify(tmp_path / "out")
    assert (len(resolved), len(discovered), len(sites)) == (4, 2, 1), "verify writes the graphs again"
