"""The task program's ops in plain PyTorch: readable, slow, and the tests' oracle.

The code is interpreted one instruction at a time for one task; everything else follows from
``torch.func`` and from unrolling the inner steps. Arguments and results are the same as of the
compiled ops of the same names (csrc/library.cpp). theta_k are the parameters after k inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from fastmeta.core.absence import ABSENT
from fastmeta.core.derivatives import pullback
from fastmeta.ops._activations import plain_activation
from fastmeta.ops.task_program.arguments import AdaptBackwardArguments, MetaGradientArguments
from fastmeta.ops.task_program.bytecode import (
    Code,
    Instruction,
    LossCode,
    LossKind,
    Opcode,
    PoolKind,
)

# theta, x, y and the weight of one task -> its loss and its outputs
TaskLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def forward(code: Tensor, theta: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    """Outputs ``[T, B, n]``."""
    program = Code.decode(code)
    return vmap(lambda p, x: _outputs(program, p, frozen, x, 0))(_per_task(theta, x), x)


def check_labels(code: Tensor, support_y: Tensor, query_y: Tensor) -> None:
    """Raise ValueError for a label that the compiled ops refuse."""
    program = Code.decode(code)
    loss, classes = cast("LossCode", program.loss), program.values[program.output]
    if loss.kind != LossKind.CROSS_ENTROPY:
        return
    lowest = 0 if program.has_batch_norm else ABSENT
    for name, y in (("support_y", support_y), ("query_y", query_y)):
        wrong = (y != loss.b) & ((y < lowest) | (y >= classes))
        if wrong.any():
            raise ValueError(
                f"{name}: expected labels in 0..{classes - 1}, as the module gives {classes} "
                f"outputs, got {int(y[wrong][0])}"
            )


def gradient(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    input_grad: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss ``[T]``, outputs, and the gradient of each task's loss to theta ``[T, P]`` and x."""
    task_loss = _task_loss(Code.decode(code), frozen)
    grads_and_loss = _mapped(grad_and_value(task_loss, argnums=(0, 1), has_aux=True))
    (grad_theta, grad_x), (loss, outputs) = grads_and_loss(_per_task(theta, x), x, y, weight)
    return loss, outputs, grad_theta, grad_x if input_grad else x.new_empty(0)


