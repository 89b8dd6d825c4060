"""ANIL: against MAML and unrolled graphs of the whole network, and every option."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.networks import (
    Recurrent,
    Tasks,
    build,
    classification,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.programs import with_running_statistics
from tests.helpers.unrolled import meta_gradient

EXACT = 1e-9
K, RATE = 3, 0.4

each_order = pytest.mark.parametrize("first_order", [False, True])


def anil(net: nn.Sequential, lr: object = RATE, steps: int = K, **options) -> fm.ANIL:
    """On a network whose last layer is the head; it has the network's own parameters."""
    return fm.ANIL(net[:-1], net[-1], lr, steps, **options)


def of_the_head(net: nn.Module, lr: object) -> Tensor:
    """Step sizes ``[1 or K, 1, L]`` that leave all but the last layer alone."""
    rates = torch.as_tensor(lr, dtype=torch.float64).reshape(-1, 1, 1)
    names = [name for name, _ in net.named_parameters()]
    own = [float(name.startswith(f"{len(net) - 1}.")) for name in names]
    return rates * torch.tensor(own, dtype=torch.float64)


def unrolled(net: nn.Sequential, tasks: Tasks, lr: object = RATE, **options):
    """The whole network by a loop with a graph; the gradient to the head's step sizes."""
    loss, steps = options.pop("loss", F.cross_entropy), options.pop("steps", K)
    rates = of_the_head(net, lr).to(tasks.support_x.device)
    found = meta_gradient(net, tasks, loss, rates, steps, **options)
    return found, found.lr[..., rates[0, 0] > 0].sum((1, 2))


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient(learner: fm.ANIL, tasks: Tasks) -> Tensor:
    """The meta-gradient by ``backward``, which is that of ``meta_gradient``."""
    value = learner.meta_gradient(*tasks)
    learner.zero_grad()
    loss, outputs = learner.meta_loss(*tasks)
    assert not outputs.requires_grad
    loss.backward()
    found = flat(p.grad for p in learner.module.parameters())
    for mine, its in zip((loss, outputs, found), value, strict=False):
        assert not its.requires_grad
        assert relative_error(mine.detach(), its) < 1e-12
    return found


@pytest.fixture
def images(device) -> tuple[nn.Sequential, Tasks]:
    return build("conv4", device), classification("conv4", device)


@pytest.fixture
def features(device) -> tuple[nn.Linear, Tasks]:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double().to(device), classification("mlp", device)


# Theory


@each_order
def test_without_a_body_it_is_maml_on_the_head(features, first_order):
    head, tasks = features
    maml = fm.MAML(head, RATE, K, first_order, learn_lr=True)
    learner = fm.ANIL(nn.Identity(), head, RATE, K, first_order=first_order, learn_lr=True)
    found, expected = learner.meta_gradient(*tasks), maml.meta_gradient(*tasks)
    for mine, its in zip(found[:4], expected[:4], strict=True):
        assert relative_error(mine, its) < EXACT
    adapted = [each.adapt_tasks(*tasks[:2]) for each in (learner, maml)]
    assert relative_error(*(each.params for each in adapted)) < EXACT
    assert relative_error(*(each(tasks.query_x) for each in adapted)) < EXACT


@each_order
@pytest.mark.parametrize("lr", [RATE, [0.4, 0.1, 0.9]])
def test_it_is_the_unrolled_graph_of_the_whole_network(images, first_order, lr, device):
    net, tasks = images
    expected, of_lr = unrolled(net, tasks, lr, first_order=first_order)
    rates = torch.tensor(lr, dtype=torch.float64, device=device)
    learner = anil(net, rates, first_order=first_order, learn_lr=True)
    for x in (tasks.support_x, tasks.query_x):
        x.requires_grad_()
    assert relative_error(gradient(learner, tasks), flat(expected.params.values())) < EXACT
    assert relative_error(learner.lr.grad.reshape(-1), of_lr) < EXACT
    assert relative_error(tasks.query_x.grad, expected.query_x) < EXACT
    if first_order:
        assert tasks.support_x.grad is None
    else:
        assert relative_error(tasks.support_x.grad, expected.support_x) < EXACT
    loss, outputs = learner.meta_loss(*tasks)
    assert relative_error(loss.detach(), expected.loss) < EXACT
    assert relative_error(outputs, expected.logits) < EXACT


