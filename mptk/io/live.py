"""live: a model that the caller holds in memory, in the form in which ``models.open_weights`` gives a folder's model.

Nothing of the caller's model changes. The run has a copy of its modules, whose parameters are on the meta device, and
reads the numbers from the caller's parameters, in float32 on the CPU. The copy of a plain module keeps its types, since
its code may depend on them; if some are float64, all numbers are read in float64.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.errors import ModelError, MptkError
from mptk.files import make_scratch
from mptk.io import models
from mptk.io.checkpoint import copy_beside
from mptk.io.models import Loaded
from mptk.io.remade import make_anew
from mptk.ir import Lazy, Weights, copy_module
from mptk.trust import NO_CODE, Trust


def open_live(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, trust: Trust = NO_CODE) -> Loaded:
    """A model in memory as a run takes it, with its weights as they are now.

    ``tokenizer``: if None, the tokenizer of the folder or hub model that a transformers model was loaded from, if that
    is on this machine.

    Raises:
        MptkError: some weights are not in memory, or are quantised.
    """
    _check(model)
    source, home = name_live_model(model), _find_folder(model)
    dtype = _find_main_type(model)
    place = make_scratch()
    bare = copy_without_weights(model)
    weakref.finalize(bare, place.close)  # later stages read the folder as long as there is the copy
    folder = place.folder
    # Later stages read a config, a card and processors from a folder, so a transformers model gets one.
    if isinstance(model, PreTrainedModel):
        _restore_rounded(bare, model)
        _describe(model, folder, home, dtype)
        if tokenizer is None and home is not None and models.has_tokenizer(home):
            tokenizer = models.load_tokenizer(str(home), trust=trust)
    made: PreTrainedModel = bare  # type: ignore[assignment]  # any module: only the task ``module`` gets another
    return Loaded(made, tokenizer, source, folder, trust, dtype, _collect_weights(model), live=True)


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """The module itself, out of what ``torch.compile``, ``DataParallel`` and their like put around it."""
    # One call takes off one kind of wrapper; wrappers may be nested.
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return model if inner is model else unwrap_parallel(inner)


@contextmanager
def set_evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode; afterwards each part is in the mode that it was in."""
    # By part: users freeze some parts in evaluation mode while the rest trains.
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def name_live_model(model: nn.Module) -> str:
    """What a report calls a model in memory: where it was loaded from, else its class."""
    known = model.config.name_or_path if isinstance(model, PreTrainedModel) else ""
    return str(known) or type(model).__name__


