"""The functional engine: the meta-gradient of any module, by autograd and vmap over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastmeta.core.checks import refuse_inference_mode
from fastmeta.core.inner_step import inner_step
from fastmeta.core.memory import kept_pages
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import Tree, concatenated, map_tensors
from fastmeta.engines import adjoint
from fastmeta.engines.autograd import entry_point
from fastmeta.engines.base import (
    Examples,
    InnerLoopOptions,
    Loss,
    MetaGradient,
    Minibatches,
    TaskBatch,
)
from fastmeta.engines.checks import check_arena, check_examples, check_vector
from fastmeta.engines.explain import describe_functional
from fastmeta.engines.functional.curvature import TaskLosses
from fastmeta.engines.functional.footprint import last_choice, with_sizes
from fastmeta.engines.functional.label_checks import with_checked_labels
from fastmeta.engines.functional.passes import ModulePasses
from fastmeta.engines.functional.task_module import TaskModule
from fastmeta.engines.functional.vmap_errors import (
    Result,
    memory_errors,
    vmapped_if_possible,
    why_not_vmapped,
)
from fastmeta.engines.minibatches import seen_first


@dataclass(frozen=True)
class FunctionalEngine:
    """Adaptation, meta-gradient and Hessian-vector product of any module.

    Args:
        module: any module; its trainable parameters are adapted, or those that ``options.adapt``
            names. Its inputs and outputs are tensors, or trees of them.
        loss: ``loss(outputs, targets)`` of one task -> scalar, the mean over the task's examples.
        options: options of the inner loop.

    Raises:
        TypeError: ``module`` is no ``nn.Module``, or ``loss`` is not callable.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1)
        >>> engine = FunctionalEngine(net, torch.nn.functional.mse_loss, InnerLoopOptions(steps=2))
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> loss, outputs = engine.meta_loss(None, 0.1, TaskBatch(x, y, x, y))
        >>> loss.backward()
        >>> outputs.shape, net.weight.grad.shape
        (torch.Size([4, 10, 1]), torch.Size([1, 1]))
    """

    module: nn.Module
    loss: Loss
    options: InnerLoopOptions = field(default_factory=InnerLoopOptions)

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(self.module).__name__}")
        if not callable(self.loss):
            raise TypeError(f"loss: expected a callable, got {type(self.loss).__name__}")

    def with_steps(self, steps: int) -> FunctionalEngine:
        """The same engine with another number of inner steps."""
        return replace(self, options=replace(self.options, steps=steps))

    @property
    def layout(self) -> ParameterLayout:
        """The layout of the adapted parameters in an arena."""
        return ParameterLayout.of(self.module, self.options.adapt)

    @entry_point
    def parameters(self) -> Tensor:
        """The module's own adapted parameters as an arena ``[P]``, a differentiable copy."""
        return self.layout.flatten(dict(self.module.named_parameters()))

    @entry_point
    def adapt(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support: Examples,
        batches: Minibatches | None = None,
    ) -> Tensor:
        """The parameters of every task after K steps.

        Args:
            theta: starting parameters, ``[P]`` for all tasks or ``[T, P]``; None for the module's
                own.
            lr: a number or a tensor, as for ``StepSizes.of``; three dimensions are one matrix a
                step.
            support: examples ``[T, S, ...]``.
            batches: the examples that each step sees; None: all of them at every step.

        Returns:
            ``[T, P]``, differentiable once in theta, lr and floating-point support.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
            RuntimeError: inference mode, which has no gradients; or a second derivative.
        """
        theta = self.parameters() if theta is None else theta

        def run(engine: FunctionalEngine) -> Tensor:
            passes, options = engine._prepared(theta, support=support, batches=batches)
            return adjoint.adapt(passes, options, theta, lr, support, batches)

        return self._vmapped_if_possible(run)

    @entry_point
    def meta_loss(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> tuple[Tensor, Tree]:
        """The mean over tasks of the query loss after adaptation, or after each of its steps.

        Args:
            theta, lr: as for ``adapt``.
            batch: the tasks.
            step_weights: w_1 .. w_K of the query losses after each step, ``sum_k w_k L_q(theta_k)``
                (MAML++: Antoniou 2019). A step of weight 0 takes no query pass, except for the
                outputs of the last. None: only the last step's loss.
            batches: as for ``adapt``.

        Returns:
            loss (scalar), differentiable once in theta, lr, floating-point data, and what all
            tasks share; and the detached outputs on the queries at theta_K ``[T, Q, ...]``.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``; weights that are not K finite
                numbers.
        """
        theta = self.parameters() if theta is None else theta

        def run(engine: FunctionalEngine) -> tuple[Tensor, Tree]:
            passes, options = engine._prepared(theta, batch.support, batch.query, batches)
            return adjoint.meta_loss(passes, options, theta, lr, batch, step_weights, batches)

        return self._vmapped_if_possible(run)

    @entry_point
    def meta_gradient(
        self,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        theta: Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> MetaGradient:
        """The meta-loss with its gradient; arguments are as for ``meta_loss``.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``meta_loss``.
        """
        return adjoint.meta_gradient(self, theta, lr, batch, step_weights, batches)

    @entry_point
    def query_losses(
        self, theta: Tensor, query: Examples, gradient: bool = False
    ) -> tuple[Tensor, Tree, Tensor | None, dict[str, Tensor]]:
        """Each task's query loss at given parameters, for example after K steps.

        Args:
            theta: ``[P]`` for all tasks or ``[T, P]``.
            query: examples ``[T, Q, ...]``.
            gradient: whether to compute the gradient.

        Returns:
            losses ``[T]``, outputs ``[T, Q, ...]``, the gradient of each task's loss to its
            parameters ``[T, P]``, or None; and the gradient of the summed losses to each tensor
            that the tasks share and that requires one, by the names of ``Passes.outer``. All are
            without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``.
        """

        def run(
            engine: FunctionalEngine,
        ) -> tuple[Tensor, Tree, Tensor | None, dict[str, Tensor]]:
            passes, options = engine._prepared(theta, query=query)
            return adjoint.query_losses(passes, options, theta, query, gradient)

        return self._vmapped_if_possible(run)

    @entry_point
    def mixed_products(self, theta: Tensor, support: Examples, vector: Tensor) -> dict[str, Tensor]:
        """The mixed derivative of the support loss times a vector, summed over the tasks.

        It is the gradient of ``sum_t <grad L_s(theta_t), vector_t>`` to what the tasks share.

        Args:
            theta: ``[P]`` for all tasks or ``[T, P]``.
            support: examples ``[T, S, ...]``.
            vector: ``[P]`` for all tasks or ``[T, P]``.

        Returns:
            The gradient to each tensor that the tasks share and that requires one, in its shape, by
            the names of ``Passes.outer``; without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``.
        """

        def run(engine: FunctionalEngine) -> dict[str, Tensor]:
            passes, options = engine._prepared(theta, support=support)
            return adjoint.mixed_products(passes, options, theta, support, vector)

        return self._vmapped_if_possible(run)

    @entry_point
    def hvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss on the examples times vectors (Pearlmutter 1994).

        Args:
            theta: parameters at which the Hessian is taken, ``[P]`` for all tasks or ``[T, P]``.
            examples: ``[T, B, ...]``.
            vector: ``[P]`` for all tasks or ``[T, P]``; or many vectors ``[K, T, P]``.

        Returns:
            ``[T, P]`` or ``[K, T, P]``, differentiable like the result of ``fastmeta.hvp``.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``.
        """
        return self._products(theta, examples, vector, gauss_newton=False)

    @entry_point
    def ggnvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Gauss-Newton matrix of each task's loss times vectors, see ``fastmeta.ggnvp``.

        Arguments, result and errors are as for ``hvp``.
        """
        return self._products(theta, examples, vector, gauss_newton=True)

    def _products(
        self, theta: Tensor, examples: Examples, vector: Tensor, gauss_newton: bool
    ) -> Tensor:
        layout = self.layout
        tasks = check_examples(layout, examples)
        check_arena("params", layout, theta, tasks)  # the name that MAML.hvp has for it
        check_vector("vector", layout, vector, tasks)
        refuse_inference_mode("the product needs the gradient of the loss")
        theta = theta.expand(tasks, layout.numel)
        vector = vector.expand(*vector.shape[:-2], *theta.shape)

        def run(engine: FunctionalEngine) -> Tensor:
            loss = engine.loss
            if examples.role == "support" and engine.options.inner_loss is not None:
                loss = engine.options.inner_loss
            loss = with_checked_labels(loss, examples.y, examples.y_name)
            task_losses = TaskLosses(layout, engine._task_module(), loss)
            return task_losses.products(engine.options, theta, examples, vector, gauss_newton)

        return self._vmapped_if_possible(run)

    @entry_point
    def task_gradients(self, theta: Tensor, examples: Examples) -> tuple[Tensor, Tensor, Tree]:
        """The gradient of each task's loss, the losses, and the detached outputs.

        Args:
            theta: ``[P]`` for all tasks or ``[T, P]``.
            examples: ``[T, B, ...]``.

        Returns:
            ``[T, P]`` and ``[T]``, which have a graph if gradients are enabled, and
            ``[T, B, ...]``.
        """

        def run(engine: FunctionalEngine) -> tuple[Tensor, Tensor, Tree]:
            loss = with_checked_labels(engine.loss, examples.y, examples.y_name)
            task_losses = TaskLosses(engine.layout, engine._task_module(), loss)
            return task_losses.gradients(engine.options, theta, examples)

        return self._vmapped_if_possible(run)

    @entry_point
    def outputs(self, theta: Tensor, x: Tree, present: Tensor | None = None) -> Tree:
        """The module's outputs ``[T, B, ...]`` on x ``[T, B, ...]``, with parameters ``[T, P]``.

        ``present`` ``[T, B]`` are the examples of which batch norms take statistics; None: all.
        """
        return self._vmapped_if_possible(lambda engine: engine._outputs(theta, x, present))

    def _outputs(self, theta: Tensor, x: Tree, present: Tensor | None) -> Tree:
        layout, task_module = self.layout, self._task_module()

        def of_tasks(chunk: slice) -> Tree:
            part = map_tensors(lambda tensor: tensor[chunk], x)
            seen = None if present is None else present[chunk]
            return task_module.outputs(layout.views(theta[chunk]), part, "query_x", seen)

        with task_module.conditions(), inner_step(self.options.steps):
            return concatenated([of_tasks(c) for c in self.options.chunks(len(theta))])

    def explain(self, support: Examples | None = None) -> str:
        """Describe how this engine runs, in a few sentences."""
        return f"{self.describe()} engine='functional' asks for it."

    def describe(self) -> str:
        """Describe how this engine runs, but not why."""
        chosen = last_choice(self.module)
        return describe_functional(self.module, self.options, why_not_vmapped(self.module), chosen)

    def _vmapped_if_possible(self, run: Callable[[FunctionalEngine], Result]) -> Result:
        """The result of ``run`` with the tasks vmapped, or one at a time if that is impossible."""

        def with_chunk(chunk: int | str | None) -> Result:
            return run(replace(self, options=replace(self.options, task_chunk=chunk)))

        with memory_errors(self.options), kept_pages():
            return vmapped_if_possible(self.module, self.options.task_chunk, with_chunk)

    def _task_module(self) -> TaskModule:
        return TaskModule(self.module, self.options.norm_statistics)

    def _prepared(
        self,
        theta: Tensor,
        support: Examples | None = None,
        query: Examples | None = None,
        batches: Minibatches | None = None,
    ) -> tuple[ModulePasses, InnerLoopOptions]:
        """The passes for checked inputs, and the options with the size of chunks."""
        layout, labels = self.layout, None if support is None else support.y
        support = None if support is None else seen_first(support, batches)
        sets = [examples for examples in (support, query) if examples is not None]
        # The checks come before the labels are read, which may wait for the device.
        adjoint.check_loop(layout, self.options, theta, *sets)
        task_module = self._task_module()
        if support is not None and labels is not None:
            # Of all steps: they are checked once.
            per_step = batches is not None and batches.leading == 3
            labels = map_tensors(lambda y: y.flatten(1, 2), labels) if per_step else labels
            support = support._replace(y=labels)
        passes = ModulePasses.of(layout, task_module, self.loss, self.options, support, query)
        # With queries the adjoint follows in the same call.
        keeps = len(sets) > 1 and self.options.steps > 0 and not self.options.first_order
        keeps = keeps and torch.is_grad_enabled()
        return with_sizes(passes, self.options, theta, sets[0], keeps)
