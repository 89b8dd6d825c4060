"""The types that engines share: batches, options, the meta-gradient, and the contract itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from fastmeta.core.checks import check_choice, check_integer
from fastmeta.core.derivatives import MODES
from fastmeta.core.trees import (
    Structure,
    Tree,
    first_tensor,
    is_container,
    map_tensors,
    named_tensors,
    split,
)
from fastmeta.rules.base import Rule
from fastmeta.rules.sgd import PLAIN

Loss = Callable[[Any, Any], Tensor]  # of outputs and targets, which may be trees

NORM_STATISTICS = ("batch", "running")
MEMORY = ("auto", "recompute", "keep", "segments")


class Examples(NamedTuple):
    """Inputs and targets of T tasks, in one role: support, query or neither.

    Attributes:
        x: ``[T, B, ...]``, or a tree of such tensors: the module's arguments.
        y: ``[T, B, ...]``; int64 labels or floating-point targets; or a tree of them. An example
            whose class label is -1 is absent: the loss is what it is without it, and so are batch
            norms.
        role: ``"support"``, ``"query"`` or empty. It is part of the tensors' names in errors and
            gradients.
        weight: ``[T, B]``: a task's loss is the sum of its examples' losses times these. An example
            of weight 0 is absent: batch norms leave it out of their statistics. None: the loss
            takes the examples together.
    """

    x: Tree
    y: Tree
    role: str = "support"
    weight: Tensor | None = None

    @property
    def tasks(self) -> int:
        """T."""
        return len(first_tensor(self.x))

    @property
    def size(self) -> int:
        """B, by the first tensor of x."""
        shape = first_tensor(self.x).shape
        return shape[1] if len(shape) > 1 else 1

    def trees(self) -> list[str]:
        """The names of x and y, if they are containers of tensors."""
        pairs = ((self.x_name, self.x), (self.y_name, self.y))
        return [name for name, tree in pairs if is_container(tree)]

    @property
    def form(self) -> ExamplesForm:
        """The examples without their tensors."""
        x, y = split(self.x)[1], split(self.y)[1]
        return ExamplesForm(self.role, x, y, self.weight is not None)

    @property
    def x_name(self) -> str:
        return f"{self.role}_x" if self.role else "x"

    @property
    def y_name(self) -> str:
        return f"{self.role}_y" if self.role else "y"

    @property
    def weight_name(self) -> str:
        return f"{self.role}_weight" if self.role else "weight"

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, those that there are."""
        named = {**named_tensors(self.x_name, self.x), **named_tensors(self.y_name, self.y)}
        return named if self.weight is None else {**named, self.weight_name: self.weight}

    def replaced(self, named: Mapping[str, Tensor]) -> Examples:
        """The examples with the tensors that have a name in ``named`` replaced."""
        return self.form.of({**self.named(), **named}) if named else self

    def map(self, fn: Callable[[Tensor], Tensor]) -> Examples:
        """The examples with ``fn`` of each tensor."""
        weight = None if self.weight is None else fn(self.weight)
        return Examples(map_tensors(fn, self.x), map_tensors(fn, self.y), self.role, weight)

    def of_tasks(self, tasks: slice) -> Examples:
        """The examples of some of the tasks."""
        return self.map(lambda tensor: tensor[tasks])


class ExamplesForm(NamedTuple):
    """Examples without their tensors."""

    role: str
    x: Structure
    y: Structure
    weighted: bool

    def of(self, named: Mapping[str, Tensor]) -> Examples:
        """The examples whose tensors have these names, as ``Examples.named`` gives them."""
        x, y, weight = (f"{self.role}_{part}" if self.role else part for part in _PARTS)
        return Examples(
            self.x.of(named[f"{x}{path}"] for path in self.x.paths),
            self.y.of(named[f"{y}{path}"] for path in self.y.paths),
            self.role,
            named[weight] if self.weighted else None,
        )


_PARTS = "x", "y", "weight"


