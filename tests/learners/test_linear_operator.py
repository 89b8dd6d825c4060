"""The curvature of a learner's loss as a linear operator of SciPy and curvlinops."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout

linalg = pytest.importorskip("scipy.sparse.linalg", reason="SciPy is not installed")


def problem(tasks: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(tasks, 7, 3, dtype=dtype), torch.randint(0, 3, (tasks, 7))
    params = torch.randn(tasks, ParameterLayout.of(net).numel, dtype=dtype)
    return net, params, (x, y)


def dense(net: nn.Module, params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The block-diagonal Hessian ``[T P, T P]``."""
    views = ParameterLayout.of(net).views

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, views(theta), (x,)), y)

    return torch.block_diag(*(hessian(loss)(*task) for task in zip(params, *batch, strict=True)))


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("engine", ["program", "functional"])
def test_its_columns_are_the_hessian(engine, tasks):
    net, params, batch = problem(tasks)
    operator = fm.as_linear_operator(fm.MAML(net, engine=engine), params, batch)
    expected = dense(net, params, batch).numpy()
    size = len(expected)
    assert operator.shape == (size, size) and operator.dtype == np.float64
    identity = np.eye(size)
    for found in (operator @ identity, operator.H @ identity, operator.T @ identity):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(operator @ identity[:, 2], expected[:, 2], atol=1e-12)
    np.testing.assert_allclose(operator @ identity[:, 2:3], expected[:, 2:3], atol=1e-12)
    np.testing.assert_allclose(operator @ (2j * identity), 2j * expected, atol=1e-12)
    assert (operator @ np.zeros((size, 0))).shape == (size, 0)


def test_eigenvalues_are_those_of_the_dense_matrix():
    net, params, batch = problem(1)
    operator = fm.as_linear_operator(fm.MAML(net), params, batch)
    expected = torch.linalg.eigvalsh(dense(net, params, batch)).numpy()
    found = linalg.eigsh(operator, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), expected[-3:], atol=1e-10)


def test_single_precision_and_parameters_that_tasks_share():
    net, params, batch = problem(2, torch.float32)
    maml = fm.MAML(net)
    operator = fm.as_linear_operator(maml, params[0], batch)
    assert operator.dtype == np.float32
    vector = np.random.default_rng(0).normal(size=operator.shape[0])  # float64
    expected = maml.hvp(params[0], batch, torch.from_numpy(vector).float().view(2, -1))
    np.testing.assert_array_equal(operator @ vector, expected.flatten().numpy())


def test_the_gauss_newton_matrix():
    net, params, batch = problem(1)
    maml = fm.MAML(net)
    operator = fm.as_linear_operator(maml, params, batch, curvature="ggn")
    matrix = operator @ np.eye(operator.shape[0])
    vector = torch.randn_like(params)
    expected = maml.ggnvp(params, batch, vector)
    np.testing.assert_allclose(matrix @ vector[0].numpy(), expected[0].numpy(), atol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12
    assert np.abs(matrix - dense(net, params, batch).numpy()).max() > 1e-3


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_operator_of_curvlinops(tasks):
    pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    net, params, batch = problem(tasks)
    operator = fm.as_linear_operator(fm.MAML(net), params, batch, library="curvlinops")
    expected = dense(net, params, batch)
    torch.testing.assert_close(operator @ torch.eye(len(expected)).double(), expected)
    np.testing.assert_allclose(operator.to_scipy() @ np.eye(len(expected)), expected, atol=1e-12)
    if tasks == 1:
        lists = [torch.randn_like(p) for p in net.parameters()]
        flat = torch.cat([entry.flatten() for entry in lists])
        product = torch.cat([entry.flatten() for entry in operator @ lists])
        torch.testing.assert_close(product, expected @ flat)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learner": nn.Linear(1, 1)}, TypeError, "learner: expected a MAML learner, got Linear"),
        ({"curvature": "fisher"}, ValueError, "curvature: expected one of .* got 'fisher'"),
        ({"library": "numpy"}, ValueError, "library: expected one of .* got 'numpy'"),
        ({"params": torch.zeros(4)}, ValueError, r"params: expected shape \[31\] or \[1, 31\]"),
        ({"batch": torch.zeros(4)}, TypeError, r"batch: expected inputs .* got Tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    net, params, batch = problem(1)
    arguments = {"learner": fm.MAML(net), "params": params, "batch": batch, **change}
    with pytest.raises(error, match=message):
        fm.as_linear_operator(**arguments)


@pytest.mark.parametrize(
    ("library", "module", "package"),
    [
        ("scipy", "scipy.sparse.linalg", "scipy"),
        ("curvlinops", "curvlinops._torch_base", "curvlinops-for-pytorch"),
    ],
)
def test_a_library_that_is_not_installed_is_named(library, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    net, params, batch = problem(1)
    with pytest.raises(ImportError, match=f"needs {module}: pip install {package}$"):
        fm.as_linear_operator(fm.MAML(net), params, batch, library=library)
