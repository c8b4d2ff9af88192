"""A setting that is declared once has an option, a key of recipes, a keyword, bounds, and cases in which it is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import pytest
import yaml
from typer.testing import CliRunner

from mptk.cli.app import (
    COMMANDS,
    DEFAULTS,
    Extension,
    Registered,
    app,
    build_command,
    carry_out,
    list_further_parameters,
    register_command,
)
from mptk.cli.options import Config, refuse_idle
from mptk.config import Asked, Choices, Idle, Record, declare_setting, find_settings, from_json, with_keywords
from mptk.config.recipe import collect_recorded
from mptk.config.setting import record
from mptk.errors import InputError
from mptk.testing import expect_error

KITCHEN, BAKE = "Kitchen", ("bake",)
COLD = Idle(lambda asked: not asked.settings.heat, "the oven is cold", "give {heat}, or leave it out")


@record
@dataclass(frozen=True)
class Dough(Record):
    """What is baked."""

    grains: tuple[str, ...] = declare_setting((), "Comma-separated.", KITCHEN, BAKE, choices=Choices(("rye", "oat")))
    seed: int = declare_setting(0, "Of the dough.")


@record
@dataclass(frozen=True)
class Oven(Record):
    """What is asked for."""

    heat: float = declare_setting(0.5, "How hot.", KITCHEN, BAKE, within=(0.0, 1.0))
    rack: str = declare_setting("top", "Where.", KITCHEN, BAKE, choices=Choices(("top", "low")), idle=(COLD,))
    space: int | None = declare_setting(None, "As 8GB.", KITCHEN, BAKE, form="size")
    widths: Mapping[str, int] = declare_setting({}, "As tin=3.", KITCHEN, BAKE, option="width")
    fan: bool = declare_setting(False, "A switch.", KITCHEN, BAKE, recipe="refused")
    light: bool = declare_setting(True, "On or off.", KITCHEN, (*BAKE, "clean"))
    seed: int = declare_setting(0, "Of the oven.", KITCHEN, BAKE)
    dough: Dough = field(default_factory=Dough)


@pytest.fixture
def baked():
    """What the command ``bake`` was asked for."""
    known, asked = list(app.registered_commands), list[Oven]()

    def bake(settings: Oven, config: Config = None) -> None:
        refuse_idle("bake", Asked(settings))
        asked.append(settings)

    bake.__annotations__ |= {"settings": Oven, "config": Config}
    register_command("bake", base=Oven())(bake)
    build_command(COMMANDS.pop("bake"), [], None)
    yield asked
    app.registered_commands[:] = known


@pytest.fixture
def run(baked):
    return lambda *words: CliRunner().invoke(app, ["bake", *words], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})


def test_options(baked, run):
    assert run().exit_code == 0
    words = "--heat 1 --rack low --space 2kB --width tin=3 --width cup=4 --fan --no-light --seed 7 --grains rye,oat"
    assert run(*words.split()).exit_code == 0
    first, second = baked
    assert first == Oven()
    dough = Dough(("rye", "oat"), seed=7)
    assert second == Oven(1.0, "low", 2000, {"tin": 3, "cup": 4}, fan=True, light=False, seed=7, dough=dough)


def test_help(run):
    shown = run("--help").stdout
    assert all(words in shown for words in ("How hot.", "[top|low]", "[rye,oat]", "--no-light", "default: 0.5"))
    assert "--no-fan" not in shown


@pytest.mark.parametrize(
    ("words", "shown"), [("--heat 2", "--heat"), ("--rack tip", "top"), ("--grains rye,oad", "oat")]
)
def test_values_that_are_typed_wrong(words, shown, run):
    result = run(*words.split())
    assert result.exit_code == 2
    assert shown in result.stderr


def test_an_option_that_would_do_nothing(run):
    assert run("--heat", "0").exit_code == 0
    refused = run("--heat", "0", "--rack", "low").exception
    assert isinstance(refused, InputError)
    assert refused.name == "rack"
    assert refused.remedy == "give --heat, or leave it out"


def test_recipes(baked, run, tmp_path):
    oven = Oven(0.0, "low", 2000, {"tin": 3}, light=False, dough=Dough(("rye",)))
    kept = collect_recorded(oven, "bake")
    assert kept["space"] == "2000B"
    assert set(find_settings(Oven, "bake")) - set(kept) == {"fan"}
    assert collect_recorded(oven, "clean") == {"light": False}
    (tmp_path / "bake.yaml").write_text(yaml.safe_dump(kept))
    assert run("--config", str(tmp_path / "bake.yaml")).exit_code == 0  # an idle rack of a recipe is not refused
    assert run("--config", str(tmp_path / "bake.yaml"), "--heat", "1").exit_code == 0
    assert (baked[0], baked[1].heat) == (oven, 1.0)


def test_keywords():
    found = with_keywords(Oven(), {"rack": "low", "grains": "rye", "seed": 3, "heat": 1})
    assert found == Oven(1, "low", seed=3, dough=Dough(("rye",), 3))
    assert with_keywords(found, {"dough": Dough(seed=1), "grains": ["oat"]}).dough == Dough(("oat",), 1)


@pytest.mark.features
@pytest.mark.parametrize(
    ("values", "name", "nearest"),
    [
        ({"haet": 1}, "haet", ["heat"]),
        ({"heat": 2}, "heat", None),
        ({"heat": float("nan")}, "heat", None),
        ({"heat": "1"}, "heat", None),
        ({"rack": "tip"}, "rack", ["top"]),
        ({"grains": ("oat", "oad")}, "grains", ["oat"]),
        ({"dough": 3, "grains": "rye"}, "dough", None),
    ],
)
def test_keywords_that_are_refused(values, name, nearest):
    with expect_error(InputError, name=name) as refused:
        with_keywords(Oven(), values)
    assert nearest is None or refused.value.nearest[0] == nearest[0]


def test_what_a_file_kept_is_checked():
    oven = Oven(space=3, dough=Dough(("rye",)))
    kept = asdict(oven)
    kept["dough"]["grains"] = ["rye"]  # as JSON has it
    assert from_json(Oven, {**kept, "later": 1, "declared": 1}, "oven") == oven
    for wrong in ({"heat": 2}, {"dough": 1}):
        with pytest.raises(ValueError, match="oven"):
            from_json(Oven, kept | wrong, "oven")


def test_the_docstring_lists_the_settings():
    assert "- ``heat``: How hot." in str(Oven.__doc__)


def test_options_of_two_features_for_one_command_are_refused_together():
    ran = list[str]()

    def large(model: str, large: bool = False) -> None:
        ran.append(f"large {model}")

    def small(model: str, small: bool = False) -> None:
        ran.append(f"small {model}")

    def plain(model: str) -> None:
        ran.append(f"plain {model}")

    command, own = Registered("plain", plain, (), DEFAULTS, None), inspect.signature(plain).parameters
    further = {
        each: list_further_parameters(each, own)
        for each in (Extension(large, "", (), "", None), Extension(small, "", (), "", None))
    }
    carry_out(command, further, {"model": "m", "large": False, "small": False})
    carry_out(command, further, {"model": "m", "large": False, "small": True})
    assert ran == ["plain m", "small m"]
    with expect_error(InputError):
        carry_out(command, further, {"model": "m", "large": True, "small": True})
