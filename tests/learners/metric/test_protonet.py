"""ProtoNet against a plain composition, its modes, its gradients and its messages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm

METRICS = ["sqeuclidean", "euclidean", "cosine", "dot"]
T, N, SHOTS, QUERIES = 2, 3, 2, 4


@pytest.fixture
def episode(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, N * (SHOTS + QUERIES), 6, generator=generator, dtype=torch.float64)
    support_x, query_x = x.split([N * SHOTS, N * QUERIES], dim=1)
    support_y = torch.arange(N).repeat_interleave(SHOTS).repeat(T, 1)
    query_y = torch.arange(N).repeat(QUERIES).repeat(T, 1)
    return tuple(part.to(device) for part in (support_x, support_y, query_x, query_y))


@pytest.fixture
def encoder(device: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double().to(device)


def distance(metric: str, query: Tensor, centre: Tensor) -> Tensor:
    """One distance by its definition."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(query, centre, dim=0)
    if metric == "dot":
        return -(query * centre).sum()
    squared = ((query - centre) ** 2).sum()
    return squared if metric == "sqeuclidean" else squared.sqrt()


def plain_logits(encoder: nn.Module, episode, metric: str, scale: float) -> Tensor:
    """Logits by a loop over tasks, classes and queries."""
    tasks = []
    for support_x, support_y, query_x, _ in zip(*episode, strict=True):
        support, query = encoder(support_x), encoder(query_x)
        centres = [support[support_y == n].mean(0) for n in range(N)]
        rows = [[-scale * distance(metric, q, c) for c in centres] for q in query]
        tasks.append(torch.stack([torch.stack(row) for row in rows]))
    return torch.stack(tasks)


@pytest.mark.parametrize("metric", METRICS)
def test_meta_loss_equals_the_plain_composition(encoder, episode, metric):
    loss, logits = fm.ProtoNet(encoder, metric, scale=0.7).meta_loss(*episode)
    expected = plain_logits(encoder, episode, metric, 0.7)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), episode[3].flatten())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_meta_loss_has_the_gradients_of_the_plain_composition(encoder, episode, metric):
    twin = copy.deepcopy(encoder)
    fm.ProtoNet(encoder, metric).meta_loss(*episode)[0].backward()
    logits = plain_logits(twin, episode, metric, 1.0)
    F.cross_entropy(logits.flatten(0, 1), episode[3].flatten()).backward()
    for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_support_and_query_inputs_get_gradients(encoder, episode):
    support_x, query_x = (episode[i].clone().requires_grad_() for i in (0, 2))
    fm.ProtoNet(encoder).meta_loss(support_x, episode[1], query_x, episode[3])[0].backward()
    assert support_x.grad.abs().sum() > 0
    assert query_x.grad.abs().sum() > 0


def test_logits_are_detached_and_can_be_left_out(encoder, episode):
    learner = fm.ProtoNet(encoder)
    loss, logits = learner.meta_loss(*episode)
    assert logits.shape == (T, N * QUERIES, N)
    assert not logits.requires_grad
    same_loss, none = learner.meta_loss(*episode, return_logits=False)
    assert none is None
    assert torch.equal(same_loss, loss)


def test_the_encoder_runs_once_for_all_tasks(encoder, episode):
    batches = []
    encoder.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    fm.ProtoNet(encoder).meta_loss(*episode)
    assert batches == [T * N * (SHOTS + QUERIES)]


def test_embeddings_of_any_shape_are_flattened(episode):
    flat = fm.ProtoNet(nn.Flatten())
    support_x, support_y, query_x, query_y = episode
    support_image, query_image = (x.unflatten(-1, (1, 2, 3)) for x in (support_x, query_x))
    shaped = fm.ProtoNet(nn.Identity()).meta_loss(support_image, support_y, query_image, query_y)
    torch.testing.assert_close(shaped[1], flat.meta_loss(*episode)[1], rtol=0, atol=0)


def test_num_classes_adds_a_class_without_support(encoder, episode):
    learner = fm.ProtoNet(encoder)
    loss, logits = learner.meta_loss(*episode, num_classes=N + 1)
    assert torch.equal(logits[..., N], torch.full((T, N * QUERIES), -torch.inf).to(logits))
    torch.testing.assert_close(loss, learner.meta_loss(*episode)[0], rtol=1e-12, atol=0)
    adapted = learner.adapt_tasks(*episode[:2], num_classes=N + 1)
    assert adapted.prototypes.shape == (T, N + 1, 5)


