"""image_forms: the forms in which classes read images, how many tokens an image becomes, and the sizes a trace holds.

A sample holds its image in the first dimension of each input. Classes that pack the patches of all images into one
sequence get them flattened when they are called (``arrange_inputs``).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mptk.compat.torch import hide_fake_logs, keep_small_constants
from mptk.compat.transformers import compute_vision_inputs
from mptk.errors import ModelError, TargetError, take_first_line
from mptk.tasks.inputs.base import EXAMPLES, PIXELS, POSITIONS, Named
from mptk.tasks.inputs.images import IMAGE_CHANNELS, IMAGE_SIZE
from passes.frontend.trace import hold_evaluation_mode, place_fake_weights

GRIDS, IMAGE_SIZES = KNOWN_SIZES = ("image_grid_thw", "image_sizes")
"""Inputs that are sizes of images: frames, height and width in patches; height and width in pixels."""
EXAMPLE_BLOCKS = 2
"""Height and width of a packed example image, in patches that become one token."""


def arrange_inputs(inputs: Mapping[str, Tensor]) -> Named:
    """The inputs of samples as the class takes them: packed patches in one sequence, axes of positions first."""
    found = dict(inputs)
    if GRIDS in found:
        found[PIXELS] = found[PIXELS].flatten(0, 1)
    if POSITIONS in found:
        found[POSITIONS] = found[POSITIONS].transpose(0, 1)
    return found


def find_trace_constants(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor | int]:
    """What a trace holds as numbers: the sizes of images, and the windows that an encoder makes of them with loops."""
    sizes: dict[str, Tensor | int] = {name: inputs[name] for name in KNOWN_SIZES if name in inputs}
    encoders = [m for m in model.modules() if "grid_thw" in inspect.signature(m.forward).parameters]
    if GRIDS in inputs and encoders:
        found = compute_vision_inputs(encoders[0], inputs[GRIDS])
        sizes |= {f"image_{name}": value for name, value in found.items() if "window" in name and value is not None}
    return sizes


@contextmanager
def hold_constants(
    pixels: Tensor | None, numbers: Mapping[str, Tensor | int], marks: int = 0
) -> Iterator[dict[str, Any]]:
    """A trace inside computes with ``numbers``, which it is given as constants, and finds no image blank.

    ``marks``: the tokens that stand for images, in all samples.
    """
    with keep_small_constants(), nullcontext() if pixels is None else NoBlankImages(pixels, marks):
        yield {
            # Made anew inside of the trace, which takes them for constants.
            name: torch.tensor(value.tolist(), dtype=value.dtype) if isinstance(value, Tensor) else value
            for name, value in numbers.items()
        }


class NoBlankImages(TorchFunctionMode):
    """Patches the check for blank images, which pad samples with fewer images than others: a trace must drop none.

    Classes drop them by a mask, and the size of what is left would depend on numbers. Likewise the number of tokens
    that stand for images: a trace gets it as ``marks``.
    """

    def __init__(self, pixels: Tensor, marks: int) -> None:
        super().__init__()
        self.marks = marks
        self.count, self.size = pixels.shape[:-3].numel(), pixels.shape[-3:].numel()

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        # The count of an image's zeros ≠ its size: true of each image.
        if func in (Tensor.__ne__, Tensor.ne, torch.ne) and args[0].shape == (self.count,) and args[1] == self.size:
            return torch.tensor([True] * self.count)
        # images[mask], if the mask is the one above: all images.
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool:
            mask = args[1]
            if mask.shape == (self.count,) == args[0].shape[:1] and all(mask.tolist()):
                return args[0]
        # states[mask, :] at the tokens of images, read or written: as many rows as there are marks.
        if func in (Tensor.__getitem__, Tensor.__setitem__) and self._is_at_marks(*args):
            mask = args[1][0]
            if func is Tensor.__setitem__:
                return args[0].copy_(args[0].masked_scatter(mask[..., None], args[2]))
            first = mask.flatten().int().argsort(descending=True, stable=True)[: self.marks]
            return args[0].flatten(0, 1).index_select(0, first)
        return func(*args, **(kwargs or {}))

    def _is_at_marks(self, states: Tensor, index: object, *values: Tensor) -> bool:
        """Whether an index takes the states [samples, length, channels] at the tokens of images."""
        if not isinstance(index, tuple) or len(index) != 2 or index[1] != slice(None):
            return False
        mask = index[0]
        return isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == states.shape[:2]


@dataclass(frozen=True)
class Lengths:
    """In a trace: numbers whose count is open, as one number. A list that is divided by it stays whole."""

    of: Tensor


class AnyImages(TorchFunctionMode):
    """Keeps images in one tensor, so that a trace holds for any number of them. None is blank.

    Classes make lists of images, or divide a sequence among them; both need their number. If the sequence of an
    attention was to be divided, a mask does it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: Tensor | None = None

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        named = dict(kwargs or {})
        # A sequence that is to be divided among images stays whole, and its attention gets a mask of their parts.
        if func in (torch.split, Tensor.split) and isinstance(args[1], list) and isinstance(args[1][0], Lengths):
            self.lengths = args[1][0].of
            return (args[0],)
        if func is F.scaled_dot_product_attention and self.lengths is not None and named.get("attn_mask") is None:
            return func(*args, **named | {"attn_mask": _match_parts(self.lengths, args[0].shape[-2])})
        # What follows is for tensors of any number of images only.
        if not _is_open(args):
            return func(*args, **named)
        # Their numbers are one number; a list of them has one entry, which is the tensor; the mask of blank ones takes
        # all.
        if func is Tensor.item:
            return Lengths(args[0])
        if func is Tensor.__len__:
            return 1
        if func is Tensor.unbind and args[1:] in ((), (0,)):
            return (args[0],)
        if func is Tensor.__getitem__ and _is_images_mask(args[1], args[0]):
            return args[0]
        return func(*args, **named)


