"""matching_loss and matching_logits: what theory says of them, absence, scales that are learned."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm
from tests.helpers.assertions import BACKENDS, assert_near
from tests.helpers.case import METRICS, CaseFactory
from tests.helpers.row_cases import support_labels

T, Q, S, N, D = 3, 7, 12, 4, 5

each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fm.use_backend(request.param):
        yield request.param


def rows(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and supports with their labels; every class has three supports."""
    make = CaseFactory(dtype, device)
    of_support = support_labels(make, N, T, S, absent=False)
    return make.randn(T, Q, D), make.labels(N, T, Q), make.randn(T, S, D), of_support


def each_loss(*args, **options) -> Tensor:
    return fm.matching_loss(*args, reduction="none", **options)


@each_metric
def test_the_published_form(metric, device):
    """Minus the log of the attention paid to supports of the query's class, one-hot labels."""
    query, query_labels, support, of_support = rows(device)
    similarity = -3 * fm.ops.reference.pairwise_distance(query, support, metric)
    one_hot = torch.nn.functional.one_hot(of_support, N).double()
    probability = similarity.softmax(2) @ one_hot
    wanted = -probability.gather(2, query_labels.unsqueeze(2)).squeeze(2).log()
    loss = each_loss(query, query_labels, support, of_support, metric=metric, scale=3.0)
    assert_near(loss, wanted, 1e-13)
    logits = fm.matching_logits(query, support, of_support, N, metric, 3.0)
    assert_near(logits, probability.log(), 1e-13)


@each_metric
def test_one_support_a_class_is_the_prototype_loss(metric, device):
    for dtype in (torch.float64, torch.float32):
        query, query_labels, support, _ = rows(device, dtype)
        of_support = torch.arange(S, device=device).expand(T, S)
        leaves = [query.requires_grad_(), support.requires_grad_()]
        for reduction in ("mean", "none"):
            ours = fm.matching_loss(
                query, query_labels, support, of_support, metric, 0.7, reduction=reduction
            )
            wanted = fm.prototype_loss(query, query_labels, support, metric, 0.7, reduction)
            pairs = [(ours, wanted)]
            pairs += zip(
                *(torch.autograd.grad(x.sum(), leaves) for x in (ours, wanted)), strict=True
            )
            for a, b in pairs:
                if fm.core.backend.is_available("matching_loss", query):
                    assert torch.equal(a, b)
                else:
                    assert_near(a, b, 1e-13 if dtype == torch.float64 else 5e-6)


def test_one_support_a_class_is_a_softmax_of_cosines(device):
    query, _, support, _ = rows(device)
    of_support = torch.arange(S, device=device).expand(T, S)
    cosine = torch.nn.functional.cosine_similarity(query.unsqueeze(2), support.unsqueeze(1), dim=3)
    logits = fm.matching_logits(query, support, of_support, S, "cosine", 10.0)
    assert_near(logits, (10 * cosine).log_softmax(2), 1e-13)


@each_metric
def test_copies_of_a_class_add_the_log_of_their_number_to_its_logit(metric, device):
    query, query_labels, support, of_support = rows(device)
    copied = support[:, of_support[0] == 1]
    assert (of_support[0] == 1).sum() == 3
    more = torch.cat([support, *[copied] * 4], 1)[:1]
    labels = torch.cat([of_support, torch.ones(T, 12, dtype=torch.int64, device=device)], 1)[:1]
    few = fm.matching_logits(query[:1], support[:1], of_support[:1], N, metric, 2.0)
    many = fm.matching_logits(query[:1], more, labels, N, metric, 2.0)
    shift = torch.zeros(N, dtype=torch.float64, device=device)
    shift[1] = math.log(5)
    assert_near(many, (few + shift).log_softmax(2), 1e-13)
    loss = each_loss(query[:1], query_labels[:1], more, labels, metric=metric, scale=2.0)
    assert_near(loss, -many.gather(2, query_labels[:1].unsqueeze(2)).squeeze(2), 1e-13)


@each_metric
def test_scale_0_counts_the_supports(metric, device):
    query, query_labels, support, of_support = rows(device)
    of_support = of_support.clamp(max=2)  # two classes of 3, and one of 6
    query_labels = query_labels.clamp(max=2)
    loss = each_loss(query, query_labels, support, of_support, metric=metric, scale=0.0)
    shots = torch.tensor([3.0, 3.0, 6.0], dtype=torch.float64, device=device)
    assert_near(loss, (S / shots[query_labels]).log(), 1e-14)
    others = torch.arange(S, device=device).expand(T, S) // 2
    args = (support, others, support, others)
    loss = each_loss(*args, metric=metric, scale=0.0, exclude_self=True)
    assert_near(loss, torch.full_like(loss, math.log(S - 1)), 1e-14)


