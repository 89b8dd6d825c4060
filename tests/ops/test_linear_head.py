"""The linear head: against unrolled steps and the task program, its options, product and errors."""

# ruff: noqa: E501 (for a table that reads best with one entry a line)

from __future__ import annotations

import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import fastmeta as fm
from tests.helpers.assertions import BACKENDS, assert_near
from tests.helpers.case import CaseFactory

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("form", ["primal", "dual"])
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "logistic": lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(1), y.to(z.dtype)),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)

T, S, Q, N, D = 3, 7, 4, 3, 5


def inputs(loss: str, device: str, bias: bool = True, d: int = D) -> tuple[list[Tensor], Tensor]:
    """Features, weight, bias if there is one, and queries, all to be differentiated; targets."""
    make = CaseFactory(torch.float64, device)
    ways = 1 if loss == "logistic" else N
    shapes = [(T, S, d), (T, ways, d), *([(T, ways)] if bias else []), (T, Q, d)]
    leaves = [make.randn(*shape).requires_grad_() for shape in shapes]
    targets = make.randn(T, S, ways) if loss == "mse" else make.labels(max(2, ways), T, S)
    return leaves, targets


def unrolled(x, targets, weight, bias, lr, loss, decay=0.0):
    """Autograd's gradient of each step, kept in the graph."""
    heads = []
    for features, wanted, *head in zip(x, targets, weight, bias, strict=True):
        head = [p for p in head if p is not None]
        for rate in lr:
            value = LOSSES[loss](F.linear(features, *head), wanted)
            grads = torch.autograd.grad(value, head, create_graph=True)
            head = [p - rate * (g + decay * p) for p, g in zip(head, grads, strict=True)]
        heads.append(head)
    return [torch.stack(parts) for parts in zip(*heads, strict=True)]


@each_backend
@each_form
@each_loss
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_it_is_unrolled_gradient_descent(steps, bias, loss, form, backend, device):
    (x, weight, *biases, query), targets = inputs(loss, device, bias)
    lr = torch.linspace(0.1, 0.3, steps, dtype=torch.float64, device=device).requires_grad_()
    wanted = [x, weight, *biases, query, lr]
    if loss == "mse":
        wanted.append(targets.requires_grad_())

    def outcome(head):
        value = fm.task_linear(query, *(p for p in head if p is not None)).sin().sum()
        return value, *torch.autograd.grad(value, wanted)

    options = {"lr": lr, "steps": steps, "loss": loss, "weight_decay": 0.2, "form": form}
    with fm.use_backend(backend):
        ours = outcome(fm.linear_head(x, targets, weight, *biases, **options))
    rows = biases[0] if bias else [None] * T
    plain = outcome(unrolled(x, targets, weight, rows, lr, loss, 0.2))
    for actual, expected in zip(ours, plain, strict=True):
        assert_near(actual, expected, 1e-10)


@each_form
@pytest.mark.parametrize("first_order", [False, True])
def test_it_is_the_task_program_of_a_linear_layer(first_order, form, device):
    (x, _, _, query), labels = inputs("cross_entropy", device)
    layer = nn.Linear(D, N).to(device, torch.float64)
    maml = fm.MAML(layer, lr=0.5, steps=3, first_order=first_order, engine="program")
    query_labels = labels[:, :Q]
    value, logits = maml.meta_loss(x, labels, query, query_labels)
    options = {"lr": 0.5, "steps": 3, "form": form, "first_order": first_order}
    head = fm.linear_head(x, labels, layer.weight, layer.bias, **options)
    ours = fm.task_linear(query, *head)
    ours_value = F.cross_entropy(ours.flatten(0, 1), query_labels.flatten())
    assert_near(ours, logits, 1e-10)
    assert_near(ours_value, value, 1e-10)
    wanted = [layer.weight, layer.bias, query, *([] if first_order else [x])]
    grads = (torch.autograd.grad(v, wanted) for v in (ours_value, value))
    for actual, expected in zip(*grads, strict=True):
        assert_near(actual, expected, 1e-10)


@each_backend
@each_form
def test_first_order_leaves_the_second_derivatives_out(form, backend, device):
    (x, weight, bias, _), labels = inputs("cross_entropy", device)
    options = {"lr": 0.3, "steps": 2, "form": form, "first_order": True, "weight_decay": 0.1}
    with fm.use_backend(backend):
        adapted, shift = fm.linear_head(x, labels, weight, bias, **options)
    v = adapted.detach().cos()
    to_x, to_weight, to_bias = torch.autograd.grad(
        (adapted * v).sum() + shift.sum(), (x, weight, bias), allow_unused=True
    )
    assert to_x is None
    assert_near(to_weight, (1 - 0.3 * 0.1) ** 2 * v, 1e-14)
    assert_near(to_bias, torch.full_like(bias, (1 - 0.3 * 0.1) ** 2), 1e-14)


