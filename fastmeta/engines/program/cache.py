"""Cache of one learner's programs, CUDA graphs and last call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.core.checks import check_dense
from fastmeta.core.cuda_graphs import Graphs
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import Examples, Loss, MetaGradient, TaskBatch
from fastmeta.engines.checks import check_examples
from fastmeta.engines.program.call import Call
from fastmeta.engines.program.fast_path import CachedMetaGradient
from fastmeta.engines.program.lowering import Lowering, Program
from fastmeta.engines.program.trace import LoweringError
from fastmeta.ops.task_program.bytecode import LossKind

_PLANS_KEPT = 64  # kinds of batches
_PLAIN = (Tensor, nn.Parameter)  # exact types: a subclass may have no memory of its own


class LoweredSource(NamedTuple):
    """Source of a lowering: the module, the loss, and the options that count."""

    module: nn.Module
    loss: Loss
    norm_statistics: str
    adapt: tuple[str, ...] | None


class Plan(NamedTuple):
    """A program for one batch of tasks.

    Attributes:
        program: for examples of the batch's shape.
        tasks: T.
        kept: numbers that one inner step of a task keeps: activations and their gradients.
    """

    program: Program
    tasks: int
    kept: int


class LastCall(NamedTuple):
    """Arguments of the last meta-gradient or loss: whether the next may take the fast path.

    Recorded only if ``lr`` is a number.
    """

    lr: float
    call: Call
    step_sizes: Tensor
    batch: TaskBatch

    def signature(self) -> tuple[Any, ...]:
        """Key that is equal for meta-gradients that are likely to differ only in values."""
        return self.lr, id(self.call.program), *(tensor.shape for tensor in self.batch.data)


class ProgramCache:
    """The lowering, the plans by kind of batch, the CUDA graphs and the last call of one learner.

    The lowering, and all that depends on it, is valid while the module, the loss and their options
    are unchanged. Copies and pickles of a cache are empty: a copied learner has another module.

    Attributes:
        graphs: the CUDA graphs of meta-gradients.
        last_call: the last meta-gradient, if the next one may take the fast path.
    """

    def __init__(self) -> None:
        self._lowering: Lowering | None = None
        self._plans: dict[tuple[Any, ...], Plan | str] = {}
        self._fast_path: CachedMetaGradient | None = None
        self._signature: tuple[Any, ...] = ()
        self.graphs = Graphs()
        self.last_call: LastCall | None = None

    def __reduce__(self) -> tuple[type[ProgramCache], tuple[()]]:
        return ProgramCache, ()

    def lowering(self, source: LoweredSource) -> Lowering:
        """The lowering of a module and a loss: the cached one while it is valid."""
        if self._lowering is None or not self._lowering.current(*source):
            self._lowering = Lowering(*source)
            self._plans.clear()
            self.graphs.clear()  # they replay kernels with the old program and parameters
        return self._lowering

    def plan(self, source: LoweredSource, sets: Sequence[Examples]) -> Plan:
        """The plan for sets of examples.

        Raises:
            LoweringError: the program would not do what the module and the loss do with them.
            TypeError, ValueError: naming the argument that does not fit.
        """
        lowering = self.lowering(source)
        # All that a plan depends on. It is built at every call, so its loop is plain.
        key: list[Any] = []
        for examples in sets:
            for name, tensor in (("x", examples.x), ("y", examples.y)):
                # The exact check inline: check_plain is called for what may have to raise.
                plain = type(tensor) is Tensor and tensor.layout is torch.strided
                if not plain or tensor.is_nested:
                    check_plain(examples.x_name if name == "x" else examples.y_name, tensor)
                key += (tensor.shape, tensor.dtype, tensor.device)
            key.append(examples.role)
        signature = tuple(key)
        plan = self._plans.get(signature)
        if plan is None:
            # Batches of ever new shapes would otherwise fill the memory.
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            plan = self._plans[signature] = _plan(lowering, source, sets)
        if isinstance(plan, str):  # the cached reason why there is none
            raise LoweringError(plan)
        return plan

    def replay(
        self, learner: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> MetaGradient | None:
        """The learner's meta-gradient if only values have changed since the last; else None.

        ``data`` are the tensors of a ``TaskBatch``, which would take a percent of a small call.
        """
        result = None if self._fast_path is None else self._fast_path(learner, data)
        if result is not None:
            # Two more calls in a row have to come before another fast path is prepared.
            self._signature = ()
        return result

    def replay_loss(
        self, learner: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The learner's meta-loss and outputs, as ``replay``."""
        result = None if self._fast_path is None else self._fast_path.meta_loss(learner, data)
        if result is not None:
            self._signature = ()
        return result

    def prepare(self, learner: nn.Module) -> None:
        """Prepare the fast path if the learner's last two such calls had the same signature.

        Does nothing unless the last one was one compiled call with a number as step size.
        """
        last, self.last_call = self.last_call, None
        if last is None or self._lowering is None:
            return
        before, self._signature = self._signature, last.signature()
        # Only the second time: preparing costs more than a call, and shapes may alternate.
        tables = self._lowering.tables() if before == self._signature else None
        if tables is not None:
            names = self._lowering.names
            self._fast_path = CachedMetaGradient(
                learner, last.call, last.step_sizes, last.batch, tables, names
            )


def check_plain(name: str, tensor: Any) -> None:
    """Raise unless compiled code can read the tensor's memory."""
    check_dense(name, tensor)
    if type(tensor) not in _PLAIN:
        raise LoweringError(f"{name} is a {type(tensor).__name__} that is no plain tensor")


def _plan(lowering: Lowering, source: LoweredSource, sets: Sequence[Examples]) -> Plan | str:
    layout = ParameterLayout.of(source.module, source.adapt)
    tasks = check_examples(layout, *sets)
    first = sets[0]
    program = lowering.program(tuple(first.x.shape[2:]))
    if isinstance(program, str):
        return program
    # Query and support share one program, so they have one shape of an example.
    for examples in sets:
        x, name = examples.x, examples.x_name
        if x.dtype != layout.dtype or x.shape[2:] != first.x.shape[2:]:
            return f"{name} is {x.dtype} {list(x.shape)}, unlike the parameters or {first.x_name}"
        if not program.takes(x.shape[1]):
            return f"{name} has one example, and a norm of model one value a channel of it"
        reason = _targets_mismatch(program, examples.y_name, examples.y)
        if reason:
            return reason
    # Twice: the activations and their gradients, which the Hessian-vector product reads.
    return Plan(program, tasks, kept=2 * first.x.shape[1] * program.activations)


def _targets_mismatch(program: Program, name: str, y: Tensor) -> str:
    """The reason why the program's loss does not take the targets y; empty if it does."""
    if program.loss.kind == LossKind.CROSS_ENTROPY:
        expected, fits = "int64 labels [T, examples]", y.dtype == torch.int64 and y.ndim == 2
    else:
        shape, dtype = program.output_shape, program.layout.dtype
        expected = f"{dtype} targets [T, examples, {', '.join(map(str, shape))}]"
        fits = y.dtype == dtype and y.shape[2:] == shape
    return "" if fits else f"{name} is {y.dtype} {list(y.shape)}; the program takes {expected}"
