"""A module as a pure function of one task's parameters, mapped over the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fastmeta.core.memory import kept_pages
from fastmeta.core.module_errors import KINDS, described
from fastmeta.core.norm_statistics import (
    RUNNING_STATISTICS,
    temporarily,
    tracking_norms,
    without_running_statistics,
)
from fastmeta.core.trees import Tree, called_with, first_tensor, map_tensors, split
from fastmeta.core.vmap import differentiable_kernels, map_trees, under_derivative
from fastmeta.engines.autograd import TURN
from fastmeta.engines.base import Examples, Loss
from fastmeta.engines.functional.label_checks import ClassLoss, present_examples
from fastmeta.engines.functional.layer_routing import RoutedLayers, widened
from fastmeta.engines.functional.vmap_errors import VmapError, vmap_errors

# Caches of its weights that a recurrent module writes at each call. Under vmap it would keep one
# task's weights there.
_RECURRENT_CACHE = ("_flat_weights", "_flat_weight_refs")


class TaskModule:
    """A module as a pure function of parameters, one set a task.

    Parameters that are left out are the module's own, shared by the tasks. The training flags are
    those at construction, so that the backward can run a step again as it ran.

    Batch and instance norms use batch statistics, in training and in evaluation. With
    ``norm_statistics="running"`` they use their running statistics in evaluation. Running
    statistics are never updated.

    Every call starts from the module's own buffers and discards what the module writes into them.
    Each task gets its own copy of floating-point buffers; the tasks share one copy of the others
    (counters, indices, masks).

    Example:
        >>> import torch
        >>> call = TaskModule(torch.nn.Linear(3, 2))
        >>> params = {"weight": torch.zeros(4, 2, 3), "bias": torch.ones(4, 2)}
        >>> with call.conditions():
        ...     call.outputs(params, torch.randn(4, 5, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, module: nn.Module, norm_statistics: str = "batch") -> None:
        self.module = module
        modules = list(module.modules())
        running_in_evaluation = norm_statistics == "running"
        self._training = [(m, m.training) for m in modules]
        # Norms that ``conditions`` switches to batch statistics.
        self._norms = [m for m in tracking_norms(module) if m.training or not running_in_evaluation]
        self._recurrent = [m for m in modules if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
        running = {id(m._buffers.get(name)) for m in self._norms for name in RUNNING_STATISTICS}
        buffers = {name: b for name, b in module.named_buffers() if id(b) not in running}
        self._task_buffers = {name: b for name, b in buffers.items() if b.is_floating_point()}
        self._shared_buffers = {n: b for n, b in buffers.items() if n not in self._task_buffers}
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        self._trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        names = {id(tensor): name for name, tensor in (buffers | self._trainable).items()}
        # Where each tensor is registered. A tensor registered twice (tied weights, a submodule in
        # two places) is replaced in both places, which torch.func.functional_call fails to undo.
        tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
        self._places = [
            (table, {key: names[id(t)] for key, t in table.items() if id(t) in names})
            for table in tables
        ]

    @property
    def constants(self) -> list[Tensor]:
        """The module's tensors that a call reads besides the tasks' parameters."""
        return [*self._frozen, *self._task_buffers.values(), *self._shared_buffers.values()]

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Context of calls: batch statistics, training flags, twice differentiable kernels.

        A backward enters it too, in a thread of autograd's.
        """
        with TURN, kept_pages(), ExitStack() as stack:
            stack.enter_context(without_running_statistics(self._norms))
            for m, training in self._training:
                # Only flags that have changed: entering a context for each takes longer.
                if m.training != training:
                    stack.enter_context(temporarily(m.__dict__, {"training": training}))
            for m in self._recurrent:
                # Restored afterwards: the call under vmap leaves tensors of vmap in it.
                cache = {n: m.__dict__[n] for n in _RECURRENT_CACHE if n in m.__dict__}
                stack.enter_context(temporarily(m.__dict__, cache))
            stack.enter_context(differentiable_kernels(recurrent=bool(self._recurrent)))
            yield

    def outputs(
        self,
        params: Mapping[str, Tensor],
        x: Tree,
        name: str = "x",
        present: Tensor | None = None,
    ) -> Tree:
        """The outputs ``[T, S, ...]`` for parameters ``[T, *shape]`` and x ``[T, S, ...]``.

        Both may be trees, see ``core.trees.called_with``.

        Parameters that ``params`` lacks are the module's own, the same for every task. ``name`` is
        the argument's in errors. ``present`` ``[T, S]`` are the examples of which batch norms take
        statistics; None: all.
        """
        inputs = (x,) if present is None else (x, present)
        return self._mapped(lambda call, *inputs: call(*inputs), name, params, *inputs)

    def losses(
        self, params: Mapping[str, Tensor], examples: Examples, loss: Loss
    ) -> tuple[Tensor, Tree]:
        """Each task's loss ``[T]`` and outputs ``[T, S, ...]``.

        With weights ``[T, S]`` a task's loss is the sum of its examples' losses times them.
        """
        x, y, _, weight = examples
        checked, each = scalar_loss(loss, examples.tasks), losses_of_each(loss, examples.tasks)

        def task_loss(call: Callable[..., Tree], x: Tree, y: Tree) -> Any:
            outputs = call(x, present_examples(loss, y))
            return checked(outputs, y), outputs

        def weighted_loss(call: Callable[..., Tree], x: Tree, y: Tree, w: Tensor) -> Any:
            outputs = call(x, present_examples(loss, y, w))
            return (each(outputs, y, len(w)) * w).sum(), outputs

        if weight is None:
            return self._mapped(task_loss, examples.x_name, params, x, y)
        return self._mapped(weighted_loss, examples.x_name, params, x, y, weight)

    def _mapped(
        self, fn: Callable[..., Any], name: str, params: Mapping[str, Tensor], *inputs: Tree
    ) -> Any:
        first_input = first_tensor(inputs[0])
        tasks = len(first_input)
        buffers = {
            name: b.expand(tasks, *b.shape).clone() for name, b in self._task_buffers.items()
        }
        shared = {name: b.clone() for name, b in self._shared_buffers.items()}
        decompose = bool(self._recurrent) and tasks != 1
        if decompose:
            # The decomposition writes numbers of one task into tensors that it makes from the
            # weights, so every task needs its own.
            own = {n: p.expand(tasks, *p.shape) for n, p in self._trainable.items()}
            params = {**own, **params}
        routing = RoutedLayers(tasks != 1, first_input.device)

        def one_task(params: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tree) -> Any:
            def call(x: Tree, present: Tensor | None = None) -> Tree:
                routing.present = present

                def run(params: dict[str, Tensor]) -> Tree:
                    tensors = {**self._trainable, **params, **buffers, **shared}
                    try:
                        return self._call(tensors, x, routing)
                    except KINDS as error:
                        raise _ForwardError from error

                # PyTorch's recurrent kernels have no batching rule; under a derivative they
                # decompose into ops that have one.
                outputs = under_derivative(run, params) if decompose else run(params)
                if not split(outputs)[0]:
                    raise TypeError(
                        f"module: expected output tensors, got {type(outputs).__name__} without one"
                    )
                return map_tensors(widened, outputs)

            return fn(call, *inputs)

        try:
            with vmap_errors(type(self.module).__name__, tasks):
                return map_trees(one_task, dict(params), buffers, *inputs)
        except _ForwardError as failed:
            first = {n: tensor[0] for n, tensor in {**params, **buffers}.items()}
            error = failed.__cause__
            raise self._told(error, name, inputs[0], {**first, **shared}) from error

    def _told(self, error: Any, name: str, x: Tree, first: dict[str, Tensor]) -> Exception:
        """The error to raise for an error of the forward; ``first``: tensors of the first task."""
        first_x = map_tensors(lambda tensor: tensor[0], x)
        if len(first_tensor(x)) > 1:
            # PyTorch's message for one task speaks of the user's shapes, and there may be none.
            plain = self._plain_error(first_x, first)
            if plain is None:
                return VmapError(type(self.module).__name__, error)
            error = plain
        return described(error, self.module, name, first_x)

    def _plain_error(self, x: Tree, tensors: dict[str, Tensor]) -> Exception | None:
        """The error of the forward for one task without vmap, if there is one."""
        device = first_tensor(x).device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            try:
                self._call({**self._trainable, **tensors}, x, RoutedLayers(False, device))
            except KINDS as error:
                return error
        return None

    def _call(self, tensors: dict[str, Tensor], x: Tree, routing: RoutedLayers) -> Tree:
        with ExitStack() as stack:
            stack.enter_context(routing)
            for table, names in self._places:
                values = {key: tensors[name] for key, name in names.items()}
                stack.enter_context(temporarily(table, values))
            return called_with(self.module, x)


def scalar_loss(loss: Loss, tasks: int) -> Loss:
    """One task's loss, raising for a value that is no scalar, and naming itself under vmap."""

    def checked(outputs: Tree, targets: Tree) -> Tensor:
        with vmap_errors("the loss", tasks):
            value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss: expected a scalar tensor, the mean over a task's examples, got {got}"
            )
        return value

    return checked


def losses_of_each(loss: Loss, tasks: int) -> Callable[[Tree, Tree, int], Tensor]:
    """The losses ``[B]`` of one task's B examples: each is a set of one, the loss its mean."""
    checked = scalar_loss(loss.of_one_example() if isinstance(loss, ClassLoss) else loss, tasks)

    def each(outputs: Tree, y: Tree, count: int) -> Tensor:
        tensors, structure = split((outputs, y))
        for tensor in tensors:
            if tensor.ndim == 0 or len(tensor) != count:
                raise ValueError(
                    f"weight: expected outputs and targets [{count}, ...] of each task, a row an "
                    f"example, got shape {list(tensor.shape)}"
                )

        def of_one(*rows: Tensor) -> Tensor:
            return checked(*structure.of(row.unsqueeze(0) for row in rows))

        losses: Tensor = vmap(of_one)(*tensors)
        return losses

    return each


def losses_of_outputs(loss: Loss, outputs: Tree, y: Tree, weight: Tensor | None) -> Tensor:
    """Each task's loss ``[T]`` of outputs ``[T, B, ...]``, with weights ``[T, B]`` or without."""
    tasks = len(first_tensor(outputs))
    checked, each = scalar_loss(loss, tasks), losses_of_each(loss, tasks)
    losses: Tensor
    if weight is None:
        losses = map_trees(checked, outputs, y)
    else:
        losses = map_trees(lambda z, y, w: (each(z, y, len(w)) * w).sum(), outputs, y, weight)
    return losses


class _ForwardError(Exception):
    """Carries an error of the module's forward out of vmap, as its cause."""
