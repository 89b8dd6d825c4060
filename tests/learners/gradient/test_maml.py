"""MAML: golden numbers, step sizes, adapted tasks, options."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.networks import (
    Tasks,
    build,
    classification,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.unrolled import meta_gradient

EXACT = 1e-10


def joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class Point(nn.Module):
    """One parameter w, which is also the output for every example."""

    def __init__(self, value: float = 3.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x))


def quadratic(outputs: Tensor, targets: Tensor) -> Tensor:
    """mean of a/2 (w - b)^2 with targets (a, b)."""
    return (targets[:, 0] / 2 * (outputs - targets[:, 1]) ** 2).mean()


def quadratic_tasks(device: str) -> Tasks:
    """L_s = a/2 (w - b)^2 and L_q = c/2 (w - d)^2 for two tasks: (a, b, c, d) below."""
    like = {"dtype": torch.float64, "device": device}
    a, b, c, d = torch.tensor([[2.0, 1.0, 4.0, 0.5], [1.0, -1.0, 1.0, 0.0]], **like).T
    x = torch.zeros(2, 1, 1, **like)
    support, query = torch.stack([a, b], 1)[:, None], torch.stack([c, d], 1)[:, None]
    return Tasks(x, support.requires_grad_(), x, query.requires_grad_())


# K, first order -> loss, dw, dlr, db of both tasks, dd of both tasks
GOLDEN = [
    (1, False, 3.25, 2.25, -16.0, [1.5, 0.25], [-3.0, -1.0]),
    (2, False, 1.390625, 0.8515625, -11.75, [1.5, 0.2734375], [-2.0, -0.625]),
    (1, True, 3.25, 4.0, -16.0, None, [-3.0, -1.0]),
    (2, True, 1.390625, 2.625, -16.375, None, [-2.0, -0.625]),
]


@pytest.mark.parametrize(("steps", "first_order", "loss", "dw", "dlr", "db", "dd"), GOLDEN)
@pytest.mark.parametrize("chunk", [None, 1])
def test_golden_meta_gradients(steps, first_order, loss, dw, dlr, db, dd, chunk, device):
    """Worked out by hand from w_0 = 3 and lr = 1/4.

    With r = 1 - lr a: w_K = b + r^K (w_0 - b), v = c (w_K - d), and of one task
        dw = v r^K      dlr = -v K a r^(K-1) (w_0 - b)      db = v (1 - r^K)      dd = -v;
    in first order dw = v and dlr = -v sum_k a r^k (w_0 - b).

    K = 1: r = 1/2, w = 2, L = 9/2, v = 6, dw = 3, dlr = -24, db = 3, dd = -6; first order dlr = -24
           r = 3/4, w = 2, L = 2, v = 2, dw = 3/2, dlr = -8, db = 1/2, dd = -2; dlr = -8
    K = 2: w = 3/2, L = 2, v = 4, dw = 1, dlr = -16, db = 3, dd = -4; first order dlr = -24
           w = 5/4, L = 25/32, v = 5/4, dw = 45/64, dlr = -15/2, db = 35/64, dd = -5/4; dlr = -35/4
    All of them, halved and summed over the two tasks where both share the variable.
    """
    options = {"learn_lr": True, "task_chunk": chunk}
    maml = fm.MAML(Point().to(device), 0.25, steps, first_order, quadratic, **options)
    tasks = quadratic_tasks(device)
    value, outputs = maml.meta_loss(*tasks)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-14)
    assert maml.module.w.grad.item() == pytest.approx(dw, rel=1e-14)
    assert maml.lr.grad.item() == pytest.approx(dlr, rel=1e-14)
    assert tasks.query_y.grad[:, 0, 1].tolist() == pytest.approx(dd, rel=1e-14)
    if db is None:
        assert tasks.support_y.grad is None
    else:
        assert tasks.support_y.grad[:, 0, 1].tolist() == pytest.approx(db, rel=1e-14)
    assert outputs.shape == (2, 1)


# first order -> dw, dlr with one step size, dlr with one a step
GOLDEN_STEPS = [
    (False, 2.828125, -31.5, [-19.75, -11.75]),
    (True, 7.25, -40.75, [-29.0, -11.75]),
]


@pytest.mark.parametrize(("first_order", "dw", "dlr", "dlr_by_step"), GOLDEN_STEPS)
def test_golden_meta_gradients_of_all_steps(first_order, dw, dlr, dlr_by_step, device):
    """Worked out by hand: K = 2 steps of the tasks above with query losses weighed 1/2 and 2.

    Of the two tasks, from the numbers of K = 1 and K = 2 above:
        loss  1/2 9/2 + 2 2 = 25/4,      1/2 2 + 2 25/32 = 41/16
        dw    1/2 3 + 2 1 = 7/2,         1/2 3/2 + 2 45/64 = 69/32;    first order 11, 7/2
        dlr   -1/2 24 - 2 16 = -44,      -1/2 8 - 2 15/2 = -19;        first order -60, -43/2
    By step, with u_2 = 2 v_2 and u_1 = v_1 / 2 + r u_2 (first order: r left out),
        dlr_1 = -u_1 a (w_0 - b),  dlr_2 = -u_2 a r (w_0 - b), the latter the same in first order:
        task 1: u_2 = 8, u_1 = 7 (first order 11): -28 (-44), -16
        task 2: u_2 = 5/2, u_1 = 23/8 (first order 7/2): -23/2 (-14), -15/2
    All of them, halved and summed over the two tasks.
    """
    weights, data = [0.5, 2.0], quadratic_tasks(device)
    by_step = torch.full((2, 1), 0.25)
    for lr, expected in ((0.25, [dlr]), (by_step, dlr_by_step)):
        maml = fm.MAML(Point().to(device), lr, 2, first_order, quadratic, learn_lr=True)
        value, outputs = maml.meta_loss(*data, step_weights=weights)
        value.backward()
        assert value.item() == pytest.approx(4.40625, rel=1e-14)
        assert maml.module.w.grad.item() == pytest.approx(dw, rel=1e-14)
        assert maml.lr.grad.flatten().tolist() == pytest.approx(expected, rel=1e-14)
        assert outputs.flatten().tolist() == pytest.approx([1.5, 1.25], rel=1e-14)


def layer_step_sizes(net: nn.Module) -> dict[str, float]:
    return {name: 0.02 * (i + 1) for i, (name, _) in enumerate(net.named_parameters())}


def test_step_sizes_by_name_are_step_sizes_per_layer(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    by_name = layer_step_sizes(net)
    vector = torch.tensor(list(by_name.values()), dtype=torch.float64, device=device)
    expected = meta_gradient(net, tasks, F.cross_entropy, vector, 2)
    shuffled = dict(reversed(by_name.items()))
    maml = fm.MAML(net, shuffled, steps=2, learn_lr=True)
    maml.meta_loss(*tasks)[0].backward()
    assert relative_error(maml.lr.grad, expected.lr) < EXACT
    actual = joined(p.grad for p in net.parameters())
    assert relative_error(actual, joined(expected.params.values())) < EXACT


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("width", [1, 6, 83])
def test_learned_step_sizes_of_every_step(width, first_order, chunk, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    lr = torch.linspace(0.02, 0.1, 3 * width, dtype=torch.float64, device=device).view(3, width)
    weights = [0.25, 0.0, 1.0]
    expected = meta_gradient(
        net, tasks, F.cross_entropy, lr[:, None], 3, first_order, step_weights=weights
    )
    maml = fm.MAML(net, lr, 3, first_order, learn_lr=True, task_chunk=chunk)
    loss, logits = maml.meta_loss(*tasks, step_weights=weights)
    loss.backward()
    assert maml.lr.shape == (3, width)
    assert relative_error(maml.lr.grad, expected.lr[:, 0]) < EXACT
    actual = joined(p.grad for p in net.parameters())
    assert relative_error(actual, joined(expected.params.values())) < EXACT
    assert relative_error(loss, expected.loss) < EXACT
    assert relative_error(logits, expected.logits) < EXACT


def test_fewer_steps_take_the_first_rows_of_the_step_sizes(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    lr = torch.tensor([[0.1], [0.2], [0.3]], device=device)
    maml = fm.MAML(net, lr, 3)
    two = fm.MAML(net, lr[:2], 2).adapt_tasks(*tasks[:2]).params
    assert torch.equal(maml.adapt_tasks(*tasks[:2], steps=2).params, two)
    assert torch.equal(maml.adapt_tasks(*tasks[:2], steps=0).task(1)["0.weight"], net[0].weight)
    with pytest.raises(ValueError, match=r"steps: expected at most 3, as lr has a row .* got 4"):
        maml.adapt_tasks(*tasks[:2], steps=4)
    once = fm.MAML(net, lr[:1], 1)
    with pytest.raises(ValueError, match=r"steps: expected at most 1, as lr has a row .* got 2"):
        once.adapt_tasks(*tasks[:2], steps=2)


def test_a_clone_cannot_take_step_sizes_of_every_step(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    learner = fm.MAML(net, torch.full((2, 6), 0.1, device=device), 2).clone()
    loss = F.cross_entropy(learner(tasks.support_x[0]), tasks.support_y[0])
    with pytest.raises(ValueError, match=r"lr: adapt takes one step .* a step, \[2, 6\]"):
        learner.adapt(loss)


def test_a_step_size_made_by_another_network_gets_its_gradient(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    source = torch.tensor(-2.0, dtype=torch.float64, device=device, requires_grad=True)
    fm.MAML(net, source.exp(), steps=2).meta_loss(*tasks)[0].backward()
    lr = source.detach().exp()
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 2).lr * lr
    assert relative_error(source.grad, expected) < EXACT


def test_learned_step_sizes_are_parameters(device):
    net = build("mlp", device)
    given = torch.full((83,), 0.1, device=device)
    maml = fm.MAML(net, given, learn_lr=True)
    assert "lr" in dict(maml.named_parameters())
    assert maml.lr.dtype == torch.float64
    fixed = fm.MAML(net, given)
    assert "lr" not in dict(fixed.named_parameters())
    assert "lr" in fixed.state_dict()
    own = nn.Parameter(torch.tensor(0.1, dtype=torch.float64, device=device))
    assert fm.MAML(net, own).lr is own


def test_learned_step_sizes_do_not_touch_the_callers_tensor(device):
    given = torch.full((83,), 0.1, dtype=torch.float64, device=device)
    maml = fm.MAML(build("mlp", device), given, learn_lr=True)
    with torch.no_grad():
        maml.lr.zero_()
    assert given[0] == 0.1


def test_a_step_size_comes_to_the_device_of_the_module(device):
    maml = fm.MAML(build("mlp", device), torch.full((6,), 0.1, device="cpu"), learn_lr=True)
    loss, _ = maml.meta_loss(*classification("mlp", device))
    loss.backward()
    assert maml.lr.device == maml.module[0].weight.device
    assert maml.lr.grad.any()


def test_meta_loss_trains(device):
    net, tasks = regressor(device), regression(device, tasks=4, examples=10)
    tasks = tasks._replace(support_y=tasks.support_x.sin(), query_y=tasks.query_x.sin())
    maml = fm.MAML(net, 0.05, loss=F.mse_loss, learn_lr=True)
    optimizer = torch.optim.Adam(maml.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = maml.meta_loss(*tasks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("first_order", [False, True])
def test_a_loss_on_adapted_tasks_gives_the_meta_gradient(first_order, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    maml = fm.MAML(net, 0.1, 2, first_order, learn_lr=True)
    loss, logits = maml.meta_loss(*tasks)
    wanted = torch.autograd.grad(loss, list(maml.parameters()))
    adapted = maml.adapt_tasks(*tasks[:2])
    outputs = adapted(tasks.query_x)
    own_loss = F.cross_entropy(outputs.flatten(0, 1), tasks.query_y.flatten())
    actual = torch.autograd.grad(own_loss, list(maml.parameters()))
    assert relative_error(outputs.detach(), logits) < EXACT
    assert relative_error(joined(actual), joined(wanted)) < EXACT


def test_adapted_tasks(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1)
    adapted = maml.adapt_tasks(*tasks[:2], steps=3)
    assert len(adapted) == 3
    assert adapted.params.shape == (3, 83)
    assert adapted(tasks.query_x[:, :0]).shape == (3, 0, 4)
    own = functional_call(net, adapted.task(1), (tasks.query_x[1],))
    assert relative_error(own, adapted(tasks.query_x)[1]) < EXACT
    assert torch.equal(maml.adapt_tasks(*tasks[:2], steps=0).task(2)["0.weight"], net[0].weight)
    with pytest.raises(ValueError, match=r"query_x: expected shape \[3, Q, ...\], got \[2, 5, 3\]"):
        adapted(tasks.query_x[:2])
    with pytest.raises(TypeError, match="query_x: expected a tensor, got list"):
        adapted([1.0])


def test_steps_of_adapt_tasks_default_to_the_learners(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    three = fm.MAML(net, 0.1, steps=3).adapt_tasks(*tasks[:2]).params
    one = fm.MAML(net, 0.1, steps=1)
    assert torch.equal(one.adapt_tasks(*tasks[:2], steps=3).params, three)
    assert not torch.equal(one.adapt_tasks(*tasks[:2]).params, three)


def test_adapting_without_gradients(device):
    maml, tasks = fm.MAML(build("conv4", device).eval(), 0.1), classification("conv4", device)
    with torch.no_grad():
        adapted = maml.adapt_tasks(*tasks[:2])
        logits = adapted(tasks.query_x)
    assert not adapted.params.requires_grad
    assert not logits.requires_grad
    assert relative_error(logits, maml.meta_loss(*tasks)[1]) < EXACT


def test_forward_is_the_modules_own(device):
    net = build("mlp", device)
    x = torch.randn(2, 3, dtype=torch.float64).to(device)
    assert torch.equal(fm.MAML(net)(x), net(x))


def test_freezing_after_construction_is_seen(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1)
    net[0].requires_grad_(False)
    assert maml.adapt_tasks(*tasks[:2]).params.shape == (3, 83 - 24)


def test_options_reach_the_engine(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    reference = fm.MAML(net, 0.1, 2).meta_loss(*tasks)[0]
    wanted = torch.autograd.grad(reference, net[0].weight)[0]
    rough = fm.MAML(net, 0.1, 2, hvp_mode="finite_difference").meta_loss(*tasks)[0]
    error = relative_error(torch.autograd.grad(rough, net[0].weight)[0], wanted)
    assert 1e-14 < error < 1e-6


def test_the_choice_of_engine_and_memory_is_kept():
    net = build("mlp", "cpu")
    assert (fm.MAML(net).engine, fm.MAML(net).memory) == ("auto", "auto")
    maml = fm.MAML(net, engine="functional", memory="recompute")
    assert (maml.engine, maml.memory) == ("functional", "recompute")


@pytest.mark.parametrize("learn_lr", [False, True])
def test_copies_and_state_dicts(learn_lr, device):
    tasks = classification("mlp", device)
    step_sizes = (torch.full((6,), lr, device=device) for lr in (0.1, 0.3))
    maml = fm.MAML(build("mlp", device), next(step_sizes), 2, learn_lr=learn_lr)
    loss = maml.meta_loss(*tasks)[0].item()
    other = fm.MAML(build("mlp", device, seed=1), next(step_sizes), 2, learn_lr=learn_lr)
    assert other.meta_loss(*tasks)[0].item() != loss
    other.load_state_dict(maml.state_dict())
    for twin in (other, copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert twin.meta_loss(*tasks)[0].item() == loss
    buffer = io.BytesIO()
    torch.save(maml.state_dict(), buffer)
    assert buffer.tell() > 0


def test_explain_says_what_the_functional_engine_does(device):
    def explained(*args, **options) -> str:
        return fm.MAML(build("mlp", device), *args, engine="functional", **options).explain()

    text = explained(0.1, 3)
    for part in ("Functional engine", "Sequential", "83 adapted parameters", "6 tensors"):
        assert part in text
    assert "tasks vmapped, as many at a time as the size of their activations suggests" in text
    assert "all tasks vmapped together" in explained(task_chunk=None)
    assert "Inner steps: 3, second order by the adjoint, one reverse" in text
    assert fm.backend_of("inner_update", device, torch.float64) in text
    assert f"on {device} in float64" in text
    assert "engine='functional' asks for it" in text
    assert "without vmap" in explained(task_chunk=1)
    assert "8 at a time" in explained(task_chunk=8)
    assert "first order" in explained(first_order=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": torch.relu}, TypeError, "model: expected an nn.Module, got builtin"),
        ({"model": nn.ReLU()}, ValueError, "no trainable parameter"),
        ({"lr": "fast"}, TypeError, "lr: expected a number or a tensor, got str"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number, got nan"),
        ({"lr": torch.ones(5)}, ValueError, r"lr: expected .*; got \[5\]"),
        ({"lr": torch.ones(2, 83)}, ValueError, r"lr: expected .* K = 1; got \[2, 83\]"),
        ({"lr": torch.ones(1, 5)}, ValueError, r"lr: expected .* \[K, P\] .*; got \[1, 5\]"),
        ({"lr": torch.ones(1, 1, 1)}, ValueError, r"lr: expected .*; got \[1, 1, 1\]"),
        ({"lr": torch.tensor(1)}, TypeError, "lr: expected a floating-point tensor"),
        ({"lr": nn.Parameter(torch.ones(83))}, TypeError, "lr: expected dtype torch.float64"),
        ({"lr": {"0.weight": 0.1}}, ValueError, r"lr: expected the names \['0.weight', "),
        ({"lr": {"steps": -1}, "steps": -1}, ValueError, "steps: expected at least 0"),
        ({"steps": True}, TypeError, "steps: expected an integer, got True"),
        ({"first_order": "yes"}, TypeError, "first_order: expected a bool"),
        ({"loss": "mse"}, TypeError, "loss: expected a callable"),
        ({"task_chunk": 0}, ValueError, "task_chunk: expected at least 1"),
        ({"hvp_mode": "fast"}, ValueError, "hvp_mode: expected one of"),
        (
            {"engine": "native"},
            ValueError,
            r"engine: expected one of auto, program, .*'native'",
        ),
        (
            {"memory": None},
            ValueError,
            r"memory: expected one of auto, recompute, .* got None",
        ),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fm.MAML(**{"model": build("mlp", "cpu"), **options})


def test_a_step_size_by_name_is_one_number():
    net = build("mlp", "cpu")
    lr = {name: torch.ones(2) for name, _ in net.named_parameters()}
    with pytest.raises(
        ValueError, match=r"lr: expected one number for '0.weight', got shape \[2\]"
    ):
        fm.MAML(net, lr)


def test_no_tasks_are_refused():
    maml, tasks = fm.MAML(build("mlp", "cpu")), classification("mlp", "cpu")
    empty = [tensor[:0] for tensor in tasks]
    with pytest.raises(ValueError, match=r"support_x: .* at least one task"):
        maml.meta_loss(*empty)
    with pytest.raises(ValueError, match=r"support_x: .* at least one task"):
        maml.adapt_tasks(*empty[:2])
