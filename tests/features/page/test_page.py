"""Pages that show pruned folders: what they say, what they refuse to compare, and that no text becomes markup.

It reaches for mptk.report: a page of made-up runs needs no run.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import done
from markdown_it import MarkdownIt
from page_runs import HOSTILE, WORDS, Parsed, made
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mptk
from mptk import FamilyPlan, Plan
from mptk.cli.main import app
from mptk.config import Learning
from mptk.errors import FileError, InputError
from mptk.features.page.charts import draw_kept_chart, draw_trace_charts, map_kept_units
from mptk.features.page.render import render_report_page
from mptk.files.outputs import check_file
from mptk.report.runs import Run, explain_uncut, find_front, group_runs, name_folders, read_runs, shorten_model_name
from mptk.report.sections import build_prune_view
from mptk.report.view import Table, render_markdown
from mptk.testing import expect_error


@pytest.fixture(scope="module")
def page():
    """A page about two runs."""
    return render_report_page([made(), made(run="other")])


def test_a_page_says_what_a_run_did(tmp_path):
    written = render_report_page([made()])
    (tmp_path / "page.html").write_text(written)
    check_file(tmp_path / "page.html", "page")
    assert written == render_report_page([made()])  # the same each time
    page = Parsed(written)
    for said in (
        "acme/small pruned by maskprune",
        "30.0%",
        "40 → 24",
        "8…40 step 8",
        "the budget was met at this width",
        "the class derives it",
        "runs through all layers",
        "wikitext: 4 windows of 32 tokens",
        "40.00",
        "pruned, int8 in ONNX Runtime 41.00",
        "ffn=24 (taken) 4.25",
        "2.5e-06 5.0e-05 ok, rounding moves it as much",
        "decode 128 pruned 1 9.4 ± 0.5 80 0.750 0.700 60%",
        "bytes of the weights 40,000 30,400 24.0%",
        "load 1.0 rewrite",
    ):
        assert said in page.text, said
    assert ("style", "--part: 0.240") in page.attributes  # the bar of what was removed
    drawn = [value for name, value in page.attributes if name == "aria-label"]
    for chart in (
        "m30: kept units of ffn",
        "m30: kept units of q_heads",
        "m30: loss in phase masks",
        "m30: cost in phase masks",
        "m30: widths, as shares of the dense ones in phase masks",
        "m30: dual z, the price of the budget in phase masks",
        "m30: each stage of the proof, and its tolerance",
        "m30: times in ONNX Runtime over those of dense, and the ideal",
    ):
        assert chart in drawn


def test_a_page_begins_with_the_end_screen_of_the_run_and_commands_can_be_copied():
    run = replace(made(), place=Path("runs/m30"))
    text = render_report_page([run]).partition("</style>")[2]
    assert text.index("In short") < text.index("What was cut")
    assert "pruned int8" in text
    assert '<pre class="command">mptk recover runs/m30 --data text.txt --out runs/m30-recovered</pre>' in text
    assert "<code>mptk advise</code>" in text
    assert "`" not in text


def test_no_text_becomes_markup(page):
    """Every text of a run at once; no page has the names of a plan's layers."""
    plain, hostile = Parsed(page), {word: f"{word}{HOSTILE}" for word in WORDS}
    written = render_report_page([made(**hostile), made(run="other")])
    read = Parsed(written)
    assert read.tags == plain.tags
    assert "script" not in read.tags
    assert {name for name, _ in read.attributes} == {name for name, _ in plain.attributes}
    assert "<script" not in written
    assert "<img" not in written
    assert [word for word in WORDS if hostile[word] not in read.text] == ["layer"]


def test_terminal_markdown_and_page_say_the_same(page):
    run = made()
    view, console = build_prune_view(run.report, run.bench), Console(width=300, file=io.StringIO())
    console.print(view)
    printed, read = console.file.getvalue(), Parsed(page)
    written = Parsed(MarkdownIt("commonmark").enable("table").render(render_markdown(view)))
    said = [" ".join(row) for section in view.sections for t in section.parts if isinstance(t, Table) for row in t.rows]
    assert len(said) > 25
    for shown in (read.text, written.text, " ".join(re.sub("[─-╿]", " ", printed).split())):
        assert [row for row in said if " ".join(row.split()) not in shown] == []


