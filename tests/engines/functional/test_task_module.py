"""The functional engine with modules that have more than plain parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import Examples, InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.networks import Recurrent, Tasks, build, classification, relative_error
from tests.helpers.skips import skip_without_forward_derivative
from tests.helpers.unrolled import meta_gradient, vmapped_meta_loss

EXACT = 1e-10


def gradients(
    module: nn.Module, tasks: Tasks, loss=F.cross_entropy, lr: float = 0.1, **options
) -> Tensor:
    """The engine's meta-gradient ``[P]`` by ``meta_loss``."""
    engine = FunctionalEngine(module, loss, InnerLoopOptions(**{"steps": 2, **options}))
    theta = engine.parameters()
    return torch.autograd.grad(engine.meta_loss(theta, lr, TaskBatch(*tasks))[0], theta)[0]


def unrolled(module: nn.Module, tasks: Tasks, loss=F.cross_entropy, steps: int = 2) -> Tensor:
    lr = torch.tensor(0.1, dtype=torch.float64, device=tasks.support_x.device)
    params = meta_gradient(module, tasks, loss, lr, steps).params
    return ParameterLayout.of(module).flatten(params)


def through_adapt(module: nn.Module, tasks: Tasks, between=lambda: None) -> Tensor:
    """The meta-gradient ``[P]`` by ``adapt``; ``between`` runs before its backward."""
    engine = FunctionalEngine(module, F.cross_entropy, InnerLoopOptions(steps=2))
    theta = engine.parameters()
    adapted = engine.adapt(theta, 0.1, Examples(*tasks[:2]))
    after = FunctionalEngine(module, F.cross_entropy, InnerLoopOptions(steps=0))
    loss = after.meta_loss(adapted, 0.0, TaskBatch(*tasks))[0]
    between()
    return torch.autograd.grad(loss, theta)[0]


def dropout_net(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).double().to(device)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_dropout_replays_the_masks_of_each_step(mode, device):
    net, tasks = dropout_net(device), classification("mlp", device)
    torch.manual_seed(5)
    loss = vmapped_meta_loss(net, tasks, F.cross_entropy, 0.1, 2)
    loss.backward()
    expected = ParameterLayout.of(net).flatten({n: p.grad for n, p in net.named_parameters()})
    torch.manual_seed(5)
    assert relative_error(gradients(net, tasks, hvp_mode=mode), expected) < EXACT


def test_finite_differences_shift_both_ways_under_the_same_masks(device):
    net, tasks = dropout_net(device), classification("mlp", device)
    torch.manual_seed(5)
    expected = gradients(net, tasks)
    torch.manual_seed(5)
    assert relative_error(gradients(net, tasks, hvp_mode="finite_difference"), expected) < 1e-6


def test_dropout_leaves_the_random_stream_as_if_each_mask_was_drawn_once(device):
    net, tasks = dropout_net(device), classification("mlp", device)
    torch.manual_seed(5)
    vmapped_meta_loss(net, tasks, F.cross_entropy, 0.1, 2)
    expected = torch.rand(3, device=device)
    for way in (gradients, through_adapt):
        torch.manual_seed(5)
        way(net, tasks)
        assert torch.equal(torch.rand(3, device=device), expected)


def test_dropout_masks_survive_draws_before_backward(device):
    net, tasks = dropout_net(device), classification("mlp", device)
    torch.manual_seed(5)
    expected = gradients(net, tasks)
    torch.manual_seed(5)
    actual = through_adapt(net, tasks, between=lambda: torch.rand(100, device=device))
    assert relative_error(actual, expected) < EXACT


def test_dropout_masks_differ_between_tasks(device):
    net, tasks = dropout_net(device), classification("mlp", device)
    same = [t[:1].expand(3, *t.shape[1:]) for t in tasks[:2]]
    engine = FunctionalEngine(net, F.cross_entropy)
    adapted = engine.adapt(engine.parameters(), 0.1, Examples(*same))
    assert not torch.equal(adapted[0], adapted[1])
    net.eval()
    adapted = engine.adapt(engine.parameters(), 0.1, Examples(*same))
    assert torch.equal(adapted[0], adapted[1])