@pytest.mark.skipif(not fm.build_info()["native"], reason="the native extension was not built")
def test_the_form_is_the_one_asked_for_or_the_cheaper_one(monkeypatch, device):
    module = importlib.import_module("fastmeta.ops.linear_head")
    seen, head = [], module._head
    monkeypatch.setattr(module, "_head", lambda *args: (seen.append(args[-1].dual), head(*args))[1])
    for d in (4, 400):
        (x, weight, bias, _), labels = inputs("cross_entropy", device, d=d)
        for form in ("primal", "dual", "auto"):
            fm.linear_head(x, labels, weight, bias, lr=0.1, steps=5, form=form)
    assert seen == [False, True, False, False, True, True]


@each_backend
def test_the_gradient_of_a_vmap_is_the_vmap_of_gradients(backend, device):
    (x, weight, bias, _), labels = inputs("cross_entropy", device)
    samples = [torch.stack([z, 2 * z]).detach() for z in (x, weight, bias)]

    def total(x, weight, bias):
        adapted, _ = fm.linear_head(x, labels, weight, bias, lr=0.1, steps=2)
        return adapted.sin().sum()

    with fm.use_backend(backend):
        each = vmap(grad(total, argnums=(0, 1, 2)))(*samples)
        at_once = grad(lambda *z: vmap(total)(*z).sum(), argnums=(0, 1, 2))(*samples)
    for actual, expected in zip(at_once, each, strict=True):
        assert_near(actual, expected, 1e-12)


@each_backend
@pytest.mark.parametrize("shape", [[], [2], [T, 2]], ids=str)
def test_step_sizes_of_each_step_and_task(shape, backend, device):
    (x, weight, bias, _), labels = inputs("cross_entropy", device)
    lr = CaseFactory(torch.float64, device, seed=1).randn(*shape).abs().requires_grad_()
    with fm.use_backend(backend):
        whole = fm.linear_head(x, labels, weight, bias, lr=lr, steps=2)
        rows = lr.expand(T, 2)
        parts = [
            fm.linear_head(x[t], labels[t], weight[t], bias[t], lr=rows[t], steps=2)
            for t in range(T)
        ]
    for actual, expected in zip(whole, zip(*parts, strict=True), strict=True):
        assert_near(actual, torch.stack(expected), 1e-13)
    grad = torch.autograd.grad(whole[0].sin().sum(), lr)[0]
    assert grad.shape == lr.shape and (grad != 0).all()


@each_backend
def test_a_start_that_tasks_share(backend, device):
    (x, weight, bias, _), labels = inputs("cross_entropy", device)
    one, shift = weight[0].detach(), bias[0].detach()
    with fm.use_backend(backend):
        shared = fm.linear_head(x, labels, one, shift, lr=0.1, steps=2)
        copies = one.expand(T, N, D).clone(), shift.expand(T, N).clone()
        expected = fm.linear_head(x, labels, *copies, lr=0.1, steps=2)
    for actual, e in zip(shared, expected, strict=True):
        assert torch.equal(actual, e)


@each_backend
@each_form
def test_without_steps_or_tasks(form, backend, device):
    (x, weight, bias, _), labels = inputs("cross_entropy", device)
    with fm.use_backend(backend):
        same = fm.linear_head(x, labels, weight, bias, lr=0.1, steps=0, form=form)
        assert torch.equal(same[0], weight) and torch.equal(same[1], bias)
        none = fm.linear_head(x[:0], labels[:0], weight[:0], bias[:0], lr=0.1, steps=2, form=form)
        assert none[0].shape == (0, N, D) and none[1].shape == (0, N)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype, backend, device):
    leaves, labels = inputs("cross_entropy", device)
    x, weight, bias, _ = (leaf.detach().to(dtype) for leaf in leaves)
    with fm.use_backend(backend):
        ours = fm.linear_head(x, labels, weight, bias, lr=0.2, steps=4)
        wide = fm.linear_head(x.float(), labels, weight.float(), bias.float(), lr=0.2, steps=4)
    for actual, expected in zip(ours, wide, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, 0.51 * torch.finfo(dtype).eps)


