"""gradients: compare what a program's module and the traced module learn from one sample, and say why they differ.

A graph has no backward of its own: a custom ``autograd.Function`` and a hook on a gradient are lost in a trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mptk.compat.torch import find_custom_function, list_gradient_hooks, tree_leaves
from mptk.errors import take_first_line
from mptk.ir.program import Program, ProgramModule
from mptk.ir.source_location import find_source_line

GRADIENTS_APART = 1e-3
"""Largest difference of a gradient, relative to the largest of its tensor: sums in another order differ by less."""


class Compared(Protocol):
    """A program and its module (``passes/frontend/eager.py``)."""

    program: Program

    def module(self) -> Any:
        """A copy of the module with the program's weights."""


def compare_gradients(pair: Compared, inputs: Sequence[Tensor]) -> str:
    """Why the program trains otherwise than its module; empty if it does not.

    Compared are the gradients of a random projection of all outputs, by weights and floating inputs.
    """
    source = pair.program.source
    names = [] if source is None else [name.removeprefix("module.") for name in list_gradient_hooks(source)]
    hooks = [f"{name or 'the module'} has a hook on its gradient" for name in names]
    wrapper = pair.module()
    try:
        with WatchedGradients() as watched:
            expected = compute_seeded_gradients(wrapper, wrapper.module, inputs)
    except Exception as error:  # noqa: BLE001 (a module may raise anything)
        return f"the module itself cannot be trained ({take_first_line(error)})"
    module = ProgramModule(pair.program)
    found = compute_seeded_gradients(lambda *copies: module.run(copies), module, inputs)
    apart = sorted(name for name in expected.keys() & found.keys() if _is_different(found[name], expected[name]))
    if not apart and not hooks:
        return ""
    causes = [*watched.causes, *hooks] or ["part of its forward works on gradients"]
    where = f"the gradient of {apart[0]} differs" if apart else "gradients differ"
    return f"{where}: {'; '.join(dict.fromkeys(causes))}, which a graph does not hold"


def compute_seeded_gradients(
    run: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    """The gradients by each weight and each floating input, by name; None if there is none."""
    copies = [x.clone().requires_grad_() if x.is_floating_point() else x.clone() for x in inputs]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [t for t in tree_leaves(run(*copies)) if isinstance(t, Tensor) and t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        losses = [(t * torch.randn(t.shape, generator=generator).to(t)).real.sum() for t in outputs]
        if losses:
            torch.stack([loss.double() for loss in losses]).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return found | {f"input {i}": x.grad for i, x in enumerate(copies) if x.requires_grad}


def _is_different(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether gradients differ by more than rounding. None is a gradient of zeros."""
    if found is None or expected is None:
        there = found if expected is None else expected
        return there is not None and bool(there.any())
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return not (found - expected).abs().max().item() <= GRADIENTS_APART * largest if expected.numel() else False


class WatchedGradients(TorchFunctionMode):
    """Notes, while a module runs, what its gradients depend on beside its calls.

    ``causes``: in words, with the line of the source.
    """

    def __init__(self) -> None:
        super().__init__()
        self.causes = list[str]()

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad):
            self.causes.append(f"a hook on the gradient of a tensor{_place()}")
        found = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves((args, found)) if isinstance(t, Tensor)):
            if (function := find_custom_function(tensor)) is not None:
                self.causes.append(f"{function.__name__}{_locate_class(function)} has a backward of its own")
        return found


def _locate_class(function: type) -> str:
    """The file and line of a class, in brackets; empty if it has none."""
    try:
        file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return ""
    return f" ({Path(file).name}:{line})" if file else ""


def _place() -> str:
    """The line of the module's code that is running, in brackets."""
    frames = inspect.stack()
    lines = "\n".join(f'  File "{f.filename}", line {f.lineno}, in {f.function}' for f in reversed(frames))
    found = find_source_line(lines)
    return f" ({found})" if found else ""
