"""fastmeta itself: MAML by the engine it picks, through autograd, by the functional engine; hvp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fastmeta as fm
from benchmarks.peers.modules import TASKS, TorchProblem, read_meta, read_product
from benchmarks.peers.step import Problem, Step


def facts_of(explanation: str) -> dict[str, str]:
    info = fm.build_info()
    native = "compiled" if info["native"] else f"plain PyTorch: {info['reason']}"
    return {"fastmeta": f"{fm.__version__}, {native}", "engine": explanation}


def learner(setting: TorchProblem, **options: Any) -> tuple[fm.MAML, list[Tensor]]:
    workload = setting.workload
    maml = fm.MAML(setting.loaded(), workload.lr, workload.steps, loss=setting.loss, **options)
    return maml, [setting.data[name] for name in TASKS]


def _as_values(problem: Problem, **options: Any) -> Step:
    setting = TorchProblem(problem)
    maml, tasks = learner(setting, **options)

    def run() -> tuple[Tensor, list[Tensor]]:
        result = maml.meta_gradient(*tasks)
        return result.loss, [result.grads]

    return setting.step(run, read_meta, **facts_of(maml.explain()))


def chosen(problem: Problem) -> Step:
    """Loss and gradient as values, as torch.func and JAX give them, by the engine MAML picks."""
    return _as_values(problem, cuda_graph=False)


def replayed(problem: Problem) -> Step:
    """The same from MAML's own CUDA graph, with its label checks and copies."""
    return _as_values(problem, cuda_graph=True)


def _by_autograd(problem: Problem, **options: Any) -> Step:
    """`meta_loss` and `backward`, which leaves the gradients in `.grad`."""
    setting = TorchProblem(problem)
    maml, tasks = learner(setting, **options)
    params = list(maml.module.parameters())

    def run() -> tuple[Tensor, list[Tensor]]:
        for p in params:
            p.grad = None
        loss, _ = maml.meta_loss(*tasks)
        loss.backward()
        return loss, [p.grad for p in params]

    return setting.step(run, read_meta, **facts_of(maml.explain()))


def autograd(problem: Problem) -> Step:
    return _by_autograd(problem, cuda_graph=False)


def functional(problem: Problem) -> Step:
    return _by_autograd(problem, engine="functional")


def hvp_chosen(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    maml = fm.MAML(setting.module, loss=setting.loss)
    vector, x, y = (setting.data[name] for name in ("vector", "x", "y"))

    def run() -> list[Tensor]:
        return [maml.hvp(setting.theta, (x, y), vector)]

    return setting.step(run, read_product, **facts_of(maml.explain()))


def hvp_functional(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    params, v = setting.split(setting.theta), setting.split(setting.data["vector"])
    x, y = setting.data["x"], setting.data["y"]

    def run() -> list[Tensor]:
        return list(fm.hvp(setting.loss_of, params, v, x, y).values())

    return setting.step(run, read_product, **facts_of("fm.hvp, reverse over reverse"))
