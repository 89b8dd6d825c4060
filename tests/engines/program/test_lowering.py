"""What lowers, to which code, and what does not, with the reason."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastmeta as fm
from fastmeta.engines.program.lowering import Lowering, Program
from fastmeta.ops.task_program import reference
from fastmeta.ops.task_program.bytecode import Code, LossCode, LossKind, Opcode
from tests.helpers.lowering import assert_lowers, reason
from tests.helpers.programs import (
    IMAGES,
    LOSSES,
    NETWORKS,
    Raw,
    build,
    lowered,
    shape_of,
    tasks_for,
)


class Calls(nn.Module):
    """A module whose forward is a function of itself and x."""

    def __init__(self, function: Callable[..., Tensor], *sizes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("name", [*NETWORKS, *IMAGES])
def test_every_network_gives_its_modules_outputs(name):
    assert_lowers(build(name), *shape_of(name))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_its_modules_value(name):
    net, (x, y, _, _) = build("tanh"), tasks_for("tanh", name)
    values, *_ = reference.gradient(*Raw.of(net, LOSSES[name], (3,)), x, y, False)
    expected = torch.stack([LOSSES[name](net(a), b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(values, expected.detach(), rtol=1e-13, atol=1e-14)


FORWARDS = {
    "relu": lambda m, x: m.second(F.relu(m.first(x))),
    "torch_relu": lambda m, x: m.second(torch.relu(m.first(x))),
    "relu_method": lambda m, x: m.second(m.first(x).relu()),
    "relu_in_place": lambda m, x: m.second(F.relu(m.first(x), inplace=True)),
    "relu_": lambda m, x: m.second(m.first(x).relu_()),
    "torch_relu_": lambda m, x: m.second(torch.relu_(m.first(x))),
    "leaky_relu": lambda m, x: m.second(F.leaky_relu(m.first(x), 0.3)),
    "leaky_relu_option": lambda m, x: F.leaky_relu(m.first(x), negative_slope=0.3),
    "elu": lambda m, x: m.second(F.elu(m.first(x), alpha=0.3)),
    "gelu": lambda m, x: m.second(F.gelu(m.first(x))),
    "gelu_tanh": lambda m, x: m.second(F.gelu(m.first(x), approximate="tanh")),
    "silu": lambda m, x: m.second(F.silu(m.first(x))),
    "tanh": lambda m, x: m.second(m.first(x).tanh()) + F.tanh(m.first(x)),
    "sigmoid": lambda m, x: torch.sigmoid(m.first(x)) + m.second(x).sigmoid() + F.sigmoid(x),
    "softplus": lambda m, x: m.second(F.softplus(m.first(x), 2.0, threshold=1.0)),
    "dropout": lambda m, x: F.dropout(m.first(x), 0.5, training=False),
    "dropout_0": lambda m, x: F.dropout(m.first(x), p=0.0),
    "layer_norm": lambda m, x: F.layer_norm(m.first(x), (3,), m.second.bias, eps=0.1),
    "linear": lambda m, x: F.linear(F.linear(x, m.first.weight), m.second.weight, m.first.bias),
    "add": lambda m, x: torch.add(m.first(x), m.second(x)).add(x),
    "add_in_place": lambda m, x: m.first(x).add_(m.second(x)),
    "contiguous": lambda m, x: m.first(x.contiguous()),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_functions_and_methods(name):
    assert_lowers(Calls(FORWARDS[name]), 3)


RESHAPES = {
    "flatten": lambda m, x: m.first(torch.flatten(x, 1)),
    "flatten_negative": lambda m, x: m.first(x.flatten(-2, -1)),
    "flatten_one": lambda m, x: m.first(x.flatten(2).flatten(1)),
    "view_size": lambda m, x: m.first(x.view(x.size(0), -1)),
    "view_sizes": lambda m, x: m.first(x.view(x.size()[0], 3)),
    "reshape_shape": lambda m, x: m.first(x.reshape(x.shape[0], -1)),
    "reshape_tuple": lambda m, x: m.first(x.reshape((-1, 3))),
    "torch_reshape": lambda m, x: m.first(torch.reshape(x, (x.shape[0], 3))),
    "own_size": lambda m, x: m.first(x.view(-1, x.size(2))),
    "more_dimensions": lambda m, x: m.first(x).view(-1, 1, 3) + x,
}


@pytest.mark.parametrize("name", RESHAPES)
def test_reshapes_that_keep_the_examples(name):
    assert_lowers(Calls(RESHAPES[name]), 1, 3)


def test_a_default_argument_and_nesting_and_a_subclass_of_sequential():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh()))

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.body(x) if scale is None else self.body(x) * scale

    assert_lowers(nn.Sequential(Block(), fm.models.MLP([3, 4, 2])), 3)
    assert_lowers(Block(), 3)


def test_in_place_activations_of_a_chain():
    layers = [nn.Linear(3, 3), nn.ReLU(True), nn.Linear(3, 3), nn.SiLU(True), nn.Linear(3, 3)]
    assert_lowers(nn.Sequential(*layers, nn.ELU(inplace=True), nn.LeakyReLU(0.1, inplace=True)), 3)


def test_dropout_is_off_in_evaluation():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    assert "draws random numbers in training mode" in reason(net)
    assert_lowers(net.eval(), 3)


def test_the_code_of_a_network_by_hand():
    """linear 2 -> 1 frozen, relu, linear 1 -> 1; theta = (w2, b2), frozen = (w1, b1)."""
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    net[0].requires_grad_(False)
    program = lowered(net, functools.partial(F.smooth_l1_loss, beta=0.5), (2,))
    half, two = 0x3FE0000000000000, 0x4000000000000000  # 0.5 and 2.0 as float64
    header = [3, 4, 3, 2, 3, 3, 3, half, 0, 1, two, 0, 0, 0, 0, 0]
    rows = [
        [0, 0, -1, 1, -2, -4, 2, 1],
        [1, 1, -1, 2, -1, -1, 0, 0],
        [0, 2, -1, 3, 0, 1, 1, 1],
    ]
    words = [word for row in rows for word in (*row, *[0] * 16)]
    assert program.code.tolist() == [*header, 2, 1, 1, 1, *words]
    assert [p.numel() for p in program.frozen] == [2, 1]
    assert program.layers == ("linear 2 to 1", "relu", "linear 1 to 1", "smooth L1 loss")


@pytest.mark.parametrize("name", [*NETWORKS, *IMAGES])
def test_code_is_decoded_as_it_was_encoded(name):
    loss = functools.partial(F.cross_entropy, label_smoothing=0.25, ignore_index=-7)
    code = lowered(build(name), loss, shape_of(name)).code
    decoded = Code.decode(code)
    assert torch.equal(decoded.encode(), code)
    assert decoded.loss == LossCode(LossKind.CROSS_ENTROPY, 0.25, -7) or name == "last_dimension"


def test_a_parameter_that_is_used_twice_has_one_place():
    code = Code.decode(lowered(build("tied"), F.mse_loss, (3,)).code)
    linear = [ins for ins in code.instructions if ins.opcode == Opcode.LINEAR]
    assert linear[0].weight == linear[1].weight and linear[2].weight == linear[3].weight
    assert code.parameters == 9 + 3 + 9 + 3 + 3


def in_place_twice(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.second(h) + h.relu_()


def added_in_place(m: nn.Module, x: Tensor) -> Tensor:
    h = before = m.first(x)
    h += m.second(x)
    return h + before


def branches(m: nn.Module, x: Tensor) -> Tensor:
    return m.first(x) if x.sum() > 0 else m.second(x)


def drops_layers(m: nn.Module, x: Tensor) -> Tensor:
    return m.first(x) if torch.rand(()) < 0.5 else m.second(x)


def counts(m: nn.Module, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.first(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(register: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    getattr(net[1], register)(lambda *args: None)
    return net


def replaced_forward() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].forward = torch.relu
    return net


def with_buffer() -> nn.Module:
    net = Calls(lambda m, x: m.first(x) + m.shift)
    net.register_buffer("shift", torch.ones(3))
    return net


def mixed_dtypes() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    net[1].requires_grad_(False)
    return net


REASONS = {
    "model.0.1 is a Softmax, which the program does not have yet": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.Softmax(1))
    ),
    "model is a Doubled, which": lambda: Doubled(3, 3),
    "model.1 is a Threshold, which": lambda: nn.Sequential(nn.Linear(3, 3), nn.Threshold(0.1, 0.0)),
    "model.0 is a ParametrizedLinear, which": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 3))
    ),
    "model calls mul, which the program does not have yet": lambda: Calls(
        lambda m, x: 2 * m.first(x)
    ),
    "model.0 calls sum, which": lambda: nn.Sequential(Calls(lambda m, x: m.first(x).sum(1))),
    "model calls add: it takes something that is not computed": lambda: Calls(
        lambda m, x: m.first(x) + 1
    ),
    "model calls add: it adds 1 times [3] to [1, 3]": lambda: Calls(
        lambda m, x: m.first(x).view(-1, 1, 3) + x
    ),
    "model calls getitem: it indexes a tensor": lambda: Calls(lambda m, x: m.first(x)[:, 0]),
    "model calls view: its first dimension is not the examples": lambda: Calls(
        lambda m, x: m.first(x).view(-1)
    ),
    "model calls flatten: it flattens dimensions 0 to -1": lambda: Calls(
        lambda m, x: m.first(x).flatten()
    ),
    "model calls add with unknown options": lambda: Calls(
        lambda m, x: torch.add(m.first(x), x, out=None)
    ),
    "model does not return one tensor": lambda: Calls(lambda m, x: (m.first(x), x)),
    "the outputs of model depend on no adapted parameter": lambda: Calls(
        lambda m, x: torch.relu(x)
    ),
    "model has no layers": lambda: Calls(lambda m, x: x),
    "relu works in place on a tensor that is used elsewhere": lambda: Calls(in_place_twice),
    "add works in place on a tensor that is used elsewhere": lambda: Calls(added_in_place),
    "relu works in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)),
    "torch.fx cannot trace model: symbolically traced variables": lambda: Calls(branches),
    "the forward of model draws random numbers": lambda: Calls(drops_layers),
    "the forward of model changes model": lambda: Calls(counts),
    "model.1 has hooks": lambda: hooked("register_forward_hook"),
    "model.1 has hooks ": lambda: hooked("register_full_backward_hook"),
    "model.0 is compiled, or its forward was replaced": replaced_forward,
    "model has buffers": with_buffer,
    "parameter '1.weight' is torch.float64 on cpu": mixed_dtypes,
    "the parameters are torch.float16": lambda: nn.Linear(3, 3).half(),
    "model is a Linear: it takes 4 features, and examples there have": lambda: nn.Linear(4, 3),
    "model is a LayerNorm: it takes [4], and examples there": lambda: nn.LayerNorm(4),
    "model is a Linear: a weight or bias of it is no parameter": lambda: without_parameter("bias"),
}


def without_parameter(name: str) -> nn.Module:
    layer = nn.Linear(3, 3)
    value = getattr(layer, name).detach()
    delattr(layer, name)
    setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("words", REASONS)
def test_what_does_not_lower_says_why(words):
    assert words.strip() in reason(REASONS[words]())


def test_a_hook_for_every_module_is_seen_and_its_end_too():
    net = nn.Linear(3, 3)
    lowering = Lowering(net, F.mse_loss)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not lowering.current(net, F.mse_loss)
        assert "hooks on the calls of every module" in reason(net)
    finally:
        handle.remove()
    assert lowering.current(net, F.mse_loss)


def own_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).abs().mean()


class OwnLoss(nn.MSELoss):
    pass


LOSS_REASONS = {
    "loss: it is own_loss, which the program does not have yet": own_loss,
    "loss: it is OwnLoss, which": OwnLoss(),
    "loss: it is nll_loss, which": F.nll_loss,
    "loss: the program's cross entropy has no weights": nn.CrossEntropyLoss(torch.ones(3)),
    "loss: the program's binary cross entropy with logits has no weights": nn.BCEWithLogitsLoss(
        pos_weight=torch.ones(3)
    ),
    "loss: the program's mean squared error does not have these": nn.MSELoss(reduction="none"),
    "loss: the program's Huber loss does not have these": functools.partial(
        F.huber_loss, size_average=True
    ),
    "loss: an option is out of range": nn.HuberLoss(delta=-1.0),
    "loss: an option is out of range ": nn.CrossEntropyLoss(label_smoothing=1.5),
    "loss: the options of smooth L1 loss are not all numbers": nn.SmoothL1Loss(
        beta=torch.tensor(1.0)
    ),
    "loss: it is partial, which": functools.partial(F.mse_loss, torch.ones(3)),
}


@pytest.mark.parametrize("words", LOSS_REASONS)
def test_losses_that_do_not_lower(words):
    assert words.strip() in reason(nn.Linear(3, 3), loss=LOSS_REASONS[words])


def test_cross_entropy_takes_one_row_of_classes():
    text = reason(nn.Linear(3, 3), 2, 3, loss=F.cross_entropy)
    assert text == "cross entropy takes [classes] of an example, and model gives [2, 3]"


def test_examples_without_elements_are_refused():
    assert reason(nn.Linear(3, 3), 0, 3) == "a tensor of model has no elements"


def test_what_layout_refuses_is_raised():
    with pytest.raises(ValueError, match="no trainable parameter"):
        Lowering(nn.ReLU(), F.mse_loss)


class Flagged(nn.Module):
    """A forward that reads its own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.skip, self.order, self.function = False, [0, 1], torch.relu
        self.options = SimpleNamespace(nested={"norm": True})
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            y = self.function(self.layers[i](x))
            x = x + y if self.skip else y
        return self.norm(x) if self.options.nested["norm"] else x


