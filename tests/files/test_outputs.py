"""Nothing that a command or a call reads is replaced or changed, and no file that mptk did not write."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from commands import done
from typer.testing import CliRunner

import mptk
from mptk import testing
from mptk.cli.main import app
from mptk.cli.options import OPERANDS, READ_PLACES, SAMPLES_FROM, OutputOption
from mptk.errors import OutputError
from mptk.files import write_json
from mptk.files.outputs import check_apart, check_file
from mptk.publish.folder import publish
from mptk.testing import expect_error

COMMANDS = {str(each.name): inspect.signature(each.callback).parameters for each in app.registered_commands}
READ = (*OPERANDS, *READ_PLACES, *SAMPLES_FROM)
WORDS = {"prompts": "once", "size": "0.2", "alias": "smollm2-135m", "repo": "me/model"}
"""Arguments that name nothing on this machine."""
FOLDERS = ("folder", "folders", "larger", "models", "include_path", "teacher_cache")


def outputs_of(command: str) -> dict[str, OutputOption]:
    parts = {name: getattr(each.annotation, "__metadata__", ()) for name, each in COMMANDS[command].items()}
    return {name: part for name, each in parts.items() for part in each if isinstance(part, OutputOption)}


def test_each_path_is_known_as_what_is_read_or_written():
    for command, parameters in COMMANDS.items():
        written = outputs_of(command)
        for name, each in parameters.items():
            kinds = get_args(each.annotation) + tuple(
                inner for kind in get_args(each.annotation) for inner in get_args(kind)
            )
            argument = any(type(part).__name__ == "ArgumentInfo" for part in kinds)
            if Path in kinds or argument:
                assert name in (*written, *READ, *WORDS), f"{command}: {name} is neither read nor written"
        files = [name for name, each in written.items() if each.content]
        assert not files or "overwrite" in parameters, command


def cases() -> Iterator[Any]:
    for command, parameters in COMMANDS.items():
        for output in outputs_of(command):
            for operand in READ:
                if operand in parameters and operand not in outputs_of(command):
                    yield pytest.param(command, output, operand, id=f"{command}-{output}-{operand}")


def words_of(command: str, given: dict[str, list[Path]]) -> list[object]:
    """A command line with these values, and with anything for what else it needs."""
    words: list[object] = [command]
    for name, each in COMMANDS[command].items():
        kinds = getattr(each.annotation, "__metadata__", ())
        argument = any(type(part).__name__ == "ArgumentInfo" for part in kinds)
        found = given.get(name) or ([WORDS[name]] if argument and name in WORDS else None)
        if found is None and each.default is inspect.Parameter.empty and name not in ("ctx", "settings"):
            found = ["unlike/it" + (".gguf" if command == "gguf" else "")]
        for value in found or []:
            flag = next((part.flag for part in kinds if isinstance(part, OutputOption) and part.flag), f"--{name}")
            words += [value] if argument else [flag.replace("_", "-"), value]
    return words


@pytest.mark.parametrize(("command", "output", "operand"), list(cases()))
def test_no_output_replaces_what_the_command_reads(command, output, operand, tmp_path):
    suffix = {"plot": ".png", "GGUF": ".gguf"}.get(outputs_of(command)[output].content, "")
    source, file = tmp_path / "source", tmp_path / f"source{suffix}"
    if operand in FOLDERS or (operand == "model" and command != "recover"):
        source.mkdir()
        (source / f"weights{suffix}").write_bytes(b"precious")
        (tmp_path / "link").symlink_to(source, target_is_directory=True)
        places = [source / f"weights{suffix}", source / "inner" / f"new{suffix}", tmp_path / "link" / f"new{suffix}"]
    else:
        file.write_bytes(b"{}")
        os.link(file, tmp_path / f"other{suffix}")
        source, places = file, [file, tmp_path / f"other{suffix}"]
    before = sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    for place in places:
        check_refusal(place, *words_of(command, {operand: [source], output: [place]}), "--overwrite")
        assert sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


def check_refusal(place: Path, *words: object) -> None:
    """A command refuses to write ``place``."""
    refused = CliRunner().invoke(app, [str(word) for word in words]).exception
    assert isinstance(refused, OutputError), repr(refused)
    assert refused.name == str(place)


@pytest.mark.features
def test_outputs_of_one_command_are_apart(tmp_path):
    model, page, inner = tmp_path / "model", tmp_path / "page", tmp_path / "o" / "s.json"
    model.mkdir()
    check_refusal(page, "analyze", model, "--json", page, "--html", page)
    check_refusal(inner, "shapes", model, "--out", tmp_path / "o", "--json", inner)


def test_a_file_is_replaced_only_if_mptk_wrote_it_or_on_request(tmp_path):
    file = tmp_path / "ops.json"
    file.write_text("mine")
    check_refusal(file, "ops", "--json", file)
    assert file.read_text() == "mine"
    done("ops", "--json", file, "--overwrite")
    done("ops", "--json", file)
    kept = {"kept": [json.loads(file.read_text())]}
    write_json(file, kept)
    check_refusal(file, "ops", "--json", file)
    assert json.loads(file.read_text()) == kept
    file.write_text("")
    done("ops", "--json", file)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    check_refusal(link, "ops", "--json", link, "--overwrite")


def test_a_plan_replaces_only_plans(tmp_path):
    plan, file = mptk.Plan({}), tmp_path / "plan.json"
    for _ in range(2):
        plan.save(file)
    file.write_text('{"format": "mptk-report/1"}')
    with expect_error(OutputError, name=file):
        plan.save(file)
    plan.save(file, overwrite=True)
    assert mptk.Plan.load(file).families == {}
    with expect_error(OutputError, name=file):
        check_file(file, "JSON")


@pytest.mark.parametrize("kind", ["advice", "analysis", "bench", "eval", "ops", "rerun", "shapes"])
def test_results_of_commands_replace_each_other(kind, tmp_path):
    write_json(tmp_path / "result.json", {"format": f"mptk-{kind}/1", "rows": [1] * 10**5})
    check_file(tmp_path / "result.json", "JSON")


def test_python_replaces_no_graph_of_others(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08 of somebody")
    with expect_error(OutputError, name=tmp_path / "model.onnx"):
        mptk.export(testing.make_llama(), tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == b"\x08 of somebody"


@pytest.mark.features
@pytest.mark.parametrize(
    ("call", "given"),
    [
        ("prune", {"out": "model/inner"}),
        ("prune", {"out": "out", "plan": "out/plan.json"}),
        ("prune", {"out": "new", "teacher": "cached", "teacher_cache": "model/cache"}),
        ("ladder", {"out": "model/sizes", "sparsities": [0.2, 0.4], "method": "wanda"}),
        ("shapes", {"out": "model/shapes", "sparsity": 0.3}),
    ],
)
def test_keywords_in_python_are_outputs_too(call, given, tmp_path, go_to):
    go_to(tmp_path)
    testing.save_model(testing.make_llama(layers=1), Path("model"))
    Path("out").mkdir()
    mptk.Plan({}).save("out/plan.json")
    Path("out/mptk.json").write_text('{"format": "mptk-output/1", "files": {"plan.json": ""}}')
    before = sorted(map(str, tmp_path.rglob("*")))
    with expect_error(OutputError):
        getattr(mptk, call)("model", progress=None, overwrite=True, **given)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.features
def test_a_size_of_a_ladder_is_not_written_into_it(tmp_path):
    """There it would replace a part of the ladder, or be a file that was added: either makes the ladder unusable."""
    ladder = tmp_path / "ladder"
    with publish(ladder) as new:
        (new / "rungs" / "0.2").mkdir(parents=True)
        (new / "rungs" / "0.2" / "mptk.json").write_text("{}")
    for place in (ladder / "rungs" / "0.2", ladder / "new", ladder):
        with expect_error(OutputError, name=place) as refused:
            mptk.rung(ladder, 0.2, place, overwrite=True)
        assert "overwrite" not in str(refused.value)


def test_files_behind_links_of_a_folder_are_inputs(tmp_path):
    blob, snapshot = tmp_path / "blobs" / "abc", tmp_path / "snapshot"
    for folder in (blob.parent, snapshot):
        folder.mkdir()
    blob.write_text("weights")
    (snapshot / "model.safetensors").symlink_to(blob)
    with expect_error(OutputError, name=blob):
        check_apart(blob, snapshot)
