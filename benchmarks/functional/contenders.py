"""The meta-gradient of a case: by the functional engine, and in plain PyTorch in three ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import fastmeta as fm
from benchmarks.functional.networks import Case
from benchmarks.peers.modules import Params
from benchmarks.peers.torch_steps import adjoint_of, by_task_loss, unrolled_of

OURS = "fastmeta"
LEAST_MEMORY = "fastmeta, least memory"
FASTMETA = OURS, LEAST_MEMORY
Gradient = tuple[Tensor, Tensor]  # meta-loss, its gradient [P]


class Problem:
    """A case with its module and data, in the form of the plain PyTorch steps."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.workload = case
        self.module = case.network().to(dtype)
        self.tasks = [x.to(dtype) if x.is_floating_point() else x for x in case.draw()]
        self.params: Params = dict(self.module.named_parameters())

    def loss_of(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one task."""
        return self.workload.loss(functional_call(self.module, params, (x,)), y)


def functional(problem: Problem, **options: Any) -> Callable[[], Gradient]:
    case = problem.workload
    learner = fm.MAML(
        problem.module, case.lr, case.steps, loss=case.loss, engine="functional", **options
    )

    def run() -> Gradient:
        found = learner.meta_gradient(*problem.tasks)
        return found.loss, found.grads

    return run


def least_memory(problem: Problem) -> Callable[[], Gradient]:
    return functional(problem, task_chunk=1, memory="recompute")


def _joined(grads: Any) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def _by_name(problem: Problem, function: Any) -> Callable[[], Gradient]:
    """A step of a function of parameters by name and tasks."""
    params = {name: p.detach() for name, p in problem.params.items()}

    def run() -> Gradient:
        grads, loss = function(params, *problem.tasks)
        return loss, _joined(grads.values())

    return run


def adjoint(problem: Problem) -> Callable[[], Gradient]:
    return _by_name(problem, torch.no_grad()(adjoint_of(problem)))


def unrolled(problem: Problem) -> Callable[[], Gradient]:
    return _by_name(problem, unrolled_of(problem))


def task_loop(problem: Problem) -> Callable[[], Gradient]:
    """One unrolled graph a task, as the libraries that loop over tasks make it."""
    task_loss = by_task_loss(problem, problem.params)

    def run() -> Gradient:
        for p in problem.params.values():
            p.grad = None
        losses = []
        for task in zip(*problem.tasks, strict=True):
            loss = task_loss(*task) / len(problem.tasks[0])
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum(), _joined(p.grad for p in problem.params.values())

    return run


CONTENDERS: dict[str, Callable[[Problem], Callable[[], Gradient]]] = {
    OURS: functional,
    LEAST_MEMORY: least_memory,
    "adjoint": adjoint,
    "vmap(grad)": unrolled,
    "task loop": task_loop,
}
