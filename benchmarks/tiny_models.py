"""Tiny random models of every type in transformers' auto mappings, with example inputs.

python -m benchmarks.tiny_models [--mapping M] [--types A,B] [--jobs N] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import multiprocessing
import time
import typing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.common import limit_memory
from benchmarks.tiny_config import tiny_config
from benchmarks.tiny_recipe import Recipe, recipes
from benchmarks.tiny_roles import FEATURES, FIRST_PLAIN_TOKEN, IMAGE_TOKENS, LABELS, STAGED_IMAGE, VOCAB
from benchmarks.tiny_weights import calibrate, randomise, revived
from benchmarks.tiny_wrappers import PAIRED, PICTURED, wrapper_of
from mptk.features.dual_encoder.captioned import Captioned, put_end_token
from mptk.features.dual_encoder.task import has_embeddings
from mptk.features.image_text.inputs import with_images

MAPPINGS: dict[str, dict[str, Any]] = {
    "causal-lm": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "image-classification": dict(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "image-text-to-text": dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "zero-shot-image-classification": {
        **modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "aimv2": "Aimv2Model",
        "groupvit": "GroupViTModel",
    },
    "ctc": dict(modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES),
    "semantic-segmentation": dict(modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
    "universal-segmentation": dict(modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES),
    "object-detection": dict(modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES),
    "depth-estimation": dict(modeling_auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES),
    "video-classification": dict(modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
    "time-series-prediction": {
        "patchtst": "PatchTSTForPrediction",
        "patchtsmixer": "PatchTSMixerForPrediction",
    },
}
BATCH, SEQ, TARGET_SEQ = 2, 7, 5
FRAMES, WAVE = 48, 6400
MAX_PARAMETERS = 6_000_000
TIME_LIMIT_S, MEMORY_LIMIT_BYTES = 120, 4 << 30


class CannotBuild(Exception):
    """No tiny model: `stage` is "config", "build" or "forward", `reason` a line for a reader."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason = stage, reason


@dataclasses.dataclass
class Tiny:
    """A tiny eval-mode fp32 `model`; `wrapper(*inputs)` returns one floating tensor (the logits).

    `recipe` tells which liberties with the sizes this model refused.
    """

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    wrapper: nn.Module
    recipe: Recipe


def model_types(mapping: str) -> list[str]:
    """The model types of `mapping`, in transformers' order."""
    return list(MAPPINGS[mapping])


def tiny_model(mapping: str, model_type: str, seed: int = 0) -> Tiny:
    """A tiny model of `model_type`; raises `CannotBuild`."""
    transformers.logging.set_verbosity_error()
    entry = MAPPINGS[mapping][model_type]
    class_name = entry if isinstance(entry, str) else entry[0]
    model_class: type[PreTrainedModel] = getattr(transformers, class_name)
    best: CannotBuild | None = None
    tried: list[Any] = []
    for recipe in recipes():
        try:
            config = _config(mapping, model_type, model_class, recipe)
            if config.to_dict() in tried:
                continue
            tried.append(config.to_dict())
            return Tiny(*_attempt(mapping, model_class, config, seed), recipe)
        except CannotBuild as error:
            if best is None or _STAGES.index(error.stage) > _STAGES.index(best.stage):
                best = error
    assert best is not None
    raise best


_STAGES = ("config", "build", "forward", "export")


def _config(mapping: str, model_type: str, model_class: Any, recipe: Recipe) -> Any:
    try:
        config: Any = tiny_config(CONFIG_MAPPING[model_type], recipe)
    except Exception as error:
        raise CannotBuild("config", _line(error)) from error
    config = _config_for(model_class, config)
    config.use_cache = False
    if mapping == PICTURED:
        _fit_features(config)
    if mapping.endswith(("classification", "segmentation", "detection")):
        config.num_labels = LABELS
    if hasattr(config, "is_decoder") and mapping == "causal-lm":
        config.is_decoder = True
    if mapping == "seq2seq" and hasattr(getattr(config, "decoder", None), "add_cross_attention"):
        config.decoder.is_decoder = config.decoder.add_cross_attention = True  # as the class's own constructor sets it
    return config


def _fit_features(config: Any) -> None:
    """Gives images' features the width of the text model that takes them; some defaults are of another text model."""
    text = config.get_text_config()
    towers = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig) and part is not text]
    for part, name in [(config, "hidden_size"), *itertools.product(towers, FEATURES)]:
        if hasattr(part, name) and part is not text:
            setattr(part, name, text.hidden_size)


def _config_for(model_class: Any, config: Any) -> Any:
    """`config`, or the nested config that `model_class` is made from, as the auto classes choose it."""
    annotation = inspect.signature(model_class.__init__).parameters["config"].annotation
    wanted = typing.get_type_hints(model_class.__init__).get("config", annotation)
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    for kind in (wanted, model_class.config_class):
        if inspect.isclass(kind) and not isinstance(config, kind):
            return next((part for part in parts if isinstance(part, kind)), config)
    return config