class TaskBatch(NamedTuple):
    """A batch of T tasks: a support set to adapt to, a query set to score.

    Attributes:
        support_x: ``[T, S, ...]``, or a tree, see ``Examples``.
        support_y: ``[T, S, ...]``; int64 labels or floating-point targets; or a tree.
        query_x, query_y: the same with Q examples.
        support_weight, query_weight: ``[T, S]`` and ``[T, Q]``, see ``Examples``; or None.
    """

    support_x: Tree
    support_y: Tree
    query_x: Tree
    query_y: Tree
    support_weight: Tensor | None = None
    query_weight: Tensor | None = None

    @property
    def support(self) -> Examples:
        return Examples(self.support_x, self.support_y, "support", self.support_weight)

    @property
    def query(self) -> Examples:
        return Examples(self.query_x, self.query_y, "query", self.query_weight)

    @property
    def data(self) -> tuple[Tree, Tree, Tree, Tree]:
        """The inputs and targets."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    def of_tasks(self, tasks: slice) -> TaskBatch:
        """The batch of some of the tasks."""
        return TaskBatch(*(map_tensors(lambda tensor: tensor[tasks], entry) for entry in self))

    def detached(self) -> TaskBatch:
        """The batch, detached."""
        return TaskBatch(*(map_tensors(Tensor.detach, entry) for entry in self))


class MetaGradient(NamedTuple):
    """A meta-loss and its gradient, without a graph.

    Attributes:
        loss: scalar.
        outputs: outputs on the queries after the last step ``[T, Q, N]``, or a tree of tensors.
        grads: gradient to the module's adapted parameters ``[P]``, in the order of
            ``ParameterLayout``.
        lr_grad: gradient to a learned ``lr``, in its shape; otherwise None.
        rule_grads: gradients to the rule's learned hyperparameters, by name.
        outer_grads: gradients to the outer tensors that require one, in the order of
            ``InnerLoopOptions.outer``; empty if a task program ran, which reads none of them.
        shared_grads: gradients to the parameters that are trainable and not adapted, by name.
        start_grads: gradient to a ``start`` that was given, in its shape; ``grads`` is then zero.
    """

    loss: Tensor
    outputs: Tree
    grads: Tensor
    lr_grad: Tensor | None
    rule_grads: dict[str, Tensor]
    outer_grads: tuple[Tensor, ...] = ()
    shared_grads: Mapping[str, Tensor] = MappingProxyType({})
    start_grads: Tensor | None = None

    def assign_to(self, learner: Any) -> None:
        """Set ``.grad`` of the learner's parameters for its optimizer, replacing earlier ones.

        The adapted parameters keep theirs if the loop had a ``start``: it does not read them.
        """
        # Not through ParameterLayout: its checks take as long as the gradient of a small network.
        parameters = [p for p in learner.module.parameters() if p.requires_grad]
        if self.shared_grads:
            shared = {learner.module.get_parameter(n): g for n, g in self.shared_grads.items()}
            for parameter, grad in shared.items():
                parameter.grad = grad
            parameters = [p for p in parameters if p not in shared]
        size = sum(p.numel() for p in parameters)
        if self.grads.shape != (size,):
            raise ValueError(f"grads: expected shape [{size}], got {list(self.grads.shape)}")
        if self.start_grads is None:
            grads = _unflatten_dense_tensors(self.grads, parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad  # a view: all gradients share one buffer [P]
        if self.lr_grad is not None:
            cast("Tensor", learner.lr).grad = self.lr_grad
        for name, grad in self.rule_grads.items():
            cast("nn.Module", learner.rule).get_parameter(name).grad = grad
        if self.outer_grads:
            outer = [tensor for tensor in learner.outer_tensors if tensor.requires_grad]
            for tensor, grad in zip(outer, self.outer_grads, strict=True):
                if tensor.is_leaf:
                    tensor.grad = grad
                else:
                    tensor.backward(grad)


@dataclass(frozen=True)
class InnerLoopOptions:
    """Options of an inner loop, the same for both engines.

    Args:
        steps: K, inner gradient steps; 0 adapts nothing.
        first_order: leave the Hessian out (FOMAML): ``v_k = v_{k+1}``. No graph of the inner
            gradients is built and no Hessian-vector product taken. Step sizes still get
            ``-g_k v_{k+1}``; the support gets no gradient.
        hvp_mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``, as in ``fastmeta.hvp``.
        task_chunk: tasks that run together; None: all of them. Memory grows with it. Results do
            not depend on it beyond rounding, except for random numbers, as in dropout. 1 runs
            each task by itself, without vmap, for modules that vmap cannot take. ``"auto"``: as
            many as their activations suggest, in the functional engine; all of them in a program.
        norm_statistics: what batch and instance norms with running statistics normalise by.
            ``"batch"``: always the batch. ``"running"``: in ``eval()`` the running statistics,
            as in any module. Running statistics are never updated.
        memory: ``"keep"`` the activations of all steps for the adjoint, ``"recompute"`` them step
            by step, or ``"auto"``. A task program then keeps them if they take at most twice the
            memory of the K parameter vectors, or at most 512 MiB for the tasks computed at a time.
            The functional engine keeps them for as many steps as ``core.memory.memory_limit``
            allows; it recomputes them for ``adapt``, and if ``hvp_mode`` is not ``"reverse"``.
            ``"segments"`` recomputes them, and theta_k too: it keeps every ceil(sqrt(K))-th, see
            ``engines.segments``. A task program then takes its steps between compiled calls.
        rule: the inner update rule, see ``fastmeta.rules``; None: plain descent.
        outer: tensors that the module or the loss reads by itself and that get a gradient, such as
            the parameters of a learned loss. All tasks share them.
        inner_loss: the loss of the inner loop; None: the engine's own, which the queries take.
        adapt: names of the parameters that the inner loop adapts; None: all trainable ones. The
            tasks share the others, which get a gradient like outer tensors.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    steps: int = 1
    first_order: bool = False
    hvp_mode: str = "reverse"
    task_chunk: int | str | None = None
    norm_statistics: str = "batch"
    memory: str = "auto"
    rule: Rule | None = None
    outer: tuple[Tensor, ...] = field(default=(), compare=False)
    inner_loss: Loss | None = None
    adapt: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0)
        if self.task_chunk is not None and self.task_chunk != "auto":
            check_integer("task_chunk", cast("int", self.task_chunk), 1)
        if not isinstance(self.first_order, bool):
            raise TypeError(f"first_order: expected a bool, got {self.first_order!r}")
        check_choice("hvp_mode", self.hvp_mode, MODES)
        check_choice("norm_statistics", self.norm_statistics, NORM_STATISTICS)
        check_choice("memory", self.memory, MEMORY)
        if not (self.rule is None or isinstance(self.rule, Rule)):
            raise TypeError(f"rule: expected a fastmeta.rules.Rule, got {type(self.rule).__name__}")
        if not (self.inner_loss is None or callable(self.inner_loss)):
            got = type(self.inner_loss).__name__
            raise TypeError(f"inner_loss: expected a callable or None, got {got}")
        for tensor in self.outer:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"outer: expected tensors, got {type(tensor).__name__}")

    @property
    def inner_rule(self) -> Rule:
        """The rule that takes the inner steps."""
        return PLAIN if self.rule is None else self.rule

    @property
    def is_plain(self) -> bool:
        """Whether the inner steps are plain descent."""
        return self.rule is None or self.rule.is_plain

    @property
    def chunk_size(self) -> int | None:
        """``task_chunk`` as a number; None: all tasks, unless an engine chooses another."""
        return self.task_chunk if isinstance(self.task_chunk, int) else None

    def chunks(self, tasks: int) -> list[slice]:
        """Slices of the tasks that run together."""
        size = self.chunk_size or tasks
        return [slice(start, start + size) for start in range(0, tasks, size)]


