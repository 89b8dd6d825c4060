"""Measures of task programs for `benchmarks.gpu.ops`: meta-steps, Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from benchmarks.common.networks import MLP, Network
from benchmarks.common.workloads import Workload
from benchmarks.gpu.measure import OURS, Contender, Inputs, Measure, in_torch
from fastmeta.core.backend import PROGRAM, is_native
from fastmeta.engines.program.lowering import Lowering
from fastmeta.ops.task_program import COMPILED, reference

LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def op(name: str, theta: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The op of the requested backend."""
    return getattr(COMPILED if is_native(PROGRAM, theta) else reference, name)


def meta_step(steps: int) -> Contender:
    """Meta-loss and meta-gradient."""

    def run(code: Tensor, theta: Tensor, *rest: Tensor) -> Inputs:
        options = ([], steps, False, True, True, False, False, False)
        loss, _, gradient, *_ = op("meta_gradient", theta)(code, theta, *rest, *options)
        return loss, gradient

    return run


def product(code: Tensor, theta: Tensor, *rest: Tensor) -> Inputs:
    return op("hvp", theta)(code, theta, *rest, False)[:1]


def module(network: Network) -> nn.Module:
    if isinstance(network, MLP):
        return fm.models.MLP(list(network.sizes))
    return fm.models.Conv4(network.hidden, network.ways, network.channels, network.image_size)


def draw(workload: Workload) -> Callable[[torch.Generator], Inputs]:
    network = workload.network

    def examples(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        shape, device = (workload.tasks, count), generator.device
        x = torch.randn(*shape, *network.input_shape, generator=generator, device=device)
        if workload.loss == "mse":
            return x, torch.randn(*shape, network.outputs, generator=generator, device=device)
        return x, torch.randint(network.outputs, shape, generator=generator, device=device)

    def inputs(generator: torch.Generator) -> Inputs:
        net = module(network).to(generator.device)
        program = Lowering(net, LOSSES[workload.loss]).program(network.input_shape)
        theta = program.layout.flatten(dict(net.named_parameters())).detach()
        fixed = (program.code, theta, theta.new_empty(0))
        support = examples(generator, workload.support)
        if workload.kind == "hvp":
            shape = (workload.tasks, theta.numel())
            return *fixed, *support, torch.randn(shape, generator=generator, device=theta.device)
        lr = theta.new_full((1, 1, 1), workload.lr)
        return *fixed, lr, *support, *examples(generator, workload.queries)

    return inputs


def programs(workloads: Sequence[Workload], rounds: int, calls: int) -> Iterator[Measure]:
    """Measures of each program against the reference in plain PyTorch, and in a CUDA graph."""
    for workload in workloads:
        ours = product if workload.kind == "hvp" else meta_step(workload.steps)
        what = "Hessian-vector product" if workload.kind == "hvp" else "meta-step"
        for in_graph in (True, False):
            plain = {} if in_graph else {"torch backend": in_torch(ours)}
            yield Measure(
                *(PROGRAM, workload.name, what, torch.float32, {OURS: ours, **plain}),
                draw(workload),
                rounds,
                calls,
                in_graph,
                flops=workload.flops,
            )


def image_programs(workloads: Sequence[Workload], rounds: int) -> Iterator[Measure]:
    """Meta-steps in a CUDA graph, with convolutions in TF32 and in float32."""
    for workload in workloads:
        for tf32 in (True, False):
            yield Measure(
                *(PROGRAM, workload.name, "meta-step", torch.float32),
                {OURS: meta_step(workload.steps)},
                draw(workload),
                rounds,
                calls=2,
                in_graph=True,
                flops=workload.flops,
                tf32=tf32,
                jumps=True,
            )
