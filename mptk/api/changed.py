"""changed: what a user changed in a ``Pruned``. Weights are written and proven again; all else is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.config import IN_MEMORY
from mptk.errors import ChangedError
from mptk.files import format_json, make_scratch
from mptk.io import load_tensors, save_tokenizer, unwrap_parallel, write_weights
from mptk.ir import Log, Program, Samples, Weights
from mptk.proof.claims import LATER
from mptk.proof.proof import check_proof
from mptk.protocols import PROVEN_ON, REPORT_FILE, Context, Dense, Opened, Origin, Report, SampleSets, Use
from mptk.publish.folder import publish
from mptk.publish.licence import CARD
from mptk.publish.manifest import MARKER, hash_weight_files, list_files
from mptk.reading import make_damage_error
from mptk.report.card import write_card
from mptk.run.changed_weights import WEIGHTS_CHANGED, ChangedWeights, rewrite_folder
from mptk.run.describe import measure_graphs
from mptk.run.inputs import Inputs
from mptk.run.open import open_in_memory
from mptk.run.prune import Result
from mptk.run.run import open_run
from mptk.staged.staged import EXECUTOR
from mptk.targets.archive import ARCHIVE, open_archive
from mptk.targets.graph import WEIGHTS, read_weights
from mptk.tasks.module import Module
from mptk.tasks.onnx_export import export_form
from mptk.tasks.onnx_proof import list_form_stages
from mptk.trust import NO_CODE, Trust
from passes.targets.onnx.names import ONNX_FOLDER
from passes.verify import TOLERANCE, StageOutputs, prove

PASSING = frozenset(["_name_or_path", "dtype", "output_attentions", "output_hidden_states", "torch_dtype", "use_cache"])
"""Entries of a config that training changes for a time, and that change no output: not compared."""
PASSING_ATTRIBUTES = frozenset(["training", "gradient_checkpointing", "max_seq_len_cached", "name_or_path"])
"""Attributes of a part that training and running change, and a name that peft reads."""
# Both switch with the length of the last input: another value of the buffer is not the user's change.
ROPES_ANEW = frozenset(["dynamic", "longrope"])
"""Kinds of rotary embeddings whose frequencies ``forward`` computes for each length."""
HALF_TYPES = (torch.bfloat16, torch.float16)
"""``half()`` and ``bfloat16()`` round buffers, too; a way there and back is not a change of the user's."""
MADE_ANEW = (MARKER, CARD, REPORT_FILE, WEIGHTS, ONNX_FOLDER, LATER)
"""What is not copied from a folder whose weights are written again: what holds weights, figures or digests of them."""


