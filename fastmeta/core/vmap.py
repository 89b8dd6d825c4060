"""Functions mapped over tasks, and the choice of kernels that can be vmapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from fastmeta.core.trees import split


def map_tasks(fn: Callable[..., Any], *args: Any) -> Any:
    """Map ``fn``, a function of one task's tensors, over the leading dimension of ``args``.

    Several tasks are vmapped, each with its own random numbers. A single task is called directly:
    it needs no batching rule, and a convolution stays an ordinary one.
    """
    if tree_leaves(args)[0].shape[0] != 1:
        return vmap(fn, randomness="different")(*args)
    result = fn(*tree_map(lambda tensor: tensor.squeeze(0), args))
    return tree_map(lambda tensor: tensor.unsqueeze(0), result)


def map_trees(fn: Callable[..., Any], *args: Any) -> Any:
    """``map_tasks`` for trees of any kind; objects in a result that are no tensors become None."""
    tensors, structure = split(args)
    results = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        found, result = split(fn(*structure.of(tensors)), others=False)
        results.append(result)
        return tuple(found)

    found = map_tasks(flat, *tensors)
    return results[0].of(found)


def under_derivative(fn: Callable[[Any], Tensor], params: Any) -> Tensor:
    """``fn(params)`` for use inside ``map_tasks``, also with recurrent layers."""
    # Recurrent kernels have no batching rule. Under a derivative, PyTorch runs them in parts that
    # have one.
    return vjp(fn, params)[0]


def call_twice_differentiable(
    call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
) -> Any:
    """``call(*args, **kwargs)``, the forward of a module whose steps are differentiated.

    Flash attention and cuDNN's recurrent layers have no second derivative.
    """
    if not torch.is_grad_enabled():
        return call(*args, **kwargs)
    is_recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    with differentiable_kernels(is_recurrent):
        return call(*args, **kwargs)


@contextmanager
def differentiable_kernels(recurrent: bool = False) -> Iterator[None]:
    """Context in which torch runs only kernels with a double backward and a batching rule.

    Flash and memory-efficient attention and the transformer fast path have neither, nor have
    cuDNN's recurrent layers.

    Args:
        recurrent: whether to avoid cuDNN, too.
    """
    if torch.compiler.is_compiling():  # torch.compile traces no other switch
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    fast_path, cudnn_enabled = mha.get_fastpath_enabled(), cudnn.enabled
    mha.set_fastpath_enabled(False)
    if recurrent:
        cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast_path)
        if recurrent:
            cudnn.enabled = cudnn_enabled