@each_metric
def test_the_order_of_supports_does_not_matter(metric, device):
    query, query_labels, support, of_support = rows(device)
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for places in (torch.arange(S, device=device), order):
        leaf = support[:, places].requires_grad_()
        loss = fm.matching_loss(query, query_labels, leaf, of_support[:, places], metric)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((loss.detach(), gradient[:, places.argsort()]))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-13)


@each_metric
def test_a_large_scale_is_the_nearest_neighbour(metric, device):
    query, query_labels, support, of_support = rows(device)
    distance = fm.ops.reference.pairwise_distance(query, support, metric)
    nearest = of_support.gather(1, distance.argmin(2))
    logits = fm.matching_logits(query, support, of_support, N, metric, 1e5)
    assert torch.equal(logits.argmax(2), nearest)
    loss = each_loss(query, query_labels, support, of_support, metric=metric, scale=1e5)
    assert (loss[nearest == query_labels] < 1e-12).all() and (nearest == query_labels).any()
    same = of_support.unsqueeze(1) == query_labels.unsqueeze(2)
    gap = distance.masked_fill(~same, math.inf).amin(2) - distance.amin(2)
    assert_near(loss / 1e5, gap, 1e-6)


@pytest.mark.parametrize("ways", [5, 20])
def test_cosine_with_scale_1_cannot_go_below_its_floor(ways, device):
    """The floor is reached by a query on its support, all others being opposite."""
    support = torch.full((ways, 1), -2.0, dtype=torch.float64, device=device)
    support[0] = 3.0
    labels = torch.arange(ways, device=device)
    loss = fm.matching_loss(support[:1], labels[:1], support, labels, scale=1.0)
    floor = math.log(1 + (ways - 1) * math.exp(-2))
    assert_near(loss, torch.tensor(floor, dtype=torch.float64), 1e-14)
    assert round(floor, 2) == {5: 0.43, 20: 1.27}[ways]


@each_metric
def test_excluding_itself_is_leaving_it_out(metric, device):
    make = CaseFactory(torch.float64, device)
    x, labels = make.randn(1, S, D), torch.arange(S, device=device).remainder(N).view(1, S)
    loss = each_loss(x, labels, x, labels, metric=metric, scale=1.5, exclude_self=True)
    for q in range(S):
        rest = torch.arange(S, device=device) != q
        alone = each_loss(
            x[:, q : q + 1], labels[:, q : q + 1], x[:, rest], labels[:, rest], metric=metric,
            scale=1.5,
        )  # fmt: skip
        assert_near(loss[:, q], alone[:, 0], 1e-13)


def test_a_class_far_from_the_query_keeps_its_digits(device):
    """Its probability is zero in float32, and the loss must not be infinite."""
    support = torch.tensor([[0.0], [100.0], [100.1]], device=device).requires_grad_()
    labels = torch.tensor([0, 1, 1], device=device)
    query = torch.zeros(1, 1, device=device).requires_grad_()
    args = (query, labels[1:2], support, labels, "sqeuclidean", 1.0)
    loss = fm.matching_loss(*args)
    wanted = 1e4 - math.log(1 + math.exp(-(100.1**2 - 1e4)))
    assert_near(loss, torch.tensor(wanted), 1e-6)
    with fm.use_backend("torch"):
        exact = [x.detach().double().requires_grad_() for x in (query, support)]
        expected = fm.matching_loss(exact[0], args[1], exact[1], *args[3:])
    gradient = torch.autograd.grad(loss, (query, support))
    for a, b in zip(gradient, torch.autograd.grad(expected, exact), strict=True):
        assert_near(a, b, 1e-5)
    logits = fm.matching_logits(query, support, labels, 2, "sqeuclidean", 1.0)
    assert_near(logits, torch.tensor([[0.0, -wanted]]), 1e-6)


@each_metric
def test_logits_are_minus_the_loss_of_each_label(metric, device):
    query, _, support, of_support = rows(device)
    logits = fm.matching_logits(query, support, of_support, N, metric)
    for n in range(N):
        labels = torch.full((T, Q), n, device=device)
        loss = each_loss(query, labels, support, of_support, metric=metric)
        assert_near(-logits[..., n], loss, 1e-13)


