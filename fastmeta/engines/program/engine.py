"""The program engine: the meta-gradient of a recognised network as one call into compiled code.

It computes the same adjoint recursion as the functional engine (``engines.functional.engine`` has
the formulas). The module and the loss must lower to a task program (``engines.program.lowering``).
The passes, products and updates of all tasks and steps then run inside one op. Anything else is
left to the functional engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.core.checks import check_choice
from fastmeta.core.cuda_graphs import DEVICE_TYPE, Graphs, check_option
from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import (
    QUERY,
    SUPPORT,
    Loss,
    exclude_from_compile,
    is_learned,
    read_step_weights,
)
from fastmeta.engines.checks import check_arena, check_data
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.inner_loop import Passes
from fastmeta.engines.program.call import Adapt, Call
from fastmeta.engines.program.fast_path import CachedMetaGradient
from fastmeta.engines.program.lowering import Lowering, Program
from fastmeta.engines.program.passes import ProgramPasses
from fastmeta.engines.program.trace import LoweringError
from fastmeta.ops import task_program
from fastmeta.ops.task_program.bytecode import LossKind

MEMORY = ("auto", "recompute", "keep")

_PLANS_KEPT = 64

_MOST_KEPT = 512 << 20  # bytes of activations

_MOST_SHARED = 227 << 10  # bytes of memory that a block of a GPU shares

_PLAIN = (Tensor, nn.Parameter)


class Plan(NamedTuple):
    """A program for one batch of tasks.

    ``kept``: numbers that a task's inner step keeps: its activations and their gradients.
    """

    program: Program
    tasks: int
    kept: int


class LastCall(NamedTuple):
    """A meta-gradient as it was asked for: lr a number, and the step sizes made from it."""

    lr: float
    call: Call
    step: Tensor
    data: tuple[Tensor, ...]

    def signature(self) -> tuple[Any, ...]:
        """Equal for meta-gradients that are likely to differ in values alone."""
        return self.lr, id(self.call.program), *(tensor.shape for tensor in self.data)


class ProgramCache:
    """The plans and CUDA graphs of one learner, kept while its module and loss stay as they are.

    Copies and pickles are empty: a copy's module is another one.
    """

    def __init__(self) -> None:
        self._lowering: Lowering | None = None
        self._plans: dict[tuple[Any, ...], Plan | str] = {}
        self._options: tuple[Any, ...] = ()
        self._engine: ProgramEngine | None = None
        self._ready: CachedMetaGradient | None = None
        self._signature: tuple[Any, ...] = ()
        self.graphs = Graphs()
        self.latest: LastCall | None = None

    def engine(self, *options: Any) -> ProgramEngine:
        """``ProgramEngine(*options)``; the last one where the options are the same."""
        if self._engine is None or options != self._options:
            whole = (*options, self)
            self._engine, self._options = ProgramEngine(*whole), options
        return self._engine

    def replay(
        self, learner: nn.Module, data: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The learner's meta-gradient, where but for values nothing has changed since the last."""
        found = None if self._ready is None else self._ready(learner, data)
        if found is not None:
            self._signature = ()
        return found

    def prepare(self, learner: nn.Module) -> None:
        """Prepare to take the learner's latest meta-gradient again, where it came twice in a row.

        Nothing happens where it was not one compiled call, with a number as step size.
        """
        latest, self.latest = self.latest, None
        if latest is None or self._lowering is None:
            return
        before, self._signature = self._signature, latest.signature()
        tables = self._lowering.tables() if before == self._signature else None
        if tables is not None:
            self._ready = CachedMetaGradient(learner, latest.call, latest.step, latest.data, tables)

    def __reduce__(self) -> tuple[type[ProgramCache], tuple[()]]:
        return ProgramCache, ()

    def lowering(self, *what: Any) -> Lowering:
        """``Lowering(*what)``; the last one where it still holds."""
        if self._lowering is None or not self._lowering.current(*what):
            self._lowering = Lowering(*what)
            self._plans.clear()
            self.graphs.clear()
        return self._lowering

    def plan(self, what: tuple[nn.Module, Loss, str], data: Tensors) -> Plan:
        """The plan of what is lowered for inputs and targets, which alternate in ``data``.

        Raises:
            LoweringError: the program would not do what the module and the loss do with them.
            TypeError, ValueError: naming what does not fit.
        """
        lowering = self.lowering(*what)
        key: list[Any] = []
        for name, tensor in data.items():
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                _check_plain(name, tensor)
            key += (name, tensor.shape, tensor.dtype, tensor.device)
        signature = tuple(key)
        plan = self._plans.get(signature)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            plan = self._plans[signature] = _planned(lowering, ParameterLayout.of(what[0]), data)
        if isinstance(plan, str):
            raise LoweringError(plan)
        return plan