@each_order
def test_it_is_maml_whose_steps_leave_the_body_alone(images, first_order):
    net, tasks = images
    lr = {name: RATE * name.startswith("17.") for name, _ in net.named_parameters()}
    found = gradient(anil(net, first_order=first_order), tasks)
    expected = fm.MAML(net, lr, K, first_order).meta_gradient(*tasks).grads
    assert relative_error(found, expected) < EXACT


def test_the_meta_loss_can_be_differentiated_twice(features):
    head, tasks = features
    start = head.weight.detach().clone().requires_grad_()
    learner = fm.ANIL(nn.Identity(), head, RATE, K)

    def loss(weight: Tensor) -> Tensor:
        return functional_call(_MetaLoss(learner), {"learner.module.head.weight": weight}, tasks)

    assert torch.autograd.gradgradcheck(loss, start)


class _MetaLoss(nn.Module):
    def __init__(self, learner: fm.ANIL) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, *tasks: Tensor) -> Tensor:
        return self.learner.meta_loss(*tasks)[0]


# Bodies and heads


def test_a_frozen_body_stays(images):
    net, tasks = images
    whole = anil(net).meta_gradient(*tasks).grads
    net[:-1].requires_grad_(False)
    learner = anil(net)
    learner.meta_loss(*tasks)[0].backward()
    assert all(p.grad is None for p in learner.body.parameters())
    of_head = flat(p.grad for p in learner.head.parameters())
    assert relative_error(of_head, whole[-len(of_head) :]) < EXACT
    assert relative_error(learner.meta_gradient(*tasks).grads, of_head) < EXACT


def test_a_recurrent_body(device):
    torch.manual_seed(0)
    net, tasks = Recurrent().double().to(device), classification("gru", device)
    head, net.head = net.head, nn.Identity()
    together, apart = (fm.ANIL(net, head, RATE, K, task_chunk=size) for size in (None, 1))
    found, expected = (gradient(learner, tasks) for learner in (together, apart))
    assert relative_error(found, expected) < EXACT


def test_a_head_without_a_bias(images):
    net, tasks = images
    net[-1] = nn.Linear(4, 4, bias=False).double().to(tasks.support_x.device)
    expected, _ = unrolled(net, tasks)
    learner = anil(net)
    assert relative_error(gradient(learner, tasks), flat(expected.params.values())) < EXACT
    adapted = learner.adapt_tasks(*tasks[:2])
    assert adapted.params.shape == (3, 16)
    assert relative_error(adapted(tasks.query_x), expected.logits) < EXACT


def test_the_body_s_own_statistics_stay(images):
    net, tasks = images
    before = copy.deepcopy(net.state_dict())
    learner = anil(net)
    gradient(learner, tasks)
    learner.adapt_tasks(*tasks[:2])(tasks.query_x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# Losses


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss()], ids=["function", "module"])
def test_squared_error(loss, device):
    net, tasks = regressor(device), regression(device)
    expected, _ = unrolled(net, tasks, loss=F.mse_loss)
    learner = anil(net, loss=loss)
    assert relative_error(gradient(learner, tasks), flat(expected.params.values())) < EXACT
    assert relative_error(learner.meta_loss(*tasks)[0].detach(), expected.loss) < EXACT


def test_binary_cross_entropy(device):
    net, tasks = regressor(device), regression(device)
    labels = (tasks.support_y > 0).double()
    tasks = tasks._replace(support_y=labels, query_y=(tasks.query_y > 0).double())
    loss = F.binary_cross_entropy_with_logits
    expected, _ = unrolled(net, tasks, loss=loss)
    learner = anil(net, loss=loss)
    assert relative_error(gradient(learner, tasks), flat(expected.params.values())) < EXACT
    for name in ("support_y", "query_y"):
        wrong = tasks._replace(**{name: labels + 0.25})
        with pytest.raises(ValueError, match=f"{name}: expected 0 or 1 for the binary cross"):
            learner.meta_loss(*wrong)


# Options


def test_weight_decay(features):
    head, tasks = features
    maml = fm.MAML(head, RATE, K, rule=fm.rules.SGD(weight_decay=0.3))
    learner = fm.ANIL(nn.Identity(), head, RATE, K, weight_decay=0.3)
    expected = maml.meta_gradient(*tasks)
    assert relative_error(gradient(learner, tasks), expected.grads) < EXACT


