"""The commands and the Python blocks of the README and the docs, each page in a folder of its own.

The folder holds what the page speaks of: TEXT, MODEL, a tiny model in the cache under each packaged alias, and a pruned
folder under each name in runs/ that only other pages write. All Python blocks run, and the commands of the pages that a
newcomer follows first, or whose blocks read what commands wrote. They run on few short samples, and without ONNX where
no later line needs a graph. All other commands are checked, as the command line does before its work; so are those
whose result nothing on their page reads. A block or a line that says that it needs a network, a GPU or another program
is skipped.

It reaches for mptk.run.minutes: training takes two steps here.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
import toy_checkpoints as toys
import typer
from docs_blocks import MARK, PAGES, ROOT, Block, blocks, inline
from inside import Inside
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import mptk
import mptk.run.minutes
from mptk import testing
from mptk.cli.app import check_words
from mptk.cli.main import app
from mptk.features.packaged.wheels import ALIASES, _locate_target, hash_content
from passes.analysis.rules import RULES

GROUP = typer.main.get_command(app)
SLOW = re.compile(r"--max-(decode|prefill)-ms|--budget latency|--batches")
"""Options that time each operator of the machine first, or many cases."""
FOLLOWED = ("README.md", "docs/tutorial.md", "docs/report.md")
FOLLOWED += ("docs/how-to/dual-encoder.md", "docs/how-to/vision-language.md")
"""The pages whose commands are run."""
CHECKED = ("README.md", "docs/tutorial.md", "docs/how-to/", "docs/vocabulary.md")
"""The pages whose other commands are checked: they name files that are there. Those of others are only parsed."""
WRITE = ("prune", "recover")
PRINT = ("analyze", "verify", "eval")
"""What only prints. The tests of a how-to's feature run it on such a folder, so the how-to itself only checks it."""
FEW = {"--samples": "4", "--length": "32", "--eval-windows": "2", "--eval-length": "32", "--rounds": "2"}
"""What commands get that do not name it themselves."""
SIZES = {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 320}
SIZES["max_position_embeddings"] = 1024
"""Feed-forward layers as wide as those of SmolLM2-135M, since pages name widths of it; a row for each token."""


@pytest.fixture(scope="module", autouse=True)
def model(quick_bench, tmp_path_factory):
    """The folder of a tiny model, which the cache has under each alias, too.

    To be quick, ``--minutes`` chooses two steps instead of up to 200.
    """
    words, model = testing.make_tokenizer(), testing.make_llama(layers=1, **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        inside = Inside(patch)
        patch.setenv("MPTK_CACHE", str(tmp_path_factory.mktemp("cache")))
        for bound in ("LEAST_STEPS", "MOST_STEPS", "MOST_TIMED_STEPS"):
            inside.bound(f"mptk.run.minutes.{bound}", 2)
        for name, path in {name: _locate_target(name) for name in ALIASES}.items():
            path.parent.mkdir(parents=True)
            if ALIASES[name].folder:
                _bert().save_pretrained(path)
                words.save_pretrained(path)
            else:
                toys.write_gguf(model, words, path)
            patch.setitem(ALIASES, name, replace(ALIASES[name], sha256=hash_content(path)))
        yield Path(testing.save_model(model, tmp_path_factory.mktemp("model"), words))


@pytest.fixture
def reader(page, model, laboratory, tmp_path, go_to):
    """The folder in which the reader of a page works."""
    folder = tmp_path / "reader"
    for name in ("MODEL", "DENSE", "HuggingFaceTB/SmolLM2-135M"):
        laboratory.copy(model, folder / name)
    _texts(folder)
    words = [word for line in _list_lines(page) for word in shlex.split(line, comments=True)]
    written = {word for option, word in pairwise(words) if option == "--out"}
    for name in {word for word in words if re.fullmatch(r"runs/\w+|DIR", word)} - written:
        laboratory.copy(laboratory.open_pruned(), folder / name)
    go_to(folder)
    before = dict(RULES)
    yield folder
    RULES.clear()
    RULES.update(before)


def _bert() -> BertModel:
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 1536, "num_hidden_layers": 1}
    return BertModel(BertConfig(vocab_size=300, max_position_embeddings=512, **sizes))


def _texts(folder: Path) -> None:
    """The files that commands name; ``run.yaml`` is the recipe of docs/command-line.md."""
    text = " ".join(f"wizard {n} has {n * n} jars of honey\n" for n in range(250))
    names = (
        "TEXT OTHER FILE wiki.valid.raw wiki.test.raw wikitext2 shakespeare.txt code/a.txt docs/report.md CHANGELOG.md"
    )
    for name in names.split():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "c4.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in text.splitlines()))
    (recipe,) = [block for block in blocks("docs/command-line.md") if block.kind == "yaml"]
    (folder / "run.yaml").write_text(recipe.text)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, tmp_path):
    scope: dict[str, Any] = {}
    for block in blocks(page):
        if block.kind == "commands":
            for line in block.lines:
                if not (block.marked or MARK.search(line)):
                    _command(line, page, tmp_path)
        elif block.kind == "python" and not block.marked:
            _python(block, scope or _names(), tmp_path / "block.py", scope)
    for line in inline(page):
        _has_options(line)