@dataclass(frozen=True)
class Snapshot:
    """A model as it was opened, to see what was changed since.

    Attributes:
        likes: name → type and shape of each weight.
        digest: of the weights.
        tied: groups of names of one weight.
        configs: the fields of its configs.
        parts: name → class and plain settings of each part.
        buffers: the floating buffers that no checkpoint holds.
    """

    likes: Mapping[str, tuple[torch.dtype, torch.Size]]
    digest: str
    tied: Sequence[Sequence[str]]
    configs: Mapping[str, Mapping[str, object]]
    parts: Mapping[str, Mapping[str, object]]
    buffers: Mapping[str, Tensor]

    @staticmethod
    def of(module: nn.Module) -> Snapshot:
        """The snapshot of a module now."""
        module = unwrap_parallel(module)
        weights = module.state_dict()
        likes = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
        buffers = {name: tensor.clone() for name, tensor in _list_unsaved_buffers(module).items()}
        return Snapshot(
            likes,
            _hash_tensors(weights),
            _group_tied_names(weights),
            _list_configs(module),
            _list_parts(module),
            buffers,
        )

    def read_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's present weights in the types that they were opened in, on the CPU.

        Raises:
            MptkError: it has other weights now, as adapters add them; or some that the folder cannot hold.
        """
        # First the names, then what the folder's types and shapes can hold, then what a tied checkpoint can.
        found = {name: tensor.detach() for name, tensor in unwrap_parallel(module).state_dict().items()}
        if other := sorted(found.keys() ^ self.likes.keys()):
            raise ChangedError(
                f"model has other parameters than the pruned model ({other[0]}); merge or remove adapters first, for "
                "example with merge_and_unload()",
                name=other[0],
            )
        for name, tensor in found.items():
            if (wrong := _explain_misfit(tensor, *self.likes[name])) is not None:
                raise ChangedError(
                    f"{name} of model {wrong}; write the model by itself, or open the folder again", name=name
                )
        cast = {name: tensor.to("cpu", self.likes[name][0]) for name, tensor in found.items()}
        for first, *others in self.tied:
            if apart := next((name for name in others if not cast[name].equal(cast[first])), None):
                raise ChangedError(
                    f"{first} and {apart} are one weight of the pruned model, and differ now; give both the same "
                    "numbers, or write the model by itself with model.save_pretrained(DIR)",
                    name=first,
                )
        return cast

    def has_changed(self, module: nn.Module) -> bool:
        """Whether the module has other numbers now. Raises MptkError as ``read_weights``."""
        return _hash_tensors(self.read_weights(module)) != self.digest

    def is_converted(self, module: nn.Module) -> bool:
        """Whether the module has its weights in other types now, as after ``half()``."""
        return any(tensor.dtype != self.likes[name][0] for name, tensor in unwrap_parallel(module).state_dict().items())

    def check_rest(self, module: nn.Module) -> None:
        """Raise MptkError if a config, a part or a buffer of the module was changed, which no weights file holds."""
        module = unwrap_parallel(module)
        # A proof of the weights sees none of this: it runs the class of the folder, with the folder's config.
        for name, now in _list_configs(module).items():
            before = self.configs.get(name, {})
            if fields := sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key)):
                raise ChangedError(
                    f"{name} of model was changed in memory ({fields[0]}), and a pruned folder has the config that was "
                    "proven; put it back, or write the model by itself with model.save_pretrained(DIR)",
                    name=name,
                )
        parts = _list_parts(module)
        # Parts that were there must be as they were. Further ones count only by their weights.
        for name, part in self.parts.items():
            there = parts.get(name)
            if there is None or any(there.get(key) != value for key, value in part.items()):
                what = _describe_difference(part, there)
                raise ChangedError(
                    f"{name or 'model'} was changed in memory ({what}), and a pruned folder has the parts that were "
                    "proven; put it back, or write the model by itself",
                    name=name or "model",
                )
        buffers = _list_unsaved_buffers(module)
        for name, buffer in self.buffers.items():
            if name not in buffers or not _is_rounded(buffer, buffers[name]):
                raise ChangedError(
                    f"{name} of model was changed in memory, and no pruned folder holds this buffer; put it back, or "
                    "write the model by itself",
                    name=name,
                )


def _explain_misfit(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> str | None:
    """Why a folder whose weight has this type and shape cannot hold a tensor in its place; None if it can."""
    if tensor.is_meta:
        return "is not in memory (it is on the meta device)"
    if tensor.layout is not torch.strided:
        return "is a sparse tensor"
    if tensor.shape != shape:
        return f"has the shape {list(tensor.shape)} now, and the pruned model's has {list(shape)}"
    if tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex() != dtype.is_complex:
        return f"has the type {tensor.dtype} now, and the pruned model's has {dtype}"
    return None


def _group_tied_names(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each weight that has several."""
    # Tied names have the same memory in the same order. Empty tensors share an address without being tied.
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in weights.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _list_parts(module: nn.Module) -> dict[str, dict[str, object]]:
    """Name of each part → its class, numbers and words. What training or running changes is left out."""
    return {
        name: {"class": type(part).__name__}
        | {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, int | float | str) and not key.startswith("_") and key not in PASSING_ATTRIBUTES
            if "dropout" not in key  # which nothing uses in evaluation mode
        }
        for name, part in module.named_modules()
        if not isinstance(part, nn.Dropout)
    }


def _describe_difference(before: Mapping[str, object], now: Mapping[str, object] | None) -> str:
    """What differs in a part, in words."""
    if now is None:
        return "it was removed"
    key = next(key for key in before if now.get(key) != before[key])
    return f"{key} {before[key]} is {now.get(key, 'gone')}"


def _list_unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The floating buffers that no checkpoint holds. Those that ``forward`` computes anew are left out."""
    saved = module.state_dict().keys()
    running = {name for name, part in module.named_modules() if getattr(part, "rope_type", "default") in ROPES_ANEW}
    return {
        name: buffer.detach()
        for name, buffer in module.named_buffers()
        if name not in saved and buffer.is_floating_point() and name.rpartition(".")[0] not in running
    }


def _is_rounded(before: Tensor, now: Tensor) -> bool:
    """Whether a buffer has its numbers of before, or these after a conversion to a narrower type and back."""
    if now.is_meta or now.shape != before.shape:
        return False
    now = now.cpu().to(before.dtype)
    return any(now.equal(before.cpu().to(dtype).to(before.dtype)) for dtype in (before.dtype, *HALF_TYPES))


def _hash_tensors(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    return digest.hexdigest()


def _list_configs(module: nn.Module) -> dict[str, dict[str, object]]:
    if not isinstance(module, PreTrainedModel):
        return {}
    found = {"config": module.config, "generation_config": getattr(module, "generation_config", None)}
    return {
        name: {key: value for key, value in config.to_dict().items() if key not in PASSING}
        for name, config in found.items()
        if config is not None
    }


def read_saved_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that a tokenizer writes, to see whether it was changed, without how its last call cut and padded."""
    with make_scratch() as place:
        save_tokenizer(tokenizer, place.folder)
        found = {file.name: file.read_bytes() for file in place.folder.iterdir()}
    # A fast tokenizer keeps the last call's padding and truncation, and writes them.
    if (name := "tokenizer.json") in found:
        kept = {key: value for key, value in json.loads(found[name]).items() if key not in ("padding", "truncation")}
        found[name] = format_json(kept).encode()
    return found


