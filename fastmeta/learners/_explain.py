"""Which engine runs, and why, in words."""

from __future__ import annotations

from fastmeta.core.cuda_graphs import CALLS, DEVICE_TYPE
from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.engine import ProgramEngine
from fastmeta.engines.program.lowering import Program
from fastmeta.ops import backend_of


def explain(engine: FunctionalEngine, data: Tensors | None = None) -> str:
    """What an engine does with a batch (None: with any that fits), in a few sentences."""
    if not isinstance(engine, ProgramEngine):
        return f"{_functional(engine)} engine='functional' asks for it."
    program = engine.program(data)
    if isinstance(program, Program):
        return _program(engine, program)
    if engine.required:
        return f"engine='program', but there is no task program: {program}. Calls raise ValueError."
    raises = " cuda_graph=True: meta-losses raise ValueError." if engine.cuda_graph is True else ""
    return f"{_functional(engine)} No task program: {program}.{raises}"


def _program(engine: ProgramEngine, program: Program) -> str:
    *layers, loss = program.layers
    size = engine.task_chunk
    tasks = "all tasks together" if size is None else f"{size} tasks at a time"
    calls = "one call for all steps" if engine.is_plain else "one call a step"
    return (
        f"Task program, {calls}: {', '.join(layers)}; {loss} "
        f"({_counted(program.layout)}); {tasks}. "
        f"{_steps(engine, 'exact')} {_where(program.layout, 'task_program')}"
        f"{_graphs(engine, program)}"
    )


def _graphs(engine: ProgramEngine, program: Program) -> str:
    """A sentence on CUDA graphs; nothing where there are none anyway."""
    why, asked = engine.why_no_graph(program), engine.cuda_graph
    if asked is True and why:
        return f" cuda_graph=True, but {why}. Meta-losses raise ValueError."
    if asked is False or program.layout.device.type != DEVICE_TYPE:
        return ""
    if why:
        return f" No CUDA graph: {why}."
    graphs, size = engine.programs.graphs, engine.task_chunk
    when = "the first call" if asked is True else f"call {CALLS} in a row"
    kind = "a kind" if size is None else f"a kind, of at most {size} tasks,"
    refused = "".join(f" Launched instead, as it failed: {why}." for why in graphs.refusals())
    return f" Meta-losses are CUDA graphs from {when} of {kind} on; {len(graphs)} now.{refused}"


def _functional(engine: FunctionalEngine) -> str:
    layout = ParameterLayout.of(engine.module)
    together = {None: "all tasks vmapped together", 1: "tasks one at a time, without vmap"}
    tasks = together.get(engine.task_chunk, f"tasks vmapped {engine.task_chunk} at a time")
    return (
        f"Functional engine, which takes any nn.Module (here {type(engine.module).__name__}, "
        f"{_counted(layout)}); {tasks}. {_norms(engine)}"
        f"{_steps(engine, engine.hvp_mode)} {_where(layout, 'inner_update')}"
    )


def _norms(engine: FunctionalEngine) -> str:
    if engine.norm_statistics == "batch":
        return ""
    return "Norms in evaluation mode go by the running statistics that they track. "


def _steps(engine: FunctionalEngine, products: str) -> str:
    if engine.first_order:
        mode = "first order, no Hessian-vector products"
    else:
        mode = f"second order by the adjoint, one {products} Hessian-vector product a step"
    rule = "" if engine.is_plain else f" by {engine.inner_rule.title}"
    return f"Inner steps: {engine.steps}{rule}, {mode}."


def _where(layout: ParameterLayout, op: str) -> str:
    backend, dtype = backend_of(op, layout.device, layout.dtype), str(layout.dtype)
    what = "Everything" if op == "task_program" else "Inner updates"
    name = dtype.removeprefix("torch.")
    return f"{what} by the {backend} backend on {layout.device.type} in {name}."


def _counted(layout: ParameterLayout) -> str:
    return f"{layout.numel} adapted parameters in {len(layout.names)} tensors"
