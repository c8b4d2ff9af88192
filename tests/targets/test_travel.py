"""Which cuts break programs other than transformers. By default they are left out.

It reaches for passes.targets.stock: what other programs derive, without a run.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config
from typer.testing import CliRunner

import mptk
from mptk import testing
from mptk.api import compiler as api
from mptk.cli.main import app
from mptk.errors import BudgetError, InputError, TargetError
from mptk.features.gguf.architectures import ARCHITECTURES
from mptk.ir import Alignment
from mptk.ir.consumers import CONSUMERS
from mptk.report.analysis import build_analysis_json, list_breaking
from mptk.report.runs import explain_uncut
from mptk.targets import find_target
from mptk.testing import expect_error
from passes.targets import legalize
from passes.targets.stock.config import StockConfig
from passes.targets.stock.travel import find_broken_programs

SMALL = {"samples": 1, "length": 16, "eval_windows": 1, "eval_length": 16}
HOW: dict[str, Any] = {"method": "magnitude", "data": "random", "align": 2, **SMALL}
HEADS = "programs that derive head_dim from hidden_size and num_attention_heads, as optimum-onnx"


def derivable() -> LlamaForCausalLM:
    """6 heads of 8 in hidden 48."""
    config = testing.make_llama().config
    config.head_dim = 8
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def found():
    model = derivable()
    analysis = api.analyze(model)
    return analysis, find_target("stock").find_legal(analysis, model, Alignment(2))


def cut(config: PreTrainedConfig, **changes: int) -> StockConfig:
    smaller = type(config).from_dict(config.to_dict() | changes)
    return StockConfig(LlamaForCausalLM, smaller, {n: (getattr(config, n), new) for n, new in changes.items()})


def test_a_size_that_programs_derive():
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(**sizes)
    assert find_broken_programs(cut(config, num_attention_heads=4), config) == [HEADS]
    assert find_broken_programs(cut(config, intermediate_size=32), config) == []
    assert find_broken_programs(cut(config, num_attention_heads=4, hidden_size=32), config) == []  # still 8
    other = LlamaConfig(**sizes | {"head_dim": 16})  # who derives it fails on the dense model, too
    assert find_broken_programs(cut(other, num_attention_heads=4), other) == []


def test_a_number_that_the_dense_config_leaves_open():
    config = GPT2Config(n_embd=48, n_head=4)
    (said,) = find_broken_programs(cut(config, n_inner=100), config)
    assert said == "programs that derive n_inner, which the dense config leaves open, as llama.cpp's converter"


def test_programs_that_read_the_size_of_a_head_only_for_some_models():
    config = Qwen2Config(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    fewer = cut(config, num_attention_heads=4)
    assert find_broken_programs(fewer, config) == [f"{HEADS}, llama.cpp, vLLM, mlx-lm"]
    assert find_broken_programs(fewer, config, ("vllm", "transformers")) == [HEADS.replace("optimum-onnx", "vLLM")]
    assert find_broken_programs(fewer, config, ("transformers",)) == []


def test_llama_cpp_reads_the_size_of_a_head_where_its_writer_says_so():
    (found,) = (each for each in CONSUMERS if each.engine == "llama.cpp")
    assert {*found.limits["head_dim"]} == {name for name, base in ARCHITECTURES.items() if not base.square}


def test_the_analysis_says_which_families_break_what(found):
    analysis, legal = found
    assert legal.breaks == dict.fromkeys(("hidden", "kv_groups", "q_heads"), HEADS)
    (line,) = list_breaking(build_analysis_json(analysis, legal, "m")["families"])
    assert line.startswith(f"cutting hidden, kv_groups, q_heads breaks {HEADS}")
    found = legalize.keep_portable_families(analysis, legal)
    assert legalize.choose_default_families(analysis.make_variables(), found) == ["ffn"]
    assert found.left == dict.fromkeys(("kv_groups", "q_heads"), f"cutting it breaks {HEADS}")


def test_by_default_only_what_travels_is_cut():
    report = mptk.prune(derivable(), sparsity=0.2, tolerance=0.05, **HOW).report
    assert [n for n, f in report.families.items() if f["width"] < f["of"]] == ["ffn"]
    assert any(note.startswith("left whole for other programs: kv_groups, q_heads (cutting") for note in report.notes)
    assert not any("this cut breaks" in note for note in report.notes)
    assert explain_uncut(report, "kv_groups") == f"cutting it breaks {HEADS}"


def test_a_budget_that_only_heads_could_meet_names_the_option_which_cuts_them_too():
    with expect_error(BudgetError, name="sparsity") as refused:
        mptk.prune(derivable(), sparsity=0.75, **HOW)
    assert refused.value.nearest
    assert "portable=False" in refused.value.remedy
    report = mptk.prune(derivable(), portable=False, sparsity=0.75, tolerance=0.1, **HOW).report
    assert any(report.families[name]["width"] < report.families[name]["of"] for name in ("kv_groups", "q_heads"))
    assert f"this cut breaks {HEADS}; see docs/deploy.md" in report.notes


def test_what_is_named_is_cut_and_told(tmp_path):
    pruned = mptk.prune(derivable(), widths={"q_heads": 2}, sparsity=0.3, tolerance=0.1, **HOW)
    assert pruned.report.families["q_heads"]["width"] == 2
    assert f"this cut breaks {HEADS}; see docs/deploy.md" in pruned.report.notes
    assert any(note.startswith("left whole for other programs: kv_groups (") for note in pruned.report.notes)
    pruned.plan.save(tmp_path / "plan.json")
    again = mptk.prune(derivable(), plan=str(tmp_path / "plan.json"), **HOW).report
    assert again.families == pruned.report.families


def test_a_model_of_which_every_cut_breaks_a_program_is_cut_all_the_same():
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=97, n_positions=64)).eval()
    analysis = api.analyze(model)
    legal = find_target("stock").find_legal(analysis, model, Alignment(2))
    assert "ffn" in legal.breaks
    portable = legalize.keep_portable_families(analysis, legal)
    assert legalize.choose_default_families(analysis.make_variables(), portable) == ["ffn"]


def test_only_what_the_named_programs_read_is_legal(tmp_path):
    asked = {"sparsity": 0.75, "tolerance": 0.1, **HOW}
    report = mptk.prune(derivable(), engines=("vllm", "llama.cpp"), **asked).report
    cut = {name: f["width"] for name, f in report.families.items() if f["width"] < f["of"]}
    assert cut.keys() & {"kv_groups", "q_heads"}
    assert f"this cut breaks {HEADS}; see docs/deploy.md" in report.notes  # of the programs that were not named
    for named in ({}, {"families": ("ffn", "q_heads")}, {"widths": {"q_heads": 2}}):
        with pytest.raises((BudgetError, TargetError)):
            mptk.prune(derivable(), engines=("vllm", "optimum-onnx"), **named, **asked)
    mptk.prune(derivable(), widths={"q_heads": 2}, **asked | {"sparsity": 0.3}).plan.save(tmp_path / "plan.json")
    with expect_error(TargetError, name="engines"):
        mptk.prune(derivable(), engines=("optimum-onnx",), plan=str(tmp_path / "plan.json"), **HOW)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--engines vllm --target graph", "engines"),
        ("--engines sglang", "engines"),
        ("--engines transformers.js --no-onnx", "engines"),
        ("--engines vllm --no-portable", "portable"),
    ],
)
def test_a_program_that_cannot_read_the_result_is_refused_before_any_work(words, name):
    result = CliRunner().invoke(app, ["prune", "smollm2-135m", "--out", "nowhere", *words.split()])
    assert isinstance(result.exception, InputError)
    assert result.exception.name == name
