"""The stage ``config``: nothing differs from the dense model's config but what is listed, in any architecture."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from mptk import testing
from mptk.errors import ProofError
from mptk.io import make_portable_config, models
from mptk.targets.stock import Written
from mptk.targets.stock_config import check_written_config, find_config_changes
from mptk.testing import expect_error
from mptk.trust import NO_CODE
from passes.targets.stock.config import StockConfig
from passes.targets.stock.emit import write_checkpoint


def write(
    folder: Path, model: str | PreTrainedModel, *, changed: dict[str, Any] | None = None, listed: bool = True
) -> Written:
    """The model saved and written again, with another config if one is asked for; weights whose shapes stay."""
    dense = testing.make_decoder(model) if isinstance(model, str) else model
    dense.save_pretrained(folder / "dense")
    loaded = models.load(str(folder / "dense"))
    config, state = copy.deepcopy(loaded.model.config), loaded.model.state_dict()
    changes = {field: (getattr(config, field), value) for field, value in (changed or {}).items()}
    for field, (_, value) in changes.items():
        setattr(config, field, value)
    stock = StockConfig(type(loaded.model), config, changes if listed else {})
    (folder / "out").mkdir()
    write_checkpoint(state, stock, loaded.model, None, folder / "out", portable=make_portable_config)
    return Written(stock, loaded, config, loaded.dtype)


@pytest.mark.parametrize("name", testing.DECODERS)
def test_a_config_that_was_only_written_again_is_equal(tmp_path, name):
    written = write(tmp_path, name)
    assert check_written_config(written, tmp_path / "out", NO_CODE).ok
    assert find_config_changes(written, tmp_path) == {}


def test_numbers_that_are_not_finite_are_equal_too(tmp_path):
    sizes = {"num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 4, "n_groups": 1, "vocab_size": 30}
    config = Mamba2Config(**sizes, num_hidden_layers=1, time_step_limit=(0.0, math.inf))
    written = write(tmp_path, Mamba2ForCausalLM(config))
    assert check_written_config(written, tmp_path / "out", NO_CODE).ok


def test_a_type_that_changes_is_told_if_the_dense_config_names_one(tmp_path):
    written = replace(write(tmp_path, "llama"), dtype=torch.bfloat16)
    assert find_config_changes(written, tmp_path) == {"dtype": ["float32", "bfloat16"]}
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if "dtype" not in k}))
    assert find_config_changes(written, tmp_path) == {}


def test_a_listed_change_may_differ_and_another_may_not(tmp_path):
    changed = {"rms_norm_eps": 2e-6}
    written = write(tmp_path / "listed", "llama", changed=changed)
    assert check_written_config(written, tmp_path / "listed" / "out", NO_CODE).ok
    assert find_config_changes(written, tmp_path) == {"rms_norm_eps": [1e-6, 2e-6]}
    written = write(tmp_path / "silent", "llama", changed=changed, listed=False)
    with expect_error(ProofError, name="config"):
        check_written_config(written, tmp_path / "silent" / "out", NO_CODE)


@pytest.mark.parametrize(("file", "change"), [("config.json", {"use_cache": False}), ("generation_config.json", None)])
def test_every_field_counts_and_every_file(tmp_path, file, change):
    written = write(tmp_path, "llama")
    path = tmp_path / "out" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with expect_error(ProofError, name="config"):
        check_written_config(written, tmp_path / "out", NO_CODE)
