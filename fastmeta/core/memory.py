"""Memory that fastmeta keeps between calls."""

from __future__ import annotations

from fastmeta.core import cuda_graphs
from fastmeta.core.backend import _C


def release_memory() -> int:
    """Give back the memory that fastmeta keeps for its next calls; they take it again.

    On the CPU, each thread that has run a kernel keeps its largest workspace, up to the MiB that
    the environment variable ``FASTMETA_WORKSPACE_MB`` allows (1024 unless it is set; 0: none).
    On CUDA, learners keep up to four CUDA graphs each; their memory returns to PyTorch's cache,
    which ``torch.cuda.empty_cache()`` gives back.

    Returns:
        Bytes of host memory given back.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.MAML(fm.models.MLP([1, 40, 1]), loss=torch.nn.functional.mse_loss)
        >>> x = torch.randn(25, 10, 1)
        >>> loss = learner.meta_loss(x, x, x, x)[0]
        >>> fm.release_memory() > 0, fm.release_memory()
        (True, 0)
    """
    cuda_graphs.clear_all()
    return 0 if _C is None else _C.release_workspaces()
