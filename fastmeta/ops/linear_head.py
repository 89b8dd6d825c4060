"""Gradient descent on a linear head of every task: the inner loop of ANIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.ops import reference
from fastmeta.ops._checks import check_option
from fastmeta.ops._linear_head_arguments import (
    Head,
    checked_head,
    checked_number,
    checked_steps,
    step_sizes,
)
from fastmeta.ops._registration import as_function, contiguous_like, is_native, register
from fastmeta.ops.task_linear import task_linear
from fastmeta.ops.task_matmul import product

FORMS = ("auto", "primal", "dual")

Tensors = dict[str, Tensor]


class Options(NamedTuple):
    loss: str
    weight_decay: float
    first_order: bool


def _fake(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
    loss: str,
    weight_decay: float,
    dual: bool,
) -> tuple[Tensor, ...]:
    tasks, examples, features = x.shape
    ways, steps = weight.shape[1], lr.shape[1]
    products = (tasks, examples, examples) if dual else (tasks, steps, ways, features)
    return (
        contiguous_like(weight),
        x.new_empty(tasks, 0 if bias is None else ways),
        lr.new_empty(tasks, steps, ways, examples),
        lr.new_empty(products),
    )


def _fake_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
    predictions: Tensor,
    products: Tensor,
    loss: str,
    weight_decay: float,
    dual: bool,
    first_order: bool,
    input_grad: bool,
) -> tuple[Tensor, ...]:
    tasks, examples, features = x.shape
    return (
        x.new_empty(tasks, examples, features if input_grad and not first_order else 0),
        x.new_empty(tasks, examples, weight.shape[1] if loss == "mse" else 0),
        contiguous_like(weight),
        contiguous_like(grad_bias),
        contiguous_like(lr),
    )


register("linear_head", _fake)
register("linear_head_backward", _fake_backward)


def _inputs(x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, lr: Tensor) -> Tensors:
    """What a head has derivatives to, by name."""
    found = {"x": x, "weight": weight, "lr": lr}
    if bias is not None:
        found["bias"] = bias
    if targets.is_floating_point():
        found["targets"] = targets
    return found


def _plain(inputs: Tensors, targets: Tensor, options: Options) -> Tensors:
    """The adapted head in plain PyTorch, which gives all derivatives beyond the first."""
    weight, bias = reference.linear_head(
        inputs["x"],
        inputs.get("targets", targets),
        inputs["weight"],
        inputs.get("bias"),
        inputs["lr"],
        *options,
    )
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _plain_gradients(
    upstream: Tensors, inputs: Tensors, targets: Tensor, options: Options
) -> Tensors:
    pullback = torch.func.vjp(lambda z: _plain(z, targets, options), inputs)[1]
    return pullback(upstream)[0]


def _tangent(
    function: Callable[..., Tensors], inputs: tuple[Any, ...], along: tuple[Any, ...]
) -> Tensors:
    """Derivative of ``function`` along a direction, as the transpose of its pullback.

    A ``jvp`` of its own cannot run where PyTorch already takes one.
    """
    like = {name: torch.zeros_like(x) for name, x in function(*inputs).items()}
    transpose = torch.func.vjp(lambda u: torch.func.vjp(function, *inputs)[1](u), like)[1]
    return transpose(along)[0]


def _or_zeros(given: dict[str, Tensor | None], like: Tensors) -> Tensors:
    """One for each of ``like``: zeros where none, or an empty one, is given."""
    found = {name: (given.get(name), x) for name, x in like.items()}
    return {
        name: torch.zeros_like(x) if one is None or one.shape != x.shape else one
        for name, (one, x) in found.items()
    }


class LinearHead(Function):
    """Adapted weight [T, N, D] and bias [T, N] (or [T, 0]), and what the backward pass keeps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lr: Tensor,
        loss: str,
        weight_decay: float,
        first_order: bool,
        dual: bool,
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmeta.linear_head(
            x, targets, weight, bias, lr, loss, weight_decay, dual
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.options, ctx.dual = Options(*inputs[5:8]), inputs[8]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output[2:])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad_weight: Any, grad_bias: Any, *_: Any) -> tuple[Any, ...]:
        x, targets, weight, bias, lr, *kept = ctx.saved_tensors
        if grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        if grad_bias is None:
            grad_bias = weight.new_zeros(weight.shape[0], 0 if bias is None else weight.shape[1])
        # torch.compile has no second derivatives, and loses track of a nested Function.
        backward = _raw_backward if torch.compiler.is_compiling() else _backward
        upstream = grad_weight, grad_bias
        grad_x, grad_targets, *grads = backward(
            *upstream, *(x, targets, weight, bias, lr), *kept, *ctx.options, ctx.dual,
            ctx.needs_input_grad[0],
        )  # fmt: skip
        if ctx.options.first_order or not ctx.needs_input_grad[0]:
            grad_x = None
        if ctx.options.first_order or not ctx.needs_input_grad[1]:
            grad_targets = None
        if bias is None:
            grads[1] = None
        return grad_x, grad_targets, *grads, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        x, targets, weight, bias, lr = ctx.saved_tensors
        inputs = _inputs(x, targets, weight, bias, lr)
        names = ("x", "targets", "weight", "bias", "lr")
        along = _or_zeros(dict(zip(names, tangents, strict=False)), inputs)
        out = _tangent(lambda z: _plain(z, targets, ctx.options), (inputs,), (along,))
        no_bias = weight.new_zeros(weight.shape[0], 0)
        return out["weight"], out.get("bias", no_bias), None, None