@each_metric
def test_a_learned_scale_has_exact_derivatives(metric, device):
    query, query_labels, support, of_support = rows(device)
    scale = torch.tensor(1.3, dtype=torch.float64, device=device, requires_grad=True)
    number = fm.matching_loss(query, query_labels, support, of_support, metric, 1.3)
    learned = fm.matching_loss(query, query_labels, support, of_support, metric, scale)
    assert_near(learned, number, 1e-14)
    leaves = (query[:2, :2].requires_grad_(), support[:2].requires_grad_(), scale)
    labels = query_labels[:2, :2], of_support[:2]
    for function in (
        lambda q, s, scale: fm.matching_loss(q, labels[0], s, labels[1], metric, scale),
        lambda q, s, scale: fm.matching_logits(q, s, labels[1], N, metric, scale),
    ):
        assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_learned_scale_does_not_round_the_rows_of_half_types(dtype, device):
    query, query_labels, support, of_support = rows(device, dtype)
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    loss = fm.matching_loss(query, query_labels, support, of_support, "sqeuclidean", scale)
    wanted = fm.matching_loss(
        query.float(), query_labels, support.float(), of_support, "sqeuclidean", 3.0
    )
    assert loss.dtype == dtype and torch.equal(loss, wanted.to(dtype))
    (gradient,) = torch.autograd.grad(loss, scale)
    assert gradient.dtype == torch.float32 and gradient != 0


# Absence


@each_metric
@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")], ids=str)
def test_absent_examples_are_as_if_they_were_not_there(metric, garbage, device):
    query, query_labels, support, of_support = rows(device)
    query_labels[0, 2:] = query_labels[1, ::2] = -1
    query_labels[2] = -1
    of_support = of_support.clone()
    of_support[0, :2] = -1
    of_support[2] = -1
    lost = (query_labels == -1).unsqueeze(2), (of_support == -1).unsqueeze(2)
    leaves = [
        x.masked_fill(absent, garbage).requires_grad_()
        for x, absent in zip((query, support), lost, strict=True)
    ]
    loss = fm.matching_loss(leaves[0], query_labels, leaves[1], of_support, metric, 2.0)
    plain = [x.detach().clone().requires_grad_() for x in (query, support)]
    tasks = []
    for t in range(2):
        q, s = query_labels[t] != -1, of_support[t] != -1
        tasks.append(
            fm.matching_loss(
                plain[0][t, q], query_labels[t, q], plain[1][t, s], of_support[t, s], metric, 2.0
            )
        )
    wanted = sum(tasks) / T
    assert_near(loss, wanted, 1e-13)
    pairs = [
        torch.autograd.grad(x, y, create_graph=True) for x, y in ((loss, leaves), (wanted, plain))
    ]
    for a, b, absent in zip(*pairs, lost, strict=True):
        assert_near(a, b, 1e-12)
        assert (a[absent.expand_as(a)] == 0).all()
    scalars = [sum(g.square().sum() for g in gradient) for gradient in pairs]
    for a, b in zip(
        torch.autograd.grad(scalars[0], leaves), torch.autograd.grad(scalars[1], plain), strict=True
    ):
        assert_near(a, b, 1e-11)


def test_logits_of_classes_and_tasks_without_support(device):
    query, _, support, of_support = rows(device)
    of_support = of_support.masked_fill(of_support == 2, -1)
    of_support[1] = -1
    leaf = support.masked_fill((of_support == -1).unsqueeze(2), math.nan).requires_grad_()
    logits = fm.matching_logits(query, leaf, of_support, N)
    assert (logits[..., 2] == -math.inf).all() and (logits[1] == -math.inf).all()
    present = logits[[0, 2]][..., [0, 1, 3]]
    assert_near(present.exp().sum(2), torch.ones(2, Q), 1e-14)
    (gradient,) = torch.autograd.grad(present.square().sum(), leaf)
    assert gradient.isfinite().all() and (gradient[of_support == -1] == 0).all()


def test_a_query_without_support_where_labels_cannot_be_read(device):
    """Infinite, and the softmax over all supports has its gradient: r is 0."""
    query, query_labels, support, of_support = rows(device)
    query_labels = torch.full_like(query_labels, 77)

    def loss(query: Tensor, labels: Tensor) -> Tensor:
        each = each_loss(query, labels, support[0], of_support[0], metric="dot", scale=1.0)
        return each.sum()

    with fm.use_backend("torch"):  # a kernel reads the labels under vmap as well
        values, gradient = torch.vmap(torch.func.grad_and_value(loss))(query, query_labels)[::-1]
    assert (values == math.inf).all()
    wanted = (query @ support[0].mT).softmax(2) @ support[0]
    assert_near(gradient, wanted, 1e-13)


