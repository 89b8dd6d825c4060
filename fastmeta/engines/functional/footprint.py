"""What a task needs of memory, measured once for each kind of task, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta.core.memory import memory_limit
from fastmeta.core.peak_bytes import PeakBytes
from fastmeta.core.random_state import RandomState
from fastmeta.engines.base import Examples, InnerLoopOptions
from fastmeta.engines.functional.label_checks import may_be_absent
from fastmeta.engines.functional.passes import ModulePasses

# Tasks that a CPU takes at a time have so many bytes. Chosen on `python -m benchmarks functional`
# when each call still took fresh pages, which cost more than larger chunks saved.
_TOGETHER = 128 << 20


class Footprint(NamedTuple):
    """Bytes of one task's inner step.

    Attributes:
        kept: what the graph of the gradient keeps for a product with the Hessian; 0 if the loop
            takes no product from it.
        peak: the most at a time, during the gradient and the product.
    """

    kept: int
    peak: int


class Choice(NamedTuple):
    """How many tasks run together, and the bytes that each of them takes."""

    tasks: int
    peak: int


_known: WeakKeyDictionary[nn.Module, dict[Any, Footprint]] = WeakKeyDictionary()
_choices: WeakKeyDictionary[nn.Module, Choice] = WeakKeyDictionary()


def last_choice(module: nn.Module) -> Choice | None:
    """What the last call with ``task_chunk="auto"`` chose for the module."""
    return _choices.get(module)


def with_sizes(
    passes: ModulePasses, options: InnerLoopOptions, theta: Tensor, examples: Examples, keeps: bool
) -> tuple[ModulePasses, InnerLoopOptions]:
    """Choose how many tasks run together, and the steps whose activations are kept.

    Args:
        passes, options: of the loop; ``passes`` keep nothing.
        theta: ``[P]`` for all tasks or ``[T, P]``.
        examples: of a step, ``[T, S, ...]``.
        keeps: whether the adjoint follows at once and can use activations that are kept.
    """
    tasks, device = examples.tasks, theta.device
    keeps = keeps and options.hvp_mode == "reverse" and options.memory in ("auto", "keep")
    is_measured = options.task_chunk == "auto" or (keeps and options.memory == "auto")
    found = _footprint(passes, options, theta, examples, keeps) if is_measured else Footprint(0, 0)
    if options.task_chunk == "auto":
        limit = memory_limit(device) if device.type != "cpu" else _TOGETHER
        size = max(1, min(tasks, min(limit, memory_limit(device)) // max(found.peak, 1)))
        _choices[passes.task_module.module] = Choice(size, found.peak)
        options = replace(options, task_chunk=size)
    if not keeps:
        return passes, options
    if options.memory == "keep":
        return replace(passes, kept_from=0), options
    # The last steps are kept: the adjoint takes them first and frees what they keep.
    together = min(options.chunk_size or tasks, tasks)
    fits = memory_limit(device) // max(together * found.kept, 1)
    kept_from = max(0, options.steps - fits)
    # A step of as many examples keeps no less than the queries.
    limit = max(passes.query_limit or 0, examples.size * (fits - options.steps))
    return replace(passes, kept_from=kept_from, query_limit=limit), options


def _footprint(
    passes: ModulePasses, options: InnerLoopOptions, theta: Tensor, examples: Examples, keeps: bool
) -> Footprint:
    module = passes.task_module.module
    # Two tasks: a module that cannot be vmapped is then found here, as in the loop.
    tasks = min(2, examples.tasks, options.chunk_size or 2)
    # Inference mode keeps no graph, and autocast halves what is kept.
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(theta.device.type)
    shapes = ((n, t.shape[1:], t.dtype, t.device) for n, t in examples.named().items())
    # Norms of present examples only keep more.
    weighs = examples.weight is not None or may_be_absent(passes.support_loss)
    kind = (module.training, keeps, tasks, weighs, *modes, *shapes)
    known = _known.setdefault(module, {})
    if kind not in known:
        kept, peak = _measured(passes, theta, examples.of_tasks(slice(tasks)), keeps)
        known[kind] = Footprint(kept // tasks, peak // tasks)
    return known[kind]


def _measured(
    passes: ModulePasses, theta: Tensor, examples: Examples, keeps: bool
) -> tuple[int, int]:
    """Bytes kept and their peak in a step on the examples."""
    tasks, size = examples.tasks, theta.shape[-1]
    params = theta.detach().reshape(-1, size)[:tasks].expand(tasks, size)
    part = examples.map(Tensor.detach)
    # The loop draws its own numbers afterwards, as if nothing had been drawn.
    draws = RandomState(theta.device).replay()
    with draws, torch.no_grad(), passes.conditions(), PeakBytes() as memory:
        linear = replace(passes, kept_from=0).linearize(0, params, part, set()) if keeps else None
        if linear is None:
            passes.gradient(0, params, part)
            return 0, memory.peak
        kept = memory.alive
        grads, product = linear
        product(grads)
    return kept, memory.peak
