"""Absent examples, of label -1: each op on padded tasks against plain PyTorch on their examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta.ops._linear_head_arguments import HeadOptions, checked_head, step_sizes
from fastmeta.ops.linear_head_loss import composed, head_loss
from tests.helpers.assertions import BACKENDS, assert_near
from tests.helpers.case import METRICS, CaseFactory

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("form", ["primal", "dual"])
each_loss = pytest.mark.parametrize("loss", ["cross_entropy", "logistic"])
each_garbage = pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")], ids=str)

T, E, N, D = 4, 9, 3, 5
PRESENT = (9, 4, 0, 6)  # examples of the tasks

Losses = Callable[..., Tensor]


def padded_labels(classes: int, device: str) -> Tensor:
    """Labels [T, E], present in no order; the third task has no examples."""
    labels = CaseFactory(device=device).labels(classes, T, E)
    for row, count in zip(labels, PRESENT, strict=True):
        row[torch.randperm(E, generator=torch.Generator().manual_seed(0))[count:]] = -1
    return labels


def leaf(device: str, seed: int, *shape: int) -> Tensor:
    return CaseFactory(device=device, seed=seed).randn(*shape).requires_grad_()


def with_garbage(x: Tensor, labels: Tensor, value: float) -> Tensor:
    """A leaf of the values of x, and of others at absent places."""
    return x.detach().masked_fill((labels == -1).unsqueeze(-1), value).requires_grad_()


def compare(function: Losses, plain: Losses, inputs: Sequence[Tensor], padded: Sequence[Tensor]):
    """Value, first and second derivatives of two functions, each on its own leaves.

    ``function`` takes the tensors ``padded``, with garbage at absent places, and ``plain`` takes
    ``inputs``, without garbage. Returns the first derivatives of ``function``.
    """
    value, expected = function(*padded), plain(*inputs)
    assert_near(value, expected, 1e-10)
    first = torch.autograd.grad(value.sin().sum(), padded, create_graph=True)
    wanted = torch.autograd.grad(
        expected.sin().sum(), inputs, create_graph=True, materialize_grads=True
    )
    for a, e in zip(first, wanted, strict=True):
        assert_near(a, e, 1e-10)
    scalars = [sum(g.square().sum() for g in grads) for grads in (first, wanted)]
    second = torch.autograd.grad(scalars[0], padded)
    for a, e in zip(second, torch.autograd.grad(scalars[1], inputs), strict=True):
        assert_near(a, e, 1e-9)
    return first


def assert_zero_at_absent(gradient: Tensor, labels: Tensor) -> None:
    assert (gradient[labels == -1] == 0).all()
    assert (gradient[labels != -1] != 0).any()


@each_garbage
@each_backend
def test_prototypes(backend, garbage, device):
    labels, x = padded_labels(N, device), leaf(device, 1, T, E, D)

    def plain(x: Tensor) -> Tensor:
        means = [
            x[t, labels[t] == n].mean(0) if (labels[t] == n).any() else 0 * x[t, 0]
            for t in range(T)
            for n in range(N)
        ]
        return torch.stack(means).view(T, N, D)

    with fm.use_backend(backend):
        padded = [with_garbage(x, labels, garbage)]
        (gradient,) = compare(lambda x: fm.prototypes(x, labels, N), plain, [x], padded)
    assert_zero_at_absent(gradient, labels)


@each_garbage
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("metric", METRICS)
@each_backend
def test_prototype_loss(backend, metric, reduction, garbage, device):
    labels = padded_labels(N, device)
    query, prototypes = leaf(device, 1, T, E, D), leaf(device, 2, T, N, D)

    def plain(query: Tensor, prototypes: Tensor) -> Tensor:
        logits = -0.7 * fm.ops.reference.pairwise_distance(query, prototypes, metric)
        if reduction == "none":
            rows = torch.zeros_like(labels, dtype=logits.dtype)
            here = labels != -1
            each = F.cross_entropy(logits[here], labels[here], reduction="none")
            return rows.masked_scatter(here, each)
        tasks = [
            F.cross_entropy(z[y != -1], y[y != -1], reduction=reduction)
            for z, y in zip(logits, labels, strict=True)
            if (y != -1).any()
        ]
        total = torch.stack(tasks).sum()
        return total / T if reduction == "mean" else total

    def loss(query: Tensor, prototypes: Tensor) -> Tensor:
        return fm.prototype_loss(query, labels, prototypes, metric, 0.7, reduction)

    with fm.use_backend(backend):
        padded = [with_garbage(query, labels, garbage), prototypes]
        gradient, _ = compare(loss, plain, [query, prototypes], padded)
    assert_zero_at_absent(gradient, labels)


@each_garbage
@each_backend
def test_prototype_loss_of_tasks_that_lack_classes(backend, garbage, device):
    """Against the tasks with the classes that they have."""
    labels, query = padded_labels(N, device), leaf(device, 1, T, E, D)
    prototypes = leaf(device, 2, T, N + 2, D)
    present = torch.arange(N + 2, device=device) < torch.tensor([[N], [N + 1], [0], [N]]).to(device)

    def plain(query: Tensor, prototypes: Tensor) -> Tensor:
        losses = []
        for t in (0, 1, 3):
            here = labels[t] != -1
            rows = (
                query[t : t + 1, here],
                labels[t : t + 1, here],
                prototypes[t : t + 1, present[t]],
            )
            losses.append(fm.prototype_loss(*rows))
        return torch.stack(losses).sum() / T

    def loss(query: Tensor, prototypes: Tensor) -> Tensor:
        return fm.prototype_loss(query, labels, prototypes, present=present)

    with fm.use_backend(backend):
        padded = [with_garbage(query, labels, garbage), prototypes]
        gradient, of_prototypes = compare(loss, plain, [query, prototypes], padded)
    assert_zero_at_absent(gradient, labels)
    assert (of_prototypes[~present] == 0).all()


def plain_loss(outputs: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Mean loss of the present examples of one task; 0 without one."""
    here = labels != -1
    if not here.any():
        return 0 * outputs.nan_to_num().sum()
    if loss == "cross_entropy":
        return F.cross_entropy(outputs[here], labels[here])
    targets = labels[here].to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs[here].squeeze(1), targets)