@pytest.fixture
def uneven(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tasks of 2, 5 and 3 ways. The first task has the classes 0 and 2."""
    generator = torch.Generator().manual_seed(0)
    support_x, query_x = (
        torch.randn(3, examples, 6, generator=generator, dtype=torch.float64)
        for examples in (10, 8)
    )
    ways = torch.tensor([[0, 2, 0, 2, 0], [0, 1, 2, 3, 4], [1, 3, 4, 1, 3]])
    episode = support_x, ways.repeat(1, 2), query_x, ways[:, [1, 0, 1, 2, 2, 0, 0, 1]]
    return tuple(part.to(device) for part in episode)


@pytest.mark.parametrize("metric", METRICS)
def test_classes_that_a_task_lacks(encoder, uneven, metric):
    """They were at the origin, and queries went there."""
    twin = copy.deepcopy(encoder)
    learner = fm.ProtoNet(encoder, metric, scale=0.7)
    loss, logits = learner.meta_loss(*uneven)
    loss.backward()
    losses = []
    for t, (support_x, support_y, query_x, query_y) in enumerate(zip(*uneven, strict=True)):
        support, query, classes = twin(support_x), twin(query_x), support_y.unique()
        centres = [support[support_y == n].mean(0) for n in classes]
        rows = [[-0.7 * distance(metric, q, c) for c in centres] for q in query]
        expected = torch.stack([torch.stack(row) for row in rows])
        torch.testing.assert_close(logits[t][:, classes], expected.detach(), rtol=0, atol=1e-12)
        assert logits[t].isinf().sum() == len(query) * (5 - len(classes))
        losses.append(F.cross_entropy(expected, torch.searchsorted(classes, query_y)))
    mean = torch.stack(losses).mean()
    mean.backward()
    torch.testing.assert_close(loss, mean, rtol=1e-12, atol=0)
    for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    adapted = learner.adapt_tasks(*uneven[:2])
    torch.testing.assert_close(adapted(uneven[2]), logits, rtol=1e-12, atol=1e-12)


def test_a_query_of_a_class_that_its_task_lacks(encoder, uneven):
    support_x, support_y, query_x, query_y = uneven
    query_y = query_y.clone()
    query_y[2, 4] = 2
    message = r"query_y\[2, 4\] is 2, a class without a support example in its task"
    with pytest.raises(ValueError, match=message):
        fm.ProtoNet(encoder).meta_loss(support_x, support_y, query_x, query_y)
    with pytest.raises(ValueError, match=message):
        fm.ProtoNet(encoder).meta_loss(support_x, support_y, query_x, query_y, relabel=True)


def test_labels_with_gaps(encoder, uneven):
    support_x, support_y, query_x, query_y = uneven
    names = torch.tensor([3, 7, 12, 42, 999], device=support_y.device)
    learner = fm.ProtoNet(encoder)
    with pytest.raises(ValueError, match=r"got 5 classes up to 999, and none is 0; num_cl.*=1000"):
        learner.meta_loss(support_x, names[support_y], query_x, names[query_y])
    loss, logits = learner.meta_loss(
        support_x, names[support_y], query_x, names[query_y], relabel=True
    )
    expected, all_logits = learner.meta_loss(*uneven)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    adapted = learner.adapt_tasks(support_x, names[support_y], relabel=True)
    assert adapted.classes.tolist() == [
        [3, 12, -1, -1, -1],
        [3, 7, 12, 42, 999],
        [7, 42, 999, -1, -1],
    ]
    assert torch.equal(adapted(query_x).isinf(), logits.isinf())
    torch.testing.assert_close(logits[0, :, :2], all_logits[0][:, [0, 2]], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"support_y: expected labels of at least 0, .* got -2"):
        learner.adapt_tasks(support_x, support_y - 2, relabel=True)


def test_adapt_tasks_gives_the_logits_of_meta_loss(encoder, episode):
    learner = fm.ProtoNet(encoder, "euclidean", scale=2.0)
    adapted = learner.adapt_tasks(*episode[:2])
    assert adapted.prototypes.shape == (T, N, 5)
    torch.testing.assert_close(
        adapted(episode[2]), learner.meta_loss(*episode)[1], rtol=1e-12, atol=1e-12
    )


def test_adapted_logits_are_differentiable(encoder, episode):
    support_x, query_x = (episode[i].clone().requires_grad_() for i in (0, 2))
    fm.ProtoNet(encoder).adapt_tasks(support_x, episode[1])(query_x).sum().backward()
    grads = [support_x.grad, query_x.grad, *(p.grad for p in encoder.parameters())]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert support_x.grad.abs().sum() > 0


def test_batch_norm_uses_batch_statistics_in_training_and_running_ones_in_evaluation(
    episode, device
):
    norm = nn.BatchNorm1d(6).double().to(device)
    learner = fm.ProtoNet(norm)
    x = torch.cat([episode[0], episode[2]], dim=1).flatten(0, 1)
    learner.meta_loss(*episode)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
    before = norm.running_mean.clone()
    learner.eval()
    logits = learner.meta_loss(*episode)[1]
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(logits, fm.ProtoNet(norm).eval().meta_loss(*episode)[1])
    alone = learner.adapt_tasks(episode[0][:1], episode[1][:1])(episode[2][:1])
    torch.testing.assert_close(alone, logits[:1], rtol=1e-12, atol=1e-12)


def test_no_tasks_give_empty_logits(encoder, episode):
    adapted = fm.ProtoNet(encoder).adapt_tasks(*(x[:0] for x in episode[:2]), num_classes=N)
    assert adapted(episode[2][:0]).shape == (0, N * QUERIES, N)


def test_inputs_stay_as_they_are(encoder, episode):
    before = [x.clone() for x in episode]
    fm.ProtoNet(encoder).meta_loss(*episode)[0].backward()
    assert all(torch.equal(x, was) for x, was in zip(episode, before, strict=True))


def test_training_brings_the_loss_down(encoder, episode):
    learner = fm.ProtoNet(encoder)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = learner.meta_loss(*episode)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_explain_names_the_metric_and_the_backends(encoder, device):
    text = fm.ProtoNet(encoder, "cosine").explain()
    assert "cosine" in text
    backend = fm.backend_of("prototype_loss", device, torch.float64)
    assert f"prototype_loss {backend}" in text
    assert f"on {device} float64" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": F.relu}, TypeError, "encoder: expected an nn.Module"),
        ({"metric": "manhattan"}, ValueError, r"metric: .*sqeuclidean.*'manhattan'"),
        ({"scale": "big"}, TypeError, "scale: expected a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fm.ProtoNet(**{"encoder": nn.Identity(), **options})


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda x: x.numpy(), TypeError, "support_x: expected a tensor, got ndarray"),
        (0, lambda x: x[0, :, 0], ValueError, r"support_x: expected shape \[T, examples, ...\]"),
        (1, lambda y: y[:, 1:], ValueError, r"support_y: expected shape \[2, 6\].*got \[2, 5\]"),
        (1, lambda y: y.float(), TypeError, "support_y: expected int64 labels, got torch.float32"),
        (1, lambda y: y - 2, ValueError, r"labels\[0, 0\] is -2, expected 0 <= label < 1 or -1"),
        (3, lambda y: y - 2, ValueError, r"query_labels\[0, 0\] is -2, expected 0 <= label < 3"),
        (
            2,
            lambda x: x[:, :, 1:],
            ValueError,
            r"query_x: .* \[2, Q, 6\].* got \[2, 12, 5\]",
        ),
        (2, lambda x: x.float(), TypeError, "query_x: expected support_x's dtype torch.float64"),
        (2, lambda x: x.to("meta"), ValueError, "query_x: expected support_x's device .* got meta"),
        (3, lambda y: y.to("meta"), ValueError, "query_labels: expected device .*, got meta"),
        (3, lambda y: y[:1], ValueError, r"query_y: expected shape \[2, 12\].*got \[1, 12\]"),
        (3, lambda y: y + 1, ValueError, "label"),
    ],
)
def test_bad_episodes(encoder, episode, index, change, error, message):
    broken = list(episode)
    broken[index] = change(broken[index])
    with pytest.raises(error, match=message):
        fm.ProtoNet(encoder).meta_loss(*broken)


def test_steps_are_refused(encoder, episode):
    with pytest.raises(ValueError, match=r"steps: expected None, .* got 3"):
        fm.ProtoNet(encoder).adapt_tasks(*episode[:2], steps=3)


def test_empty_support_needs_num_classes(encoder, episode):
    with pytest.raises(ValueError, match="num_classes: expected a number"):
        fm.ProtoNet(encoder).adapt_tasks(*(x[:, :0] for x in episode[:2]))


def test_an_encoder_must_return_one_row_an_example(episode):
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    with pytest.raises(ValueError, match=r"encoder: expected an output \[36, ...\]"):
        fm.ProtoNet(Mean()).meta_loss(*episode)


def test_adapted_queries_must_have_a_row_a_task(encoder, episode):
    adapted = fm.ProtoNet(encoder).adapt_tasks(*episode[:2])
    with pytest.raises(ValueError, match=r"query_x: expected shape \[2, Q, ...\], got"):
        adapted(episode[2][:1])
    with pytest.raises(TypeError, match="query_x: expected a tensor, got list"):
        adapted([1.0])
