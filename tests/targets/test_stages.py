"""Classes whose config has a width for each stage: what it holds, what is cut together, and why the rest must stay.

It reaches for passes.transforms: one stage is cut by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    CvtConfig,
    CvtForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

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

SMALL = {"method": "magnitude", "data": "random", "samples": 1, "eval_windows": 1, "align": 1, "onnx": False}


def convnext(*hidden: int) -> ConvNextForImageClassification:
    depths = [2] * len(hidden)
    config = ConvNextConfig(
        num_stages=len(hidden), hidden_sizes=list(hidden), depths=depths, image_size=32, num_labels=7
    )
    return ConvNextForImageClassification(config).eval()


def resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 10, "hidden_sizes": [16, 24], "depths": [2, 2]}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=7)).eval()


def swin() -> SwinForImageClassification:
    sizes = {"embed_dim": 30, "depths": [2, 2], "num_heads": [3, 6], "window_size": 2, "image_size": 32}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=7)).eval()


def cvt() -> CvtForImageClassification:
    """A second stage needs two layers: the class reads a list of its layers by the stage."""
    sizes = {"embed_dim": [10, 24], "num_heads": [1, 2], "depth": [1, 2], "cls_token": [False, True]}
    config = CvtConfig(**sizes, num_labels=7)
    return CvtForImageClassification(config).eval()


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


@pytest.mark.features
def test_entries_of_one_value_belong_to_their_stages() -> None:
    """The feed-forwards of two stages of one width are one family, so both entries follow it."""
    stages = found(convnext(12, 12))
    assert stages.legal.together == (frozenset({"channels.1", "channels.2", "ffn"}),)
    assert stages.legal.ladders["ffn"] == tuple(range(4, 49, 4))
    config = stages.legal.stock.build_config({"channels.1": 9, "channels.2": 9, "ffn": 36})
    assert config.changes == {"hidden_sizes": ([12, 12], [9, 9])}


@pytest.mark.features
def test_a_stage_is_cut_alone() -> None:
    stages = found(convnext(12, 20))
    assert set(stages.legal.together) == {frozenset({f"channels.{i}", f"ffn.{i}"}) for i in (1, 2)}
    assert stages.legal.ladders["channels.2"] == tuple(range(1, 21))
    assert stages.widths["ffn.2"]["together"] == ["channels.2"]
    config = stages.legal.stock.build_config({"channels.2": 9, "ffn.2": 36})
    assert config.changes == {"hidden_sizes": ([12, 20], [12, 9])}


@pytest.mark.features
def test_a_width_of_which_the_class_makes_all_others() -> None:
    model = swin()
    stages = found(model)
    (group,) = stages.legal.together
    assert group == {f"{kind}.{stage}" for kind in ("channels", "heads", "ffn") for stage in (1, 2)}
    assert {name: stages.legal.ladders[name] for name in ("channels.1", "heads.1", "ffn.2")} == {
        "channels.1": (10, 20, 30),
        "heads.1": (1, 2, 3),
        "ffn.2": (80, 160, 240),
    }
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


@pytest.mark.features
def test_why_a_width_must_stay_is_the_number_that_the_class_derives() -> None:
    refused = found(cvt()).legal.refused
    assert refused["channels.1"] == (
        "it can only be cut together with channels.2, which must stay: "
        "the stock class would derive another attention scale"
    )
    assert "scale: it changes from" in refused["heads"]


@pytest.mark.features
def test_a_width_by_whose_power_the_class_multiplies_must_stay() -> None:
    """T5 scales what its head reads by d_model ** -0.5."""
    sizes = {"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, "num_layers": 1}
    tied, apart = (
        found(T5ForConditionalGeneration(T5Config(**sizes, **more))) for more in ({}, {"tie_word_embeddings": False})
    )
    assert tied.legal.refused["hidden"].startswith("the stock class would derive another scale (aten.mul.Tensor in")
    assert "hidden" not in apart.legal.refused


@pytest.mark.features
def test_the_cut_folder_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    model = resnet()
    mptk.prune(model, sparsity=0.4, tolerance=0.2, families=("channels.2", "conv.1"), **SMALL).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_sizes"] != [16, 24]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert loaded.num_parameters() < model.num_parameters()
    assert "reloaded checkpoint" in [stage.stage for stage in mptk.verify(tmp_path / "out", model=model)]


@pytest.mark.features
def test_a_family_without_its_partner_is_refused_by_name() -> None:
    with expect_error(TargetError, name="ffn.2", nearest=["channels.2"]):
        mptk.prune(convnext(12, 20), sparsity=0.3, families=("ffn.2",), **SMALL)
