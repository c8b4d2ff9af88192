"""``mptk.prune`` from Python: models by name and in memory, keywords, data in memory; what ``Pruned`` gives.

It reaches for mptk.config.setting: every keyword is compared with its declaration.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mptk
from mptk import Settings, testing
from mptk.config import IN_MEMORY
from mptk.errors import FileError, InputError, ProofError
from mptk.ir import PassResult, ProgramModule
from mptk.testing import expect_error

SMALL = {"sparsity": 0.3, "align": 4, "samples": 4, "length": 24, "eval_windows": 3, "eval_length": 24}
SMALL |= {"progress": None, "onnx": False}
TEXTS = [testing.SENTENCES, "seven wizards mix blue jars of honey while the fox jumps over the lazy dog\n" * 8]


@pytest.fixture(scope="module")
def pruned():
    """A live model, pruned with texts in memory; nothing is written."""
    found = mptk.prune(
        testing.make_llama(layers=1), method="magnitude", data=TEXTS, tokenizer=testing.make_tokenizer(), **SMALL
    )
    assert found is not None
    assert found.folder is None  # here, for a test saves it
    return found


def test_a_model_in_memory_stays_as_it_is():
    model = testing.make_llama(layers=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mptk.prune(model, method="taylor", data=torch.randint(3, 300, (4, 24)), **SMALL)
    assert model.training
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "given", "used"),
    [
        ("ffn", {}, {"rank": 0, "lr": 3e-5}),  # of weights whose root mean square is 0.02
        ("hidden", {"method": "magnitude", "sparsity": 0.25}, {"rank": 16, "lr": 3e-4}),
        ("ffn", {"masks": "hard"}, {"rank": 0, "lr": 3e-5}),
    ],
)
def test_masks_are_learned_and_a_small_model_trained_from_one_in_memory(family, given, used):
    """All weights by default, and adapters where norms follow the cut."""
    model = testing.make_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = {"steps": 4, "batch": 2, "micro": 2, "method": "maskprune", **given}
    found = mptk.prune(model, data=torch.randint(3, 300, (8, 24)), families=family, **SMALL | learning)
    assert found.report.trained
    assert found.report.recovery.items() >= used.items()
    assert "trained model" in {row["stage"] for row in found.report.proof}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_it_gives_a_stock_model_that_trains(pruned):
    assert isinstance(pruned.model, LlamaForCausalLM)
    assert pruned.model.config.intermediate_size == pruned.report.families["ffn"]["width"] < 64
    assert pruned.plan.widths["ffn"] == pruned.model.config.intermediate_size
    ids = torch.randint(3, 300, (2, 12))
    pruned.model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.model.parameters())
    assert pruned.report.model == "LlamaForCausalLM"
    assert pruned.report.data["calibration"]["source"] == IN_MEMORY
    assert IN_MEMORY in pruned.report.quality["protocol"]
    assert "sparsity" in repr(pruned)


def test_it_is_saved_as_prune_writes_and_verified(pruned, tmp_path):
    folder = pruned.save(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size == pruned.plan.widths["ffn"]
    with expect_error(FileError):
        mptk.verify(folder)
    assert all(d.ok for d in mptk.verify(folder, model=testing.make_llama(layers=1)))
    testing.make_llama(layers=1).save_pretrained(tmp_path / "dense")
    stages = [d.stage for d in mptk.verify(folder, model=str(tmp_path / "dense"))]
    assert stages == [row["stage"] for row in pruned.report.proof]
    with expect_error(InputError, name="model"):
        mptk.verify(folder, model=testing.make_llama(layers=1, seed=1))
    opened = mptk.Pruned.open(folder)
    assert opened.folder == folder
    assert opened.plan.digest == pruned.plan.digest
    assert len(opened.model.state_dict()) == len(pruned.model.state_dict())


def test_without_a_folder_nothing_stays_and_half_precision_stays(tmp_path, go_to):
    """Weights are computed with in float32 and stored as they were."""
    go_to(tmp_path)
    model = testing.make_llama(layers=1).to(torch.bfloat16)
    found = mptk.prune(model, method="magnitude", data=torch.randint(3, 300, (4, 24)), **SMALL)
    assert found.model is found.model
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert all(row["ok"] for row in found.report.proof)
    temporary = found.place
    del found
    gc.collect()
    assert not temporary.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_found_where_the_model_came_from_and_settings_and_keywords_go_together(laboratory, tmp_path):
    dense = laboratory.open_model()
    settings = Settings(method="magnitude", **{n: v for n, v in SMALL.items() if n != "progress"})
    model, texts = LlamaForCausalLM.from_pretrained(dense), [laboratory.open_data().read_text()]
    found = mptk.prune(model, tmp_path / "out", settings, data=texts, progress=None)
    assert found.tokenizer is not None
    assert found.report.model == str(dense)
    assert found.folder == tmp_path / "out"
    assert found.report.settings.method == "magnitude"
    assert not found.report.settings.onnx


def test_it_recovers_and_is_measured(pruned, tmp_path):
    asked = {"steps": 2, "rank": 2, "batch": 2, "micro": 2, "length": 24, "eval_windows": 2, "eval_length": 24}
    better = mptk.recover(pruned, tmp_path / "out", data=TEXTS, onnx=False, progress=None, **asked)
    assert better.plan.digest == pruned.plan.digest
    assert "trained model" in {row["stage"] for row in better.report.proof}
    ids = torch.randint(3, 300, (3, 24))
    measured = mptk.evaluate(better, ids, progress=None)
    assert measured["dense"] > 1
    assert measured["model"] > 1
    alone = mptk.evaluate(str(tmp_path / "out"), ids, progress=None)
    assert alone["model"] == pytest.approx(measured["model"], rel=1e-4)
    assert mptk.evaluate(better.model, ids, progress=None)["model"] == pytest.approx(alone["model"], rel=1e-4)
    with expect_error(InputError, name="sparsity"):
        mptk.recover(pruned, sparsity=0.5)


def test_it_writes_text(pruned):
    (text,) = mptk.generate(pruned, "the quick", max_new_tokens=4)
    inputs = testing.make_tokenizer()("the quick", return_tensors="pt")
    expected = pruned.model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert text == testing.make_tokenizer().decode(expected, skip_special_tokens=True)
    with expect_error(InputError, name="tokenizer"):
        mptk.generate(testing.make_llama(layers=1), "the quick")


# ---- any module ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Two outputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return self.head(x) * scale, x.mean(-1)


EXAMPLE = (torch.randn(3, 7, 12), torch.rand(3, 1, 1))


@pytest.mark.parametrize("method", ["wanda", "taylor", "flap", "magnitude", "random"])
def test_any_module_is_pruned(method):
    net = Net()
    loader = DataLoader(TensorDataset(torch.randn(10, 7, 12), torch.rand(10, 1, 1), torch.arange(10)), batch_size=4)
    found = mptk.prune(net, example_inputs=EXAMPLE, data=loader, method=method, sparsity=0.3, align=4, onnx=False)
    assert (found.report.task, found.report.quality["metric"]) == ("module", "distance")
    assert found.report.quality["dense"] == 0 < found.report.quality["pruned"]
    assert found.report.data["calibration"]["samples"] == 8  # two are set aside
    assert all(row["ok"] for row in found.report.proof)
    small = found.model
    assert isinstance(small, ProgramModule)
    assert set(small.state_dict()) == set(net.state_dict())
    width = found.plan.widths[next(iter(found.plan.widths))]
    assert small.blocks[0].up.weight.shape == (width, 12)
    first, second = small(x=EXAMPLE[0], scale=EXAMPLE[1])
    assert (first.shape, second.shape) == ((3, 7, 5), (3, 7))
    first.sum().backward()
    assert small.blocks[1].up.weight.grad is not None


def test_a_module_is_verified_with_itself(tmp_path):
    net = Net()
    found = mptk.prune(net, tmp_path / "out", example_inputs={"x": EXAMPLE[0], "scale": EXAMPLE[1]}, progress=None)
    assert found.report.settings.method == "wanda"
    assert all(d.ok for d in mptk.verify(tmp_path / "out", model=net))
    changed = copy.deepcopy(net)
    nn.init.ones_(changed.head.weight)
    with expect_error(InputError, name="model"):
        mptk.verify(tmp_path / "out", model=changed)
    measured = mptk.evaluate(found, progress=None)
    assert measured["model"] == pytest.approx(found.report.quality["pruned"], abs=1e-5)


def test_a_new_head_of_zeros_hides_no_wrong_cut(inside):
    net = Net()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    module = HeadOnly(net)
    found = mptk.prune(module, example_inputs=EXAMPLE, onnx=False, progress=None)
    assert not found.model(*EXAMPLE).any()
    assert "random in place of zeros" in {row["stage"] for row in found.report.proof}

    def wrong(result: PassResult) -> PassResult:
        name = next(n for n in result.program.parameters if n.endswith("down.weight"))
        turned = {name: result.program.state[name].flip(1)}
        return replace(result, program=result.program.with_state(turned))

    inside.spoil("passes.transforms.rewrite.Rewrite.run", wrong)
    with expect_error(ProofError, name="random in place of zeros"):
        mptk.prune(module, example_inputs=EXAMPLE, onnx=False)


class HeadOnly(nn.Module):
    """The first output of ``Net``."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.net(x, scale)[0]


def test_one_sample_is_enough_and_sizes_stay_free():
    found = mptk.prune(Net(), example_inputs=(EXAMPLE[0][:1], EXAMPLE[1][:1]), onnx=False, progress=None)
    assert found.model(torch.randn(5, 9, 12), torch.rand(5, 1, 1))[0].shape == (5, 9, 5)


def test_a_pruned_module_is_pruned_again_and_measured_alone():
    net = Net()
    asked = {"example_inputs": EXAMPLE, "align": 4, "tolerance": 0.05, "onnx": False}
    first = mptk.prune(net, sparsity=0.2, **asked)
    second = mptk.prune(first.model, sparsity=0.4, **asked)
    assert set(second.model.state_dict()) == set(net.state_dict())
    assert second.model(*EXAMPLE)[0].shape == (3, 7, 5)
    measured = mptk.evaluate(second.model, dense=net, example_inputs=EXAMPLE, progress=None)
    assert measured["model"] > first.report.quality["pruned"]
