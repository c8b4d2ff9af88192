"""vLLM's and SGLang's own model files on plain layers, to run them without their packages, kernels and GPUs.

``code_of`` imports ``models/nemotron_nas.py`` and ``models/llama.py`` of an unpacked wheel. All else that these import
is replaced: layers by plain ones of this file under the same names, the rest by empty classes. So config, shapes,
loading of weights and the order of the computation are the engine's; only the arithmetic of a layer is ours.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FOLDERS = {"vllm": "vllm.model_executor.models", "sglang": "sglang.srt.models"}
"""Engine → the package of its models."""

# ---- layers ----


class Linear(nn.Module):
    """Several projections of one input side by side: ``parts`` are name → rows. Weights are NaN until they are loaded."""

    def __init__(self, size: int, parts: Mapping[Any, int], bias: bool) -> None:
        super().__init__()
        rows = sum(parts.values())
        self.parts = parts
        self.weight = nn.Parameter(torch.full((rows, size), torch.nan))
        self.bias = nn.Parameter(torch.full((rows,), torch.nan)) if bias else None
        for parameter in self.parameters():
            parameter.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Tensor, loaded: Tensor, part: Any = None) -> None:
        names = [*self.parts]
        start = 0 if part is None else sum(self.parts[name] for name in names[: names.index(part)])
        set_to(parameter.narrow(0, start, len(parameter) if part is None else self.parts[part]), loaded)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight, self.bias), None


def qkv(
    hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int, bias: bool, **_: Any
) -> Linear:
    rows = {"q": head_size * total_num_heads, "k": head_size * total_num_kv_heads, "v": head_size * total_num_kv_heads}
    return Linear(hidden_size, rows, bias)


def merged(input_size: int, output_sizes: Sequence[int], bias: bool, **_: Any) -> Linear:
    return Linear(input_size, dict(enumerate(output_sizes)), bias)


def row(input_size: int, output_size: int, bias: bool, **_: Any) -> Linear:
    return Linear(input_size, {None: output_size}, bias)


class Norm(nn.Module):
    """RMSNorm; with a residual, of the sum of both, which it also gives back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((size,), torch.nan)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        made = nn.functional.rms_norm(total, (total.shape[-1],), self.weight, self.eps)
        return made if residual is None else (made, total)


class Table(nn.Module):
    """An embedding."""

    def __init__(self, rows: int, size: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, size), torch.nan))

    def tie_weights(self, other: Table) -> Table:
        return other

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class Rope(nn.Module):
    """Rotary positions of the default type."""

    def __init__(self, size: int, parameters: Mapping[str, Any]) -> None:
        super().__init__()
        assert parameters["rope_type"] == "default", parameters
        self.size, self.base = size, parameters["rope_theta"]

    def forward(self, positions: Tensor, *values: Tensor) -> list[Tensor]:
        angles = positions[:, None] / self.base ** (torch.arange(0, self.size, 2) / self.size)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        made = []
        for value in values:
            one, other = value.view(len(positions), -1, self.size).chunk(2, -1)
            made.append(torch.cat((one * cos - other * sin, other * cos + one * sin), -1).flatten(1))
        return made


def rope(head_size: int, *, rope_parameters: Any = None, rope_scaling: Any = None, **_: Any) -> Rope:
    return Rope(head_size, rope_parameters or rope_scaling)


class Attention(nn.Module):
    """Causal attention over one sequence: queries [tokens, heads · size]."""

    def __init__(self, num_heads: int, head_dim: int, scaling: float, num_kv_heads: int, **_: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.scaling = num_heads, num_kv_heads, head_dim, scaling

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q = q.view(len(q), self.heads, self.size).transpose(0, 1)
        k, v = (x.view(len(x), self.groups, self.size).transpose(0, 1) for x in (k, v))
        found = nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=self.scaling, enable_gqa=True
        )
        return found[0].transpose(0, 1).flatten(1)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


class Boundary:
    """SGLang's place before attention or feed-forward: the residual is added to and normed."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def prepare(self, x: Tensor, batch: SimpleNamespace) -> Any:
        batch.residual = x if batch.residual is None else batch.residual + x
        return self.norm(batch.residual)

    def finish(self, x: Tensor, batch: SimpleNamespace) -> Tensor:
        return x


class Batch:
    """SGLang's residual of a batch."""

    def start(self, batch: SimpleNamespace) -> None:
        batch.residual = None

    def final_norm(self, x: Tensor, batch: SimpleNamespace, norm: Norm) -> Any:
        return norm(batch.residual + x)


