"""Faults, each put into one step or one file, and the stage or the line that must catch it. Nothing is published.

It reaches for the steps of a run, to break one at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_damage import Damage, damaged, garbage_block, one_code
from inside import Inside
from lab import (
    WINDOW,
    Edit,
    Lab,
    after,
    all_of,
    constant,
    cut_wrongly,
    fields,
    remembered,
    remove,
    state,
    swapped,
    weights,
)
from safetensors.torch import save_file

import mptk
from mptk import MptkError, Plan, Report
from mptk.config.learning import Learning, Training
from mptk.ort.decoder import OrtDecoder
from mptk.protocols.report import PROVEN_ON
from passes.targets.onnx.names import ENDINGS

Inject = Callable[[Inside], None]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with remembered():
        yield Lab(tmp_path_factory.mktemp("lab"))


def test_the_folder_is_sound_and_its_proof_goes_beyond_the_window(lab: Lab) -> None:
    report = Report.read(lab.folder)
    assert report.proof_length == 120 > WINDOW
    assert [d.stage for d in mptk.verify(lab.folder)] == [d["stage"] for d in report.proof]
    exact = {d["stage"]: d["max_abs"] for d in report.proof}
    assert (exact["config"], exact["stored weights"]) == (0, 0)
    allowed = {d["stage"]: d["tolerance"] for d in report.proof}
    assert (allowed["int8 weights"], allowed["int8 logits"], allowed["int4 logits"]) == (1, 0.1, 1)
    assert mptk.verify(lab.copy(lambda folder: None, forged=True)).notes == []


# ---- steps that go wrong ----

LAYER = "model.layers.1"
FFN, ATTENTION = f"{LAYER}.mlp", f"{LAYER}.self_attn"


def unmasked(inside: Inside) -> None:
    inside.around("mptk.protocols.chain.mask", lambda mask, analysis, cut: analysis.program)


def untied(inside: Inside) -> None:
    head = "lm_head.weight"
    inside.spoil("mptk.ir.program.Program.state_dict", lambda state: state.with_entries({head: state[head] + 1}))


def other_state(name: str, size: int) -> Inject:
    return cut_wrongly(state(name, lambda tensor: swapped(tensor, size)))


def written(**changes: Any) -> Inject:
    """The config as it is written has other values."""
    return after("mptk.targets.stock.write_checkpoint", fields("config.json", **changes), 4)


STEPS: dict[str, tuple[Inject, str]] = {
    "wrong slice": (cut_wrongly(state(f"{FFN}.down_proj.weight", lambda w: w.roll(1, 1))), "rewritten graph"),
    "permuted head": (other_state(f"{ATTENTION}.q_proj.weight", 10), "rewritten graph"),
    "wrong K group": (other_state(f"{ATTENTION}.k_proj.weight", 10), "rewritten graph"),
    "wrong V group": (other_state(f"{ATTENTION}.v_proj.weight", 10), "rewritten graph"),
    "a weight of NaN": (cut_wrongly(state(f"{FFN}.up_proj.weight", lambda w: w * torch.nan)), "stored weights"),
    "mask not applied": (unmasked, "rewritten graph"),
    "stale shape constant": (cut_wrongly(constant(10, 9)), r"rewritten graph': it does not run \(shape"),
    "norms folded twice": (
        cut_wrongly(state("model.norm.weight", lambda w: w * (len(w) / 48) ** 0.5)),
        "rewritten graph",
    ),
    "tied weight broken": (untied, "are one weight in the stock class but differ"),
    "rope theta": (written(rope_parameters__rope_theta=1e5), "rope_theta of config.json is 10000.0, but 100000.0"),
    "window": (written(sliding_window=96), "sliding_window of config.json is 96, but 64"),
    "epsilon": (written(rms_norm_eps=1e-4), "rms_norm_eps of config.json"),
    "activation": (written(hidden_act="gelu"), 'hidden_act of config.json is "gelu", but "silu"'),
    "positions": (written(max_position_embeddings=8), "max_position_embeddings of config.json is 8, but 128"),
    "end of sequence": (written(eos_token_id=7), "eos_token_id of config.json is 7, but 1"),
    "begin of sequence": (written(bos_token_id=None), "bos_token_id of config.json is null, but 0"),
    "type": (written(dtype="bfloat16"), 'dtype of config.json is "bfloat16", but "float32"'),
    "a field that the dense model lacks": (written(extra_scale=2.0), "extra_scale of config.json is 2.0, but missing"),
    "class": (written(architectures=["LlamaForCausalLM"]), "architectures of config.json"),
    "a field less for older releases": (written(rope_theta=5.0), "rope_theta of config.json is 5.0, but 10000.0"),
}


SAME = ("epsilon", "activation", "positions", "end of sequence", "begin of sequence", "class")
"""Other fields of the config, which the same check finds as it finds those that are left."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SAME else n for n in STEPS])
def test_a_step_that_goes_wrong(lab: Lab, inside: Inside, name: str) -> None:
    inject, caught = STEPS[name]
    inject(inside)
    before = sorted(p.name for p in lab.root.iterdir())
    with pytest.raises(MptkError, match=caught) as error:
        lab.prune(onnx=False)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in lab.root.iterdir()) == before


