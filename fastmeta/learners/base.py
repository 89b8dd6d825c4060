"""Modules adapted to tasks, as learners return them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import Engine


@dataclass(frozen=True)
class AdaptedTasks:
    """A module adapted to T tasks.

    Attributes:
        params: the parameters of every task ``[T, P]``, in the order of ``layout``. If the
            adaptation ran with gradients enabled they are differentiable, and a loss on
            ``adapted(query_x)`` gives the exact meta-gradient.
        layout: names and shapes of the parameters.
        module: the module that was adapted; its own parameters are unchanged.
        engine: the engine that adapted the module and computes the outputs.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), steps=1)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> adapted = maml.adapt_tasks(x, y)
        >>> adapted(torch.randn(4, 7, 3)).shape, adapted.params.shape, len(adapted)
        (torch.Size([4, 7, 2]), torch.Size([4, 8]), 4)
        >>> adapted.task(0)["bias"].shape
        torch.Size([2])
    """

    params: Tensor
    layout: ParameterLayout
    module: nn.Module
    engine: Engine = field(repr=False, compare=False)

    def __call__(self, query_x: Tensor) -> Tensor:
        """Outputs of each task's module on its queries, ``[T, Q, ...]`` -> ``[T, Q, N]``.

        Raises:
            TypeError: ``query_x`` is not a tensor.
            ValueError: ``query_x`` has another number of tasks.
        """
        check_queries(query_x, len(self))
        return self.engine.outputs(self.params, query_x)

    def __len__(self) -> int:
        return len(self.params)

    def task(self, index: int) -> dict[str, Tensor]:
        """The parameters of one task by name, in the module's shapes, for ``functional_call``.

        Modules with parameters for each inner step also need ``fastmeta.models.inner_step``.
        """
        return self.layout.views(self.params[index])


def check_queries(query_x: Tensor, tasks: int) -> None:
    """Raise unless ``query_x`` is a tensor ``[T, Q, ...]`` of the adapted tasks."""
    if not isinstance(query_x, Tensor):
        raise TypeError(f"query_x: expected a tensor, got {type(query_x).__name__}")
    if query_x.ndim < 2 or len(query_x) != tasks:
        raise ValueError(f"query_x: expected shape [{tasks}, Q, ...], got {list(query_x.shape)}")
