"""estimate: what a run needs, from the model's config and the settings, and whether the machine has it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mptk.compat.transformers import find_config_field
from mptk.config import Settings
from mptk.conversions import count_dense_models
from mptk.cost.estimate import Estimate, ModelSizes, Pass, Work, describe_size, estimate, measure_machine
from mptk.distributed.processes import find_module_blocks
from mptk.errors import MachineError
from mptk.files import expand_path
from mptk.io import choose_memory_bound, count_rows_at_once, find_stored_dtype, measure_free_memory, models
from mptk.methods import distil, find_method, reconstruct
from mptk.methods.maskprune import learner
from mptk.methods.one_shot import COMPARED_TOKENS
from mptk.proof import proof
from mptk.protocols import Stage, find_device, list_stages, measure_device_memory, should_reconstruct
from mptk.run.amounts import count_written, describe_numbers, join_words, should_learn_masks
from mptk.run.dense_types import estimate_dense_types
from mptk.trust import Trust
from passes.analysis.borders import MARGIN, find_config_borders

ONNX_BYTES = {"": 4.0, "int8": 1.0, "int4": 0.6, "fp16": 2.0}
"""Bytes of a number in an ONNX graph; of int4 with the scales of its blocks."""


@dataclass(frozen=True)
class Estimator:
    """Estimates what runs on a model need.

    ``model``: its parameters may have no values. ``stored``: the type of its checkpoint. ``kept``: the share of the
    parameters that a plan keeps, if there is one. ``instead``: what a run does that makes no cut; None: it makes one.
    """

    model: PreTrainedModel
    stored: torch.dtype
    kept: float = 1.0
    instead: Stage | None = None

    def estimate(self, settings: Settings) -> Estimate:
        """What a run with complete settings needs."""
        # The model's sizes, from its config and its parameters' shapes.
        config = self.model.config.get_text_config()
        stored = self.stored if settings.dtype == "auto" else getattr(torch, settings.dtype)
        names = ("num_attention_heads", "vocab_size", "num_experts_per_tok")
        heads, vocab, experts = (_number(find_config_field(config, name)) for name in names)
        parts = find_module_blocks(self.model)
        sizes = ModelSizes.of(self.model, parts, stored=stored.itemsize, heads=heads, vocab=vocab, experts=experts)
        # What the run does, at this machine's rates.
        borders = [b for b in find_config_borders(self.model.config.to_dict()) if b + MARGIN <= settings.proof_length]
        device = find_device(settings.device)
        rates = measure_machine(device, getattr(torch, settings.compute_dtype))
        if self.instead is None:
            work, does = work_of(settings, sizes, bool(borders), self.kept), describe_numbers(settings)
        else:
            work = work_without_cut(settings, sizes, self.instead)
            does = join_words(self.instead.describe_numbers(settings))
        where = "" if device.type == "cpu" else str(device)
        return replace(estimate(sizes, work, rates, choose_memory_bound(settings.memory), where), does=does)


def read_estimator(model: str, trust: Trust) -> Estimator:
    """The estimator of the model of that name. It reads only the config, and downloads no weights.

    Raises:
        MptkError: there is no such model.
    """
    skeleton = models.build_skeleton(model, trust=trust)
    folder = expand_path(model)
    # The files know their type best: a config may name another one, or none.
    if any(folder.glob("*.safetensors")):
        return Estimator(skeleton, find_stored_dtype(folder))
    dtype = models.load_config(model, trust=trust).dtype
    return Estimator(skeleton, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _number(value: object) -> int:
    """A number of a config. Models with several stages list one for each: the largest. 0 if there is none."""
    return max(map(int, value), default=0) if isinstance(value, list | tuple) else int(value or 0)  # type: ignore[call-overload]


def work_of(settings: Settings, sizes: ModelSizes, long_proof: bool, kept: float = 1.0) -> Work:
    """The work of a run, as its stages declare it.

    ``long_proof``: whether the config has borders, such as a window, that the proof must cross. ``kept``: the share
    that a plan keeps.
    """
    method = find_method(settings.method)
    s = replace(settings, reconstruct=should_reconstruct(settings, method))
    if not s.fixed:  # as if any budget counted the parameters of blocks; what is outside of them stays
        kept = 1 - s.sparsity * sizes.blocks / sizes.parameters
    # Each stage declares its own work beside its code. The order is the run's.
    passes = _estimate_data(s) | ({} if s.fixed else dict(method.work(s)))
    passes |= learner.estimate_training(s, sizes, kept)
    for stage in list_stages():
        passes |= stage.estimate(s, sizes, kept)
    passes |= reconstruct.estimate_reconstruction(s, sizes, kept) | distil.estimate_distillation(s, sizes, kept)
    measured = Pass(2 * s.eval_windows * s.eval_length, s.eval_length, reads=2, exact=True)  # dense and pruned
    passes |= proof.estimate_proof(s, long_proof) | estimate_dense_types(s) | {"measure": measured}
    return Work(
        kept=kept,
        passes=passes,
        calibration=s.windows * s.length,
        evaluated=max(COMPARED_TOKENS, s.eval_length),  # the longest batch of logits decides the memory
        length=s.length,
        onnx=tuple(ONNX_BYTES[scheme] for scheme in ("", *s.schemes)) if s.onnx else (),
        models=count_dense_models(s) if should_learn_masks(s) else 1,
    )


def work_without_cut(settings: Settings, sizes: ModelSizes, stage: Stage) -> Work:
    """The work of a run that reads text and then does only ``stage``."""
    s = settings
    passes = {**_estimate_data(s), **stage.estimate(s, sizes, 1.0)}
    return Work(1.0, passes, calibration=s.windows * s.length, evaluated=s.length, length=s.length)


def _estimate_data(settings: Settings) -> dict[str, Pass]:
    """The work of generating text with the model: it reads its weights once for every token of a batch of windows."""
    s, count = settings, count_written(settings)
    reads = s.length * -(-count // count_rows_at_once(s.length))
    return {"calibration data": Pass(2 * count * s.length, s.length, reads)} if count else {}


def check_room_for(found: Estimate, out: Path) -> None:
    """Raise MptkError if memory or disk are too small for a run; the message says what would make it fit."""
    # The host's memory, the device's, and the disks of the result and of temporary files.
    _check_memory(found.needed, "memory", measure_free_memory(), "")
    if found.device:
        room = measure_device_memory(torch.device(found.device))
        _check_memory(found.there, f"memory on {found.device}", room, ", or --device cpu")
    no_onnx = "give --no-onnx, or " if "ONNX" in found.output else ""
    for what, place, parts, remedy in (
        ("the result needs", _find_existing(out), found.output, f"{no_onnx}give an --out on a larger disk"),
        (
            "temporary files need",
            _find_existing(Path(tempfile.gettempdir())),
            found.temporary,
            "set TMPDIR to a folder on a larger disk",
        ),
    ):
        needed, room = sum(parts.values()), shutil.disk_usage(place).free
        if needed > room:
            raise MachineError(
                f"{what} {describe_size(needed)} of disk and {place} has {describe_size(room)} free; {remedy}",
                name=place,
            )


def _check_memory(parts: Mapping[str, float], what: str, free: float | None, more: str) -> None:
    """Raise MptkError if ``parts`` need more than ``free`` (None: unknown). ``more``: another remedy."""
    least = sum(parts.values())
    if free is not None and least > free:
        most = max(parts, key=lambda name: parts[name])
        raise MachineError(
            f"the run needs at least {describe_size(least)} of {what} ({describe_size(parts[most])} of it: {most}), "
            "and "
            f"{describe_size(free)} is free; {REMEDIES[most]}{more}",
            name=what,
        )


REMEDIES = {
    "libraries": "close other programs",
    "weights": "training needs all of them in memory; give a one-shot --method, as wanda, and no --steps",
    "cut model": "training needs it beside the dense model; give a one-shot --method, as wanda, and no --steps",
    "training": "give --rank 16, a smaller --micro, a shorter --length or --gradient-checkpointing",
    "values between stages": "give a smaller --memory, and they go to files",
    "largest stage": "use a machine with more memory",
    "activations": "give a shorter --length, or use a machine with more memory",
    "logits": "give a shorter --eval-length, or use a machine with more memory",
}
"""Part of the memory → how to make it smaller."""


def _find_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists: the disk can be asked only about that."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
