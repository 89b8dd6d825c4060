"""Assertions that compare an op's value and gradients with a reference, and marks of its cases."""

from __future__ import annotations

import pytest
import torch

import fastmeta as fm
from tests.helpers.case import Case
from tests.helpers.cases import CASES, SMALL_CASES, as_function

# Relative to the largest entry, or to 0.01 where all are smaller: rounding of the inputs' own
# dtype, summed over up to 600 terms.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
BACKENDS = [b for b in ("native", "torch") if b == "torch" or fm.build_info()["native"]]


def require_kernels(device: str) -> None:
    """Skips the test where the extension has no kernels for the device."""
    if not all((op, device) in fm.core.backend.KERNELS for op in fm.core.backend.OPS):
        pytest.skip(f"the extension has no kernels for {device}")


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL_CASES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected.double().cpu()).abs()
    assert error.max().item() <= tolerance * max(1e-2, expected.double().abs().max().item())


def value_and_grads(
    case: Case, args: tuple, options: dict, rounded_to: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients for an upstream gradient with distinct entries."""
    function, inputs = as_function(case, args, options)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
    upstream = upstream.to(rounded_to).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, leaves, upstream)
    return out.detach(), *grads
