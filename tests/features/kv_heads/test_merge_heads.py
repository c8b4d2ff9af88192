"""``prune --kv-heads``: KV heads are merged in closed form, under the one budget and plan, and the result is proven.

The merge is exact if nothing is lost, and near the dense model if something is.

It reaches for mptk.features.kv_heads: merged heads are turned, to be refused.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import done
from lab import fields
from small_modules import Small
from transformers import PreTrainedModel

import mptk
from benchmarks.tiny_models import tiny_model
from mptk import Plan, ProofError, testing
from mptk.errors import AnalysisError, BudgetError, FileError, InputError, ModelError, PlanError
from mptk.features.kv_heads import convert as merging
from mptk.publish.manifest import write_manifest
from mptk.testing import expect_error

ONE = {"width": 1, "of": 2}
TEXTS = [testing.SENTENCES] * 8
MEASURED = {"samples": 4, "length": 24, "eval_windows": 2, "eval_length": 24, "onnx": False, "progress": None}
ALONE = {"kv_heads": 1, "sparsity": 0.0, "method": "wanda", "data": TEXTS, **MEASURED}
CUT = {**ALONE, "families": ("ffn",), "sparsity": 0.2, "align": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return testing.save_model(testing.make_llama(layers=1), tmp_path_factory.mktemp("heads") / "dense")


@pytest.fixture(scope="module")
def cut(dense, tmp_path_factory):
    """One KV head of two, and a fifth of the dense model's blocks removed in all, with ONNX, by the command line."""
    out = tmp_path_factory.mktemp("cut") / "out"
    (out.parent / "text.txt").write_text(testing.SENTENCES * 20)
    typed = "--kv-heads 1 --families ffn --sparsity 0.2 --align 4 --method wanda --samples 4 --length 24"
    typed += " --eval-windows 2 --eval-length 24"
    result = done("prune", dense, *typed.split(), "--data", out.parent / "text.txt", "--out", out)
    assert "KV heads, merged" in result.output
    return out


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(testing.draw_tokens(), use_cache=False).logits
    return found


