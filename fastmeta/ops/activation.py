"""Elementwise activations whose second derivative is one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._activations import Activation, plain_activation
from fastmeta.ops._checks import check_floating
from fastmeta.ops._derivatives import pullback, save, tangent
from fastmeta.ops._registration import as_function, contiguous_like, is_native, register

# Those whose second derivative PyTorch computes by a chain of elementwise kernels.
KINDS = {
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELU_TANH,
    "mish": Activation.MISH,
    "silu": Activation.SILU,
    "softplus": Activation.SOFTPLUS,
}

Code = tuple[int, float, float]  # of csrc/execution/activation.h: a kind and its two numbers


def _gradient(grad: Tensor, x: Tensor, code: Code) -> Tensor:
    return torch.ops.fastmeta.activation_backward(grad, x, *code)


def _plain(x: Tensor, code: Code) -> Tensor:
    return plain_activation(x.to(accumulation_dtype(x.dtype)), *code).to(x.dtype)


def _plain_gradient(grad: Tensor, x: Tensor, code: Code) -> Tensor:
    return torch.func.vjp(lambda x: _plain(x, code), x)[1](grad)[0]


def _plain_second(grad_grad_x: Tensor, grad: Tensor, x: Tensor, code: Code) -> tuple[Tensor, ...]:
    return torch.func.vjp(lambda g, x: _plain_gradient(g, x, code), grad, x)[1](grad_grad_x)


class Value(Function):
    """y of x [...]."""

    @staticmethod
    def forward(x: Tensor, code: Code) -> Tensor:
        return torch.ops.fastmeta.activation(x, *code)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # torch.compile has no second derivatives, and loses track of a nested Function.
        gradient = _gradient if torch.compiler.is_compiling() else _backward
        (x,) = ctx.saved_tensors
        return gradient(grad, x, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, _: Any) -> Tensor:
        # Elementwise: the tangent is the gradient along it.
        return _backward(x_dot, *ctx.saved_tensors, ctx.setting)


class Gradient(Function):
    """The gradient to x."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, code: Code) -> Tensor:
        return _gradient(grad, x, code)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor) -> tuple[Any, ...]:
        return *_second(grad_grad_x, *ctx.saved_tensors, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Tensor:
        return tangent(_plain_gradient, ctx, dots)


class Second(Function):
    """The gradients of <gradient to x, grad_grad_x> to grad and x."""

    @staticmethod
    def forward(grad_grad_x: Tensor, grad: Tensor, x: Tensor, code: Code) -> tuple[Tensor, ...]:
        return torch.ops.fastmeta.activation_backward_backward(grad_grad_x, grad, x, *code)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        return pullback(_plain_second, ctx, directions)

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        return tangent(_plain_second, ctx, dots)


def _elementwise(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule for an op on tensors of one shape: the vmapped dimension leads."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        moved = []
        for arg, dim in zip(args, in_dims, strict=True):
            if not isinstance(arg, Tensor):
                moved.append(arg)
            elif dim is None:
                moved.append(arg.expand(info.batch_size, *arg.shape))
            else:
                moved.append(arg.movedim(dim, 0))
        out = op(*moved)
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)

    return rule


def _rule_of(name: str) -> Callable[..., Any]:
    """The rule of ``torch.ops.fastmeta.<name>``, which need not be built."""
    return lambda *args: _elementwise(getattr(torch.ops.fastmeta, name))(*args)


_apply = as_function(Value)
_backward = as_function(Gradient)
_second = as_function(Second)
# PyTorch's own rules create a class at every call.
for cls, function in ((Value, _apply), (Gradient, _backward), (Second, _second)):
    cls.vmap = staticmethod(_elementwise(function))  # type: ignore[method-assign]

for name, fake in (
    ("activation", lambda x, *_: contiguous_like(x)),
    ("activation_backward", lambda grad, x, *_: contiguous_like(x)),
    (
        "activation_backward_backward",
        lambda v, grad, x, *_: (contiguous_like(x), contiguous_like(x)),
    ),
):
    register(name, fake, _rule_of(name))


def activation(x: Tensor, kind: str, *, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Activation of each element, with a second derivative that is one kernel.

    ``torch.nn.functional``'s functions of these names, whose second derivative, which
    meta-learning takes, PyTorch computes by a chain of elementwise kernels. Differentiable any
    number of times, forward and reverse; works under torch.func and torch.compile. The compiled
    kernels take float32 and float64; half types are computed in plain PyTorch, in float32.

    Args:
        x: any shape.
        kind: "gelu", "gelu_tanh" (its approximation), "mish", "silu" or "softplus".
        beta, threshold: of softplus, as in ``torch.nn.functional.softplus``; others ignore them.

    Returns:
        The shape of x, contiguous.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: kind is none of these.

    Source: Hendrycks, Gimpel 2016 (GELU, SiLU; arXiv 1606.08415), Misra 2020 (mish; arXiv
    1908.08681).

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> fm.activation(torch.tensor([-1.0, 0.0, 1.0]), "mish")
        tensor([-0.3034,  0.0000,  0.8651])
    """
    check_floating("x", x)
    number = KINDS[check_choice("kind", kind, tuple(KINDS))]
    code = (int(number), float(beta), float(threshold))
    if not is_native("activation", x):
        return _plain(x, code).contiguous()
    return _apply(x, code)
