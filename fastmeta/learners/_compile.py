"""A learner's meta-loss as one op of the graph that torch.compile makes of a training step.

A meta-gradient comes from the module's structure, its hooks, the generators and the inner loop of
its own: nothing that a tracer can follow. The op runs it as without torch.compile, and what is
traced around it knows its shapes and its derivative alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from fastmeta.core.autocast import autocast_dtype
from fastmeta.core.dtypes import HALF

Method = TypeVar("Method", bound=Callable[..., Any])

_NAME = "fastmeta::meta_loss"

_LEARNERS: WeakValueDictionary[int, CompilableLearner] = WeakValueDictionary()

_METHODS: dict[str, Callable[..., Any]] = {}  # a subclass may call its parent's

# What PyTorch dispatches by. Where compiled code runs, autocast is left out, and at times autograd.
with torch.inference_mode(False):  # whatever the mode of who imports
    _PLAIN = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def as_single_op(meta_loss: Method) -> Method:
    """The method ``meta_loss`` of a learner, which torch.compile takes as one op.

    Whatever the number of tasks, it is the same graph. The op reads the learner's options when it
    runs; the parameters, the buffers and autocast are those at the call.
    """

    method = meta_loss.__qualname__
    _METHODS[method] = meta_loss

    @functools.wraps(meta_loss)
    def call(learner: CompilableLearner, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _traced(method, learner, *args, **kwargs)
        return meta_loss(learner, *args, **kwargs)

    return cast("Method", call)


def _traced(
    method: str,
    learner: CompilableLearner,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    step_weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if step_weights is not None and not isinstance(step_weights, Tensor):
        step_weights = torch.tensor(step_weights, dtype=torch.float64)
    # Views, as torch.compile takes no tensor twice, and queries may be the support.
    data = [x.view_as(x) for x in (support_x, support_y, query_x, query_y)]
    inputs = *_tensors(learner), *data
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    autocast = autocast_dtype(inputs[0].device)
    learner._register()
    # torch.compile checks that it is this learner, as it has seen its id.
    return _MetaLoss.apply(method, id(learner), wanted, autocast, step_weights, *inputs)


class CompilableLearner(nn.Module):
    """What has a ``meta_loss`` that is one op, which finds it by its id."""

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _register(self) -> None:
        _LEARNERS[id(self)] = self


def _tensors(learner: nn.Module) -> list[Tensor]:
    return [*learner.parameters(), *learner.buffers()]


class _MetaLoss(Function):
    """The loss, whose gradient is taken in the same call, and the outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        method: str,
        key: int,
        wanted: list[bool],
        autocast: torch.dtype | None,
        step_weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, outputs, *grads = torch.ops.fastmeta.meta_loss(
            method, key, inputs[:-4], inputs[-4:], step_weights, wanted, autocast
        )
        ctx.wanted = wanted
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(outputs)
        return loss, outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [grad_loss * next(saved) if want else None for want in ctx.wanted]
        return None, None, None, None, None, *grads


torch.library.define(
    _NAME,
    "(str method, int learner, Tensor[] tensors, Tensor[] data, Tensor? step_weights, "
    "bool[] wanted, ScalarType? autocast) -> Tensor[]",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)


@torch.library.impl(_NAME, "default")
def _run(
    method: str,
    key: int,
    tensors: list[Tensor],
    data: list[Tensor],
    step_weights: Tensor | None,
    wanted: list[bool],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Loss, outputs, and the gradient to each of the tensors and the data that is ``wanted``."""
    learner = _LEARNERS[key]
    weights = () if step_weights is None else (step_weights,)
    own = _tensors(learner)
    casting = torch.autocast(tensors[0].device.type, autocast, enabled=autocast is not None)
    with torch._C._ForceDispatchKeyGuard(*_PLAIN), _holding(own, tensors), casting:
        flags = wanted[len(own) :]
        data = [x.detach().requires_grad_(flag) for x, flag in zip(data, flags, strict=True)]
        sources = [x for x, want in zip((*own, *data), wanted, strict=True) if want]
        with torch.set_grad_enabled(bool(sources)):
            loss, outputs = _METHODS[method](learner, *data, *weights)
        grads: Sequence[Tensor] = ()
        if sources:
            grads = torch.autograd.grad(loss, sources, materialize_grads=True)
    # Results of an op share no memory, and have the strides that were promised.
    dense = torch.contiguous_format
    copies = (grad.clone(memory_format=dense) for grad in grads)
    return [loss.detach(), outputs.contiguous(), *copies]


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _shapes(
    method: str,
    key: int,
    tensors: list[Tensor],
    data: list[Tensor],
    step_weights: Tensor | None,
    wanted: list[bool],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    learner, query_x = _LEARNERS[key], data[2]
    names = [name for name, _ in (*learner.named_parameters(), *learner.named_buffers())]
    copies = dict(zip(names, map(torch.empty_like, tensors), strict=True))
    task = functional_call(learner, copies, (torch.empty_like(query_x[0]),))
    if autocast is not None and task.dtype in HALF:
        task = task.float()
    outputs = task.new_empty(query_x.shape[0], *task.shape)  # len() would fix it
    sources = (x for x, want in zip((*tensors, *data), wanted, strict=True) if want)
    dense = torch.contiguous_format
    return [
        task.new_empty(()),
        outputs,
        *(torch.empty_like(x, memory_format=dense) for x in sources),
    ]


@contextmanager
def _holding(own: Sequence[Tensor], given: Sequence[Tensor]) -> Iterator[None]:
    """The learner with the tensors that the graph has in the place of its own.

    They are the same unless the graph has changed them before, which it writes back at its end.
    """
    changed = [
        (mine, mine.data, x)
        for mine, x in zip(own, given, strict=True)
        if mine.data_ptr() != x.data_ptr()
    ]
    for mine, _, x in changed:
        mine.data = x.detach()
    try:
        yield
    finally:
        for mine, before, _ in changed:
            mine.data = before
