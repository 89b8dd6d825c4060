"""fastmeta itself: MAML with the engine it picks and with the functional engine, and `hvp`."""

from __future__ import annotations

from torch import Tensor

import fastmeta as fm
from benchmarks.peers.modules import TorchProblem, read_meta, read_product
from benchmarks.peers.step import Problem, Step


def _facts(explanation: str) -> dict[str, str]:
    info = fm.build_info()
    native = "compiled" if info["native"] else f"plain PyTorch: {info['reason']}"
    return {"fastmeta": f"{fm.__version__}, {native}", "engine": explanation}


def _meta(problem: Problem, **options: str) -> Step:
    setting, workload = TorchProblem(problem), problem.workload
    net = setting.loaded()
    maml = fm.MAML(net, workload.lr, workload.steps, loss=setting.loss, **options)
    tasks = [setting.data[name] for name in ("support_x", "support_y", "query_x", "query_y")]
    params = list(net.parameters())

    def run() -> tuple[Tensor, list[Tensor]]:
        for p in params:
            p.grad = None
        loss, _ = maml.meta_loss(*tasks)
        loss.backward()
        return loss, [p.grad for p in params]

    return setting.step(run, read_meta, **_facts(maml.explain()))


def chosen(problem: Problem) -> Step:
    """The engine that MAML picks."""
    return _meta(problem)


def functional(problem: Problem) -> Step:
    return _meta(problem, engine="functional")


def hvp_chosen(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    maml = fm.MAML(setting.module, loss=setting.loss)
    vector, x, y = (setting.data[name] for name in ("vector", "x", "y"))

    def run() -> list[Tensor]:
        return [maml.hvp(setting.theta, (x, y), vector)]

    return setting.step(run, read_product, **_facts(maml.explain()))


def hvp_functional(problem: Problem) -> Step:
    setting = TorchProblem(problem)
    params, v = setting.split(setting.theta), setting.split(setting.data["vector"])
    x, y = setting.data["x"], setting.data["y"]

    def run() -> list[Tensor]:
        return list(fm.hvp(setting.loss_of, params, v, x, y).values())

    return setting.step(run, read_product, **_facts("fm.hvp, reverse over reverse"))