def _attempt(
    mapping: str, model_class: Any, config: Any, seed: int
) -> tuple[nn.Module, tuple[torch.Tensor, ...], nn.Module]:
    try:
        torch.manual_seed(seed)
        model = _construct(model_class, config)
    except Exception as error:
        raise CannotBuild("build", _line(error)) from error
    model.eval()
    randomise(model, seed)
    try:
        inputs = example_inputs(mapping, model, seed)
        wrapper = wrapper_of(mapping, model, inputs).eval()
    except Exception as error:
        raise CannotBuild("forward", _line(error)) from error
    tensors = tuple(inputs.values())
    try:
        calibrate(model, lambda: wrapper(*tensors), seed)
        with torch.no_grad():
            out = revived(model, lambda: wrapper(*tensors))
    except Exception as error:
        raise CannotBuild("forward", _line(error)) from error
    wrapper.train().eval()  # some attention layers keep, in eval mode, what they computed in the first forward
    if not bool(torch.isfinite(out).all()):
        raise CannotBuild("forward", "the output is not finite")
    return model, tensors, wrapper


def _construct(model_class: Any, config: Any) -> Any:
    model = _on_meta(model_class, config)
    sizes = sorted(((p.numel(), n) for n, p in model.named_parameters()), reverse=True)
    total = sum(s for s, _ in sizes)
    if total > MAX_PARAMETERS:
        raise CannotBuild("build", f"{total} parameters, largest {sizes[:4]}")
    try:
        return model_class._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except (ValueError, ImportError):
        return model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)


def _on_meta(model_class: Any, config: Any) -> Any:
    """The model without storage; a field that a config lacks is taken from the config around or inside it."""
    for _ in range(5):
        try:
            with torch.device("meta"):
                return model_class._from_config(config, attn_implementation="eager")
        except AttributeError as error:
            if not isinstance(error.obj, PreTrainedConfig) or hasattr(error.obj, str(error.name)):
                raise
            parts = [config, *(p for p in vars(config).values() if isinstance(p, PreTrainedConfig))]
            values = {**getattr(config, "rope_parameters", {})}
            for part in reversed(parts):
                values.update({k: v for k, v in vars(part).items() if k == error.name})
            if error.name not in values:
                raise
            setattr(error.obj, str(error.name), values[error.name])
    raise CannotBuild("build", "the config classes lack more than five of the fields that the model reads")


def example_inputs(mapping: str, model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Named example inputs: token ids [2, 7] that are no special token, or pixel values [2, C, H, W]."""
    generator = torch.Generator().manual_seed(seed + 1)
    if mapping == PICTURED:
        return with_images(
            model, torch.randint(FIRST_PLAIN_TOKEN, VOCAB - 30, (BATCH, SEQ), generator=generator), generator
        )
    if mapping == PAIRED and has_embeddings(type(model)):
        ids = torch.randint(FIRST_PLAIN_TOKEN, VOCAB - 30, (BATCH, SEQ), generator=generator)
        return Captioned().make_example(model) | {"input_ids": put_end_token(model, ids)}
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    rows = BATCH * getattr(config, "num_codebooks", 1)
    vocab = min(VOCAB - 30, getattr(config.get_text_config(), "vocab_size", VOCAB))

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(FIRST_PLAIN_TOKEN, vocab, (rows, length), generator=generator)

    inputs = {"input_ids": tokens(SEQ)} if "input_ids" in accepted else {}
    if "task_inputs" in accepted:  # the text that says what to segment
        inputs["task_inputs"] = tokens(config.task_seq_len)
    if mapping == "seq2seq" and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens(TARGET_SEQ)
    base = getattr(model, "base_model", model)
    if "patch_lengths" in inspect.signature(base.forward).parameters:
        # Without it the bytes are grouped by their entropies, and sizes depend on data.
        inputs["patch_lengths"] = torch.tensor([[1, 3, SEQ - 3]] * BATCH)
    if hasattr(config, "audio_length_per_tok"):  # speech that goes with each token, not instead of some
        frames = SEQ * config.audio_length_per_tok
        mels = config.audio_config.num_mel_bins
        inputs["input_features"] = torch.randn(BATCH, mels, frames, generator=generator)
    if mapping == "time-series-prediction":
        shape = BATCH, config.context_length, config.num_input_channels
        inputs["past_values"] = torch.randn(shape, generator=generator)
    if mapping == "ctc" and not inputs:
        encoder = getattr(config, "encoder_config", config)
        bins = getattr(encoder, "num_mel_bins", None) or getattr(encoder, "feature_projection_input_dim", None)
        shape = (BATCH, FRAMES, bins) if model.main_input_name == "input_features" else (BATCH, WAVE)
        inputs[model.main_input_name] = torch.randn(shape, generator=generator)
    if "spatial_shapes" in accepted:
        inputs |= _patches(config.vision_config, generator)
    elif mapping not in ("causal-lm", "masked-lm", "seq2seq") and {"pixel_values", "pixel_values_videos"} & set(
        accepted
    ):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", STAGED_IMAGE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        length = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        frames = [length] if mapping == "video-classification" else []
        name = "pixel_values_videos" if "pixel_values_videos" in accepted else "pixel_values"
        inputs[name] = torch.randn(BATCH, *frames, channels, height, width, generator=generator)
        if "input_ids" in inputs:
            inputs["input_ids"][:, :IMAGE_TOKENS] = config.image_token_index
    return inputs


def _patches(vision: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images of 3 x 4 and 4 x 3 patches, for models that take patches and the shape of each image."""
    width = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(BATCH, 12, width, generator=generator),
        "pixel_attention_mask": torch.ones(BATCH, 12, dtype=torch.long),
        "spatial_shapes": torch.tensor([[3, 4], [4, 3]]),
    }


