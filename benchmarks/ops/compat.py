"""learn2learn and higher against their stand-ins in fastmeta.compat, and against `meta_loss`.

    .venv-bench/bin/python -m benchmarks.ops.compat [--rounds 15] [--threads 1]

in the environment of `make bench-env`. Prints the library's time for the gradient of the mean loss
of 20 tasks, as a multiple of the stand-in's time and of `meta_loss`'s time; all take turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import higher
import torch
import torch.nn.functional as F
from learn2learn.algorithms import maml, meta_sgd
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.compat import higher as higher_stand_in
from fastmeta.compat.learn2learn import algorithms as stand_in
from fastmeta.training.timing import interleave

TASKS = 20


@dataclass(frozen=True)
class Setting:
    net: nn.Module
    tasks: tuple[Tensor, ...]  # support_x, support_y, query_x, query_y, each [T, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    steps: int


def sinusoids() -> Setting:
    episodes = fm.data.Episodes(fm.data.Sinusoid(), ways=1, shots=10, queries=10, tasks=TASKS)
    return Setting(fm.models.MLP([1, 40, 40, 1]), episodes[0], F.mse_loss, lr=0.01, steps=5)


def images() -> Setting:
    labels = torch.arange(5).repeat(TASKS, 1)
    support, query = torch.randn(TASKS, 5, 1, 28, 28), torch.randn(TASKS, 25, 1, 28, 28)
    tasks = support, labels, query, labels.repeat(1, 5)
    return Setting(fm.models.Conv4(hidden=32, ways=5), tasks, F.cross_entropy, lr=0.1, steps=1)


SETTINGS = {
    "20 sinusoids, MLP 1-40-40-1, 10 examples, 5 steps": sinusoids,
    "20 tasks of 28 x 28 images, Conv4-32, 5-way 1-shot, 1 step": images,
}


def cloned(setting: Setting, learner: nn.Module) -> Callable[[], None]:
    """learn2learn's loop: a clone a task."""

    def run() -> None:
        for support_x, support_y, query_x, query_y in zip(*setting.tasks, strict=True):
            clone = learner.clone()
            for _ in range(setting.steps):
                clone.adapt(setting.loss(clone(support_x), support_y))
            (setting.loss(clone(query_x), query_y) / TASKS).backward()

    return run


def patched(setting: Setting, library, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """higher's loop: a context a task."""

    def run() -> None:
        for support_x, support_y, query_x, query_y in zip(*setting.tasks, strict=True):
            context = library.innerloop_ctx(setting.net, optimizer, copy_initial_weights=False)
            with context as (net, inner):
                for _ in range(setting.steps):
                    inner.step(setting.loss(net(support_x), support_y))
                (setting.loss(net(query_x), query_y) / TASKS).backward()

    return run


def all_tasks(setting: Setting, learner: nn.Module) -> Callable[[], None]:
    return lambda: learner.meta_loss(*setting.tasks)[0].backward()


def contenders(setting: Setting) -> dict[str, Callable[[], None]]:
    """Calls by row and column of the table: "library", "stand-in" and, if any, "fast"."""
    net, lr, K, loss = setting.net, setting.lr, setting.steps, setting.loss
    sgd, adam = torch.optim.SGD(net.parameters(), lr), torch.optim.Adam(net.parameters(), lr)
    return {
        "learn2learn, `MAML`/library": cloned(setting, maml.MAML(net, lr)),
        "learn2learn, `MAML`/stand-in": cloned(setting, stand_in.MAML(net, lr)),
        "learn2learn, `MAML`/fast": all_tasks(setting, fm.MAML(net, lr, K, loss=loss)),
        "learn2learn, `MetaSGD`/library": cloned(setting, meta_sgd.MetaSGD(net, lr)),
        "learn2learn, `MetaSGD`/stand-in": cloned(setting, stand_in.MetaSGD(net, lr)),
        "learn2learn, `MetaSGD`/fast": all_tasks(setting, fm.MetaSGD(net, lr, steps=K, loss=loss)),
        "higher, SGD/library": patched(setting, higher, sgd),
        "higher, SGD/stand-in": patched(setting, higher_stand_in, sgd),
        "higher, SGD/fast": all_tasks(setting, fm.MAML(net, lr, K, loss=loss)),
        "higher, Adam/library": patched(setting, higher, adam),
        "higher, Adam/stand-in": patched(setting, higher_stand_in, adam),
        "higher, Adam/fast": all_tasks(
            setting, fm.MAML(net, lr, K, loss=loss, rule=fm.rules.Adam())
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.compat", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name, make in SETTINGS.items():
        taken = interleave(contenders(make()), options.rounds)
        times = {key: statistics.median(seconds) for key, seconds in taken.items()}
        print(f"{name}\n\n| | the stand-in | `meta_loss` |\n| --- | --- | --- |")
        for row in dict.fromkeys(key.split("/")[0] for key in times):
            library = times[f"{row}/library"]
            ratios = (
                f"{library / times[f'{row}/{column}']:.2f}" for column in ("stand-in", "fast")
            )
            print(f"| {row} | {' | '.join(ratios)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
