"""target: a checkpoint folder of DeciLM, LLaMA's block with widths of its own in each layer.

vLLM, SGLang, TensorRT-LLM and mlx-lm have code for it; stock transformers runs the file ``OWN_CODE`` that the folder
brings (``trust_remote_code``). Cut by default is what all of them read: feed-forward channels, to multiples of 256, and
whole blocks. ``engines`` names the programs that must read it: then only their limits hold. A plan may say more: other
widths, and heads, if all layers keep equally many query heads. A note then names the programs that do not read it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from mptk.errors import TargetError
from mptk.features.nemotron_nas.loader import OWN_CODE
from mptk.features.nemotron_nas.modeling_nemotron_nas import WIDTH_STEP, DeciLMConfig, DeciLMForCausalLM
from mptk.io import measure_free_memory, models
from mptk.ir import (
    LIMITS,
    NAS,
    Alignment,
    Analysis,
    Family,
    Lazy,
    Limit,
    Log,
    Samples,
    find_programs_needing,
    list_engines,
)
from mptk.protocols import Compiled, SampleSets, Written
from mptk.targets.stock import StockTarget
from passes.targets.legalize import LegalWidths, cut_shapes, list_aligned_widths
from passes.targets.stock.attempt import Refusal, build_config, build_on_meta
from passes.targets.stock.config import StockConfig, find_misfit
from passes.targets.stock.rehome import TRIAL_LENGTH, make_logits_check
from passes.targets.stock.symbolic import WeightShapes
from passes.verify import TOLERANCE

AUTO_MAP = {
    auto: f"{OWN_CODE.stem}.{kind.__name__}"
    for auto, kind in (("AutoConfig", DeciLMConfig), ("AutoModelForCausalLM", DeciLMForCausalLM))
}
CHANGING_FIELDS = (
    *("auto_map", "block_configs", "head_dim", "intermediate_size", "model_type", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads"),
)
"""Fields of the config that may differ from the dense model's."""
UNSHARED_FIELDS = ("architectures", "model_type", "transformers_version")
"""Fields that a LLaMA's config has, too, but with values of its own."""
DIGITS = 6
"""Decimals of ``ffn_mult``: mlx-lm rounds to them."""
LAYER_WEIGHT, FFN = "model.layers.", re.compile(r"model\.layers\.\d+\.mlp\.")
"""Starts of the names of a layer's weights, and of its feed-forward weights."""
WHOLE = "only feed-forward channels and blocks are cut for it; a --plan may also cut whole heads"


class NemotronNasTarget(StockTarget):
    """A DeciLM checkpoint: config with ``block_configs``, its code, safetensors, tokenizer."""

    name = NAS
    summary = "DeciLM: LLaMA with a width for each layer, as vLLM, SGLang, TensorRT-LLM and mlx-lm read it"
    ragged = True

    def find_legal(self, analysis: Analysis, model: nn.Module, alignment: Alignment) -> LegalWidths:
        """Widths that all programs read, or those of ``alignment.engines``.

        Raises:
            MptkError: the class does not hold the dense model or computes something else, or one of the engines does
                not read it.
        """
        # 1. The class must hold the dense model, and the engines must read that.
        check_read(check_held(analysis, model).config, alignment.engines)
        # 2. Cut are feed-forward channels, in steps that all engines read, and blocks. Other families only have their
        # dense width here; a plan may cut them all the same.
        step = WIDTH_STEP if find_programs_needing("step", NAS, engines=alignment.engines) else 1
        cut = {family.name for family in analysis.families if _is_ffn(family)} | {f.name for f in analysis.depths}
        ladders = {
            family.name: tuple(
                w
                for w in list_aligned_widths(family, alignment)
                if w == family.size or (family.name in cut and (w % step == 0 or family.kind == "blocks"))
            )
            for family in analysis.all_families
        }
        refused = {family.name: WHOLE for family in analysis.all_families if family.name not in cut}
        return LegalWidths(ladders, refused, lambda widths: None)

    def find_elsewhere(self, analysis: Analysis, legal: LegalWidths, alignment: Alignment) -> LegalWidths | None:
        return None

    def name_home(
        self, analysis: Analysis, model: nn.Module, legal: LegalWidths, widths: Mapping[str, int]
    ) -> str | None:
        return None

    def fit(self, compiled: Compiled, sample: Samples) -> Written:
        loaded = compiled.prepared.loaded
        shapes = {name: tuple(like.shape) for name, like in compiled.program.state_dict().likes.items()}
        dense = models.read_stored_config(loaded)
        found = find_deci_config(dense, shapes)
        if isinstance(found, str):
            raise TargetError(
                f"{NAS} does not hold this cut: {found}; cut other units, or use --target graph", name=NAS
            )
        check_read(found.config, compiled.prepared.settings.engines)
        return Written(found, loaded, dense, compiled.prepared.dtype)

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        shutil.copyfile(OWN_CODE, folder / OWN_CODE.name)
        return super().emit(compiled, sets, folder, log)

    def list_files(self, compiled: Compiled, folder: Path) -> frozenset[str]:
        return super().list_files(compiled, folder) | {OWN_CODE.name}

    def list_limits(self, compiled: Compiled) -> list[str]:
        assert compiled.written is not None
        return list_unread(compiled.written.stock.config)

    def has_written(self, folder: Path) -> bool:
        return (folder / "config.json").is_file() and (folder / OWN_CODE.name).is_file()


