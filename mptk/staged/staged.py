"""staged: run programs stage by stage, all inputs through one stage before the next.

A stage's weights are made when it starts and dropped when it ends, so memory follows the largest stage and not the
model. Values that cross a border are kept for all inputs. Dense, masked and cut programs run side by side: a stage of
each, then the next stage, so that they share what they read. Gradients are made by running a stage again.

A program's products may run in a narrower type, as with torch's autocast: on any device, and backward, too. Parameters
are rounded to the type. A call that joins several float values and is not elementwise (a product, a convolution,
attention, a norm with weights) takes all of them in that type. Elementwise calls promote, and casts to float32 in the
model's source stay. So does what half precision cannot do (``FLOAT32_ONLY``). What no parameter reaches, such as rotary
angles, keeps its own type: a position of four digits has no place in bfloat16.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mptk.compat.torch import find_schema, move_samples_last, tree_leaves, tree_map
from mptk.ir import TYPE_CHECK, DeviceInterpreter, Lazy, Program, Weights, name_base_op
from mptk.progress import Count
from mptk.staged.partition import Flow, Partition, Stage, partition
from mptk.staged.spool import SMALLEST_FILE, Spool, Values

FLOAT32_ONLY = ("fft_", "linalg_", "view_as_complex", "polar", "cdist")
"""Beginnings of the names of calls that have no kernels in half precision: torch's autocast keeps them in float32."""

ProgramInputs = Sequence[Tensor]
"""A program's inputs in order."""

ValueWatch = tuple[tuple[fx.Node, ...], Callable[..., None]]
"""Values of a program, and what is called with them, once for each of the inputs, as soon as they are there.

Under ``torch.vmap`` these are the values of all samples, with the samples in the last dimension.
"""

Tap = tuple[tuple[fx.Node, ...], Callable[..., None]]
"""A value and others that are there when it is, and what is called with its gradient, the value and the others."""


