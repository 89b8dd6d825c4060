"""learn2learn's calls: one task at a time, each step unrolled in autograd's graph."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.vmap import call_twice_differentiable
from fastmeta.engines.base import Engine
from fastmeta.engines.program.cache import ProgramCache
from fastmeta.learners._compile import CompilableLearner
from fastmeta.learners.gradient._adapt_step import descend, task_gradients
from fastmeta.learners.gradient._module_copy import clone_module, shallow_copy
from fastmeta.learners.gradient._step_size import step_size_of_each_parameter
from fastmeta.rules import Rule

Learner = TypeVar("Learner", bound="UnrolledSteps")


class UnrolledSteps(CompilableLearner):
    """Base of learners that can be cloned for a task and adapted to it step by step."""

    module: nn.Module
    lr: float | Tensor
    rule: Rule | None
    first_order: bool
    allow_unused: bool
    allow_nograd: bool
    _programs: ProgramCache
    _built_engine: Engine | None
    _is_clone = False  # a clone's parameters have a graph

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters that the inner loop adapts, in their order."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its current parameters."""
        if self._is_clone and not self.first_order:
            return call_twice_differentiable(self.module, self.module, args, kwargs)
        return self.module(*args, **kwargs)

    def clone(
        self: Learner,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> Learner:
        """A learner for one task, whose parameters autograd connects to this learner's.

        The same call as in learn2learn. Options that are None are this learner's own. Step sizes
        are shared with this learner; buffers are copied. A clone can be cloned again.

        Example:
            >>> import torch
            >>> from fastmeta import MAML
            >>> maml = MAML(torch.nn.Linear(3, 2), lr=0.1)
            >>> x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))
            >>> learner = maml.clone()
            >>> learner.adapt(torch.nn.functional.cross_entropy(learner(x), y))
            >>> torch.nn.functional.cross_entropy(learner(x), y).backward()
            >>> maml.module.weight.grad.shape
            torch.Size([2, 3])
        """
        learner = shallow_copy(self)
        learner._modules["module"] = clone_module(self.module)
        learner._programs = ProgramCache()
        learner._built_engine = None
        learner._is_clone = True
        learner.first_order = _default(first_order, self.first_order)
        learner.allow_unused = _default(allow_unused, self.allow_unused)
        learner.allow_nograd = _default(allow_nograd, self.allow_nograd)
        return learner

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """Take one gradient step of a clone on the loss of its task, ``p <- p - lr * grad``.

        The same call as in learn2learn. In second order the gradient keeps its graph, unrolled. In
        first order it has no graph and the graph of ``loss`` is freed; the new parameters stay
        connected to the original ones through the identity.

        Args:
            loss: scalar, computed with this learner.
            first_order: None for the learner's own.
            allow_unused: skip parameters on which ``loss`` does not depend.
            allow_nograd: skip parameters that do not require gradients.

        Raises:
            ValueError: frozen or unused parameters without the option that allows them; step sizes
                that differ by step; a rule other than plain descent.
        """
        if not (self.rule is None or self.rule.is_plain):
            raise ValueError(
                f"rule: expected plain descent for adapt, got {self.rule.title}; adapt_tasks takes "
                "the rule's steps"
            )
        layout = self.layout
        grads = task_gradients(
            self.module,
            loss,
            first_order=_default(first_order, self.first_order),
            allow_unused=_default(allow_unused, self.allow_unused),
            allow_nograd=_default(allow_nograd, self.allow_nograd),
            names=layout.names,
        )
        step_sizes = step_size_of_each_parameter(self.lr, layout)
        descend(self.module, grads.items(), step_sizes)


def _default(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value
