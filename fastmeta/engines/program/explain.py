"""Sentences that describe a task program, for ``explain``."""

from __future__ import annotations

from fastmeta.core.cuda_graphs import CALLS, DEVICE_TYPE, Graphs
from fastmeta.engines.base import InnerLoopOptions
from fastmeta.engines.explain import count_parameters, describe_backend, describe_steps
from fastmeta.engines.program.lowering import Program
from fastmeta.engines.segments import SEGMENTS


def describe_program(
    program: Program,
    options: InnerLoopOptions,
    cuda_graph: bool | str,
    graphs: Graphs,
    why_no_graph: str,
) -> str:
    """Describe how a program runs; ``why_no_graph`` is empty if CUDA graphs may replay it."""
    *layers, loss = program.layers  # the last entry is the name of the loss
    shared = sum(parameter.numel() for parameter in program.shared.values())
    size = options.chunk_size
    tasks = "all tasks together" if size is None else f"{size} tasks at a time"
    together = options.is_plain and options.memory != SEGMENTS
    calls = "one call for all steps" if together else "one call a step"
    if cuda_graph is True and why_no_graph:
        graph_sentence = f" cuda_graph=True, but {why_no_graph}. Meta-losses raise ValueError."
    elif cuda_graph is False or program.layout.device.type != DEVICE_TYPE:
        graph_sentence = ""
    elif why_no_graph:
        graph_sentence = f" No CUDA graph: {why_no_graph}."
    else:
        graph_sentence = _describe_graphs(cuda_graph, graphs, size)
    return (
        f"Task program, {calls}: {', '.join(layers)}; {loss} "
        f"({count_parameters(program.layout, shared)}); {tasks}. "
        f"{describe_steps(options, 'exact')} {describe_backend(program.layout, 'task_program')}"
        f"{graph_sentence}"
    )


def _describe_graphs(cuda_graph: bool | str, graphs: Graphs, size: int | None) -> str:
    when = "the first call" if cuda_graph is True else f"call {CALLS} in a row"
    kind = "a kind" if size is None else f"a kind, of at most {size} tasks,"
    failed = "".join(f" Launched instead, as it failed: {why}." for why in graphs.refusals())
    return f" Meta-losses are CUDA graphs from {when} of {kind} on; {len(graphs)} now.{failed}"