def test_a_page_needs_nothing_from_elsewhere(page):
    read = Parsed(page)
    links = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert len(page) < 600_000


def test_charts_share_no_names_and_take_their_colours_from_the_page(page):
    names = re.findall(r"\bid=\"([^\"]+)\"", page)
    assert len(names) == len(set(names))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page)) <= set(names)
    body = page.partition("</style>")[2]
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", body)) == set()
    assert {f"var(--series-{n})" for n in (1, 2)} <= set(re.findall(r"var\(--[a-z0-9-]+\)", body))
    assert "currentColor" in body


def test_runs_that_do_not_compare_stand_apart():
    alike = [made(run="a"), made(run="b", quality=35.0, removed=0.2)]
    other_text = made(run="c", protocol="c4: 4 windows of 32 tokens")
    other_model = made(run="d", sha="x", model="acme/large")
    stopped = made(run="e")
    stopped = replace(stopped, report=replace(stopped.report, quality={}))
    groups, unmeasured = group_runs([other_text, *alike, other_model, stopped])
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["c"], ["d"]]
    assert [group.apart for group in groups] == ["", "another protocol", "another dense model"]
    assert [run.name for run in unmeasured] == ["e"]
    text = Parsed(render_report_page([alike[0], other_text, stopped])).text
    assert "Not comparable with the first group: another protocol." in text
    assert "quality was not measured: e" in text
    data = {"evaluation": {"source": "text.txt", "samples": 4, "inputs": {"input_ids": {"sha256": "other"}}}}
    other = replace(alike[1], report=replace(alike[1].report, data=data))  # by the same protocol
    assert [group.apart for group in group_runs([alike[0], other])[0]] == ["", "other text"]


@pytest.mark.parametrize(("dense", "best"), [(20.0, ["b", "a"]), (1.0, ["b", "c"])])
def test_the_front_is_what_no_other_run_beats(dense, best):
    """Less is better of a perplexity; more is better of a share, of which the dense model has 1."""
    qualities = {"a": (50, 0.5), "b": (30, 0.2), "c": (60, 0.5), "d": (60, 0.4)}
    if dense == 1:
        qualities = {"a": (0.5, 0.5), "b": (0.9, 0.2), "c": (0.6, 0.5), "d": (0.5, 0.5)}
    (group,), _ = group_runs([made(run=n, dense=dense, quality=q, removed=r) for n, (q, r) in qualities.items()])
    assert [run.name for run in find_front(group)] == best


def test_why_a_family_is_as_wide_as_it_is():
    run = made()
    asked = replace(run, report=replace(run.report, settings=replace(run.report.settings, keep=("hidden",))))
    narrowest = dict(run.report.families) | {"ffn": {"of": 40, "width": 8, "layers": 3}}
    assert explain_uncut(run.report, "v_dim") == "the class derives it"
    assert explain_uncut(asked.report, "hidden") == "kept whole on request (--keep)"
    assert explain_uncut(replace(run.report, families=narrowest), "ffn") == "no narrower width is legal"
    earlier = replace(run, report=replace(run.report, legal={}))
    assert "not recorded" in Parsed(render_report_page([earlier])).text


def test_a_map_shows_the_kept_units_and_many_units_only_if_layers_differ():
    few = FamilyPlan(2, 3, {"0": ((0, 1), (1, 2)), "1": ((0, 2), (0, 1))})
    assert map_kept_units(few).tolist() == [[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0]]
    alike = FamilyPlan(300, 500, {layer: (tuple(range(300)),) for layer in "01"})
    unlike = {
        f"ffn.{layer}": FamilyPlan(n, 500, {f"m.{layer}": (tuple(range(n)),)}) for layer, n in enumerate((300, 400))
    }
    report = SimpleNamespace(families={n: {"width": f.width, "of": 500} for n, f in unlike.items()})
    assert draw_kept_chart(Run("run", report, Plan({"ffn": alike})), "ffn") is None
    drawn = draw_kept_chart(Run("run", report, Plan(unlike)), "ffn")
    assert "share of ffn that each layer keeps" in drawn.text
    # Layers of their own width are one map.
    plan = Plan({"ffn.1": FamilyPlan(2, 4, {"model.layers.1.mlp": ((0, 3),)})})
    sizes = {"ffn.0": (4, 4), "ffn.1": (2, 4), "heads": (8, 8)}
    report = SimpleNamespace(families={name: {"width": width, "of": of} for name, (width, of) in sizes.items()})
    kept = Run("run", report, plan).kept
    assert {name: map_kept_units(each).tolist() for name, each in kept.items()} == {"ffn": [[1, 1, 1, 1], [1, 0, 0, 1]]}


