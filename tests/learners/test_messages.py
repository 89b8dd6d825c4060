"""What users read when data, module or call do not fit: the argument, what came and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastmeta as fm

T, S = 4, 10
X, Y = torch.randn(T, S, 20), torch.arange(S).remainder(5).repeat(T, 1)
NESTED = torch.nested.nested_tensor([torch.randn(S, 20) for _ in range(T)], layout=torch.jagged)
PADDED = "expected a tensor of one shape, got a nested one; pad its examples"
FEATURES = (
    "Sequential fails on torch.float32 of shape [10, 20] in 0, Linear(in_features=30, "
    "out_features=16, bias=True): mat1 and mat2 shapes cannot be multiplied (10x20 and 30x16)"
)
ONE_EXAMPLE = (
    "query_x: Sequential fails on torch.float32 of shape [1, 20] in 1, BatchNorm1d: Expected more "
    "than 1 value per channel when training, got input size torch.Size([1, 16]). Norm layers take "
    "the statistics of one task's examples, and a single example has none; "
    "norm_statistics='running' takes the running statistics after eval()"
)
TRANSFORM = (
    "a learner was called inside a transform of torch.func (grad, vmap, jvp, ...), which cannot "
    "see its derivative. Take it by loss.backward() or torch.autograd.grad, and give all tasks to "
    "one call"
)


def network(features: int = 20, outputs: int = 5, norm: bool = False) -> nn.Sequential:
    middle = nn.BatchNorm1d(16) if norm else nn.ReLU()
    return nn.Sequential(nn.Linear(features, 16), middle, nn.Linear(16, outputs))


def maml(engine: str = "auto", loss: Callable = F.cross_entropy, **sizes) -> fm.MAML:
    return fm.MAML(network(**sizes), engine=engine, loss=loss)


def anil(loss: Callable = F.cross_entropy, **sizes) -> fm.ANIL:
    body, norm, head = network(**sizes)
    return fm.ANIL(nn.Sequential(body, norm), head, loss=loss)


def meta_loss(learner: nn.Module, x: Tensor = X, y: Tensor = Y) -> Callable[[], object]:
    return lambda: learner.meta_loss(x, y, x, y)


def one_query(learner: nn.Module) -> Callable[[], object]:
    return lambda: learner.eval().adapt_tasks(X, Y)(X[:, :1])


def transformed() -> Tensor:
    learner = maml()
    return grad(lambda x: learner.meta_loss(x, Y, x, Y)[0])(X)


def of_parameters() -> dict[str, Tensor]:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = maml("functional")

        def forward(self, x: Tensor) -> Tensor:
            return self.learner.meta_loss(x, Y, x, Y)[0]

    step = Step()
    return grad(lambda params: functional_call(step, params, X))(dict(step.named_parameters()))


def mapped() -> Tensor:
    learner = anil()
    return vmap(lambda x: learner.meta_loss(x, Y, x, Y)[0])(X[None])


Message = tuple[Callable[[], object], type[Exception], str]
MESSAGES: dict[str, Message] = {
    "features": (meta_loss(maml(features=30)), RuntimeError, f"support_x: {FEATURES}"),
    "features, functional": (
        meta_loss(maml("functional", features=30)),
        RuntimeError,
        f"support_x: {FEATURES}",
    ),
    "features, adapt": (
        lambda: maml(features=30).adapt_tasks(X, Y),
        RuntimeError,
        f"support_x: {FEATURES}",
    ),
    "features, queries": (
        lambda: maml().adapt_tasks(X, Y)(torch.randn(T, 3, 7)),
        RuntimeError,
        "query_x: Sequential fails on torch.float32 of shape [3, 7] in 0, Linear(in_features=20,",
    ),
    "features, anil": (meta_loss(anil(features=30)), RuntimeError, f"support_x: {FEATURES}"),
    "features, protonet": (
        meta_loss(fm.ProtoNet(network(features=30))),
        RuntimeError,
        "x: Sequential fails on torch.float32 of shape [80, 20] in 0, Linear(in_features=30,",
    ),
    "ids": (
        meta_loss(
            fm.MAML(nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 5))),
            x=torch.full((T, S, 3), 12),
        ),
        IndexError,
        "support_x: Sequential fails on torch.int64 of shape [10, 3] in 0, Embedding(10, 4): index",
    ),
    "one query": (one_query(maml(norm=True)), ValueError, ONE_EXAMPLE),
    "one query, functional": (one_query(maml("functional", norm=True)), ValueError, ONE_EXAMPLE),
    "one query, anil": (one_query(anil(norm=True)), ValueError, ONE_EXAMPLE),
    "labels [T, S, 1]": (
        meta_loss(maml(), y=Y[..., None]),
        ValueError,
        "support_y: expected class labels of shape [4, 10], got [4, 10, 1]; use squeeze(-1)",
    ),
    "labels [T, S, 1], anil": (
        meta_loss(anil(), y=Y[..., None]),
        ValueError,
        "support_y: expected shape [4, 10], got [4, 10, 1]; use squeeze(-1)",
    ),
    "labels [T, S, 1], protonet": (
        meta_loss(fm.ProtoNet(network()), y=Y[..., None]),
        ValueError,
        "support_y: expected shape [4, 10], one label an example of support_x, got [4, 10, 1]; "
        "use squeeze(-1)",
    ),
    "float labels": (
        meta_loss(maml(), y=Y.float()),
        TypeError,
        "support_y: expected int64 class labels, or probabilities of shape [4, 10, 5], got "
        "torch.float32 of shape [4, 10]; use long() for labels",
    ),
    "float labels, anil": (
        meta_loss(anil(), y=Y.float()),
        TypeError,
        "support_y: expected dtype torch.int64, got torch.float32; use long()",
    ),
    "float labels, protonet": (
        meta_loss(fm.ProtoNet(network()), y=Y.float()),
        TypeError,
        "support_y: expected int64 labels, got torch.float32; use long()",
    ),
    "int32 labels": (
        meta_loss(maml(), y=Y.int()),
        TypeError,
        "support_y: expected int64 class labels, got torch.int32; use long()",
    ),
    "targets [T, S]": (
        meta_loss(maml(loss=F.mse_loss, outputs=1), y=X[..., 0]),
        ValueError,
        "support_y: expected the shape of the outputs [4, 10, 1], got [4, 10]; use unsqueeze(-1)",
    ),
    "targets [T, S], huber": (
        meta_loss(maml(loss=nn.HuberLoss(), outputs=1), y=X[..., 0]),
        ValueError,
        "support_y: expected the shape of the outputs [4, 10, 1], got [4, 10]; use unsqueeze(-1)",
    ),
    "nested": (meta_loss(maml(), x=NESTED), TypeError, f"support_x: {PADDED}"),
    "nested, functional": (
        meta_loss(maml("functional"), x=NESTED),
        TypeError,
        f"support_x: {PADDED}",
    ),
    "nested, anil": (meta_loss(anil(), x=NESTED), TypeError, f"support_x: {PADDED}"),
    "nested, protonet": (
        meta_loss(fm.ProtoNet(network()), x=NESTED),
        TypeError,
        f"support_x: {PADDED}",
    ),
    "nested, op": (lambda: fm.pairwise_distance(NESTED, X), TypeError, f"x: {PADDED}"),
    "nested queries": (
        lambda: maml().adapt_tasks(X, Y)(NESTED),
        TypeError,
        f"query_x: {PADDED}",
    ),
    "sparse": (
        meta_loss(maml(), x=X.to_sparse()),
        TypeError,
        "support_x: expected a dense tensor, got a sparse_coo one; use to_dense()",
    ),
    "torch.func.grad": (transformed, RuntimeError, TRANSFORM),
    "torch.func.functional_call": (of_parameters, RuntimeError, TRANSFORM),
    "torch.func.vmap": (mapped, RuntimeError, TRANSFORM),
}


@pytest.mark.parametrize(("call", "error", "message"), MESSAGES.values(), ids=MESSAGES)
def test_message(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_running_statistics_are_the_way_out_for_one_query():
    learner = fm.MAML(network(norm=True), norm_statistics="running").eval()
    assert learner.adapt_tasks(X, Y)(X[:, :1]).shape == (T, 1, 5)


class Packed(nn.Module):
    """The last state of a recurrent network at each sequence's own end; rows of zeros are padding.

    ``pack_padded_sequence`` reads lengths on the host, which vmap cannot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x.abs().sum(-1).gt(0).sum(-1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.cell(packed)[1][0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_packed_sequences_run_one_task_at_a_time():
    torch.manual_seed(0)
    x = torch.randn(T, S, 6, 3, dtype=torch.float64)
    x[:, ::2, 4:] = 0  # shorter ones
    learner = fm.MAML(Packed().double(), lr=0.1, steps=2)
    with pytest.warns(RuntimeWarning, match="Packed runs one task at a time.*cannot be vmapped"):
        loss, _ = learner.meta_loss(x, Y, x, Y)
    loss.backward()
    expected = []
    for t in range(T):
        theta = dict(learner.module.named_parameters())
        for _ in range(2):
            value = F.cross_entropy(functional_call(learner.module, theta, x[t]), Y[t])
            grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
        expected.append(F.cross_entropy(functional_call(learner.module, theta, x[t]), Y[t]))
    grads = torch.autograd.grad(torch.stack(expected).mean(), list(learner.module.parameters()))
    for p, g in zip(learner.module.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
