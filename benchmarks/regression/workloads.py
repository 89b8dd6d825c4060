"""The workloads of the regression run, by the public interface of fastmeta only.

Both revisions run this one file, whatever the layout of their modules. A step of a learner is its
whole meta-step; a step of an op is its forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastmeta as fm
from benchmarks.common.workloads import WORKLOADS as SIZES
from benchmarks.common.workloads import draw
from benchmarks.peers import fastmeta_steps, head_steps
from benchmarks.peers.modules import TASKS, TorchProblem
from benchmarks.peers.step import Build, Problem

Step = Callable[[], object]

QUERIES, WAYS, FEATURES = 300, 60, 64  # of proto_small: 60-way episodes, 5 queries a class
PIXELS = 784


def _problem(name: str) -> Problem:
    return Problem(SIZES[name], draw(SIZES[name]))


def _of_peers(build: Build, name: str) -> Step:
    """The step that the comparison with the peers times."""
    return build(_problem(name)).run


def _iteration() -> Step:
    """A whole iteration of a training loop: loss, backward, and a step of PyTorch's Adam."""
    setting = TorchProblem(_problem("sin1"))
    sizes = setting.workload
    learner = fm.MAML(setting.loaded(), sizes.lr, sizes.steps, loss=setting.loss)
    # Its steps have no length, so that every iteration does the same.
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.0)
    tasks = [setting.data[name] for name in TASKS]

    def run() -> Tensor:
        optimizer.zero_grad()
        loss, _ = learner.meta_loss(*tasks)
        loss.backward()
        optimizer.step()
        return loss

    return run


def _adapt_tasks() -> Step:
    """The adaptation to the support and the outputs on the queries, without a meta-gradient."""
    setting = TorchProblem(_problem("omni_mlp"))
    sizes = setting.workload
    learner = fm.MAML(setting.loaded(), sizes.lr, sizes.steps, loss=setting.loss)
    support_x, support_y, query_x, _ = (setting.data[name] for name in TASKS)

    @torch.no_grad()
    def run() -> Tensor:
        return learner.adapt_tasks(support_x, support_y)(query_x)

    return run


def _rows(tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, labels and prototypes; of norm 1, as embeddings of a network in training."""
    generator = torch.Generator().manual_seed(0)
    query, prototypes = (
        (torch.randn(tasks, count, FEATURES, generator=generator) / FEATURES**0.5).requires_grad_()
        for count in (QUERIES, WAYS)
    )
    labels = torch.randint(WAYS, (tasks, QUERIES), generator=generator)
    return query, labels, prototypes


def _prototype_loss(tasks: int) -> Step:
    query, labels, prototypes = _rows(tasks)

    def run() -> tuple[Tensor, ...]:
        loss = fm.prototype_loss(query, labels, prototypes)
        return torch.autograd.grad(loss, (query, prototypes))

    return run


def _pairwise_distance() -> Step:
    query, _, prototypes = _rows(32)
    upstream = torch.ones(32, QUERIES, WAYS)

    def run() -> tuple[Tensor, ...]:
        distance = fm.pairwise_distance(query, prototypes)
        return torch.autograd.grad(distance, (query, prototypes), upstream)

    return run


def _protonet() -> Step:
    generator = torch.Generator().manual_seed(0)
    encoder = torch.nn.Linear(PIXELS, FEATURES)
    learner = fm.ProtoNet(encoder)
    x = torch.rand(1, QUERIES, PIXELS, generator=generator)
    y = (torch.arange(QUERIES) % WAYS).unsqueeze(0)

    def run() -> Tensor:
        encoder.zero_grad()
        loss, _ = learner.meta_loss(x, y, x, y, num_classes=WAYS)
        loss.backward()
        return loss

    return run


def _inner_update() -> Step:
    """A tree of parameters of every task, and a learned step size."""
    setting = TorchProblem(_problem("omni_mlp"))
    params = setting.split(setting.theta.repeat(setting.workload.tasks, 1))
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    lr = torch.tensor(setting.workload.lr, requires_grad=True)
    leaves = [p.requires_grad_() for p in params.values()]

    def run() -> tuple[Tensor, ...]:
        updated = fm.inner_update(params, grads, lr)
        return torch.autograd.grad(list(updated.values()), [*leaves, lr], list(grads.values()))

    return run


WORKLOADS: dict[str, Callable[[], Step]] = {
    "sin1_t1": partial(_of_peers, fastmeta_steps.chosen, "sin1_t1"),
    "sin1": partial(_of_peers, fastmeta_steps.chosen, "sin1"),
    "sin1_iteration": _iteration,
    "sin1_backward": partial(_of_peers, fastmeta_steps.autograd, "sin1"),
    "sin1_functional": partial(_of_peers, fastmeta_steps.functional, "sin1"),
    "omni_mlp": partial(_of_peers, fastmeta_steps.chosen, "omni_mlp"),
    "omni_conv1": partial(_of_peers, fastmeta_steps.chosen, "omni_conv1"),
    "anil": partial(_of_peers, head_steps.anil, "anil"),
    "linear_head": partial(_of_peers, head_steps.linear_head, "anil_640"),
    "adapt_tasks": _adapt_tasks,
    "hvp": partial(_of_peers, fastmeta_steps.hvp_functional, "hvp_mlp_t1"),
    "proto_small": partial(_prototype_loss, 1),
    "prototype_loss": partial(_prototype_loss, 32),
    "protonet": _protonet,
    "pairwise_distance": _pairwise_distance,
    "inner_update": _inner_update,
}
