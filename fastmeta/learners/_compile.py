"""A learner's meta-loss as one custom op in the graph that torch.compile makes of a training step.

A tracer cannot follow a meta-gradient, which depends on the module's structure, its hooks, random
generators and an inner loop with its own derivatives. The op runs the meta-loss as without
torch.compile. The traced code around it knows only its shapes and its derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.func import functional_call

from fastmeta.core.autocast import autocast_dtype
from fastmeta.core.dtypes import HALF

Method = TypeVar("Method", bound=Callable[..., Any])

_NAME = "fastmeta::meta_loss"

_LEARNERS: WeakValueDictionary[int, CompilableLearner] = WeakValueDictionary()

# Options that the op has not; torch.compile breaks its graph at calls with them.
_UNTRACED = {"inner_batches", "reduction", "differentiable_outputs"}

# Of trees, too: an op takes tensors.
_BATCH = ("support_x", "support_y", "query_x", "query_y")

# By qualified name: a subclass may call the method of its parent, which is another one.
_METHODS: dict[str, Callable[..., Any]] = {}

# Dispatch keys of eager code. Compiled code runs with autocast excluded, and sometimes autograd.
with torch.inference_mode(False):  # the importing code may be in inference mode
    _PLAIN = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def as_single_op(meta_loss: Method) -> Method:
    """Make torch.compile see the method ``meta_loss`` of a learner as one op.

    The graph is the same for any number of tasks. The op reads the learner's options when it runs;
    parameters, buffers and autocast are taken at the call.
    """
    method = meta_loss.__qualname__
    _METHODS[method] = meta_loss
    untraced = _disable_dynamo(meta_loss)

    @functools.wraps(meta_loss)
    def call(learner: CompilableLearner, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return meta_loss(learner, *args, **kwargs)
        batch = [*args[:4], *(kwargs[name] for name in _BATCH[len(args) :] if name in kwargs)]
        is_traced = len(batch) == 4 and all(isinstance(x, Tensor) for x in batch)
        if kwargs.keys() & _UNTRACED or not is_traced:
            return untraced(learner, *args, **kwargs)
        return _traced(method, learner, *args, **kwargs)

    return cast("Method", call)


def _traced(
    method: str,
    learner: CompilableLearner,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    step_weights: Sequence[float] | Tensor | None = None,
    start: Tensor | None = None,
    support_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if step_weights is not None and not isinstance(step_weights, Tensor):
        step_weights = torch.tensor(step_weights, dtype=torch.float64)
    # Views: torch.compile takes no tensor twice, and queries may be the support.
    batch = support_x, support_y, query_x, query_y
    given = {"start": start, "support_weight": support_weight, "query_weight": query_weight}
    more = {name: x for name, x in given.items() if x is not None}
    data = [x.view_as(x) for x in (*batch, *more.values())]
    inputs = [*_tensors(learner), *data]
    requires = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    autocast = autocast_dtype(inputs[0].device)
    learner._register()
    # An op takes no Python object. torch.compile guards the id, so the graph is of this learner.
    names, own = list(more), len(inputs) - len(data)
    key = id(learner)
    return _MetaLoss.apply(method, key, names, own, requires, autocast, step_weights, *inputs)


class CompilableLearner(nn.Module):
    """Base of learners whose ``meta_loss`` torch.compile sees as a single custom op.

    The op looks the learner up by its ``id``, since ops take tensors and numbers only.
    """

    def _register(self) -> None:
        _LEARNERS[id(self)] = self

    # Makes torch.compile call it while it traces instead of tracing it. This is all that
    # torch.compiler.assume_constant_result does after importing the tracer, which takes a second.
    _register._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tensors(learner: nn.Module) -> list[Tensor]:
    own = [*learner.parameters(), *learner.buffers()]
    known = set(map(id, own))
    return [*own, *(x for x in getattr(learner, "outer", ()) if id(x) not in known)]


class _MetaLoss(Function):
    """The loss and the outputs; the gradient is computed in the same call."""

    @staticmethod
    def forward(
        ctx: Any,
        method: str,
        key: int,
        names: list[str],
        own: int,
        requires: list[bool],
        autocast: torch.dtype | None,
        step_weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, outputs, *grads = torch.ops.fastmeta.meta_loss(
            method, key, inputs[:own], inputs[own:], names, step_weights, requires, autocast
        )
        ctx.requires = requires
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(outputs)
        return loss, outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [grad_loss * next(saved) if required else None for required in ctx.requires]
        return None, None, None, None, None, None, None, *grads


torch.library.define(
    _NAME,
    "(str method, int learner, Tensor[] tensors, Tensor[] data, str[] names, Tensor? step_weights, "
    "bool[] requires, ScalarType? autocast) -> Tensor[]",
    # It draws random numbers, and it may wait for the device, which no CUDA graph can hold.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)


@torch.library.impl(_NAME, "default")
def _run(
    method: str,
    key: int,
    tensors: list[Tensor],
    data: list[Tensor],
    names: list[str],
    step_weights: Tensor | None,
    requires: list[bool],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Loss, outputs, and the gradient to each of ``tensors`` and ``data`` that requires it.

    ``data`` are the four tensors of the batch, then those that ``names`` names.
    """
    learner = _LEARNERS[key]
    options = {} if step_weights is None else {"step_weights": step_weights}
    own = _tensors(learner)
    casting = torch.autocast(tensors[0].device.type, autocast, enabled=autocast is not None)
    # Without the guard, ops below an op skip autograd, and the meta-loss would have no gradient.
    with torch._C._ForceDispatchKeyGuard(*_PLAIN), _substituted(own, tensors), casting:
        flags = requires[len(own) :]
        data = [x.detach().requires_grad_(flag) for x, flag in zip(data, flags, strict=True)]
        sources = [x for x, required in zip((*own, *data), requires, strict=True) if required]
        with torch.set_grad_enabled(bool(sources)):
            more = dict(zip(names, data[4:], strict=True))
            loss, outputs = _METHODS[method](learner, *data[:4], **options, **more)
        grads: Sequence[Tensor] = ()
        if sources:
            grads = torch.autograd.grad(loss, sources, materialize_grads=True)
    # Results of an op must not share memory, and must have the strides of the fake results.
    dense = torch.contiguous_format
    copies = (grad.clone(memory_format=dense) for grad in grads)
    return [loss.detach(), outputs.contiguous(), *copies]


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _shapes(
    method: str,
    key: int,
    tensors: list[Tensor],
    data: list[Tensor],
    names: list[str],
    step_weights: Tensor | None,
    requires: list[bool],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    learner, query_x = _LEARNERS[key], data[2]
    # Shapes come from the module itself on fake tensors: one task's outputs, then T of them.
    names = [name for name, _ in (*learner.named_parameters(), *learner.named_buffers())]
    copies = dict(zip(names, map(torch.empty_like, tensors), strict=True))
    task = functional_call(learner, copies, (torch.empty_like(query_x[0]),))
    if autocast is not None and task.dtype in HALF:
        task = task.float()
    # len() would be a number, and compile a graph for this number of tasks.
    outputs = task.new_empty(query_x.shape[0], *task.shape)
    sources = (x for x, required in zip((*tensors, *data), requires, strict=True) if required)
    dense = torch.contiguous_format
    return [
        task.new_empty(()),
        outputs,
        *(torch.empty_like(x, memory_format=dense) for x in sources),
    ]


@contextmanager
def _substituted(own: Sequence[Tensor], new: Sequence[Tensor]) -> Iterator[None]:
    """Give the learner's tensors the values that the graph has for them.

    The values differ only if the graph has changed a tensor before the op: it writes changes back
    at its end.
    """
    changed = [
        (tensor, tensor.data, value)
        for tensor, value in zip(own, new, strict=True)
        if tensor.data_ptr() != value.data_ptr()
    ]
    for tensor, _, value in changed:
        tensor.data = value.detach()
    try:
        yield
    finally:
        for tensor, before, _ in changed:
            tensor.data = before
