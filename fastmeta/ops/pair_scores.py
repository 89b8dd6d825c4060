"""Scores of all pairs of rows by a small network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import check_floating, check_rows, check_together
from fastmeta.ops._derivatives import filled, pullback, save, tangent
from fastmeta.ops._registration import as_function, contiguous_like, folding, is_native, register

ACTIVATIONS = ("relu", "tanh", "silu", "abs")


def _gradient(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, activation: str
) -> tuple[Tensor, ...]:
    return torch.ops.fastmeta.pair_scores_backward(grad, x, y, weight, activation)


def _plain_tangent(*inputs: Any) -> Tensor:
    *dots, x, y, weight, activation = inputs
    point = x, y, weight, torch.zeros_like(dots[3])
    scores, back, *_ = torch.func.vjp(
        lambda x, y, w, b: reference.pair_scores(x, y, w, b, activation), *point
    )
    # The pullback is linear: its own is the tangent, in reverse mode, which nests.
    return torch.func.vjp(back, torch.zeros_like(scores))[1](tuple(dots))[0]


def _plain_bend(*inputs: Any) -> tuple[Tensor, ...]:
    grad, *dots, x, y, weight, activation = inputs
    bias_dot = weight.new_zeros(len(weight))
    along = torch.func.vjp(lambda *p: _plain_tangent(*dots, bias_dot, *p, activation), x, y, weight)
    return along[1](grad)


class Scores(Function):
    """Scores [T, Q, N] of x [T, Q, H], y [T, N, H], weight [T, H] and bias [T]."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return torch.ops.fastmeta.pair_scores(x, y, weight, bias, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # torch.compile has no second derivatives, and loses track of a nested Function.
        gradient = _gradient if torch.compiler.is_compiling() else _backward
        x, y, weight, _ = ctx.saved_tensors
        return *gradient(grad, x, y, weight, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Tensor:
        x, y, weight, _ = ctx.saved_tensors
        return _tangent(*filled(dots, ctx.saved_tensors), x, y, weight, ctx.setting)


class ScoresBackward(Function):
    """The gradients to x, y, weight and bias."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, activation: str
    ) -> tuple[Tensor, ...]:
        return _gradient(grad, x, y, weight, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        grad, *point = ctx.saved_tensors
        along = _tangent(*directions, *point, ctx.setting)
        return along, *_bend(grad, *directions[:3], *point, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        grad, *point = ctx.saved_tensors
        grad_dot, *directions = filled(dots, ctx.saved_tensors)
        *grads, bias = _backward(grad_dot, *point, ctx.setting)
        bends = _bend(grad, *directions, *point, ctx.setting)
        return *(g + bend for g, bend in zip(grads, bends, strict=True)), bias


class ScoresTangent(Function):
    """The tangent of the scores along x_dot, y_dot, weight_dot and bias_dot."""

    @staticmethod
    def forward(
        x_dot: Tensor,
        y_dot: Tensor,
        weight_dot: Tensor,
        bias_dot: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        activation: str,
    ) -> Tensor:
        return torch.ops.fastmeta.pair_scores_tangent(
            x_dot, y_dot, weight_dot, bias_dot, x, y, weight, activation
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return pullback(lambda *p: (_plain_tangent(*p),), ctx, (grad,))

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Tensor:
        return tangent(_plain_tangent, ctx, dots)


class ScoresBend(Function):
    """The tangent of the gradients to x, y and weight, at a constant gradient of the scores."""

    @staticmethod
    def forward(
        grad: Tensor,
        x_dot: Tensor,
        y_dot: Tensor,
        weight_dot: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        activation: str,
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmeta.pair_scores_bend(
            grad, x_dot, y_dot, weight_dot, x, y, weight, activation
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        return pullback(_plain_bend, ctx, directions)

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        return tangent(_plain_bend, ctx, dots)


_apply = as_function(Scores)
_backward = as_function(ScoresBackward)
_tangent = as_function(ScoresTangent)
_bend = as_function(ScoresBend)
# PyTorch's own rules create a class at every call.
for cls, function in (
    (Scores, _apply),
    (ScoresBackward, _backward),
    (ScoresTangent, _tangent),
    (ScoresBend, _bend),
):
    cls.vmap = staticmethod(folding(function))  # type: ignore[method-assign]


def _scores_like(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])


def _gradients_like(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(contiguous_like, (x, y, weight)))


register("pair_scores", lambda x, y, *_: _scores_like(x, y))
register(
    "pair_scores_backward",
    # len() would be a number, and compile a graph for this number of tasks.
    lambda grad, x, y, weight, _: (
        *_gradients_like(x, y, weight),
        weight.new_empty(weight.shape[0]),
    ),
)
register("pair_scores_tangent", lambda x_dot, y_dot, *_: _scores_like(x_dot, y_dot))
register(
    "pair_scores_bend",
    lambda grad, x_dot, y_dot, weight_dot, *_: _gradients_like(x_dot, y_dot, weight_dot),
)


def pair_scores(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Score of every row of ``x`` with every row of ``y``, for every task.

        relu, tanh, silu    s_qn = bias + sum_h weight_h activation(x_qh + y_nh)
        abs                 s_qn = bias + sum_h weight_h |x_qh - y_nh|

    The output layer of a network of pairs, whose first layer is split outside: as W1 cat(a, b) =
    W1a a + W1b b, the two products take Q + N rows and not Q N. With "relu" that is a relation
    network of vectors, with "abs" the weighted distance of a Siamese network, with "tanh" additive
    attention.

    No array [T, Q, N, H] is made, forward or backward. The gradient of "relu" and of "abs" at 0 is
    0, so identical rows give no NaN. Differentiable any number of times, forward and reverse; works
    under torch.func and torch.compile. bfloat16 and float16 are summed in float32.

    Args:
        x: [T, Q, H], or [Q, H] for one task.
        y: [T, N, H], or [N, H], same dtype and device.
        weight: [H], or [T, H] for weights of each task.
        bias: a number as a tensor [], or [T] for one of each task. None: 0.
        activation: one of the above.

    Returns:
        [T, Q, N], or [Q, N]. Any of T, Q, N may be 0; over H = 0 features a score is the bias.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype.
        ValueError: shapes do not agree, devices differ, or ``activation`` is unknown.

    Source: Sung et al. 2018 (arXiv 1711.06025), Koch et al. 2015 (Siamese Neural Networks for
    One-shot Image Recognition), Bahdanau et al. 2015 (arXiv 1409.0473).

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0], [0.0, 1.0]])
        >>> fm.pair_scores(x, y, torch.tensor([1.0, 10.0]))
        tensor([[ 4., 31.]])
    """
    _check(x, y, weight, bias, activation)
    if x.dim() == 2:
        return pair_scores(x.unsqueeze(0), y.unsqueeze(0), weight, bias, activation).squeeze(0)
    tasks, wide = x.shape[0], accumulation_dtype(x.dtype)
    weights = weight.to(wide).expand(tasks, x.shape[2])
    biases = weights.new_zeros(()) if bias is None else bias.to(wide)
    y = -y if activation == "abs" else y
    scores = _apply if is_native("pair_scores", x) else reference.pair_scores
    return scores(x, y, weights, biases.expand(tasks), activation)


def _check(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_rows("x", x, "y", y, "[T, Q, H]", "[T, N, H]")
    check_choice("activation", activation, ACTIVATIONS)
    tasks, features = x.shape[:-2], x.shape[-1:]
    _check_shared("weight", weight, x, (*tasks, *features), tuple(features))
    if bias is not None:
        _check_shared("bias", bias, x, tuple(tasks), ())


def _check_shared(
    name: str, value: Tensor, x: Tensor, of_tasks: tuple[int, ...], shared: tuple[int, ...]
) -> None:
    """Raise unless ``value`` has the dtype and device of ``x`` and one of both shapes."""
    check_floating(name, value)
    check_together(name, value, "x", x)
    if value.shape not in (of_tasks, shared):
        ways = " or ".join(str(list(shape)) for shape in dict.fromkeys((shared, of_tasks)))
        raise ValueError(f"{name}: expected shape {ways}, got {list(value.shape)}")
