"""The program engine: the meta-gradient of a recognised network as one call into compiled code.

It computes the adjoint recursion of ``fastmeta.engines.adjoint``. The module and the loss must
lower to a task program (``fastmeta.engines.program.lowering``). The passes, products and updates of
all tasks and steps then run inside one op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from fastmeta.core.cuda_graphs import DEVICE_TYPE, check_option
from fastmeta.core.memory import kept_pages
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import shared_parameters
from fastmeta.core.step_sizes import StepSizes
from fastmeta.core.trees import Tree, is_container
from fastmeta.engines import adjoint
from fastmeta.engines.autograd import entry_point, is_learned
from fastmeta.engines.base import (
    Examples,
    InnerLoopOptions,
    Loss,
    MetaGradient,
    Minibatches,
    TaskBatch,
)
from fastmeta.engines.checks import (
    check_arena,
    check_vector,
    read_step_weights,
)
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.minibatches import seen_first
from fastmeta.engines.program.cache import (
    LastCall,
    LoweredSource,
    Plan,
    ProgramCache,
    check_plain,
)
from fastmeta.engines.program.call import Adapt, Call, RequiredGrads
from fastmeta.engines.program.explain import describe_program
from fastmeta.engines.program.lowering import Program
from fastmeta.engines.program.passes import ProgramPasses
from fastmeta.engines.program.presence import (
    check_presence,
    check_support_labels,
    check_weights,
    require_gradients,
)
from fastmeta.engines.program.trace import LoweringError
from fastmeta.engines.segments import SEGMENTS
from fastmeta.ops import task_program

_MOST_KEPT = 512 << 20  # bytes of activations that "auto" keeps
_MOST_SHARED = 227 << 10  # bytes of shared memory that a block may have on sm_90


@dataclass(frozen=True)
class ProgramOptions:
    """Options that only task programs have.

    Args:
        cuda_graph: whether meta-gradients are replayed from CUDA graphs, see ``fastmeta.MAML``.
        compiled_only: raise LoweringError instead of running the program's ops in plain PyTorch.

    Raises:
        ValueError: an option out of range.
    """

    cuda_graph: bool | str = "auto"
    compiled_only: bool = False

    def __post_init__(self) -> None:
        check_option(self.cuda_graph)


@dataclass(frozen=True)
class ProgramEngine:
    """Adaptation, meta-gradient and Hessian-vector product as one compiled call each.

    Methods do what the methods of ``FunctionalEngine`` do, with the same results. They raise
    ``LoweringError``, a ValueError with the reason, if the module, the loss, the batch or the
    backend has no program.

    Args:
        module, loss: as for ``FunctionalEngine``.
        options: options of the inner loop. The program's Hessian-vector products are exact, so
            ``hvp_mode="finite_difference"`` has no program. A rule other than plain descent,
            another batch at each step and ``memory="segments"`` take the steps between compiled
            calls: one gradient a step, and one product a step in the backward.
        program_options: options of the program.
        cache: programs lowered before, shared by the engines of one learner.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1)
        >>> engine = ProgramEngine(net, torch.nn.functional.mse_loss, InnerLoopOptions(steps=2))
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> loss, outputs = engine.meta_loss(None, 0.1, TaskBatch(x, y, x, y))
        >>> loss.backward()
        >>> outputs.shape, net.weight.grad.shape
        (torch.Size([4, 10, 1]), torch.Size([1, 1]))
    """

    module: nn.Module
    loss: Loss
    options: InnerLoopOptions = field(default_factory=InnerLoopOptions)
    program_options: ProgramOptions = field(default_factory=ProgramOptions)
    cache: ProgramCache = field(default_factory=ProgramCache, compare=False, repr=False)

    def with_steps(self, steps: int) -> ProgramEngine:
        """The same engine, and the same cache, with another number of inner steps."""
        return replace(self, options=replace(self.options, steps=steps))

    def parameters(self) -> Tensor:
        """The module's own trainable parameters as an arena ``[P]``, a differentiable copy."""
        return self._functional.parameters()

    def program(self, *sets: Examples) -> Program | str:
        """The program for sets of examples, or the reason why there is none.

        Without examples, the program is for examples that fit the module.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        try:
            if sets:
                return self._call(None, sets).program
            self._check_losses()
            program = self.cache.lowering(self._source).program()
            if isinstance(program, Program):
                self._check_circumstances(program.layout)
                self._implementation(program.layout)
            return program
        except LoweringError as error:
            return error.reason

    @entry_point
    def adapt(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support: Examples,
        batches: Minibatches | None = None,
    ) -> Tensor:
        """The parameters of every task after K steps, see ``FunctionalEngine.adapt``."""
        seen = seen_first(support, batches)
        call = self._call(theta, [seen])
        if self.why_stepwise(batches) or self.options.steps == 0:
            passes, theta = self._passes(call, theta, seen)
            check_support_labels(call, support)
            return adjoint.adapt(passes, self.options, theta, lr, support, batches)
        values = self._step_sizes(call, lr)
        start = call.program.learned if theta is None else (call.with_shared(theta),)
        # An autograd Function costs microseconds, also where nothing is recorded.
        if torch.is_grad_enabled():
            return Adapt.apply(call, values, support.x, support.y, support.weight, *start)
        arena = call.arena(start)
        return call.adapt(arena, call.frozen(arena), values, support)

    @entry_point
    def meta_loss(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> tuple[Tensor, Tree]:
        """The mean query loss after adaptation, see ``FunctionalEngine.meta_loss``.

        Raises:
            ValueError: also if ``cuda_graph=True`` and the program cannot have a CUDA graph.
            RuntimeError: also if ``cuda_graph=True`` and the capture of the graph failed.
        """
        weights = read_step_weights(step_weights, self.options.steps)
        call = self._meta_call(theta, batch, weights, batches)
        if self.why_stepwise(batches):
            seen = seen_first(batch.support, batches)
            passes, theta = self._passes(call, theta, seen, batch.query)
            check_support_labels(call, batch.support)
            return adjoint.meta_loss(passes, self.options, theta, lr, batch, step_weights, batches)
        values = self._step_sizes(call, lr)
        start = call.program.learned if theta is None else (call.with_shared(theta),)
        if torch.is_grad_enabled():
            if theta is None:
                self._remember(call, lr, values, batch, weights)
            return call.meta_loss(start, values, batch)
        arena = call.arena(start)
        loss, outputs, *_ = call.meta_gradient(arena, values, batch, RequiredGrads())
        return loss, call.shaped(outputs)

    @entry_point
    def meta_gradient(
        self,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        theta: Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> MetaGradient:
        """The meta-loss with its gradient, see ``FunctionalEngine.meta_gradient``.

        Raises:
            ValueError, RuntimeError: as for ``meta_loss``.
        """
        weights = read_step_weights(step_weights, self.options.steps)
        call = self._meta_call(theta, batch, weights, batches)
        if self.why_stepwise(batches) or theta is not None:
            return adjoint.meta_gradient(self, theta, lr, batch, step_weights, batches)
        if not is_learned(lr):
            values = self._step_sizes(call, lr)
            loss, outputs, grads, _ = call.loss_and_gradient(values, batch)
            self._remember(call, lr, values, batch, weights)
            return call.as_meta_gradient(loss, outputs, grads)
        # The op gives the gradient to the step sizes in its own shape; autograd brings it to lr's.
        with torch.enable_grad():
            leaf = lr.detach().requires_grad_()
            values = self._step_sizes(call, leaf)
        loss, outputs, grads, to_values = call.loss_and_gradient(
            values.detach(), batch, lr_grad=True
        )
        lr_grad = torch.autograd.grad(values, leaf, to_values)[0]
        return call.as_meta_gradient(loss, outputs, grads, lr_grad)

    @entry_point
    def query_losses(
        self, theta: Tensor, query: Examples, gradient: bool = False
    ) -> tuple[Tensor, Tree, Tensor | None, dict[str, Tensor]]:
        """Each task's query loss at given parameters, see ``FunctionalEngine.query_losses``."""
        passes, theta = self._passes(self._call(theta, [query]), theta, query)
        return adjoint.query_losses(passes, self.options, theta, query, gradient)

    @entry_point
    def mixed_products(self, theta: Tensor, support: Examples, vector: Tensor) -> dict[str, Tensor]:
        """The mixed derivative times a vector, see ``FunctionalEngine.mixed_products``."""
        passes, theta = self._passes(self._call(theta, [support]), theta, support)
        return adjoint.mixed_products(passes, self.options, theta, support, vector)

    @entry_point
    def hvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss times vectors, see ``FunctionalEngine.hvp``.

        The product has no graph. If gradients are enabled and an argument requires one, this raises
        LoweringError.
        """
        return self._products(theta, examples, vector, gauss_newton=False)

    @entry_point
    def ggnvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Gauss-Newton matrix of each task's loss times vectors, as ``hvp`` otherwise."""
        return self._products(theta, examples, vector, gauss_newton=True)

    def _products(
        self, theta: Tensor, examples: Examples, vector: Tensor, gauss_newton: bool
    ) -> Tensor:
        if require_gradients((theta, vector, examples.x, examples.y)):
            raise LoweringError(
                "the product is to be differentiated; torch.no_grad() says that it is not"
            )
        call = self._call(None, [examples])
        layout = call.program.layout
        check_arena("params", layout, theta, call.tasks)
        check_vector("vector", layout, vector, call.tasks)
        vectors = vector.expand(*vector.shape[:-2], call.tasks, layout.numel)
        with kept_pages():
            return call.products(theta, examples, vectors, gauss_newton)

    @entry_point
    def outputs(self, theta: Tensor, x: Tree, present: Tensor | None = None) -> Tree:
        """The module's outputs ``[T, B, ...]``, see ``FunctionalEngine.outputs``.

        The functional engine computes outputs that need a graph, with absent examples, or without a
        program.
        """
        call = self._outputs_call(theta, x) if present is None else None
        if call is None:
            return self._functional.outputs(theta, x, present)
        return call.outputs(theta, x)

    def explain(self, support: Examples | None = None) -> str:
        """Describe how the program runs, or why there is none, in a few sentences."""
        program = self.program() if support is None else self.program(support)
        if isinstance(program, Program):
            return self.describe(program)
        return f"engine='program', but there is no task program: {program}. Calls raise ValueError."

    def describe(self, program: Program) -> str:
        """Describe how a program runs, in a few sentences."""
        return describe_program(
            program,
            self.options,
            self.program_options.cuda_graph,
            self.cache.graphs,
            self.why_no_graph(program),
        )

    def why_no_graph(self, program: Program) -> str:
        """The reason why meta-gradients are not replayed from CUDA graphs; empty if they are."""
        stepwise = self.why_stepwise()
        if stepwise:
            return stepwise
        layout = program.layout
        if layout.device.type != DEVICE_TYPE:
            return f"the parameters are on {layout.device.type}"
        # One launch takes all steps if two parameter vectors of a task fit in shared memory.
        learned = sum(parameter.numel() for parameter in program.learned)
        one_launch = 2 * learned * layout.dtype.itemsize <= _MOST_SHARED
        if self.program_options.cuda_graph == "auto" and one_launch and not program.has_images:
            return "the program is a few launches, which take no longer than a graph's copies"
        return ""

    def why_stepwise(self, batches: Minibatches | None = None) -> str:
        """The reason why steps are taken one by one, between compiled calls; empty if not."""
        if not self.options.is_plain:
            return (
                f"the inner rule is {self.options.inner_rule.title}, which steps between the calls"
            )
        if self.options.memory == SEGMENTS:
            return f"memory={SEGMENTS!r} takes the steps between the calls"
        return "" if batches is None else "each inner step sees another batch, between the calls"

    def _remember(
        self,
        call: Call,
        lr: float | Tensor,
        values: Tensor,
        batch: TaskBatch,
        weights: Sequence[float],
    ) -> None:
        """Record a call that may be repeated on other values, for the fast path."""
        # The fast path would not notice that the rule has changed.
        weighs = batch.support_weight is not None or batch.query_weight is not None
        repeatable = self.options.rule is None and not (weights or weighs)
        repeatable = repeatable and call.is_one_compiled
        if repeatable and not isinstance(lr, Tensor):
            self.cache.last_call = LastCall(lr, call, values, batch)

    @property
    def _functional(self) -> FunctionalEngine:
        return FunctionalEngine(self.module, self.loss, self.options)

    @property
    def _source(self) -> LoweredSource:
        options = self.options
        return LoweredSource(self.module, self.loss, options.norm_statistics, options.adapt)

    def _step_sizes(self, call: Call, lr: float | Tensor) -> Tensor:
        return StepSizes.of(lr, call.program.layout, call.tasks, self.options.steps).values

    def _passes(
        self, call: Call, theta: Tensor | None, *sets: Examples
    ) -> tuple[ProgramPasses, Tensor]:
        """The passes of an inner loop between compiled calls, and where it starts."""
        theta = self.parameters() if theta is None else theta
        adjoint.check_loop(call.program.layout, self.options, theta, *sets)
        return ProgramPasses(call), theta

    def _meta_call(
        self,
        theta: Tensor | None,
        batch: TaskBatch,
        weights: Sequence[float],
        batches: Minibatches | None = None,
    ) -> Call:
        """The call of a meta-gradient, with the CUDA graphs that it may replay."""
        required = self.program_options.cuda_graph is True
        try:
            sets = seen_first(batch.support, batches), batch.query
            call = self._call(theta, sets, weights)
        except LoweringError as error:
            if required:
                # Not a LoweringError: the automatic engine would fall back on that.
                raise ValueError(f"cuda_graph=True: {error}") from None
            raise
        if self.program_options.cuda_graph is False:
            return call
        why = self.why_stepwise(batches) or self.why_no_graph(call.program)
        if not (why or call.is_one_compiled):
            why = "the program does not run as one compiled call for all tasks"
        if not why:
            return call._replace(graphs=self.cache.graphs, capture_at_once=required)
        if required:
            raise ValueError(f"cuda_graph=True: {why}")
        return call

    def call(self, theta: Tensor, examples: Examples) -> Call:
        """The call that computes with parameters and examples that are given.

        Raises:
            LoweringError, TypeError, ValueError: as the engine's other methods.
        """
        return self._call(theta, [examples])

    def _call(
        self, theta: Tensor | None, sets: Sequence[Examples], weights: Sequence[float] = ()
    ) -> Call:
        """The call that computes with sets of examples.

        Raises:
            LoweringError: the module, the loss, the examples or the options have no program.
        """
        self._check_losses()
        for name in (name for examples in sets for name in examples.trees()):
            raise LoweringError(f"{name} is a structure of tensors, and a program takes one")
        plan = self.cache.plan(self._source, sets)
        self._check_circumstances(plan.program.layout)
        # The program has no derivative in targets and weights; the functional engine does.
        if require_gradients(examples.y for examples in sets):
            raise LoweringError("targets require gradients")
        if any(examples.weight is not None for examples in sets):
            check_weights(plan.program, sets)
        if plan.program.has_batch_norm:
            check_presence(plan.program, self._implementation(plan.program.layout), sets)
        if theta is not None:
            check_arena("theta", plan.program.layout, theta, plan.tasks)
        return self._call_of(plan, theta is None, weights)

    def _call_of(self, plan: Plan, own_parameters: bool, weights: Sequence[float]) -> Call:
        memory = self.options.memory
        return Call(
            ops=self._implementation(plan.program.layout),
            program=plan.program,
            own_parameters=own_parameters,
            tasks=plan.tasks,
            options=self.options,
            keep=self._keeps(plan) if memory == "auto" else memory == "keep",
            step_weights=weights,
        )

    def _outputs_call(self, theta: Tensor, x: Tree) -> Call | None:
        """The call for outputs without a graph; None if they need one or have no program."""
        shared = shared_parameters(self.module, self.options.adapt)
        if require_gradients((theta, x, *shared.values())):
            return None
        try:
            self._check_losses()
            # No cached plan: plans are for examples with targets, and queries here have none.
            if is_container(x):
                return None
            check_plain("x", x)
            program = self.cache.lowering(self._source).program(tuple(x.shape[2:]))
            if isinstance(program, str) or not program.takes(x.shape[1]):
                return None
            # Compiled code reads the tensors' memory as the parameters' dtype.
            if not _kind(x) == _kind(theta) == _kind(program.layout):
                return None
            self._check_circumstances(program.layout)
            return self._call_of(Plan(program, len(x), kept=0), own_parameters=False, weights=[])
        except LoweringError:
            return None

    def _keeps(self, plan: Plan) -> bool:
        """Whether ``memory="auto"`` keeps the activations, see ``InnerLoopOptions``."""
        options, layout = self.options, plan.program.layout
        together = min(plan.tasks, options.chunk_size or plan.tasks)
        # On a CPU each thread works on one task; on a GPU all tasks of a chunk run at a time.
        if layout.device.type == "cpu":
            together = min(together, torch.get_num_threads())
        size = together * options.steps * plan.kept * layout.dtype.itemsize
        return plan.kept <= 2 * layout.numel or size <= _MOST_KEPT

    def _check_losses(self) -> None:
        """Raise LoweringError for losses of kinds that no program has."""
        if self.options.inner_loss not in (None, self.loss):
            raise LoweringError("the inner loss is another one")

    def _check_circumstances(self, layout: ParameterLayout) -> None:
        """Raise LoweringError for options and modes under which no program runs."""
        if self.options.hvp_mode == "finite_difference":
            raise LoweringError(
                "hvp_mode is 'finite_difference', and the program's products are exact"
            )
        if torch.is_autocast_enabled(layout.device.type):
            raise LoweringError("autocast is on, and the program computes in the parameters' dtype")

    def _implementation(self, layout: ParameterLayout) -> SimpleNamespace | ModuleType:
        """The compiled ops, or the ops in plain PyTorch if the options allow them."""
        ops = task_program.implementation(layout)
        if ops is not task_program.COMPILED and self.program_options.compiled_only:
            raise LoweringError(
                f"it is not compiled for {layout.dtype} on {layout.device.type}, or the torch "
                "backend was asked for"
            )
        return ops


def _kind(like: Tensor | ParameterLayout) -> tuple[torch.dtype, torch.device]:
    return like.dtype, like.device