def plain_head(x: Tensor, labels: Tensor, weight: Tensor, lr: Tensor, loss: str) -> Tensor:
    """The weight [N, D] of one task after a step for each of lr."""
    for step in lr:
        value = plain_loss(x @ weight.T, labels, loss)
        (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
        weight = weight - step * (gradient + 0.2 * weight)
    return weight


@each_garbage
@each_form
@each_loss
@each_backend
def test_linear_head(backend, loss, form, garbage, device):
    ways, labels = (N, padded_labels(N, device)) if loss == "cross_entropy" else (
        1,
        padded_labels(2, device),
    )  # fmt: skip
    x, weight = leaf(device, 1, T, E, D), leaf(device, 2, T, ways, D)
    lr = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64, device=device).requires_grad_()

    def plain(x: Tensor, weight: Tensor, lr: Tensor) -> Tensor:
        rows = zip(x, labels, weight, strict=True)
        return torch.stack([plain_head(*row, lr, loss) for row in rows])

    def head(x: Tensor, weight: Tensor, lr: Tensor) -> Tensor:
        options = {"steps": 3, "loss": loss, "weight_decay": 0.2, "form": form}
        return fm.linear_head(x, labels, weight, lr=lr, **options)[0]

    with fm.use_backend(backend):
        padded = [with_garbage(x, labels, garbage), weight, lr]
        gradient, *_ = compare(head, plain, [x, weight, lr], padded)
    assert_zero_at_absent(gradient, labels)


