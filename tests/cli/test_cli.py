"""The command line on a tiny checkpoint: what each command prints and writes, and what a user's error looks like.

It reaches for mptk.publish.manifest and the rules: what the commands print is compared with them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import SHORT, Result
from safetensors.torch import load_file, save_file

from mptk.publish.manifest import check_manifest
from mptk.report.view import format_figure
from mptk.testing import make_llama
from passes.analysis.rules import RULES
from passes.pipelines import LISTS
from tests.bad_inputs import table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pruned(files, tmp_path_factory):
    """``mptk prune`` where no terminal is."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    options = ["--data", files.text, "--eval-windows", "5", "--eval-length", "24", *SHORT]
    ended = table.run(["prune", files.model, "--out", str(out), *options], width=200)
    assert ended.code == 0, ended.stderr
    return out, Result(ended.code, ended.stdout, ended.stderr)


# ---- commands ----


def test_analyze_names_every_family_and_why_other_axes_stay(files, tmp_path, mptk):
    result = mptk("analyze", files.model, "--align", "8", "--json", tmp_path / "new" / "analysis.json")
    assert result.code == 0
    analysis = json.loads((tmp_path / "new" / "analysis.json").read_text())
    families = {f["name"]: f for f in analysis["families"]}
    assert families["ffn"]["legal_widths"] == list(range(8, 65, 8))
    assert families["ffn"]["parameters_per_unit"] == 2 * 3 * 48
    total = sum(p.numel() for p in make_llama().parameters())
    assert families["ffn"]["share"] == pytest.approx(2 * 3 * 48 * families["ffn"]["width"] / total)
    assert families["hidden"]["share"] == pytest.approx(1), "every weight of this model has the residual width"
    assert families["kv_groups"]["legal_widths"] == [1, 2]
    assert (families["q_heads"]["width"], families["q_heads"]["scopes"]) == (3, 2)
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    printed = {row[1].strip(): row for row in rows}
    for name, family in families.items():
        assert (family["refused"] or str(family["legal_widths"][-1])) in printed[name][7]
    assert analysis["blocked"]
    for axis in analysis["blocked"]:
        assert axis["reasons"][0] in printed[axis["name"]][4]
    check_documented(analysis)


def check_documented(analysis: dict) -> None:
    """docs/analysis.md names the fields of the file, and no others."""
    section = (ROOT / "docs" / "analysis.md").read_text().split("## `mptk analyze --json`")[1]
    documented = set(re.findall(r"`([a-z_]+)`", section))
    family = analysis["families"][0]
    written = {*analysis, *family, *family["groups"][0], *family["groups"][0]["members"][0], *analysis["blocked"][0]}
    assert written | {"modules"} == documented, "of the parts of a model of several networks"
    assert analysis["format"] == "mptk-analysis/1"


STOCK = """
import sys
sys.modules["mptk"] = sys.modules["passes"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
out = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = AutoTokenizer.from_pretrained(out)("seven wizards", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=2, do_sample=False)
print(model.config.intermediate_size, sum(p.numel() for p in model.parameters()))
"""


def test_prune_writes_a_checkpoint_for_stock_transformers(pruned, fresh):
    out, _ = pruned
    report = json.loads((out / "report.json").read_text())
    run = fresh.run(STOCK, out)
    assert run.code == 0, run.err
    widths, cost = report["families"], report["cost"]["pruned"]
    assert run.out.split()[-2:] == [str(widths["ffn"]["width"]), str(cost["parameters"])]


def test_prune_reports_what_it_printed(pruned):
    out, result = pruned
    report = json.loads((out / "report.json").read_text())
    assert abs(report["sparsity"] - 0.3) <= 0.01
    assert (report["settings"]["method"], report["settings"]["samples"]) == ("wanda", 4)
    assert set(report["files"]) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"mptk.json"}
    assert [stage["ok"] for stage in report["proof"]] == [True] * 9
    for name, family in report["families"].items():
        assert (f"{name} {family['of']} → {family['width']}" in result.stdout) == (family["width"] < family["of"])
    assert "proof     9 stages agree" in result.stdout
    assert "5 windows of 24 tokens" in report["quality"]["protocol"]
    for model in ("dense", "pruned"):
        assert format_figure(report["quality"][model]) in result.stdout
    assert result.stdout.startswith(f"written to {out}: ")
    assert len(result.stdout.splitlines()) <= 12


def test_an_estimate_alone_writes_nothing_and_needs_no_weights(files, mptk, tmp_path, go_to):
    go_to(tmp_path)
    shutil.copy(Path(files.model) / "config.json", tmp_path)
    result = mptk("prune", tmp_path, "--estimate", "--method", "wanda", "--reconstruct")
    assert result.code == 0
    for part in ("memory", "largest stage", "disk", "checkpoint", "ONNX", "time", "score (wanda)", "reconstruct"):
        assert part in result.stdout
    assert re.search(r"A run will need about [\d.]+ GB of memory", result.stdout)
    assert os.listdir(tmp_path) == ["config.json"]


def test_progress_is_lines_where_stderr_is_no_terminal_and_the_first_says_what_a_run_needs(pruned):
    reading, first, *lines = pruned[1].stderr.splitlines()
    assert reading.startswith("reading ")
    assert re.fullmatch(
        r" *\d s  will need about [\d.]+ GB of memory, \d+ MB of disk and \d+ s for 4 calibration windows", first
    )
    assert all(re.match(r" *\d+ s  \w", line) for line in lines), pruned[1].stderr
    stages = [re.sub(r" \d+/\d+$", "", line.split(" s  ")[1]) for line in lines]
    steps = ["load", "trace", "analyse", "legalise", "calibration data", "score (wanda)", "choose widths"]
    assert list(dict.fromkeys(stages))[:7] == steps
    assert {"write stock", "write onnx", "prove", "measure"} <= set(stages)