def _planned(lowering: Lowering, layout: ParameterLayout, data: Tensors) -> Plan | str:
    tasks = check_data(layout, data)
    names = list(data)
    first = data[names[0]]
    program = lowering.program(tuple(first.shape[2:]))
    if isinstance(program, str):
        return program
    for x_name, y_name in zip(names[::2], names[1::2], strict=True):
        x, y = data[x_name], data[y_name]
        if x.dtype != layout.dtype or x.shape[2:] != first.shape[2:]:
            return f"{x_name} is {x.dtype} {list(x.shape)}, unlike the parameters or {names[0]}"
        if not program.takes(x.shape[1]):
            return f"{x_name} has one example, and a norm of model one value a channel of it"
        reason = _does_not_compare(program, y_name, y)
        if reason:
            return reason
    return Plan(program, tasks, kept=2 * first.shape[1] * program.activations)


def _does_not_compare(program: Program, name: str, y: Tensor) -> str:
    """Why the program's loss does not take the targets y as the loss itself does; or nothing."""
    if program.loss.kind == LossKind.CROSS_ENTROPY:
        expected, fits = "int64 labels [T, examples]", y.dtype == torch.int64 and y.ndim == 2
    else:
        shape, dtype = program.output_shape, program.layout.dtype
        expected = f"{dtype} targets [T, examples, {', '.join(map(str, shape))}]"
        fits = y.dtype == dtype and y.shape[2:] == shape
    return "" if fits else f"{name} is {y.dtype} {list(y.shape)}; the program takes {expected}"


