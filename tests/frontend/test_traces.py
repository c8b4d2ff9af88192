"""A trace that is asked for again (traces.py) is what a new one would be; where it may not be, there is a new one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import traces
from inside import Inside
from torch import nn
from transformers import PreTrainedModel

import mptk
from mptk import testing
from mptk.ir.program import Program
from mptk.ir.text import describe_program
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx
from passes.targets.legalize import discover, find_stock_widths


@pytest.fixture
def exports(inside: Inside) -> list[nn.Module]:
    """The modules that are traced for real."""
    return inside.calls("traces.EXPORT")


def tiny(seed: int = 0, **changes: object) -> PreTrainedModel:
    model = testing.make_decoder("llama", num_hidden_layers=1, **changes)
    with torch.no_grad():
        model.lm_head.weight.add_(seed)
    return model


def test_a_second_trace_is_a_copy_with_the_weights_of_its_own_module(exports: list[nn.Module]) -> None:
    ids = testing.draw_tokens()
    with traces.remembered():
        first, second = tiny(), tiny(1)
        one, two = mptk.trace(first, (ids,), dynamic=True), mptk.trace(second, (ids,), dynamic=True)
    assert len(exports) == 1
    assert describe_program(one) == describe_program(two)
    assert {*one.graph.graph.nodes}.isdisjoint(two.graph.graph.nodes)
    assert two.state["lm_head.weight"] is second.lm_head.weight
    assert torch.equal(two(ids), second(ids, use_cache=False).logits)
    assert torch.equal(one(ids), first(ids, use_cache=False).logits)


def test_the_trace_of_another_module_is_another(exports: list[nn.Module], inside: Inside) -> None:
    ids, hooked, other = testing.draw_tokens(), tiny(), tiny()
    hooked.model.register_forward_hook(lambda *_: None)
    other.model.layers[0].mlp.forward = lambda x: x
    models = [tiny(), tiny(intermediate_size=84), tiny(attention="eager"), tiny(tie_word_embeddings=True)]
    models += [testing.make_decoder("gptneox") for _ in range(3)]
    models[-2].gpt_neox.layers[0].mlp.act.act = torch.sigmoid
    models[-1].gpt_neox.layers[0].mlp.act.act = partial(torch.nn.functional.gelu, approximate="tanh")
    with traces.remembered():
        for model in (*models, tiny().bfloat16(), tiny(meta=True), hooked, other, nn.Sequential(tiny())):
            mptk.trace(model, (ids,))
        mptk.trace(tiny(), (ids[:1],))
        mptk.trace(tiny(), (ids,), dynamic=True)
        inside.around("transformers.models.llama.modeling_llama.LlamaMLP.forward", lambda forward, mlp, x: x)
        mptk.trace(tiny(), (ids,))
    assert len(exports) == 15


@pytest.mark.parametrize("architecture", ["llama", "gptneox", "gemma3"])
def test_a_model_of_another_folder_is_the_same_model(
    architecture: str, exports: list[nn.Module], tmp_path: Path
) -> None:
    """Gemma 3 has an activation with arguments, and GPT-NeoX one that is a function, and other names in its file."""
    model = testing.make_decoder(architecture)
    with traces.remembered():
        for name in ("one", "two"):
            model.save_pretrained(tmp_path / name)
            mptk.trace(type(model).from_pretrained(tmp_path / name), (testing.draw_tokens(),))
    assert len(exports) == 1


def test_what_has_returned_hidden_states_is_traced_once(exports: list[nn.Module]) -> None:
    models, ids = [tiny(), tiny()], testing.draw_tokens()
    with traces.remembered():
        for model in models:
            model(ids, output_hidden_states=True)
            mptk.trace(model, (ids,))
    assert len(exports) == 1


def test_a_second_cut_has_the_same_sizes_and_the_weights_of_its_own_module(inside: Inside) -> None:
    ids, made_anew = testing.draw_tokens(), inside.calls("traces.PROPAGATE")

    def cut(seed: int, width: int) -> Program:
        keep = {"model.layers.0.mlp": (tuple(range(width)),)}
        analysis = mptk.analyze(mptk.trace(tiny(seed), (ids,), dynamic=True))
        return mptk.rewrite(analysis, mptk.Plan({"ffn": mptk.FamilyPlan(width, testing.decoders.FFN_SIZE, keep)}))

    with traces.remembered():
        first, second, other = cut(0, 40), cut(1, 40), cut(0, 48)
    assert len(made_anew) == 2
    assert describe_program(first) == describe_program(second) != describe_program(other)
    assert not torch.equal(first(ids), second(ids))
    with traces.remembered():
        anew = cut(0, 40)
    assert describe_program(first) == describe_program(anew)


def test_a_class_is_read_again_with_another_config(inside: Inside) -> None:
    made_anew = inside.calls("traces.READ")

    def legal(**changes: object) -> object:
        model = tiny(**changes)
        return find_stock_widths(analysis := mptk.analyze(model), discover(analysis, model)).ladders

    with traces.remembered():
        first, second, other = legal(), legal(), legal(intermediate_size=84)
    assert len(made_anew) == 2
    assert first == second == legal()
    assert first != other


def test_a_second_translation_is_the_same_graph_with_weights_of_its_own(tmp_path: Path, inside: Inside) -> None:
    made_anew = inside.calls("traces.TRANSLATE")
    with traces.remembered():
        program = trace_decoder(tiny())
        paths = [emit_onnx(program, tmp_path / name) for name in ("made", "copied")]
        other = emit_onnx(trace_decoder(tiny(1)), tmp_path / "other")
    made, copied, others = (
        path.read_bytes() + path.with_name(f"{path.name}_data").read_bytes() for path in (*paths, other)
    )
    assert len(made_anew) == 1
    assert made == copied
    assert others != made
