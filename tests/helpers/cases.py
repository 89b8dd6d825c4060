"""The table of op cases, on which tests and benchmarks run every op.

A case builds the arguments of one public op for a dtype and device. Shapes are written T, Q, N, D
(or T, S, N, D; T, P; T, B, C, O) and cross the blocks of the kernels: 4 to 6 rows and 16 to 64
columns of a tile, 48 and 128 rows of a block, 256 features of a slice, 1024 parameters of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import fastmeta as fm
from tests.helpers.case import Arguments, Case, CaseFactory, unbatched, with_absent
from tests.helpers.row_cases import (
    MATCHING_LOGITS,
    MATCHING_LOSS,
    NEAREST,
    PAIR_SCORES,
    PAIRWISE_DISTANCE,
    PROTOTYPE_LOSS,
    PROTOTYPES,
)


def inner_update_case(name: str, shape: tuple[int, ...], lr: Callable, **options: Any) -> Case:
    def build(make: CaseFactory) -> Arguments:
        return (make.randn(*shape), make.randn(*shape), lr(make)), options

    size = 1
    for n in shape:
        size *= n
    return Case("inner_update", name, build, small=size <= 30)


def conv_case(
    name: str,
    t: int,
    b: int,
    c: int,
    o: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    bias: bool = True,
    **options: Any,
) -> Case:
    inner = c // options.get("groups", 1)

    def build(make: CaseFactory) -> Arguments:
        images, weight = make.randn(t, b, c, *size), make.randn(t, o, inner, *kernel)
        return (images, weight, *([make.randn(t, o)] if bias else [])), options

    numbers = t * (b * c * size[0] * size[1] + o * inner * kernel[0] * kernel[1])
    return Case("task_conv2d", name, build, small=numbers <= 60)


def linear_case(name: str, t: int, b: int, i: int, o: int, bias: bool = True) -> Case:
    def build(make: CaseFactory) -> Arguments:
        return (make.randn(t, b, i), make.randn(t, o, i), *([make.randn(t, o)] if bias else [])), {}

    return Case("task_linear", name, build, small=t * (b + o) * i <= 60)


def joined_head(x, targets, weight, bias, lr, **options: Any) -> torch.Tensor:
    """Call `fm.linear_head` with floats first, and weight and bias joined in one tensor."""
    weight, bias = fm.linear_head(x, targets, weight, bias, lr=lr, **options)
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)


def head_case(
    loss: str,
    t: int,
    k: int,
    s: int,
    n: int,
    d: int,
    bias: bool = True,
    lr: Callable = lambda make, t, k: make.randn(k),
    absent: bool = False,
    **options: Any,
) -> Case:
    """Make a linear-head case whose step sizes are too small to amplify rounding."""

    def build(make: CaseFactory) -> Arguments:
        x = make.randn(t, s, d)
        targets = (
            make.randn(t, s, n)
            if loss == "mse"
            else make.labels(2 if loss == "logistic" else n, t, s)
        )
        targets = with_absent(targets) if absent else targets
        head = make.randn(t, n, d), make.randn(t, n) if bias else None
        step_sizes = 0.5 * d**-0.5 * abs(lr(make, t, k))
        return (x, targets, *head, step_sizes), {"steps": k, "loss": loss, **options}

    more = "".join(f"-{name}={value}" for name, value in options.items())
    more += "-absent" if absent else ""
    name = f"{loss}-{t}x{k}x{s}x{n}x{d}{'' if bias else '-no_bias'}{more}"
    return Case("linear_head", name, build, small=t * k * (s + n) * d <= 60, call=joined_head)


def joined_ridge(x, targets, l2, weight=None, center=None, **options: Any) -> torch.Tensor:
    """Call `fm.ridge_head` with floats first, and head and intercept joined in one tensor."""
    head, bias = fm.ridge_head(x, targets, l2, weight=weight, center=center, **options)
    return head if bias is None else torch.cat([head, bias.unsqueeze(-1)], -1)


def ridge_case(
    name: str, t: int, s: int, n: int, d: int, labelled: bool = False, weights: bool = False,
    center: bool = False, **options: Any,
) -> Case:  # fmt: skip
    """A head of labels, of which some are absent, or of targets, with a penalty that is felt."""

    def build(make: CaseFactory) -> Arguments:
        targets = with_absent(make.labels(n, t, s)) if labelled else make.randn(t, s, n)
        more = [make.randn(t, s).abs()] if weights else []
        more += [make.randn(t, n, d)] if center else []
        l2 = d * (make.randn(t).abs() + 1)
        extra = {"num_classes": n} if labelled else {}
        return (make.randn(t, s, d), targets, l2, *more), {**extra, **options}

    more = "".join(f"-{key}={value}" for key, value in options.items())
    small = t * s * (n + d) <= 60
    return Case("ridge_head", f"{name}{more}", build, small, joined_ridge)


def norm_case(
    name: str, t: int, b: int, c: int, size: tuple[int, int], affine: bool = True, **options: Any
) -> Case:
    def build(make: CaseFactory) -> Arguments:
        rows = [make.randn(t, c), make.randn(t, c)] if affine else []
        return (make.randn(t, b, c, *size), *rows), options

    return Case("task_batch_norm", name, build, small=t * b * c * size[0] * size[1] <= 40)


def activation_case(kind: str, *shape: int, **options: Any) -> Case:
    def build(make: CaseFactory) -> Arguments:
        return (make.randn(*shape), kind), options

    name = f"{kind}-{'x'.join(map(str, shape))}{'-options' if options else ''}"
    return Case("activation", name, build, small=math.prod(shape) <= 30)


def pool_case(name: str, t: int, q: int, n: int, c: int, size: tuple[int, int], pool: int) -> Case:
    def build(make: CaseFactory) -> Arguments:
        return (make.randn(t, q, c, *size), make.randn(t, n, c, *size), pool), {}

    return Case("pair_pool", name, build, small=t * (q + n) * c * size[0] * size[1] <= 60)


INNER_UPDATE = [
    inner_update_case("number", (3, 7), lambda make: 0.1),
    inner_update_case("scalar", (3, 7), lambda make: make.randn()),
    inner_update_case("per_element", (3, 7), lambda make: make.randn(7)),
    inner_update_case("per_task", (3, 7), lambda make: make.randn(3, 1)),
    inner_update_case("per_task_and_element", (3, 7), lambda make: make.randn(3, 7)),
    inner_update_case("per_layer", (3, 7), lambda make: make.randn(3), layer_sizes=(2, 4, 1)),
    inner_update_case("unbatched", (7,), lambda make: make.randn(7)),
    inner_update_case("one", (1, 1), lambda make: make.randn()),
    *(
        inner_update_case(f"blocks-{p}-{name}", (4, p), lr)
        for p in (1023, 1024, 1025, 3000)
        for name, lr in (
            ("scalar", lambda make: make.randn()),
            ("per_element", lambda make, p=p: make.randn(p)),
            ("per_task", lambda make: make.randn(4, 1)),
            ("per_task_and_element", lambda make, p=p: make.randn(4, p)),
        )
    ),
]


# Past blocks of 16 to 1024 rows and 4 blocks of a partial sum; with 1, 2 to 4 and more channels.
TASK_CONV2D = [
    conv_case("one_channel", 2, 2, 1, 2, (2, 3), (2, 2), padding=1),
    conv_case("strided", 1, 2, 2, 2, (3, 3), (2, 2), stride=(2, 1), padding=(1, 0)),
    conv_case("dilated", 1, 1, 5, 1, (3, 3), (2, 2), bias=False, dilation=(2, 1)),
    conv_case("same", 1, 1, 2, 1, (3, 4), (2, 3), padding="same"),
    conv_case("depthwise", 1, 2, 2, 4, (3, 3), (2, 2), padding=1, groups=2),
    conv_case("groups", 1, 1, 4, 4, (2, 3), (2, 1), groups=2),
    unbatched(conv_case("unbatched", 1, 2, 2, 2, (3, 3), (2, 2))),
    conv_case("one_pixel", 3, 4, 7, 5, (6, 5), (1, 1)),
    conv_case("lines", 3, 5, 1, 7, (28, 28), (3, 3), padding=1),
    conv_case("colours", 2, 3, 3, 9, (30, 21), (3, 5), stride=2, padding=(1, 2), dilation=(2, 1)),
    conv_case("blocks", 1, 7, 18, 20, (14, 14), (3, 3), padding=1),
    conv_case("many_blocks", 2, 6, 2, 3, (31, 33), (2, 2)),
    conv_case("wide", 3, 5, 40, 33, (5, 4), (3, 3), stride=(1, 2), padding=1, bias=False),
    conv_case("depthwise_wide", 2, 5, 19, 38, (12, 9), (3, 3), padding=1, dilation=2, groups=19),
    conv_case("depthwise_blocks", 1, 6, 17, 17, (21, 20), (3, 3), stride=(2, 1), groups=17),
    conv_case("past_the_border", 2, 3, 5, 4, (2, 3), (3, 3), padding=(3, 4), dilation=(1, 3)),
]


TASK_LINEAR = [
    linear_case("2x3x4x5", 2, 3, 4, 5),
    linear_case("no_bias", 2, 3, 4, 5, bias=False),
    unbatched(linear_case("3x4x5", 1, 3, 4, 5)),
    linear_case("wide", 3, 40, 70, 65),
    linear_case("tasks", 4, 2, 3, 2),
    linear_case("narrow", 5, 27, 161, 6),
    linear_case("large", 4, 70, 33, 66, bias=False),
]


# Past vectors of 8 and 16 examples or features, tiles of 5 x 5 dot products, and a warp.
FORMS = ("primal", "dual")


LINEAR_HEAD = [
    *(head_case("cross_entropy", 2, 2, 3, 2, 2, form=form) for form in FORMS),
    *(head_case("mse", 1, 2, 3, 2, 2, form=form, weight_decay=0.3) for form in FORMS),
    *(head_case("logistic", 1, 3, 4, 1, 2, form=form) for form in FORMS),
    head_case("cross_entropy", 2, 2, 3, 2, 2, bias=False, weight_decay=0.2),
    head_case("logistic", 2, 1, 3, 1, 2, lr=lambda make, t, k: make.randn(t, k)),
    head_case("mse", 1, 2, 2, 1, 1, bias=False, lr=lambda make, t, k: make.randn()),
    unbatched(head_case("cross_entropy", 1, 2, 3, 2, 2)),
    unbatched(head_case("mse", 2, 1, 3, 2, 2, bias=False)),
    *(head_case("cross_entropy", 2, 2, 3, 2, 2, form=form, absent=True) for form in FORMS),
    *(head_case("logistic", 2, 2, 4, 1, 2, form=form, absent=True) for form in FORMS),
    *(
        head_case("cross_entropy", 3, 5, 41, 5, 161, form=form, weight_decay=0.1, absent=True)
        for form in FORMS
    ),
    *(head_case("cross_entropy", 3, 5, 25, 5, 161, form=form) for form in FORMS),
    *(head_case("mse", 2, 3, 33, 7, 64, bias=False, form=form) for form in FORMS),
    *(head_case("logistic", 2, 4, 17, 1, 70, form=form) for form in FORMS),
    head_case("cross_entropy", 2, 3, 100, 20, 130, weight_decay=0.1),
]


# Past vectors of 4 to 16 numbers, a warp, and the 16 warps of a block; both forms.
RIDGE_HEAD = [
    *(ridge_case("2x3x2x2", 2, 3, 2, 2, weights=True, center=True, form=form) for form in FORMS),
    *(ridge_case("labels", 1, 4, 2, 3, labelled=True, form=form) for form in FORMS),
    *(ridge_case("no_intercept", 2, 3, 2, 2, bias=False, form=form) for form in FORMS),
    ridge_case("one", 1, 1, 1, 1, weights=True),
    unbatched(ridge_case("targets", 1, 3, 2, 4)),
    *(ridge_case("vectors", 3, 25, 5, 37, weights=True, form=form) for form in FORMS),
    *(ridge_case("absent", 3, 41, 5, 33, labelled=True, form=form) for form in FORMS),
    *(ridge_case("ways", 2, 20, 19, 21, bias=False, form=form) for form in FORMS),
]


# Past vectors of 4 to 16 numbers, 128 of them, and the 256 threads of a block.
TASK_BATCH_NORM = [
    norm_case("2x3x2x2x1", 2, 3, 2, (2, 1)),
    norm_case("plain", 1, 2, 2, (3, 2), affine=False),
    unbatched(norm_case("3x2x1x2", 1, 3, 2, (1, 2), eps=0.1)),
    norm_case("lines", 3, 5, 4, (7, 9)),
    norm_case("one_pixel", 2, 70, 3, (1, 1)),
    norm_case("large", 2, 3, 2, (31, 33), eps=1e-3),
]


# Past a vector, a block of 256 threads and a thread's 4096 numbers.
ACTIVATION = [
    *(activation_case(kind, 2, 3) for kind in ("gelu", "gelu_tanh", "mish", "silu", "softplus")),
    activation_case("softplus", 7, beta=1.5, threshold=0.3),
    *(activation_case(kind, 3, 5, 281) for kind in ("gelu", "mish", "softplus")),
    activation_case("silu", 2, 2500),
    activation_case("gelu_tanh"),
]


# Past vectors of 8 and 16 places of windows; maps whose last rows and columns fill no window.
PAIR_POOL = [
    pool_case("2x2x3", 2, 2, 3, 1, (2, 2), 2),
    pool_case("cut", 1, 2, 1, 2, (3, 5), 2),
    pool_case("relu", 1, 3, 2, 2, (2, 1), 1),
    pool_case("three", 1, 1, 2, 2, (3, 4), 3),
    pool_case("relation", 2, 9, 5, 16, (5, 5), 2),
    pool_case("many", 1, 70, 3, 7, (9, 6), 3),
    pool_case("one_pixel", 3, 5, 4, 33, (1, 1), 1),
    unbatched(pool_case("unbatched", 1, 2, 2, 1, (4, 3), 2)),
]


CASES = [
    *INNER_UPDATE,
    *PROTOTYPES,
    *PAIRWISE_DISTANCE,
    *NEAREST,
    *PROTOTYPE_LOSS,
    *MATCHING_LOSS,
    *MATCHING_LOGITS,
    *TASK_CONV2D,
    *TASK_LINEAR,
    *LINEAR_HEAD,
    *RIDGE_HEAD,
    *TASK_BATCH_NORM,
    *ACTIVATION,
    *PAIR_SCORES,
    *PAIR_POOL,
]


SMALL_CASES = [case for case in CASES if case.small]


def differentiable(args: tuple) -> list[int]:
    """Return the positions of floating-point tensors among a case's arguments."""
    return [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def as_function(case: Case, args: tuple, options: dict[str, Any]) -> tuple[Callable, tuple]:
    """Return the op as a function of its floating-point tensors only, and these tensors."""
    places = differentiable(args)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        full = list(args)
        for place, value in zip(places, inputs, strict=True):
            full[place] = value
        return case.function(*full, **options)

    return function, tuple(args[i] for i in places)
