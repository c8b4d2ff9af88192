"""same_class: whether a transformers model in memory computes what its class computes with the same config and weights.

A stock folder holds a config and weights. A hook, another ``forward`` or a number that was set in a module is lost in
it. So the class is made anew from the config, both run on the same inputs, and the calls of their modules are compared.
The first module that gets the same inputs and gives another result is the one that was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptk.compat.torch import tree_leaves
from mptk.errors import ModelError
from mptk.io import Loaded, fill_parameters, make_anew, measure_free_memory
from mptk.ir import Samples, copy_module
from mptk.protocols import Task
from passes.frontend.eager import compute_relative_error
from passes.verify import TOLERANCE, WIDEST

SAME_RESULT = 1e-6
"""Largest relative difference of two results of the same calls on the same numbers, in float32."""


@dataclass(frozen=True)
class Call:
    """A call of the module at ``path``: the tensors in its arguments and in its result."""

    path: str
    given: list[Tensor]
    result: list[Tensor]


@torch.no_grad()
def check_same_class(loaded: Loaded, task: Task, samples: Samples, *, failed: bool = False) -> None:
    """Raise MptkError if a transformers model in memory computes otherwise than its class, with the module's name.

    ``failed``: a proof failed, so a smaller difference counts. A model that is too large to be held once more in
    float32 is not compared.
    """
    model = loaded.model
    # One more copy in float32 (4 bytes), with as much memory left to run both.
    too_large = 4 * sum(p.numel() for p in model.parameters()) > measure_free_memory() / 2
    if not loaded.live or not isinstance(model, PreTrainedModel) or loaded.weights is None or too_large:
        return
    held = {name: loaded.weights[name] for name in loaded.weights}
    try:
        # The class with the same numbers. Some classes compute buffers when they are made, so these are copied, too.
        anew = make_anew(type(model), model.config)
        fill_parameters(anew, held)
        for name, buffer in anew.named_buffers():
            if name in held:
                buffer.copy_(held[name])
        expected, calls = _watch(anew, lambda module: task.compute_output(module, samples))
        # A copy of the module keeps its hooks, and gets float32 weights, so that only code and settings can differ.
        own = copy_module(model, lambda name, tensor: held.get(name, tensor))
        found, mine = _watch(own, lambda module: task.compute_output(module, samples))
    except Exception:  # noqa: BLE001  # a class may raise anything; a folder of it is refused where it is loaded
        return
    # A small difference may be rounding. It is named as the cause only if a proof has failed already.
    apart = _measure_distance(found, expected)
    if apart <= (TOLERANCE if failed else WIDEST):
        return
    path, much = _find_first_changed(calls, mine) or ("", apart)
    kind = type(model).__name__
    raise ModelError(
        f"the reloaded {kind} computes otherwise at {path or 'the model itself'} by {much:.0e} of the largest: the "
        "module in memory has a hook, another forward or other numbers (an epsilon, a scale) than its config says, and "
        "a checkpoint holds only config and weights; put the change into one of these, or use --target graph",
        name=path,
    )


def _find_first_changed(anew: list[Call], own: list[Call]) -> tuple[str, float] | None:
    """The first call that gets the same as in the class and gives something else, and the difference.

    A call ends before the call of the module around it, so the innermost module is first.
    """
    # A module may be called several times, and a hook may add calls, so the n-th call of a path meets the n-th.
    left: dict[str, list[Call]] = {}
    for call in anew:
        left.setdefault(call.path, []).append(call)
    for call in own:
        if not left.get(call.path):
            continue
        other = left[call.path].pop(0)
        much = _measure_distance(call.result, other.result)
        if much > SAME_RESULT and _measure_distance(call.given, other.given) <= SAME_RESULT:
            return call.path, much
    return None


def _measure_distance(one: list[Tensor], other: list[Tensor]) -> float:
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    return max((compute_relative_error(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


def _watch(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[list[Tensor], list[Call]]:
    """What a run gives, and the calls of all modules, in the order in which they end."""
    calls: list[Call] = []
    # One seed for both runs, in case a forward draws random numbers.
    with _record_calls(model, calls), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _clone_tensors(run(model)), calls


@contextmanager
def _record_calls(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    begun: list[list[Tensor]] = []  # a stack: calls nest
    paths = {module: path for path, module in model.named_modules()}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(_clone_tensors((args, kwargs)))

    def end(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        calls.append(Call(paths[module], begun.pop(), _clone_tensors(result)))

    hooks = [
        handle
        for module in paths
        for handle in (
            # Before the module's own hooks at its start and after them at its end, so that they count as its work.
            module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
            module.register_forward_hook(end, with_kwargs=True),
        )
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _clone_tensors(value: Any) -> list[Tensor]:
    # Clones, as a module may go on to change its tensors in place.
    return [leaf.clone() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
