"""Model-agnostic meta-learning (Finn 2017) and its relatives with learned step sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.checks import check_choice
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import Selector, selected_names
from fastmeta.core.plain_module import plain_module
from fastmeta.core.trees import Tree
from fastmeta.engines.auto import AutoEngine
from fastmeta.engines.base import (
    Engine,
    Examples,
    InnerLoopOptions,
    MetaGradient,
    Minibatches,
    TaskBatch,
)
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.minibatches import read_minibatches
from fastmeta.engines.program.cache import ProgramCache
from fastmeta.engines.program.engine import ProgramEngine, ProgramOptions
from fastmeta.learners._batches import Sets, pair_of
from fastmeta.learners._compile import as_single_op
from fastmeta.learners.base import AdaptedTasks
from fastmeta.learners.gradient._curvature_products import CurvatureProducts
from fastmeta.learners.gradient._engine_options import ENGINE_OPTIONS, ENGINES
from fastmeta.learners.gradient._graph_loss import meta_loss_with_graph
from fastmeta.learners.gradient._outer_tensors import outer_tensors
from fastmeta.learners.gradient._start import Start, read_start
from fastmeta.learners.gradient._step_size import StepSize, read_step_size
from fastmeta.learners.gradient._unrolled_steps import UnrolledSteps
from fastmeta.learners.gradient._weights import batch_of, weighted
from fastmeta.rules import Rule


class MAML(UnrolledSteps, CurvatureProducts):
    """MAML: parameters from which a few gradient steps solve a new task.

    ``meta_loss`` and ``adapt_tasks`` take many tasks at once and never unroll a graph;
    ``clone`` and ``adapt`` are learn2learn's calls, one task at a time.

    Batch norm uses batch statistics, unless ``norm_statistics="running"``, and never updates its
    running statistics. Parameters with ``requires_grad=False`` are neither adapted nor learned.
    Parameters on which the loss does not depend get zero gradients.
    ``fastmeta.models.PerStepBatchNorm2d`` is a norm with a scale and a shift for each inner step
    (MAML++).

    Args:
        model: any module; of ``torch.compile(net)`` it is ``net``.
        lr: inner step size: a number, a tensor, an ``nn.Parameter``, or a dict from the name of
            each trainable parameter to a number. A tensor is ``[]``, one number a parameter ``[L]``
            (in the order of ``named_parameters``), or one an element ``[P]`` (Meta-SGD, Li 2017).
            With one row a step it is ``[K, 1]``, ``[K, L]`` (MAML++, Antoniou 2019) or ``[K, P]``.
        steps: inner gradient steps K; 0 adapts nothing.
        first_order: leave the Hessian out (FOMAML). Step sizes still get a gradient, the support
            inputs none.
        loss: ``loss(outputs, targets)`` of one task -> scalar, the mean over its examples; its
            arguments are what the module gives and what the batch has, tensors or trees.
        inner_loss: the loss of the inner loop, on the support; None: ``loss``, as on the queries.
        adapt: the parameters that the inner loop adapts: names, patterns such as ``"blocks.*"``,
            modules or predicates ``(name, parameter) -> bool``; one of them or a list; None: all
            trainable parameters. The others are learned by the outer loop, with their exact
            gradient, and the tasks share them.
        learn_lr: make ``lr`` a parameter that is learned with the model's parameters.
        rule: the inner update rule, one of ``fastmeta.rules``: momentum, Adam, clipping, learned
            preconditioning, ...; None: plain descent. It is moved to the parameters' device. Its
            learned hyperparameters are parameters of the learner. With a rule the task program
            runs one call a step instead of one call for all steps.
        outer: tensors besides the module's parameters that get a gradient although they reach the
            inner loop by another way: the output of a hypernetwork that the module reads, a tensor
            that the loss reads. Parameters of a loss that is a module are always among them. Any
            other such tensor raises a ValueError.
        normalize_weights: whether weights of examples are divided by their sum in a task; False: by
            the number of examples.
        task_chunk: tasks that run together, None for all; bounds the memory. 1 runs them one by
            one, without vmap, which a module that vmap cannot take does by itself, with a warning.
            ``"auto"``: all of them in a task program; in the functional engine as many as suit
            the size of their activations, which a module's first call of a kind measures on two
            tasks. ``explain()`` says how many.
        hvp_mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``, see ``fastmeta.hvp``.
        engine: ``"program"`` is the compiled task program; it raises a ValueError with the reason
            if the module, the loss, the dtype or the device does not lower to one.
            ``"functional"`` takes any module. ``"auto"`` is the program if the module lowers to
            one, else the functional engine.
        memory: how the backward gets the activations of the K inner steps: ``"keep"`` keeps them,
            ``"recompute"`` computes them again. ``"auto"`` keeps them in a task program if they
            take at most twice the memory of the K parameter vectors, or at most 512 MiB for the
            tasks computed at a time; in the functional engine for as many steps as fit in a
            quarter of the free memory, or in ``FASTMETA_MEMORY_LIMIT`` MiB of the environment.
            ``adapt_tasks`` always recomputes them, and so do other modes than ``"reverse"``.
            ``"segments"`` is for many steps: of K parameter vectors, and states of the rule, about
            2 sqrt(K) are alive at a time; the others are computed again, which takes another
            gradient a step. The program then takes its steps one by one.
        norm_statistics: what batch and instance norms with running statistics normalise by.
            ``"batch"``: the current batch, in training and in evaluation (Finn 2017).
            ``"running"``: as in any module, the current batch in ``train()``, and ``running_mean``
            and ``running_var`` in ``eval()``, which are constants of the gradients. The learner
            never updates running statistics. Calls of the module itself in ``train()`` do, such as
            ``maml.module(x)`` under ``torch.no_grad()``. A ``clone`` is called as any module.
        cuda_graph: whether ``meta_loss`` and ``meta_gradient`` replay the task program's kernels
            from a CUDA graph. ``"auto"``: on a GPU, from the third call in a row that differs from
            the one before in values only, if the program has many launches (images, large layers).
            Calls that cannot be captured are launched, and ``explain()`` gives the reason. True:
            from the first call; raises ValueError or RuntimeError with the reason if that is
            impossible. False: never. The graphs of four kinds of calls are kept.
        allow_unused: ``adapt`` only: skip parameters on which the loss does not depend, instead of
            raising. None: as ``allow_nograd``.
        allow_nograd: ``adapt`` only: skip frozen parameters, instead of raising.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, by name.

    Example:
        >>> import torch
        >>> maml = MAML(torch.nn.Linear(3, 2), lr=0.1, steps=2)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = maml.meta_loss(x, y, x, y)
        >>> loss.backward()
        >>> logits.shape, maml.module.bias.grad.shape
        (torch.Size([4, 5, 2]), torch.Size([2]))
    """

    outer: tuple[Tensor, ...]

    def __init__(
        self,
        model: nn.Module,
        lr: StepSize = 0.4,
        steps: int = 1,
        first_order: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        learn_lr: bool = False,
        inner_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        adapt: Selector | Sequence[Selector] | None = None,
        rule: Rule | None = None,
        outer: Sequence[Tensor] = (),
        normalize_weights: bool = True,
        task_chunk: int | str | None = "auto",
        hvp_mode: str = "reverse",
        engine: str = "auto",
        memory: str = "auto",
        norm_statistics: str = "batch",
        cuda_graph: bool | str = "auto",
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__()
        check_choice("engine", engine, ENGINES)
        if cuda_graph is True and engine == "functional":
            raise ValueError(
                "cuda_graph: expected False or 'auto' with engine='functional', which has no task "
                "program, got True"
            )
        self.module = plain_module("model", model)
        self.steps = steps
        self.first_order = first_order
        self.loss = loss
        self.inner_loss = inner_loss
        self.adapted_names = selected_names(self.module, adapt)
        self.task_chunk = task_chunk
        self.hvp_mode = hvp_mode
        self.engine = engine
        self.memory = memory
        self.norm_statistics = norm_statistics
        self.cuda_graph = cuda_graph
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self.normalize_weights = normalize_weights
        self.rule = rule
        self.outer = tuple(outer)
        self._programs = ProgramCache()
        options = self._build_engine().options  # raises if an option is out of range
        layout = self.layout
        if rule is not None:
            rule.to(layout.device)
        options.inner_rule.check(layout)
        self._set_step_size(read_step_size(lr, layout, steps), learn_lr)

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters that the inner loop adapts, in their order."""
        return ParameterLayout.of(self.module, self.adapted_names)

    @as_single_op
    def meta_loss(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree = None,
        query_y: Tree = None,
        step_weights: Sequence[float] | Tensor | None = None,
        start: Start | None = None,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        *,
        inner_batches: Tensor | str | None = None,
        reduction: str = "mean",
        differentiable_outputs: bool = False,
    ) -> tuple[Tensor, Tree]:
        """The mean over tasks of the query loss after adaptation to the support.

        ``meta_loss(support, query)`` takes both sets as trees, each a dict or a dataclass of
        tensors ``[T, ...]``: the module gets the entries that its forward has parameters for, and
        the loss is ``loss(outputs, batch)``. Or each is a pair of inputs and targets.

        Args:
            support_x: ``[T, S, ...]``; or a tuple, dict or dataclass of tensors ``[T, ...]``, which
                the module gets as its arguments.
            support_y: ``[T, S]`` int64 labels, or floating-point targets ``[T, S, ...]``; or a tree
                of tensors, for a loss that takes one. An example of class label -1 is absent: loss
                and batch norms are as without it.
            query_x, query_y: the same with Q examples.
            step_weights: K numbers w_1 .. w_K: the loss is ``sum_k w_k L_q(theta_k)`` over the
                parameters theta_k after each inner step (the multi-step loss of MAML++, Antoniou
                2019). A step of weight 0 takes no query pass, except for the outputs of the last.
                None: the last step's loss only.
            start: parameters theta_0 to start from: ``[P]`` for all tasks, ``[T, P]``, or a dict
                from names to ``[*shape]`` or ``[T, *shape]``, in the order and shapes of
                ``layout``. They may require a gradient. None, and names that a dict lacks: the
                module's own, which get no gradient where ``start`` replaces them.

            support_weight, query_weight: floating-point ``[T, S]`` and ``[T, Q]``: a task's loss is
                ``sum_b w_b l_b / sum_b w_b``, see ``normalize_weights``, of a loss that is a mean
                over examples. An example of weight 0 is absent, as one of label -1; so is, in a set
                with weights, one whose label is the loss's ``ignore_index``. Weights may require a
                gradient. None: all are 1.
            inner_batches: the batch of the support that each inner step sees; None: all of it.
                Either int64 indices of a task's examples, ``[K, B]`` for all tasks or
                ``[T, K, B]``. Or ``"per_step"``: the support holds the batches, ``support_x`` and
                ``support_y`` ``[T, K, B, ...]``, ``support_weight`` ``[T, K, B]``. Each batch has
                a mean of its own, also with weights. A task program takes the steps one by one.
            reduction: ``"mean"`` over the tasks, or ``"none"`` for the losses ``[T]``.
            differentiable_outputs: whether the outputs have a graph, for a loss of your own on
                them. Such a call, and one without a reduction, keeps the activations of the
                queries for the backward, which goes back through the inner steps.

        Returns:
            ``loss`` and the detached outputs on the queries after the last step ``[T, Q, N]``, in
            the module's own structure, if it is one.
            ``loss.backward()`` fills the ``.grad`` of the module's parameters, of a learned ``lr``,
            of the rule's hyperparameters and of floating-point inputs that require it. The gradient
            is computed during this call, unless gradients are disabled. A second derivative raises
            a RuntimeError.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
        """
        data = support_x, support_y, query_x, query_y
        if reduction != "mean" or differentiable_outputs:
            batch, batches = self._batch(data, support_weight, query_weight, inner_batches)
            return meta_loss_with_graph(
                self._engine,
                self.loss,
                read_start(start, self.layout, self.module),
                self._step_size(self.steps),
                batch,
                step_weights,
                batches,
                reduction,
                differentiable_outputs,
            )
        weighs = support_weight is not None or query_weight is not None
        if step_weights is None and start is None and not weighs and inner_batches is None:
            replayed = self._programs.replay_loss(self, data)
            if replayed is not None:
                return replayed
        batch, batches = self._batch(data, support_weight, query_weight, inner_batches)
        lr, theta = self._step_size(self.steps), read_start(start, self.layout, self.module)
        result = self._engine.meta_loss(theta, lr, batch, step_weights, batches)
        self._programs.prepare(self)
        return result

    def adapt_tasks(
        self,
        support_x: Tree,
        support_y: Tree = None,
        steps: int | None = None,
        start: Start | None = None,
        support_weight: Tensor | None = None,
        *,
        inner_batches: Tensor | str | None = None,
    ) -> AdaptedTasks:
        """The module adapted to every task.

        Args:
            support_x, support_y: as for ``meta_loss``; or a batch of both as the first.
            steps: inner steps; None for the learner's own. If ``lr`` has a row a step, the first
                ``steps`` rows are used, and more steps than rows raise.
            start: parameters to start from, as for ``meta_loss``; with the ``params`` of adapted
                tasks, their adaptation continues.
            support_weight, inner_batches: as for ``meta_loss``; K is ``steps``.

        Returns:
            ``AdaptedTasks``: call it on queries ``[T, Q, ...]``; its ``params`` are ``[T, P]``.

        Raises:
            TypeError, ValueError: as for ``meta_loss``.
        """
        engine = self._engine if steps is None else self._engine.with_steps(steps)
        lr = self._step_size(engine.options.steps)
        theta = read_start(start, self.layout, self.module)
        support = Examples(*pair_of(self.module, "support", support_x, support_y))
        batches = read_minibatches(inner_batches, engine.options.steps, support)
        support = self._weighted(support, support_weight, batches)
        params = engine.adapt(theta, lr, support, batches)
        return AdaptedTasks(params, self.layout, self.module, engine)

    def meta_gradient(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree = None,
        query_y: Tree = None,
        step_weights: Sequence[float] | Tensor | None = None,
        start: Tensor | None = None,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        *,
        inner_batches: Tensor | str | None = None,
    ) -> MetaGradient:
        """The meta-loss and its gradient as values: ``meta_loss`` and ``backward`` in one call.

        This avoids autograd, whose overhead exceeds the arithmetic of a small network. Inputs get
        no gradient.

        Args:
            support_x, support_y, query_x, query_y, step_weights: as for ``meta_loss``.
            start: ``[P]`` or ``[T, P]``, as for ``meta_loss``; its gradient is ``start_grads``.
            support_weight, query_weight: as for ``meta_loss``; they get no gradient.
            inner_batches: as for ``meta_loss``.

        Raises:
            TypeError, ValueError: as for ``meta_loss``.

        Example:
            >>> import torch
            >>> maml = MAML(torch.nn.Linear(3, 2), lr=0.1)
            >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
            >>> result = maml.meta_gradient(x, y, x, y)
            >>> result.grads.shape
            torch.Size([8])
            >>> result.assign_to(maml)  # as loss.backward() does on gradients of None
            >>> maml.module.weight.grad.shape
            torch.Size([2, 3])
        """
        data = support_x, support_y, query_x, query_y
        weighs = support_weight is not None or query_weight is not None
        if step_weights is None and start is None and not weighs and inner_batches is None:
            replayed = self._programs.replay(self, data)
            if replayed is not None:
                return replayed
        engine = self._engine
        batch, batches = self._batch(data, support_weight, query_weight, inner_batches)
        # With gradients enabled: the rows of a learned lr would otherwise lose their graph.
        with torch.enable_grad() if isinstance(self.lr, Tensor) else nullcontext():
            lr = self._step_size(self.steps)
        result = engine.meta_gradient(lr, batch, step_weights, start, batches)
        self._programs.prepare(self)
        if result.lr_grad is None or lr is self.lr:
            return result
        # From the rows that the engine took to the parameter lr, in its shape.
        rows, leaf = cast("tuple[Tensor, Tensor]", (lr, self.lr))
        return result._replace(lr_grad=torch.autograd.grad(rows, leaf, result.lr_grad)[0])

    def task_gradients(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree = None,
        query_y: Tree = None,
        *,
        inner_batches: Tensor | str | None = None,
    ) -> Tensor:
        """Each task's own meta-gradient to the adapted parameters ``[T, P]``.

        Their mean over the tasks is the meta-gradient. Arguments and errors are as for
        ``meta_gradient``.

        Example:
            >>> import torch
            >>> maml = MAML(torch.nn.Linear(3, 2), lr=0.1)
            >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
            >>> grads = maml.task_gradients(x, y, x, y)
            >>> torch.allclose(grads.mean(0), maml.meta_gradient(x, y, x, y).grads, atol=1e-6)
            True
        """
        data = Sets.of(self.module, support_x, support_y, query_x, query_y)
        tasks = TaskBatch(*data).support.tasks
        start = self._engine.parameters().detach().expand(tasks, -1)
        result = self.meta_gradient(*data, start=start, inner_batches=inner_batches)
        return cast("Tensor", result.start_grads) * tasks

    def explain(self, support_x: Tree = None, support_y: Tree = None) -> str:
        """Which engine runs, and how, in a few sentences.

        Args:
            support_x, support_y: as for ``adapt_tasks``; without them, any inputs and targets that
                fit the module and the loss.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if support_x is None:
            return self._engine.explain()
        support = Examples(*pair_of(self.module, "support", support_x, support_y))
        return self._engine.explain(support)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ENGINE_OPTIONS:
            # Through the dict: this method would be called again. The next use builds the engine.
            self.__dict__["_built_engine"] = None

    @property
    def outer_tensors(self) -> tuple[Tensor, ...]:
        """The tensors besides the module's that get a gradient: of the losses, then ``outer``."""
        losses = self.loss, self.inner_loss
        return outer_tensors(losses, self.outer, self.module, self.adapted_names)

    @property
    def _engine(self) -> Engine:
        """The engine for the current options."""
        return self._built_engine or self._build_engine()

    def _build_engine(self) -> Engine:
        options = InnerLoopOptions(
            steps=self.steps,
            first_order=self.first_order,
            hvp_mode=self.hvp_mode,
            task_chunk=self.task_chunk,
            norm_statistics=self.norm_statistics,
            memory=self.memory,
            rule=self.rule,
            outer=self.outer_tensors,
            adapt=self.adapted_names,
            inner_loss=self.inner_loss,
        )
        program_options = ProgramOptions(self.cuda_graph, compiled_only=self.engine == "auto")
        functional = FunctionalEngine(self.module, self.loss, options)
        program = ProgramEngine(self.module, self.loss, options, program_options, self._programs)
        engines: dict[str, Engine] = {
            "auto": AutoEngine(program, functional),
            "program": program,
            "functional": functional,
        }
        self._built_engine = engines[self.engine]
        return self._built_engine

    def _batch(
        self,
        data: tuple[Tree, Tree, Tree, Tree],
        support_weight: Tensor | None,
        query_weight: Tensor | None,
        inner_batches: Tensor | str | None = None,
    ) -> tuple[TaskBatch, Minibatches | None]:
        """The batch with its weights, and the batches of the support that the steps see."""
        batch = TaskBatch(*Sets.of(self.module, *data))
        batches = read_minibatches(inner_batches, self.steps, batch.support)
        if support_weight is None and query_weight is None:
            return batch, batches
        support = self._weighted(batch.support, support_weight, batches)
        return batch_of(support, self._weighted(batch.query, query_weight)), batches

    def _weighted(
        self, examples: Examples, weight: Tensor | None, batches: Minibatches | None = None
    ) -> Examples:
        inner = self.loss if self.inner_loss is None else self.inner_loss
        loss = inner if examples.role == "support" else self.loss
        return weighted(examples, weight, loss, self.layout, self.normalize_weights, batches)