@dataclass(frozen=True)
class Minibatches:
    """The batch of B examples that each of K inner steps sees.

    A step takes its batch from the support when it comes to it, so that no more than one batch is
    ever copied. Weights of the support are weights of the batches, ``[T, K, B]``, in both forms.

    Attributes:
        indices: int64, the examples of each step: ``[K, B]`` in every task, or ``[T, K, B]``. None:
            the support holds the batches, ``[T, K, B, ...]``.
    """

    indices: Tensor | None = None

    @property
    def leading(self) -> int:
        """Leading dimensions of the support's tensors that no single example has."""
        return 3 if self.indices is None else 2

    def at(self, k: int, support: Examples) -> Examples:
        """The examples that step k sees, ``[T, B, ...]``."""
        x, y, role, weight = support
        weight = None if weight is None else weight[:, k]

        def taken(tensor: Tensor) -> Tensor:
            return self._taken(k, tensor)

        return Examples(map_tensors(taken, x), map_tensors(taken, y), role, weight)

    def add(self, k: int, name: str, grad: Tensor, total: Tensor) -> None:
        """Add the gradient of step k's batch to the gradient of the support's tensor of a name.

        ``total`` is contiguous. An example that the step saw twice gets both of its gradients.
        """
        if self.indices is None or name == "support_weight":
            total[:, k] += grad
        elif self.indices.ndim == 2:
            total.index_add_(1, self.indices[k], grad)
        else:
            tasks, examples, *rest = total.shape
            first = examples * torch.arange(tasks, device=total.device).unsqueeze(1)
            rows = (first + self.indices[:, k]).flatten()
            # Views, which raise instead of copying: what is added must reach the total.
            total.view(-1, *rest).index_add_(0, rows, grad.flatten(0, 1))

    def of_weights(self, weight: Tensor) -> Tensor:
        """Weights of the examples of the support as weights of the batches ``[T, K, B]``."""
        if self.indices is None:
            return weight
        if self.indices.ndim == 2:
            return weight[:, self.indices]
        tasks = torch.arange(len(weight), device=weight.device).view(-1, 1, 1)
        return weight[tasks, self.indices]

    def of_tasks(self, tasks: slice) -> Minibatches:
        """The batches of some of the tasks."""
        if self.indices is None or self.indices.ndim == 2:
            return self
        return Minibatches(self.indices[tasks])

    def _taken(self, k: int, tensor: Tensor) -> Tensor:
        if self.indices is None:
            return tensor[:, k]
        if self.indices.ndim == 2:
            return tensor[:, self.indices[k]]
        tasks = torch.arange(len(tensor), device=tensor.device).unsqueeze(1)
        return tensor[tasks, self.indices[:, k]]