class LinearHeadBackward(Function):
    """Gradients to x, targets, weight, bias and lr."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_weight: Tensor,
        grad_bias: Tensor,
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lr: Tensor,
        predictions: Tensor,
        products: Tensor,
        loss: str,
        weight_decay: float,
        first_order: bool,
        dual: bool,
        input_grad: bool,
    ) -> tuple[Tensor, ...]:
        return _raw_backward(
            grad_weight, grad_bias, x, targets, weight, bias, lr, predictions, products, loss,
            weight_decay, first_order, dual, input_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.options = Options(*inputs[9:12])
        ctx.shapes = [x.shape for x in output]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        targets = ctx.saved_tensors[3]
        upstream, inputs = _split(*ctx.saved_tensors)
        along = _or_zeros(dict(zip(OUTPUTS, grads, strict=True)), inputs)
        pullback = torch.func.vjp(
            lambda u, z: _plain_gradients(u, z, targets, ctx.options), upstream, inputs
        )[1]
        found, more = pullback(along)
        return (
            found["weight"],
            found.get("bias"),
            more["x"],
            more.get("targets"),
            more["weight"],
            more.get("bias"),
            more["lr"],
            *(None,) * 7,
        )

    @staticmethod
    def jvp(ctx: Any, weight_dot: Any, bias_dot: Any, *tangents: Any) -> tuple[Any, ...]:
        targets = ctx.saved_tensors[3]
        upstream, inputs = _split(*ctx.saved_tensors)
        upstream_dot = _or_zeros({"weight": weight_dot, "bias": bias_dot}, upstream)
        along = _or_zeros(dict(zip(OUTPUTS, tangents, strict=False)), inputs)
        out = _tangent(
            lambda u, z: _plain_gradients(u, z, targets, ctx.options),
            (upstream, inputs),
            (upstream_dot, along),
        )
        return tuple(
            out[name]
            if name in out and out[name].shape == shape
            else targets.new_zeros(shape, dtype=inputs["lr" if name == "lr" else "x"].dtype)
            for name, shape in zip(OUTPUTS, ctx.shapes, strict=True)
        )


OUTPUTS = ("x", "targets", "weight", "bias", "lr")


def _split(
    grad_weight: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
) -> tuple[Tensors, Tensors]:
    upstream = (
        {"weight": grad_weight} if bias is None else {"weight": grad_weight, "bias": grad_bias}
    )
    return upstream, _inputs(x, targets, weight, bias, lr)


def _raw_backward(*args: Any) -> tuple[Any, ...]:
    *tensors, loss, weight_decay, first_order, dual, input_grad = args
    return torch.ops.fastmeta.linear_head_backward(
        *tensors, loss, weight_decay, dual, first_order, input_grad
    )


_head = as_function(LinearHead)
_backward = as_function(LinearHeadBackward)


def adapted_head(
    head: Head, rates: Tensor, loss: str, weight_decay: float, first_order: bool, dual: bool
) -> tuple[Tensor, Tensor | None]:
    """``linear_head`` of checked arguments."""
    options = loss, weight_decay, first_order
    if not is_native("linear_head", head.x) or rates.shape[1] == 0:  # nothing to be done natively
        return reference.linear_head(*head, rates, *options)
    weight, bias, *_ = _head(*head, rates, *options, dual)
    return weight, None if head.bias is None else bias


def uses_kernel_form(form: str, head: Head, steps: int) -> bool:
    """Whether the dual takes fewer operations for the head and all of its gradients.

    They are S D (3/2 S + 6 N) + 3 K N S^2, against 6 K N S D.
    """
    if form != "auto":
        return form == "dual"
    examples, features = head.x.shape[1:]
    ways = head.weight.shape[1]
    dual = features * (3 * examples + 12 * ways) + 6 * steps * ways * examples
    return dual <= 12 * steps * ways * features


def linear_head(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lr: float | Tensor,
    steps: int,
    loss: str = "cross_entropy",
    weight_decay: float = 0.0,
    form: str = "auto",
    first_order: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Each task's linear head after ``steps`` steps of gradient descent on the task's examples.

        weight, bias = weight - lr grad_weight, bias - lr grad_bias      of the mean loss, K times

    All tasks and steps in one call, differentiable any number of times in x, floating-point
    targets, weight, bias and lr: native kernels give the value and the first derivatives, plain
    PyTorch the ones beyond. Works under torch.func and torch.compile. bfloat16 and float16 are
    computed in float32. Queries then are ``fm.task_linear(query, weight, bias)``.

    Args:
        x: features of the support [T, S, D], or [S, D] for one task; S at least 1.
        targets: int64 labels [T, S] in [0, N), for "logistic" 0 or 1; for "mse" [T, S, N] like x.
        weight: the start [T, N, D], or [N, D] for all tasks; N at least 1; dtype and device of x.
        bias: [T, N], or [N], or None for a head without one.
        lr: step size: a number or 0-d tensor, [K] one a step, or [T, K] one a task and step.
        steps: K, at least 0.
        loss: mean over a task's examples of "cross_entropy"; of "logistic", the cross entropy of a
            sigmoid, for one output N = 1; or "mse", the mean over S and N of squared differences.
        weight_decay: adds weight_decay times weight and bias to their gradients, as torch.optim.SGD
            does; with "mse" this is ridge regression.
        form: "primal" takes the steps on the weights; "dual" on coefficients of the examples, with
            their Gram matrix, in O(S^2 N) a step whatever D is; "auto" what takes fewer operations.
            The result differs by rounding.
        first_order: leave the second derivatives of the loss out of gradients (FOMAML): x and
            targets get none.

    Returns:
        weight [T, N, D] and bias [T, N] or None; [N, D] and [N] for one task. New tensors.

    Raises:
        TypeError: inputs are not tensors of fitting dtypes, or an option has the wrong type.
        ValueError: shapes or devices do not agree, an option is unknown or out of range, there is
            no example or no way, or a label is out of range (the message names the first).

    Source: Raghu et al. 2020 (arXiv 1909.09157) adapt the head alone; the dual form is the
    representer theorem for each step.

    >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    >>> weight, _ = fm.linear_head(x, y, torch.zeros(2, 1), lr=1.0, steps=1)
    >>> weight
    tensor([[ 0.5000],
            [-0.5000]])
    """
    head = checked_head(x, targets, weight, bias, loss)
    check_option("form", form, FORMS)
    options = Options(loss, checked_number("weight_decay", weight_decay), bool(first_order))
    rates = step_sizes(lr, checked_steps(steps), head.x)
    w, b = adapted_head(head, rates, *options, uses_kernel_form(form, head, steps))
    if x.dim() == 2:
        return w.squeeze(0), None if b is None else b.squeeze(0)
    return w, b


