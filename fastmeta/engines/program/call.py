"""Calls of a task program on a batch of tasks, and their autograd Functions."""

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
from fastmeta.engines.base import Examples, InnerLoopOptions, MetaGradient, TaskBatch
from fastmeta.engines.program.lowering import Program
from fastmeta.ops.task_program.bytecode import at_step

Tensors = tuple[Tensor, ...]


class RequiredGrads(NamedTuple):
    """Whether each gradient of the meta-loss is required, in the order of the op's arguments.

    Attributes:
        any: whether any gradient is required, among them the gradient to theta.
        lr, support_x, query_x: whether the gradient to this tensor is required.
    """

    any: bool = False
    lr: bool = False
    support_x: bool = False
    query_x: bool = False


class Call(NamedTuple):
    """A program on T tasks, the functions that run it, and the options.

    Attributes:
        ops: the functions of ``fastmeta.ops.task_program``, compiled or not.
        program: the module and its loss as code.
        own_parameters: whether theta is the module's own parameters, one tensor each. Autograd then
            records one function instead of a concatenation and its parts. Otherwise theta is one
            arena, ``[P]`` or ``[T, P]``, with the shared parameters behind the adapted ones.
        tasks: T.
        options: options of the inner loop.
        keep: whether the activations of all steps are kept for the backward.
        step_weights: w_1 .. w_K; empty: the last step's loss only.
        graphs: CUDA graphs that replay meta-gradients; None: launch the kernels.
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
        """theta as one tensor, ``[P]`` or ``[T, P]``."""
        return _flatten_dense_tensors(theta) if self.own_parameters else theta[0]

    def parts(self, arena: Tensor) -> Tensors:
        """The inverse of ``arena``, for gradients."""
        learned = self.program.learned
        return _unflatten_dense_tensors(arena, learned) if self.own_parameters else (arena,)

    def with_shared(self, theta: Tensor) -> Tensor:
        """An arena of adapted parameters ``[..., A]`` with the shared ones behind, ``[..., P]``."""
        shared = self.program.shared
        if not shared:
            return theta
        flat = torch.cat([parameter.reshape(-1) for parameter in shared.values()])
        return torch.cat((theta, flat.expand(*theta.shape[:-1], -1)), -1)

    def as_meta_gradient(
        self, loss: Tensor, outputs: Tensor, arena: Tensor, lr_grad: Tensor | None = None
    ) -> MetaGradient:
        """The meta-gradient whose gradient to the learned parameters is ``arena`` ``[P]``."""
        grads, shared = self.program.by_kind(arena)
        return MetaGradient(loss, outputs, grads, lr_grad, {}, shared_grads=shared)

    def frozen(self, like: Tensor) -> Tensor:
        """The parameters that are not adapted ``[F]``."""
        frozen = self.program.frozen
        return _flatten_dense_tensors(frozen) if frozen else like.new_empty(0)

    def adapt(self, theta: Tensor, frozen: Tensor, lr: Tensor, support: Examples) -> Tensor:
        """theta_K ``[T, A]``."""
        shared = sum(parameter.numel() for parameter in self.program.shared.values())
        results = [
            self.ops.adapt(
                self.program.code,
                _of_tasks(theta, chunk),
                frozen,
                _of_tasks(lr, chunk),
                x,
                y,
                self.options.steps,
                shared,
                weight,
            )
            for chunk in self.options.chunks(self.tasks)
            for x, y, _, weight in [support.of_tasks(chunk)]
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def adapt_backward(
        self, saved: Sequence[Any], v: Tensor, lr_grad: bool, x_grad: bool
    ) -> Iterator[Tensor]:
        """The gradients to theta, lr and x, from the gradient ``v`` ``[T, A]`` to theta_K."""
        theta, frozen, lr, x, y, weight = saved
        results = [
            self.ops.adapt_backward(
                self.program.code,
                _of_tasks(theta, chunk),
                frozen,
                _of_tasks(lr, chunk),
                x[chunk],
                y[chunk],
                self.options.steps,
                v[chunk],
                self.options.first_order,
                self.keep,
                lr_grad,
                x_grad,
                _of_tasks(weight, chunk),
            )
            for chunk in self.options.chunks(self.tasks)
        ]
        return map(_joined, zip(*results, strict=True), (theta, lr, x))

    def meta_gradient(
        self, theta: Tensor, lr: Tensor, batch: TaskBatch, requires: RequiredGrads
    ) -> Sequence[Tensor]:
        """Meta-loss, outputs, and the gradients to theta, lr, support_x and query_x.

        Args:
            theta, lr: as the ops take them.
            batch: the tasks.
            requires: the required gradients; the others are empty tensors.
        """
        frozen = self.frozen(theta)
        if self._runs_together():
            return self._meta_gradient_together((theta, frozen, lr), batch, requires)
        results = []
        for chunk in self.options.chunks(self.tasks):
            inputs = _of_tasks(theta, chunk), frozen, _of_tasks(lr, chunk)
            part = batch.of_tasks(chunk)
            loss, outputs, *grads = self._meta_gradient_op(inputs, part, requires)
            # The op takes the mean over its tasks, so a chunk counts by its share of all tasks.
            share = len(outputs) / self.tasks
            results.append((share * loss, outputs, *(share * grad for grad in grads)))
        losses, chunk_outputs, *chunk_grads = zip(*results, strict=True)
        joined = map(_joined, chunk_grads, (theta, lr, batch.support_x, batch.query_x))
        return sum(losses), torch.cat(chunk_outputs), *joined

    def _meta_gradient_op(
        self, inputs: Tensors, batch: TaskBatch, requires: RequiredGrads
    ) -> Sequence[Tensor]:
        """One call of the op; ``inputs``: theta, frozen and lr."""
        theta, frozen, lr = inputs
        return self.ops.meta_gradient(
            self.program.code,
            theta,
            frozen,
            lr,
            *batch.data,
            self.step_weights,
            self.options.steps,
            self.options.first_order,
            self.keep,
            requires.any,
            requires.lr,
            requires.support_x,
            requires.query_x,
            batch.support_weight,
            batch.query_weight,
        )

    def _meta_gradient_together(
        self, inputs: Tensors, batch: TaskBatch, requires: RequiredGrads
    ) -> Sequence[Tensor]:
        """The meta-gradient of all tasks in one call, from a CUDA graph if there are graphs."""
        if self.graphs is None:
            return self._meta_gradient_op(inputs, batch, requires)
        # A graph's inputs are tensors: weights join them only where the batch has some.
        fields = [name for name, tensor in batch._asdict().items() if tensor is not None]

        def of(inputs: Tensors) -> tuple[Tensors, TaskBatch]:
            return inputs[:3], TaskBatch(**dict(zip(fields, inputs[3:], strict=True)))

        def function(*inputs: Tensor) -> Sequence[Tensor]:
            return self._meta_gradient_op(*of(inputs), requires)

        # A replay launches kernels only; the op's check of the labels runs on the host.
        def check(*inputs: Tensor) -> None:
            _, part = of(inputs)
            self.ops.check_labels(self.program.code, part.support_y, part.query_y)

        key = (
            self.program,
            tuple(self.step_weights),
            self.options.steps,
            self.options.first_order,
            self.keep,
            requires,
            tuple(fields),
        )
        tensors = *inputs, *(tensor for tensor in batch if tensor is not None)
        return self.graphs.run(key, function, tensors, check, self.capture_at_once)

    def meta_loss(self, theta: Tensors, lr: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Meta-loss and outputs, differentiable once in theta, lr, support_x and query_x.

        For the module's own parameters the autograd function is compiled too. One in Python takes
        longer than the arithmetic of a small network.
        """
        if not (self.own_parameters and self.is_one_compiled and self.graphs is None):
            return MetaLoss.apply(self, lr, *batch, *theta)
        loss, outputs = self.ops.meta_loss(
            self.program.code,
            theta,
            self.frozen(theta[0]),
            lr,
            *batch.data,
            self.step_weights,
            self.options.steps,
            self.options.first_order,
            self.keep,
            batch.support_weight,
            batch.query_weight,
        )
        return loss, self.shaped(outputs)

    def loss_and_gradient(
        self, lr: Tensor, batch: TaskBatch, lr_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Meta-loss, outputs, and the gradients to the module's own parameters ``[P]`` and lr."""
        theta = self.program.learned
        if self.is_one_compiled and self.graphs is None:
            loss, outputs, to_theta, to_lr = self.ops.loss_and_gradient(
                self.program.code,
                theta,
                self.frozen(theta[0]),
                lr,
                *batch.data,
                self.step_weights,
                self.options.steps,
                self.options.first_order,
                self.keep,
                lr_grad,
                batch.support_weight,
                batch.query_weight,
            )
        else:
            requires = RequiredGrads(any=True, lr=lr_grad)
            with torch.no_grad():
                results = self.meta_gradient(self.arena(theta), lr, batch, requires)
            loss, outputs, to_theta, to_lr, *_ = results
        return loss, self.shaped(outputs), to_theta, to_lr if lr_grad else None

    def products(
        self, theta: Tensor, examples: Examples, vectors: Tensor, gauss_newton: bool
    ) -> Tensor:
        """``H v``, or ``J' H_L J v``, of vectors ``[T, A]`` or ``[K, T, A]``, in their shape."""
        theta, frozen = self.with_shared(theta), self.frozen(theta)
        # The op takes each task's vectors together, [T, K, P].
        count = len(vectors) if vectors.ndim == 3 else 1
        rows = vectors.movedim(-2, 0).reshape(self.tasks, count, vectors.shape[-1])
        results = []
        for chunk in self.options.chunks(self.tasks):
            part, (x, y, _, weight) = _of_tasks(theta, chunk), examples.of_tasks(chunk)
            inputs = self.program.code, part, frozen, x, y, rows[chunk]
            results.append(self.ops.products(*inputs, gauss_newton, weight))
        products = results[0] if len(results) == 1 else torch.cat(results)
        # A product's part for the shared parameters is the mixed derivative.
        return products[..., : vectors.shape[-1]].movedim(0, -2).reshape(vectors.shape)

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """The module's outputs ``[T, B, ...]`` with parameters that have taken the call's steps."""
        code = self.program.code
        # Norms with a row of parameters a step read the row of the last step.
        if self.program.per_step:
            code = at_step(code, self.options.steps)
        theta, frozen = self.with_shared(theta), self.frozen(theta)
        return self.shaped(self.ops.forward(code, theta, frozen, x))

    def check_support_labels(self, y: Tensor) -> None:
        """ValueError for a label without a class in the support ``[T, S]`` or ``[T, K, B]``.

        An op of one step names its labels as the queries'.
        """
        if not y.is_floating_point():
            labels = y.flatten(1)
            self.ops.check_labels(self.program.code, labels, labels)

    def shaped(self, outputs: Tensor) -> Tensor:
        """Outputs ``[T, B, n]`` in the module's shape."""
        shape = self.program.output_shape
        return outputs if len(shape) == 1 else outputs.view(*outputs.shape[:2], *shape)

    @property
    def is_one_compiled(self) -> bool:
        """Whether the meta-gradient is one call of a compiled op."""
        return self._runs_together() and hasattr(self.ops, "loss_and_gradient")

    def _runs_together(self) -> bool:
        size = self.options.chunk_size
        return size is None or size >= self.tasks


class Adapt(torch.autograd.Function):
    """theta_K; the backward runs the steps again and keeps nothing of them but the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        lr: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        *theta: Tensor,
    ) -> Tensor:
        arena = call.arena(theta)
        frozen = call.frozen(arena)
        ctx.call = call
        ctx.save_for_backward(arena, frozen, lr, x, y, weight)
        return call.adapt(arena, frozen, lr, Examples(x, y, weight=weight))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        call, (_, lr_needed, x_needed, _, _, *theta_needed) = ctx.call, ctx.needs_input_grad
        x_needed = x_needed and not call.options.first_order  # as documented: no support gradient
        with torch.no_grad():
            to_theta, to_lr, to_x = call.adapt_backward(ctx.saved_tensors, v, lr_needed, x_needed)
        to_theta = call.parts(to_theta) if theta_needed[0] else (None,)
        grads = [to_lr if lr_needed else None, to_x if x_needed else None, *to_theta]
        to_lr, to_x, *to_theta = once_differentiable(grads)
        return None, to_lr, to_x, None, None, *to_theta


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
        support_weight: Tensor | None,
        query_weight: Tensor | None,
        *theta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, lr_needed, support_needed, _, query_needed, _, _, _, theta_needed, *_ = (
            ctx.needs_input_grad
        )
        support_needed = support_needed and not call.options.first_order
        # In the order of the gradients: theta, lr, support_x, query_x.
        needed = theta_needed, lr_needed, support_needed, query_needed
        requires = RequiredGrads(any(needed), lr_needed, support_needed, query_needed)
        data = support_x, support_y, query_x, query_y
        batch = TaskBatch(*data, support_weight, query_weight)
        loss, outputs, *grads = call.meta_gradient(call.arena(theta), lr, batch, requires)
        outputs = call.shaped(outputs)
        ctx.call, ctx.needed = call, needed
        ctx.save_for_backward(*itertools.compress(grads, needed))
        # A loss that the caller does not differentiate gets None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs)
        return loss, outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        scale = grad_loss.detach()  # with create_graph=True its graph ends here
        saved = iter(ctx.saved_tensors)
        theta, *others = [scale * next(saved) if need else None for need in ctx.needed]
        to_theta = (None,) if theta is None else ctx.call.parts(theta)
        to_lr, to_support, to_query, *to_theta = once_differentiable([*others, *to_theta])
        return None, to_lr, to_support, None, to_query, None, None, None, *to_theta


def _of_tasks(tensor: Any, tasks: slice) -> Any:
    """Slice theta, step sizes or weights to some tasks; tensors that tasks share are not sliced."""
    if tensor is None:
        return None
    if tensor.ndim == 3:  # step sizes [K or 1, T or 1, P or L or 1]
        return tensor if tensor.shape[1] == 1 else tensor[:, tasks]
    return tensor if tensor.ndim == 1 else tensor[tasks]  # theta [P] or [T, P]


def _joined(grads: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Join the chunks' gradients to ``like``: concatenate parts, or sum if the chunks share it."""
    if len(grads) == 1 or grads[0].numel() == 0:
        return grads[0]
    sizes = zip(grads[0].shape, like.shape, strict=True)
    # The dimension of the tasks is where a chunk is smaller; there is none in a shared tensor.
    task_dims = [dim for dim, (part, size) in enumerate(sizes) if part != size]
    return torch.cat(grads, task_dims[0]) if task_dims else torch.stack(grads).sum(0)