# Errors


def test_errors_name_the_first_label(device):
    query, query_labels, support, of_support = rows(device)
    wrong = query_labels.clone()
    wrong[1, 3] = 9
    no_support = re.escape(
        "query_labels[1, 3] is 9, expected a class with a support example in this task, or -1"
    )
    with pytest.raises(ValueError, match=no_support):
        fm.matching_loss(query, wrong, support, of_support)
    with pytest.raises(ValueError, match=no_support):
        fm.matching_loss(query.requires_grad_(), wrong, support, of_support)
    below = torch.full_like(of_support, -3)
    bound = "expected label >= 0 or -1 for an absent example"
    with pytest.raises(ValueError, match=rf"support_labels\[0, 0\] is -3, {bound}"):
        fm.matching_loss(query, query_labels, support, below)
    with pytest.raises(ValueError, match=rf"query_labels\[0, 0\] is -2, {bound}"):
        fm.matching_loss(query, torch.full_like(query_labels, -2), support, of_support)
    alone = torch.arange(S, device=device).expand(T, S)
    with pytest.raises(
        ValueError, match=r"query_labels\[0, 0\] is 0, .* other than the query itself"
    ):
        fm.matching_loss(support, alone, support, alone, exclude_self=True)
    with pytest.raises(ValueError, match=r"support_labels\[0, \d+\] is 3, expected 0 <= label < 3"):
        fm.matching_logits(query, support, of_support, 3)


BAD = {
    "exclude_self": ({"exclude_self": True}, "expected as many queries as supports, got 7 and 12"),
    "metric": ({"metric": "l1"}, "metric: expected one of"),
    "reduction": ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
    "scale dims": ({"scale": torch.ones(1)}, "scale: expected no dimensions, got shape [1]"),
    "scale 0": (
        {"scale": torch.zeros(()), "metric": "sqeuclidean"},
        "scale: expected above 0 for sqeuclidean, got 0.0",
    ),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_options(options, message, device):
    options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        fm.matching_loss(*rows(device), **options)


def test_bad_tensors(device):
    query, query_labels, support, of_support = rows(device)
    with pytest.raises(
        ValueError, match=r"query \[T, Q, D\] and support \[T, S, D\]: expected the"
    ):
        fm.matching_loss(query, query_labels, support[..., 1:], of_support)
    with pytest.raises(TypeError, match=r"support_labels: expected dtype torch\.int64"):
        fm.matching_loss(query, query_labels, support, of_support.int())
    with pytest.raises(ValueError, match=r"query_labels: expected shape \[3, 7\], got \[3, 6\]"):
        fm.matching_loss(query, query_labels[:, 1:], support, of_support)
    with pytest.raises(TypeError, match=r"scale: expected a floating-point tensor"):
        fm.matching_loss(query, query_labels, support, of_support, scale=torch.tensor(1))
    with pytest.raises(ValueError, match="num_classes: expected"):
        fm.matching_logits(query, support, of_support, -1)


@pytest.mark.parametrize("t, q, s, d", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 5, 0), (2, 0, 0, 3)])
def test_without_tasks_queries_or_features(t, q, s, d, device):
    make = CaseFactory(torch.float32, device)
    leaves = [make.randn(t, q, d).requires_grad_(), make.randn(t, s, d).requires_grad_()]
    labels = [torch.zeros(t, n, dtype=torch.int64, device=device) for n in (q, s)]
    for metric in METRICS:
        args = (leaves[0], labels[0], leaves[1], labels[1], metric)
        assert fm.matching_loss(*args, reduction="none").shape == (t, q)
        total = fm.matching_loss(*args, reduction="sum")
        assert total == 0  # of one class
        assert all((g == 0).all() for g in torch.autograd.grad(total, leaves))
        assert fm.matching_loss(*args).isnan() == (t * q == 0)
        assert fm.matching_logits(leaves[0], leaves[1], labels[1], 2, metric).shape == (t, q, 2)


def test_nan_stays_in_its_query(device):
    query, query_labels, support, of_support = rows(device)
    query[0, 1, 2] = math.nan
    loss = each_loss(query, query_labels, support, of_support)
    logits = fm.matching_logits(query, support, of_support, N)
    assert loss.isnan().sum() == 1 and loss[0, 1].isnan()
    assert logits[0, 1].isnan().all() and logits.isnan().sum() == N
