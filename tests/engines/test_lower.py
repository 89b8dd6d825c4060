"""Encoders on fastmeta's kernels: the same values as the encoder's own, or the encoder itself."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

import fastmeta as fm
from tests.helpers.skips import EMULATED, needs_kernels

pytestmark = [needs_kernels, pytest.mark.skipif(EMULATED, reason="the ops are of CPUs only")]


class Residual(nn.Module):
    """A sum of two branches, one with a stride and a 1 x 1 convolution; a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16, affine=False, momentum=None),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x) + self.shortcut(x)))


def _untracked() -> nn.Module:
    norm = nn.BatchNorm2d(16, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.MaxPool2d(2, padding=1))


def _shared() -> nn.Module:
    """A convolution and a norm that are called twice."""
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
    return nn.Sequential(block, block, nn.AdaptiveAvgPool2d(1))


# The encoder, and the shape of its images.
ENCODERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv4": (lambda: fm.models.Conv4(16, None), (1, 28, 28)),
    "conv4_of_colours": (lambda: fm.models.Conv4(16, None, 3, 32), (3, 32, 32)),
    "conv4_by_strides": (lambda: fm.models.Conv4(16, None, pool="stride"), (1, 28, 28)),
    "resnet12": (lambda: fm.models.ResNet12((16, 16, 32, 32), None), (3, 24, 24)),
    "residual": (Residual, (3, 8, 8)),
    "untracked": (_untracked, (3, 9, 9)),
    "shared": (_shared, (3, 8, 8)),
}

encoders = pytest.mark.parametrize("name", ENCODERS)


