"""One gradient-descent step on the parameters of every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree

from fastmeta.core import backend
from fastmeta.core.backend import WIDE_DTYPES
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import check_floating, check_shape, check_together, step_size_like
from fastmeta.ops._registration import (
    as_function,
    contiguous_like,
    fold,
    is_native,
    register,
    unfold,
)

Tree = TypeVar("Tree")
# From this number of elements on, the op's gradient to a step size is faster: its sums are fused.
FUSED_FROM = 1 << 17
StepSize = float | Tensor | Mapping[str, Any] | Sequence[Any]


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sum x [T, P] over the dimensions in which ``like`` has size 1, in the dtype of ``like``."""
    return x.to(like.dtype).sum_to_size(like.shape)


class InnerUpdate(Function):
    """params - lr * grads for params, grads [T, P] and lr [1 or T, 1 or P]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(params: Tensor, grads: Tensor, lr: Tensor) -> Tensor:
        return torch.ops.fastmeta.inner_update(params, grads, lr)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        grads, lr = ctx.saved_tensors
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            return grad_out, *inner_update_backward(grad_out, grads, lr)
        return grad_out, None, None

    @staticmethod
    def jvp(ctx: Any, params_dot: Any, grads_dot: Any, lr_dot: Any) -> Tensor:
        grads, lr = ctx.saved_tensors
        # The op is linear in params and bilinear in (grads, lr): its tangent is the op itself.
        out_dot = torch.zeros_like(grads) if params_dot is None else params_dot
        if grads_dot is not None:
            out_dot = reference.inner_update(out_dot, grads_dot, lr)
        if lr_dot is not None:
            out_dot = reference.inner_update(out_dot, grads, lr_dot)
        return out_dot


class InnerUpdateBackward(Function):
    """grad_grads = -lr * grad_out and grad_lr = -sum grads * grad_out: bilinear in all three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_out: Tensor, grads: Tensor, lr: Tensor) -> tuple[Any, ...]:
        return torch.ops.fastmeta.inner_update_backward(grad_out, grads, lr)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grads_cotangent: Tensor, lr_cotangent: Tensor) -> tuple[Any, ...]:
        grad_out, grads, lr = ctx.saved_tensors
        to_grad_out = (-lr * grads_cotangent - lr_cotangent * grads).to(grad_out.dtype)
        to_grads = (-lr_cotangent * grad_out).to(grads.dtype)
        return to_grad_out, to_grads, -_sum_to(grad_out * grads_cotangent, lr)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        grad_out, grads, lr = ctx.saved_tensors
        out_dot, grads_dot, lr_dot = (
            torch.zeros_like(x) if dot is None else dot
            for dot, x in zip(tangents, ctx.saved_tensors, strict=True)
        )
        grad_grads = (-lr * out_dot - lr_dot * grad_out).to(grads.dtype)
        return grad_grads, -_sum_to(grad_out * grads_dot + out_dot * grads, lr)


_update = as_function(InnerUpdate)
_native_backward = as_function(InnerUpdateBackward)


def _fold_with_lr(
    info: Any, in_dims: tuple[Any, ...], first: Any, grads: Any, lr: Any
) -> tuple[Any, ...]:
    """Merge a vmapped dimension into the tasks; lr gets a row for each of them."""
    size = info.batch_size
    first, grads = fold(first, in_dims[0], size), fold(grads, in_dims[1], size)
    tasks = first.shape[0] // size if size else 0
    lr = lr.expand(size, *lr.shape) if in_dims[2] is None else lr.movedim(in_dims[2], 0)
    return first, grads, lr.expand(size, tasks, lr.shape[2]).flatten(0, 1)


def _update_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
    out = torch.ops.fastmeta.inner_update(*_fold_with_lr(info, in_dims, *args))
    return unfold(out, info.batch_size), 0


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
    # Rows of lr before it was vmapped: its first dimension but the vmapped one.
    lr_rows = args[2].shape[0 if in_dims[2] is None else int(in_dims[2] == 0)]
    folded = _fold_with_lr(info, in_dims, *args)
    grad_grads, grad_lr = torch.ops.fastmeta.inner_update_backward(*folded)
    grad_lr = unfold(grad_lr, info.batch_size)
    if lr_rows == 1:  # folding gave every task a row of lr: sum them again
        grad_lr = grad_lr.sum(1, keepdim=True)
    return (unfold(grad_grads, info.batch_size), grad_lr), (0, 0)


register("inner_update", lambda params, grads, lr: contiguous_like(params), _update_vmap)
register(
    "inner_update_backward",
    lambda grad_out, grads, lr: (contiguous_like(grads), contiguous_like(lr)),
    _backward_vmap,
)


