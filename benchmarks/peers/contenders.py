"""The contenders: a table of names, labels, and the function that builds each one's step."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

from benchmarks.peers.step import Build, Problem, Step

OURS = "fastmeta"


@dataclass(frozen=True)
class Contender:
    name: str  # on the command line
    label: str  # in tables
    kind: str  # of the workloads that it can do: "meta", "hvp", "head", "iteration" or "some"
    build: str  # "module:function" of a `Problem`, imported in the contender's own process
    dtype: str = "float32"
    in_graph: bool = False  # as the replay of a CUDA graph
    only_on_cuda: bool = False  # where it makes graphs by itself

    def load(self) -> Build:
        module, function = self.build.split(":")
        return getattr(importlib.import_module(module), function)


def _row(name: str, label: str, kind: str, place: str) -> Contender:
    return Contender(name, label, kind, f"benchmarks.peers.{place}")


_BY_ITSELF = _row("fastmeta-replay", "fastmeta, cuda_graph=True", "meta", "fastmeta_steps:replayed")
_META = (
    _row(OURS, "fastmeta", "meta", "fastmeta_steps:chosen"),
    _row("fastmeta-autograd", "fastmeta, loss.backward()", "meta", "fastmeta_steps:autograd"),
    replace(_BY_ITSELF, only_on_cuda=True),
    _row("fastmeta-functional", "fastmeta, functional engine", "meta", "fastmeta_steps:functional"),
    _row("learn2learn", "learn2learn", "meta", "library_steps:learn2learn"),
    _row("higher", "higher", "meta", "library_steps:higher"),
    _row("torchopt", "TorchOpt", "meta", "library_steps:torchopt"),
    _row("torch-func", "torch.func vmap(grad)", "meta", "torch_steps:unrolled"),
    _row("torch-compile", "torch.func, compiled", "meta", "torch_steps:unrolled_compiled"),
    _row("adjoint", "adjoint in torch.func", "meta", "torch_steps:adjoint"),
    _row("adjoint-compile", "adjoint, compiled", "meta", "torch_steps:adjoint_compiled"),
    _row("jax", "JAX jit(vmap(grad))", "meta", "jax_steps:unrolled"),
)
_HVP = (
    _row(OURS, "fastmeta", "hvp", "fastmeta_steps:hvp_chosen"),
    _row("fastmeta-functional", "fastmeta, fm.hvp", "hvp", "fastmeta_steps:hvp_functional"),
    _row("autograd", "torch.autograd, task by task", "hvp", "torch_steps:twice"),
    _row("torch-func", "torch.func, reverse", "hvp", "torch_steps:reverse"),
    _row("torch-compile", "torch.func, reverse, compiled", "hvp", "torch_steps:reverse_compiled"),
    _row("torch-forward", "torch.func, forward", "hvp", "torch_steps:forward"),
    _row(
        "forward-compile",
        "torch.func, forward, compiled",
        "hvp",
        "torch_steps:forward_compiled",
    ),
    _row("jax-reverse", "JAX jit, reverse", "hvp", "jax_steps:hvp_reverse"),
    _row("jax", "JAX jit, forward", "hvp", "jax_steps:hvp_forward"),
)
_HEAD = (
    _row(OURS, "fastmeta", "head", "head_steps:anil"),
    _row("fastmeta-op", "fastmeta, linear_head", "head", "head_steps:linear_head"),
    _row("fastmeta-program", "fastmeta, task program", "head", "head_steps:program"),
    _row("learn2learn", "learn2learn", "head", "head_steps:learn2learn"),
    _row("higher", "higher", "head", "head_steps:higher"),
    _row("torchopt", "TorchOpt", "head", "head_steps:torchopt"),
    _row("torch-func", "torch.func vmap(grad)", "head", "head_steps:unrolled"),
    _row("torch-compile", "torch.func, compiled", "head", "head_steps:unrolled_compiled"),
    _row("jax", "JAX jit(vmap(grad))", "head", "jax_steps:head"),
)
_ITERATION = (
    _row(OURS, "fastmeta", "iteration", "iteration_steps:values"),
    _row("fastmeta-autograd", "fastmeta, loss.backward()", "iteration", "iteration_steps:autograd"),
    _row("learn2learn", "learn2learn", "iteration", "iteration_steps:learn2learn"),
    _row("higher", "higher", "iteration", "iteration_steps:higher"),
    _row("torchopt", "TorchOpt", "iteration", "iteration_steps:torchopt"),
    _row("torch-compile", "torch.func, compiled", "iteration", "iteration_steps:unrolled_compiled"),
    _row("adjoint-compile", "adjoint, compiled", "iteration", "iteration_steps:adjoint_compiled"),
    _row("jax", "JAX jit, all in one", "iteration", "jax_steps:iteration"),
)
_SOME = (
    _row(OURS, "fastmeta", "some", "some_steps:values"),
    _row("fastmeta-functional", "fastmeta, functional engine", "some", "some_steps:functional"),
    _row("autograd", "torch.autograd, task by task", "some", "some_steps:by_task"),
    _row("higher", "higher", "some", "some_steps:higher"),
    _row("torch-func", "torch.func vmap(grad)", "some", "some_steps:unrolled"),
    _row("torch-compile", "torch.func, compiled", "some", "some_steps:unrolled_compiled"),
    _row("jax", "JAX jit(vmap(grad))", "some", "jax_steps:some"),
)
CONTENDERS = _META + _HVP + _HEAD + _ITERATION + _SOME
# The reference of all results: a plain loop, in float64. Not torch.func, whose vmap of gradients
# that are differentiated again is wrong for convolutional networks in torch 2.13.
REFERENCES = {
    kind: replace(_row("reference", "float64", kind, build), dtype="float64")
    for kind, build in (
        ("meta", "torch_steps:by_task"),
        ("hvp", "torch_steps:twice"),
        ("head", "head_steps:by_task"),
        ("iteration", "torch_steps:by_task"),
        ("some", "some_steps:by_task"),
    )
}
MATRIX = _row("matrix", "matrix product", "", "matrix:product")


def contenders_for(kind: str, device: str, peers: list[str] | None = None) -> list[Contender]:
    """fastmeta and the peers of these names (None: all), on CUDA each also as a CUDA graph."""
    contenders = []
    for contender in CONTENDERS:
        if contender.kind != kind or not (
            peers is None or contender.name == OURS or contender.name in peers
        ):
            continue
        if contender.only_on_cuda and device != "cuda":
            continue
        contenders.append(contender)
        if device == "cuda" and "jax" not in contender.name and not contender.only_on_cuda:
            contenders.append(in_graph(contender))
    return contenders


def in_graph(contender: Contender) -> Contender:
    name, label = f"{contender.name}-graph", f"{contender.label}, CUDA graph"
    return replace(contender, name=name, label=label, in_graph=True)


def prepared(contender: Contender, problem: Problem) -> Step:
    """The contender's step for a problem, captured in a CUDA graph if it is to be."""
    step = contender.load()(problem)
    if not contender.in_graph:
        return step
    from benchmarks.common.timers import CudaTimer

    captured = CudaTimer().captured(lambda _: step.run(), 1)

    def replay() -> object:
        captured(0)
        return captured.output

    return replace(step, run=replay)
