"""What learners hand out: modules adapted to tasks, and a meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from fastmeta.core.inner_step import inner_step
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.functional.task_module import TaskModule
from fastmeta.engines.program.engine import ProgramEngine


@dataclass(frozen=True)
class AdaptedTasks:
    """A module adapted to T tasks.

    Attributes:
        params: the parameters of every task ``[T, P]``, in the order of ``layout``; differentiable
            when the adaptation ran with gradients enabled, so that a loss on ``adapted(query_x)``
            gives the full meta-gradient.
        layout: names and shapes of the parameters.
        module: the module that was adapted; it keeps its own parameters.
        engine: what adapted it; a program engine gives the outputs where no graph is asked for.

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
    engine: FunctionalEngine | None = field(default=None, repr=False, compare=False)

    def __call__(self, query_x: Tensor) -> Tensor:
        """Outputs of each task's module on its queries, ``[T, Q, ...]`` -> ``[T, Q, N]``.

        Raises:
            TypeError: ``query_x`` is no tensor.
            ValueError: it has another number of tasks.
        """
        check_queries(query_x, len(self))
        if isinstance(self.engine, ProgramEngine):
            outputs = self.engine.outputs(self.params, query_x)
            if outputs is not None:
                return outputs
        engine = self.engine
        call = TaskModule(self.module) if engine is None else engine.task_module()
        with call.conditions(), inner_step(0 if engine is None else engine.steps):
            return call.outputs(self.layout.views(self.params), query_x)

    def __len__(self) -> int:
        return len(self.params)

    def task(self, index: int) -> dict[str, Tensor]:
        """The parameters of one task by name, in the module's shapes, for ``functional_call``.

        Modules with parameters of each inner step need ``fastmeta.models.inner_step`` there.
        """
        return self.layout.views(self.params[index])


def check_queries(query_x: Tensor, tasks: int) -> None:
    if not isinstance(query_x, Tensor):
        raise TypeError(f"query_x: expected a tensor, got {type(query_x).__name__}")
    if query_x.ndim < 2 or len(query_x) != tasks:
        raise ValueError(f"query_x: expected shape [{tasks}, Q, ...], got {list(query_x.shape)}")


class MetaGradient(NamedTuple):
    """A meta-loss and its gradient, without a graph.

    Attributes:
        loss: scalar.
        outputs: on the queries after the last step ``[T, Q, N]``.
        grads: gradient to the module's trainable parameters ``[P]``, in the
            order of ``ParameterLayout``.
        lr_grad: gradient to a learned ``lr``, in its shape; otherwise None.
        rule_grads: gradients to the rule's learned hyperparameters, by name.
    """

    loss: Tensor
    outputs: Tensor
    grads: Tensor
    lr_grad: Tensor | None
    rule_grads: dict[str, Tensor]

    def assign_to(self, learner: Any) -> None:
        """Set ``.grad`` of the learner's parameters, for its optimizer; what was there goes."""
        named = dict(learner.module.named_parameters())
        for name, grad in ParameterLayout.of(learner.module).views(self.grads).items():
            named[name].grad = grad
        if self.lr_grad is not None:
            cast("Tensor", learner.lr).grad = self.lr_grad
        for name, grad in self.rule_grads.items():
            cast("nn.Module", learner.rule).get_parameter(name).grad = grad