def _is_open(args: Sequence[object]) -> bool:
    """Whether the first argument is a tensor of any number of parts."""
    first = args[0] if args else None
    return isinstance(first, Tensor) and first.ndim > 0 and isinstance(first.shape[0], torch.SymInt)


def _match_parts(lengths: Tensor, count: int) -> Tensor:
    """Whether two of ``count`` positions are in the same part of a sequence: bool [1, 1, count, count]."""
    part = (torch.arange(count)[:, None] >= lengths.cumsum(0)[None]).sum(1)
    return (part[:, None] == part[None])[None, None]


def _is_images_mask(index: object, images: Tensor) -> bool:
    """Whether an index says of each image [images, …] whether it is not blank."""
    return isinstance(index, Tensor) and index.dtype is torch.bool and index.ndim == 1 and images.ndim > 2


def make_grid_function(model: Any, grids: Tensor) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A function of sizes [images, 3] and packed patches: what the vision encoder makes of these with loops, by name.

    ``grids``: an example. Raises MptkError if the encoder makes something else of sizes.
    """
    encoders = [m for m in model.modules() if "grid_thw" in inspect.signature(m.forward).parameters]
    wanted = compute_vision_inputs(encoders[0], grids) if encoders else {}
    names = [name for name, value in wanted.items() if isinstance(value, Tensor)]
    if not encoders or (unknown := [name for name in names if name not in FORMULAS]):
        what = unknown[0] if encoders else "something"
        raise TargetError(
            f"{type(model).__name__} makes {what} of the sizes of images, which a graph cannot yet",
            name=type(model).__name__,
        )
    return lambda sizes, patches: {
        f"image_{name}": FORMULAS[name](encoders[0], sizes, patches.shape[0]) for name in names
    }


def make_image_inputs(model: PreTrainedModel) -> Named:
    """Noise in the form in which the class reads images, for ``EXAMPLES`` samples.

    Raises:
        MptkError: it takes none of the usual forms.
    """
    reasons = []
    for inputs in _list_forms(model):
        if not (reason := _explain_refusal(model, inputs)):
            return inputs
        reasons.append(reason)
    raise ModelError(
        f"{type(model).__name__} takes no image of its config's size ({reasons[0]}); give --inputs",
        name=type(model).__name__,
    )


def _explain_refusal(model: PreTrainedModel, inputs: Named) -> str:
    """Why the class does not take these images; empty if it does."""
    try:
        with hide_fake_logs():
            count_image_tokens(model, inputs)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return take_first_line(error) or type(error).__name__
    return ""


def _list_forms(model: PreTrainedModel) -> Iterator[Named]:
    """Images of the config's size in the usual forms."""
    vision = getattr(model.config, "vision_config", model.config)
    names = inspect.signature(model.forward).parameters
    channels = _find_first(vision, "num_channels", "in_channels", "in_chans") or IMAGE_CHANNELS
    generator = torch.Generator().manual_seed(0)
    if GRIDS in names:
        yield from _make_packed(vision, channels, generator)
        return
    # The usual forms, the richest first: tiles with sizes, images with sizes, images, one image in a list for each
    # sample.
    size = getattr(vision, "image_size", None) or IMAGE_SIZE
    height, width = size if isinstance(size, Sequence) else (size, size)
    pixels = torch.randn(EXAMPLES, channels, height, width, generator=generator)
    sizes = torch.tensor([[height, width]] * EXAMPLES)
    if IMAGE_SIZES in names and getattr(model.config, "image_grid_pinpoints", None):
        parts = sys.modules[type(model).__module__].image_size_to_num_patches(
            (height, width), model.config.image_grid_pinpoints, vision.image_size
        )
        yield {PIXELS: pixels[:, None].repeat(1, parts, 1, 1, 1), IMAGE_SIZES: sizes}
    if IMAGE_SIZES in names:
        yield {PIXELS: pixels, IMAGE_SIZES: sizes}
    yield {PIXELS: pixels}
    yield {PIXELS: pixels[:, None]}