class Engine(Protocol):
    """Adaptation, meta-gradient and Hessian-vector product of a module and its loss.

    ``theta`` is ``[P]`` for all tasks, ``[T, P]``, or None for the module's own parameters; ``lr``
    is read by ``StepSizes.of``. Methods raise TypeError and ValueError, naming the argument that
    does not fit.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def options(self) -> InnerLoopOptions: ...

    def with_steps(self, steps: int) -> Engine:
        """The same engine with another number of inner steps."""
        ...

    def parameters(self) -> Tensor:
        """The module's own trainable parameters as an arena ``[P]``, a differentiable copy."""
        ...

    def adapt(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support: Examples,
        batches: Minibatches | None = None,
    ) -> Tensor:
        """The parameters of every task after K steps ``[T, P]``.

        ``batches`` are what each step sees of the support; None: all of it.
        """
        ...

    def meta_loss(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> tuple[Tensor, Tree]:
        """The mean query loss after adaptation, and the outputs on the queries."""
        ...

    def meta_gradient(
        self,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        theta: Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> MetaGradient:
        """The meta-loss with its gradient."""
        ...

    def query_losses(
        self, theta: Tensor, query: Examples, gradient: bool = False
    ) -> tuple[Tensor, Tree, Tensor | None, dict[str, Tensor]]:
        """Each task's query loss at given parameters, the outputs, and the gradient or None.

        Last come the gradients of the summed losses to what the tasks share, by name.
        """
        ...

    def mixed_products(self, theta: Tensor, support: Examples, vector: Tensor) -> dict[str, Tensor]:
        """The gradient of ``<grad L_s(theta), vector>`` to what the tasks share, by name."""
        ...

    def hvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss on the examples, times one vector or many."""
        ...

    def ggnvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Gauss-Newton matrix of each task's loss, times one vector or many."""
        ...

    def outputs(self, theta: Tensor, x: Tree, present: Tensor | None = None) -> Tree:
        """The module's outputs ``[T, B, ...]`` on x with the parameters of adapted tasks.

        Batch norms take their statistics over the examples ``present`` ``[T, B]``; None: all.
        """
        ...

    def explain(self, support: Examples | None = None) -> str:
        """Which engine runs, and how, in a few sentences."""
        ...
