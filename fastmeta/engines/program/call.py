"""One call of a task program on a batch of tasks, and how autograd sees it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastmeta.core.cuda_graphs import Graphs
from fastmeta.engines.autograd import once_differentiable
from fastmeta.engines.base import InnerLoopOptions, TaskBatch
from fastmeta.engines.program.lowering import Program
from fastmeta.ops.task_program.bytecode import at_step

Tensors = tuple[Tensor, ...]


class Call(NamedTuple):
    """A program on T tasks, the functions that run it, and the options.

    Attributes:
        ops: the functions of ``fastmeta.ops.task_program``, compiled or not.
        program: the module and its loss as code.
        own_parameters: whether theta is the module's own parameters, given as all of them. Autograd
            then sees one function instead of a concatenation and its parts. Otherwise theta is one
            arena, ``[P]`` or ``[T, P]``.
        tasks: T.
        options: of the inner loop.
        keep: whether the activations of all steps are kept for the backward.
        step_weights: w_1 .. w_K, or none.
        graphs: CUDA graphs that replay whole meta-gradients, if any.
        capture_at_once: whether the first call of a kind is captured.
    """

    ops: SimpleNamespace | ModuleType
    program: Program
    own_parameters: bool
    tasks: int
    options: InnerLoopOptions
    keep: bool
    step_weights: Sequence[float]
    graphs: Graphs | None = None
    capture_at_once: bool = False

    def arena(self, theta: Tensors) -> Tensor:
        return _flatten_dense_tensors(theta) if self.own_parameters else theta[0]

    def parts(self, arena: Tensor) -> Tensors:
        """The inverse of ``arena``, for gradients."""
        adapted = self.program.adapted
        return _unflatten_dense_tensors(arena, adapted) if self.own_parameters else (arena,)

    def frozen(self, like: Tensor) -> Tensor:
        """The parameters that are not adapted ``[F]``."""
        frozen = self.program.frozen
        return _flatten_dense_tensors(frozen) if frozen else like.new_empty(0)

    def adapt(self, theta: Tensor, frozen: Tensor, lr: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """theta_K ``[T, P]``."""
        results = []
        for rows in self._chunks():
            inputs = self.program.code, _of_tasks(theta, rows), frozen, _of_tasks(lr, rows)
            results.append(self.ops.adapt(*inputs, x[rows], y[rows], self.options.steps))
        return results[0] if len(results) == 1 else torch.cat(results)

    def adapt_backward(
        self, saved: Sequence[Tensor], v: Tensor, lr_grad: bool, x_grad: bool
    ) -> Iterator[Tensor]:
        """The gradients to theta, lr and x from ``v`` ``[T, P]``, that to theta_K."""
        theta, frozen, lr, x, y = saved
        results = []
        for rows in self._chunks():
            inputs = self.program.code, _of_tasks(theta, rows), frozen, _of_tasks(lr, rows)
            step = (
                x[rows],
                y[rows],
                self.options.steps,
                v[rows],
                self.options.first_order,
                self.keep,
            )
            results.append(self.ops.adapt_backward(*inputs, *step, lr_grad, x_grad))
        return map(_joined, zip(*results, strict=True), (theta, lr, x))

    def meta_gradient(
        self, theta: Tensor, lr: Tensor, batch: TaskBatch, wanted: tuple[bool, ...]
    ) -> Sequence[Tensor]:
        """Meta-loss, outputs, and the gradients to theta, lr, support_x and query_x.

        Args:
            theta, lr: as the ops take them.
            batch: the tasks.
            wanted: whether any gradient is, and those to lr, support_x, query_x.
        """
        code, frozen = self.program.code, self.frozen(theta)
        options = (
            self.step_weights,
            self.options.steps,
            self.options.first_order,
            self.keep,
            *wanted,
        )
        if self._is_whole():
            return self._whole_meta_gradient((theta, frozen, lr, *batch), options)
        results = []
        for rows in self._chunks():
            inputs = code, _of_tasks(theta, rows), frozen, _of_tasks(lr, rows)
            part = [tensor[rows] for tensor in batch]
            loss, outputs, *grads = self.ops.meta_gradient(*inputs, *part, *options)
            share = len(outputs) / self.tasks
            results.append((share * loss, outputs, *(share * grad for grad in grads)))
        losses, outputs, *grads = zip(*results, strict=True)
        joined = map(_joined, grads, (theta, lr, batch.support_x, batch.query_x))
        return sum(losses), torch.cat(outputs), *joined

    def _whole_meta_gradient(self, inputs: Tensors, options: tuple[Any, ...]) -> Sequence[Tensor]:
        code, graphs = self.program.code, self.graphs
        if graphs is None:
            return self.ops.meta_gradient(code, *inputs, *options)

        def function(*inputs: Tensor) -> Sequence[Tensor]:
            return self.ops.meta_gradient(code, *inputs, *options)

        def check(*inputs: Tensor) -> None:
            *_, support_y, _, query_y = inputs
            self.ops.check_labels(code, support_y, query_y)

        weights, *others = options
        key = self.program, tuple(weights), *others
        return graphs.run(key, function, inputs, check, self.capture_at_once)

    def meta_loss(self, theta: Tensors, lr: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Meta-loss and outputs, differentiable once in theta, lr, support_x and query_x.

        The compiled function for the module's own parameters saves what autograd takes in Python:
        for a small network longer than the work.
        """
        if not (self.own_parameters and self.is_one_compiled and self.graphs is None):
            return MetaLoss.apply(self, lr, *batch, *theta)
        options = self.step_weights, self.options.steps, self.options.first_order, self.keep
        frozen = self.frozen(theta[0])
        loss, outputs = self.ops.meta_loss(self.program.code, theta, frozen, lr, *batch, *options)
        return loss, self.shaped(outputs)

    def loss_and_gradient(
        self, lr: Tensor, batch: TaskBatch, lr_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Meta-loss, outputs, and the gradients to the module's own parameters ``[P]`` and lr."""
        theta = self.program.adapted
        if self.is_one_compiled and self.graphs is None:
            options = (
                self.step_weights,
                self.options.steps,
                self.options.first_order,
                self.keep,
                lr_grad,
            )
            inputs = self.program.code, theta, self.frozen(theta[0]), lr
            loss, outputs, to_theta, to_lr = self.ops.loss_and_gradient(*inputs, *batch, *options)
        else:
            wanted = True, lr_grad, False, False
            with torch.no_grad():
                results = self.meta_gradient(self.arena(theta), lr, batch, wanted)
            loss, outputs, to_theta, to_lr, *_ = results
        return loss, self.shaped(outputs), to_theta, to_lr if lr_grad else None

    def hvp(self, theta: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        """``H v`` ``[T, P]``."""
        frozen = self.frozen(theta)
        results = []
        for rows in self._chunks():
            inputs = self.program.code, _of_tasks(theta, rows), frozen, x[rows], y[rows]
            results.append(self.ops.hvp(*inputs, vector[rows], False)[0])
        return results[0] if len(results) == 1 else torch.cat(results)

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """The module's outputs ``[T, B, ...]`` with parameters after the call's steps."""
        code = self.program.code
        if self.program.per_step:
            code = at_step(code, self.options.steps)
        return self.shaped(self.ops.forward(code, theta, self.frozen(theta), x))

    def shaped(self, outputs: Tensor) -> Tensor:
        """Outputs ``[T, B, n]`` in the module's shape."""
        shape = self.program.output_shape
        return outputs if len(shape) == 1 else outputs.view(*outputs.shape[:2], *shape)

    @property
    def is_one_compiled(self) -> bool:
        """Whether the meta-gradient is one call of a compiled op."""
        return self._is_whole() and hasattr(self.ops, "loss_and_gradient")

    def _is_whole(self) -> bool:
        return self.options.task_chunk is None or self.options.task_chunk >= self.tasks

    def _chunks(self) -> Iterator[slice]:
        size = self.options.task_chunk or self.tasks
        return (slice(start, start + size) for start in range(0, self.tasks, size))


class Adapt(torch.autograd.Function):
    """theta_K; the backward runs the steps again."""

    @staticmethod
    def forward(ctx: Any, call: Call, lr: Tensor, x: Tensor, y: Tensor, *theta: Tensor) -> Tensor:
        arena = call.arena(theta)
        frozen = call.frozen(arena)
        ctx.call = call
        ctx.save_for_backward(arena, frozen, lr, x, y)
        return call.adapt(arena, frozen, lr, x, y)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        call, (_, lr_needed, x_needed, _, *theta_needed) = ctx.call, ctx.needs_input_grad
        x_needed = x_needed and not call.options.first_order
        with torch.no_grad():
            to_theta, to_lr, to_x = call.adapt_backward(ctx.saved_tensors, v, lr_needed, x_needed)
        to_theta = call.parts(to_theta) if theta_needed[0] else (None,)
        grads = [to_lr if lr_needed else None, to_x if x_needed else None, *to_theta]
        to_lr, to_x, *to_theta = once_differentiable(grads)
        return None, to_lr, to_x, None, *to_theta


class MetaLoss(torch.autograd.Function):
    """The meta-loss and the outputs; the gradient is taken in the same call."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        lr: Tensor,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, lr_needed, support_needed, _, query_needed, _, theta_needed, *_ = ctx.needs_input_grad
        needed = (
            theta_needed,
            lr_needed,
            support_needed and not call.options.first_order,
            query_needed,
        )
        batch = TaskBatch(support_x, support_y, query_x, query_y)
        wanted = any(needed), *needed[1:]
        loss, outputs, *grads = call.meta_gradient(call.arena(theta), lr, batch, wanted)
        outputs = call.shaped(outputs)
        ctx.call, ctx.needed = call, needed
        ctx.save_for_backward(*itertools.compress(grads, needed))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs)
        return loss, outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        scale = grad_loss.detach()  # a graph, where one is asked for, ends here
        saved = iter(ctx.saved_tensors)
        theta, *others = [scale * next(saved) if need else None for need in ctx.needed]
        to_theta = (None,) if theta is None else ctx.call.parts(theta)
        to_lr, to_support, to_query, *to_theta = once_differentiable([*others, *to_theta])
        return None, to_lr, to_support, None, to_query, None, *to_theta


def _of_tasks(tensor: Tensor, rows: slice) -> Tensor:
    """A chunk of theta ``[P]`` or ``[T, P]``, or of step sizes; what tasks share stays whole."""
    if tensor.ndim == 3:
        return tensor if tensor.shape[1] == 1 else tensor[:, rows]
    return tensor if tensor.ndim == 1 else tensor[rows]


def _joined(grads: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The chunks' gradients to ``like``, which they share or have a part of each."""
    if len(grads) == 1 or grads[0].numel() == 0:
        return grads[0]
    sizes = zip(grads[0].shape, like.shape, strict=True)
    parted = [dim for dim, (part, whole) in enumerate(sizes) if part != whole]
    return torch.cat(grads, parted[0]) if parted else torch.stack(grads).sum(0)
