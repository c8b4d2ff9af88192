"""Faults, each put into one step or one file, and the stage that must catch it.

Each row is one fault. A step's result, as the cut program or the trained weights, is damaged, and proven as a run proves
what it has made; a damaged folder is verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_damage import Damage, damaged, garbage_block, one_code
from lab import WINDOW, Edit, all_of, fields, remove, weights
from safetensors.torch import save_file
from torch import Tensor

import mptk
from mptk import ChangedError, FileError, InputError, MptkError, Plan, ProofError, TargetError
from mptk.io import models
from mptk.ir import Program, resolve_plan
from mptk.methods.maskprune.learner import Recovered
from mptk.protocols import PROVEN_ON, Chosen, Compiled, Context, Method, Prepared, SampleSets, Witness
from mptk.run.prune import choose_units
from mptk.run.recover import adopt_weights
from mptk.targets import ONNX, STOCK_TARGET
from mptk.testing import expect_error
from passes.targets.onnx.names import ENDINGS
from passes.verify import TOLERANCE, prove

pytestmark = pytest.mark.always


def test_the_folder_is_sound_and_its_proof_goes_beyond_the_window(lab):
    assert lab.report.proof_length == 120 > WINDOW
    proof = mptk.verify(lab.folder)
    assert ([d.stage for d in proof], proof.notes) == ([d["stage"] for d in lab.report.proof], [])
    exact = {d["stage"]: d["max_abs"] for d in lab.report.proof}
    assert (exact["config"], exact["stored weights"]) == (0, 0)
    allowed = {d["stage"]: d["tolerance"] for d in lab.report.proof}
    assert (allowed["int8 weights"], allowed["int8 logits"], allowed["int4 logits"]) == (1, 0.1, 1)


# ---- the cut ----

LAYER = "model.layers.1"
FFN, ATTENTION = f"{LAYER}.mlp", f"{LAYER}.self_attn"
UP = f"{FFN}.up_proj.weight"
Inject = Callable[[Compiled], Compiled]


def cut_wrongly(damage: Callable[[Program], Program]) -> Inject:
    """The cut program comes out damaged."""

    def inject(compiled: Compiled) -> Compiled:
        program = damage(compiled.program)
        return replace(compiled, program=program, exact=program)

    return inject


def other_weight(name: str, change: Callable[[Tensor], Tensor]) -> Inject:
    return cut_wrongly(lambda program: program.with_state({name: change(program.state[name]).contiguous()}))


def swap_heads(weight: Tensor) -> Tensor:
    """The first two heads, of 10 rows each, in each other's place."""
    return torch.cat([weight[10:20], weight[:10], weight[20:]])


def other_constant(program: Program) -> Program:
    """The head's size in a reshape is still another one."""
    graph = program.copy_graph()
    node = next(n for n in graph.graph.nodes if "reshape" in str(n.target) and 10 in n.args[1])
    node.update_arg(1, [9 if size == 10 else size for size in node.args[1]])
    graph.recompile()
    return replace(program, graph=graph)


def without_masks(compiled: Compiled) -> Compiled:
    """The reference keeps every unit."""
    return replace(compiled, chosen=replace(compiled.chosen, cut=resolve_plan(compiled.prepared.analysis, Plan({}))))


