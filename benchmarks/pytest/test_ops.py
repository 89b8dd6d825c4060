"""Every op case of tests/helpers/cases.py under pytest-benchmark, native beside plain PyTorch.

pytest benchmarks --benchmark-enable --benchmark-group-by=param:case
"""

from __future__ import annotations

import pytest
import torch

import fastmeta as fm
from tests.helpers.assertions import BACKENDS, value_and_grads
from tests.helpers.cases import CASES


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(benchmark, case, backend):
    args, options = case(torch.float32)
    with fm.use_backend(backend):
        out = benchmark(value_and_grads, case, args, options)
    assert out[0].isfinite().all()