def _line(error: BaseException) -> str:
    if isinstance(error, CannotBuild):
        return error.reason
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def check(mapping: str, model_type: str) -> dict[str, Any]:
    """One row of the sweep: the last stage that passed and, where that is not "export", why."""
    row: dict[str, Any] = {"mapping": mapping, "type": model_type, "stage": "none", "reason": ""}
    start = time.perf_counter()
    try:
        tiny = tiny_model(mapping, model_type)
        row["parameters"] = sum(p.numel() for p in tiny.model.parameters())
        row["build_s"] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
        with torch.no_grad():
            torch.export.export(tiny.wrapper, tiny.inputs, strict=False)
        row["export_s"] = round(time.perf_counter() - start, 2)
        row["stage"] = "export"
    except CannotBuild as error:
        row.update(stage=("none", *_STAGES)[_STAGES.index(error.stage)], reason=str(error))
    except Exception as error:
        row.update(stage="forward", reason=f"export: {_line(error)}")
    return row


def sweep(
    pairs: list[tuple[str, str]],
    jobs: int,
    check: Callable[[str, str], dict[str, Any]] = check,
    limit_s: float = TIME_LIMIT_S,
) -> Iterator[dict[str, Any]]:
    """`check` of each (mapping, type) in a process of its own, at most `jobs` at once; rows as they finish."""
    context = multiprocessing.get_context("fork")  # the children find torch and transformers imported
    waiting, running = list(reversed(pairs)), dict[Connection, tuple[Any, float, tuple[str, str]]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, check, *waiting[-1]))
            process.start()
            theirs.close()
            running[ours] = (process, time.monotonic() + limit_s, waiting.pop())
        first_deadline = min(deadline for _, deadline, _ in running.values())
        ready = wait(list(running), timeout=max(0.0, first_deadline - time.monotonic()))
        for pipe, (process, deadline, pair) in list(running.items()):
            if pipe in ready or time.monotonic() >= deadline:
                yield _result(pipe, process, pair, None if pipe in ready else limit_s)
                del running[pipe]


def _child(pipe: Connection, check: Callable[[str, str], dict[str, Any]], mapping: str, model_type: str) -> None:
    limit_memory(MEMORY_LIMIT_BYTES)
    torch.set_num_threads(1)
    pipe.send(check(mapping, model_type))


def _result(pipe: Connection, process: Any, pair: tuple[str, str], late: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"mapping": pair[0], "type": pair[1], "stage": "none"}
    try:
        row |= pipe.recv() if late is None else {"reason": f"ran past {late:g} s"}
    except EOFError:
        process.join()
        row["reason"] = f"the process died with exit code {process.exitcode}"
    process.kill()
    process.join()
    return row


def main(
    mapping: Annotated[str, typer.Option(help="One mapping; all when empty")] = "",
    types: Annotated[str, typer.Option(help="Comma-separated model types; all when empty")] = "",
    jobs: Annotated[int, typer.Option(help="Processes at once")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here")] = None,
) -> None:
    """Builds, runs and exports a tiny model of every type, each in its own process."""
    wanted = [m for m in MAPPINGS if mapping in ("", m)]
    pairs = [(m, t) for m in wanted for t in MAPPINGS[m] if not types or t in types.split(",")]
    rows = []
    for row in sweep(pairs, jobs):
        rows.append(row)
        seconds = f"{row.get('build_s', '-'):>6} {row.get('export_s', '-'):>6} {row.get('parameters', '-'):>8}"
        print(f"{row['mapping']:21} {row['type']:28} {row['stage']:8} {seconds}  {row['reason'][:300]}", flush=True)
    for m in wanted:
        reached = [r["stage"] for r in rows if r["mapping"] == m]
        print(f"{m}: {reached.count('export')} of {len(reached)} export")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