def check_same(what: str, now: object, before: object) -> None:
    """Raise MptkError if what a ``Pruned`` holds is not as its folder says."""
    if now != before:
        raise ChangedError(
            f"{what} of this result was changed in memory, and a pruned folder says what was proven; open the folder "
            "again with Pruned.open, or prune again",
            name=what,
        )


@dataclass(frozen=True)
class FirstRun:
    """What is known of the run that made a folder: the dense model, its task, and the samples; None if it is not.

    ``trust``: the caller's word on code, in the call that made the result or opened the folder. ``digests``: of the
    run's inputs.
    """

    opened: Opened | None = None
    model: str | nn.Module | None = None
    sets: SampleSets | None = None
    trust: Trust = NO_CODE
    digests: Origin = field(default_factory=Origin)


def write_again(
    place: Path, out: Path, report: Report, weights: Mapping[str, Tensor], origin: FirstRun, context: Context
) -> Result | Report:
    """Write the pruned folder ``place`` to ``out`` with other weights, and prove it.

    A module that was pruned in memory cannot be opened again. Without it, the graph is compared with what is read back:
    its structure was proven before. A report that was only read lets no code of a model run.

    Raises:
        MptkError: the dense model is needed and not found; or as ``mptk.prune``.
    """
    # A plain module has no config. If it is neither in memory nor given, only the graph of the folder is left of it.
    plain = report.live and (place / ARCHIVE).is_file() and not (place / "config.json").is_file()
    if plain and origin.opened is None and origin.model is None:
        return _write_graph(place, out, report, weights)
    # The settings of the first run, without what chooses numbers, places or data of a run.
    used = replace(
        report.settings, resume=False, overwrite=False, minutes=None, trust_remote_code=origin.trust.allows_code
    )
    used = replace(used, data=IN_MEMORY, eval_data=None)  # data is not read again: the current folder may be another
    changed = ChangedWeights(place, report, origin.opened or origin.model, weights=weights, sets=origin.sets)
    settings = changed.take_settings(used)
    with open_run(changed, changed.source, out, settings, Inputs(), context, trains=False) as run:
        return rewrite_folder(changed, run)


def _write_graph(place: Path, out: Path, report: Report, weights: Mapping[str, Tensor]) -> Report:
    """Write a module's folder with other weights. What is read back must compute what these weights do in memory."""
    stored = load_tensors(place / WEIGHTS, make_damage_error(place / WEIGHTS))
    new = {name: weights[name].to(tensor.dtype) for name, tensor in stored.items()}
    in_memory = open_archive(place / ARCHIVE, Weights(new))
    samples = Samples(load_tensors(place / PROVEN_ON, make_damage_error(place / PROVEN_ON)))
    with publish(out) as folder:
        # The graph itself, the plan and the proof's samples stay. Weights, ONNX and what is said of them are made anew.
        shutil.copytree(place, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*MADE_ANEW))
        write_weights(folder / WEIGHTS, Weights(new))
        reloaded = open_archive(folder / ARCHIVE, read_weights(folder))
        stages: dict[str, tuple[Program | StageOutputs, float]] = {"reloaded weights": (reloaded, TOLERANCE)}
        if (place / ONNX_FOLDER).is_dir():
            stages |= _write_onnx(reloaded, folder / ONNX_FOLDER, report, samples)
        # On the samples of the first proof: the first run's data may be gone.
        proof = prove(in_memory, stages, samples)
        check_proof(proof, "nothing was written. Please report this model")
        changed = [name for name, tensor in stored.items() if not tensor.equal(new[name])]
        found = replace(
            report,
            changed=True,
            trained=list(dict.fromkeys([*report.trained, *changed])),
            weights_sha256=hash_weight_files(folder),
            quality={},  # the measured quality was the old weights'
            quantized=measure_graphs(folder / ONNX_FOLDER, Module(samples).onnx),
            proof=[d.to_dict() for d in proof],
            notes=list(dict.fromkeys([*report.notes, WEIGHTS_CHANGED])),
            files=sorted([*list_files(folder), REPORT_FILE, CARD]),
        )
        found.write(folder)
        write_card(found, None, folder)
    return found


def _write_onnx(
    program: Program, folder: Path, report: Report, samples: Samples
) -> Mapping[str, tuple[Program | StageOutputs, float]]:
    """Write a module's graphs, of the program itself and not of a new trace. Returns the stages of their proof."""
    module, settings = program.module().eval(), replace(report.settings, quantize=tuple(report.quantized), strict=True)
    opened = open_in_memory(module, NO_CODE, Inputs(example_inputs=samples.inputs))
    form = opened.task.onnx
    assert form is not None
    dense = Dense(opened.loaded, settings, program, about={"plan_sha256": report.plan_sha256})
    export_form(form, dense, None, opened.task.make_example(opened.loaded.model), folder, Log())
    return list_form_stages(form, folder, Use(), EXECUTOR.device, settings).stages
