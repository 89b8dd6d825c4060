"""Model-agnostic meta-learning (Finn 2017) and its relatives with learned step sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.checks import check_choice
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.auto import AutoEngine
from fastmeta.engines.base import Engine, Examples, InnerLoopOptions, MetaGradient, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.cache import ProgramCache
from fastmeta.engines.program.engine import ProgramEngine, ProgramOptions
from fastmeta.learners._compile import CompilableLearner, as_single_op
from fastmeta.learners.base import AdaptedTasks
from fastmeta.learners.gradient._adapt_step import descend, task_gradients
from fastmeta.learners.gradient._module_copy import clone_module, shallow_copy
from fastmeta.learners.gradient._step_size import (
    StepSize,
    is_per_step,
    read_step_size,
    step_size_of_each_parameter,
)
from fastmeta.rules import Rule

Learner = TypeVar("Learner", bound="MAML")

ENGINES = ("auto", "program", "functional")

# Attributes that the engine is built from.
_ENGINE_OPTIONS = frozenset(
    {
        "module",
        "loss",
        "steps",
        "first_order",
        "hvp_mode",
        "task_chunk",
        "norm_statistics",
        "rule",
        "engine",
        "memory",
        "cuda_graph",
    }
)


class MAML(CompilableLearner):
    """MAML: parameters from which a few gradient steps solve a new task.

    ``meta_loss`` and ``adapt_tasks`` take many tasks at once and never unroll a graph;
    ``clone`` and ``adapt`` are learn2learn's calls, one task at a time.

    Batch norm uses batch statistics always, unless ``norm_statistics`` says otherwise, and its
    running statistics are left alone; parameters with ``requires_grad=False`` are not adapted;
    parameters that the loss does not depend on get zero gradients. Norms with a scale and a shift
    for each inner step (MAML++) are ``fastmeta.models.PerStepBatchNorm2d``.

    Args:
        model: any module of one input and one output tensor.
        lr: inner step size: a number, a tensor, an ``nn.Parameter``, or a dict of one number for
            each trainable parameter by name. Tensors: ``[]``, one number a parameter ``[L]`` (in
            the order of ``named_parameters``), or one an element ``[P]`` (Meta-SGD, Li 2017); or
            one such row a step, ``[K, 1]``, ``[K, L]`` (MAML++, Antoniou 2019) or ``[K, P]``.
        steps: inner gradient steps K; 0 adapts nothing.
        first_order: leave the Hessian out (FOMAML). Step sizes still get a gradient, the support
            inputs none.
        loss: ``loss(outputs, targets)`` of one task -> scalar, the mean over its examples.
        learn_lr: make ``lr`` a parameter, to be learned with the model's.
        rule: what an inner step does with the gradient, one of ``fastmeta.rules``: momentum, Adam,
            clipping, learned preconditioning, ...; None: plain descent. It is moved to the
            parameters' device. Its learned hyperparameters are parameters of the learner. The
            task program then runs one call a step instead of one for all.
        task_chunk: tasks that run together, None for all; bounds the memory. 1 runs them one by
            one, without vmap.
        hvp_mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``, see ``fastmeta.hvp``.
        engine: ``"program"``, the compiled task program: a ValueError gives the reason where the
            module, the loss, the dtype or the device cannot be lowered to it; ``"functional"``,
            which takes any module; or ``"auto"``, the program where it can be.
        memory: whether the task program keeps the activations of all K inner steps for the way
            back, ``"keep"``, or makes them again, ``"recompute"``; ``"auto"`` keeps them where they
            take at most twice the room of the K parameter vectors, or those of all tasks that are
            computed at a time 512 MiB. The functional engine always makes them again.
        norm_statistics: what batch and instance norms that track running statistics normalise by.
            ``"batch"``: the batch at hand, in training and evaluation alike (Finn 2017).
            ``"running"``: as in any module, in ``train()`` the batch at hand, in ``eval()`` their
            ``running_mean`` and ``running_var``, which are constants of the gradients. The learner
            never updates those two: calls of the module itself in ``train()`` do, as
            ``maml.module(x)`` under ``torch.no_grad()``. A ``clone`` is called as any module.
        cuda_graph: whether ``meta_loss`` and ``meta_gradient`` replay the task program's kernels as
            a CUDA graph. ``"auto"``: from the third call in a row on that differs from the last in
            values alone, on a GPU, where the program has many launches (images, large layers);
            what cannot be captured is launched, and ``explain()`` says why. True: from the first
            call on; a ValueError or RuntimeError says why not, where it cannot. False: never. The
            graphs of four kinds of calls are kept.
        allow_unused: ``adapt`` only: leave parameters alone that the loss does not depend on, where
            it would otherwise raise. None: as ``allow_nograd``.
        allow_nograd: ``adapt`` only: leave frozen parameters alone, where it would otherwise raise.

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

    lr: float | Tensor
    rule: Rule | None
    _built_engine: Engine | None

    def __init__(
        self,
        model: nn.Module,
        lr: StepSize = 0.4,
        steps: int = 1,
        first_order: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        learn_lr: bool = False,
        rule: Rule | None = None,
        task_chunk: int | None = None,
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
                "cuda_graph: True needs the task program, engine='functional' has none"
            )
        self.module = model
        self.steps = steps
        self.first_order = first_order
        self.loss = loss
        self.task_chunk = task_chunk
        self.hvp_mode = hvp_mode
        self.engine = engine
        self.memory = memory
        self.norm_statistics = norm_statistics
        self.cuda_graph = cuda_graph
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self.rule = rule
        self._programs = ProgramCache()
        options = self._build_engine().options  # checked there
        layout = ParameterLayout.of(model)
        if rule is not None:
            rule.to(layout.device)
        options.inner_rule.check(layout)
        self._set_step_size(read_step_size(lr, layout, steps), learn_lr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its current parameters."""
        return self.module(*args, **kwargs)

    @as_single_op
    def meta_loss(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean over tasks of the query loss after adaptation to the support.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S]`` int64 labels, or floating-point targets ``[T, S, ...]``.
            query_x, query_y: the same with Q examples.
            step_weights: K numbers w_1 .. w_K: the loss is ``sum_k w_k L_q(theta_k)`` over the
                parameters theta_k after each inner step (the multi-step loss of MAML++, Antoniou
                2019). A step of weight 0 takes no query pass, but for the outputs of the last.
                None: the last step's loss alone.

        Returns:
            ``loss``, whose ``backward()`` fills the ``.grad`` of the module's parameters, of a
            learned ``lr``, of the rule's and of floating-point inputs that require it; and the
            detached outputs on the queries after the last step ``[T, Q, N]``. The gradient is taken
            during this call (unless gradients are disabled) and can be taken once: its own
            derivative raises a RuntimeError.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
        """
        batch = TaskBatch(support_x, support_y, query_x, query_y)
        return self._engine.meta_loss(None, self._step_size(self.steps), batch, step_weights)

    def adapt_tasks(
        self, support_x: Tensor, support_y: Tensor, steps: int | None = None
    ) -> AdaptedTasks:
        """The module adapted to every task.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S]`` int64 labels, or floating-point targets ``[T, S, ...]``.
            steps: inner steps; None for the learner's own. Where ``lr`` has a row a step, the first
                ``steps`` of them are used, and there can be no more steps than rows.

        Returns:
            ``AdaptedTasks``: call it on queries ``[T, Q, ...]``; its ``params`` are ``[T, P]``.

        Raises:
            TypeError, ValueError: as for ``meta_loss``.
        """
        engine = self._engine if steps is None else self._engine.with_steps(steps)
        lr = self._step_size(engine.options.steps)
        params = engine.adapt(None, lr, Examples(support_x, support_y))
        return AdaptedTasks(params, ParameterLayout.of(self.module), self.module, engine)

    def meta_gradient(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> MetaGradient:
        """The meta-loss and its gradient as values: ``meta_loss`` and ``backward`` in one call.

        Autograd takes no part, which for a small network takes longer than the arithmetic; the
        gradients of inputs are left out.

        Args:
            support_x, support_y, query_x, query_y, step_weights: as for ``meta_loss``.

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
        batch = TaskBatch(support_x, support_y, query_x, query_y)
        replayed = self._programs.replay(self, batch) if step_weights is None else None
        if replayed is not None:
            loss, outputs, grads = replayed
            return MetaGradient(loss, outputs, grads, None, {})
        engine = self._engine
        # With gradients enabled: else a row a step would no longer require one.
        with torch.enable_grad() if isinstance(self.lr, Tensor) else nullcontext():
            lr = self._step_size(self.steps)
        result = engine.meta_gradient(lr, batch, step_weights)
        self._programs.prepare(self)
        if result.lr_grad is None or lr is self.lr:
            return result
        rows, leaf = cast("tuple[Tensor, Tensor]", (lr, self.lr))
        return result._replace(lr_grad=torch.autograd.grad(rows, leaf, result.lr_grad)[0])

    def hvp(self, params: Tensor, batch: tuple[Tensor, Tensor], vector: Tensor) -> Tensor:
        """The Hessian of each task's loss times a vector (Pearlmutter 1994).

        ``H v = d <grad L(params), v> / d params`` with the learner's loss, and in its ``hvp_mode``;
        the Hessian is never formed.

        Args:
            params: where the Hessian is taken, in the order of the module's trainable parameters:
                ``[P]`` for all tasks, or ``[T, P]`` as in ``AdaptedTasks.params``.
            batch: ``(x, y)`` with x ``[T, B, ...]`` and y ``[T, B]`` int64 labels or floating-point
                targets ``[T, B, ...]``.
            vector: ``[P]`` for all tasks, or ``[T, P]``.

        Returns:
            ``[T, P]``; differentiable as the result of ``fastmeta.hvp`` is.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
            RuntimeError: inference mode, which has no gradients.

        Example:
            >>> import torch
            >>> maml = MAML(torch.nn.Linear(1, 1, bias=False), loss=torch.nn.functional.mse_loss)
            >>> x, y = torch.full((2, 5, 1), 3.0), torch.zeros(2, 5, 1)
            >>> maml.hvp(torch.zeros(1), (x, y), torch.ones(1))  # d^2/dw^2 mean (3 w)^2 = 18
            tensor([[18.],
                    [18.]])
        """
        if not isinstance(batch, (tuple, list)):
            raise TypeError(f"batch: expected a pair (x, y), got {type(batch).__name__}")
        if len(batch) != 2:
            raise ValueError(f"batch: expected a pair (x, y), got {len(batch)} entries")
        x, y = batch
        return self._engine.hvp(params, Examples(x, y, role=""), vector)

    def explain(self, support_x: Tensor | None = None, support_y: Tensor | None = None) -> str:
        """Which engine runs, and how, in a few sentences.

        Args:
            support_x, support_y: a batch as for ``adapt_tasks``; without one the answer is for
                inputs and targets that fit the module and the loss.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if support_x is None:
            return self._engine.explain()
        return self._engine.explain(Examples(support_x, cast("Tensor", support_y)))

    def clone(
        self: Learner,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> Learner:
        """A learner for one task, whose parameters are connected to this one's by autograd.

        Learn2learn's call. Options that are None are this learner's own. Step sizes are shared with
        this learner; buffers are copied. A clone can be cloned again.

        Example:
            >>> import torch
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
        """One gradient step of a clone on the loss of its task, ``p <- p - lr * grad``.

        Learn2learn's call. In second order the gradient keeps its graph, unrolled; in first order
        it has none and the graph of ``loss`` is freed, while the new parameters stay connected to
        the original ones through the identity.

        Args:
            loss: scalar, computed with this learner.
            first_order: None for the learner's own.
            allow_unused: leave parameters alone that ``loss`` does not depend on.
            allow_nograd: leave parameters alone that do not require gradients.

        Raises:
            ValueError: frozen or unused parameters without the option that allows them; step sizes
                that differ by step; a rule other than plain descent.
        """
        if not (self.rule is None or self.rule.is_plain):
            raise ValueError(
                f"rule: adapt takes plain steps, and this learner's rule is {self.rule.title}; "
                "adapt_tasks takes its steps"
            )
        grads = task_gradients(
            self.module,
            loss,
            _default(first_order, self.first_order),
            _default(allow_unused, self.allow_unused),
            _default(allow_nograd, self.allow_nograd),
        )
        step_sizes = step_size_of_each_parameter(self.lr, ParameterLayout.of(self.module))
        descend(self.module, grads.items(), step_sizes)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _ENGINE_OPTIONS:
            self.__dict__["_built_engine"] = None  # built anew at the next use

    @property
    def _engine(self) -> Engine:
        """The engine of the options as they are set now."""
        return self._built_engine or self._build_engine()

    def _build_engine(self) -> Engine:
        options = InnerLoopOptions(
            steps=self.steps,
            first_order=self.first_order,
            hvp_mode=self.hvp_mode,
            task_chunk=self.task_chunk,
            norm_statistics=self.norm_statistics,
            rule=self.rule,
        )
        program_options = ProgramOptions(
            memory=self.memory,
            cuda_graph=self.cuda_graph,
            compiled_only=self.engine == "auto",
        )
        functional = FunctionalEngine(self.module, self.loss, options)
        program = ProgramEngine(self.module, self.loss, options, program_options, self._programs)
        engines: dict[str, Engine] = {
            "auto": AutoEngine(program, functional),
            "program": program,
            "functional": functional,
        }
        self._built_engine = engines[self.engine]
        return self._built_engine

    def _step_size(self, steps: int) -> float | Tensor:
        """``lr`` as the engines take it: one row a step becomes one matrix a step."""
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
        layout = ParameterLayout.of(self.module)
        if learn and not isinstance(lr, nn.Parameter):
            value = torch.as_tensor(lr, dtype=layout.dtype, device=layout.device)
            lr = nn.Parameter(value.detach().clone())
        if isinstance(lr, Tensor) and not isinstance(lr, nn.Parameter):
            self.register_buffer("lr", lr)
        else:
            self.lr = lr


def _default(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value
