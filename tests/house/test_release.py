"""What ``make release`` looks at before it builds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mptk.errors import InputError
from mptk.testing import expect_error
from tests.release import IMPORTS, choose_extras, list_commands, list_faults

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWNED = PROJECT | {"urls": {"Repository": "https://example.org/me/mptk"}}


def test_every_extra_for_users_is_tried():
    assert set(IMPORTS) == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
    assert choose_extras("all") == list(IMPORTS)
    assert choose_extras("eval,images") == ["eval", "images"]
    with expect_error(InputError, name="evil"):
        choose_extras("evil")


@pytest.mark.parametrize(
    ("changelog", "project", "faults"),
    [
        ("## [{}] - 2026-12-01\n", OWNED, 0),
        ("## [{}] - unreleased\n", OWNED, 1),
        ("## [9.9.9] - 2026-12-01\n", OWNED, 1),
        ("## [{}] - unreleased\n", PROJECT, 2),
    ],
)
def test_what_the_owner_must_still_write_is_said(changelog, project, faults):
    assert len(list_faults(changelog.format(PROJECT["version"]), project)) == faults


def test_the_commands_name_the_version():
    said = list_commands(OWNED, "1.2.3")
    assert "git push origin v1.2.3" in said
    assert "twine upload dist/*" in said
