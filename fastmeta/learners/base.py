"""The contract of learners, and the modules adapted to tasks that they hand out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmeta.core.module_inputs import check_inputs, inputs_of
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import Tree, first_tensor
from fastmeta.engines.base import Engine
from fastmeta.ops._checks import check_mask


class Learner(Protocol):
    """The calls that every learner has: a meta-loss, adaptation to tasks, an explanation.

    Learners add options of their own; code that takes any learner relies on these three.
    """

    def meta_loss(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean query loss over tasks, to call ``backward()`` on, and the query outputs."""
        ...

    def adapt_tasks(self, support_x: Tensor, support_y: Tensor) -> Callable[[Tensor], Tensor]:
        """The learner adapted to every task: queries ``[T, Q, ...]`` -> outputs ``[T, Q, N]``."""
        ...

    def explain(self) -> str:
        """How it computes, in a few sentences."""
        ...


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

    def __call__(self, query_x: Tree, present: Tensor | None = None) -> Tree:
        """Outputs of each task's module on its queries, ``[T, Q, ...]`` -> ``[T, Q, N]``.

        Args:
            query_x: ``[T, Q, ...]``, or a tree as for ``MAML.meta_loss``; of a dict or a dataclass
                the module gets the entries that its forward has parameters for.
            present: bool ``[T, Q]``, the queries of which batch norms take statistics; None: all.

        Raises:
            TypeError: ``query_x`` is neither a tensor nor a tree of tensors, or ``present`` is not
                bool.
            ValueError: ``query_x`` has another number of tasks, or ``present`` another shape.
        """
        inputs = inputs_of(self.module, "query_x", query_x)
        check_inputs("query_x", inputs, len(self))
        if present is not None:
            first = first_tensor(inputs)
            check_mask("present", present, first.shape[:2], first.device)
        return self.engine.outputs(self.params, inputs, present)

    def __len__(self) -> int:
        return len(self.params)

    def task(self, index: int) -> dict[str, Tensor]:
        """The parameters of one task by name, in the module's shapes, for ``functional_call``.

        Modules with parameters for each inner step also need ``fastmeta.models.inner_step``.
        """
        return self.layout.views(self.params[index])

    def as_module(self, index: int) -> nn.Module:
        """A copy of the module with the adapted parameters of one task, without their graph.

        It is an ordinary module: in ``train()`` its norms use the statistics of their batch, as
        adapted tasks do, and in ``eval()`` their running statistics.
        """
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            for name, value in self.task(index).items():
                module.get_parameter(name).copy_(value)
        return module