@pytest.mark.parametrize("form", ["auto", "primal", "dual"])
def test_the_form_and_the_steps_are_the_op_s(form, features):
    head, (x, y, *_) = features
    head, x = head.float(), x.float()
    learner = fm.ANIL(nn.Identity(), head, 0.3, 7, form=form)
    weight, bias = fm.linear_head(x, y, head.weight, head.bias, lr=0.3, steps=7, form=form)
    expected = torch.cat([weight.flatten(1), bias], 1)
    assert torch.equal(learner.adapt_tasks(x, y).params, expected)


def test_task_chunk(images):
    net, tasks = images
    expected = gradient(anil(net), tasks)
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    for size, passes in ((None, 1), (2, 2), (1, 3)):
        learner = anil(net, task_chunk=size)
        calls.clear()
        learner.adapt_tasks(*tasks[:2])
        assert len(calls) == passes
        assert relative_error(gradient(learner, tasks), expected) < EXACT


def test_bodies_that_vmap_cannot_take(features):
    head, tasks = features

    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.max().item()

    tasks = tasks[:2]
    learner = fm.ANIL(Stubborn(), head)
    with pytest.warns(RuntimeWarning, match="Stubborn runs one task at a time"):
        learner.adapt_tasks(*tasks)
    assert "without vmap, because Stubborn cannot be vmapped: vmap: It looks" in learner.explain()
    assert len(fm.ANIL(Stubborn(), head, task_chunk=1).adapt_tasks(*tasks)) == 3


def test_norm_statistics(images):
    net, tasks = images
    net = with_running_statistics(net).eval()
    expected, _ = unrolled(net, tasks, training=None)
    by_the_batch, running = (
        gradient(anil(net, norm_statistics=name), tasks) for name in ("batch", "running")
    )
    assert relative_error(running, flat(expected.params.values())) < EXACT
    assert relative_error(by_the_batch, running) > 1e-3


def test_step_sizes_are_parameters_where_they_are_learned(features):
    head, tasks = features
    body = nn.Identity()
    assert fm.ANIL(body, head, 0.2).lr == 0.2
    fixed = fm.ANIL(body, head, torch.tensor([0.1, 0.2]), 2)
    assert "lr" in fixed.state_dict() and "lr" not in dict(fixed.named_parameters())
    learned = fm.ANIL(body, head, 0.2, learn_lr=True)
    assert learned.lr.dtype == torch.float64
    assert "lr" in dict(learned.named_parameters())
    mine = nn.Parameter(torch.tensor(0.2, dtype=torch.float64, device=head.weight.device))
    assert fm.ANIL(body, head, mine).lr is mine
    result = learned.meta_gradient(*tasks)
    result.assign_to(learned)
    assert learned.lr.grad is result.lr_grad and result.lr_grad.shape == ()


# Methods


def test_adapted_tasks_are_differentiable(images):
    net, tasks = images
    learner = anil(net)
    expected = gradient(learner, tasks)
    adapted = learner.adapt_tasks(*tasks[:2])
    loss = F.cross_entropy(adapted(tasks.query_x).flatten(0, 1), tasks.query_y.flatten())
    found = torch.autograd.grad(loss, list(learner.module.parameters()))
    assert relative_error(flat(found), expected) < EXACT
    one = functional_call(net[-1], adapted.task(1), net[:-1](tasks.query_x[1]))
    assert relative_error(one, adapted(tasks.query_x)[1]) < EXACT


def test_steps_of_adaptation(features, device):
    head, tasks = features
    learner = fm.ANIL(nn.Identity(), head, torch.tensor([0.4, 0.1, 0.9]), K)
    start = flat(head.parameters()).expand(3, -1)
    assert torch.equal(learner.adapt_tasks(*tasks[:2], steps=0).params, start)
    two = fm.ANIL(nn.Identity(), head, torch.tensor([0.4, 0.1]), 2).adapt_tasks(*tasks[:2])
    assert torch.equal(learner.adapt_tasks(*tasks[:2], steps=2).params, two.params)
    with pytest.raises(ValueError, match="steps: expected at most 3, as lr has a number for each"):
        learner.adapt_tasks(*tasks[:2], steps=4)
    more = fm.ANIL(nn.Identity(), head, 0.4, 1).adapt_tasks(*tasks[:2], steps=4)
    four = fm.ANIL(nn.Identity(), head, 0.4, 4).adapt_tasks(*tasks[:2])
    assert torch.equal(more.params, four.params)


