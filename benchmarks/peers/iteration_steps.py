"""Whole training iterations: an episode, the meta-loss, its gradient, and a step of Adam.

Every contender draws the same episode with NumPy and hands it to its framework. Adam's steps have
no length, so that all iterations do the same and their results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.common.workloads import draw_episode
from benchmarks.peers.fastmeta_steps import facts_of, learner
from benchmarks.peers.library_steps import LIBRARIES, loop
from benchmarks.peers.modules import TASKS, TorchProblem, read_meta
from benchmarks.peers.step import Problem, Step
from benchmarks.peers.torch_steps import Meta, adjoint_of, compiled, unrolled_of

Gradient = Callable[[], tuple[Tensor, list[Tensor]]]  # the loss, and what is in `.grad` afterwards


def _iteration(
    setting: TorchProblem, params: Sequence[Tensor], gradient: Gradient, **facts: str
) -> Step:
    """`gradient` on a new episode, then a step of the optimizer."""
    optimizer = torch.optim.Adam(params, lr=0.0, fused=True)

    def run() -> tuple[Tensor, list[Tensor]]:
        for name, array in draw_episode(setting.workload).items():
            setting.data[name].copy_(torch.from_numpy(array))
        result = gradient()
        optimizer.step()
        return result

    return setting.step(run, read_meta, **facts)


def _of_fastmeta(problem: Problem, by_values: bool) -> Step:
    setting = TorchProblem(problem)
    maml, tasks = learner(setting)
    params = list(maml.parameters())

    def gradient() -> tuple[Tensor, list[Tensor]]:
        if by_values:
            result = maml.meta_gradient(*tasks)
            result.assign_to(maml)
            return result.loss, [p.grad for p in params]
        for p in params:
            p.grad = None
        loss, _ = maml.meta_loss(*tasks)
        loss.backward()
        return loss, [p.grad for p in params]

    return _iteration(setting, params, gradient, **facts_of(maml.explain()))


def autograd(problem: Problem) -> Step:
    """`meta_loss` and `backward` of fastmeta."""
    return _of_fastmeta(problem, by_values=False)


def values(problem: Problem) -> Step:
    """`meta_gradient` of fastmeta, assigned to the parameters."""
    return _of_fastmeta(problem, by_values=True)


def _of_library(problem: Problem, name: str) -> Step:
    setting = TorchProblem(problem)
    net = setting.loaded()
    task_loss, facts = LIBRARIES[name](setting, net)
    return _iteration(setting, list(net.parameters()), loop(setting, net, task_loss), **facts)


def learn2learn(problem: Problem) -> Step:
    return _of_library(problem, "learn2learn")


def higher(problem: Problem) -> Step:
    return _of_library(problem, "higher")


def torchopt(problem: Problem) -> Step:
    return _of_library(problem, "torchopt")


def _of_function(problem: Problem, of: Callable[[TorchProblem], Meta]) -> Step:
    setting = TorchProblem(problem)
    function, theta = compiled(of(setting)), setting.split(setting.theta)
    params = {name: nn.Parameter(p) for name, p in theta.items()}
    plain = {name: p.detach() for name, p in params.items()}
    tasks = [setting.data[name] for name in TASKS]

    def gradient() -> tuple[Tensor, list[Tensor]]:
        gradients, loss = function(plain, *tasks)
        for name, p in params.items():
            p.grad = gradients[name]
        return loss, list(gradients.values())

    return _iteration(setting, list(params.values()), gradient)


def unrolled_compiled(problem: Problem) -> Step:
    return _of_function(problem, unrolled_of)


def adjoint_compiled(problem: Problem) -> Step:
    return _of_function(problem, adjoint_of)