# ---- the rest ----


def set_to(parameter: Tensor, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape, (parameter.shape, loaded.shape)
    parameter.data.copy_(loaded)


class WeightsLoader:
    """vLLM's loader of a module: names are changed by the mapper, and each parameter loads itself."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], mapper: Any) -> None:
        for name, loaded in weights:
            found = next((old for old in mapper.stacked if old in name), None)
            new, *part = mapper.stacked[found] if found else ("",)
            parameter = self.parameters[name.replace(found, new) if found else name]
            getattr(parameter, "weight_loader", set_to)(parameter, loaded, *part)


class Mapper:
    def __init__(self, orig_to_new_stacked: Mapping[str, tuple[str, Any]]) -> None:
        self.stacked = orig_to_new_stacked


def layers(count: int, make: Callable[..., nn.Module], prefix: str) -> tuple[int, int, nn.ModuleList]:
    return 0, count, nn.ModuleList(make(prefix=f"{prefix}.{i}") for i in range(count))


def pp_layers(count: int, make: Callable[..., nn.Module], prefix: str, **_: Any) -> tuple[nn.ModuleList, int, int]:
    return nn.ModuleList(make(i, prefix=f"{prefix}.{i}") for i in range(count)), 0, count


RANK = SimpleNamespace(is_first_rank=True, is_last_rank=True)
NAMES: dict[str, Any] = {
    **{"QKVParallelLinear": qkv, "MergedColumnParallelLinear": merged, "RowParallelLinear": row},
    **{"RMSNorm": Norm, "VocabParallelEmbedding": Table, "ParallelLMHead": Table, "get_rope": rope},
    **{"Attention": Attention, "RadixAttention": Attention, "SiluAndMul": SiluAndMul},
    **{"AutoWeightsLoader": WeightsLoader, "WeightsMapper": Mapper, "default_weight_loader": set_to},
    **{"make_layers": layers, "make_pp_layers": pp_layers, "residual_batch": Batch(), "batch": Batch()},
    "get_pp_group": lambda: RANK,
    "get_parallel": lambda: SimpleNamespace(tp_size=1, pp_group=RANK),
    "get_tensor_model_parallel_world_size": lambda: 1,
    "extract_layer_index": lambda prefix: int(prefix.split(".")[2]),
    "maybe_prefix": lambda before, name: f"{before}.{name}" if before else name,
    "add_prefix": lambda name, before: f"{before}.{name}" if before else name,
    "make_empty_intermediate_tensors_factory": lambda *_: None,
    "maybe_fused_act_quant": lambda act, x, _: act(x),
    "append_stages": lambda *stages: [Boundary(norm) for _, norm in stages],
    **dict.fromkeys(("declare_attn", "declare_ffn"), lambda **_: None),
    **dict.fromkeys(("is_npu", "is_xpu"), lambda: False),
    **dict.fromkeys(("as_embedding_model", "as_seq_cls_model"), lambda kind: kind),
    "support_torch_compile": lambda kind=None, **_: kind or (lambda each: each),
}
"""What the engines' files import, by name."""


class _Named(type):
    """The type of an empty class, which has every attribute."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _Empty(metaclass=_Named):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def can_run(self, *_: Any) -> bool:
        return False


class _Replaced(ModuleType):
    """A module whose names are those of ``NAMES``, or empty classes."""

    __path__ = ()  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return NAMES.get(name) or _Named(name, (_Empty,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, engine: str, root: Path) -> None:
        self.engine, self.root = engine, root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.engine:
            return None
        if name in {f"{FOLDERS[self.engine]}.{file}" for file in ("llama", "nemotron_nas")}:
            return importlib.util.spec_from_file_location(name, self.root / f"{name.replace('.', '/')}.py")
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Replaced(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


@functools.cache
def code_of(engine: str, root: Path) -> Any:
    """The module ``nemotron_nas`` of an engine. ``root``: the folder with its package, as unpacked from the wheel."""
    sys.meta_path.insert(0, _Finder(engine, root))
    return importlib.import_module(f"{FOLDERS[engine]}.nemotron_nas")
