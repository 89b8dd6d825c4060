"""learn2learn, higher and TorchOpt, used as their own examples use them: task by task.

Each task's loss is differentiated as soon as it is computed, which frees its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn

from benchmarks.peers.modules import TorchProblem, read_meta
from benchmarks.peers.step import Problem, Step

TaskLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def loop(
    setting: TorchProblem, net: nn.Module, task_loss: TaskLoss
) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Mean over tasks of `task_loss`, its gradient gathered in the parameters' `.grad`."""
    names = ("support_x", "support_y", "query_x", "query_y")
    tasks = list(zip(*(setting.data[name] for name in names), strict=True))
    params = list(net.parameters())

    def run() -> tuple[Tensor, list[Tensor]]:
        for p in params:
            p.grad = None
        total = torch.zeros((), device=setting.device, dtype=setting.dtype)
        for task in tasks:
            loss = task_loss(*task) / len(tasks)
            loss.backward()
            total += loss.detach()
        return total, [p.grad for p in params]

    return run


Prepared = tuple[TaskLoss, dict[str, str]]  # and the library's version


def _learn2learn(setting: TorchProblem, net: nn.Module) -> Prepared:
    """Import the MAML class of learn2learn, of the package only its module, see `fetch`."""
    from learn2learn._version import __version__
    from learn2learn.algorithms.maml import MAML

    steps = setting.workload.steps
    maml = MAML(net, lr=setting.workload.lr)

    def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(setting.loss(learner(sx), sy))
        return setting.loss(learner(qx), qy)

    return task_loss, {"learn2learn": __version__}


def _higher(setting: TorchProblem, net: nn.Module) -> Prepared:
    import higher

    steps = setting.workload.steps
    inner = torch.optim.SGD(net.parameters(), lr=setting.workload.lr)

    def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(steps):
                optimizer.step(setting.loss(fast(sx), sy))
            return setting.loss(fast(qx), qy)

    return task_loss, {"higher": version("higher")}


def _torchopt(setting: TorchProblem, net: nn.Module) -> Prepared:
    import torchopt

    steps = setting.workload.steps
    inner = torchopt.MetaSGD(net, lr=setting.workload.lr)
    initial = torchopt.extract_state_dict(net, by="reference")
    inner_initial = torchopt.extract_state_dict(inner, by="reference")

    def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        for _ in range(steps):
            inner.step(setting.loss(net(sx), sy))
        loss = setting.loss(net(qx), qy)
        torchopt.recover_state_dict(net, initial)
        torchopt.recover_state_dict(inner, inner_initial)
        return loss

    return task_loss, {"torchopt": version("torchopt")}


LIBRARIES = {"learn2learn": _learn2learn, "higher": _higher, "torchopt": _torchopt}


def _step(problem: Problem, name: str) -> Step:
    setting = TorchProblem(problem)
    net = setting.loaded()
    task_loss, facts = LIBRARIES[name](setting, net)
    return setting.step(loop(setting, net, task_loss), read_meta, **facts)


def learn2learn(problem: Problem) -> Step:
    return _step(problem, "learn2learn")


def higher(problem: Problem) -> Step:
    return _step(problem, "higher")


def torchopt(problem: Problem) -> Step:
    return _step(problem, "torchopt")