def _command(line: str, page: str, folder: Path) -> None:
    """Run a line, or read it if it is none of ours or takes long."""
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line).replace(" …", "").replace(" MODEL ", " smollm2-135m ")
    words = shlex.split(line, comments=True)
    if words[0] == "mptk" and page in FOLLOWED and not SLOW.search(line) and _is_read(words, page):
        _run(words[1:], page)
    elif words[0] == "mptk" and page.startswith(CHECKED) and "-h" not in words:
        check_words(words[1:])
    elif words[:2] == ["python", "-c"]:
        (folder / "line.py").write_text(words[2])
        run_path(str(folder / "line.py"))
    elif "mptk" in (words[0], words[words.index("-m") + 1] if "-m" in words else ""):
        _parses(line[line.index("mptk") :])
    elif words[:2] == ["python", "-m"]:
        _known(words[2], [word for word in words[3:] if word.startswith("--")])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    else:
        assert words[:2] == ["pip", "install"], f"not ours, so it needs a mark above it (docs_blocks.MARK): {line}"
        for extra in re.findall(r"\[(\w+)\]", line):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def _run(words: list[str], page: str) -> None:
    """Run a command, in two steps of training."""
    words = ["2" if option == "--steps" else word for option, word in zip(("", *words), words, strict=False)]
    if words[0] in WRITE and not _has_graph_read(words[-1], page) and "--quantize" not in words:
        words.append("--no-onnx")
    known = {flag for option in GROUP.commands[words[0]].params for flag in option.opts}  # type: ignore[attr-defined]
    words += [each for flag in known & FEW.keys() - {*words} for each in (flag, FEW[flag])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"mptk {shlex.join(words)}: {done.output} {done.exception!r}"


def _list_lines(page: str) -> list[str]:
    return [line for block in blocks(page) if block.kind == "commands" for line in block.lines]


def _is_read(words: list[str], page: str) -> bool:
    """Whether another line of the page names the folder that a command writes; of what writes none, what is run."""
    if words[1] in PRINT and "how-to" in page:
        return False
    lines = [shlex.split(line, comments=True) for line in _list_lines(page)]
    return words[1] not in WRITE or sum(words[-1] in others for others in lines) > 1


def _has_graph_read(folder: str, page: str) -> bool:
    """Whether a line of the page runs the graph of a folder, whose writing takes most time."""
    return any(re.match(rf"mptk (bench|generate|rerun) .*{folder}\b", line) for line in _list_lines(page))


def _parses(line: str) -> None:
    """What the command line's parser says of a line; words that stand for files need not exist."""
    words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
    with GROUP.make_context("mptk", list(words)) as context:
        name, command, rest = GROUP.resolve_command(context, words)  # type: ignore[attr-defined]
        command.make_context(name, rest, parent=context)


def _has_options(line: str) -> None:
    """A command in the text may be a part of one: its name and options exist."""
    name, *words = shlex.split(line)[1:]
    known = {flag for option in GROUP.commands[name].params for flag in (*option.opts, *option.secondary_opts)}  # type: ignore[attr-defined]
    assert {word for word in words if word.startswith("--")} <= known, line


def _known(module: str, options: list[str]) -> None:
    """Every option of a benchmark is one of its command's."""
    program = typer.Typer()
    program.command()(import_module(module).main)
    command = typer.main.get_command(program)
    assert set(options) <= {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}, (
        module
    )


def _python(block: Block, names: dict[str, Any], file: Path, scope: dict[str, Any]) -> None:
    """Run a block after those before it on its page."""
    file.write_text(block.text)
    scope.update(run_path(str(file), init_globals=names))


def _names() -> dict[str, Any]:
    """What a reader of a page has before its first block."""
    net = torch.nn.Sequential(torch.nn.Linear(7, 320), torch.nn.ReLU(), torch.nn.Linear(320, 5))
    model = testing.make_llama(layers=1, **SIZES)
    model.name_or_path = model.config._name_or_path = str(Path("MODEL").resolve())
    analysis = mptk.analyze(mptk.trace(model, dynamic=True))
    return {
        "model": model,
        "texts": Path("TEXT").read_text().splitlines(),
        "net": net,
        "x": torch.randn(2, 7),
        "loader": [torch.randn(2, 7)],
        "analysis": analysis,
        "windows": torch.randint(300, (4, 32)),
    }


def test_lines_of_the_makefile_parse():
    lines = re.findall(r"^\t\$\(BIN\)/(mptk .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        _parses(line.split(" || ")[0])
