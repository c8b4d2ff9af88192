"""README.md of a pruned folder: metadata that a hub reads, figures of the report, lines of Python that run as they are.

It reaches for mptk.report.card: a card of made-up figures needs no run.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import mptk
from mptk import Report, testing
from mptk.publish import licence
from mptk.publish.manifest import check_manifest
from mptk.report.card import is_hub_id, render_results
from mptk.report.view import Name, Table, format_code, format_figure, render_parts, render_text

BASE = "a`b|<img src=x>[me](http:e)*x*"
SETTINGS = mptk.Settings(method="magnitude", widths={"ffn": 32}, families=("ffn",), data="random", samples=2, length=24)
LICENCE = "---\nlicense: mit\nlanguage: [en]\ntags: [secret]\n---\nA dense model.\n"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A small llama that was pruned with ONNX, from a folder with a hostile name, a card and a licence file."""
    source = tmp_path_factory.mktemp("dense") / BASE
    testing.save_model(testing.make_llama(), source)
    (source / "README.md").write_text(LICENCE)
    (source / "LICENSE").write_text("be kind")
    out = tmp_path_factory.mktemp("pruned") / "out"
    mptk.prune(str(source), out, replace(SETTINGS, align=8, quantize=("int8",)))
    return out


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def tokens(text: str) -> list[str]:
    found = MarkdownIt("commonmark").enable("table").parse(text)
    return [t.type for token in found for t in (token, *(token.children or ()))]


def test_metadata_is_what_a_hub_wants_with_the_dense_models_licence(pruned):
    card = ModelCard.load(pruned / "README.md").data.to_dict()
    said = {"license": "mit", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation"}
    assert {name: card[name] for name in said} == said
    assert {"pruned", "onnx"} <= set(card["tags"])
    assert "secret" not in card["tags"]
    assert "base_model" not in card  # a folder of this machine is no model of the hub
    assert (pruned / "LICENSE").read_text() == "be kind"
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M")
    assert not any(is_hub_id(name) for name in ("smollm2-135m", "/models/a", "../a/b", "a/b.gguf/c", "a/-b", "a/b c"))


def test_the_card_tells_the_reports_figures_and_belongs_to_the_folder(pruned):
    text, report = (pruned / "README.md").read_text(), Report.read(pruned)
    assert "README.md" in report.files
    check_manifest(pruned)
    assert str(pruned.parent) not in text
    assert str(Path(report.model).parent) not in text
    found = tokens(text.split("\n---\n", 1)[1])
    assert not {"html_inline", "html_block", "link_open", "image", "em_open"} & set(found), "names stay text"
    assert "table_open" in found
    for said in (
        "| `ffn` | 2 | 64 → 32 | 32, 64 | this width was given |",
        f"{report.cost['pruned']['parameters']:,.0f}",
        format_figure(report.quality["pruned"]),
        format_figure(report.quantized["int8"]["quality"]),
        report.quality["protocol"],
        *(d["stage"] for d in report.proof),
    ):
        assert said in text
    assert "training steps" not in text
    assert "FAILED |" in render_results(replace(report, proof=[{**report.proof[0], "ok": False}]))
    assert all(d.ok for d in mptk.verify(pruned))


def test_its_lines_of_python_run_in_the_folder(pruned, go_to, capsys):
    go_to(pruned)
    ran = [block for block in blocks(pruned) if "onnxruntime_genai" not in block]
    assert len(ran) == 2
    for block in ran:
        exec(block, {})  # noqa: S102
    assert "input_ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    "said", ["`", "``a`", "a|b", "<b>", "[x](y)", "# x\n---\n\n<b>", "\x1b[31m\u202e", "| `|` |", ""]
)
def test_any_text_is_text_and_one_cell(said):
    for plain in (tokens(f"A {format_code(said)} b"), tokens(f"A {render_text(said)} b")):
        assert set(plain) <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special", "code_inline"}
    assert tokens(render_parts([Table("ll", ["a", "b"], [[Name(said), said]])])).count("td_open") == 2


@pytest.mark.parametrize(
    "card", ["", "no metadata", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: 1}\n---\n"]
)
def test_a_dense_card_that_says_nothing_readable_gives_no_licence(card, tmp_path):
    assert licence.read_licence(tmp_path) == {}
    (tmp_path / "README.md").write_text(card)
    assert licence.read_licence(tmp_path) == {}


def test_a_licence_in_words_is_another_one():
    assert licence.make_licence_fields("Apache-2.0") == {"license": "apache-2.0"}
    terms = "Gemma Terms of Use"
    assert licence.make_licence_fields(terms) == {"license": "other", "license_name": terms}