CUTS: dict[str, tuple[Inject, str]] = {
    "wrong slice": (other_weight(f"{FFN}.down_proj.weight", lambda w: w.roll(1, 1)), "rewritten graph"),
    "permuted head": (other_weight(f"{ATTENTION}.q_proj.weight", swap_heads), "rewritten graph"),
    "wrong K group": (other_weight(f"{ATTENTION}.k_proj.weight", swap_heads), "rewritten graph"),
    "wrong V group": (other_weight(f"{ATTENTION}.v_proj.weight", swap_heads), "rewritten graph"),
    "a weight of NaN": (other_weight(UP, lambda w: w * torch.nan), "stored weights"),
    "mask not applied": (without_masks, "rewritten graph"),
    "stale shape constant": (cut_wrongly(other_constant), "rewritten graph"),
    "norms folded twice": (other_weight("model.norm.weight", lambda w: w * (len(w) / 48) ** 0.5), "rewritten graph"),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_that_goes_wrong(lab, name):
    inject, stage = CUTS[name]
    compiled = inject(lab.compiled)
    with expect_error(ProofError, name=stage):
        lab.prove(lab.write(compiled), compiled, STOCK_TARGET)


def test_a_tied_weight_that_came_apart_is_not_written(lab):
    program = lab.compiled.program
    state = program.state_dict()
    untied = replace(program, state=state.with_entries({"lm_head.weight": state["lm_head.weight"] + 1}), aliases={})
    with expect_error(TargetError, name="lm_head.weight"):
        lab.write(replace(lab.compiled, program=untied))


# ---- the config ----

CONFIGS: dict[str, tuple[dict[str, Any], object]] = {
    "rope theta": ({"rope_parameters__rope_theta": 1e5}, 1e5),
    "window": ({"sliding_window": 96}, 64),
    "epsilon": ({"rms_norm_eps": 1e-4}, None),
    "activation": ({"hidden_act": "gelu"}, "silu"),
    "positions": ({"max_position_embeddings": 8}, 128),
    "end of sequence": ({"eos_token_id": 7}, 1),
    "begin of sequence": ({"bos_token_id": None}, 0),
    "type": ({"dtype": "bfloat16"}, "float32"),
    "a field that the dense model lacks": ({"extra_scale": 2.0}, None),
    "class": ({"architectures": ["LlamaForCausalLM"]}, ["MistralForCausalLM"]),
    "a field less for older releases": ({"rope_theta": 5.0}, 10000.0),
}
"""Fields of the config as it is written, and the value that one should have. Rope's base stands in two fields."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_written_wrongly(lab, name):
    changes, right = CONFIGS[name]
    folder = lab.copy(fields("config.json", **changes), forged=False)
    with expect_error(ProofError, name="config") as refused:
        lab.prove(folder, None, STOCK_TARGET)
    assert right is None or refused.value.nearest == (right,)


@pytest.mark.parametrize("name", ["rope theta", "window", "epsilon", "activation"])
def test_logits_show_a_wrong_config_too(lab, name):
    changes, _ = CONFIGS[name]
    folder = lab.copy(all_of(remove("onnx"), fields("config.json", **changes)), forged=False)
    run = partial(lab.compiled.prepared.task.compute_output, models.load_whole(str(folder)).model)
    (found,) = prove(lab.compiled.masked, {"reloaded": (run, TOLERANCE)}, *lab.batches)
    assert not found.ok


# ---- training ----


TRAINED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "adapters merged with 1.01": lambda weights: {name: 1.01 * weight for name, weight in weights.items()},
    "recovery dropped": lambda weights: {},
    "rows swapped after recovery": lambda weights: weights | {UP: weights[UP][[1, 0, *range(2, len(weights[UP]))]]},
}


@pytest.fixture(scope="module")
def trained(lab):
    """What training gives: weights in the cut's shapes, and their outputs on the proof's samples."""
    program = lab.compiled.program
    held = {name: program.state[name] for name in program.state if name.endswith("proj.weight")}
    new = {name: weight + 0.01 * torch.randn(weight.shape) for name, weight in held.items()}
    outputs = program.with_state(new)(*lab.sets.proof.tensors)
    return Recovered(new, Witness("trained model", outputs, TOLERANCE), None, 1)


@pytest.mark.parametrize("name", TRAINED)
def test_weights_that_are_not_the_trained_ones(lab, trained, name):
    with expect_error(ProofError, name="trained model"):
        adopt_weights(lab.compiled, replace(trained, weights=TRAINED[name](trained.weights)), lab.sets, lab.make_run())


def test_the_trained_weights_are_taken(lab, trained):
    adopted, (difference,) = adopt_weights(lab.compiled, trained, lab.sets, lab.make_run())
    assert set(adopted.chosen.trained) == set(trained.weights)
    assert difference.ok


@dataclass
class Learning(Method):
    """Says that it learned other outputs than its choice has."""

    chosen: Chosen
    name, summary, learns = "learning", "for tests", True

    def choose(self, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
        outputs = prepared.analysis.program(*sets.proof.tensors)
        return replace(self.chosen, witness=Witness("learned masks", outputs, TOLERANCE))


def test_a_choice_that_is_not_the_learned_one(lab):
    base = replace(lab.compiled.prepared, method=Learning(lab.compiled.chosen), planned=None)
    with expect_error(ProofError, name="learned masks"):
        choose_units(str(lab.dense), base, lab.sets, lab.make_run())


# ---- a published folder ----


def other_plan(folder: Path) -> None:
    """Another unit is kept."""
    plan = Plan.load(folder / "plan.json")
    ffn = plan.families["ffn"]
    layer, (row,) = next(iter(ffn.keep.items()))
    other = next(unit for unit in range(ffn.of) if unit not in row)
    keep = {**ffn.keep, layer: (tuple(sorted((*row[1:], other))),)}
    Plan({**plan.families, "ffn": replace(ffn, keep=keep)}, plan.meta).save(folder / "plan.json")


def louder(folder: Path) -> None:
    """The ONNX graph's weights are 1 % larger."""
    file = folder / "onnx" / "model.onnx_data"
    (np.frombuffer(file.read_bytes(), np.float32) * np.float32(1.01)).tofile(file)


def unknown_tokens(folder: Path) -> None:
    """The proof's tokens are beyond the vocabulary."""
    save_file({"input_ids": torch.full((1, 40), 97)}, folder / PROVEN_ON)


def nudged(name: str, tensor: Tensor) -> Tensor:
    """One value of a token's embedding, which the proof's tokens need not hold."""
    if name.endswith("embed_tokens.weight"):
        tensor[96, 3] += 0.01
    return tensor


def more_files(folder: Path) -> None:
    (folder / "extra.txt").touch()


def quantised(scheme: str, ending: str, damage: Damage) -> Edit:
    """A constant of a quantised graph damaged."""
    return lambda folder: damaged(folder / "onnx" / f"model{ENDINGS[scheme]}.onnx", ending, damage) and None


tell = partial(fields, "report.json")
ZERO = weights(lambda name, tensor: torch.zeros_like(tensor))
NO_DATA, NO_ONNX = remove("onnx/model.onnx_data"), remove("onnx")
OTHER_BYTE = quantised("int8", "linear_2.smooth.1_Q8", one_code)
PLAIN: dict[str, tuple[Edit, str]] = {
    "data file missing": (NO_DATA, "onnx/model.onnx_data"),
    "onnx folder deleted": (NO_ONNX, "onnx/model.onnx"),
    "tokenizer changed": (fields("tokenizer_config.json", eos_token="w1"), "tokenizer_config.json"),
    "plan edited": (other_plan, "plan.json"),
    "report edited": (tell(sparsity=0.9), "report.json"),
    "file added": (more_files, "extra.txt"),
    "one byte of an int8 block": (OTHER_BYTE, "onnx/model_quantized.onnx_data"),
}
FORGED: dict[str, tuple[Edit, type[MptkError], str]] = {
    "data file missing": (NO_DATA, FileError, "onnx/model.onnx_data"),
    "onnx folder deleted": (NO_ONNX, FileError, "onnx/model.onnx"),
    "onnx folder deleted, list edited": (remove("onnx", told=True), FileError, "settings.onnx"),
    "onnx of other weights": (louder, ProofError, "ONNX Runtime prefill"),
    "int8 file deleted": (remove("onnx/model_quantized.onnx"), FileError, "onnx/model_quantized.onnx"),
    "file added": (more_files, FileError, "files"),
    "weights changed": (weights(nudged, told=False), ChangedError, "report.json"),
    "weights and digest changed": (weights(nudged), ProofError, "stored weights"),
    "weights zeroed, called a graph": (all_of(ZERO, tell(settings__target="graph")), FileError, "settings.target"),
    "weights zeroed, made a graph": (
        all_of(ZERO, remove("config.json", told=True), tell(settings__target="graph", config_changes={})),
        ProofError,
        "lm_head.weight",
    ),
    "families": (tell(families__ffn__width=80), FileError, "families"),
    "sparsity": (tell(sparsity=0.9), FileError, "sparsity"),
    "cost": (tell(cost__pruned__flops=1), FileError, "cost.pruned"),
    "called trained": (tell(trained=["model.norm.weight"]), FileError, "trained"),
    "changes": (tell(config_changes={}), FileError, "config_changes"),
    "quantised": (tell(quantized={}), FileError, "quantized"),
    "size of a quantised graph": (tell(quantized__int8__bytes=9), FileError, "quantized.int8.bytes"),
    "tokens": (unknown_tokens, FileError, PROVEN_ON),
    "a word less": (tell(cost=None), FileError, "report.json"),
    "another dense model": (tell(model_sha256="0" * 64), InputError, "model"),
    "plan": (other_plan, FileError, "plan_sha256"),
    "plan and its digest": (
        all_of(other_plan, lambda folder: tell(plan_sha256=Plan.load(folder / "plan.json").digest)(folder)),
        ProofError,
        "stored weights",
    ),
    "words to transformers.js": (
        fields("config.json", **{"transformers.js_config": {"use_external_data_format": False}}),
        ProofError,
        "config",
    ),
    "generation config": (fields("generation_config.json", eos_token_id=5), ProofError, "config"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_folder_that_was_edited(lab, name):
    edit, file = PLAIN[name]
    with expect_error(ChangedError, name=file):
        mptk.verify(lab.copy(edit, forged=False))


def test_a_folder_without_a_manifest(lab):
    folder = lab.copy(remove("mptk.json"), forged=False)
    with expect_error(FileError, name=folder):
        mptk.verify(folder)


@pytest.mark.parametrize("name", FORGED)
def test_a_folder_that_was_edited_with_a_manifest_that_fits(lab, name):
    edit, kind, about = FORGED[name]
    with expect_error(kind, name=about):
        lab.verify(lab.copy(edit, forged=True))


# ---- a quantised graph ----


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


QUANTISED: dict[str, tuple[Edit, str]] = {
    "one byte of an int8 block": (OTHER_BYTE, "int8 weights"),
    "garbage int8 block": (quantised("int8", "linear_2.smooth.1_Q8", garbage_block), "int8 weights"),
    "int4 scales doubled": (quantised("int4", "linear_2.smooth.1_scales", lambda a: a * 2), "int4 weights"),
    "int8 file of noise": (noise, "int8 weights"),
    "int4 file of garbage": (no_graph, "model_q4.onnx"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_graph_that_is_wrong(lab, name):
    edit, stage = QUANTISED[name]
    with expect_error(ProofError, name=stage):
        lab.prove(lab.copy(edit, forged=False), None, ONNX)


def test_quantised_logits_of_nan_never_pass(lab):
    judge, logits = lab.compiled.prepared.task.onnx.judge, torch.randn(2, 8, 97)
    assert judge("int8", [(logits, logits)]).ok
    assert not judge("int8", [(logits * torch.nan, logits)]).ok


# ---- a run, from its start to its end ----


def test_a_run_whose_result_is_wrong_publishes_nothing(laboratory, tmp_path):
    """The config is edited on the disk before it is proven."""

    def damage(stage: str, done: int, total: int, figures: str = "", /) -> None:
        if stage == "prove":
            (config,) = tmp_path.rglob("config.json")
            fields("config.json", rms_norm_eps=1e-4)(config.parent)

    with expect_error(ProofError, name="config"):
        mptk.prune(str(laboratory.open_model()), tmp_path / "out", laboratory.make_settings(), progress=damage)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


def test_what_the_proof_does_not_reach_is_said_with_the_option_that_does(lab):
    for length, notes in ((WINDOW, 1), (72, 0)):
        settings = replace(lab.compiled.prepared.settings, proof_length=length)
        compiled = replace(lab.compiled, prepared=replace(lab.compiled.prepared, settings=settings))
        said = lab.prove(lab.folder, compiled, STOCK_TARGET).note
        assert ("--proof-length 72 covers it" in said) == notes
