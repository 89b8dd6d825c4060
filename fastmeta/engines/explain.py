"""Sentences that describe an engine, for ``explain``."""

from __future__ import annotations

from torch import nn

from fastmeta.core.backend import backend_of
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import shared_parameters
from fastmeta.engines.base import InnerLoopOptions


def describe_functional(
    module: nn.Module,
    options: InnerLoopOptions,
    not_vmapped: str,
    chosen: tuple[int, int] | None = None,
) -> str:
    """Describe how the functional engine runs a module.

    ``not_vmapped`` is the reason why the tasks run one at a time although the options do not ask
    for that; empty if there is none. ``chosen``: the tasks that ran together when
    ``task_chunk="auto"`` last chose their number, and the bytes of each.
    """
    layout = ParameterLayout.of(module, options.adapt)
    shared = sum(p.numel() for p in shared_parameters(module, options.adapt).values())
    tasks = describe_tasks(options.task_chunk, not_vmapped, chosen)
    norms = "Norms in evaluation mode go by the running statistics that they track. "
    return (
        f"Functional engine, which takes any nn.Module (here {type(module).__name__}, "
        f"{count_parameters(layout, shared)}); {tasks}. "
        f"{'' if options.norm_statistics == 'batch' else norms}"
        f"{describe_steps(options, options.hvp_mode)} {describe_backend(layout, 'inner_update')}"
    )


def describe_tasks(
    chunk: int | str | None, not_vmapped: str, chosen: tuple[int, int] | None = None
) -> str:
    """Describe how many tasks run together, as for ``describe_functional``."""
    one_by_one = "tasks one at a time, without vmap"
    if not isinstance(chunk, int) and not_vmapped:
        return f"{one_by_one}, because {not_vmapped}"
    if chunk == "auto":
        if chosen is None:
            return "tasks vmapped, as many at a time as the size of their activations suggests"
        size, peak = chosen
        how = one_by_one if size == 1 else f"tasks vmapped, up to {size} at a time"
        return f"{how}, because a step of one takes {peak / 2**20:.1f} MiB"
    if chunk is None:
        return "all tasks vmapped together"
    return one_by_one if chunk == 1 else f"tasks vmapped {chunk} at a time"


def describe_steps(options: InnerLoopOptions, products: str) -> str:
    """Name the number of inner steps, their rule and their order."""
    if options.first_order:
        mode = "first order, no Hessian-vector products"
    else:
        mode = f"second order by the adjoint, one {products} Hessian-vector product a step"
    rule = "" if options.is_plain else f" by {options.inner_rule.title}"
    return f"Inner steps: {options.steps}{rule}, {mode}."


def describe_backend(layout: ParameterLayout, op: str) -> str:
    """Name the backend, the device and the dtype of an op."""
    backend, dtype = backend_of(op, layout.device, layout.dtype), str(layout.dtype)
    subject = "Everything" if op == "task_program" else "Inner updates"
    name = dtype.removeprefix("torch.")
    return f"{subject} by the {backend} backend on {layout.device.type} in {name}."


def count_parameters(layout: ParameterLayout, shared: int = 0) -> str:
    """Count the adapted parameters and their tensors, and those that the tasks share."""
    adapted = f"{layout.numel} adapted parameters in {len(layout.names)} tensors"
    return f"{adapted} and {shared} that the tasks share" if shared else adapted
