"""What holds for every head: batches, absence, permutations, dtypes, derivatives, errors."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.autograd import gradcheck

import fastmeta as fm
from fastmeta.data import Features
from fastmeta.heads import Head
from tests.helpers.features import SHOTS, D, N, Q, T, draw

CLOSE = {"rtol": 1e-9, "atol": 1e-9}

HEADS: dict[str, Head] = {
    "nearest": fm.heads.NearestCentroid(),
    "nearest-dot": fm.heads.NearestCentroid("dot", 0.5),
    "simpleshot": fm.heads.SimpleShot("cosine", 4.0),
    "ridge": fm.heads.Ridge(),
    "ridge-bias": fm.heads.Ridge(0.1, bias=True),
    "logistic": fm.heads.Logistic(steps=5),
    "feat": fm.heads.FEAT(D, heads=2, dropout=0.0).double(),
    "soft-kmeans": fm.heads.SoftKMeans(2, 0.3),
    "bd-cspn": fm.heads.BDCSPN(),
    "bd-cspn-top": fm.heads.BDCSPN(4.0, top=2, shift_queries=False),
    "laplacian": fm.heads.LaplacianShot(),
    "laplacian-plain": fm.heads.LaplacianShot(5, 0.5, 4, rectify=False),
    "pt-map": fm.heads.PTMAP(3),
    "pt-map-plain": fm.heads.PTMAP(3, lam=0.2, power=1.0, unit_length=False),
    "tim": fm.heads.TIM(8),
    "tim-cosine": fm.heads.TIM(8, metric="cosine"),
    "tim-adam": fm.heads.TIM(4, 0.01, optimizer="adam"),
    "finetuning": fm.heads.TransductiveFinetuning(8),
    "finetuning-adam": fm.heads.TransductiveFinetuning(4, 0.01, optimizer="adam"),
}
every_head = pytest.mark.parametrize("name", HEADS)


@every_head
def test_all_tasks_equal_one_by_one(name):
    support, labels, query = draw()
    logits = HEADS[name](support, labels, query)
    assert logits.shape == (T, Q, N) and logits.isfinite().all()
    for t in range(T):
        torch.testing.assert_close(logits[t], HEADS[name](support[t], labels[t], query[t]), **CLOSE)


@every_head
def test_padding_changes_nothing(name):
    """Absent support examples and queries, even of NaN."""
    support, labels, query = draw()
    nothing = torch.full((T, 2, D), torch.nan, dtype=torch.float64)
    padded = HEADS[name](
        torch.cat([nothing, support], 1),
        torch.cat([labels.new_full((T, 2), -1), labels], 1),
        torch.cat([query, nothing], 1),
        query_present=torch.arange(Q + 2).expand(T, -1) < Q,
    )
    torch.testing.assert_close(padded[:, :Q], HEADS[name](support, labels, query), **CLOSE)


@every_head
def test_a_padded_center_changes_nothing(name):
    """A center would move the zeros of padding."""
    support, labels, query = draw()
    head = HEADS[name]
    head.center = torch.ones(D, dtype=torch.float64)
    try:
        padded = head(
            torch.nn.functional.pad(support, (0, 0, 0, 1)),
            torch.nn.functional.pad(labels, (0, 1), value=-1),
            query,
        )
        torch.testing.assert_close(padded, head(support, labels, query), **CLOSE)
    finally:
        head.center = None


@every_head
def test_a_class_without_support_does_not_compete(name):
    """Tasks of fewer classes equal themselves without the others, which get minus infinity."""
    support, labels, query = draw()
    kept = labels[0] != 1
    renamed = labels // 2  # 0, 2 -> 0, 1
    fewer = HEADS[name](support[:, kept], renamed[:, kept], query)
    gaps = labels.clone()
    gaps[:, ~kept] = -1
    logits = HEADS[name](support, gaps, query, num_classes=N + 1)
    assert (logits[..., [1, 3]] == -torch.inf).all()
    torch.testing.assert_close(logits[..., [0, 2]], fewer, **CLOSE)


@every_head
def test_a_task_without_support_has_no_class(name):
    support, labels, query = draw()
    labels[1] = -1
    logits = HEADS[name](support, labels, query)
    assert (logits[1] == -torch.inf).all() and logits[[0, 2]].isfinite().all()


@every_head
def test_queries_in_another_order(name):
    support, labels, query = draw()
    order = torch.randperm(Q, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        HEADS[name](support, labels, query[:, order]),
        HEADS[name](support, labels, query)[:, order],
        **CLOSE,
    )


@every_head
def test_classes_in_another_order(name):
    support, labels, query = draw()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        HEADS[name](support, order[labels], query)[..., order],
        HEADS[name](support, labels, query),
        **CLOSE,
    )


@every_head
def test_support_in_another_order(name):
    support, labels, query = draw()
    order = torch.randperm(N * SHOTS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        HEADS[name](support[:, order], labels[:, order], query),
        HEADS[name](support, labels, query),
        **CLOSE,
    )


@every_head
def test_transductive_says_whether_queries_learn_from_each_other(name):
    support, labels, query = draw()
    together = HEADS[name](support, labels, query)
    apart = HEADS[name](support, labels, query[:, :2])
    differs = not torch.allclose(together[:, :2], apart, **CLOSE)
    assert differs == HEADS[name].transductive


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(name, dtype):
    support, labels, query = draw()
    support, query = support.to(dtype), query.to(dtype)
    logits = HEADS[name](support, labels, query)
    assert logits.dtype == dtype
    exact = HEADS[name](support.double(), labels, query.double())
    torch.testing.assert_close(logits.double(), exact, rtol=2e-2, atol=2e-2)


@every_head
@pytest.mark.parametrize("tasks, queries", [(0, Q), (T, 0)])
def test_empty(name, tasks, queries):
    support, labels, query = draw()
    logits = HEADS[name](support[:tasks], labels[:tasks], query[:tasks, :queries], N)
    assert logits.shape == (tasks, queries, N)


@every_head
def test_non_contiguous_features(name):
    support, labels, query = draw()
    strided = (x.mT.contiguous().mT for x in (support, query))
    torch.testing.assert_close(
        HEADS[name](next(strided), labels, next(strided)),
        HEADS[name](support, labels, query),
        **CLOSE,
    )


@every_head
def test_derivatives(name):
    support, labels, query = (x[:1] for x in draw())
    assert gradcheck(
        lambda s, q: HEADS[name](s, labels, q),
        (support.requires_grad_(), query[:, :3].requires_grad_()),
        atol=1e-5,
    )


@every_head
def test_inputs_stay_as_they_were(name):
    given = draw()
    kept = [x.clone() for x in given]
    HEADS[name](*given)
    for before, after in zip(kept, given, strict=True):
        assert torch.equal(before, after)


def test_center_and_length():
    support, labels, query = draw()
    center = support.mean((0, 1))
    head = fm.heads.SimpleShot(center=center)
    by_hand = [torch.nn.functional.normalize(x - center, dim=-1) for x in (support, query)]
    torch.testing.assert_close(
        head(support, labels, query),
        fm.heads.NearestCentroid()(by_hand[0], labels, by_hand[1]),
    )
    assert head.to(torch.float32).center.dtype == torch.float32
    assert "center" in head.state_dict()
    assert repr(head) == "SimpleShot(normalize=True, metric='sqeuclidean', scale=1.0, center)"


def test_features_of_zeros_keep_their_gradients_finite():
    support, labels, query = draw()
    support[:, 0] = 0
    support.requires_grad_()
    fm.heads.SimpleShot()(support, labels, query).sum().backward()
    assert support.grad.isfinite().all()


X, LABELS = torch.zeros(2, 3, 4), torch.arange(3).repeat(2, 1)
WRONG_CALLS = [
    ({"support": X.long()}, TypeError, "support: expected a floating"),
    ({"query": X.double()}, TypeError, "query: expected dtype torch.float32"),
    ({"query": X[..., :3]}, ValueError, r"support \[T, S, D\] and query \[T, Q, D\]: .* same T"),
    ({"query": X[:1]}, ValueError, "same T and D"),
    ({"support_labels": LABELS.int()}, TypeError, "support_labels: expected dtype torch.int64"),
    ({"support_labels": LABELS[:1]}, ValueError, "support_labels: expected shape"),
    ({"support_labels": LABELS - 2}, ValueError, r"support_labels\[0, 0\] is -2"),
    ({"support_labels": LABELS * 2}, ValueError, "support_labels: .* without gaps, .*=5 takes"),
    ({"support_labels": LABELS * 0 - 1}, ValueError, "num_classes: expected a number"),
    ({"num_classes": 2}, ValueError, r"support_labels\[0, 2\] is 2"),
    ({"num_classes": 0}, ValueError, "num_classes: expected at least 1"),
    ({"query_present": LABELS}, TypeError, "query_present: expected dtype torch.bool"),
    ({"query_present": LABELS[:1] > 0}, ValueError, "query_present: expected shape"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG_CALLS)
def test_wrong_calls(wrong, error, message):
    given = {"support": X, "support_labels": LABELS, "query": X, **wrong}
    with pytest.raises(error, match=message):
        fm.heads.NearestCentroid()(**given)


WRONG_OPTIONS = [
    (fm.heads.NearestCentroid, {"metric": "l1"}, ValueError, "metric: expected one of"),
    (fm.heads.NearestCentroid, {"scale": torch.inf}, ValueError, "scale: expected a finite"),
    (fm.heads.NearestCentroid, {"scale": "2"}, TypeError, "scale: expected a number"),
    (fm.heads.SimpleShot, {"normalize": 1}, TypeError, "normalize: expected a bool"),
    (fm.heads.SimpleShot, {"center": torch.zeros(1, 4)}, ValueError, "center: expected shape"),
    (fm.heads.Ridge, {"l2": 0}, ValueError, "l2: expected a finite number above 0"),
    (fm.heads.Logistic, {"steps": -1}, ValueError, "steps: expected at least 0"),
    (fm.heads.Logistic, {"lr": -1.0}, ValueError, "lr: expected at least 0"),
    (fm.heads.SoftKMeans, {"steps": 1.5}, TypeError, "steps: expected an integer"),
]


@pytest.mark.parametrize("head, wrong, error, message", WRONG_OPTIONS)
def test_wrong_options(head, wrong, error, message):
    with pytest.raises(error, match=message):
        head(**wrong)


def test_a_center_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"center: expected shape \[4\], got \[5\]"):
        fm.heads.SimpleShot(center=torch.zeros(5))(X, LABELS, X)


SHOWN = [*(getattr(fm.heads, name) for name in fm.heads.__all__ if name != "Head"), Features]


@pytest.mark.parametrize("thing", SHOWN, ids=lambda thing: thing.__name__)
def test_examples_of_the_docstrings(thing):
    found = [test for test in doctest.DocTestFinder().find(thing) if test.examples]
    assert found
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_every_head_is_tested():
    classes = {getattr(fm.heads, name) for name in fm.heads.__all__ if name != "Head"}
    assert {type(head) for head in HEADS.values()} == classes