@dataclass(frozen=True)
class ProgramEngine(FunctionalEngine):
    """Adaptation, meta-gradient and Hessian-vector product as one compiled call each.

    The surface and the results are those of ``FunctionalEngine``, which does the work wherever the
    module, the loss, the batch or the backend have no compiled program.

    Args:
        module, loss, steps, first_order, hvp_mode, task_chunk, norm_statistics, rule: as for
            ``FunctionalEngine``. The program's products are exact:
            ``hvp_mode="finite_difference"`` is left to it. A rule other than plain descent takes
            its steps between compiled calls: a gradient a step, and a product a step back.
        memory: ``"keep"`` the activations of all steps for the way back, ``"recompute"`` them step
            by step, or ``"auto"``: keep them where they take at most twice the room of the K
            parameter vectors, or those of all tasks that are computed at a time 512 MiB.
        required: raise where there is no program, with the reason.
        cuda_graph: whether meta-gradients are replayed from CUDA graphs, see ``fastmeta.MAML``.
        programs: what was lowered before; an engine that is made anew at every call shares it.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1)
        >>> engine = ProgramEngine(net, torch.nn.functional.mse_loss, steps=2, required=True)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> loss, outputs = engine.meta_loss(None, 0.1, x, y, x, y)
        >>> loss.backward()
        >>> outputs.shape, net.weight.grad.shape
        (torch.Size([4, 10, 1]), torch.Size([1, 1]))
    """

    memory: str = "auto"
    required: bool = False
    cuda_graph: bool | str = "auto"
    programs: ProgramCache = field(default_factory=ProgramCache, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("memory", self.memory, MEMORY)
        check_option(self.cuda_graph)

    def program(self, data: Tensors | None = None) -> Program | str:
        """The program for a batch (None: for any that fits), or why there is none.

        Args:
            data: inputs and targets by name, in the order in which the methods take them.

        Raises:
            TypeError, ValueError: naming what does not fit.
        """
        try:
            if data is not None:
                return self._prepared(None, data, []).program
            program = self.programs.lowering(*self._lowered()).program()
            if isinstance(program, Program):
                self._check_circumstances(program.layout)
                self._implementation(program.layout)
            return program
        except LoweringError as refusal:
            return str(refusal)

    @exclude_from_compile
    def adapt(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support_x: Tensor,
        support_y: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The parameters of every task after K steps, as ``FunctionalEngine.adapt`` says.

        Raises:
            ValueError: besides, where a program is ``required`` and there is none.
        """
        data = support_x, support_y
        whole = self.is_plain and rows is None
        call = self._call(theta, dict(zip(SUPPORT, data, strict=True))) if whole else None
        if call is None or self.steps == 0:
            return super().adapt(theta, lr, *data, rows)
        step = call.program.layout.step_size_array(lr, call.tasks, self.steps)
        start = call.program.adapted if theta is None else (theta,)
        if torch.is_grad_enabled():
            return Adapt.apply(call, step, *data, *start)
        arena = call.arena(start)
        return call.adapt(arena, call.frozen(arena), step, *data)

    @exclude_from_compile
    def meta_loss(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean query loss after adaptation, as ``FunctionalEngine.meta_loss`` says.

        Raises:
            ValueError: besides, where a program is ``required`` and there is none, or a CUDA graph
                and there can be none.
            RuntimeError: besides, where the CUDA graph that is required could not be captured.
        """
        data = support_x, support_y, query_x, query_y
        weights = read_step_weights(step_weights, self.steps)
        call = self._meta_call(theta, data, weights)
        if call is None:
            return super().meta_loss(theta, lr, *data, step_weights)
        step = call.program.layout.step_size_array(lr, call.tasks, self.steps)
        start = call.program.adapted if theta is None else (theta,)
        if torch.is_grad_enabled():
            return call.meta_loss(start, step, data)
        loss, outputs, *_ = call.meta_gradient(call.arena(start), step, data, (False,) * 4)
        return loss, call.shaped(outputs)

    @exclude_from_compile
    def meta_gradient(
        self,
        lr: float | Tensor,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensors]:
        """The meta-loss with its gradient, as ``FunctionalEngine.meta_gradient`` says.

        Raises:
            ValueError: besides, where a program is ``required`` and there is none, or a CUDA graph
                and there can be none.
            RuntimeError: besides, where the CUDA graph that is required could not be captured.
        """
        data = support_x, support_y, query_x, query_y
        weights = read_step_weights(step_weights, self.steps)
        call = self._meta_call(None, data, weights)
        if call is None:
            return super().meta_gradient(lr, *data, step_weights)
        sizes = call.tasks, self.steps
        if not is_learned(lr):
            step = call.program.layout.step_size_array(lr, *sizes)
            result = call.loss_and_gradient(step, data)
            # What is prepared would not notice that a rule has changed.
            fixed = self.rule is None and not weights
            if call.is_one_compiled and fixed and not isinstance(lr, Tensor):
                self.programs.latest = LastCall(lr, call, step, data)
            return *result, {}
        with torch.enable_grad():
            leaf = lr.detach().requires_grad_()
            step = call.program.layout.step_size_array(leaf, *sizes)
        loss, outputs, to_theta, to_step = call.loss_and_gradient(step.detach(), data, True)
        return loss, outputs, to_theta, torch.autograd.grad(step, leaf, to_step)[0], {}

    @exclude_from_compile
    def hvp(self, params: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss times a vector, as ``FunctionalEngine.hvp`` says.

        Where gradients are enabled and an argument requires one, the functional engine makes the
        product, which then has a graph.

        Raises:
            ValueError: besides, where a program is ``required`` and there is none.
        """
        needs_graph = _require_gradients((params, vector, x, y))
        why = "the product is to be differentiated; torch.no_grad() says that it is not"
        call = self._call(None, {"x": x, "y": y}, refused=why if needs_graph else "")
        if call is None:
            return super().hvp(params, x, y, vector)
        layout = call.program.layout
        for name, arena in (("params", params), ("vector", vector)):
            check_arena(name, layout, arena, call.tasks)
        return call.hvp(params, x, y, vector.expand(call.tasks, layout.numel))

    @exclude_from_compile
    def outputs(self, params: Tensor, x: Tensor) -> Tensor | None:
        """The module's outputs ``[T, B, ...]`` on x ``[T, B, ...]``, with parameters ``[T, P]``.

        None where there is no program, or gradients are enabled and an argument requires one.
        """
        if _require_gradients((params, x)):
            return None
        try:
            _check_plain("x", x)
            program = self.programs.lowering(*self._lowered()).program(tuple(x.shape[2:]))
            if isinstance(program, str) or not program.takes(x.shape[1]):
                return None
            if not _kind(x) == _kind(params) == _kind(program.layout):
                return None
            self._check_circumstances(program.layout)
            call = self._call_of(Plan(program, len(x), kept=0), own=False, weights=[])
        except LoweringError:
            return None
        return call.outputs(params, x)

    def why_no_graph(self, program: Program | str) -> str:
        """Why the meta-gradients of a program are not replayed from CUDA graphs; or nothing."""
        if isinstance(program, str):
            return f"there is no task program: {program}"
        if not self.is_plain:
            return f"the inner rule is {self.inner_rule.title}, which steps between the calls"
        layout = program.layout
        if layout.device.type != DEVICE_TYPE:
            return f"the parameters are on {layout.device.type}"
        # Memory for two of these is what the one launch for all steps needs at least.
        one_launch = 2 * layout.numel * layout.dtype.itemsize <= _MOST_SHARED
        if self.cuda_graph == "auto" and one_launch and not program.has_images:
            return "the program is a few launches, which take no longer than a graph's copies"
        return ""

    def _meta_call(
        self, theta: Tensor | None, data: tuple[Tensor, ...], weights: Sequence[float]
    ) -> Call | None:
        """The call of a whole meta-gradient, with graphs where they are wanted, if there is one."""
        named = dict(zip(SUPPORT + QUERY, data, strict=True))
        call = self._call(theta, named, weights) if self.is_plain else None
        if self.cuda_graph is False or (call is None and self.cuda_graph == "auto"):
            return call
        why = self.why_no_graph(self.program(named) if call is None else call.program)
        if not (why or call is None or call.is_one_compiled):
            why = "the program does not run as one compiled call for all tasks"
        if call is not None and not why:
            return call._replace(graphs=self.programs.graphs, at_once=self.cuda_graph is True)
        if self.cuda_graph is True:
            raise ValueError(f"cuda_graph=True: {why}")
        return call

    def _call(
        self,
        theta: Tensor | None,
        data: Tensors,
        weights: Sequence[float] = (),
        refused: str = "",
    ) -> Call | None:
        """The call that does the work, None where the functional engine is to do it."""
        try:
            if refused:
                raise LoweringError(refused)
            return self._prepared(theta, data, weights)
        except LoweringError as refusal:
            if self.required:
                raise ValueError(f"there is no task program: {refusal}") from None
            return None

    def _passes(self, theta: Tensor, data: Tensors, whole: bool) -> Passes:
        # A whole call that comes here has found no program, and need not look for it again.
        call = None if whole else self._call(theta, data)
        return super()._passes(theta, data, whole) if call is None else ProgramPasses(call)

    def _prepared(self, theta: Tensor | None, data: Tensors, weights: Sequence[float]) -> Call:
        plan = self.programs.plan(self._lowered(), data)
        self._check_circumstances(plan.program.layout)
        if _require_gradients(list(data.values())[1::2]):
            raise LoweringError("targets require gradients")
        if theta is not None:
            check_arena("theta", plan.program.layout, theta, plan.tasks)
        return self._call_of(plan, theta is None, weights)

    def _lowered(self) -> tuple[nn.Module, Loss, str]:
        return self.module, self.loss, self.norm_statistics

    def _call_of(self, plan: Plan, own: bool, weights: Sequence[float]) -> Call:
        ops = self._implementation(plan.program.layout)
        keep = self._keeps(plan) if self.memory == "auto" else self.memory == "keep"
        inner = self.steps, self.first_order, keep, self.task_chunk, weights
        return Call(ops, plan.program, own, plan.tasks, *inner)

    def _keeps(self, plan: Plan) -> bool:
        layout, together = plan.program.layout, min(plan.tasks, self.task_chunk or plan.tasks)
        if layout.device.type == "cpu":
            together = min(together, torch.get_num_threads())
        size = together * self.steps * plan.kept * layout.dtype.itemsize
        return plan.kept <= 2 * layout.numel or size <= _MOST_KEPT

    def _check_circumstances(self, layout: ParameterLayout) -> None:
        if self.hvp_mode == "finite_difference":
            raise LoweringError(
                "hvp_mode is 'finite_difference', and the program's products are exact"
            )
        if torch.is_autocast_enabled(layout.device.type):
            raise LoweringError("autocast is on, and the program computes in the parameters' dtype")

    def _implementation(self, layout: ParameterLayout) -> SimpleNamespace | ModuleType:
        """The compiled ops; in plain PyTorch only where a program is required."""
        ops = task_program.implementation(layout)
        if ops is not task_program.COMPILED and not self.required:
            raise LoweringError(
                f"it is not compiled for {layout.dtype} on {layout.device.type}, or the torch "
                "backend was asked for"
            )
        return ops


def _check_plain(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        raise LoweringError(f"{name} is a {type(tensor).__name__} that is no plain dense tensor")


def _require_gradients(tensors: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)


def _kind(like: Tensor | ParameterLayout) -> tuple[torch.dtype, torch.device]:
    return like.dtype, like.device