def test_gradients_of_what_the_loss_does_not_depend_on_are_zeros(features, device):
    head, tasks = features
    body = nn.Sequential(nn.Identity())
    body.idle = nn.Parameter(torch.ones(2, dtype=torch.float64, device=device))
    body.forward = lambda x: x
    learner = fm.ANIL(body, head, RATE, 0, learn_lr=True)
    result = learner.meta_gradient(*tasks)
    assert torch.equal(result.grads[:2], torch.zeros(2, dtype=torch.float64, device=device))
    assert result.lr_grad == 0


@pytest.mark.parametrize("learn_lr", [False, True])
def test_copies_and_state_dicts(learn_lr, device):
    tasks = classification("conv4", device)
    rates = (torch.full((K,), lr, dtype=torch.float64, device=device) for lr in (0.1, 0.3))
    learner = anil(build("conv4", device), next(rates), learn_lr=learn_lr)
    loss = learner.meta_loss(*tasks)[0].item()
    other = anil(build("conv4", device, seed=1), next(rates), learn_lr=learn_lr)
    assert other.meta_loss(*tasks)[0].item() != loss
    other.load_state_dict(learner.state_dict())
    for twin in (other, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert twin.meta_loss(*tasks)[0].item() == loss
        assert torch.equal(twin(tasks.query_x[0]), learner(tasks.query_x[0]))


def test_the_fallback_gives_the_same(images):
    net, tasks = images
    found = gradient(anil(net), tasks)
    with fm.use_backend("torch"):
        assert relative_error(gradient(anil(net), tasks), found) < EXACT


def test_autocast(images, device):
    net, tasks = images
    net, x, queries = net.float(), tasks.support_x.float(), tasks.query_x.float()
    tasks = tasks._replace(support_x=x, query_x=queries)
    learner = anil(net)
    expected = learner.meta_loss(*tasks)[0]
    with torch.autocast(device, torch.bfloat16):
        loss, _ = learner.meta_loss(*tasks)
        adapted = learner.adapt_tasks(*tasks[:2])
    loss.backward()
    assert adapted.params.dtype == torch.float32
    assert 0 < (loss - expected).abs() < 0.05
    assert all(p.grad.isfinite().all() for p in learner.parameters())


def test_under_torch_compile(images):
    net, tasks = images
    learner = anil(net)
    expected = gradient(learner, tasks)
    torch._dynamo.reset()
    learner.zero_grad()
    compiled = torch.compile(learner.meta_loss, fullgraph=True, backend="aot_eager")
    compiled(*tasks)[0].backward()
    assert relative_error(flat(p.grad for p in learner.module.parameters()), expected) < EXACT


def test_explain_says_what_runs(device):
    net = build("conv4", device)
    text = anil(net, 0.1, 7).explain()
    for part in ("Sequential, 516 trained", "all tasks vmapped together", "batch statistics"):
        assert part in text
    for part in ("4 features, 4 outputs", "7 of cross_entropy", "auto form", "second order"):
        assert part in text
    assert f"{fm.backend_of('linear_head', device, torch.float64)} backend on {device}" in text
    options = {"first_order": True, "form": "dual", "task_chunk": 1, "norm_statistics": "running"}
    text = anil(net, **options).explain()
    for part in ("first order", "dual form", "without vmap", "running statistics"):
        assert part in text
    assert "vmapped 2 at a time" in anil(net, task_chunk=2).explain()


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"body": 3}, TypeError, "body: expected an nn.Module, got int"),
        ({"head": nn.Identity()}, TypeError, "head: expected an nn.Linear, got Identity"),
        (
            {"head": nn.Linear(3, 2).requires_grad_(False)},
            *(ValueError, r"head: expected trainable parameters .* \['weight', 'bias'\]"),
        ),
        ({"lr": "fast"}, TypeError, "lr: expected a finite number or a tensor .*, got str"),
        ({"lr": True}, TypeError, "lr: expected a finite number or a tensor .*, got bool"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number .*, got nan"),
        ({"lr": torch.ones(3)}, ValueError, r"lr: .* \[K\] with K = 5, got \[3\]"),
        ({"lr": torch.ones(5, dtype=torch.int64)}, TypeError, "lr: expected a floating-point"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps: expected an integer, got 1.5"),
        ({"first_order": 1}, TypeError, "first_order: expected a bool, got 1"),
        ({"loss": 3}, TypeError, "loss: expected a callable, got int"),
        ({"loss": F.l1_loss}, ValueError, "loss: expected F.cross_entropy, F.mse_loss or"),
        ({"loss": nn.MSELoss(reduction="sum")}, ValueError, "without options, got MSELoss"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, ValueError, "without options"),
        (
            {"loss": F.binary_cross_entropy_with_logits},
            ValueError,
            "loss: expected a head of one output for .*, got 2",
        ),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: expected at least 0, got -1"),
        ({"form": "both"}, ValueError, "form: expected one of .*, got 'both'"),
        ({"task_chunk": 0}, ValueError, "task_chunk: expected at least 1, got 0"),
        ({"norm_statistics": "own"}, ValueError, "norm_statistics: expected one of .*, got 'own'"),
    ],
)
def test_bad_options(options, error, message):
    options = {"body": nn.Identity(), "head": nn.Linear(3, 2), **options}
    with pytest.raises(error, match=message):
        fm.ANIL(**options)


