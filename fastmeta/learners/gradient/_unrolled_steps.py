"""Steps that autograd's graph unrolls: learn2learn's calls for one task, and streams of steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.step_sizes import StepSizes
from fastmeta.core.vmap import call_twice_differentiable
from fastmeta.engines.base import Engine, Loss
from fastmeta.engines.program.cache import ProgramCache
from fastmeta.engines.task_gradient import gradient_at
from fastmeta.learners._compile import CompilableLearner
from fastmeta.learners.gradient._adapt_step import descend, task_gradients
from fastmeta.learners.gradient._module_copy import clone_module, shallow_copy
from fastmeta.learners.gradient._start import Start, read_start
from fastmeta.learners.gradient._step_size import is_per_step, step_size_of_each_parameter
from fastmeta.learners.gradient._stream import (
    Chunks,
    GradientAt,
    Stream,
    check_options,
    of_each_step,
)
from fastmeta.rules import Rule

Learner = TypeVar("Learner", bound="UnrolledSteps")


class UnrolledSteps(CompilableLearner):
    """Base of learners that can be cloned for a task and adapted to it step by step."""

    module: nn.Module
    lr: float | Tensor
    rule: Rule | None
    loss: Loss
    inner_loss: Loss | None
    norm_statistics: str
    first_order: bool
    allow_unused: bool
    allow_nograd: bool
    _programs: ProgramCache
    _built_engine: Engine | None
    _is_clone = False  # a clone's parameters have a graph

    @property
    @abstractmethod
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters that the inner loop adapts, in their order."""

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

    def stream_loss(
        self,
        x: Tensor,
        y: Tensor,
        *,
        weight: Tensor | None = None,
        read_x: Tensor | None = None,
        read_y: Tensor | None = None,
        read: str = "before",
        momentum: float | Tensor = 0.0,
        decay: float | Tensor = 0.0,
        start: Start | None = None,
        memory: str = "keep",
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of the reads along a stream: one step on each of C batches of examples.

        ``m <- beta_c m + g_c``, ``theta <- (1 - a_c) theta - lr_c m``, where g_c is the gradient of
        ``sum_b w_cb l_b`` on batch c; a test-time-training layer, or a neural memory with momentum
        beta and decay a. The learner's ``steps`` and ``task_chunk`` do not count.

        Args:
            x: ``[T, C, B, ...]``.
            y: ``[T, C, B]`` int64 labels, or floating-point targets ``[T, C, B, ...]``.
            weight: ``[T, C, B]``, the rate of each example; None: the mean over them.
            read_x, read_y: ``[T, C, Q, ...]``, the examples of the reads, on which the learner's
                loss is taken; None: x and y.
            read: ``"before"`` the step on the same batch (TTT-E2E), or ``"after"`` it.
            momentum, decay: numbers or tensors ``[]``, ``[C]``, ``[T, C]`` or ``[C, P]``.
            start: parameters to start from, as for ``MAML.meta_loss``.
            memory: ``"keep"`` the parameters before each step for the backward, or ``"segments"``:
                keep every ceil(sqrt(C))-th and take the steps between them again.

        Returns:
            ``loss``, the mean over tasks and reads, differentiable any number of times in whatever
            requires a gradient: the module's parameters, a learned ``lr``, momentum, decay, x, y,
            weight and ``start``; and the detached outputs of the reads ``[T, C, Q, ...]``.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.

        Example:
            >>> import torch
            >>> from fastmeta import MAML
            >>> maml = MAML(torch.nn.Linear(3, 3), lr=0.1, loss=torch.nn.functional.mse_loss)
            >>> tokens = torch.randn(2, 8, 16, 3)  # two sequences of eight chunks of 16 tokens
            >>> loss, outputs = maml.stream_loss(tokens, tokens, momentum=0.9)
            >>> loss.backward()
            >>> outputs.shape
            torch.Size([2, 8, 16, 3])
        """
        if not (self.rule is None or self.rule.is_plain):
            raise ValueError(f"rule: expected plain descent for stream_loss, got {self.rule.title}")
        check_options(read, memory)
        layout, written = self.layout, Chunks(x, y, "", weight)
        tasks, count = x.shape[:2]
        given = read_x is not None or read_y is not None
        reads = Chunks(x if read_x is None else read_x, y if read_y is None else read_y, "read")
        lr = self.lr.unsqueeze(1) if is_per_step(self.lr) else self.lr
        theta = read_start(start, layout, self.module)
        if theta is None:
            theta = layout.flatten(dict(self.module.named_parameters()))

        def gradient_of(loss: Loss) -> GradientAt:
            options = self.norm_statistics, layout
            return lambda theta, examples, of_losses: gradient_at(
                self.module, loss, theta, examples, *options, of_losses
            )

        step = gradient_of(self.loss if self.inner_loss is None else self.inner_loss)
        stream = Stream(
            written=written,
            read=reads if given or weight is not None else written,
            reads_after=read == "after",
            step_sizes=StepSizes.of(lr, layout, tasks, count),
            momentum=of_each_step("momentum", momentum, layout, tasks, count),
            decay=of_each_step("decay", decay, layout, tasks, count),
            step_gradient=step,
            read_losses=step if self.inner_loss is None else gradient_of(self.loss),
            first_order=self.first_order,
        )
        losses, outputs, _ = stream.run(theta.expand(tasks, layout.numel), memory)
        return losses.mean(), outputs

    def _step_size(self, steps: int) -> float | Tensor:
        """``lr`` in the form of the engines: one row a step becomes one matrix a step."""
        lr = self.lr
        if not is_per_step(lr):
            return lr
        if steps > len(lr):
            raise ValueError(
                f"steps: expected at most {len(lr)}, as lr has a row for each of {len(lr)} steps, "
                f"got {steps}"
            )
        return lr[:steps].unsqueeze(1)

    def _set_step_size(self, lr: float | Tensor, learn: bool) -> None:
        layout = self.layout
        if learn and not isinstance(lr, nn.Parameter):
            value = torch.as_tensor(lr, dtype=layout.dtype, device=layout.device)
            lr = nn.Parameter(value.detach().clone())
        # A fixed tensor is a buffer, so that it follows .to() and is part of the state dict.
        if isinstance(lr, Tensor) and not isinstance(lr, nn.Parameter):
            self.register_buffer("lr", lr)
        else:
            self.lr = lr


def _default(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value