@each_garbage
@each_form
@each_loss
@pytest.mark.parametrize("function", [head_loss, composed], ids=["kernel", "composed"])
def test_linear_head_loss(function, loss, form, garbage, device):
    ways, classes = (N, N) if loss == "cross_entropy" else (1, 2)
    labels = padded_labels(classes, device)
    query_labels = labels.flip(1).roll(1, 0)  # the fourth task has no queries
    x, query, weight = (
        leaf(device, 1, T, E, D),
        leaf(device, 3, T, E, D),
        leaf(device, 2, ways, D),
    )

    def plain(x: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        lr, losses = x.new_tensor([0.3, 0.1]), []
        for t in range(T):
            adapted = plain_head(x[t], labels[t], weight * 1, lr, loss)
            losses.append(plain_loss(query[t] @ adapted.T, query_labels[t], loss))
        return torch.stack(losses).mean()

    def meta_loss(x: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        head = checked_head(x, labels, weight, None, loss)
        options = HeadOptions(loss, 0.2, False, form == "dual")
        sizes = step_sizes(x.new_tensor([0.3, 0.1]), 2, x)
        return function(head, sizes, query, query_labels, options)[0]

    padded = [with_garbage(x, labels, garbage), with_garbage(query, query_labels, garbage), weight]
    of_x, of_query, _ = compare(meta_loss, plain, [x, query, weight], padded)
    # Without create_graph=True the kernel computes the gradients.
    of_kernel = torch.autograd.grad(meta_loss(*padded).sin(), padded)
    for a, e in zip(
        of_kernel,
        torch.autograd.grad(plain(x, query, weight).sin(), [x, query, weight]),
        strict=True,
    ):
        assert_near(a, e, 1e-10)
    assert (of_kernel[0][labels == -1] == 0).all()
    assert_zero_at_absent(of_kernel[1], query_labels)
    assert_zero_at_absent(of_query, query_labels)
    assert (of_x[labels == -1] == 0).all()


@each_garbage
@each_loss
@each_backend
def test_linear_head_hvp(backend, loss, garbage, device):
    ways, classes = (N, N) if loss == "cross_entropy" else (1, 2)
    labels = padded_labels(classes, device)
    x, weight, vector = (
        leaf(device, 1, T, E, D), leaf(device, 2, T, ways, D), leaf(device, 4, T, ways, D)
    )  # fmt: skip

    def plain(x: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
        value = sum(plain_loss(z @ w.T, y, loss) for z, w, y in zip(x, weight, labels, strict=True))
        (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
        return torch.autograd.grad(gradient, weight, vector, create_graph=True)[0]

    def product(x: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
        return fm.linear_head_hvp(x, labels, weight, None, vector, None, loss=loss)[0]

    with fm.use_backend(backend):
        padded = [with_garbage(x, labels, garbage), weight, vector]
        gradient, *_ = compare(product, plain, [x, weight, vector], padded)
    assert_zero_at_absent(gradient, labels)


@each_backend
def test_a_batch_without_present_examples(backend, device):
    labels = torch.full((2, E), -1, device=device)
    x, prototypes = leaf(device, 1, 2, E, D), leaf(device, 2, 2, N, D)
    with fm.use_backend(backend):
        loss = fm.prototype_loss(x, labels, prototypes)
        means = fm.prototypes(x, labels, N)
        weight, _ = fm.linear_head(x, labels, prototypes, lr=0.1, steps=2)
    assert loss == 0 and not means.any() and torch.equal(weight, prototypes)
    grads = torch.autograd.grad(loss + means.sum(), [x, prototypes])
    assert not any(g.any() for g in grads)
    of_x, of_start = torch.autograd.grad(weight.sum(), [x, prototypes])
    assert not of_x.any() and (of_start == 1).all()


@pytest.mark.parametrize("label", [-2, -100, N])
@each_backend
def test_labels_that_are_neither_a_class_nor_absent(backend, label, device):
    labels = padded_labels(N, device)
    labels[3, 1] = label
    x, prototypes = leaf(device, 1, T, E, D), leaf(device, 2, T, N, D)
    message = rf"\[3, 1\] is {label}, expected 0 <= label < {N} or -1 for an absent example"
    calls = (
        lambda: fm.prototypes(x, labels, N),
        lambda: fm.prototype_loss(x, labels, prototypes),
        lambda: fm.prototype_loss(x.detach(), labels, prototypes.detach(), reduction="none"),
        lambda: fm.linear_head(x, labels, prototypes, lr=0.1, steps=1),
        lambda: fm.linear_head_hvp(x, labels, prototypes, None, prototypes, None),
    )
    for call in calls:
        with fm.use_backend(backend), pytest.raises(ValueError, match=message):
            call()