TARGET = NemotronNasTarget()


def _is_ffn(family: Family) -> bool:
    return all(FFN.match(member.weight) for group in family.groups for member in group.members)


def check_held(analysis: Analysis, model: nn.Module) -> StockConfig:
    """The dense model as ``DeciLMForCausalLM``. Raises MptkError unless that holds it and computes the same."""
    # Names and shapes first, which need no weights.
    remedy = f"use --target stock or graph, since {NAS} has LLaMA's block"
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"{type(model).__name__} is not a language model of transformers; {remedy}", name=type(model).__name__
        )
    found = find_deci_config(model.config, cut_shapes(analysis, {}))
    if isinstance(found, str):
        raise TargetError(f"{NAS} does not hold {type(model).__name__}: {found}; {remedy}", name=type(model).__name__)
    # Logits are compared if there are weights, and they fit into memory twice. Else the proof compares them, stage by
    # stage.
    state = analysis.program.state_dict()
    empty = any(not isinstance(state.get_entry(name), Lazy) and state.find_in_memory(name) is None for name in state)
    if empty or 2 * sum(like.numel() * 4 for like in state.likes.values()) > measure_free_memory():
        return found
    tokens = torch.randint(found.config.vocab_size, (1, TRIAL_LENGTH), generator=torch.Generator().manual_seed(0))
    if (difference := make_logits_check(analysis.program, tokens)(found)) > TOLERANCE:
        raise TargetError(
            f"{NAS} has other logits than {type(model).__name__}, by {difference:.1g}; {remedy}",
            name=type(model).__name__,
        )
    return found


def find_deci_config(dense: PreTrainedConfig, shapes: WeightShapes) -> StockConfig | str:
    """The class and the config that have exactly ``shapes``, or the reason why there are none.

    ``dense``: the config before the cut. ``shapes``: after the cut, tied names included.
    """
    if (why := _find_unlike(dense, shapes)) is not None:
        return why
    config = _build_deci_config(dense, shapes)
    model = config if isinstance(config, Refusal) else build_on_meta(DeciLMForCausalLM, config)
    if isinstance(config, Refusal) or isinstance(model, Refusal):
        return str(model)
    # Weights that the class lacks are said in words: it has LLaMA's block, with the biases that the config asks for.
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if more := sorted(shapes.keys() - there.keys()):
        return f"it has no {more[0]}"
    if (wrong := find_misfit(there, shapes)) is not None:
        return str(wrong)
    before, after = dense.to_dict(), config.to_dict()
    changes = {name: (before.get(name), after[name]) for name in CHANGING_FIELDS if before.get(name) != after[name]}
    return StockConfig(DeciLMForCausalLM, config, changes)


def _find_unlike(dense: PreTrainedConfig, shapes: WeightShapes) -> str | None:
    """What of the dense model no engine's class computes, or None. Shapes would not show it."""
    if not any(name.startswith(LAYER_WEIGHT) for name in shapes):
        return f"it has no {LAYER_WEIGHT}0"
    if (act := getattr(dense, "hidden_act", None)) != "silu":
        return f"its activation is {act}, and vLLM and SGLang compute only silu"
    if (window := getattr(dense, "sliding_window", None)) is not None:
        return f"its attention sees {window} positions, and {NAS} has no such window"
    return None


