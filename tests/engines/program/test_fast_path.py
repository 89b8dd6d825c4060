"""What a second meta-gradient sees of all that can change after the first."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta as fm
from fastmeta.engines.program.fast_path import CachedMetaGradient
from fastmeta.engines.program.module_state import ModuleSnapshot

T, K = 3, 2

pytestmark = pytest.mark.skipif(fm.core.backend._C is None, reason="needs the compiled extension")


def tasks(device, dtype=torch.float64, tasks: int = T, examples: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tasks + examples)
    shapes = ((tasks, examples, 3), (tasks, examples, 2)) * 2
    data = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.to(device, dtype) for t in data]


def learner(device, loss=F.mse_loss, **options: object) -> fm.MAML:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Dropout(0.5))
    net = nn.Sequential(*net, nn.Linear(4, 2)).to(device, torch.float64).eval()
    return fm.MAML(net, 0.05, K, loss=loss, **options)


def answers_of(method: str, monkeypatch) -> list[bool]:
    """Whether each call of a method of the fast path had a result, from now on."""
    found: list[bool] = []
    call = getattr(CachedMetaGradient, method)

    def recorded(*args: object) -> object:
        result = call(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(CachedMetaGradient, method, recorded)
    return found


@pytest.fixture
def answered(monkeypatch) -> list[bool]:
    """Whether each meta-gradient was a prepared one."""
    return answers_of("__call__", monkeypatch)


def prepared(device, answered: list[bool], **options: object) -> fm.MAML:
    """A learner whose next meta-gradient would be a prepared one."""
    maml = learner(device, **options)
    for _ in range(3):
        maml.meta_gradient(*tasks(device))
    assert answered == [True]
    return maml


def fresh(maml: fm.MAML, data: list[Tensor]) -> fm.algorithms.maml.MetaGradient:
    """What a learner says that has never been called: a copy takes no preparation along."""
    return copy.deepcopy(maml).meta_gradient(*data)


def assert_as_fresh(maml: fm.MAML, data: list[Tensor]) -> None:
    found, expected = maml.meta_gradient(*data), fresh(maml, data)
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=0)
    assert (found.lr_grad is None) == (expected.lr_grad is None)


def swap_data(maml: fm.MAML) -> None:
    maml.module[0].weight.data = torch.ones_like(maml.module[0].weight)


def optimize(maml: fm.MAML) -> None:
    for p in maml.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(maml.parameters(), 0.1).step()


def load(maml: fm.MAML) -> None:
    maml.load_state_dict({name: value + 1 for name, value in maml.state_dict().items()})


VALUES: dict[str, Callable[[fm.MAML], object]] = {
    "nothing": lambda maml: None,
    "an optimizer's step": optimize,
    "load_state_dict": load,
    "p.data": swap_data,
    "a value in place": lambda maml: maml.module[0].weight.data.zero_(),
}


@pytest.mark.parametrize("change", VALUES)
def test_values_are_read_at_each_call(change, answered, device):
    maml = prepared(device, answered)
    VALUES[change](maml)
    assert_as_fresh(maml, tasks(device))
    assert answered[1]


def add_layer(maml: fm.MAML) -> None:
    maml.module.append(nn.Tanh())


def replace_parameter(maml: fm.MAML) -> None:
    maml.module[0].weight = nn.Parameter(torch.ones_like(maml.module[0].weight))


def reverse_layers(maml: fm.MAML) -> None:
    layers = maml.module._modules
    for name in ("2", "1", "3", "4"):
        layers[name] = layers.pop(name)


STATE: dict[str, Callable[[fm.MAML], object]] = {
    "requires_grad": lambda maml: maml.module[0].weight.requires_grad_(False),
    "training": lambda maml: maml.module[1].train(),
    "a hook": lambda maml: maml.module[0].register_forward_hook(lambda m, x, y: 2 * y),
    "eps": lambda maml: setattr(maml.module[1], "eps", 0.5),
    "another layer": add_layer,
    "the order of layers": reverse_layers,
    "another parameter": replace_parameter,
    "lr": lambda maml: setattr(maml, "lr", 0.2),
    "steps": lambda maml: setattr(maml, "steps", 3),
    "first_order": lambda maml: setattr(maml, "first_order", True),
    "loss": lambda maml: setattr(maml, "loss", F.l1_loss),
    "task_chunk": lambda maml: setattr(maml, "task_chunk", 2),
    "engine": lambda maml: setattr(maml, "engine", "functional"),
    "hvp_mode": lambda maml: setattr(maml, "hvp_mode", "finite_difference"),
}


@pytest.mark.parametrize("change", STATE)
def test_a_change_of_state_takes_the_ordinary_way(change, answered, device):
    maml = prepared(device, answered)
    STATE[change](maml)
    assert_as_fresh(maml, tasks(device))
    assert not any(answered[1:])


def test_a_learned_step_size_takes_the_ordinary_way(answered, device):
    maml = prepared(device, answered)
    maml.lr = nn.Parameter(torch.tensor(0.2, dtype=torch.float64, device=device))
    for _ in range(2):
        assert_as_fresh(maml, tasks(device))
    assert not any(answered[1:])


def test_a_hook_for_every_module_takes_the_ordinary_way(answered, device):
    maml = prepared(device, answered)
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: 2 * y)
    try:
        assert_as_fresh(maml, tasks(device))
    finally:
        handle.remove()
    assert not any(answered[1:])


def test_a_loss_module_can_change(answered, device):
    maml = prepared(device, answered, loss=nn.HuberLoss())
    maml.loss.delta = 0.1
    assert_as_fresh(maml, tasks(device))
    assert not any(answered[1:])


@pytest.mark.parametrize("size", [{"tasks": 4}, {"examples": 6}], ids=str)
def test_other_shapes(size, answered, device):
    maml = prepared(device, answered)
    for _ in range(3):
        assert_as_fresh(maml, tasks(device, **size))
    assert answered[1:] == [False, False, True]


def test_alternating_shapes_are_not_prepared_again_and_again(answered, monkeypatch, device):
    maml = prepared(device, answered)
    made: list[object] = []
    init = CachedMetaGradient.__init__
    monkeypatch.setattr(CachedMetaGradient, "__init__", lambda *args: made.append(init(*args)))
    for size in (4, T, 4, T):
        maml.meta_gradient(*tasks(device, tasks=size))
    assert answered[1:] == [False, True, False, True]
    assert not made


def test_another_dtype(answered, device):
    maml = prepared(device, answered)
    maml.float()
    assert_as_fresh(maml, tasks(device, torch.float32))
    assert not answered[1]
    with pytest.raises(TypeError, match="support_x"):
        maml.meta_gradient(*tasks(device))


def test_inputs_of_other_strides(answered, device):
    maml = prepared(device, answered)
    data = [t[:1].expand(t.shape) for t in tasks(device)]
    assert_as_fresh(maml, [data[0].mT.contiguous().mT, *data[1:]])
    assert answered[1]


def test_what_is_no_plain_tensor(answered, device):
    class Marked(Tensor):
        pass

    maml = prepared(device, answered)
    data = tasks(device)
    assert_as_fresh(maml, [data[0].as_subclass(Marked), *data[1:]])
    with pytest.raises(TypeError, match="support_y: expected a tensor, got int"):
        maml.meta_gradient(data[0], 1, *data[2:])
    assert not any(answered[1:])


def test_targets_that_require_gradients(answered, device):
    maml = prepared(device, answered)
    data = tasks(device)
    data[3].requires_grad_()
    with torch.no_grad():
        maml.meta_gradient(*data)
    maml.meta_gradient(*data)
    assert answered[1:] == [True, False]


def test_labels_are_checked_at_each_call(device):
    maml = learner(device, loss=F.cross_entropy)
    x, y = tasks(device)[0], torch.zeros(T, 5, dtype=torch.int64, device=device)
    for _ in range(3):
        maml.meta_gradient(x, y, x, y)
    with pytest.raises(ValueError, match="query_y: expected labels"):
        maml.meta_gradient(x, y, x, y + 2)


def test_step_weights_take_the_ordinary_way(answered, device):
    maml = prepared(device, answered)
    weighted = maml.meta_gradient(*tasks(device), [1.0, 1.0]).loss
    assert answered == [True]
    assert weighted > maml.meta_gradient(*tasks(device)).loss


def test_another_backend(answered, monkeypatch, device):
    maml = prepared(device, answered)
    with fm.use_backend("torch"):
        maml.meta_gradient(*tasks(device))
    maml.meta_gradient(*tasks(device))
    monkeypatch.setenv("FASTMETA_BACKEND", "torch")
    maml.meta_gradient(*tasks(device))
    assert answered[1:] == [False, True, False]


def test_autocast(answered, device):
    maml = prepared(device, answered).float()
    data = tasks(device, torch.float32)
    for _ in range(3):
        expected = maml.meta_gradient(*data).loss
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        found = maml.meta_gradient(*data).loss
    assert answered[-2:] == [True, False]
    assert found != expected


def test_a_mode_sees_the_op(answered, device):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    maml = prepared(device, answered)
    with Seen():
        maml.meta_gradient(*tasks(device))
    assert "fastmeta::task_program_meta_gradient" in names
    assert not answered[1]


def test_a_transform_takes_the_ordinary_way(answered, device):
    maml = prepared(device, answered)
    data = tuple(tasks(device))

    def asked(scale: Tensor) -> Tensor:
        assert maml._programs.replay(maml, data) is None
        return scale

    torch.func.grad(asked)(torch.ones((), device=device))
    torch.vmap(asked)(torch.ones(2, device=device))
    assert answered[1:] == [False, False]


def test_a_copy_has_its_own_options(answered, device):
    maml = prepared(device, answered)
    other = copy.copy(maml)
    other.lr = 0.3
    assert_as_fresh(other, tasks(device))
    assert_as_fresh(maml, tasks(device))


def test_a_module_with_options_inside_an_object(device):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.options = nn.Linear(3, 2), {"twice": False}

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y + y if self.options["twice"] else y

    maml = fm.MAML(Scaled().to(device, torch.float64), 0.1, loss=F.mse_loss)
    for _ in range(3):
        maml.meta_gradient(*tasks(device))
    maml.module.options["twice"] = True
    assert_as_fresh(maml, tasks(device))


def test_a_prepared_learner_is_collected(answered, device):
    maml = prepared(device, answered)
    gone = weakref.ref(maml)
    del maml
    gc.collect()
    assert gone() is None


# The meta-loss, which autograd knows


@pytest.fixture
def answered_losses(monkeypatch) -> list[bool]:
    """Whether each meta-loss was a prepared one."""
    return answers_of("meta_loss", monkeypatch)


def with_losses(device, answered_losses: list[bool], **options: object) -> fm.MAML:
    """A learner whose next meta-loss would be a prepared one."""
    maml = learner(device, **options)
    for _ in range(3):
        maml.meta_loss(*tasks(device))
    assert answered_losses == [True]
    return maml


def assert_loss_as_fresh(maml: fm.MAML, data: list[Tensor]) -> None:
    found, expected = [], []
    for which, results in ((maml, found), (copy.deepcopy(maml), expected)):
        which.zero_grad()
        loss, outputs = which.meta_loss(*data)
        (2 * loss).backward()
        results += [loss.detach(), outputs, *(p.grad for p in which.parameters())]
    for a, e in zip(found, expected, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


@pytest.mark.parametrize("change", VALUES)
def test_a_loss_reads_values_at_each_call(change, answered_losses, device):
    maml = with_losses(device, answered_losses)
    VALUES[change](maml)
    assert_loss_as_fresh(maml, tasks(device))
    assert answered_losses[1:] == [True]


@pytest.mark.parametrize("change", STATE)
def test_a_loss_after_a_change_of_state_takes_the_ordinary_way(change, answered_losses, device):
    maml = with_losses(device, answered_losses)
    STATE[change](maml)
    assert_loss_as_fresh(maml, tasks(device))
    assert not any(answered_losses[1:])


def test_losses_and_gradients_prepare_each_other(answered, answered_losses, device):
    maml = learner(device)
    maml.meta_loss(*tasks(device))
    maml.meta_gradient(*tasks(device))
    loss, _ = maml.meta_loss(*tasks(device))
    result = maml.meta_gradient(*tasks(device))
    assert answered == answered_losses == [True]
    assert loss == result.loss
    grads = torch.autograd.grad(loss, list(maml.parameters()))
    assert torch.equal(torch.cat([g.flatten() for g in grads]), result.grads)


def test_a_prepared_loss_gives_inputs_their_gradients(answered_losses, device):
    maml = with_losses(device, answered_losses)
    gradients = []
    for which in (maml, copy.deepcopy(maml)):
        data = tasks(device)
        data[0].requires_grad_()
        data[2].requires_grad_()
        which.meta_loss(*data)[0].backward()
        gradients.append([data[0].grad, data[2].grad])
    assert answered_losses[1:] == [True]
    assert all(map(torch.equal, *gradients)) and gradients[0][0].any()


def test_a_prepared_loss_is_differentiable_once(answered_losses, device):
    maml = with_losses(device, answered_losses)
    loss, outputs = maml.meta_loss(*tasks(device))
    assert loss.requires_grad and not outputs.requires_grad
    grads = torch.autograd.grad(loss, list(maml.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grads[0].sum().backward()


def test_losses_that_take_the_ordinary_way(answered_losses, device):
    maml = with_losses(device, answered_losses)
    expected = maml.meta_loss(*tasks(device))[0].detach()
    with torch.no_grad():
        loss, _ = maml.meta_loss(*tasks(device))
    assert not loss.requires_grad and loss == expected
    weighted, _ = maml.meta_loss(*tasks(device), [1.0, 1.0])
    assert weighted > loss
    data = tasks(device)
    data[3].requires_grad_()
    maml.meta_loss(*data)[0].backward()
    assert data[3].grad.any()
    with fm.use_backend("torch"):
        loss, _ = maml.meta_loss(*tasks(device))
    torch.testing.assert_close(loss.detach(), expected)
    assert answered_losses[1:] == [True, False, False, False]


@pytest.mark.parametrize("change", ["buffer", "order"])
def test_the_watch_sees_other_buffers_and_another_order(change):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh())
    snapshot = ModuleSnapshot(net)
    assert snapshot.is_unchanged()
    if change == "buffer":
        net[1].running_mean = torch.ones(2)
    else:
        net._modules["1"] = net._modules.pop("1")
    assert not snapshot.is_unchanged()