def test_the_way_back_runs_in_the_mode_of_the_way_there(device):
    net, tasks = dropout_net(device), classification("mlp", device)
    torch.manual_seed(5)
    expected = gradients(net, tasks)
    torch.manual_seed(5)
    assert relative_error(through_adapt(net, tasks, between=net.eval), expected) < EXACT
    assert not net[1].training


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_parameters_stay_tied(device):
    torch.manual_seed(0)
    net, tasks = Tied().double().to(device), classification("mlp", device)
    assert relative_error(gradients(net, tasks), unrolled(net, tasks)) < EXACT
    assert net.second.weight is net.first.weight


def test_a_submodule_in_two_places_stays_one_and_is_restored(device):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 4)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    net, tied = (module.double().to(device) for module in (Twice(), Tied()))
    tasks = classification("mlp", device)
    tied.first.load_state_dict(net.first.state_dict())
    tied.second.bias = tied.first.bias
    tied.head.load_state_dict(net.head.state_dict())
    parameters = list(net.parameters())
    assert relative_error(gradients(net, tasks), unrolled(tied, tasks)) < EXACT
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))


def test_frozen_parameters_are_not_adapted(device):
    net, tasks = build("conv4", device), classification("conv4", device)
    net[0].requires_grad_(False)
    net[-1].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    actual = gradients(net, tasks)
    assert relative_error(actual, unrolled(net, tasks)) < EXACT
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    engine = FunctionalEngine(net, F.cross_entropy)
    engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*tasks))[0].backward()
    assert net[0].weight.grad is None
    assert net[-1].weight.grad is not None


def test_a_frozen_parameter_changed_before_backward_is_noticed(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    net[0].requires_grad_(False)

    def change() -> None:
        with torch.no_grad():
            net[0].weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        through_adapt(net, tasks, between=change)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("mode", ["reverse", "forward", "finite_difference"])
def test_unused_parameters_get_zero_gradients(mode, device):
    net = Unused().double().to(device)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=2, hvp_mode=mode))
    engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*classification("mlp", device)))[
        0
    ].backward()
    assert net.unused.weight.grad is not None
    assert not net.unused.weight.grad.any()
    assert net.used.weight.grad.any()


