"""What a run will need is said before it starts, and what cannot fit is refused then.

It reaches for mptk.cost.estimate: the parts of an estimate are compared one by one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Stopped
from rates import find_rates, keep_rates
from transformers import AutoModelForCausalLM, LlamaConfig

from mptk import Settings, analyze, prune, recover, testing, trace
from mptk.api.pruned import estimate_recovery, estimate_run
from mptk.config import Learning, Training
from mptk.cost import estimate as costs
from mptk.cost.estimate import (
    Estimate,
    Machine,
    ModelSizes,
    Pass,
    Work,
    describe_duration,
    describe_size,
    estimate,
    find_expert_weights,
)
from mptk.cost.model import CostModel
from mptk.distributed.processes import find_module_blocks
from mptk.errors import MachineError
from mptk.run.estimate import Estimator, check_room_for, read_estimator
from mptk.run.minutes import fill_in
from mptk.testing import expect_error, make_llama
from mptk.trust import NO_CODE

ATTENTION, FFN, NORMS = 2 * 48 * 96 + 2 * 48 * 32, 3 * 48 * 64, 2 * 48
BLOCK, EMBEDDING = ATTENTION + FFN + NORMS, 300 * 48
SLOW = Machine(flops=1e9, read=1e6, write=2e6)
WORK = Work(kept=0.75, passes={"score": Pass(tokens=1000, length=10)}, calibration=200, evaluated=20, length=10)
BASE = Settings(method="wanda", onnx=False, data="text")
PARAMETERS = 16_060_522_496 // 2
"""Of Llama-3-8B."""
HUGE = 10.0**18
"""More bytes than any machine has."""


@pytest.fixture(autouse=True)
def machine(tmp_path, set_cache):
    set_cache(tmp_path / "cache")
    keep_rates(SLOW)


def write_config(folder: Path, **sizes: int) -> str:
    """A folder with the config of Llama-3-8B, or of other ``sizes``, and nothing else."""
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(**llama | heads | sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    return read_estimator(write_config(tmp_path_factory.mktemp("config")), NO_CODE)


def toy(*, tied: bool = True) -> ModelSizes:
    model = make_llama(tied=tied)
    return ModelSizes.of(model, find_module_blocks(model), stored=2, heads=6, vocab=300)


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_of_a_model(tied):
    norms = 2 * 2 * 48 + 48
    assert toy(tied=tied) == ModelSizes(
        parameters=(1 if tied else 2) * EMBEDDING + 2 * BLOCK + 48,
        blocks=2 * BLOCK,
        stage=BLOCK,
        products=EMBEDDING + 2 * (ATTENTION + FFN) + norms,
        hidden=48,
        widest=96,
        heads=6,
        vocab=300,
        layers=2,
        fit=pytest.approx(2 * (2 / 3 * 96**3 + 2 * 48 * 96**2 + 2 / 3 * 64**3 + 2 * 48 * 64**2)),
        fitted=2 * 48 * (96 + 64),
        stored=2,
    )


def test_the_embedding_may_be_the_largest_stage():
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=40, intermediate_size=56, num_attention_heads=5, vocab_size=9000)
        model = AutoModelForCausalLM.from_config(config)
    assert ModelSizes.of(model, find_module_blocks(model), stored=4, heads=1, vocab=9000).stage == 9000 * 40


def test_everything_stays_if_the_bound_allows_it_and_is_read_once():
    sizes = toy()
    found = estimate(sizes, WORK, SLOW, bound=1e9)
    assert found.held == {"weights that stay": 4 * sizes.parameters, "values between stages": 8 * 200 * 48}
    assert found.needed["largest stage"] == 4 * 0.75 * BLOCK
    assert found.needed["logits"] == 3 * 4 * 20 * 300
    assert found.output == {"checkpoint": 0.75 * 2 * sizes.parameters}
    assert found.temporary == {}
    assert found.seconds["read"] == 2 * sizes.parameters / 1e6
    operations = 1000 * (2 * sizes.products + 4 * 10 * 48 * 2)
    assert found.seconds["score"] == pytest.approx(operations / (costs.EFFICIENCY * 1e9))
    assert found.seconds["write"] == 0.75 * 2 * sizes.parameters / 2e6
    fits, tight = (
        estimate(sizes, replace(WORK, passes={"reconstruct": Pass(200, 10)}), SLOW, bound) for bound in (1e9, 100_000)
    )
    size = 4 * 2 * 48 * (96 + 64)  # one copy for a further run, one for this
    assert fits.output["fitted weights"] == size
    assert fits.held["values between stages"] == found.held["values between stages"] + size
    assert tight.held["values between stages"] + tight.temporary["values between stages"] == 8 * 200 * 48 + size
    assert sum(tight.held.values()) == 100_000


def test_a_smaller_bound_takes_less_memory_more_time_and_temporary_files():
    sizes = toy()
    loose, tight = (
        estimate(sizes, replace(WORK, passes={"score": Pass(1000, 10, gradients=True)}), SLOW, bound)
        for bound in (1e9, 100_000)
    )
    assert sum(tight.held.values()) == 100_000
    assert tight.needed["largest stage"] == 4 * 1.75 * BLOCK
    gradients = 4 * sizes.parameters - 100_000
    assert tight.temporary == {"values between stages": 8 * 200 * 48 - 25_000, "gradients": gradients}
    missing = (1 - 75_000 / (4 * sizes.parameters)) * 2 * sizes.parameters / 1e6
    assert tight.seconds["score"] - loose.seconds["score"] == pytest.approx(missing)


def test_training_holds_all_weights():
    sizes = toy()
    found = estimate(sizes, replace(WORK, passes={"train": Pass(1000, 10, training=7e6)}), SLOW, bound=1000)
    assert (found.needed["weights"], found.needed["training"]) == (4 * sizes.parameters, 7e6)
    assert "weights that stay" not in found.held


def test_a_device_has_memory_of_its_own():
    sizes = toy()
    host, found = (estimate(sizes, WORK, SLOW, 1e9, device) for device in ("", "cuda:1"))
    assert (host.there, host.device) == ({}, "")
    assert set(found.there) == {"largest stage", "activations", "logits", "values between stages"}
    assert found.there["activations"] == host.needed["activations"]
    assert set(found.needed) == {"libraries", "largest stage"}
    work = replace(WORK, passes={"train": Pass(1000, 10, training=7e6)})
    trained = estimate(sizes, work, SLOW, 1e9, "cuda:1")
    assert trained.there["weights"] == trained.needed["weights"] == 4 * sizes.parameters
    assert trained.there["cut model"] == 0.75 * 4 * sizes.parameters


def test_a_config_is_enough(tmp_path):
    found = estimate_run(write_config(tmp_path / "config"), BASE)
    assert found.seconds["read"] == 2 * PARAMETERS / 1e6  # bfloat16, as the config says
    block = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert found.output["checkpoint"] == pytest.approx(2 * PARAMETERS - 0.3 * 2 * 32 * block)
    assert set(found.seconds) >= {"score (wanda)", "choose widths", "prove", "measure"}
    assert "calibration data" not in found.seconds


@pytest.mark.features
def test_what_a_run_does_is_what_it_takes_time_for(eight_billion):
    ask = lambda **changes: eight_billion.estimate(fill_in(replace(BASE, **changes)))  # noqa: E731
    plan = ask(plan="plan.json")
    assert not {"score (wanda)", "choose widths", "reconstruct"} & set(plan.seconds)
    assert plan.output["checkpoint"] == 2 * PARAMETERS
    assert ask(reconstruct=True).seconds["reconstruct"] > 32 * 2 / 3 * 14336**3 / 1e9
    assert ask(method="taylor").seconds["score (taylor)"] > 2 * ask().seconds["score (wanda)"]
    assert ask(method="magnitude").seconds["score (magnitude)"] < 0.1 * ask().seconds["score (wanda)"]
    assert ask(data="self").seconds["calibration data"] > 0
    assert ask(onnx=True, quantize=("int8",)).output["ONNX"] == pytest.approx(2.5 * ask().output["checkpoint"])
    assert ask(dtype="float32").output["checkpoint"] == 2 * ask().output["checkpoint"]
    learned = ask(method="maskprune", learning=Learning(steps=10))
    adapted = ask(method="maskprune", learning=Learning(steps=10, rank=16))
    assert learned.needed["training"] - adapted.needed["training"] > 5 * 8e9  # gradients and moments of what is left
    assert learned.needed["weights"] == 4 * PARAMETERS
    masks: dict[str, Any] = {"method": "maskprune", "learning": Learning(steps=10)}
    assert ask(**masks, vocabulary="text").needed["weights"] == learned.needed["weights"]
    assert ask(**masks, kv_heads=4).needed["weights"] == 2 * learned.needed["weights"]  # the model before teaches
    assert set(learned.seconds) >= {"train", "reconstruct"}


@pytest.mark.parametrize(("named", "share"), [(2, 2 / 5), (None, 1)])
def test_a_mixture_counts_the_experts_that_a_token_is_routed_to(named, share):
    model = testing.make_decoder("mixtral", meta=True)
    sizes = ModelSizes.of(model, find_module_blocks(model), stored=4, heads=6, vocab=97, experts=named or 0)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts == 2 * 5 * 3 * 48 * 80
    table = model.get_input_embeddings().weight.numel()
    assert sizes.products == sizes.parameters - table - round((1 - share) * experts)
    assert sizes.widest == (2 * 2 * 80 if named else 48)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())


def test_products_are_those_of_the_traced_graph():
    model = testing.make_decoder("mixtral", meta=True)
    found = Estimator(model, torch.float32).estimate(fill_in(replace(BASE, length=8)))
    per_token = CostModel(analyze(trace(model, dynamic=True))).dense.flops
    of_text = 32 * 8 * (per_token + 4 * 8 * 48 * 2)
    assert found.seconds["score (wanda)"] == pytest.approx(of_text / (costs.EFFICIENCY * 1e9), rel=0.01)


def test_a_short_convolution_is_no_mixture():
    block = torch.nn.Sequential(torch.nn.Conv1d(12, 12, 4, groups=12), torch.nn.Linear(12, 12))
    assert find_expert_weights([block]) == []


def test_a_faster_type_counts_only_in_the_stages_that_compute_in_it(eight_billion):
    settings = fill_in(replace(BASE, reconstruct=True, memory=64 * 10**9))
    keep_rates(replace(SLOW, speedup=4.0), torch.bfloat16)
    single = eight_billion.estimate(settings).seconds
    half = eight_billion.estimate(replace(settings, compute_dtype="bfloat16")).seconds
    rest = 1 - costs.EFFICIENCY  # what a forward pass does beside products takes as long as before
    assert half["score (wanda)"] == pytest.approx(single["score (wanda)"] * (costs.EFFICIENCY / 4 + rest))
    assert (half["prove"], half["measure"]) == (single["prove"], single["measure"])
    assert single["reconstruct"] / 4 < half["reconstruct"] < single["reconstruct"], "solves are float32"


def test_a_recovery_says_what_it_needs(laboratory, tmp_path):
    dense, pruned = laboratory.open_model(), laboratory.open_pruned()
    learning = Learning(steps=2, training=Training(batch=2, micro=2))
    settings = Settings(learning=learning, length=16, eval_length=16, onnx=False)
    found = estimate_recovery(pruned, settings)
    kept, parameters = (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()) for folder in (pruned, dense)
    )
    assert found.needed["weights"] == 4 * parameters
    assert found.output["checkpoint"] == pytest.approx(4 * kept)
    assert {"train", "prove"} <= set(found.seconds)
    assert not any(stage.startswith("score") for stage in found.seconds)
    told: list[str] = []

    def listen(stage: str, *_: object) -> None:
        told.append(stage)
        if stage not in ("load", "reading"):
            raise Stopped

    with pytest.raises(Stopped):
        recover(pruned, tmp_path / "out", settings, data=str(laboratory.open_data()), progress=listen)
    assert told[-1] == str(found)


# ---- what the machine has not ----


def test_what_cannot_fit_is_refused_before_any_work(tmp_path):
    sizes = {"hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 1, "vocab_size": 100}
    with expect_error(MachineError, name="memory"):
        prune(write_config(tmp_path / "config", **sizes), tmp_path / "out", BASE)
    assert not (tmp_path / "out").exists()


def test_the_place_that_has_too_little_room_is_named(tmp_path):
    found = Estimate({"libraries": 1.0}, {}, {"checkpoint": 1.0}, {}, {})
    check_room_for(found, tmp_path)
    with expect_error(MachineError, name="memory"):
        check_room_for(replace(found, needed={"weights": HUGE}), tmp_path)
    for part in ("checkpoint", "ONNX"):
        with expect_error(MachineError, name=tmp_path):
            check_room_for(replace(found, output={part: HUGE}), tmp_path / "not" / "there")
    with expect_error(MachineError, name=tempfile.gettempdir()):
        check_room_for(replace(found, temporary={"gradients": HUGE}), tmp_path)


# ---- this machine ----


def test_the_machine_is_measured_once():
    find_rates(torch.bfloat16).unlink()
    narrow = costs.measure_machine(dtype=torch.bfloat16)
    assert min(narrow.flops, narrow.read, narrow.write, narrow.speedup) > 0
    assert costs.measure_machine(dtype=torch.bfloat16) == narrow
    assert costs.measure_machine() == SLOW, "each type has rates of its own"


@pytest.fixture
def take(inside):
    """Says how long each run takes from now on: number of threads → milliseconds."""
    taken: list[Callable[[int], float]] = []
    inside.around("mptk.cost.estimate.measure_typical_ms", lambda _, run, threads, seconds: taken[-1](threads))
    return taken.append


def test_a_slow_type_is_timed_by_a_small_product(take):
    """bfloat16 on a CPU that has no instructions for it: the large product took a minute and a half."""
    timed: list[int] = []

    def take_long(threads: int) -> float:
        timed.append(threads)
        return 100.0

    take(take_long)
    assert costs.measure_product_rate(costs.CPU, torch.bfloat16) == 2 * 64 * 1024 * 256 / 0.1
    assert timed == [1]


def test_on_a_busy_machine_the_rate_of_one_thread_counts(take):
    """All threads together wait for each other: two had 2 GFLOP/s, and one 150."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    # Number of threads → milliseconds
    kinds: tuple[tuple[Callable[[int], float], float], ...] = (
        (lambda threads: 1.0 if threads == 1 else 90.0, 1.0),
        (lambda threads: 0.9 / threads, 0.45),
    )
    try:
        for times, ms in kinds:
            take(times)
            rate = costs.measure_product_rate(costs.CPU, torch.float32)
            assert rate == pytest.approx(2 * 1024 * 1024 * 4096 / ms * 1e3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_sizes_and_times_as_text():
    assert [describe_size(s) for s in (2.14e9, 3e7)] == ["2.1 GB", "30 MB"]
    assert [describe_duration(s) for s in (40, 119.6, 720, 12_600)] == ["40 s", "120 s", "12 min", "3.5 h"]
    found = Estimate({"a": 1e9}, {"b": 1.1e9}, {"a": 5e8}, {"b": 1e8}, {"x": 30, "y": 10})
    assert str(found) == "will need about 2.1 GB of memory, 0.6 GB of disk and 40 s"
    assert str(replace(found, does="5 training steps")).endswith(" and 40 s for 5 training steps")


def test_what_is_kept_of_the_machine_costs_no_run(set_cache, inside):
    """A file that is empty, damaged, a pipe or a folder is measured again; a cache that cannot be written is noted."""
    measured: list[Path] = []

    def measure(_: object, folder: Path, *__: object) -> Machine:
        measured.append(folder)
        return replace(SLOW, flops=len(measured))

    inside.around("mptk.cost.estimate.calibrate", measure)
    kept = find_rates()
    assert costs.measure_machine() == SLOW
    for content in ("", "{", "[]", '{"rates": 3}', '{"rates": {"flops": 0, "read": 1, "write": 1}}', None):
        kept.unlink()
        os.mkfifo(kept) if content is None else kept.write_text(content)
        assert costs.measure_machine().note
        assert costs.measure_machine() == replace(SLOW, flops=len(measured))
    assert len(measured) == 6
    assert json.loads(kept.read_text())["rates"]["flops"] == 6
    kept.unlink()
    kept.mkdir()
    assert costs.measure_machine().note
    for cache in ("/proc/x", "/dev/null/x"):
        set_cache(cache)
        first = costs.measure_machine()
        assert first.note
        assert costs.measure_machine() == first, "a process measures once"
    assert first.note in str(estimate(toy(), WORK, first, bound=1e9))
