"""Models of every kind in memory, with data in memory: what ``mptk.prune`` makes of them.

It reaches for mptk.tasks and mptk.io.live: whether the kind is the right one.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mptk
from mptk import Samples
from mptk.errors import DataError, ModelError
from mptk.io import open_live
from mptk.ir import make_token_samples
from mptk.run.given import collect_samples
from mptk.targets.graph import WEIGHTS
from mptk.tasks import bind_task
from mptk.testing import MODEL_KINDS, SENTENCES, expect_error, make_llama, make_tokenizer

SMALL = {"method": "wanda", "sparsity": 0.3, "tolerance": 0.2, "align": 2, "samples": 4}
SMALL |= {"length": 12, "eval_windows": 3, "eval_length": 12, "progress": None}


def ids(count: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 97, (count, length))


DATA = {
    "text classifier": lambda: {"input_ids": ids(), "labels": torch.arange(4)},
    "encoder-decoder": lambda: {"input_ids": ids()},
    "image classifier": lambda: [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.arange(2)}] * 3,
}


@pytest.mark.parametrize("name", list(DATA))
def test_every_kind_is_pruned_in_memory(name):
    model = MODEL_KINDS[name].make()
    found = mptk.prune(model, data=DATA[name](), distil_epochs=1, **SMALL)
    assert (found.report.task, found.report.quality["metric"]) == (MODEL_KINDS[name].task, MODEL_KINDS[name].metric)
    assert [note for note in found.report.notes if note.startswith("local distillation made")]
    assert type(found.model) is type(model)
    assert sum(p.numel() for p in found.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_example_inputs_make_a_module_of_a_transformers_model(tmp_path):
    """Its stock class still holds it, and what counts is the distance of its outputs."""
    model = MODEL_KINDS["encoder"].make()
    example = {"input_ids": ids(2, 9), "token_type_ids": torch.ones(2, 9, dtype=torch.int64)}
    found = mptk.prune(model, tmp_path / "out", example_inputs=example, onnx=False, **SMALL)
    assert (found.report.task, found.report.quality["metric"]) == ("module", "distance")
    assert type(found.model) is type(model)
    model.save_pretrained(tmp_path / "dense")
    assert all(d.ok for d in mptk.verify(tmp_path / "out", model=str(tmp_path / "dense")))


def test_samples_and_texts_are_the_same_data():
    """Windows that the caller cuts are those that mptk cuts of the texts."""
    words = make_tokenizer()
    loaded = open_live(make_llama(layers=1), words)
    stream = torch.tensor(words(SENTENCES * 4, add_special_tokens=False)["input_ids"])
    windows = stream[: len(stream) // 12 * 12].reshape(-1, 12)[:4]
    for data in ([SENTENCES] * 4, windows, make_token_samples(windows), list(windows[:, None]), list(windows)):
        found = collect_samples(data, loaded, bind_task(loaded), 4, 12)
        assert torch.equal(found.inputs["input_ids"], windows)
        assert torch.equal(found.targets, make_token_samples(windows).targets)


class Convolutions(nn.Module):
    """Batch norms between convolutions, and class scores of their means."""

    def __init__(self) -> None:
        super().__init__()
        first, last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 20, 3, padding=1)
        self.layers = nn.Sequential(first, nn.BatchNorm2d(24), nn.ReLU(), last, nn.BatchNorm2d(20), nn.ReLU())
        self.head = nn.Linear(20, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(image).mean((2, 3)))


def test_convolutions_and_their_statistics_are_cut(tmp_path):
    net = Convolutions()
    net(torch.randn(8, 3, 10, 10))  # running statistics that are not 0 and 1
    found = mptk.prune(net, tmp_path / "out", example_inputs=torch.randn(4, 3, 10, 10), **SMALL)
    small = found.model
    assert small.layers[1].running_mean.shape == small.layers[0].bias.shape
    assert small.layers[0].bias.shape[0] < 24
    assert net.training
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert all(d.ok for d in mptk.verify(tmp_path / "out", model=net))


class Tabular(nn.Module):
    """Whole numbers of a fixed length, which no proof may cut or repeat as it does with tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(60 * 6, 32), nn.Linear(32, 1)

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.table(columns).flatten(1)).relu()).squeeze(1)


def test_whole_numbers_are_no_sequence(tmp_path):
    net, columns = Tabular(), torch.randint(0, 11, (6, 60))
    found = mptk.prune(net, tmp_path / "out", example_inputs=columns, families="ffn", **SMALL)
    assert found.model(columns).shape == (6,)
    assert all(d.ok for d in mptk.verify(tmp_path / "out", model=net))


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()).sum()


def test_outputs_without_samples_and_samples_of_other_inputs_are_refused():
    with expect_error(ModelError, name="Total"):
        mptk.prune(Total(), example_inputs=torch.randn(4, 6), **SMALL)
    with expect_error(DataError, name="input_ids"):
        mptk.prune(MODEL_KINDS["encoder"].make(), data=Samples({"words": ids()}), **SMALL)
