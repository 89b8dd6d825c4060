"""Every op at the sizes where its kernels change their way: around warps, tiles, slices, blocks."""

from __future__ import annotations

import pytest
import torch

import fastmeta as fm
from tests.helpers.assertions import TOLERANCE, assert_near, value_and_grads
from tests.helpers.case import DTYPES
from tests.helpers.cases import head_case, inner_update_case
from tests.helpers.row_cases import distance_case, loss_case, prototypes_case

# One less, as many, and one more than there are lanes in a warp and rows or columns in a tile.
EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65)

# Shapes T, Q, N, D: one size at a time goes over the edges.
SHAPES = [
    *((2, q, 5, 3) for q in EDGES),
    *((2, 3, n, 5) for n in EDGES),
    *((2, 3, 5, d) for d in (*EDGES, 127, 128, 129)),
    # Past large tiles of 64 x 128 distances and 64 x 64 sums, and far enough to split a sum.
    *((1, q, n, d) for q, n in ((64, 128), (65, 129), (63, 127)) for d in (3, 8, 9)),
    (1, 1025, 5, 3),
    # Rows that fill vectors: classes in groups of 5, few and many, and blocks of x.
    *((2, 3, n, 71) for n in (1, 6, 11, 32, 33)),
    (1, 1025, 6, 65),
]

# The metrics that take the two ways through the kernels: differences, and products of rows that
# are normalised.
METRICS = ("euclidean", "cosine")
# A cosine in one dimension is 1 or -1, and its gradient nothing but rounding.
PAIRS = [
    (metric, shape) for metric in METRICS for shape in SHAPES if (metric, shape[3]) != ("cosine", 1)
]

# A thread has 8 values, or 4 accesses of 16 bytes, of the 256 times as many of a block.
PARAMETERS = (
    1,
    31,
    32,
    33,
    255,
    256,
    257,
    *(n + i for n in (2048, 4096, 8192) for i in (-8, -1, 0, 1, 8)),
)
STEP_SIZES = {
    "scalar": lambda make, p: make.randn(),
    "per_element": lambda make, p: make.randn(p),
    "per_task": lambda make, p: make.randn(3, 1),
    "per_task_and_element": lambda make, p: make.randn(3, p),
}

# S, N, D; a warp takes 32 labels at once, and 32 values or accesses of 16 bytes of a row.
PROTOTYPES = [
    *((s, 3, 5) for s in (1, 31, 32, 33, 63, 64, 65)),
    *((20, n, 5) for n in (1, 31, 32, 33)),
    *((7, 3, d) for n in (32, 64, 128, 256) for d in (n - 8, n - 1, n, n + 1, n + 8)),
]

# S, N, D: lanes of examples, tiles of dot products, features of a slice. Step sizes are numbers:
# the gradient to one is a sum that cancels, for one way nothing but rounding.
HEADS = [
    *((s, 3, 5) for s in EDGES),
    *((7, n, 5) for n in (1, 4, 5, 6, 10, 11, 32, 33)),
]
# A softmax of outputs of many features is all but one-hot, and its derivative cancels.
WIDE_HEADS = [(6, 3, d) for d in (*EDGES, 127, 128, 129)]

CASES = [
    *(distance_case(metric, *shape) for metric, shape in PAIRS),
    *(loss_case(metric, "none", *shape, scale=0.3) for metric, shape in PAIRS),
    *(
        inner_update_case(f"{p}-{name}", (3, p), lambda make, p=p, lr=lr: lr(make, p))
        for p in PARAMETERS
        for name, lr in STEP_SIZES.items()
    ),
    *(prototypes_case(f"{s}x{n}x{d}", 3, s, n, d) for s, n, d in PROTOTYPES),
    *(
        head_case(loss, 2, 3, *shape, lr=lambda *_: 0.7, form=form)
        for loss, shapes in (("cross_entropy", HEADS), ("mse", WIDE_HEADS))
        for shape in shapes
        for form in ("primal", "dual")
    ),
]


@pytest.mark.skipif(not fm.build_info()["native"], reason="the native extension was not built")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_the_edges_of_warps_tiles_and_blocks(case, device):
    for dtype in DTYPES:
        args, options = case(dtype, device)
        exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        with fm.use_backend("torch"):
            expected = value_and_grads(case, tuple(exact), options, dtype)
        with fm.use_backend("native"):
            actual = value_and_grads(case, args, options)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, TOLERANCE[dtype])