def swap_layers(m: Flagged) -> None:
    m.layers[0], m.layers[1] = m.layers[1], m.layers[0]


CHANGES = {
    "training": lambda m: m.eval(),
    "flag": lambda m: setattr(m, "skip", True),
    "object": lambda m: m.options.nested.update(norm=False),
    "list": lambda m: m.order.append(0),
    "function": lambda m: setattr(m, "function", torch.tanh),
    "new_attribute": lambda m: setattr(m, "depth", 3),
    "lost_attribute": lambda m: (delattr(m, "skip"), setattr(m, "skipped", False)),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "submodule": lambda m: setattr(m, "norm", nn.LayerNorm(3)),
    "order": swap_layers,
    "parameter": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.ones(3))),
    "tying": lambda m: setattr(m.layers[0], "weight", m.layers[1].weight),
    "freezing": lambda m: m.norm.requires_grad_(False),
    "dtype": lambda m: m.double(),
    "data": lambda m: setattr(m.norm.weight, "data", torch.ones(3, 1)),
    "hook": lambda m: m.norm.register_forward_pre_hook(lambda *args: None),
    "buffer": lambda m: m.register_buffer("count", torch.zeros(())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_module_is_lowered_again(name):
    net = Flagged()
    lowering = Lowering(net, F.mse_loss)
    assert lowering.current(net, F.mse_loss)
    CHANGES[name](net)
    assert not lowering.current(net, F.mse_loss)


def test_what_does_not_matter_keeps_a_lowering():
    net, loss = Flagged(), nn.HuberLoss()
    lowering = Lowering(net, loss)
    net(torch.ones(2, 3)).sum().backward()
    with torch.no_grad():
        net.norm.weight.mul_(2)
    net.zero_grad()
    assert lowering.current(net, loss)
    loss.delta = 0.5
    assert not lowering.current(net, loss)
    assert not lowering.current(copy.deepcopy(net), loss)
    assert not lowering.current(net, F.mse_loss)


def test_a_refusal_is_kept_too():
    normed = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Softmax(1))
    for net in (normed, Calls(counts)):
        lowering = Lowering(net, F.cross_entropy)
        assert isinstance(lowering.program(), str)
        net(torch.ones(2, 3))
        assert lowering.current(net, F.cross_entropy)


def test_programs_are_made_once_a_shape():
    lowering = Lowering(build("deep"), F.mse_loss)
    assert isinstance(lowering.program((2, 3)), Program)
    assert lowering.program((2, 3)) is lowering.program((2, 3))
    assert lowering.program((6,)).input_shape == (6,)
    assert lowering.program() is lowering.program((6,))


def test_lowering_leaves_the_module_as_it_was():
    net = build("residual")
    before = pickle.dumps(net)
    state = torch.get_rng_state()
    lowered(net, F.mse_loss, (3,))
    assert pickle.dumps(net) == before
    assert torch.equal(torch.get_rng_state(), state)
