"""A learner's curvature as a linear operator of SciPy or curvlinops, for their algorithms."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmeta.core.checks import check_choice
from fastmeta.core.optional import require
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import Tree
from fastmeta.engines.checks import check_arena, check_examples
from fastmeta.learners._batches import examples_of
from fastmeta.learners.gradient.imaml import CURVATURES
from fastmeta.learners.gradient.maml import MAML

LIBRARIES = ("scipy", "curvlinops")


def as_linear_operator(
    learner: MAML,
    params: Tensor,
    batch: Tree,
    *,
    curvature: str = "hessian",
    library: str = "scipy",
) -> Any:
    """The Hessian or Gauss-Newton matrix of a learner's loss as a linear operator.

    Eigenvalues, traces, linear systems: the algorithms of SciPy and curvlinops multiply with the
    operator, and each product runs on the learner's engine. Several vectors at a time share the
    passes that do not depend on the vector.

    Args:
        learner: MAML or a learner derived from it: its module, loss and ``hvp_mode``.
        params: parameters at which the matrix is taken, ``[P]`` for all tasks or ``[T, P]``.
        batch: as for ``MAML.hvp``; for one data set T is 1.
        curvature: ``"hessian"``, or ``"ggn"``, see ``fastmeta.ggnvp``.
        library: ``"scipy"`` for a ``scipy.sparse.linalg.LinearOperator``, or ``"curvlinops"`` for a
            ``PyTorchLinearOperator``, which must be installed.

    Returns:
        A symmetric operator ``[T P, T P]`` in the dtype of the parameters, block diagonal with a
        block for each task. A vector is ``[T, P]`` flattened, in the order of ``params``. Lists of
        tensors, which curvlinops takes too, have one for each parameter; of several tasks it is
        one, ``[T, P]``.

    Raises:
        TypeError: no learner with curvature, or tensors that do not fit.
        ValueError: an unknown choice, or shapes that do not fit.
        ImportError: the library is not installed.

    Example:
        >>> import torch
        >>> from scipy.sparse.linalg import eigsh
        >>> from fastmeta import MAML, as_linear_operator
        >>> maml = MAML(torch.nn.Linear(2, 1, bias=False), loss=torch.nn.functional.mse_loss)
        >>> x, y = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.zeros(1, 2, 1)
        >>> hessian = as_linear_operator(maml, torch.zeros(2), (x, y))  # diag(1, 9)
        >>> eigsh(hessian, k=1, return_eigenvectors=False).round(3)
        array([9.], dtype=float32)
    """
    check_choice("curvature", curvature, CURVATURES)
    check_choice("library", library, LIBRARIES)
    if not isinstance(learner, MAML):
        raise TypeError(f"learner: expected a MAML learner, got {type(learner).__name__}")
    layout, examples = learner.layout, examples_of(learner.module, batch)
    tasks = check_examples(layout, examples)
    check_arena("params", layout, params, tasks)
    matrix = _Matrix(learner, layout, params.detach().expand(tasks, -1), batch, curvature)
    return _scipy_operator(matrix) if library == "scipy" else _curvlinops_operator(matrix)


class _Matrix(NamedTuple):
    """The matrix that an operator multiplies with."""

    learner: MAML
    layout: ParameterLayout
    params: Tensor  # [T, P]
    batch: Tree
    curvature: str

    @property
    def size(self) -> int:
        return self.params.numel()

    def times(self, columns: Tensor) -> Tensor:
        """The product with columns ``[T P, K]``."""
        vectors = columns.T.reshape(-1, *self.params.shape)
        product = self.learner.ggnvp if self.curvature == "ggn" else self.learner.hvp
        with torch.no_grad():
            return product(self.params, self.batch, vectors).flatten(1).T


def _scipy_operator(matrix: _Matrix) -> Any:
    linalg = require("scipy.sparse.linalg", "a linear operator of SciPy", "scipy")

    def times(columns: Any) -> Any:
        if np.iscomplexobj(columns):
            return times(columns.real) + 1j * times(columns.imag)
        tensor = torch.as_tensor(np.ascontiguousarray(columns)).to(matrix.params)
        product = matrix.times(tensor.reshape(matrix.size, -1))
        return product.cpu().numpy().reshape(columns.shape)

    dtype = torch.empty(0, dtype=matrix.params.dtype).numpy().dtype
    return linalg.LinearOperator(
        (matrix.size, matrix.size),
        matvec=times,
        rmatvec=times,
        matmat=times,
        rmatmat=times,
        dtype=dtype,
    )


def _curvlinops_operator(matrix: _Matrix) -> Any:
    module = require(
        "curvlinops._torch_base", "a linear operator of curvlinops", "curvlinops-for-pytorch"
    )
    params, one_task = matrix.params, len(matrix.params) == 1
    shapes = list(matrix.layout.shapes) if one_task else [params.shape]

    class Operator(module.PyTorchLinearOperator):  # type: ignore[name-defined,misc]
        SELF_ADJOINT = True
        device, dtype = params.device, params.dtype

        def _matmat(self, blocks: list[Tensor]) -> list[Tensor]:
            columns = torch.cat([block.flatten(0, -2) for block in blocks])
            pieces = matrix.times(columns).split([shape.numel() for shape in shapes])
            return [piece.reshape(*shape, -1) for piece, shape in zip(pieces, shapes, strict=True)]

    return Operator(shapes, shapes)
