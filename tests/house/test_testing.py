"""mptk.testing, as docs/plugins.md shows it to authors of plugins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mptk.errors import InputError
from mptk.testing import MODEL_KINDS, draw_tokens, expect_error, make_decoder

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


def test_the_tests_of_the_page_pass(laboratory, tmp_path):
    (block,) = re.findall(r"```python\n(import mptk\n.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for number, test in enumerate(tests):
        (tmp_path / str(number)).mkdir()
        test(laboratory, tmp_path / str(number))


def test_a_folder_is_made_once_and_a_copy_is_apart(laboratory, tmp_path):
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.mkdir()

    first, again = (laboratory.keep("of this test", make) for _ in range(2))
    assert first == again == made[0]
    assert len(made) == 1
    with expect_error(InputError, name="of this test"):
        laboratory.keep("of this test", lambda path: path.mkdir())
    copy = laboratory.copy(laboratory.open_model(), tmp_path / "copy")
    (copy / "config.json").unlink()
    assert (laboratory.open_model() / "config.json").is_file()


def test_a_model_is_the_same_each_time():
    first, again = (make_decoder("llama")(draw_tokens()).logits for _ in range(2))
    assert first.equal(again)
    assert set(MODEL_KINDS) > {"decoder", "encoder", "speech"}