@each_backend
@each_loss
@pytest.mark.parametrize("bias", [True, False])
def test_the_hessian_vector_product(bias, loss, backend, device):
    (x, weight, *biases, _), targets = inputs(loss, device, bias)
    head = {"weight": weight.detach(), **({"bias": biases[0].detach()} if bias else {})}
    vector = {name: p.cos() for name, p in head.items()}

    def value(p, x, y):
        decay = sum(q.square().sum() for q in p.values())
        return LOSSES[loss](F.linear(x, p["weight"], p.get("bias")), y) + 0.15 * decay

    expected = fm.hvp(value, head, vector, x.detach(), targets)
    at = head["weight"], head.get("bias"), vector["weight"], vector.get("bias")
    with fm.use_backend(backend):
        ours = fm.linear_head_hvp(x, targets, *at, loss=loss, weight_decay=0.3)
        single = fm.linear_head_hvp(
            x[0],
            targets[0],
            *(None if p is None else p[0] for p in at),
            loss=loss,
            weight_decay=0.3,
        )
    for name, actual, one in zip(("weight", "bias"), ours, single, strict=True):
        if name in expected:
            assert_near(actual, expected[name], 1e-12)
            assert_near(one, expected[name][0], 1e-12)
        else:
            assert actual is None and one is None


@each_backend
@pytest.mark.parametrize("loss", ["cross_entropy", "logistic"])
@pytest.mark.parametrize("label", [-2, N])
def test_labels_out_of_range(loss, label, backend, device):
    (x, weight, bias, _), labels = inputs(loss, device)
    labels[1, 2] = label
    with fm.use_backend(backend):
        for call in (
            lambda: fm.linear_head(x, labels, weight, bias, lr=0.1, steps=1, loss=loss),
            lambda: fm.linear_head_hvp(x, labels, weight, bias, weight, bias, loss=loss),
        ):
            with pytest.raises(ValueError, match=rf"targets.*{label}"):
                call()


def head(x, y, w, b=None, **options):
    return fm.linear_head(x, y, w, b, **{"lr": 0.1, "steps": 1, **options})


ERRORS = {
    "x": (lambda x, y, w, b: head(1.0, y, w), TypeError, "x: expected a tensor, got float"),
    "x dims": (lambda x, y, w, b: head(x[0, 0], y, w), ValueError, "x: expected shape [T, S, D], got [5]"),
    "no examples": (lambda x, y, w, b: head(x[:, :0], y[:, :0], w), ValueError, "x and weight: expected at least one example and one way, got [3, 0, 5] and [3, 3, 5]"),
    "targets": (lambda x, y, w, b: head(x, y.double(), w), TypeError, "targets: expected dtype torch.int64, got torch.float64"),
    "targets shape": (lambda x, y, w, b: head(x, y[:, :2], w), ValueError, "targets: expected shape [3, 7], got [3, 2]"),
    "mse targets": (lambda x, y, w, b: head(x, x[..., :2], w, loss="mse"), ValueError, "targets: expected shape [3, 7, 3], got [3, 7, 2]"),
    "weight": (lambda x, y, w, b: head(x, y, w[:2]), ValueError, "weight: expected shape [3, 5] or [3, 3, 5], got [2, 3, 5]"),
    "weight dtype": (lambda x, y, w, b: head(x, y, w.float()), TypeError, "weight: expected dtype torch.float64 like x, got torch.float32"),
    "bias": (lambda x, y, w, b: head(x, y, w, b[:, :2]), ValueError, "bias: expected shape [3] or [3, 3], got [3, 2]"),
    "logistic": (lambda x, y, w, b: head(x, y, w, loss="logistic"), ValueError, "weight: expected one way for loss='logistic', got [3, 3, 5]"),
    "loss": (lambda x, y, w, b: head(x, y, w, loss="hinge"), ValueError, "loss: expected one of cross_entropy, mse, logistic, got 'hinge'"),
    "form": (lambda x, y, w, b: head(x, y, w, form="gram"), ValueError, "form: expected one of auto, primal, dual, got 'gram'"),
    "lr": (lambda x, y, w, b: head(x, y, w, lr=x[:, 0, :2]), ValueError, "lr: expected a number, [K] or [T, K] with T = 3, K = 1, got [3, 2]"),
    "steps": (lambda x, y, w, b: head(x, y, w, steps=-1), ValueError, "steps: expected at least 0, got -1"),
    "steps type": (lambda x, y, w, b: head(x, y, w, steps=1.0), TypeError, "steps: expected an integer, got 1.0"),
    "decay": (lambda x, y, w, b: head(x, y, w, weight_decay=-0.1), ValueError, "weight_decay: expected at least 0, got -0.1"),
    "vector": (lambda x, y, w, b: fm.linear_head_hvp(x, y, w, b, w, None), ValueError, "bias_vector: expected a tensor like bias, got None"),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name, backend, device):
    call, kind, message = ERRORS[name]
    (x, weight, bias, _), labels = inputs("cross_entropy", device)
    with fm.use_backend(backend), pytest.raises(kind, match=re.escape(message)):
        call(x, labels, weight, bias)
