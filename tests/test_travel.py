"""Which cuts break programs other than transformers, and ``--portable``, which leaves them out.

It reaches for passes.targets.stock: what other programs derive, without a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy_checkpoints as toys
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

import mptk
from mptk import MptkError, Settings
from mptk.api import compiler as api
from mptk.cost.model import CostModel
from mptk.ir.alignment import Alignment
from mptk.ir.families import Analysis
from mptk.methods import find_method
from mptk.methods.division.budget import WidthSearch
from mptk.report.analysis import analysis_json, breaking
from mptk.targets import find_target
from passes.targets.legalize import LegalWidths
from passes.targets.stock.config import StockConfig
from passes.targets.stock.travel import broken

SMALL = {"samples": 1, "length": 16, "eval_windows": 1, "eval_length": 16}
HOW: dict[str, Any] = {"method": "magnitude", "data": "random", "align": 2, **SMALL}
HEADS = "programs that derive head_dim from hidden_size and num_attention_heads"


def derivable() -> LlamaForCausalLM:
    """6 heads of 8 in hidden 48."""
    config = toys.llama().config
    config.head_dim = 8
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def found() -> tuple[Analysis, LegalWidths]:
    model = derivable()
    analysis = api.analyze(model)
    return analysis, find_target("stock").legal(analysis, model, Alignment(2))


def cut(config: PreTrainedConfig, **changes: int) -> StockConfig:
    old = {name: getattr(config, name) for name in changes}
    return StockConfig(
        LlamaForCausalLM,
        type(config).from_dict(config.to_dict() | changes),
        {name: (old[name], new) for name, new in changes.items()},
    )


def test_a_size_that_programs_derive() -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(**sizes)
    assert broken(cut(config, num_attention_heads=4), config) == [HEADS]
    assert broken(cut(config, intermediate_size=32), config) == []
    assert broken(cut(config, num_attention_heads=4, hidden_size=32), config) == []  # still 8
    other = LlamaConfig(**sizes | {"head_dim": 16})  # who derives it fails on the dense model, too
    assert broken(cut(other, num_attention_heads=4), other) == []


def test_a_number_that_the_dense_config_leaves_open() -> None:
    config = GPT2Config(n_embd=48, n_head=4)
    assert broken(cut(config, n_inner=100), config) == [
        "programs that derive n_inner, which the dense model's config leaves open"
    ]


def test_the_analysis_says_which_families_break_what(found: tuple[Analysis, LegalWidths]) -> None:
    analysis, legal = found
    assert legal.breaks == dict.fromkeys(("hidden", "kv_groups", "q_heads"), HEADS)
    (line,) = breaking(analysis_json(analysis, legal, "m")["families"])
    assert line.startswith(f"cutting hidden, kv_groups, q_heads breaks {HEADS}")
    portable = legal.portable()
    assert {name for name, widths in portable.ladders.items() if len(widths) > 1} == {"ffn", "layers"}
    assert portable.refused["q_heads"] == f"cutting it breaks {HEADS}"


def test_portable_refuses_what_breaks(found: tuple[Analysis, LegalWidths]) -> None:
    analysis, legal = found
    settings = Settings(portable=True, families=("q_heads",), method="magnitude")
    target, method, cost = find_target("stock"), find_method("magnitude"), CostModel(analysis)
    search = WidthSearch(analysis, legal.portable(), cost, derivable(), method, target, settings)
    with pytest.raises(MptkError, match=rf"q_heads cannot be cut .*{HEADS}; leave out --portable"):
        search.candidates()
    with pytest.raises(MptkError, match=r"writes no config\.json .* leave out --portable"):
        find_target("graph").legal(analysis, derivable(), Alignment(2)).portable()


def test_portable_keeps_to_what_travels() -> None:
    report = mptk.prune(derivable(), portable=True, sparsity=0.2, tolerance=0.05, **HOW).report
    assert [n for n, f in report.families.items() if f["width"] < f["of"]] == ["ffn"]
    assert any(note.startswith("--portable left uncut kv_groups, q_heads: cutting it breaks") for note in report.notes)


def test_a_cut_that_breaks_is_told(tmp_path: Path) -> None:
    pruned = mptk.prune(derivable(), widths={"q_heads": 2}, families="q_heads", **HOW)
    assert f"this cut breaks {HEADS}; see docs/deploy.md" in pruned.report.notes
    pruned.plan.save(tmp_path / "plan.json")
    with pytest.raises(MptkError, match=f"these widths break {HEADS}"):
        mptk.prune(derivable(), plan=str(tmp_path / "plan.json"), portable=True, **HOW)