@dataclass(frozen=True)
class Executor:
    """Where and in how much memory programs run.

    ``stage``: bytes of a stage's weights, unless one call needs more. ``borders``: bytes of values between stages that
    are kept in memory; the rest goes to files, each tensor of at least ``smallest_file`` bytes. ``device``: where it is
    computed. ``compute``: the type of products (``narrow``). Results and gradients are float32 all the same.
    """

    stage: float = sys.maxsize
    borders: float = sys.maxsize
    device: torch.device = field(default=torch.device("cpu"))
    compute: torch.dtype = torch.float32
    smallest_file: int = SMALLEST_FILE

    @torch.no_grad()
    def run_programs(
        self, programs: Sequence[Program], inputs: Sequence[ProgramInputs], progress: Count | None = None
    ) -> Iterator[Any]:
        """The results of all ``programs`` for the first of ``inputs``, then for the second, and so on.

        Programs that were made from the first one have its stages. Results are as ``Program.__call__`` gives them, on
        ``device``. ``progress``: called with (inputs done, all inputs).
        """
        # Programs that were made from one another get the same borders, so that a stage of each reads the same weights.
        flows = [Flow(program) for program in programs]
        shared = partition(flows[0], self.stage)
        parts = [shared if shared.has_calls(flow) else partition(flow, self.stage) for flow in flows]
        runs = [StagedRun(self, flow, part, inputs) for flow, part in zip(flows, parts, strict=True)]
        # All stages but the last: a stage of each program, on all inputs, and then the next stage.
        count = _Counter(progress, len(inputs), sum(len(run.stages) for run in runs))
        for k in range(max(len(run.stages) for run in runs)):
            for run in runs:
                if k + 1 < len(run.stages):
                    run.advance(k, count)
        # The last stages run one input at a time, so that the caller never holds the results of all inputs. Their
        # weights stay loaded if together they fit in a stage's memory; if not, they are read again for each input.
        held = sum(run.last_bytes for run in runs) <= self.stage
        loaded = {run: run.load(len(run.stages) - 1) for run in runs if held}
        for i in range(len(inputs)):
            for run in runs:
                yield run.run_last(loaded.get(run), i, count)

    @torch.no_grad()
    def watch(
        self,
        program: Program,
        inputs: Sequence[ProgramInputs],
        watches: Sequence[ValueWatch],
        progress: Count | None = None,
    ) -> None:
        """Run what the watched values need, and call each watch with its values. Nothing after them is computed."""
        flow = Flow(program, [nodes for nodes, _ in watches])
        shared = partition(flow, self.stage)
        run = StagedRun(self, flow, shared, inputs, watches)
        count = _Counter(progress, len(inputs), len(run.stages))
        for k in range(len(run.stages)):
            run.advance(k, count)

    def compute_gradients(
        self,
        program: Program,
        names: Collection[str],
        inputs: Sequence[ProgramInputs],
        loss: Callable[[Any, int], Tensor],
        progress: Count | None = None,
        total: Callable[[Tensor], Tensor] = lambda gradient: gradient,
        taps: Sequence[Tap] = (),
    ) -> Weights:
        """The gradient of Σ ``loss(result, i)`` over all inputs i, for each weight of ``names``.

        Gradients are kept like the values of borders: in memory up to a bound. ``total`` adds up several processes'
        gradients. ``taps`` are called once for each of the inputs.
        """
        # Forward, without gradients. The inputs of each stage are kept.
        flow = Flow(program)
        run = StagedRun(self, flow, partition(flow, self.stage), inputs, keep=True, taps=taps)
        count = _Counter(progress, len(inputs), 2 * len(run.stages) - 1)
        with torch.no_grad():
            for k in range(len(run.stages) - 1):
                run.advance(k, count)
        # Backward: each stage runs again from its saved inputs, and the gradients of its inputs become those of the
        # outputs of the stage before it. ``above`` has them for each of the inputs.
        kept = Spool(self.borders, self.smallest_file)
        above: list[Values] = [{} for _ in inputs]
        for k in reversed(range(len(run.stages))):
            wanted = {node: program.weights[node.name] in names for node in run.stages[k].weights}
            leaves = {node: weight.detach().requires_grad_(wanted[node]) for node, weight in run.read(k).items()}
            for i in range(len(inputs)):
                above[i] = run.run_back(k, leaves, i, above[i], loss)
                count.step()
            for node, leaf in leaves.items():
                if wanted[node]:
                    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                    kept.add(program.weights[node.name], total(gradient))
        # A weight that no call reads has a gradient of zeros.
        likes = {name: program.state.find_like(name).to("meta") for name in names}
        unused = {name: Lazy(like, partial(torch.zeros_like, like, device="cpu")) for name, like in likes.items()}
        return Weights(unused).with_entries(kept.weights)


EXECUTOR = Executor()
"""All in memory, on the CPU."""