def test_recovery_shows_the_loss_alone_and_widths_are_shares_of_which_equal_ones_have_one_line():
    def draw(phase, *rows):
        metrics = {phase: [{"step": i + 1, **row} for i, row in enumerate(rows)]}
        return draw_trace_charts(replace(made(), metrics=metrics), phase)

    (trace,) = draw("recovery", *[{"loss": 3.0, "lm": 2.0, "kl": 0.5}, {"loss": 1.5, "lm": 1.0, "kl": 0.5}])
    assert all(f">{name}<" in trace.text for name in ("loss", "lm", "kl"))
    _, widths = draw("masks", *[{"loss": 2.0, "width/ffn": 40.0, "width/q_heads": 3.0}] * 2)
    assert ">ffn, q_heads<" in widths.text
    assert len(draw("masks", {"loss": None}, {"loss": 2.0})) == 1, "a loss that is not finite is a gap"


def test_names_are_as_short_as_they_can_be():
    assert name_folders([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert name_folders([Path("x/m"), Path("y/m")]) == ["x/m", "y/m"]
    assert shorten_model_name("/home/me/models/small") == "small"
    assert shorten_model_name("/c/models--acme--small/snapshots/0a1b") == "acme/small"
    assert shorten_model_name("acme/small") == "acme/small"


@pytest.fixture(scope="module")
def folders(laboratory):
    """A tiny dense model, and two pruned folders of it: one not learned, one learned."""
    how = {"method": "maskprune", "learning": Learning(steps=4)}
    learned = laboratory.keep("page/learned", lambda out: laboratory.prune("decoder", out, **how))
    return str(laboratory.open_model()), [laboratory.open_pruned(), learned]


def test_the_command_writes_one_page_about_several_folders(folders, tmp_path):
    done("report", *folders[1], "--html", tmp_path / "page.html")
    page = Parsed((tmp_path / "page.html").read_text())
    assert "2 pruned models side by side" in page.text
    drawn = [value for name, value in page.attributes if name == "aria-label"]
    assert "learned: loss in phase masks" in drawn
    assert "the stock class" in page.text  # why rotary pairs are refused
    assert "not recorded" not in page.text


def test_a_report_shows_what_both_models_write_after_a_prompt(folders, tmp_path):
    dense, (folder, _) = folders
    prompts = ["w3 w5 w8", "w9", "w40 w41", "w70"]
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    page = tmp_path / "page.html"
    done("report", str(folder), *options, "--html", str(page))
    written = Parsed(page.read_text()).text
    models = (AutoModelForCausalLM.from_pretrained(dense), mptk.Pruned.open(folder).model)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    differ = set()
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt").input_ids
        ids = [m.generate(given, max_new_tokens=32, do_sample=False)[0, given.shape[1] :] for m in models]
        texts = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
        assert re.sub(r"\s+", " ", " ".join([prompt, *texts])) in written
        differ.add(texts[0] != texts[1])
    assert True in differ
    with expect_error(InputError, name="model"):
        CliRunner().invoke(app, ["report", str(folder), "--model", dense], catch_exceptions=False)


def test_damaged_metrics_and_a_report_of_another_kind_are_one_error(folders, tmp_path):
    broken = replace(made(), report=replace(made().report, cost={"dense": {}, "pruned": {}}))
    with expect_error(FileError):
        render_report_page([broken])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("report.json", "plan.json"):
        (damaged / name).write_bytes((folders[1][1] / name).read_bytes())
    (damaged / "metrics.jsonl").write_text('{"phase": "masks"')
    with expect_error(FileError):
        read_runs([damaged])


def test_analyze_draws_what_is_cut_together(folders, tmp_path):
    file = tmp_path / "analysis.html"
    done("analyze", folders[0], "--html", str(file))
    page = Parsed(file.read_text())
    assert "which modules of model.layers.0 are cut together" in [v for n, v in page.attributes if n == "aria-label"]
    assert "self_attn.o_proj.weight 48 × 60 0: hidden; 1: kv_groups, q_heads, v_dim" in page.text
    assert "feed-forward channels" in page.text
