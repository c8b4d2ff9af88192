"""packed_images: what a vision encoder of packed patches makes of the sizes of images, as tensors of a graph.

transformers makes these with loops over the images, whose number and sizes a trace would hold as numbers. N: images.
P: patches of all images. Each image is one frame of height x width patches, in blocks that become one token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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