class _Counter:
    """Progress in inputs: as many steps as one input takes through all stages of all programs count as one input."""

    def __init__(self, progress: Count | None, inputs: int, stages: int) -> None:
        self.progress, self.inputs, self.total, self.done = progress, inputs, stages, 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None and self.done % self.total == 0:
            self.progress(self.done // self.total, self.inputs)


class StagedRun(DeviceInterpreter):
    """One program on all inputs, stage by stage. ``keep``: the inputs of all stages stay, for ``run_back``.

    ``borders`` holds the values between stages: under (k, i) what stage k needs for the i-th of the inputs.
    """

    def __init__(
        self,
        executor: Executor,
        flow: Flow,
        shared: Partition,
        inputs: Sequence[ProgramInputs],
        watches: Sequence[ValueWatch] = (),
        keep: bool = False,
        taps: Sequence[Tap] = (),
    ) -> None:
        # ``Stage.dead`` says when a value goes, so the interpreter need not find out.
        super().__init__(flow.program.graph, garbage_collect_values=False)
        self.flow, self.program, self.device, self.keep = flow, flow.program, executor.device, keep
        self.stages = shared.list_stages(flow)
        self.narrow = Autocast.of(flow.program, executor.compute)
        self.borders = Spool(executor.borders, executor.smallest_file)
        # Under the value that is made last, since all of a watch must be there.
        self.watches: dict[fx.Node, list[ValueWatch]] = {}
        for watch in watches:
            self.watches.setdefault(max(watch[0], key=lambda node: flow.made[node]), []).append(watch)
        self.taps: dict[fx.Node, list[Tap]] = {}
        for tap in taps:
            self.taps.setdefault(tap[0][0], []).append(tap)
        # The inputs are what crosses the border before the first stage.
        users = [n for n in self.program.list_placeholders() if n.name not in self.program.weights]
        for i, given in enumerate(inputs):
            values = {n: self._place(x) for n, x in zip(users, given, strict=True) if n in flow.made}
            self.borders.put((0, i), values)
        self.count = len(inputs)

    def _place(self, tensor: Tensor) -> Tensor:
        """An input on the device, in the type that the program takes."""
        # A program may compute in another floating type than its module, and callers give the module's.
        types = self.program.types
        return tensor.to(self.device, tensor.dtype if types is None or not tensor.is_floating_point() else types.wide)

    def load(self, k: int) -> dict[fx.Node, Tensor]:
        """The weights of stage ``k``, in the type in which it runs."""
        return self.cast_values(self.read(k))

    def read(self, k: int) -> dict[fx.Node, Tensor]:
        """The weights of stage ``k``."""
        names = self.program.weights
        return {node: self.program.state[names[node.name]].to(self.device) for node in self.stages[k].weights}

    def advance(self, k: int, count: _Counter | None = None, weights: Mapping[fx.Node, Tensor] | None = None) -> None:
        """Run stage ``k`` on all inputs. ``weights``: in place of the program's."""
        weights = self.load(k) if weights is None else self.cast_values(weights)
        for i in range(self.count):
            values = self.run_stage(self.stages[k], weights, self.borders.take((k, i), self.keep))
            if k + 1 < len(self.stages):
                self.borders.put((k + 1, i), values)
            if count is not None:
                count.step()

    @property
    def last_bytes(self) -> int:
        """Bytes of the last stage's weights."""
        return sum(self.flow.weight_bytes[node] for node in self.stages[-1].weights)

    def run_last(self, weights: Mapping[fx.Node, Tensor] | None, i: int, count: _Counter) -> object:
        """Run the last stage on the i-th inputs, and give the program's result. ``weights``: None if not loaded."""
        k = len(self.stages) - 1
        loaded = self.load(k) if weights is None else weights
        made = self._find_result(self.run_stage(self.stages[k], loaded, self.borders.take((k, i), self.keep)))
        count.step()
        return made

    def run_back(
        self,
        k: int,
        leaves: Mapping[fx.Node, Tensor],
        i: int,
        above: Values,
        loss: Callable[[object, int], Tensor],
    ) -> Values:
        """Run stage ``k`` again and backward. The leaves collect the weights' gradients; returns the inputs' gradients.

        ``above``: gradients of its outputs; for the last stage, ``loss`` gives them.
        """
        # Run the stage, from leaves that collect the gradients of its inputs.
        saved = self.borders.take((k, i))
        learned = {n: isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for n, v in saved.items()}
        given = {n: v.detach().requires_grad_() if learned[n] else v for n, v in saved.items()}
        with torch.enable_grad():
            values = self.run_stage(self.stages[k], self.cast_values(leaves), given)
            # Where gradients come from: the loss, or the stages above.
            if k == len(self.stages) - 1:
                pairs: list[tuple[Tensor, Tensor | None]] = [(loss(self._find_result(values), i), None)]
            else:
                pairs = [(values[n], g) for n, g in above.items() if values[n].requires_grad]
        if pairs:  # the first layers may have no weight that is asked for
            torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        return {n: v.grad for n, v in given.items() if isinstance(v, Tensor) and v.grad is not None}

    def run_stage(self, stage: Stage, weights: Mapping[fx.Node, Tensor], values: Values) -> Values:
        """Run a stage's calls. Gives the values that are used later and, for the last stage, the result's values."""
        self.env = {**weights, **values}
        last = stage is self.stages[-1]
        # No call makes the inputs, so they are shown here.
        for node in values if stage is self.stages[0] else ():
            self._show_values(node)
        for node in stage.nodes:
            if self.narrow is None or not self.narrow.should_skip(node):
                self.env[node] = self.run_node(node)
            if torch.is_grad_enabled():
                self._watch_gradient(node)
            self._show_values(node)
            for value in stage.dead.get(node, ()):
                self.env.pop(value, None)
        found = {node: self.env[node] for node in ((*stage.outputs, *self.flow.result) if last else stage.outputs)}
        self.env = {}
        # What crosses a border is rounded, as a call that takes it would do; the result is not.
        return found if last else self.cast_values(found)

    def cast_values(self, values: Mapping[fx.Node, object]) -> Values:
        """Weights, or what crosses a border, in the type in which stages run."""
        narrow = self.narrow
        return (
            dict(values) if narrow is None else {node: narrow.cast_value(node, value) for node, value in values.items()}
        )

    def _show_values(self, node: fx.Node) -> None:
        for nodes, see in self.watches.get(node, ()):
            see(*(move_samples_last(self.env[n]) for n in nodes))

    def _watch_gradient(self, node: fx.Node) -> None:
        for (_, *others), see in self.taps.get(node, ()):
            value = self.env[node]
            # No weight before it is asked for, so torch would not compute its gradient.
            if not value.requires_grad:
                value = self.env[node] = value.detach().requires_grad_()
            beside = [self.env[other] for other in others]
            value.register_hook(partial(_show_gradient, see, value.detach(), beside))

    def _find_result(self, values: Values) -> object:
        node = self.program.graph.graph.output_node()
        outputs: object = fx.map_arg(node.args[0], lambda source: values[source])
        # Losses and proofs compute in float32. One result comes alone, as ``Program.__call__`` gives it.
        if self.narrow is not None:
            outputs = widen_outputs(outputs)
        return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[object, ...], dict[str, object]]:
        found = super().fetch_args_kwargs_from_env(n)
        return found if self.narrow is None else self.narrow.cast_operands(n, found)