def test_verify_passes_until_a_weight_of_the_folder_changes(pruned, tmp_path, mptk):
    out, _ = pruned
    result = mptk("verify", out)
    assert result.code == 0
    assert len(re.findall(r" ok\b", result.stdout)) == 9
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.self_attn.o_proj.weight"][7] += 0.1
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    result = mptk("verify", broken)
    assert result.code == 1
    assert re.match(r"error: model.safetensors in .*/broken was changed since it was published; ", result.error)
    assert "ok" not in result.stdout


def test_eval_gives_perplexity_and_its_protocol(files, pruned, tmp_path, mptk):
    report = json.loads((pruned[0] / "report.json").read_text())
    protocol = ["--data", files.text, "--length", "32", "--windows", "3", "--json", tmp_path / "eval.json"]
    dense = mptk("eval", files.model, *protocol)
    assert dense.code == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["model"] == files.model
    assert dense.stdout.startswith(f"perplexity {result['perplexity']:.3f}  (")
    assert "3 windows of 32 tokens" in result["protocol"]
    mptk("eval", pruned[0], *protocol)
    assert json.loads((tmp_path / "eval.json").read_text())["perplexity"] != result["perplexity"]
    assert report["quality"]["dense"] > 1


@pytest.mark.usefixtures("quick_bench")
def test_bench_is_shown_again_by_report(files, pruned, tmp_path, mptk):
    out = tmp_path / "out"
    shutil.copytree(pruned[0], out)
    result = mptk("bench", files.model, out, "--lengths", "16,40", "--rounds", "2", "--json", tmp_path / "bench.json")
    assert result.code == 0
    bench = json.loads((tmp_path / "bench.json").read_text())
    cases = [(row["graph"], row["case"]["phase"], row["case"]["length"]) for row in bench["rows"]]
    graphs = (files.model, f"{files.model} int8", f"{files.model} int4", str(out))  # what the cut competes with
    assert cases == [(g, p, n) for p in ("prefill", "decode") for n in (16, 40) for g in graphs]
    assert all(0 < row["ideal"] < 1 and row["ratio"] > 0 for row in bench["rows"] if row["graph"] == str(out))
    assert bench["rounds"] == 2
    check_manifest(out)
    shown = mptk("report", out)
    assert shown.code == 0
    for row in bench["rows"]:
        for text in (result.stdout, shown.stdout):
            case = f"{row['case']['phase']} {row['case']['length']}"
            assert re.search(rf"{case} .* {row['ratio']:.3f} .* {row['ideal']:.3f} ", text)
    assert "onnx/model.onnx" in shown.stdout
    assert "The proof, stage by stage" in shown.stdout


@pytest.mark.features
def test_models_lists_what_fetch_takes(mptk):
    result = mptk("models")
    assert result.code == 0
    row = next(line for line in result.stdout.splitlines() if "smollm2-135m" in line)
    assert "no" in row.split("│")[-2]


def test_ops_lists_every_rule_with_its_axis_equation(tmp_path, mptk):
    result = mptk("ops", "--json", tmp_path / "ops.json")
    assert result.code == 0
    listed = json.loads((tmp_path / "ops.json").read_text())
    names = [row["op"] for row in listed["ops"]]
    assert names == sorted(names) == sorted(RULES)
    assert result.stdout.startswith(f"{len(names)} ops with an axis rule")
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert printed == [[row["op"], row["file"], row["axes"]] for row in listed["ops"]]
    assert ["aten.linear", "passes/analysis/rules/contract.py", "y[…, o] = Σ_i x[…, i] W[o, i] + b[o]."] in printed


def test_passes_lists_the_pipelines_without_loading_transformers(mptk):
    result = mptk("passes")
    assert result.code == 0
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == [
        p.__name__.replace("_", " ") for p in LISTS
    ]
    start = lines.index("  rewrite: Cut the graph's sizes and the weights to a plan.")
    assert lines[start + 1 : start + 4] == [
        "    requires: The program is the analysed one.",
        "    ensures: Each weight has the shape that the plan gives it; weights outside the plan keep theirs.",
        "  remove blocks: Remove the blocks that a plan does not keep, with their weights and caches.",
    ]
    check = "import sys; from mptk.cli.models import list_passes as f; f(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_show_prints_the_program_before_and_after_a_cut(files, pruned, mptk):
    families = json.loads((pruned[0] / "plan.json").read_text())["families"]
    cut = next(name for name, family in families.items() if family["width"] < family["of"])
    dense = mptk("show", files.model)
    small = mptk("show", files.model, "--after", "fold norms", "--plan", pruned[0] / "plan.json", "--source")
    assert dense.code == small.code == 0
    assert f"{cut}({families[cut]['of']})" in dense.stdout
    assert f"{cut}({families[cut]['of']})" not in small.stdout
    assert f"{cut}({families[cut]['width']})" in small.stdout
    assert "%embedding : [batch, seq, hidden(48)] = aten.embedding(" in dense.stdout
    assert "#" not in dense.stdout
    assert re.search(r"%linear : .* = aten.linear\(.*\)  # modeling_llama.py:\d+\n", small.stdout)