def _build_deci_config(dense: PreTrainedConfig, shapes: WeightShapes) -> PreTrainedConfig | Refusal:
    """The config whose blocks have the widths of ``shapes``; all else is as in ``dense``."""
    # The widths of each block, read from its weights: a block without attention or feed-forward weights has none.
    size = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    count = len({name.split(".")[2] for name in shapes if name.startswith(LAYER_WEIGHT)})
    blocks = [_read_widths(shapes, f"{LAYER_WEIGHT}{i}") for i in range(count)]
    before = dense.to_dict()
    known = {name: before[name] for name in LlamaConfig().to_dict() if name in before and name not in UNSHARED_FIELDS}
    # ``block_configs`` has the widths. The fields for the whole model have the largest of any block.
    own = {
        "auto_map": AUTO_MAP,
        "block_configs": [block.to_fields(dense.hidden_size) for block in blocks],
        "head_dim": size,
        "intermediate_size": max(block.channels for block in blocks),
        "num_attention_heads": max(block.queries for block in blocks) // size,
        "num_hidden_layers": count,
        "num_key_value_heads": max(block.keys for block in blocks) // size,
    }
    made = build_config(DeciLMConfig(), {**known, **own})
    return made if isinstance(made, Refusal) else made[1] or made[0]


@dataclass(frozen=True)
class BlockWidths:
    """Rows of a block's query, key and gate projections; 0: it has none."""

    queries: int
    keys: int
    channels: int

    def to_fields(self, hidden: int) -> dict[str, dict[str, object]]:
        """The block's entry in ``block_configs``."""
        attention = {"n_heads_in_group": self.queries // self.keys} if self.queries and self.keys else {}
        ffn = describe_ffn(self.channels, hidden) if self.channels else {}
        return {
            "attention": {"no_op": not self.queries, "replace_with_linear": False, **attention},
            "ffn": {"no_op": not self.channels, "replace_with_linear": False, **ffn},
        }


def _read_widths(shapes: WeightShapes, block: str) -> BlockWidths:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    return BlockWidths(*(shapes.get(f"{block}.{part}.weight", (0,))[0] for part in parts))


def describe_ffn(width: int, hidden: int) -> dict[str, object]:
    """A width as ``ffn_mult``, which all engines read, if that can say it; else as ``intermediate_size``.

    ``modeling_nemotron_nas.compute_ffn_width`` reads it back as they do.
    """
    return {"intermediate_size": width} if width % WIDTH_STEP else {"ffn_mult": round(1.5 * width / hidden, DIGITS)}


def list_unread(config: PreTrainedConfig, engines: Collection[str] = ()) -> list[str]:
    """Which programs do not read ``config``, and why. ``engines``: only these; empty: all.

    docs/deploy.md says where each of them reads it.
    """
    # What this config has that some programs do not read.
    groups = {block["attention"].get("n_heads_in_group") for block in config.block_configs}
    beyond: Mapping[Limit, bool] = {
        "step": any("intermediate_size" in block["ffn"] for block in config.block_configs),
        "head_dim": config.head_dim * config.num_attention_heads != config.hidden_size,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "first_attention": config.block_configs[0]["attention"]["no_op"],
        "even_heads": len(groups) > 1,
    }
    names = {
        limit: " and ".join(
            each.name.partition(",")[0] for each in find_programs_needing(limit, NAS, LlamaConfig.model_type, engines)
        )
        for limit, holds in beyond.items()
        if holds
    }
    return [f"this folder is not read by {who}: {LIMITS[limit]}" for limit, who in names.items() if who]


def check_read(config: PreTrainedConfig, engines: Collection[str]) -> None:
    """Raise MptkError unless each of ``engines`` reads ``config``. It names all other engines that do."""
    if engines and (reasons := list_unread(config, engines)):
        others = ", ".join(each for each in list_engines(NAS) if not list_unread(config, (each,)))
        raise TargetError(f"{'; '.join(reasons)}; of --engines only {others} read it", name="engines")
