"""Classes whose config has a width for each stage: what it holds, what is cut together, and why the rest must stay.

It reaches for passes.transforms: one stage is cut by itself.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageClassification, PreTrainedModel

import mptk
from mptk import FamilyPlan, Plan
from mptk.api import compiler as api
from mptk.errors import TargetError
from mptk.ir import Alignment
from mptk.report.analysis import build_analysis_json
from mptk.targets import find_target
from mptk.testing import expect_error
from passes.transforms.fold_norms import FoldNorms
from passes.transforms.rewrite import rewrite_program

pytestmark = pytest.mark.features
SMALL = {"method": "magnitude", "data": "random", "samples": 1, "eval_windows": 1, "align": 1, "onnx": False}


def build(kind: str, **config: Any) -> PreTrainedModel:
    """A class of transformers, by its name."""
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**config)).eval()


def convnext(*hidden: int) -> PreTrainedModel:
    sizes = {"num_stages": len(hidden), "hidden_sizes": list(hidden), "depths": [2] * len(hidden), "image_size": 32}
    return build("ConvNextForImageClassification", **sizes, num_labels=7)


def found(model: PreTrainedModel) -> Any:
    analysis = api.analyze(model)
    legal = find_target("stock").find_legal(analysis, model, Alignment(1))
    widths = {f["name"]: f for f in build_analysis_json(analysis, legal, "it")["families"]}
    families = {f.name: f for f in analysis.families}

    def kept(name: str, width: int) -> dict[str, Any]:
        """The last units of each layer."""
        size = families[name].size
        return {g.layer: (tuple(range(size - width, size)),) * g.scopes for g in families[name].groups}

    sizes = {name: family.size for name, family in families.items()}
    return SimpleNamespace(analysis=analysis, legal=legal, widths=widths, kept=kept, sizes=sizes)


def test_entries_of_one_value_belong_to_their_stages():
    """The feed-forwards of two stages of one width are one family, so both entries follow it."""
    stages = found(convnext(12, 12))
    assert stages.legal.together == (frozenset({"channels.1", "channels.2", "ffn"}),)
    assert stages.legal.ladders["ffn"] == tuple(range(4, 49, 4))
    config = stages.legal.stock.build_config({"channels.1": 9, "channels.2": 9, "ffn": 36})
    assert config.changes == {"hidden_sizes": ([12, 12], [9, 9])}


def test_a_stage_is_cut_alone():
    stages = found(convnext(12, 20))
    assert set(stages.legal.together) == {frozenset({f"channels.{i}", f"ffn.{i}"}) for i in (1, 2)}
    assert stages.legal.ladders["channels.2"] == tuple(range(1, 21))
    assert stages.widths["ffn.2"]["together"] == ["channels.2"]
    config = stages.legal.stock.build_config({"channels.2": 9, "ffn.2": 36})
    assert config.changes == {"hidden_sizes": ([12, 20], [12, 9])}


def test_a_width_of_which_the_class_makes_all_others():
    sizes = {"embed_dim": 30, "depths": [2, 2], "num_heads": [3, 6], "window_size": 2, "image_size": 32}
    stages = found(build("SwinForImageClassification", **sizes, num_labels=7))
    (group,) = stages.legal.together
    assert group == {f"{kind}.{stage}" for kind in ("channels", "heads", "ffn") for stage in (1, 2)}
    expected = {"channels.1": (10, 20, 30), "heads.1": (1, 2, 3), "ffn.2": (80, 160, 240)}
    assert {name: stages.legal.ladders[name] for name in expected} == expected
    assert "attention scale" in stages.widths["qk_dim.1"]["refused"]
    widths = {name: stages.legal.ladders[name][-2] for name in group}
    plan = Plan({n: FamilyPlan(w, stages.sizes[n], stages.kept(n, w)) for n, w in widths.items()})
    cut = FoldNorms().run(rewrite_program(stages.analysis, plan))
    config = stages.legal.stock.build_config(widths, scalars=cut.epsilons)
    assert config.changes == {"embed_dim": (30, 20), "num_heads": ([3, 6], [2, 4])}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = config.build(cut.program.state_dict())(images).logits
        torch.testing.assert_close(logits, cut.program(images))


def test_why_a_width_must_stay_is_the_number_that_the_class_derives():
    """Cvt; its second stage needs two layers, as the class reads a list of its layers by the stage."""
    sizes = {"embed_dim": [10, 24], "num_heads": [1, 2], "depth": [1, 2], "cls_token": [False, True]}
    refused = found(build("CvtForImageClassification", **sizes, num_labels=7)).legal.refused
    other = "the stock class would derive another attention scale"
    assert refused["channels.1"] == f"it can only be cut together with channels.2, which must stay: {other}"
    assert "scale: it changes from" in refused["heads"]


def test_a_width_by_whose_power_the_class_multiplies_must_stay():
    """T5 scales what its head reads by d_model ** -0.5."""
    sizes = {"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, "num_layers": 1}
    tied, apart = (
        found(build("T5ForConditionalGeneration", **sizes, **more)) for more in ({}, {"tie_word_embeddings": False})
    )
    assert tied.legal.refused["hidden"].startswith("the stock class would derive another scale (aten.mul.Tensor in")
    assert "hidden" not in apart.legal.refused


def test_the_cut_folder_is_loaded_by_its_own_class(tmp_path):
    sizes = {"embedding_size": 10, "hidden_sizes": [16, 24], "depths": [2, 2]}
    model = build("ResNetForImageClassification", **sizes, num_labels=7)
    mptk.prune(model, sparsity=0.4, tolerance=0.2, families=("channels.2", "conv.1"), **SMALL).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_sizes"] != [16, 24]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert loaded.num_parameters() < model.num_parameters()
    assert "reloaded checkpoint" in [stage.stage for stage in mptk.verify(tmp_path / "out", model=model)]


def test_a_family_without_its_partner_is_refused_by_name():
    with expect_error(TargetError, name="ffn.2", nearest=["channels.2"]):
        mptk.prune(convnext(12, 20), sparsity=0.3, families=("ffn.2",), **SMALL)
