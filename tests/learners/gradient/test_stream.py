"""Streams: a step on each batch, reads between them; against an unrolled loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.memory import peak_bytes
from tests.helpers.networks import joined, relative_error

EXACT = 1e-10
T, C, B = 2, 5, 3

backends = pytest.mark.parametrize("backend", ["torch", "native"])  # torch: no program


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double().to(device)


def draw(*shape: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)


def unrolled(
    net, x, y, lr, weight=None, reads=None, after=False, beta=None, decay=None, adapt=None
):
    """One task and one step after the other, with ``create_graph=True``."""
    read_x, read_y = reads or (x, y)
    losses, outputs = [], []

    def read(params: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
        outputs.append(functional_call(net, params, (x,)))
        losses.append(F.mse_loss(outputs[-1], y))

    for t in range(T):
        params = dict(net.named_parameters())
        adapted = [name for name in params if adapt is None or name in adapt]
        m = {name: torch.zeros_like(params[name]) for name in adapted}
        for c in range(C):
            if not after:
                read(params, read_x[t, c], read_y[t, c])
            z = functional_call(net, params, (x[t, c],))
            each = (z - y[t, c]).square().mean(1)
            value = each.mean() if weight is None else (weight[t, c] * each).sum()
            grads = torch.autograd.grad(value, [params[n] for n in adapted], create_graph=True)
            for name, g in zip(adapted, grads, strict=True):
                m[name] = (0 if beta is None else beta[t, c]) * m[name] + g
                a = 0 if decay is None else decay[t, c]
                params = {**params, name: (1 - a) * params[name] - lr * m[name]}
            if after:
                read(params, read_x[t, c], read_y[t, c])
    return torch.stack(losses).mean(), torch.stack(outputs).view(T, C, *outputs[0].shape)


def assert_same_gradients(found: Tensor, expected: Tensor, sources: list[Tensor]) -> None:
    for a, e in zip(*(torch.autograd.grad(v, sources) for v in (found, expected)), strict=True):
        assert relative_error(a, e) < EXACT


@backends
@pytest.mark.parametrize("memory", ["keep", "segments"])
@pytest.mark.parametrize("read", ["before", "after"])
@pytest.mark.parametrize("adapt", [None, "2.*"])
def test_equals_an_unrolled_loop(adapt, read, memory, backend, device):
    net = network(device)
    x, y = draw(T, C, B, 2, device=device).requires_grad_(), draw(T, C, B, 2, device=device)
    beta, decay = draw(T, C, device=device), 0.1 * draw(T, C, device=device) ** 2
    lr = torch.tensor(0.3, dtype=torch.float64, device=device)
    maml = fm.MAML(net, lr, loss=F.mse_loss, learn_lr=True, adapt=adapt)
    with fm.use_backend(backend):
        loss, outputs = maml.stream_loss(
            x,
            y,
            read=read,
            momentum=beta.requires_grad_(),
            decay=decay.requires_grad_(),
            memory=memory,
        )
        sources = [*net.parameters(), maml.lr, x, beta, decay]
        expected, wanted = unrolled(
            net,
            x,
            y,
            maml.lr,
            after=read == "after",
            beta=beta,
            decay=decay,
            adapt=adapt and maml.layout.names,
        )
        assert relative_error(loss, expected) < EXACT
        assert relative_error(outputs, wanted) < EXACT
        assert_same_gradients(loss, expected, sources)


def test_rates_of_examples_and_reads_of_others(device):
    net = network(device)
    x, y, weight = (
        draw(T, C, B, 2, device=device),
        draw(T, C, B, 2, device=device),
        draw(T, C, B, device=device),
    )
    reads = draw(T, C, 4, 2, device=device), draw(T, C, 4, 2, device=device)
    sources = [*net.parameters(), *(t.requires_grad_() for t in (x, y, weight, *reads))]
    loss, outputs = fm.MAML(net, 0.3, loss=F.mse_loss).stream_loss(
        x, y, weight=weight, read_x=reads[0], read_y=reads[1], read="after"
    )
    expected, wanted = unrolled(net, x, y, 0.3, weight, reads, after=True)
    assert relative_error(outputs, wanted) < EXACT
    assert_same_gradients(loss, expected, sources)


def test_an_inner_loss_of_its_own(device):
    net = network(device)
    x, y = draw(T, C, B, 2, device=device), draw(T, C, B, 2, device=device)
    rates = torch.full((T, C, B), 2 / B, dtype=torch.float64, device=device)
    twice = fm.MAML(net, 0.3, loss=F.mse_loss, inner_loss=lambda z, y: 2 * F.mse_loss(z, y))
    expected = fm.MAML(net, 0.3, loss=F.mse_loss).stream_loss(x, y, weight=rates)[0]
    assert relative_error(twice.stream_loss(x, y)[0], expected) < EXACT


def test_all_arguments_by_finite_differences(device):
    net = network(device)
    maml = fm.MAML(net, 0.3, loss=F.mse_loss)
    inputs = [
        draw(T, C, B, 2, device=device),
        draw(T, C, B, 2, device=device),
        draw(T, C, B, device=device),
    ]
    inputs += [draw(T, C, device=device), draw(T, C, device=device) / 9, draw(T, 22, device=device)]

    def loss(x, y, weight, momentum, decay, start):
        return maml.stream_loss(
            x, y, weight=weight, momentum=momentum, decay=decay, start=start, read="after"
        )[0]

    assert gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


def test_distillation_through_twenty_steps(device):
    """The gradient to one synthetic batch that is seen at every step."""
    net = network(device)
    x, y = draw(1, 1, B, 2, device=device).requires_grad_(), draw(1, 1, B, 2, device=device)
    real = draw(1, 1, 8, 2, device=device), draw(1, 1, 8, 2, device=device)
    maml = fm.MAML(net, 0.1, 20, loss=F.mse_loss)
    expected = maml.meta_loss(x[:, 0], y[:, 0], real[0][:, 0], real[1][:, 0])[0]
    (wanted,) = torch.autograd.grad(expected, x)
    reads = {"read_x": real[0].expand(1, 20, 8, 2), "read_y": real[1].expand(1, 20, 8, 2)}
    many = x.expand(1, 20, B, 2), y.expand(1, 20, B, 2)
    one_by_one = fm.MAML(net, 0.1, loss=F.mse_loss)
    losses, _ = one_by_one.stream_loss(*many, **reads, read="after", memory="segments")
    shorter, _ = one_by_one.stream_loss(
        *(t[:, :19] for t in many), **{n: t[:, :19] for n, t in reads.items()}, read="after"
    )
    last = 20 * losses - 19 * shorter
    assert relative_error(last, expected) < EXACT
    assert relative_error(torch.autograd.grad(last, x)[0], wanted) < 1e-8


def test_segments_keep_the_square_root_of_the_steps(device):
    net = fm.models.MLP([64, 64, 64]).to(device)
    maml = fm.MAML(net, 0.1, loss=F.mse_loss)

    def peak(count: int, memory: str) -> int:
        x = torch.randn(4, 1, 4, 64, device=device).expand(4, count, 4, 64)
        return peak_bytes(lambda: maml.stream_loss(x, x, memory=memory)[0].backward())

    kept, segments = ([peak(n, memory) for n in (16, 64)] for memory in ("keep", "segments"))
    assert kept[1] > 3 * kept[0]
    assert segments[1] < 2.5 * segments[0]
    assert segments[1] < kept[1] / 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"read": "never"}, ValueError, "read: expected"),
        ({"memory": "recompute"}, ValueError, "memory: expected"),
        ({"momentum": "0.9"}, TypeError, "momentum: expected a number or a tensor, got str"),
        ({"decay": torch.zeros(7)}, ValueError, r"decay: expected a number or shape \[\], \[C\]"),
        ({"weight": torch.ones(2, 5, 4)}, ValueError, r"weight: expected shape \[2, 5, 3\]"),
        ({"read_x": torch.ones(2, 5, 4, 2)}, ValueError, r"read: expected y \[T, C, B, \.\.\.\]"),
    ],
)
def test_what_does_not_fit(options, error, message, device):
    x = draw(T, C, B, 2, device=device)
    options = {n: v.to(x) if torch.is_tensor(v) else v for n, v in options.items()}
    with pytest.raises(error, match=message):
        fm.MAML(network(device), loss=F.mse_loss).stream_loss(x, x, **options)
    with pytest.raises(ValueError, match="rule: expected plain descent for stream_loss"):
        fm.MAML(network(device), rule=fm.rules.Adam()).stream_loss(x, x)
    assert joined(network(device).parameters()).numel() == 22
