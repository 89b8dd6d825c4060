"""Meta-gradients where a task adapts some of the parameters: CAVIA, LoRA.

Every contender gives the gradient of the learned parameters, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from benchmarks.peers.fastmeta_steps import facts_of, learner
from benchmarks.peers.library_steps import loop
from benchmarks.peers.modules import TASKS, Params, TorchProblem, over_tasks, read_meta
from benchmarks.peers.step import Problem, Step
from benchmarks.peers.torch_steps import compiled


class _Some:
    """A problem, and which of its parameters are adapted, learned and constant, by name."""

    def __init__(self, problem: Problem) -> None:
        self.setting = TorchProblem(problem)
        self.net = self.setting.loaded()
        named, network = dict(self.net.named_parameters()), problem.workload.network
        for parameter, learns in zip(named.values(), network.learned, strict=True):
            parameter.requires_grad_(learns)
        pairs = zip(named, network.adapted, strict=True)
        self.adapted = [name for name, adapts in pairs if adapts]
        self.learned = [name for name, p in named.items() if p.requires_grad]
        self.tasks = [self.setting.data[name] for name in TASKS]

    def ordered(self, grads: Params) -> list[Tensor]:
        return [grads[name] for name in self.learned]


def _as_values(problem: Problem, engine: str) -> Step:
    some = _Some(problem)
    maml, tasks = learner(some.setting, adapt=some.adapted, engine=engine, cuda_graph=False)

    def run() -> tuple[Tensor, list[Tensor]]:
        result = maml.meta_gradient(*tasks)
        grads = {**maml.layout.views(result.grads), **result.shared_grads}
        return result.loss, some.ordered(grads)

    return some.setting.step(run, read_meta, **facts_of(maml.explain()))


def values(problem: Problem) -> Step:
    return _as_values(problem, "auto")


def functional(problem: Problem) -> Step:
    return _as_values(problem, "functional")


def _unrolled(some: _Some) -> Any:
    """(learned parameters, constants, *tasks) -> their gradients and the meta-loss."""
    setting, workload = some.setting, some.setting.workload

    def task_loss(params: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        def inner(own: Params) -> Tensor:
            return setting.loss_of({**params, **own}, sx, sy)

        own = {name: params[name] for name in some.adapted}
        for _ in range(workload.steps):
            gradients = grad(inner)(own)
            own = {name: p - workload.lr * gradients[name] for name, p in own.items()}
        return setting.loss_of({**params, **own}, qx, qy)

    of_all = over_tasks(task_loss, workload.tasks, (None, 0, 0, 0, 0))
    return grad_and_value(
        lambda learned, fixed, *tasks: of_all({**fixed, **learned}, *tasks).mean()
    )


def _of_function(problem: Problem, wrap: Callable[[Any], Any]) -> Step:
    some = _Some(problem)
    named = {name: p.detach() for name, p in some.net.named_parameters()}
    learned = {name: named[name] for name in some.learned}
    fixed = {name: p for name, p in named.items() if name not in learned}
    function = wrap(_unrolled(some))

    def run() -> tuple[Tensor, list[Tensor]]:
        gradients, loss = function(learned, fixed, *some.tasks)
        return loss, some.ordered(gradients)

    return some.setting.step(run, read_meta)


def unrolled(problem: Problem) -> Step:
    return _of_function(problem, lambda function: function)


def unrolled_compiled(problem: Problem) -> Step:
    return _of_function(problem, compiled)


def by_task(problem: Problem) -> Step:
    """One graph a task: the reference of the others."""
    some = _Some(problem)
    setting, params = some.setting, dict(some.net.named_parameters())

    def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        own = {name: params[name] for name in some.adapted}
        for _ in range(setting.workload.steps):
            loss = setting.loss_of({**params, **own}, sx, sy)
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            pairs = zip(own.items(), grads, strict=True)
            own = {name: p - setting.workload.lr * g for (name, p), g in pairs}
        return setting.loss_of({**params, **own}, qx, qy)

    return setting.step(_looped(some, task_loss), read_meta)


def _looped(some: _Some, task_loss: Any) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    run_loop = loop(some.setting, some.net, task_loss)
    params = dict(some.net.named_parameters())

    def run() -> tuple[Tensor, list[Tensor]]:
        loss, _ = run_loop()
        return loss, [params[name].grad for name in some.learned]

    return run


def higher(problem: Problem) -> Step:
    import higher as library

    some = _Some(problem)
    setting, params = some.setting, dict(some.net.named_parameters())
    inner = torch.optim.SGD([params[name] for name in some.adapted], lr=setting.workload.lr)

    def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        with library.innerloop_ctx(some.net, inner, copy_initial_weights=False) as (
            fast,
            optimizer,
        ):
            for _ in range(setting.workload.steps):
                optimizer.step(setting.loss(fast(sx), sy))
            return setting.loss(fast(qx), qy)

    return setting.step(_looped(some, task_loss), read_meta, higher=version("higher"))