def inner_update_backward(grad_out: Tensor, grads: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of ``inner_update`` to grads [T, P] and lr [1 or T, 1 or P], in one pass.

    ``lr`` is float32 for bfloat16 and float16 gradients. (The gradient to params is grad_out.)
    """
    if is_native("inner_update", grads):
        return _native_backward(grad_out, grads, lr)
    return (-lr * grad_out).to(grads.dtype), -_sum_to(grad_out * grads, lr)


def step_size_rows(
    lr: float | Tensor, params: Tensor, layer_sizes: Sequence[int] | None = None
) -> Tensor:
    """``lr`` as [1 or T, 1 or P] for params [T, P], in the accumulation dtype. Differentiable."""
    tasks, parameters = params.shape
    if not isinstance(lr, Tensor):
        dtype = accumulation_dtype(params.dtype)
        return torch.full((1, 1), float(lr), dtype=dtype, device=params.device)
    lr = step_size_like(lr, params, "params")
    if layer_sizes is not None:
        if lr.shape != (len(layer_sizes),) or sum(layer_sizes) != parameters:
            raise ValueError(
                f"lr and layer_sizes: expected [{len(layer_sizes)}] step sizes and a sum of "
                f"P = {parameters}, got {list(lr.shape)} and {sum(layer_sizes)}"
            )
        # Sizes as Python numbers: with a tensor of them, a GPU would wait for its copy.
        pieces = [one.expand(size) for one, size in zip(lr.unbind(), layer_sizes, strict=True)]
        return torch.cat(pieces).unsqueeze(0)
    if lr.dim() <= 1:
        lr = lr.reshape(1, -1)
    if lr.dim() != 2 or lr.shape[0] not in (1, tasks) or lr.shape[1] not in (1, parameters):
        raise ValueError(
            f"lr: expected a number, [P], [T, 1] or [T, P] with T = {tasks}, P = {parameters}, "
            f"got {list(lr.shape)}"
        )
    return lr


def _fit(params: Tensor, grads: Tensor) -> bool:
    """Whether two plain tensors fit together; the checks, which take longer, say why if not."""
    return (
        type(params) is Tensor
        and type(grads) is Tensor
        and params.dtype is grads.dtype
        and params.dtype in WIDE_DTYPES
        and params.device == grads.device
        and params.layout is grads.layout is torch.strided
        and not (params.is_nested or grads.is_nested)
    )


def _update_arena(
    params: Tensor,
    grads: Tensor,
    lr: float | Tensor,
    layer_sizes: Sequence[int] | None,
) -> Tensor:
    if not _fit(params, grads):
        check_floating("params", params)
        check_floating("grads", grads)
        check_together("grads", grads, "params", params)
    if params.dim() not in (1, 2) or grads.shape != params.shape:
        raise ValueError(
            "params and grads: expected one shape, [T, P] or [P], "
            f"got {list(params.shape)} and {list(grads.shape)}"
        )
    if params.dim() == 1:
        return _update_arena(params.unsqueeze(0), grads.unsqueeze(0), lr, layer_sizes).squeeze(0)
    if _pytorch_may_run(params) and _is_one_pass(params, lr, layer_sizes):
        return _by_pytorch(params, grads, lr)
    step_sizes = step_size_rows(lr, params, layer_sizes)
    if is_native("inner_update", params):
        return _update(params, grads, step_sizes)
    return reference.inner_update(params, grads, step_sizes)


def _pytorch_may_run(params: Tensor) -> bool:
    """Whether PyTorch's kernel may take the place of ours: on a CPU, unless one is asked for."""
    return params.device.type == "cpu" and params.dtype in WIDE_DTYPES and backend.is_free()


def _is_one_pass(
    params: Tensor, lr: float | Tensor, layer_sizes: Sequence[int] | None = None
) -> bool:
    """Whether PyTorch takes the step, and its backward, as fast as our op takes it."""
    if not isinstance(lr, Tensor):
        return True
    return (
        layer_sizes is None
        and params.numel() < FUSED_FROM
        and lr.dtype == params.dtype
        and lr.device == params.device
        and (lr.dim() == 0 or (lr.dim() == 1 and lr.shape[0] in (1, params.shape[-1])))
    )


def _by_pytorch(params: Tensor, grads: Tensor, lr: float | Tensor) -> Tensor:
    """PyTorch's kernel takes one pass as well, with less Python around it."""
    if isinstance(lr, Tensor):
        return torch.addcmul(params, lr, grads, value=-1)
    return torch.sub(params, grads, alpha=float(lr))


def _update_leaf(param: Tensor, grad: Tensor, lr: Any) -> Tensor:
    check_floating("params", param)
    check_floating("grads", grad)
    check_together("grads", grad, "params", param)
    check_shape("grads", grad, param.shape)
    if isinstance(lr, Tensor):
        lr = _leaf_step_size(lr, param)
    learned = isinstance(lr, Tensor) and lr.requires_grad
    if param.dtype in WIDE_DTYPES and not (learned and param.numel() >= FUSED_FROM):
        return _by_pytorch(param, grad, lr)
    # The op takes flat arenas: this tensor is the arena of one task.
    if isinstance(lr, Tensor) and lr.dim():
        lr = lr.expand(param.shape).reshape(1, -1)
    return _update_arena(param.reshape(1, -1), grad.reshape(1, -1), lr, None).reshape(param.shape)


def _leaf_step_size(lr: Tensor, param: Tensor) -> Tensor:
    """``lr``, which must broadcast to the parameter, in the accumulation dtype."""
    lr = step_size_like(lr, param, "params")
    pairs = zip(reversed(lr.shape), reversed(param.shape), strict=False)
    if lr.dim() > param.dim() or any(n not in (1, m) for n, m in pairs):
        raise ValueError(
            f"lr: expected a shape that broadcasts to its parameter's, {list(param.shape)}, "
            f"got {list(lr.shape)}"
        )
    return lr


@overload
def inner_update(
    params: Tensor,
    grads: Tensor,
    lr: StepSize,
    *,
    layer_sizes: Sequence[int] | None = None,
) -> Tensor: ...


@overload
def inner_update(params: Tree, grads: Any, lr: StepSize, *, layer_sizes: None = None) -> Tree: ...


def inner_update(
    params: Any, grads: Any, lr: StepSize, *, layer_sizes: Sequence[int] | None = None
) -> Any:
    """params - lr * grads: one inner-loop step of gradient descent for every task.

    Differentiable any number of times in params, grads and lr; works under torch.func and
    torch.compile. bfloat16 and float16 are computed in float32, with lr kept in float32. In a
    tree, float32 and float64 go through PyTorch's own kernels, which take one pass as well. Large
    tensors with a learned lr are the exception: their gradients are fused. So do arrays on a CPU
    if lr is a number, or if they are small and lr is 0-d or [P].

    Args:
        params: [T, P], the flat parameters of T tasks (or [P] for one); or a tree (dict, list or
            tuple) of tensors of any shapes.
        grads: the same shape, or a tree of the same structure.
        lr: the step size. For [T, P] params: a number or 0-d tensor; [P] for each element, [T, 1]
            for each task, [T, P] for both; or, with ``layer_sizes``, [L] for each layer. For a
            tree: one number for all, or a tree of the same structure of numbers or of tensors
            broadcastable to the parameter's shape.
        layer_sizes: number of parameters of each of the L layers, in arena order; sums to P.

    Returns:
        A new tensor or tree like params; inputs are not changed.

    Raises:
        TypeError: something is not a floating-point tensor, or dtypes differ.
        ValueError: shapes, trees or devices do not agree.

    Source: Finn, Abbeel, Levine 2017 (arXiv 1703.03400), equation 1; per-element step sizes are
    Meta-SGD's (Li et al. 2017, arXiv 1707.09835).

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> fm.inner_update(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0.1, 0.2, 0.3]))
        tensor([[0.9000, 0.8000, 0.7000],
                [0.9000, 0.8000, 0.7000]])
    """
    if isinstance(params, Tensor):
        return _update_arena(params, grads, cast("float | Tensor", lr), layer_sizes)
    if layer_sizes is not None:
        raise ValueError(
            f"layer_sizes: expected None for a tree of params, got {layer_sizes!r}; "
            "give a tree of step sizes instead"
        )
    leaves, tree = pytree.tree_flatten(params)
    grad_leaves, grad_tree = pytree.tree_flatten(grads)
    if tree != grad_tree:
        raise ValueError(f"grads: expected the structure of params, {tree}, got {grad_tree}")
    if isinstance(lr, Mapping | list | tuple):
        lr_leaves, lr_tree = pytree.tree_flatten(lr)
        if lr_tree != tree:
            raise ValueError(f"lr: expected the structure of params, {tree}, got {lr_tree}")
    else:
        lr_leaves = [lr] * len(leaves)
    updated = [_update_leaf(*leaf) for leaf in zip(leaves, grad_leaves, lr_leaves, strict=True)]
    return pytree.tree_unflatten(updated, tree)