def redundant(model: PreTrainedModel) -> PreTrainedModel:
    """The same with second KV heads that are turned first ones: each rotary pair by an angle, values by a matrix."""
    for layer in model.model.layers:
        attention = layer.self_attn
        key, value, size = attention.k_proj, attention.v_proj, attention.head_dim
        turn = torch.polar(torch.rand(size // 2) + 0.5, 6 * torch.rand(size // 2))
        mix = torch.randn(size, size)
        with torch.no_grad():
            for mixed, name in ((key, "weight"), (value, "weight"), (key, "bias"), (value, "bias")):
                tensor = getattr(mixed, name)
                first = tensor[:size]
                if mixed is key:
                    pairs = torch.complex(first[: size // 2], first[size // 2 :])
                    pairs = turn.reshape(-1, *[1] * (first.ndim - 1)) * pairs
                    tensor[size : 2 * size] = torch.cat([pairs.real, pairs.imag])
                else:
                    tensor[size : 2 * size] = mix @ first
    return model


def test_heads_that_are_one_head_turned_become_it_and_nothing_changes(tmp_path):
    """Of a class whose keys and values have biases."""
    dense = redundant(testing.make_decoder("qwen2", vocab_size=300, num_hidden_layers=1))
    found = mptk.prune(testing.save_model(dense, tmp_path / "dense"), **ALONE)
    small = found.model
    assert small.config.num_key_value_heads == 1
    assert small.config.num_attention_heads == dense.config.num_attention_heads
    assert (logits(small) - logits(dense)).abs().max() < 1e-3 * logits(dense).abs().max()
    assert found.report.quality["pruned"] == pytest.approx(found.report.quality["dense"], rel=1e-3)
    assert found.plan == Plan({}, conversions={"kv_heads": ONE})


@pytest.mark.parametrize("heads", [(6, 6), (8, 4)])  # equal numbers: keys look like queries, the class tells them apart
def test_principal_components_lose_less_than_means(heads, tmp_path, inside):
    sizes = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    dense, far = testing.make_decoder("llama", vocab_size=300, **sizes), []
    source = testing.save_model(dense, tmp_path / "dense")
    for ways in (None, ("mean", "mean")):
        if ways is not None:
            inside.gives(f"{merging.__name__}.choose_ways", ways)
        found = mptk.prune(source, **{**ALONE, "kv_heads": 2})
        assert found.model.config.num_key_value_heads == 2
        far.append(float((logits(found.model) - logits(dense)).square().mean()))
    assert far[0] < 0.9 * far[1]


def test_keys_that_a_norm_follows_are_merged_by_their_mean_and_values_by_principal_components(tmp_path):
    dense = testing.make_decoder("qwen3", vocab_size=300, num_hidden_layers=1)
    found = mptk.prune(testing.save_model(dense, tmp_path / "dense"), **ALONE)
    (note,) = (note for note in found.report.notes if "KV heads" in note)
    assert all(said in note for said in ("keys merged by their mean", "values by principal components"))


def test_merged_heads_count_in_the_budget_and_stand_in_the_plan_the_report_and_the_card(cut, dense):
    text = str(cut.parent / "text.txt")
    found = mptk.Pruned.open(cut)
    report, plan = found.report, found.plan
    before, after = report.cost["dense"], report.cost["pruned"]
    assert report.sparsity == 1 - after["block"] / before["block"] == pytest.approx(0.2, abs=0.01)
    assert report.families["ffn"]["width"] < report.families["ffn"]["of"]
    alone = mptk.evaluate(dense, text, windows=2, length=24, progress=None)["model"]
    assert report.quality["dense"] == pytest.approx(alone) != pytest.approx(report.quality["pruned"])
    assert plan.conversions["kv_heads"] == ONE
    assert report.rows["kv_heads"] == {"of": 2, "kept": 1, "config_changes": {"num_key_value_heads": [2, 1]}}
    assert report.config_changes.keys() == {"intermediate_size", "transformers.js_config"}
    assert (found.model.config.num_key_value_heads, found.model.config.num_attention_heads) == (1, 6)
    assert "| KV heads, merged |  | 2 → 1 |" in (cut / "README.md").read_text()
    stages = [d.stage for d in mptk.verify(cut)]
    assert stages == [row["stage"] for row in report.proof]
    assert stages[2:5] == ["KV heads", "rewritten graph", "reloaded checkpoint"]
    assert stages[-1] == "ONNX Runtime sizes"


def test_a_model_whose_kv_heads_are_others_than_the_first_is_refused(cut, dense, inside):
    inside.spoil(
        f"{merging.__name__}.find_first_heads", lambda first: {n: (dim, p.flip(0)) for n, (dim, p) in first.items()}
    )
    with expect_error(ProofError, name="KV heads"):
        mptk.prune(dense, **ALONE)
    with expect_error(ProofError, name="KV heads"):
        mptk.verify(cut)


def test_a_report_or_a_plan_of_other_heads_is_not_believed(cut, dense, tmp_path):
    copy = shutil.copytree(cut, tmp_path / "copy")
    fields("report.json", rows__kv_heads__of=4)(copy)
    write_manifest(copy)
    with expect_error(FileError, name="kv_heads"):
        mptk.verify(copy)
    fields("plan.json", kv_heads__of=3)(copy)
    with expect_error(PlanError, name="kv_heads"):
        mptk.prune(dense, plan=str(copy / "plan.json"), data=TEXTS, **MEASURED)


@pytest.mark.parametrize("method", ["maskprune", "flap"])
def test_the_model_before_the_merge_is_imitated(method, dense, tmp_path, inside):
    imitated = []
    inside.spoil("mptk.protocols.chain.Prepared.copy_teacher", lambda model: imitated.append(model) or model)
    more = {"method": method, "steps": 4, "batch": 2, "micro": 2, "lr": 1e-3}
    found = mptk.prune(dense, tmp_path / "out", **{**CUT, **more})
    assert {model.config.num_key_value_heads for model in imitated} == {2}
    assert len(imitated) == (2 if method == "maskprune" else 1)
    assert found.model.config.num_key_value_heads == 1


def test_it_is_recovered_and_cut_again_by_its_plan(cut, dense, tmp_path):
    training = {"steps": 1, "batch": 2, "micro": 2, "data": TEXTS, "progress": None, "onnx": False}
    trained = mptk.recover(cut, tmp_path / "trained", **training)
    assert trained.plan == Plan.load(cut / "plan.json")
    assert trained.report.rows == mptk.Pruned.open(cut).report.rows
    assert mptk.verify(tmp_path / "trained")
    again = mptk.prune(dense, plan=str(cut / "plan.json"), data=TEXTS, **MEASURED)
    assert again.report.plan_sha256 == trained.report.plan_sha256
    assert again.report.cost == trained.report.cost


SEARCH = {"search": True, "search_tokens": 0, "search_shapes": 2, "reconstruct": True, "vocabulary": TEXTS}


@pytest.mark.parametrize("more", [{"target": "graph", "layers": "free"}, SEARCH], ids=["target", "search"])
def test_other_choices_start_from_the_merged_model(more, dense, tmp_path):
    found = mptk.prune(dense, tmp_path / "out", **{**CUT, **more})
    assert found.plan.conversions["kv_heads"] == ONE
    assert found.report.sparsity == pytest.approx(0.2, abs=0.01)
    assert [row["stage"] for row in found.report.proof].count("KV heads") == 1


def test_shapes_of_the_merged_model_are_ranked_beside_the_dense_one(dense):
    line = f"shapes {dense} --families ffn --sparsity 0.2 --align 2 --samples 4 --length 24 --tokens 0 --data random"
    found = {}
    for more in ("", "--kv-heads 1"):
        result = done(*line.split(), *more.split(), "--json", "-")
        found[more] = json.loads(result.stdout)
        assert more in found[more]["command"]
        assert found[more]["shapes"][0]["sparsity"] == pytest.approx(0.2, abs=0.01)
    plain, merged = found.values()
    assert merged["dense"] == plain["dense"]
    assert merged["shapes"][0]["widths"]["ffn"] > plain["shapes"][0]["widths"]["ffn"]


@pytest.mark.parametrize(
    ("name", "kv_heads", "kind", "nearest"),
    [("llama", 3, BudgetError, (1,)), ("gpt2", 2, AnalysisError, None), ("opt", 2, BudgetError, None)],
)
def test_what_cannot_be_merged_is_refused(name, kv_heads, kind, nearest, tmp_path):
    source = testing.save_model(testing.make_decoder(name, vocab_size=300, num_hidden_layers=1), tmp_path / "dense")
    with expect_error(kind, nearest=nearest):
        mptk.prune(source, tmp_path / "out", **{**ALONE, "kv_heads": kv_heads})
    assert not (tmp_path / "out").exists()


def test_what_contradicts_it_is_refused_in_a_line(cut, dense):
    with expect_error(InputError, name="kv_heads"):
        mptk.prune(dense, **{**ALONE, "plan": str(cut / "plan.json")})
    with expect_error(PlanError, name="kv_heads"):
        mptk.rewrite(mptk.analyze(testing.make_llama(layers=1)), Plan.load(cut / "plan.json"))
    with expect_error(ModelError, name="Small"):
        mptk.prune(Small(lambda x: x), example_inputs=torch.randn(4, 7), kv_heads=1, progress=None)


def test_a_config_that_has_a_size_for_each_layer_is_merged(tmp_path):
    """Gemma 4's config raises an error for ``head_dim`` once it is read from a folder."""
    tiny_model("causal-lm", "gemma4_text").model.save_pretrained(tmp_path / "dense")
    given = ALONE | {"data": "random", "length": 12, "eval_windows": 1, "eval_length": 12}
    pruned = mptk.prune(str(tmp_path / "dense"), **given)
    assert pruned.report.rows["kv_heads"]["kept"] == 1
