"""Gradient descent on a linear head of every task: the inner loop of ANIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.checks import check_choice, check_integer, check_number
from fastmeta.ops import reference
from fastmeta.ops._linear_head_arguments import Head, HeadOptions, checked_head, step_sizes
from fastmeta.ops._registration import as_function, contiguous_like, folding, is_native, register

FORMS = ("auto", "primal", "dual")

# The inputs that have derivatives, in the order of the op.
INPUTS = ("x", "targets", "weight", "bias", "lr")

Tensors = dict[str, Tensor]


def fake_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, lr: Tensor, loss: str, input_grad: bool
) -> tuple[Tensor, ...]:
    """Fakes of the gradients to INPUTS; a last dimension of 0 stands for an absent one."""
    tasks, examples, features = x.shape
    ways = weight.shape[1]
    return (
        x.new_empty(tasks, examples, features if input_grad else 0),
        x.new_empty(tasks, examples, ways if loss == "mse" else 0),
        contiguous_like(weight),
        x.new_empty(tasks, 0 if bias is None else ways),
        contiguous_like(lr),
    )


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
    return fake_gradients(x, weight, bias, lr, loss, input_grad and not first_order)


register("linear_head", _fake)
register("linear_head_backward", _fake_backward)


def _inputs(x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, lr: Tensor) -> Tensors:
    """The tensors among INPUTS to which this head has derivatives, by name."""
    inputs = {"x": x, "weight": weight, "lr": lr}
    if bias is not None:
        inputs["bias"] = bias
    if targets.is_floating_point():
        inputs["targets"] = targets
    return inputs


def _plain(inputs: Tensors, targets: Tensor, options: HeadOptions) -> Tensors:
    """The adapted head in plain PyTorch, which gives all derivatives beyond the first."""
    weight, bias = reference.linear_head(
        inputs["x"],
        inputs.get("targets", targets),
        inputs["weight"],
        inputs.get("bias"),
        inputs["lr"],
        options.loss,
        options.weight_decay,
        options.first_order,
    )
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _plain_gradients(
    upstream: Tensors, inputs: Tensors, targets: Tensor, options: HeadOptions
) -> Tensors:
    """vjp of ``_plain`` for the cotangents ``upstream``."""
    pullback = torch.func.vjp(lambda z: _plain(z, targets, options), inputs)[1]
    return pullback(upstream)[0]


def _tangent(
    function: Callable[..., Tensors], inputs: tuple[Any, ...], along: tuple[Any, ...]
) -> Tensors:
    """jvp of ``function``, as the transpose of its pullback."""
    # Forward mode does not nest: this runs where PyTorch already takes a jvp.
    like = {name: torch.zeros_like(x) for name, x in function(*inputs).items()}
    transpose = torch.func.vjp(lambda u: torch.func.vjp(function, *inputs)[1](u), like)[1]
    return transpose(along)[0]


def _or_zeros(given: dict[str, Tensor | None], like: Tensors) -> Tensors:
    """One tensor for each of ``like``: the given one, or zeros if it is None or empty."""
    tensors = {}
    for name, x in like.items():
        one = given.get(name)
        tensors[name] = torch.zeros_like(x) if one is None or one.shape != x.shape else one
    return tensors


class LinearHead(Function):
    """Adapted weight [T, N, D] and bias [T, N] (or [T, 0]), and what the backward pass keeps."""

    @staticmethod
    def forward(
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lr: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmeta.linear_head(
            x, targets, weight, bias, lr, options.loss, options.weight_decay, options.dual
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.options = inputs
        predictions_and_products = output[2:]
        # They are outputs only because the backward kernel reads them.
        ctx.mark_non_differentiable(*predictions_and_products)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *predictions_and_products)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_weight: Any, grad_bias: Any, *_: Any) -> tuple[Any, ...]:
        x, targets, weight, bias, lr, predictions, products = ctx.saved_tensors
        # None stands for an output that the loss does not use. The kernel takes tensors only.
        if grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        if grad_bias is None:
            grad_bias = weight.new_zeros(weight.shape[0], 0 if bias is None else weight.shape[1])
        # torch.compile has no second derivatives, and loses track of a nested Function.
        backward = _raw_backward if torch.compiler.is_compiling() else _backward
        grad_x, grad_targets, to_weight, to_bias, to_lr = backward(
            grad_weight, grad_bias, x, targets, weight, bias, lr, predictions, products,
            ctx.options, ctx.needs_input_grad[0],
        )  # fmt: skip
        if ctx.options.first_order or not ctx.needs_input_grad[0]:
            grad_x = None
        if ctx.options.first_order or not ctx.needs_input_grad[1]:
            grad_targets = None
        return grad_x, grad_targets, to_weight, None if bias is None else to_bias, to_lr, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        x, targets, weight, bias, lr = ctx.saved_tensors
        inputs = _inputs(x, targets, weight, bias, lr)
        along = _or_zeros(dict(zip(INPUTS, tangents, strict=False)), inputs)
        out = _tangent(lambda z: _plain(z, targets, ctx.options), (inputs,), (along,))
        no_bias = weight.new_zeros(weight.shape[0], 0)
        return out["weight"], out.get("bias", no_bias), None, None


class LinearHeadBackward(Function):
    """Gradients to INPUTS."""

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
        options: HeadOptions,
        input_grad: bool,
    ) -> tuple[Tensor, ...]:
        return _raw_backward(
            grad_weight, grad_bias, x, targets, weight, bias, lr, predictions, products,
            options, input_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        # Predictions and products follow from the others: plain PyTorch computes them again.
        *tensors, _predictions, _products, ctx.options, _input_grad = inputs
        ctx.shapes = [x.shape for x in output]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        targets = ctx.saved_tensors[3]
        upstream, inputs = _split(*ctx.saved_tensors)
        along = _or_zeros(dict(zip(INPUTS, cotangents, strict=True)), inputs)
        pullback = torch.func.vjp(
            lambda u, z: _plain_gradients(u, z, targets, ctx.options), upstream, inputs
        )[1]
        to_upstream, to_inputs = pullback(along)
        return (
            to_upstream["weight"],
            to_upstream.get("bias"),
            *(to_inputs.get(name) for name in INPUTS),
            *(None,) * 4,
        )

    @staticmethod
    def jvp(ctx: Any, weight_dot: Any, bias_dot: Any, *tangents: Any) -> tuple[Any, ...]:
        targets = ctx.saved_tensors[3]
        upstream, inputs = _split(*ctx.saved_tensors)
        upstream_dot = _or_zeros({"weight": weight_dot, "bias": bias_dot}, upstream)
        along = _or_zeros(dict(zip(INPUTS, tangents, strict=False)), inputs)
        out = _tangent(
            lambda u, z: _plain_gradients(u, z, targets, ctx.options),
            (upstream, inputs),
            (upstream_dot, along),
        )
        # The op's outputs are empty for absent gradients, and so must their tangents be.
        return tuple(
            out[name]
            if name in out and out[name].shape == shape
            else targets.new_zeros(shape, dtype=inputs["lr" if name == "lr" else "x"].dtype)
            for name, shape in zip(INPUTS, ctx.shapes, strict=True)
        )


def _split(
    grad_weight: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
) -> tuple[Tensors, Tensors]:
    """The cotangents and the inputs of a head, by name."""
    upstream = (
        {"weight": grad_weight} if bias is None else {"weight": grad_weight, "bias": grad_bias}
    )
    return upstream, _inputs(x, targets, weight, bias, lr)


def _raw_backward(*args: Any) -> tuple[Any, ...]:
    *tensors, options, input_grad = args
    return torch.ops.fastmeta.linear_head_backward(
        *tensors, options.loss, options.weight_decay, options.dual, options.first_order, input_grad
    )


_head = as_function(LinearHead)
_backward = as_function(LinearHeadBackward)
# PyTorch's own rules create a class at every call.
for cls, function in ((LinearHead, _head), (LinearHeadBackward, _backward)):
    cls.vmap = staticmethod(folding(function))  # type: ignore[method-assign]


def adapted_head(
    head: Head, step_sizes: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor | None]:
    """``linear_head`` of checked arguments."""
    x, targets, weight, bias = head
    if not is_native("linear_head", x) or step_sizes.shape[1] == 0:  # 0 steps: nothing to run
        loss, weight_decay, first_order, _dual = options
        return reference.linear_head(
            x, targets, weight, bias, step_sizes, loss, weight_decay, first_order
        )
    weight, new_bias, *_ = _head(x, targets, weight, bias, step_sizes, options)
    return weight, None if bias is None else new_bias


def uses_kernel_form(form: str, head: Head, steps: int) -> bool:
    """Whether the head takes its steps in the dual form, on coefficients of the examples.

    "auto" chooses the dual if it takes fewer operations for the head and all of its gradients:
    S D (3/2 S + 6 N) + 3 K N S^2, against 6 K N S D.
    """
    if form != "auto":
        return form == "dual"
    examples, features = head.x.shape[1:]
    ways = head.weight.shape[1]
    # Both counts divided by S / 2.
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
    targets, weight, bias and lr. Native kernels give the value and the first derivatives, plain
    PyTorch the higher ones. Works under torch.func and torch.compile. bfloat16 and float16 are
    computed in float32. Apply the head to queries with ``fm.task_linear(query, weight, bias)``.

    Args:
        x: features of the support [T, S, D], or [S, D] for one task; S at least 1.
        targets: int64 labels [T, S] in [0, N), for "logistic" 0 or 1; for "mse" [T, S, N] like x.
            Label -1: an absent example, whose gradient is 0. Means are over the others, and a task
            without one takes only the steps of weight decay.
        weight: the start [T, N, D], or [N, D] for all tasks; N at least 1; dtype and device of x.
        bias: [T, N], or [N], or None for a head without one.
        lr: step size: a number or 0-d tensor, [K] for each step, or [T, K] for each task and step.
        steps: K, at least 0.
        loss: mean over a task's examples of "cross_entropy"; of "logistic", the cross entropy of a
            sigmoid, for one output N = 1; or "mse", the mean over S and N of squared differences.
        weight_decay: adds weight_decay times weight and bias to their gradients, as torch.optim.SGD
            does; with "mse" this is ridge regression.
        form: "primal" takes the steps on the weights; "dual" takes them on coefficients of the
            examples, with their Gram matrix, in O(S^2 N) a step for any D; "auto" takes the one
            with fewer operations. The results differ by rounding.
        first_order: leave the second derivatives of the loss out of gradients (FOMAML): x and
            targets get none.

    Returns:
        weight [T, N, D] and bias [T, N] or None; [N, D] and [N] for one task. New tensors.

    Raises:
        TypeError: inputs are not tensors of fitting dtypes, or an option has the wrong type.
        ValueError: shapes or devices do not agree, an option is unknown or out of range, there is
            no example or no way, or a label is neither in range nor -1 (the message names the
            first).

    Source: Raghu et al. 2020 (arXiv 1909.09157) adapt only the head; the dual form is the
    representer theorem for each step.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
        >>> weight, _ = fm.linear_head(x, y, torch.zeros(2, 1), lr=1.0, steps=1)
        >>> weight
        tensor([[ 0.5000],
                [-0.5000]])
    """
    head = checked_head(x, targets, weight, bias, loss)
    check_choice("form", form, FORMS)
    weight_decay = check_number("weight_decay", weight_decay)
    check_integer("steps", steps, 0)
    dual = uses_kernel_form(form, head, steps)
    options = HeadOptions(loss, weight_decay, bool(first_order), dual)
    w, b = adapted_head(head, step_sizes(lr, steps, head.x), options)
    if x.dim() == 2:
        return w.squeeze(0), None if b is None else b.squeeze(0)
    return w, b
