# mypy: disallow-untyped-calls, warn-return-any
"""A typed program on the public interface; `test_types.py` type-checks and runs it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

import fastmeta as fm
from fastmeta.data import Episode
from fastmeta.learners import (
    AdaptedHeads,
    AdaptedMatchingNet,
    AdaptedTasks,
    Learner,
    MetaGradient,
)


def ops() -> None:
    x, labels = torch.randn(2, 6, 4), torch.arange(3).repeat(2, 2)
    means = assert_type(fm.prototypes(x, labels, 3), Tensor)
    assert_type(fm.pairwise_distance(x, means, metric="cosine"), Tensor)
    assert_type(fm.pair_scores(x, means, torch.ones(4), activation="abs"), Tensor)
    covariances = assert_type(fm.class_covariances(x, labels, 3), Tensor)
    assert_type(fm.mahalanobis_distance(x, means, covariances), Tensor)
    assert_type(fm.nearest(x, means, k=2), tuple[Tensor, Tensor])
    assert_type(fm.prototype_loss(x, labels, means, reduction="none"), Tensor)
    loss = fm.matching_loss(x, labels, x, labels, scale=torch.tensor(5.0), exclude_self=True)
    assert_type(loss, Tensor)
    assert_type(fm.matching_logits(x, x, labels, 3), Tensor)
    weight, bias = fm.linear_head(x, labels, torch.zeros(3, 4), lr=0.1, steps=2)
    assert_type(weight, Tensor)
    assert_type(bias, Tensor | None)
    assert_type(fm.task_linear(x, weight, bias), Tensor)
    ridge = fm.ridge_head(x, labels, 1.0)
    assert_type(ridge, tuple[Tensor, Tensor | None])
    assert_type(fm.ridge_head(x, labels, 1.0, loo=True), Tensor)
    vector = torch.ones(3, 4)
    product = fm.linear_head_hvp(x, labels, torch.zeros(3, 4), None, vector, None)
    assert_type(product, tuple[Tensor, Tensor | None])
    maps, filters = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 5, 4, 3, 3)
    images = assert_type(fm.task_conv2d(maps, filters, padding="same"), Tensor)
    assert_type(fm.task_batch_norm(images), Tensor)
    assert_type(fm.pair_pool(images, images, pool=2), Tensor)
    assert_type(fm.activation(images, "mish"), Tensor)


def heads() -> None:
    x, labels = torch.randn(2, 6, 4), torch.arange(3).repeat(2, 2)
    every: list[fm.heads.Head] = [fm.heads.SimpleShot(), fm.heads.TIM(2), fm.heads.FEAT(4)]
    for head in every:
        assert_type(head(x, labels, x), Tensor)
        assert_type(head.transductive, bool)
    assert_type(fm.data.Features(x[0], labels[0]).class_names, list[str])


def trees() -> None:
    arena = torch.randn(2, 8)
    assert_type(fm.inner_update(arena, arena, torch.rand(8)), Tensor)
    tree = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    assert_type(fm.inner_update(tree, tree, 0.1), dict[str, Tensor])

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (params["weight"] * x).sum().exp() + params["bias"] ** 2

    assert_type(fm.hvp(loss, tree, tree, torch.rand(2, 3)), dict[str, Tensor])
    assert_type(fm.hvp(lambda p: (p**3).sum(), arena, arena, mode="forward"), Tensor)

    def forward(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return params["weight"] * x + params["bias"]

    def error(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().sum()

    x = torch.rand(2, 3)
    assert_type(fm.ggnvp(forward, error, tree, tree, x, x), dict[str, Tensor])
    assert_type(fm.ggnvp(lambda p, x: p * x, error, arena, arena, arena, arena), Tensor)


def contract() -> None:
    net, head = nn.Linear(3, 2), nn.Linear(2, 2)
    x, y = torch.randn(2, 4, 3), torch.arange(2).repeat(2, 2)
    every: list[Learner] = [fm.MAML(net), fm.Reptile(net), fm.ANIL(net, head), fm.ProtoNet(net)]
    every += [fm.MatchingNet(net), fm.SiameseNet(net, dim=2)]
    every += [fm.RelationNet(net, fm.models.RelationMLP(dim=2, hidden=3))]
    for learner in every:
        assert_type(learner.meta_loss(x, y, x, y), tuple[Tensor, Tensor])
        assert_type(learner.adapt_tasks(x, y)(x), Tensor)
        assert_type(learner.explain(), str)


def learners() -> None:
    episodes = fm.data.Episodes(fm.data.Sinusoid(), ways=1, shots=5, queries=5, tasks=2)
    episode = assert_type(episodes[0], Episode)
    batch = episode.support_x, episode.support_y, episode.query_x, episode.query_y
    maml = fm.MAML(fm.models.MLP([1, 8, 1]), lr=0.01, loss=F.mse_loss)
    loss, outputs = maml.meta_loss(*batch)
    assert_type(loss, Tensor)
    assert_type(outputs, Any)  # as the module gives them
    result = assert_type(maml.meta_gradient(*batch), MetaGradient)
    assert_type(result.lr_grad, Tensor | None)
    adapted = assert_type(maml.adapt_tasks(*batch[:2], steps=3), AdaptedTasks)
    assert_type(adapted(episode.query_x), Any)
    assert_type(adapted.task(0), dict[str, Tensor])
    assert_type(maml.explain(), str)
    assert_type(maml.lr, float | Tensor)
    assert_type(fm.MetaSGD(nn.Linear(1, 1), loss=F.mse_loss).clone(), fm.MetaSGD)
    rule = fm.rules.ClipNorm(1.0, fm.rules.Adam())
    assert_type(fm.MAML(nn.Linear(1, 1), rule=rule).rule, fm.rules.Rule | None)
    anil = fm.ANIL(nn.Identity(), nn.Linear(1, 1), loss=F.mse_loss)
    assert_type(anil.head, nn.Linear)
    assert_type(anil.adapt_tasks(*batch[:2]), AdaptedHeads)


def tasks() -> None:
    net = nn.Linear(3, 2)
    x, y, theta = torch.randn(4, 5, 3), torch.randn(4, 5, 2), torch.randn(4, 8)
    assert_type(fm.task_call(net, theta, x), Any)
    grads, losses, outputs = fm.task_gradient(net, F.mse_loss, {"bias": theta[:, :2]}, x, y)
    assert_type(grads, Tensor)
    maml = fm.MAML(net, 0.1, loss=F.mse_loss, inner_loss=F.l1_loss, adapt=["bias", net])
    assert_type(
        maml.meta_loss(x, y, x, y, start=theta, support_weight=losses.expand(5, 4).T)[0], Tensor
    )
    assert_type(maml.task_gradients(x, y, x, y), Tensor)
    assert_type(maml.adapt_tasks(x, y, start={"bias": theta[:, :2]}).as_module(0), nn.Module)
    tokens = outputs.detach().unsqueeze(1)
    assert_type(maml.stream_loss(x.unsqueeze(1), tokens, momentum=0.9), tuple[Tensor, Tensor])


def metric_learner() -> None:
    glyphs = fm.data.Episodes(fm.data.Glyphs(), ways=2, shots=1, queries=1, tasks=2)[0]
    proto = fm.ProtoNet(fm.models.Conv4(hidden=2, ways=None))
    loss, logits = proto.meta_loss(*glyphs)
    assert_type(loss, Tensor)
    assert_type(logits, Tensor)
    assert_type(proto.adapt_tasks(glyphs.support_x, glyphs.support_y)(glyphs.query_x), Tensor)
    matching = fm.MatchingNet(proto.encoder)
    assert_type(matching.adapt_tasks(*glyphs[:2]), AdaptedMatchingNet)
    assert_type(matching.adapt_tasks(*glyphs[:2]).task(0), AdaptedMatchingNet)
    assert_type(matching.meta_loss(*glyphs, return_logits=False), tuple[Tensor, None])


def backends() -> None:
    assert_type(fm.backend_of("prototypes", "cpu", torch.float32), str)
    with fm.use_backend("torch"):
        assert_type(fm.__version__, str)


ops()
heads()
trees()
learners()
contract()
tasks()
metric_learner()
backends()
