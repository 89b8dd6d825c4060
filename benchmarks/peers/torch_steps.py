"""Steps in plain PyTorch: torch.func, torch.compile, the adjoint, double-backward products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp

from benchmarks.common.workloads import Arrays
from benchmarks.peers.modules import (
    TASKS,
    Params,
    TorchProblem,
    over_tasks,
    read_meta,
    read_product,
)
from benchmarks.peers.step import Problem, Step

Meta = Any  # (theta by name, *tasks) -> (gradients by name, meta-loss)


def _product(problem: TorchProblem) -> Any:
    """One task's Hessian-vector product, reverse over reverse: the gradient of <gradient, v>."""

    def product(params: Params, v: Params, x: Tensor, y: Tensor) -> Params:
        return vjp(lambda p: grad(problem.loss_of)(p, x, y), params)[1](v)[0]

    return product


def unrolled_loss(problem: TorchProblem) -> Any:
    """(theta by name, *tasks) -> meta-loss, by vmap(grad) through K unrolled steps."""
    workload = problem.workload

    def task_loss(params: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        for _ in range(workload.steps):
            gradients = grad(problem.loss_of)(params, sx, sy)
            params = {name: p - workload.lr * gradients[name] for name, p in params.items()}
        return problem.loss_of(params, qx, qy)

    of_all = over_tasks(task_loss, workload.tasks, (None, 0, 0, 0, 0))
    return lambda params, *tasks: of_all(params, *tasks).mean()


def unrolled_of(problem: TorchProblem) -> Meta:
    """Differentiate the unrolled loss."""
    return grad_and_value(unrolled_loss(problem))


def adjoint_of(problem: TorchProblem) -> Meta:
    """The adjoint: one Hessian-vector product a step, reverse over reverse, no unrolled graph."""
    workload, tasks = problem.workload, problem.workload.tasks

    def gradient(shared: bool, params: Params, x: Tensor, y: Tensor) -> Params:
        dims = (None if shared else 0, 0, 0)
        return over_tasks(grad(problem.loss_of), tasks, dims)(params, x, y)

    def run(theta: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Any:
        path = [theta]
        for k in range(workload.steps):
            g = gradient(k == 0, path[k], sx, sy)
            path.append({name: p - workload.lr * g[name] for name, p in path[k].items()})
        dims = (0 if workload.steps else None, 0, 0)
        v, losses = over_tasks(grad_and_value(problem.loss_of), tasks, dims)(path[-1], qx, qy)
        for k in reversed(range(workload.steps)):
            dims = (0 if k else None, 0, 0, 0)
            scaled = {name: workload.lr * u for name, u in v.items()}
            hv = over_tasks(_product(problem), tasks, dims)(path[k], scaled, sx, sy)
            v = {name: u - hv[name] for name, u in v.items()}
        return {name: u.mean(0) for name, u in v.items()}, losses.mean()

    return run


def _meta_step(problem: TorchProblem, function: Meta) -> Step:
    params = problem.split(problem.theta)
    tasks = [problem.data[name] for name in TASKS]

    def run() -> tuple[Tensor, list[Tensor]]:
        gradients, loss = function(params, *tasks)
        return loss, list(gradients.values())

    return problem.step(run, read_meta)


def compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def unrolled(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _meta_step(setting, unrolled_of(setting))


def unrolled_compiled(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _meta_step(setting, compiled(unrolled_of(setting)))


def adjoint(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _meta_step(setting, torch.no_grad()(adjoint_of(setting)))


def adjoint_compiled(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _meta_step(setting, compiled(adjoint_of(setting)))


def by_task_loss(problem: TorchProblem, params: Params) -> Any:
    """A task's loss after K steps from `params`, with an unrolled graph of torch.autograd."""
    workload = problem.workload

    def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        fast = params
        for _ in range(workload.steps):
            loss = problem.loss_of(fast, sx, sy)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            pairs = zip(fast.items(), gradients, strict=True)
            fast = {name: p - workload.lr * g for (name, p), g in pairs}
        return problem.loss_of(fast, qx, qy)

    return task_loss


def by_task(problem: Problem) -> Step:
    """One graph a task: the reference of the others."""
    setting = TorchProblem(problem)
    task_loss = by_task_loss(setting, setting.split(setting.theta.requires_grad_()))
    tasks = list(zip(*(setting.data[name] for name in TASKS), strict=True))

    def run() -> tuple[Tensor, list[Tensor]]:
        setting.theta.grad = None
        losses = []
        for task in tasks:
            loss = task_loss(*task) / len(tasks)
            loss.backward(retain_graph=True)  # theta's own pieces are every task's
            losses.append(loss.detach())
        return torch.stack(losses).sum(), [setting.theta.grad]

    return setting.step(run, read_meta)


# Hessian-vector products


def _gradients(problem: TorchProblem) -> Any:
    return over_tasks(grad(problem.loss_of), problem.workload.tasks)


def _reverse(problem: TorchProblem) -> Any:
    """The gradient of <gradient, v>; v of one task meets no gradient of another."""
    of_all = _gradients(problem)
    return lambda params, v, x, y: vjp(lambda p: of_all(p, x, y), params)[1](v)[0]


def _forward(problem: TorchProblem) -> Any:
    """The directional derivative of the gradients; vmap outside of jvp does not compile."""
    of_all = _gradients(problem)
    return lambda params, v, x, y: jvp(lambda p: of_all(p, x, y), (params,), (v,))[1]


def _hvp_step(problem: TorchProblem, function: Any) -> Step:
    params, v = problem.split(problem.theta), problem.split(problem.data["vector"])
    x, y = problem.data["x"], problem.data["y"]
    return problem.step(lambda: list(function(params, v, x, y).values()), read_product)


def reverse(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _hvp_step(setting, _reverse(setting))


def forward(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _hvp_step(setting, _forward(setting))


def reverse_compiled(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _hvp_step(setting, compiled(_reverse(setting)))


def forward_compiled(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    return _hvp_step(setting, compiled(_forward(setting)))


def twice(problem: Problem) -> Step:
    """torch.autograd.grad twice, task by task."""
    setting = TorchProblem(problem)
    vectors, x, y = (setting.data[name] for name in ("vector", "x", "y"))
    params = [setting.split(theta.requires_grad_()) for theta in setting.theta.clone()]
    tasks = list(zip(params, map(setting.split, vectors), x, y, strict=True))

    def product(params: Params, v: Params, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        inputs = list(params.values())
        gradient = torch.autograd.grad(setting.loss_of(params, x, y), inputs, create_graph=True)
        return torch.autograd.grad(gradient, inputs, list(v.values()))

    def read(products: list[tuple[Tensor, ...]]) -> Arrays:
        return read_product([torch.stack(rows) for rows in zip(*products, strict=True)])

    return setting.step(lambda: [product(*task) for task in tasks], read)