X, Y = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X[:0], Y[:0], X[:0], Y[:0]), ValueError, "support_x: .* at least one task and one"),
        ((X[:, :0], Y[:, :0], X, Y), ValueError, "support_x: .* at least one task and one"),
        ((X, Y, X[:, :0], Y[:, :0]), ValueError, "query_x: .* at least one task and one"),
        ((X, Y, X[:1], Y[:1]), ValueError, r"query_x: expected shape \[2, 4, ...\]"),
        ((X, Y[:, :3], X, Y), ValueError, r"support_y: expected shape \[2, 4, ...\]"),
        (("x", Y, X, Y), TypeError, "support_x: expected a tensor, got str"),
        ((X.double(), Y, X, Y), TypeError, "support_x: expected dtype torch.float32"),
        ((X[..., :2], Y, X, Y), ValueError, r"body: expected features \[4, 3\] .*got \[4, 2\]"),
        ((X, Y, X[..., :2], Y), ValueError, r"body: expected features \[4, 3\] .*got \[4, 2\]"),
        ((X, Y.int(), X, Y), TypeError, "support_y: expected dtype torch.int64, got torch.int32"),
        ((X, Y + 2, X, Y), ValueError, r"support_y\[0, 0\] is 2, expected 0 <= label < 2"),
        ((X, Y, X, Y - 2), ValueError, r"query_y\[0, 0\] is -2, expected 0 <= label < 2 or -1"),
        ((X, Y, X, X), TypeError, "query_y: expected dtype torch.int64, got torch.float32"),
    ],
)
def test_bad_batches(batch, error, message):
    with pytest.raises(error, match=message):
        fm.ANIL(nn.Identity(), nn.Linear(3, 2)).meta_loss(*batch)


def test_bad_targets_of_squared_errors():
    learner = fm.ANIL(nn.Identity(), nn.Linear(3, 2), loss=F.mse_loss)
    good = torch.zeros(2, 4, 2)
    with pytest.raises(ValueError, match=r"query_y: expected shape \[T, examples, 2\], got"):
        learner.meta_loss(X, good, X, X)
    with pytest.raises(TypeError, match=r"support_y: expected dtype torch.float32 like head"):
        learner.meta_loss(X, good.double(), X, good)
    with pytest.raises(TypeError, match=r"support_y: expected a floating-point tensor"):
        learner.adapt_tasks(X, Y)


def test_bad_queries_and_steps_of_adapted_tasks():
    learner = fm.ANIL(nn.Identity(), nn.Linear(3, 2))
    adapted = learner.adapt_tasks(X, Y)
    with pytest.raises(TypeError, match="query_x: expected a tensor, got list"):
        adapted([1.0])
    with pytest.raises(ValueError, match=r"query_x: expected shape \[2, Q, ...\], got \[1, 4, 3\]"):
        adapted(X[:1])
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        learner.adapt_tasks(X, Y, steps=-1)