def made(name: str, train: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    encoder = ENCODERS[name][0]()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder.train(train).to(dtype)


def images(name: str, count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *ENCODERS[name][1], generator=generator, dtype=dtype)


def outputs_and_gradients(call: nn.Module, x: Tensor, of_input: bool = True) -> tuple[Tensor, ...]:
    """Outputs, and their gradients for a cotangent."""
    x = x.clone().requires_grad_(of_input)
    outputs = call(x)
    cotangent = torch.linspace(-1, 2, outputs.numel(), dtype=x.dtype).view_as(outputs).cos()
    wanted = [p for p in call.parameters() if p.requires_grad] + [x] * of_input
    return outputs.detach(), *torch.autograd.grad(outputs, wanted, cotangent)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    # The gradient of a bias before a batch norm is 0, and PyTorch's the rounding of the others.
    most = max(e.abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        error = (a - e).abs().max().item()
        assert error <= 1e-11 * max(e.abs().max().item(), 1e-3 * most)


@encoders
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_input", [True, False], ids=["input", "parameters"])
def test_outputs_gradients_and_running_statistics(name, train, of_input):
    encoder = made(name, train)
    lowered, x = fm.lower(copy.deepcopy(encoder)), images(name)
    assert "on fastmeta's CPU kernels" in lowered.explain(x)
    for _ in range(2):  # the second call has other running statistics
        actual = outputs_and_gradients(lowered, x, of_input)
        assert_same(actual, outputs_and_gradients(encoder, x, of_input))
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(lowered.state_dict()[key], value, rtol=1e-9, atol=1e-9)


@encoders
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_that_share_a_batch_give_the_same_bits_again(name, threads):
    encoder, x = made(name), images(name, 24)
    expected = outputs_and_gradients(copy.deepcopy(encoder), x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [outputs_and_gradients(fm.lower(copy.deepcopy(encoder)), x) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    assert_same(runs[0], expected)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@encoders
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_input", [True, False], ids=["input", "parameters"])
def test_second_derivatives(name, train, of_input):
    def penalty(call: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_(of_input)
        cotangent = torch.ones((), dtype=x.dtype, requires_grad=True)
        wanted = [*call.parameters(), *[x] * of_input]
        grads = torch.autograd.grad((call(x).tanh() * cotangent).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [*wanted, cotangent])

    encoder = made(name, train)
    lowered, x = fm.lower(copy.deepcopy(encoder)), images(name)
    assert_same(penalty(lowered, x), penalty(encoder, x))


def test_the_second_derivative_in_the_input_only():
    encoder, x = made("residual").requires_grad_(False), images("residual").requires_grad_()

    def penalty(call: nn.Module) -> Tensor:
        (grad,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty(fm.lower(encoder)), penalty(encoder))


def test_the_third_derivative_is_refused():
    lowered, x = fm.lower(made("residual")), images("residual").requires_grad_()
    (first,) = torch.autograd.grad(lowered(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice, not three times.*lower=False"):
        second.sum().backward()


def test_float32_is_as_exact_as_pytorch():
    x, exact = images("conv4", 40), made("conv4")
    expected = outputs_and_gradients(exact, x)
    encoder, x = made("conv4", dtype=torch.float32), x.float()

    def errors(call: nn.Module) -> list[float]:
        actual = outputs_and_gradients(call, x)
        return [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]

    ours, plain = errors(fm.lower(copy.deepcopy(encoder))), errors(encoder)
    # PyTorch's gradient of a bias before a batch norm, which is 0, is rounding error.
    assert all(a < 4 * b + 1e-6 for a, b in zip(ours, plain, strict=True))


def test_frozen_parameters_get_no_gradient():
    encoder = made("residual")
    encoder.body.requires_grad_(False)
    lowered, x = fm.lower(copy.deepcopy(encoder)), images("residual")
    assert_same(outputs_and_gradients(lowered, x), outputs_and_gradients(encoder, x))
    lowered(x).sum().backward()
    assert all(p.grad is None for p in lowered.encoder.body.parameters())


def test_switches_of_train_and_eval_and_of_gradients():
    encoder = made("residual")
    lowered, x = fm.lower(copy.deepcopy(encoder)), images("residual")
    for train, gradients in ((True, False), (False, True), (True, True), (False, False)):
        encoder.train(train)
        lowered.train(train)
        with torch.set_grad_enabled(gradients):
            outputs = lowered(x)
            torch.testing.assert_close(outputs, encoder(x))
        assert outputs.requires_grad == gradients
    with torch.inference_mode():
        torch.testing.assert_close(lowered(x), encoder(x))


def test_same_inputs_give_the_same_bits():
    lowered, x = fm.lower(made("conv4", dtype=torch.float32)), images("conv4", 33, torch.float32)
    first, second = (outputs_and_gradients(lowered, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_images_channels_last_and_expanded():
    encoder, x = made("residual", train=False), images("residual", 1).expand(4, 3, 8, 8)
    lowered = fm.lower(encoder)
    torch.testing.assert_close(lowered(x), encoder(x))
    x = images("residual").to(memory_format=torch.channels_last)
    torch.testing.assert_close(lowered(x), encoder(x))


def test_weights_changed_between_forward_and_backward_are_noticed():
    lowered = fm.lower(made("residual"))
    outputs = lowered(images("residual"))
    with torch.no_grad():
        next(lowered.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_hooks_of_parameters_and_of_outputs_run():
    lowered, seen = fm.lower(made("residual")), []
    weight = lowered.encoder.head[2].weight
    weight.register_hook(lambda grad: seen.append(grad.shape))
    outputs = lowered(images("residual"))
    outputs.register_hook(lambda grad: seen.append(grad.shape))
    outputs.sum().backward()
    assert seen == [outputs.shape, weight.shape]


def _with_hook(encoder: nn.Module) -> nn.Module:
    encoder.head.register_forward_hook(lambda module, args, output: output + 1)
    return encoder


def _with_dropout(encoder: nn.Module) -> nn.Module:
    encoder.head.insert(0, nn.Dropout(0.9))
    return encoder


def _parametrized(encoder: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(encoder.head[2])
    return encoder


def _instance_norm(encoder: nn.Module) -> nn.Module:
    encoder.body[1] = nn.InstanceNorm2d(8, track_running_stats=True).double()
    return encoder


REFUSED = {
    "hook": (_with_hook, "model.head has hooks"),
    "dropout": (_with_dropout, "draws random numbers"),
    "parametrization": (_parametrized, "Parametrized"),
    "running statistics": (_instance_norm, "running statistics of a InstanceNorm2d"),
    "no convolution": (lambda _: nn.Linear(8, 3).double(), "no convolutions"),
    "no parameters": (lambda _: nn.MaxPool2d(2), "no parameters"),
    "bfloat16": (lambda encoder: encoder.bfloat16(), "no kernels for torch.bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_recognised_runs_in_pytorch(name):
    change, reason = REFUSED[name]
    encoder = change(made("residual"))
    lowered = fm.lower(encoder)
    x = images("residual", dtype=next(iter(encoder.parameters()), torch.empty(0).double()).dtype)
    assert reason in lowered.explain(x)
    torch.manual_seed(3)
    actual = lowered(x)
    torch.manual_seed(3)
    assert torch.equal(actual, encoder(x))


def test_modes_in_which_the_encoder_itself_runs():
    encoder, x = made("residual", train=False), images("residual")
    lowered = fm.lower(encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in lowered.explain(x)
        assert torch.equal(lowered(x), encoder(x))
    with fm.use_backend("torch"):
        assert torch.equal(lowered(x), encoder(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(lowered(dual)).tangent
        assert torch.equal(tangent, forward_ad.unpack_dual(encoder(dual)).tangent)
    each = vmap(lowered, randomness="error")(x.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(each, encoder(x))
    assert lowered(x[:0]).shape == (0, 5)


def test_parameters_replaced_for_a_call():
    lowered, x = fm.lower(made("residual", train=False)), images("residual")
    zeros = {name: torch.zeros_like(p) for name, p in lowered.named_parameters()}
    assert torch.equal(functional_call(lowered, zeros, (x,)), x.new_zeros(6, 5))
    assert lowered(x).abs().max() > 0


def test_errors_are_the_encoders_own():
    lowered = fm.lower(fm.models.Conv4(4, None))
    with pytest.raises(RuntimeError, match=r"expected input.*to have 1 channels"):
        lowered(torch.zeros(2, 3, 28, 28))
    with pytest.raises(RuntimeError, match=r"(?i)dtype|type"):
        lowered(torch.zeros(2, 1, 28, 28).double())
    with pytest.raises(TypeError, match=r"encoder: expected an nn\.Module, got function"):
        fm.lower(made)


def test_states_are_the_encoders_own():
    encoder = made("residual")
    lowered = fm.lower(encoder)
    assert list(lowered.state_dict()) == list(encoder.state_dict())
    outer = nn.Sequential(lowered)
    assert list(outer.state_dict()) == [f"0.{key}" for key in encoder.state_dict()]
    other = nn.Sequential(fm.lower(Residual().double()))
    other.load_state_dict(outer.state_dict())
    lowered.load_state_dict(encoder.state_dict())
    x = images("residual")
    assert torch.equal(other(x), outer(x))
    lowered.eval()
    assert not encoder.training
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), lowered(x))
    assert fm.lower(lowered) is lowered


def test_a_layer_that_changes_is_followed():
    encoder = made("residual", train=False)
    lowered, x = fm.lower(encoder), images("residual")
    before = lowered(x)
    encoder.body[2].negative_slope = 0.7
    encoder.body[4].running_mean.add_(1)
    after = lowered(x)
    torch.testing.assert_close(after, encoder(x))
    assert not torch.allclose(before, after)