def linear_head_hvp(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_vector: Tensor,
    bias_vector: Tensor | None,
    *,
    loss: str = "cross_entropy",
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Product of the Hessian of each task's loss at a linear head with a vector, in closed form.

        z_dot = x weight_vector' + bias_vector,   g_dot = J z_dot
        product = g_dot' x + weight_decay weight_vector,   sum g_dot + weight_decay bias_vector

    J is the derivative of the loss's gradient to the outputs. Two products with x; differentiable
    any number of times.

    Args:
        x, targets, weight, bias, loss, weight_decay: as for ``linear_head``.
        weight_vector, bias_vector: of the shapes of weight and bias; None without a bias.

    Returns:
        The product's part for the weight [T, N, D] and for the bias [T, N] or None; without the
        task dimension for one task.

    Raises:
        TypeError, ValueError: as for ``linear_head``; bias_vector and bias are not both there.

    Source: Pearlmutter 1994, fast exact multiplication by the Hessian.

    >>> x, y, eye = torch.eye(2), torch.tensor([0, 1]), torch.eye(2)
    >>> fm.linear_head_hvp(x, y, torch.zeros(2, 2), None, eye, None)[0]
    tensor([[ 0.1250, -0.1250],
            [-0.1250,  0.1250]])
    """
    head = checked_head(x, targets, weight, bias, loss)
    weight_decay = checked_number("weight_decay", weight_decay)
    if (bias is None) != (bias_vector is None):
        raise ValueError("bias_vector must be given with a bias, and only with one")
    vector = checked_head(x, targets, weight_vector, bias_vector, loss)
    if vector.weight.shape != head.weight.shape:
        raise ValueError(
            f"weight_vector must have the shape of weight, {list(weight.shape)}, "
            f"got {list(weight_vector.shape)}"
        )
    if loss != "mse":
        reference.check_label_range(
            head.targets, 2 if loss == "logistic" else head.weight.shape[1], "targets"
        )
    z_dot = task_linear(head.x, vector.weight, vector.bias)
    residual_dot = _curvature(task_linear(head.x, head.weight, head.bias), z_dot, loss)
    of_weight = product(residual_dot, head.x, transpose_a=True) + weight_decay * vector.weight
    of_bias = None
    if vector.bias is not None:
        of_bias = residual_dot.sum(1) + weight_decay * vector.bias
    if x.dim() == 2:
        return of_weight.squeeze(0), None if of_bias is None else of_bias.squeeze(0)
    return of_weight, of_bias


def _curvature(outputs: Tensor, z_dot: Tensor, loss: str) -> Tensor:
    """J z_dot for outputs [T, S, N]."""
    examples, ways = outputs.shape[1:]
    if loss == "mse":
        return 2 / (examples * ways) * z_dot
    if loss == "logistic":
        p = outputs.sigmoid()
        return p * (1 - p) * z_dot / examples
    p = outputs.softmax(2)
    return p * (z_dot - (p * z_dot).sum(2, keepdim=True)) / examples