def test_a_loss_without_any_parameter_has_zero_gradients(device):
    net, tasks = Unused().double().to(device), classification("mlp", device)
    assert not gradients(net, tasks, loss=lambda outputs, y: y.double().mean()).any()


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_uses_batch_statistics_and_leaves_the_running_ones_alone(training, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    net(torch.randn(8, 1, 16, 16, dtype=torch.float64).to(device))
    net.train(training)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    objects = dict(net.named_buffers())
    actual = gradients(net, tasks)
    assert relative_error(actual, unrolled(net, tasks)) < EXACT
    for name, buffer in net.named_buffers():
        assert buffer is objects[name]
        assert torch.equal(buffer, before[name])
    assert net[1].track_running_stats
    assert net.training == training


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_leaves_its_running_statistics_alone(training, device):
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    net, tasks = net.double().to(device).train(training), classification("residual", device)
    before = norm.running_mean.clone()
    assert relative_error(gradients(net, tasks), unrolled(net, tasks)) < EXACT
    assert torch.equal(norm.running_mean, before)


def test_the_module_is_restored_when_the_loss_raises(device):
    net, tasks = build("conv4", device).eval(), classification("conv4", device)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("no")

    fast_path, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    with pytest.raises(ArithmeticError):
        gradients(net, tasks, loss=broken)
    assert net[1].running_mean is not None
    assert net[1].track_running_stats
    assert not net.training
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.backends.cudnn.enabled == cudnn
    assert torch.backends.cuda.flash_sdp_enabled()


class Remembering(nn.Module):
    """Keeps a running mean of its activations, a count of its calls and a table of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(3, 5), nn.Linear(5, 4)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("order", torch.tensor([4, 3, 2, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        self.calls += 1
        self.mean.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return self.head((h - self.mean)[:, self.order])


@pytest.mark.parametrize("chunk", [None, 1])
def test_buffers_that_a_module_writes_are_copies_that_start_afresh(chunk, device):
    torch.manual_seed(0)
    net, tasks = Remembering().double().to(device), classification("mlp", device)
    actual = gradients(net, tasks, task_chunk=chunk)
    assert net.calls == 0
    assert not net.mean.any()

    class Stateless(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            return self.head((h - h.detach().mean(0) / 2)[:, self.order])

    same = Stateless().double().to(device)
    same.load_state_dict(net.state_dict())
    assert relative_error(actual, unrolled(same, tasks)) < EXACT


def lstm_cell_net() -> nn.Module:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(2, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0])

    return Cell()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("lstm", lambda: Recurrent(nn.LSTM)),
        ("rnn", lambda: Recurrent(nn.RNN)),
        ("lstm", lstm_cell_net),
    ],
)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_recurrent_layers(name, make, mode, device):
    skip_without_forward_derivative(name, mode, device)
    torch.manual_seed(0)
    net, tasks = make().double().to(device), classification("gru", device)
    assert relative_error(gradients(net, tasks, hvp_mode=mode), unrolled(net, tasks)) < EXACT


def test_a_recurrent_layer_is_left_with_its_own_weights(device):
    net, tasks = build("gru", device), classification("gru", device)
    gradients(net, tasks)
    assert all(w is p for w, p in zip(net.layer._flat_weights, net.layer.parameters(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_does_without_its_fast_path(training, device):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    torch.manual_seed(0)
    net, tasks = Encoder().double().to(device).train(training), classification("attention", device)
    assert relative_error(gradients(net, tasks), unrolled(net, tasks)) < EXACT


def test_integer_inputs_are_taken(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 4)).double().to(device)
    tokens = torch.randint(0, 7, (3, 6, 4)).to(device)
    tasks = classification("mlp", device)._replace(support_x=tokens, query_x=tokens[:, :5])

    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=2))
    theta = engine.parameters()
    actual = torch.autograd.grad(engine.meta_loss(theta, 0.1, TaskBatch(*tasks))[0], theta)[0]
    loss = vmapped_meta_loss(net, tasks, F.cross_entropy, 0.1, 2)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    assert relative_error(actual, expected) < EXACT


class Branching(nn.Module):
    """Control flow that depends on the data and differs between tasks, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.tanh(y) if y.sum() else y


def test_a_module_that_vmap_refuses_runs_task_by_task(device):
    torch.manual_seed(0)
    net, tasks = Branching().double().to(device), classification("mlp", device)
    with pytest.warns(RuntimeWarning, match="Branching runs one task at a time.*data-dependent"):
        together = gradients(net, tasks)
    assert relative_error(together, unrolled(net, tasks)) < EXACT
    assert relative_error(gradients(net, tasks, task_chunk=1), unrolled(net, tasks)) < EXACT
    with pytest.raises(RuntimeError, match="Branching cannot be vmapped over tasks; task_chunk=1"):
        gradients(net, tasks, task_chunk=2)


def test_autocast_of_the_way_there_holds_on_the_way_back(device):
    # The step size and the mean of four tasks scale exactly, so both ways round alike.
    net, tasks = build("mlp", device).float(), classification("mlp", device, tasks=4)
    tasks = Tasks(*(t.float() if t.is_floating_point() else t for t in tasks))
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = gradients(net, tasks, lr=0.125)
        engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=2))
        theta = engine.parameters()
        adapted = engine.adapt(theta, 0.125, Examples(*tasks[:2]))
        after = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=0))
        loss = after.meta_loss(adapted, 0.0, TaskBatch(*tasks))[0]
    actual = torch.autograd.grad(loss, theta)[0]
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(gradients(net, tasks, lr=0.125), expected) > 1e-4