def hvp(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    vector: Tensor,
    input_grad: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``H v``, ``[T, P]`` for v ``[T, A]``, and the derivative of ``<gradient, v>`` to x."""
    program = Code.decode(code)
    task_gradient = grad(_task_loss(program, frozen), has_aux=True)

    def along(theta: Tensor, x: Tensor, y: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        return task_gradient(theta, x, y, w)[0][: program.adapted] @ v

    products = _mapped(grad(along, argnums=(0, 1)))
    product, mixed = products(_per_task(theta, x), x, y, vector, weight)
    return product, mixed if input_grad else x.new_empty(0)


def products(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    vectors: Tensor,
    gauss_newton: bool,
    weight: Tensor | None = None,
) -> Tensor:
    """``H v`` of each of the vectors ``[T, N, A]``, or ``J' H_L J v``, ``[T, N, P]``."""
    program = Code.decode(code)
    vectors = F.pad(vectors, (0, program.shared))
    if vectors.shape[1] == 0:
        return torch.zeros_like(vectors)
    loss = cast("LossCode", program.loss)

    def of_task(theta: Tensor, x: Tensor, y: Tensor, vectors: Tensor, w: Tensor | None) -> Tensor:
        def outputs(theta: Tensor) -> Tensor:
            return _outputs(program, theta, frozen, x, 0)

        if gauss_newton:
            z, pull = pullback(outputs, theta)
            # The backward pass is linear in its argument; its transpose is J.
            _, push = pullback(pull, torch.zeros_like(z))
            _, bend = pullback(grad(lambda z: _loss(loss, z, y, w)), z)
            product: Tensor = vmap(lambda v: pull(bend(push(v))))(vectors)
            return product
        _, times_hessian = pullback(grad(lambda theta: _loss(loss, outputs(theta), y, w)), theta)
        return cast("Tensor", vmap(times_hessian)(vectors))

    return cast("Tensor", _mapped(of_task)(_per_task(theta, x), x, y, vectors, weight))


def adapt(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    lr: Tensor,
    x: Tensor,
    y: Tensor,
    steps: int,
    shared: int = 0,
    weight: Tensor | None = None,
) -> Tensor:
    """theta_K ``[T, A]``; ``shared`` is S, as in the code."""
    with torch.no_grad():
        end = _unrolled(code, theta, frozen, lr, x, y, weight, steps, first_order=True)[-1]
    return end[:, : theta.shape[-1] - shared]


def adapt_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of ``<theta_K, grad_out>`` to theta, lr and x; ``keep`` changes nothing.

    Args:
        *arguments: fields of ``AdaptBackwardArguments``.
    """
    a = AdaptBackwardArguments(*arguments)
    theta, lr, x = (tensor.detach().requires_grad_() for tensor in (a.theta, a.lr, a.x))
    # Callers may be in no_grad: the derivative is taken by autograd, inside.
    with torch.enable_grad():
        states = _unrolled(a.code, theta, a.frozen, lr, x, a.y, a.weight, a.steps, a.first_order)
        end = states[-1]
        value = (end[:, : a.grad_out.shape[-1]] * a.grad_out).sum()
    to_theta, to_lr, to_x = _grads(value, {theta: True, lr: a.lr_grad, x: a.input_grad})
    return to_theta, to_lr, to_x


def meta_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    """The meta-loss, the outputs on the queries, and the gradient to theta, lr and the inputs.

    Args:
        *arguments: fields of ``MetaGradientArguments``; ``keep`` changes nothing.
    """
    a = MetaGradientArguments(*arguments)
    leaves = (a.theta, a.lr, a.support_x, a.query_x)
    theta, lr, support_x, query_x = (tensor.detach().requires_grad_() for tensor in leaves)
    program = Code.decode(a.code)

    def query_loss(k: int) -> tuple[Tensor, Tensor]:
        query_loss = _mapped(_task_loss(program, a.frozen, k))
        return cast(
            "tuple[Tensor, Tensor]", query_loss(states[k], query_x, a.query_y, a.query_weight)
        )

    support = support_x, a.support_y, a.support_weight
    with torch.enable_grad():
        states = _unrolled(a.code, theta, a.frozen, lr, *support, a.steps, a.first_order)
        losses, outputs = query_loss(a.steps)
        if a.step_weights:
            each = (query_loss(k)[0] for k in range(1, a.steps + 1))
            weighted = (w * loss for w, loss in zip(a.step_weights, each, strict=True))
            losses = sum(weighted, torch.zeros_like(losses))
        loss = losses.mean()
    required = {
        theta: a.gradient,
        lr: a.lr_grad,
        support_x: a.support_grad,
        query_x: a.query_grad,
    }
    return loss.detach(), outputs.detach(), *_grads(loss, required)


def _unrolled(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    lr: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    steps: int,
    first_order: bool,
) -> list[Tensor]:
    """theta_0 .. theta_K, each ``[T, P]``."""
    program, states = Code.decode(code), [_per_task(theta, x)]
    for k in range(steps):
        task_gradients = _mapped(grad(_task_loss(program, frozen, k), has_aux=True))
        grads, _ = task_gradients(states[-1], x, y, weight)
        step_sizes = lr[min(k, len(lr) - 1)]  # one for all steps, or one for each
        adapted = (grads.detach() if first_order else grads)[:, : program.adapted]
        states.append(states[-1] - F.pad(step_sizes * adapted, (0, program.shared)))
    return states


def _grads(value: Tensor, required: dict[Tensor, bool]) -> tuple[Tensor, ...]:
    """The gradients of ``value``; one that is not required is an empty tensor."""
    grads = torch.autograd.grad(value, list(required), materialize_grads=True)
    return tuple(
        grad if is_required else grad.new_empty(0)
        for grad, is_required in zip(grads, required.values(), strict=True)
    )


def _mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, of one task's tensors and of a weight or None, mapped over the tasks."""

    def mapped(*inputs: Tensor | None) -> Any:
        return vmap(fn, in_dims=tuple(None if x is None else 0 for x in inputs))(*inputs)

    return mapped


def _per_task(theta: Tensor, x: Tensor) -> Tensor:
    return theta.expand(len(x), theta.shape[-1])


def _task_loss(program: Code, frozen: Tensor, k: int = 0) -> TaskLoss:
    """The loss of one task at theta_k ``[P]``, and its outputs."""
    loss = cast("LossCode", program.loss)

    def task_loss(
        theta: Tensor, x: Tensor, y: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs = _outputs(program, theta, frozen, x, k)
        return _loss(loss, outputs, y, weight), outputs

    return task_loss


def _outputs(program: Code, theta: Tensor, frozen: Tensor, x: Tensor, k: int) -> Tensor:
    """Outputs ``[B, n]`` of one task's parameters theta_k ``[P]`` for inputs ``[B, ...]``."""
    values = {0: x.reshape(len(x), program.values[0])}
    for instruction in program.instructions:
        y = _run(instruction, values, theta, frozen, program.first_step + k)
        values[instruction.y] = y.reshape(len(x), program.values[instruction.y])
    return values[program.output]


def _run(
    ins: Instruction, values: dict[int, Tensor], theta: Tensor, frozen: Tensor, step: int
) -> Tensor:
    """The value that an instruction computes, for one task's examples ``[B, ...]``."""
    x = values[ins.x]
    if ins.opcode == Opcode.ADD:
        return x + values[ins.x2]
    if ins.opcode == Opcode.ACTIVATION:
        return plain_activation(x, *ins.args)
    if ins.opcode == Opcode.POOL:
        return _pool(x, *ins.args)
    if ins.opcode == Opcode.TRANSPOSE:
        return x.unflatten(1, ins.args).transpose(1, 2)
    weight: Any
    weight, bias = (
        _parameter(at, shape, theta, frozen)
        for at, shape in zip((ins.weight, ins.bias), _parameter_shapes(ins), strict=True)
    )
    if ins.opcode == Opcode.LINEAR:
        return F.linear(x.unflatten(1, (-1, ins.args[0])), weight, bias)
    if ins.opcode == Opcode.CONVOLUTION:
        return _convolution(x, weight, bias, *ins.args)
    if ins.opcode == Opcode.LAYER_NORM:
        y = _layer_norm(x, *ins.args)
    else:
        channels, groups, eps, mean, variance, rows = ins.args
        weight, bias = (p if p is None else p[min(step, rows - 1)] for p in (weight, bias))
        statistics = (_parameter(at, (channels,), theta, frozen) for at in (mean, variance))
        y = _norm(x, channels, groups, eps, *statistics)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _parameter_shapes(ins: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of weight and bias."""
    if ins.opcode == Opcode.LINEAR:
        inputs, outputs = ins.args
        return (outputs, inputs), (outputs,)
    if ins.opcode == Opcode.CONVOLUTION:
        channels, outputs, _, _, *kernel = ins.args[:6]
        return (outputs, channels // ins.args[-1], *kernel), (outputs,)
    if ins.opcode == Opcode.NORM:
        channels, *_, rows = ins.args
        return (rows, channels), (rows, channels)
    return ins.args[:1], ins.args[:1]


def _layer_norm(x: Tensor, size: int, eps: float) -> Tensor:
    return _normalised(x.unflatten(1, (-1, size)), (2,), eps)


def _norm(
    x: Tensor,
    channels: int,
    groups: int,
    eps: float,
    mean: Tensor | None,
    variance: Tensor | None,
) -> Tensor:
    rows = x.unflatten(1, (-1, channels))
    if mean is not None and variance is not None:
        return (rows - mean) / (variance + eps).sqrt()
    if groups == 0:
        return _normalised(rows, (0, 1), eps)
    grouped = rows.unflatten(2, (groups, channels // groups))
    return _normalised(grouped, (1, 3), eps).flatten(2)


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    *windows: int,
) -> Tensor:
    *pairs, groups = windows
    stride, padding, dilation = (tuple(pairs[i : i + 2]) for i in (2, 4, 6))
    x = x.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).permute(0, 2, 3, 1)


def _pool(
    x: Tensor,
    kind: int,
    channels: int,
    height: int,
    width: int,
    *windows: int,
) -> Tensor:
    *pairs, counts_padding = windows
    kernel, stride, padding = (tuple(pairs[i : i + 2]) for i in (0, 2, 4))
    x = x.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    if kind == PoolKind.AVERAGE:
        y = F.avg_pool2d(x, kernel, stride, padding, count_include_pad=bool(counts_padding))
    else:
        # A gather, not max_pool2d itself: its derivative is right at any order, also under vmap.
        _, at = F.max_pool2d(x.detach(), kernel, stride, padding, return_indices=True)
        y = x.flatten(2).gather(2, at.flatten(2)).view_as(at)
    return y.permute(0, 2, 3, 1)


def _parameter(
    reference: int, shape: tuple[int, ...], theta: Tensor, frozen: Tensor
) -> Tensor | None:
    if reference == -1:
        return None
    source, start = (theta, reference) if reference >= 0 else (frozen, -2 - reference)
    return source[start : start + torch.Size(shape).numel()].view(shape)


def _loss(code: LossCode, outputs: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """The loss of one task's outputs ``[B, n]``."""
    of_set = _cross_entropy if code.kind == LossKind.CROSS_ENTROPY else _regression
    if weight is None:
        return code.scale * of_set(code, outputs, y)
    if code.kind == LossKind.CROSS_ENTROPY:
        # An ignored example has no loss; a mean over it would be NaN.
        code, y = replace(code, b=-100), torch.where(y == code.b, ABSENT, y)
    # An example by itself is a set of one.
    each = torch.stack([of_set(code, outputs[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    return code.scale * (each * weight).sum()


def _cross_entropy(code: LossCode, outputs: Tensor, y: Tensor) -> Tensor:
    absent = (y == ABSENT) & (y != code.b)
    none = absent.all()
    # A task without an example has no loss. The mean over no example, and its gradient, is NaN.
    outputs, y = torch.where(none, 0.0, outputs), torch.where(absent, code.b, y)
    loss = F.cross_entropy(
        outputs,
        torch.where(none, 0, y),
        ignore_index=code.b,
        reduction="mean" if code.mean else "sum",
        label_smoothing=code.a,
    )
    return torch.where(none, 0.0, loss)


def _regression(code: LossCode, outputs: Tensor, y: Tensor) -> Tensor:
    reduction, y = "mean" if code.mean else "sum", y.reshape(outputs.shape)
    if code.kind == LossKind.HUBER:
        return F.huber_loss(outputs, y, reduction=reduction, delta=code.a)
    functions: dict[LossKind, Callable[..., Tensor]] = {
        LossKind.MSE: F.mse_loss,
        LossKind.BCE_WITH_LOGITS: F.binary_cross_entropy_with_logits,
        LossKind.L1: F.l1_loss,
    }
    return functions[code.kind](outputs, y, reduction=reduction)
