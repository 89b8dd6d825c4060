"""Scores of all pairs of rows by a small network."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import check_floating, check_rows, check_together

ACTIVATIONS = ("relu", "tanh", "silu", "abs")


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
    return reference.pair_scores(x, y, weights, biases.expand(tasks), activation)


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