def _make_packed(vision: object, channels: int, generator: torch.Generator) -> Iterator[Named]:
    """Patches of a square image: [samples, patches, numbers], or [samples, patches, C, height, width]."""
    patch = _find_first(vision, "patch_size", "spatial_patch_size")
    patch = patch[-1] if isinstance(patch, Sequence) else patch
    merged = _find_first(vision, "spatial_merge_size", "merge_size", "merge_kernel_size") or 1
    side = EXAMPLE_BLOCKS * (merged if isinstance(merged, int) else merged[0])
    frames = _find_first(vision, "temporal_patch_size", "patch_temporal") or 1
    grids = torch.tensor([[1, side, side]] * EXAMPLES)
    # Patches as rows of numbers (Qwen2-VL), or as small pictures of one frame.
    pixels = torch.randn(EXAMPLES, side * side, channels, frames, patch, patch, generator=generator)
    yield {PIXELS: pixels.flatten(2), GRIDS: grids}
    yield {PIXELS: pixels[:, :, :, 0], GRIDS: grids}


def _find_first(config: object, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def make_other_size(model: PreTrainedModel) -> Named | None:
    """Images of another width than ``make_image_inputs`` makes; None if the class takes only one size."""
    inputs, generator = make_image_inputs(model), torch.Generator().manual_seed(1)
    pixels = inputs[PIXELS]
    if GRIDS in inputs:
        # Wider by one block of patches that become one token.
        frames, height, width = inputs[GRIDS][0].tolist()
        wider = width + width // EXAMPLE_BLOCKS
        found = {
            PIXELS: torch.randn(EXAMPLES, height * wider, *pixels.shape[2:], generator=generator),
            GRIDS: torch.tensor([[frames, height, wider]] * EXAMPLES),
        }
    elif IMAGE_SIZES in inputs and pixels.ndim == 4:
        height, width = inputs[IMAGE_SIZES][0].tolist()
        found = {PIXELS: pixels[..., : width // 2], IMAGE_SIZES: torch.tensor([[height, width // 2]] * EXAMPLES)}
    else:
        return None
    return None if _explain_refusal(model, found) else found


@torch.no_grad()
def count_image_tokens(model: Any, inputs: Named) -> int:
    """The tokens that the image of each sample becomes, by the shape of its features."""
    # With fake weights, so that it costs no memory and no time, and works before weights are read.
    named = arrange_inputs(inputs)
    with (
        hold_evaluation_mode(model),
        place_fake_weights(model, (named[PIXELS],)) as (pixels,),
        hold_constants(pixels, {n: x for n, x in inputs.items() if n in KNOWN_SIZES}) as held,
    ):
        found = model.get_image_features(pixel_values=pixels, **held, return_dict=True)
    features = getattr(found, "pooler_output", found)
    each = [features] if isinstance(features, Tensor) else list(features)
    return sum(x.numel() for x in each) // each[0].shape[-1] // len(inputs[PIXELS])


def compute_image_positions(model: Any, inputs: Mapping[str, Tensor], images: Tensor) -> Named:
    """The positions on several axes that the class gives tokens of an image, [samples, axes, length], if it does.

    ``images``: bool [samples, length], where the tokens of images are.
    """
    base = getattr(model, "model", model)
    if not hasattr(base, "get_rope_index"):
        return {}
    known = {**inputs, "mm_token_type_ids": images.int()}
    wanted = inspect.signature(base.get_rope_index).parameters
    found, _ = base.get_rope_index(**{name: value for name, value in known.items() if name in wanted})
    return {POSITIONS: found.transpose(0, 1).contiguous()}


# ---- what a vision encoder of packed patches makes of the sizes of images, as tensors of a graph ----
#
# transformers makes these with loops over the images, whose number and sizes a trace would hold as numbers. N: images.
# P: patches of all images. Each image is one frame of height x width patches, in blocks that become one token.


class VisionEncoder(Protocol):
    """What is read of an encoder: patches in each direction of a token's block; pixels of a patch, and of a window."""

    spatial_merge_size: int
    patch_size: int
    window_size: int


@dataclass(frozen=True)
class Packed:
    """Images in one sequence, and where the ``steps`` of one row or column of a token's block make ``count`` units.

    ``heights``, ``widths``: int64 [N], in units. ``image``: the image of each unit, int64 [count]. ``local``: the
    number of the unit in its image, int64 [count].
    """

    heights: Tensor
    widths: Tensor
    image: Tensor
    local: Tensor

    @classmethod
    def of(cls, grids: Tensor, count: int, size: int = 1) -> Packed:
        """``grids``: int64 [N, 3]; ``size``: patches in each direction that are one unit; ``count``: of all units."""
        heights, widths = grids[:, 1] // size, grids[:, 2] // size
        ends = (heights * widths).cumsum(0)
        units = torch.arange(count)
        image = (units[:, None] >= ends[None]).sum(1)
        return cls(heights, widths, image, units - F.pad(ends, (1, 0))[image])


def compute_patch_positions(encoder: VisionEncoder, grids: Tensor, patches: int) -> Tensor:
    """Row and column of each patch, int64 [P, 2]; patches of a block follow each other."""
    merged, packed = encoder.spatial_merge_size, Packed.of(grids, patches)
    block, within = packed.local // merged**2, packed.local % merged**2
    across = (packed.widths // merged)[packed.image]
    rows, columns = block // across * merged + within // merged, block % across * merged + within % merged
    return torch.stack([rows, columns], 1)


def compute_image_ends(encoder: VisionEncoder, grids: Tensor, patches: int) -> Tensor:
    """The patches before the end of each image, after a zero: int64 [N + 1]."""
    return F.pad((grids[:, 1] * grids[:, 2]).cumsum(0), (1, 0))


def _number_windows(encoder: VisionEncoder, grids: Tensor, patches: int) -> Tensor:
    """The number of the window in which each token is, int64 [P / patches of a token]."""
    merged = encoder.spatial_merge_size
    packed = Packed.of(grids, patches // merged**2, merged)
    side = encoder.window_size // merged // encoder.patch_size
    down, across = packed.heights // side + 1, packed.widths // side + 1
    before = F.pad((down * across).cumsum(0), (1, 0))[packed.image]
    width = packed.widths[packed.image]
    return before + packed.local // width // side * across[packed.image] + packed.local % width // side


def order_windows(encoder: VisionEncoder, grids: Tensor, patches: int) -> Tensor:
    """The tokens window by window, int64 [tokens]."""
    windows = _number_windows(encoder, grids, patches)
    count = windows.shape[0]
    return torch.argsort(windows * count + torch.arange(count))


def compute_window_ends(encoder: VisionEncoder, grids: Tensor, patches: int) -> Tensor:
    """For each token of ``order_windows`` the patches before its window ends, after a zero: int64 [tokens + 1]."""
    ordered = _number_windows(encoder, grids, patches).sort().values
    before = (ordered[None] <= ordered[:, None]).sum(1)
    return F.pad(before * encoder.spatial_merge_size**2, (1, 0))


FORMULAS: Mapping[str, Callable[[VisionEncoder, Tensor, int], Tensor]] = {
    "position_ids": compute_patch_positions,
    "cu_seqlens": compute_image_ends,
    "window_index": order_windows,
    "cu_window_seqlens": compute_window_ends,
}
"""transformers' name → the function of an encoder, of the sizes of images int64 [N, 3], and of P."""