@pytest.mark.parametrize("name", ["rope theta", "window", "epsilon", "activation"])
def test_logits_show_a_wrong_config_too(lab: Lab, inside: Inside, name: str) -> None:
    inside.gives("mptk.targets.stock.check_written_config", mptk.proof.proof.Difference("config", 0.0, 0.0, 0.0))
    STEPS[name][0](inside)
    with pytest.raises(MptkError, match="the proof fails at 'reloaded checkpoint'"):
        lab.prune(onnx=False)


# ---- training ----


def scaled_adapters(inside: Inside) -> None:
    inside.spoil("peft.tuners.lora.layer.Linear.get_delta_weight", lambda delta: 1.01 * delta)


def swapped_rows(inside: Inside) -> None:
    def damaged(widened: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = dict(widened)
        name = f"{FFN}.up_proj.weight"
        kept = (0, 1)
        result[name] = result[name].clone()
        result[name][list(kept)] = result[name][list(kept)[::-1]]
        return result

    inside.spoil("mptk.run.recover.widen_weights", damaged)


TRAINING: dict[str, tuple[Inject, str]] = {
    "adapters merged with 1.01": (scaled_adapters, "learned masks"),
    "recovery dropped": (lambda inside: inside.gives("mptk.run.recover.widen_weights", {}), "trained model"),
    "rows swapped after recovery": (swapped_rows, "trained model"),
}
LEARNING = Learning(steps=6, mask_share=0.5, rank=4, training=Training(batch=2, micro=2, lr=3e-3))
LEARNED = {"method": "maskprune", "plan": None, "onnx": False, "families": ("ffn",), "widths": {"ffn": 48}}


@pytest.mark.parametrize("name", TRAINING)
def test_weights_that_are_not_the_trained_ones(lab: Lab, inside: Inside, name: str) -> None:
    inject, stage = TRAINING[name]
    inject(inside)
    out = lab.root / f"out{lab.count + 1}"
    with pytest.raises(MptkError, match=f"the proof fails at '{stage}'"):
        lab.prune(learning=LEARNING, align=8, **LEARNED)
    assert not out.exists()


def test_adapters_merged_wrongly_in_recovery_alone(lab: Lab, inside: Inside) -> None:
    scaled_adapters(inside)
    with pytest.raises(MptkError, match="the proof fails at 'trained model'"):
        lab.prune(learning=LEARNING, onnx=False)


# ---- a published folder ----


def other_plan(folder: Path) -> None:
    """Another unit is kept."""
    plan = Plan.load(folder / "plan.json")
    ffn = plan.families["ffn"]
    layer, (row,) = next(iter(ffn.keep.items()))
    other = next(unit for unit in range(ffn.of) if unit not in row)
    keep = {**ffn.keep, layer: (tuple(sorted((*row[1:], other))),)}
    Plan({**plan.families, "ffn": replace(ffn, keep=keep)}, plan.meta).save(folder / "plan.json")


def told_plan(folder: Path) -> None:
    fields("report.json", plan_sha256=Plan.load(folder / "plan.json").digest)(folder)


def louder(folder: Path) -> None:
    """The ONNX graph's weights are 1 % larger."""
    file = folder / "onnx" / "model.onnx_data"
    (np.frombuffer(file.read_bytes(), np.float32) * np.float32(1.01)).tofile(file)


def unknown_tokens(folder: Path) -> None:
    """The proof's tokens are beyond the vocabulary."""
    save_file({"input_ids": torch.full((1, 40), 97)}, folder / PROVEN_ON)


def zero(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def nudged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One value of a token's embedding, which the proof's tokens need not hold."""
    if name.endswith("embed_tokens.weight"):
        tensor[96, 3] += 0.01
    return tensor


def quantised(scheme: str, ending: str, damage: Damage) -> Edit:
    """A constant of a quantised graph damaged."""
    return lambda folder: damaged(folder / "onnx" / f"model{ENDINGS[scheme]}.onnx", ending, damage) and None


def noise(folder: Path) -> None:
    """Two fifths of the int8 graph's numbers are noise."""
    file = folder / "onnx" / "model_quantized.onnx_data"
    content = bytearray(file.read_bytes())
    size = len(content) * 2 // 5
    content[-size:] = np.random.default_rng(0).bytes(size)
    file.write_bytes(content)


def no_graph(folder: Path) -> None:
    file = folder / "onnx" / "model_q4.onnx"
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


UNTRUE = "in report.json is wrong"
PLAIN: dict[str, tuple[Edit, str]] = {
    "data file missing": (remove("onnx/model.onnx_data"), "onnx/model.onnx_data is missing in .* since"),
    "onnx folder deleted": (remove("onnx"), "onnx/model.onnx is missing in .* since"),
    "tokenizer changed": (fields("tokenizer_config.json", eos_token="w1"), "tokenizer_config.json in .* was changed"),
    "generation config": (fields("generation_config.json", eos_token_id=5), "generation_config.json in .* was changed"),
    "plan edited": (other_plan, "plan.json in .* was changed"),
    "report edited": (fields("report.json", sparsity=0.9), "report.json in .* was changed"),
    "file added": (lambda folder: (folder / "extra.py").touch(), "extra.py was added in .* since"),
    "one byte of an int8 block": (
        quantised("int8", "linear_2.smooth.1_Q8", one_code),
        r"onnx/model_quantized.onnx(_data)? in .* was changed",
    ),
    "no manifest": (remove("mptk.json"), "has no mptk.json that lists its files"),
}
FORGED: dict[str, tuple[Edit, str]] = {
    "data file missing": (remove("onnx/model.onnx_data"), "lacks onnx/model.onnx_data, which its report names"),
    "onnx folder deleted": (remove("onnx"), "lacks onnx/model.onnx, which its report names"),
    "onnx folder deleted, list edited": (remove("onnx", told=True), f"settings.onnx {UNTRUE}: it says true"),
    "onnx of other weights": (louder, "the proof fails at 'ONNX Runtime prefill'"),
    "one byte of an int8 block": (quantised("int8", "linear_2.smooth.1_Q8", one_code), "fails at 'int8 weights'"),
    "garbage int8 block": (quantised("int8", "linear_2.smooth.1_Q8", garbage_block), "fails at 'int8 weights'"),
    "int4 scales doubled": (quantised("int4", "linear_2.smooth.1_scales", lambda a: a * 2), "fails at 'int4 weights'"),
    "int8 file of noise": (noise, "fails at 'int8 weights'"),
    "int4 file of garbage": (no_graph, r"fails at 'int4 weights': model_q4.onnx does not run \(.+\)"),
    "int8 file deleted": (
        remove("onnx/model_quantized.onnx"),
        "lacks onnx/model_quantized.onnx, which its report names",
    ),
    "file added": (lambda folder: (folder / "extra.txt").touch(), f"files {UNTRUE}"),
    "weights changed": (weights(nudged, told=False), f"weights_sha256 {UNTRUE}"),
    "weights and digest changed": (weights(nudged), "the proof fails at 'stored weights'"),
    "weights zeroed, called a graph": (
        all_of(weights(zero), fields("report.json", settings__target="graph")),
        f'settings.target {UNTRUE}: it says "graph", but the folder and its plan give "stock"',
    ),
    "weights zeroed, made a graph": (
        all_of(
            weights(zero),
            remove("config.json", told=True),
            fields("report.json", settings__target="graph", config_changes={}),
        ),
        "the proof fails at 'stored weights'",
    ),
    "families": (fields("report.json", families__ffn__width=80), f"families {UNTRUE}"),
    "sparsity": (fields("report.json", sparsity=0.9), f"sparsity {UNTRUE}: it says 0.9"),
    "cost": (fields("report.json", cost__pruned__flops=1), f"cost.pruned {UNTRUE}"),
    "called trained": (fields("report.json", trained=["model.norm.weight"]), f"trained {UNTRUE}"),
    "changes": (fields("report.json", config_changes={}), f"config_changes {UNTRUE}"),
    "quantised": (
        fields("report.json", quantized={"int8": {"file": "onnx/model_quantized.onnx", "bytes": 9}}),
        f"quantized {UNTRUE}",
    ),
    "tokens": (unknown_tokens, "proof/inputs.safetensors in .* holds no inputs of this model"),
    "a word less": (fields("report.json", cost=None), "report.json in .* is damaged or was changed"),
    "another dense model": (fields("report.json", model_sha256="0" * 64), "is not the dense model that was pruned"),
    "plan": (other_plan, f"plan_sha256 {UNTRUE}"),
    "plan and its digest": (all_of(other_plan, told_plan), "the proof fails at 'stored weights'"),
    "config": (
        fields("config.json", max_position_embeddings=8),
        "max_position_embeddings of config.json is 8, but 128",
    ),
    "words to transformers.js": (
        fields("config.json", **{"transformers.js_config": {"use_external_data_format": False}}),
        r"transformers\.js_config\.\w+ of config.json is",
    ),
    "generation config": (
        fields("generation_config.json", eos_token_id=5),
        "eos_token_id of generation_config.json is 5, but 1",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_folder_that_was_edited(lab: Lab, name: str) -> None:
    edit, line = PLAIN[name]
    with pytest.raises(MptkError, match=line) as error:
        mptk.verify(lab.copy(edit, forged=False))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FORGED)
def test_a_folder_that_was_edited_with_a_manifest_that_fits(lab: Lab, name: str) -> None:
    edit, line = FORGED[name]
    with pytest.raises(MptkError, match=line) as error:
        mptk.verify(lab.copy(edit, forged=True))
    assert "\n" not in str(error.value)


def test_a_quantised_graph_whose_logits_are_not_the_float_graphs(lab: Lab, inside: Inside) -> None:
    """Also if every weight is right: NaN never passes."""

    def spoil(step: Callable[..., Any], self: OrtDecoder, *given: Any, **more: Any) -> Any:
        logits, cache = step(self, *given, **more)
        return logits * (np.nan if "quantization" in self.metadata else 1), cache

    inside.around("mptk.ort.decoder.OrtDecoder.step", spoil)
    with pytest.raises(MptkError, match="the proof fails at 'int8 logits'"):
        mptk.verify(lab.folder)


@pytest.mark.parametrize(("from_position", "stage"), [(1, "padded left"), (WINDOW, "decode")])
def test_decoding_with_positions_that_are_one_too_far(lab: Lab, inside: Inside, from_position: int, stage: str) -> None:
    """Also if they are so from the window on alone."""

    def shifted(feeds: Callable[..., Any], self: OrtDecoder, ids: Any, mask: Any, cache: Any, positions: Any) -> Any:
        given = feeds(self, ids, mask, cache, positions)
        if cache.length >= from_position:
            positions = given["position_ids"].numpy() + 1
            given["position_ids"] = type(given["position_ids"]).ortvalue_from_numpy(positions)
        return given

    inside.around("mptk.ort.decoder.OrtDecoder.make_feeds", shifted)
    with pytest.raises(MptkError, match=f"the proof fails at 'ONNX Runtime {stage}'"):
        mptk.verify(lab.folder)


def test_what_the_proof_does_not_reach_is_said_with_the_option_that_does(lab: Lab) -> None:
    (note,) = mptk.verify(lab.folder, proof_length=WINDOW).notes
    assert note == (
        "the proof stops before position 64, at which this model has a window or threshold; --proof-length 72 covers it"
    )
    assert mptk.verify(lab.folder, proof_length=72).notes == []
    assert dataclasses.asdict(lab.settings)["proof_length"] == 1024


@pytest.mark.parametrize("sound", [True, False])
def test_a_folder_that_is_replaced_while_it_is_verified_is_no_failed_proof(
    lab: Lab, inside: Inside, sound: bool
) -> None:
    """Both are sound: the error says what happened, and to verify it again; so does a proof of what is gone."""
    folder, other = lab.copy(lambda _: None, forged=False), lab.copy(fields("config.json", bos_token_id=7), forged=True)

    def replaced(real: Callable[..., Any], *given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        folder.rename(lab.root / f"gone{sound}")
        other.rename(folder)
        return found

    inside.around("mptk.proof.verification." + ("check_planted" if sound else "open_dense"), replaced)
    with pytest.raises(MptkError, match=r"was changed or replaced while it was verified; verify it again"):
        mptk.verify(folder)