def _show_gradient(see: Callable[..., None], value: Tensor, beside: Sequence[Tensor], gradient: Tensor) -> None:
    with torch.no_grad():
        see(gradient, value, *beside)


@dataclass(frozen=True)
class Autocast:
    """Products in ``dtype``, by the rules at the top of this file.

    ``reached``: values that depend on a parameter. ``wide``: calls that ``dtype`` cannot do, and that write nothing.
    """

    dtype: torch.dtype
    reached: frozenset[fx.Node]
    wide: frozenset[fx.Node]

    @staticmethod
    def of(program: Program, dtype: torch.dtype) -> Autocast | None:
        """How ``program`` runs in ``dtype``; None if that is float32, in which it runs as it is."""
        if dtype is torch.float32:
            return None
        learned, reached = set(program.parameters), set[fx.Node]()
        for node in program.graph.graph.nodes:
            if program.weights.get(node.name) in learned or not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return Autocast(dtype, frozenset(reached), frozenset(n for n in reached if is_float32_only(n, dtype)))

    def cast_value(self, node: fx.Node, value: object) -> object:
        """A weight, or a value that crosses a border."""
        return self._cast(value, self.dtype) if node in self.reached else value

    def should_skip(self, node: fx.Node) -> bool:
        """Whether the call would only check the type that the trace had."""
        return node.target is TYPE_CHECK and node in self.reached

    def cast_operands(self, node: fx.Node, operands: object) -> Any:
        """The arguments of a call. One that writes keeps the type of what it writes into."""
        target = node.target
        if node in self.wide:
            return tree_map(lambda value: self._cast(value, torch.float32), operands)
        # Elementwise calls promote by themselves.
        if node not in self.reached or torch.Tag.pointwise in getattr(target, "tags", ()):
            return operands
        # A call with one float operand (a sum, a softmax, a view) joins nothing, and runs in its type.
        floats = [t for t in tree_leaves(operands) if isinstance(t, Tensor) and t.is_floating_point()]
        if len(floats) < 2:
            return operands
        declared = find_schema(target)
        dtype = floats[0].dtype if declared is not None and declared.is_mutable else self.dtype
        return tree_map(lambda value: self._cast(value, dtype), operands)

    def _cast(self, value: object, dtype: torch.dtype) -> object:
        # float64 stays: the model's code asks for it.
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype in (torch.float32, self.dtype) else value


def is_float32_only(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a call has no kernel in ``dtype``, or a number that ``dtype`` cannot hold, as masks have float32's least.

    A call that writes into one of its arguments has to keep that argument's type.
    """
    declared = find_schema(node.target)
    if declared is None or declared.is_mutable:
        return False
    largest = torch.finfo(dtype).max
    numbers = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, float)]
    return name_base_op(node.target).startswith(FLOAT32_ONLY) or any(largest < abs(n) < math.inf for n in numbers)


def widen_outputs(value: object) -> object:
    """A result in float32."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, value)