def hash_loaded_weights(loaded: Loaded) -> str:
    """SHA-256 of a model's weights: names, shapes and float32 numbers, of whatever type they are stored in."""
    digest, weights = hashlib.sha256(), loaded.weights
    assert weights is not None
    # Names as the module has them, tied ones once, so that a model and the folder that it was saved to agree.
    kept = loaded.model.state_dict(keep_vars=True)
    named = {name for name, _ in loaded.model.named_parameters()} | {name for name, _ in loaded.model.named_buffers()}
    for name in sorted(named & kept.keys() & weights.keys()):
        tensor = weights[name]
        numbers = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {list(tensor.shape)} {numbers.dtype}\n".encode())
        digest.update(numbers.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if any(map(is_lazy, model.parameters())):
        raise ModelError(f"some weights of this {name} have no shape yet; run it once on an input", name=name)
    if any(p.layout is not torch.strided for p in model.parameters()):
        raise ModelError(f"some weights of this {name} are sparse tensors; make them dense with to_dense()", name=name)
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ModelError(
            f"some weights of this {name} are not in memory; load it without device_map and offloading", name=name
        )
    packed = any(type(m).__module__.startswith("torch.ao.nn.quantized") for m in model.modules())
    if (
        packed
        or getattr(model, "is_quantized", False)
        or any(p.dtype in (torch.int8, torch.uint8) for p in model.parameters())
    ):
        raise ModelError(f"this {name} is quantised, and mptk prunes float weights; load the float model", name=name)


def copy_without_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules in evaluation mode: parameters on the meta device, buffers on the CPU.

    All are in float32, or in a plain module's own types.
    """

    # Buffers are copied, as ``forward`` reads them while it is traced and may write to them.
    def choose_type(tensor: Tensor) -> torch.dtype:
        return tensor.dtype if not isinstance(model, PreTrainedModel) else _choose_type(tensor, torch.float32)

    bare = {id(p): torch.empty_like(p, dtype=choose_type(p), device="meta") for p in model.parameters()}
    return copy_module(
        model, lambda _, tensor: bare.get(id(tensor), tensor), lambda b: b.to("cpu", choose_type(b), copy=True)
    ).eval()


_HALVES = (torch.bfloat16, torch.float16)


def _restore_rounded(bare: nn.Module, model: PreTrainedModel) -> None:
    """Give ``bare`` exact buffers again, if a conversion of ``model`` to half precision rounded them.

    No checkpoint holds these buffers (rotary frequencies), so a folder of the model would have the exact ones.
    """
    saved = model.state_dict(keep_vars=True).keys()
    held = {n: b for n, b in bare.named_buffers() if n not in saved and b.is_floating_point()}
    if not held:
        return
    try:
        anew = dict(make_anew(type(model), model.config).named_buffers())
    except Exception:  # noqa: BLE001  # a class that cannot be made again is refused where a folder of it is loaded
        return
    for name, buffer in held.items():
        exact = anew.get(name)
        if exact is None or exact.shape != buffer.shape:
            continue
        exact = exact.to(buffer.dtype)
        # Only if rounding explains the difference. If not, somebody has changed the buffer, and it stays.
        if any(torch.equal(exact.to(half).to(buffer.dtype), buffer) for half in _HALVES):
            buffer.copy_(exact)


def choose_wide_type(model: nn.Module) -> torch.dtype:
    """The type in which a run computes: float64 if a plain module has such weights, else float32."""
    held = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    return torch.float64 if torch.float64 in held and not isinstance(model, PreTrainedModel) else torch.float32


def _collect_weights(model: nn.Module) -> Weights:
    """The parameters and saved buffers. Each comes to the CPU, in the run's type, when it is asked for."""
    wide = choose_wide_type(model)
    entries = {name: _make_entry(tensor, wide) for name, tensor in model.state_dict(keep_vars=True).items()}
    return Weights({name: entry for name, entry in entries.items() if entry is not None})


def _make_entry(tensor: object, wide: torch.dtype) -> Tensor | Lazy | None:
    if not isinstance(tensor, Tensor):  # a module may save anything (``get_extra_state``)
        return None
    there, dtype = tensor.detach(), _choose_type(tensor, wide)
    if not isinstance(tensor, nn.Parameter):
        return there.to("cpu", dtype, copy=True)  # forward may write to it
    # Already as a run needs it: the caller's own memory serves, without a copy.
    if there.device.type == "cpu" and there.dtype == dtype:
        # Nothing that is trained can be made of a tensor that torch.inference_mode made.
        if there.is_inference():
            return Lazy(torch.empty_like(there, device="meta"), there.clone)
        return there
    # Half precision can also be read as it is, which takes half the memory.
    held = there.dtype if there.dtype in (torch.float16, torch.bfloat16) else None
    narrow = (lambda: there.cpu()) if held is not None else None
    return Lazy(torch.empty_like(there, dtype=dtype, device="meta"), lambda: there.to("cpu", dtype), held, narrow)


def _choose_type(tensor: Tensor, wide: torch.dtype) -> torch.dtype:
    return wide if tensor.is_floating_point() else tensor.dtype


def _find_main_type(model: nn.Module) -> torch.dtype:
    """The type of most floating weights; of a plain module with several types, the one that holds them all."""
    held = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(held) > 1 and not isinstance(model, PreTrainedModel):
        return choose_wide_type(model)
    counts: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


# Model → the temporary folder that it was loaded from, which the model itself does not name (``forget_folder``).
FOLDERS: weakref.WeakKeyDictionary[nn.Module, Path] = weakref.WeakKeyDictionary()


def forget_folder(model: PreTrainedModel, folder: Path) -> None:
    """Take the name of a temporary folder out of a model, so that no file that the model writes names the folder.

    A run of this process that starts from the model still finds its tokenizer there.
    """
    model.name_or_path = model.config.name_or_path = ""
    FOLDERS[model] = folder


def _find_folder(model: nn.Module) -> Path | None:
    """The folder that a transformers model was loaded from, if it is on this machine."""
    # Nothing is downloaded: the caller gave a model, not a name.
    if (known := FOLDERS.get(model)) is not None and known.is_dir():
        return known
    if not isinstance(model, PreTrainedModel) or name_live_model(model) == type(model).__name__:
        return None
    try:
        found = models.locate(name_live_model(model), local=True)
    except MptkError:
        return None
    return found if found.is_dir() else None


def _describe(model: PreTrainedModel, folder: Path, home: Path | None, dtype: torch.dtype) -> None:
    """Write into ``folder`` what a run reads of a checkpoint beside its weights."""
    config = copy.deepcopy(model.config)
    # As ``save_pretrained`` would write it: with the class, and the type of the weights as they are now.
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if home is not None:
        copy_beside(home, folder)
