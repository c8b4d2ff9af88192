"""Text of unknown origin stays text: no markup, no escape sequence, no turned writing direction reaches a reader."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from mptk.cli.app import COMMANDS, app, build_command, register_command
from mptk.cli.console import PlainConsole
from mptk.plain import escape_text
from mptk.report.page.svg import inline_svg
from tests.bad_inputs.table import run

ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
EVIL = {
    "closing tag": ("[/x]", "[/x]"),
    "link": ("[link=https://evil.example]here[/link]", "[link=https://evil.example]here[/link]"),
    "hyperlink": ("\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\", r"\x1b]8;;https:"),
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "clear": ("\x1b[2J\x9b31m", r"\x1b[2J\x9b31m"),
    "bidi": ("gnp\u202egpj.exe\u2066", r"gnp\u202egpj.exe\u2066"),
    "emoji": (":smile:", ":smile:"),
    "half": ("caf\udce9", r"\udce9"),
    "script": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "formula": (r"$\frac{1}$", r"$\frac{1}$"),
    "lines": ("a\u2028b\x85c", r"a\u2028b\x85c"),
}


@pytest.fixture(autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def test_ordinary_text_of_any_script_stays_as_it_is():
    text = "naïve café 漢字 \N{GRINNING FACE} نص\n\tline"
    assert escape_text(text) == text
    assert escape_text(text, lines=False).endswith(r"\n\tline")


@pytest.mark.parametrize("kind", EVIL)
def test_the_console_prints_it_as_text(kind, capsys):
    evil, shown = EVIL[kind]
    table = Table(evil, title=evil)
    table.add_row(evil)
    table.add_row(Text(evil))
    console = PlainConsole()
    console.print(table, evil, soft_wrap=True)
    printed = capsys.readouterr().out
    assert not ACTS.search(printed)
    assert printed.count(shown) >= 4, printed


@pytest.mark.parametrize("kind", EVIL)
def test_names_in_errors(kind, tmp_path):
    evil, shown = EVIL[kind]
    name = evil.replace("/", "_")
    (tmp_path / name).mkdir()
    lines = [["analyze", str(tmp_path / name)], ["report", str(tmp_path / name)], ["prune", "m", f"--{name}"], [name]]
    for line in lines:
        result = run(line)
        assert result.code in (1, 2)
        (said,) = result.errors
        whole = kind != "lines" and not ("=" in name and "option" in said)  # typer shows the name before the sign
        assert not whole or shown.replace("/", "_") in said.replace("\\\\", "\\"), said
        assert not ACTS.search(result.stderr)


def write_evil_report(file: Path, evil: str) -> None:
    """Text that may be anything, in every field of the report that is text."""
    report = json.loads(file.read_text())
    report["model"] = report["settings"]["method"] = evil
    report["notes"] = report["files"] = [evil]
    report["families"][evil] = {"of": 8, "width": 4, "layers": 2}
    report["quality"] |= {"metric": evil, "protocol": evil}
    report["quantized"] = {evil: {"file": evil, "bytes": 7, "quality": 1.0}}
    report["stages"][0]["name"] = report["proof"][0]["stage"] = evil
    report["proof"][0]["widened"] = evil
    report["versions"], report["splits"] = {evil: evil}, {evil: 1.0}
    report["data"]["calibration"]["source"] = evil
    file.unlink()
    file.write_text(json.dumps(report))


@pytest.mark.features
@pytest.mark.parametrize("kind", EVIL)
def test_a_report_on_the_screen_and_as_a_page(kind, laboratory, tmp_path):
    evil, shown = EVIL[kind]
    folder = laboratory.copy(laboratory.open_quantized(), tmp_path / "pruned")
    write_evil_report(folder / "report.json", evil)
    result = run(["report", str(folder)])
    if kind == "half":
        assert result.code == 1
        assert "half of a surrogate pair" in result.errors[0]
        return
    assert result.code == 0, result.stderr
    assert not ACTS.search(result.stdout)
    assert result.stdout.count(shown) >= 8, result.stdout
    result = run(["report", str(folder), "--html", str(tmp_path / "page.html")])
    assert result.code == 0, result.stderr
    page = (tmp_path / "page.html").read_text()
    assert not ACTS.search(page)
    assert "<script" not in page
    assert page.count(shown.replace("<", "&lt;").replace(">", "&gt;")) >= 8


@pytest.mark.parametrize("kind", sorted(EVIL.keys() - {"half"}))
def test_a_picture_has_a_plain_name(kind):
    """Its label may be the name of a phase in metrics.jsonl."""
    evil, _ = EVIL[kind]
    drawn = inline_svg('<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>', f"losses of {evil}").text
    assert not ACTS.search(drawn)
    assert ET.fromstring(drawn).get("aria-label") == f"losses of {escape_text(evil)}"


def test_nothing_is_lost_at_the_edge_of_a_terminal(capsys):
    """What is written out is longer than what it stands for, so it comes before the lines are broken."""
    evil = "\x1b]8;;" * 20
    console = PlainConsole()
    console.width = 21
    console.print(Text(evil))
    assert capsys.readouterr().out.replace("\n", "") == escape_text(evil)


@pytest.mark.features
def test_a_model_and_data_with_such_names(laboratory, tmp_path):
    name = "[_x]\x1b]8;;evil\x07\u202e"
    laboratory.copy(laboratory.open_model(), tmp_path / name)
    laboratory.copy(laboratory.open_data(), tmp_path / f"{name}.txt")
    line = ["eval", str(tmp_path / name), "--data", str(tmp_path / f"{name}.txt"), "--windows", "2", "--length", "16"]
    result = run(line, width=60)
    assert result.code == 0, result.stderr
    assert r"[_x]\x1b]8;;evil\u202e.txt" in result.stdout.replace("\n", "")
    assert not ACTS.search(result.stdout + result.stderr)
    result = run([*line, "--json", "-"])
    assert json.loads(result.stdout)["model"] == str(tmp_path / name)
    assert not ACTS.search(result.stdout)


@pytest.fixture
def wrong_command():
    """The name of a command with a bug."""
    known = list(app.registered_commands)

    def divide():
        print(1 / 0)

    register_command("divide")(divide)
    build_command(COMMANDS.pop("divide"), [], None)
    yield "divide"
    app.registered_commands[:] = known


def test_mptks_own_error_has_a_log_and_an_exit_code(set_cache, wrong_command, tmp_path):
    set_cache(tmp_path)
    result = run([wrong_command])
    assert result.code == 70
    (line,) = result.errors
    assert "ZeroDivisionError" in line
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in line
    assert "Traceback" in log.read_text()
