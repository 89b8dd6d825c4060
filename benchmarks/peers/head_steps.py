"""ANIL's meta-step on features: a linear head adapted to each task, and gradients to all it sees.

A result is the loss, and the gradients to weight, bias, and the features of support and queries,
[T, S, D] and [T, Q, D] or a list of a tensor a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

import fastmeta as fm
from benchmarks.common.workloads import Arrays
from benchmarks.peers.fastmeta_steps import facts_of
from benchmarks.peers.library_steps import LIBRARIES
from benchmarks.peers.modules import TASKS, TorchProblem, read_meta
from benchmarks.peers.step import Problem, Step
from benchmarks.peers.torch_steps import by_task_loss, compiled, unrolled_loss

Features = Tensor | Sequence[Tensor]
Result = tuple[Tensor, Sequence[Tensor], Features, Features]


def _read(result: Result) -> Arrays:
    loss, gradients, *features = result
    arrays = read_meta((loss, gradients))
    for name, x in zip(("support", "query"), features, strict=True):
        rows = x if isinstance(x, Tensor) else torch.stack(list(x))
        arrays[name] = rows.detach().double().cpu().numpy()
    return arrays


def anil(problem: Problem) -> Step:
    """The learner on features: its body is the identity."""
    setting = TorchProblem(problem)
    head = setting.loaded()[-1]
    options = {"lr": setting.workload.lr, "steps": setting.workload.steps, "loss": setting.loss}
    learner = fm.ANIL(torch.nn.Identity(), head, **options)
    return _by_meta_loss(setting, learner)


def program(problem: Problem) -> Step:
    """MAML of the head as a module: the task program."""
    setting = TorchProblem(problem)
    options = {"lr": setting.workload.lr, "steps": setting.workload.steps, "loss": setting.loss}
    return _by_meta_loss(setting, fm.MAML(setting.loaded(), **options))


def _by_meta_loss(setting: TorchProblem, learner: fm.MAML | fm.ANIL) -> Step:
    support_x, support_y, query_x, query_y = (setting.data[name] for name in TASKS)
    head = [*learner.module.parameters()]
    leaves = [*head, support_x.requires_grad_(), query_x.requires_grad_()]

    def run() -> Result:
        loss, _ = learner.meta_loss(support_x, support_y, query_x, query_y)
        *gradients, support, query = torch.autograd.grad(loss, leaves)
        return loss, gradients, support, query

    return setting.step(run, _read, **facts_of(learner.explain()))


def linear_head(problem: Problem) -> Step:
    """`fm.linear_head` and `fm.task_linear` under autograd."""
    setting = TorchProblem(problem)
    workload = setting.workload
    support_x, support_y, query_x, query_y = (setting.data[name] for name in TASKS)
    params = [p.requires_grad_() for p in setting.split(setting.theta).values()]
    leaves = [*params, support_x.requires_grad_(), query_x.requires_grad_()]

    def run() -> Result:
        options = {"lr": workload.lr, "steps": workload.steps, "loss": workload.loss}
        weight, bias = fm.linear_head(support_x, support_y, *params, **options)
        logits = fm.task_linear(query_x, weight, bias)
        loss = F.cross_entropy(logits.flatten(0, 1), query_y.flatten())
        weight_grad, bias_grad, *features = torch.autograd.grad(loss, leaves)
        return loss, [weight_grad, bias_grad], *features

    return setting.step(run, _read, **facts_of("linear_head"))


def _whole(problem: Problem, wrap: Callable[[Any], Any]) -> Step:
    setting = TorchProblem(problem)
    function = wrap(grad_and_value(unrolled_loss(setting), (0, 1, 3)))
    params = setting.split(setting.theta)
    tasks = [setting.data[name] for name in TASKS]

    def run() -> Result:
        (gradients, support, query), loss = function(params, *tasks)
        return loss, list(gradients.values()), support, query

    return setting.step(run, _read)


def unrolled(problem: Problem) -> Step:
    return _whole(problem, lambda function: function)


def unrolled_compiled(problem: Problem) -> Step:
    return _whole(problem, compiled)


def _by_task(setting: TorchProblem, params: list[Tensor], task_loss: Any, **facts: str) -> Step:
    """One graph a task; the features of each are leaves of their own."""
    tasks = [
        (sx.clone().requires_grad_(), sy, qx.clone().requires_grad_(), qy)
        for sx, sy, qx, qy in zip(*(setting.data[name] for name in TASKS), strict=True)
    ]
    leaves = [*params, *(task[i] for i in (0, 2) for task in tasks)]

    def run() -> Result:
        for leaf in leaves:
            leaf.grad = None
        total = torch.zeros((), device=setting.device, dtype=setting.dtype)
        for task in tasks:
            loss = task_loss(*task) / len(tasks)
            loss.backward()
            total += loss.detach()
        support, query = ([task[i].grad for task in tasks] for i in (0, 2))
        return total, [p.grad for p in params], support, query

    return setting.step(run, _read, **facts)


def by_task(problem: Problem) -> Step:
    """torch.autograd only: the reference of the others."""
    setting = TorchProblem(problem)
    params = {n: p.requires_grad_() for n, p in setting.split(setting.theta).items()}
    return _by_task(setting, list(params.values()), by_task_loss(setting, params))


def _library(problem: Problem, name: str) -> Step:
    setting = TorchProblem(problem)
    net = setting.loaded()
    task_loss, facts = LIBRARIES[name](setting, net)
    return _by_task(setting, list(net.parameters()), task_loss, **facts)


def learn2learn(problem: Problem) -> Step:
    return _library(problem, "learn2learn")


def higher(problem: Problem) -> Step:
    return _library(problem, "higher")


def torchopt(problem: Problem) -> Step:
    return _library(problem, "torchopt")
