"""The compiled ops of the task program against the reference, and against numbers worked by hand.

``test_core`` runs every op and layer once at the smallest sizes.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.ops.task_program import COMPILED, NAMES, reference
from tests.helpers.program_checks import STEP_SIZES, Setting, assert_same, check, kernels, results
from tests.helpers.programs import HALVES, LOSSES, NETWORKS, Raw, tasks_for

__all__ = ["kernels"]  # a fixture of every test here

each_network = pytest.mark.parametrize("name", NETWORKS)
each_loss = pytest.mark.parametrize("loss", LOSSES)


@each_network
@pytest.mark.parametrize("op", NAMES)
def test_core(op, name, device):
    Setting(name, "cross_entropy", device, tasks=2, support=3, queries=2).check(op)


@each_loss
@pytest.mark.parametrize("op", NAMES[1:])
def test_every_loss(op, loss, device):
    Setting("tanh", loss, device).check(op)


@each_network
@pytest.mark.parametrize("loss", ["cross_entropy", "huber"])
def test_every_network_with_parameters_of_each_task(name, loss, device):
    setting = Setting(name, loss, device, per_task=True)
    for op in NAMES:
        setting.check(op)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "unused"])
def test_parameters_that_are_learned_and_not_adapted(name, per_task, half, device):
    setting = Setting(name, "cross_entropy", device, per_task=per_task, half=half)
    for op in NAMES:
        setting.check(op)
    for op in ("adapt_backward", "meta_gradient"):
        setting.check(op, first_order=True, keep=True)
    setting.check("products", gauss_newton=True)


@pytest.mark.parametrize("tasks", [1, 20, 25])
def test_many_tasks_share_parameters(tasks, device):
    setting = Setting("tanh", "mse", device, torch.float32, tasks=tasks, half="first")
    setting.lr = 0.1 + 0.05 * setting.random(2, 1, setting.parameters)
    for op in NAMES:
        setting.check(op)
    setting.check("meta_gradient", weights=(0.5, -0.3))


@each_network
def test_single_precision(name, device):
    setting = Setting(name, "mse", device, torch.float32, steps=2)
    for op in NAMES:
        setting.check(op)


@each_loss
def test_gauss_newton_products_of_every_loss(loss, device):
    Setting("tanh", loss, device).check("products", gauss_newton=True)


@each_network
@pytest.mark.parametrize("tasks", [1, 3, 20])
def test_gauss_newton_products_of_every_network(tasks, name, device):
    setting = Setting(name, "cross_entropy", device, tasks=tasks, per_task=True)
    setting.check("products", gauss_newton=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tasks", [9, 17, 18, 25, 34])
def test_tasks_that_do_not_fill_a_vector(tasks, threads, device):
    """One or two tasks that are left over run by themselves, after those in lanes."""
    setting = Setting("tanh", "mse", device, torch.float32, tasks=tasks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for op in NAMES:
            setting.check(op)
        first, again = (results("meta_gradient", setting.arguments("meta_gradient")) for _ in "ab")
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("tasks", [1, 20])
def test_each_of_the_vectors_is_multiplied_by_itself(tasks, count, device):
    setting = Setting("tanh", "cross_entropy", device, tasks=tasks)
    *arguments, _, _ = setting.arguments("products")
    vectors = setting.random(tasks, count, setting.parameters)
    products = COMPILED.products(*arguments, vectors, False)
    assert products.shape == vectors.shape
    for n in range(count):
        single, _ = COMPILED.hvp(*arguments, vectors[:, n], False)
        assert_same(products[:, n], single, 1e-12)  # threads share the work in another way


@pytest.mark.parametrize("form", STEP_SIZES)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("per_task", [False, True])
def test_every_form_of_the_step_size(form, first_order, per_task, device):
    setting = Setting("silu", "mse", device, steps=3, per_task=per_task)
    shape = STEP_SIZES[form](3, setting.tasks, setting.parameters)
    setting.lr = 0.1 + 0.05 * setting.random(*shape)
    setting.check("adapt")
    for op in ("adapt_backward", "meta_gradient"):
        setting.check(op, first_order=first_order)


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_any_number_of_steps(steps, keep, first_order, device):
    for name, loss in (("deep", "cross_entropy"), ("residual", "mse")):
        setting = Setting(name, loss, device, steps=steps)
        setting.check("adapt")
        for op in ("adapt_backward", "meta_gradient"):
            setting.check(op, keep=keep, first_order=first_order)


@pytest.mark.parametrize(
    "weights", [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0,) * 3]
)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_query_loss_at_every_step(weights, keep, first_order, device):
    setting = Setting("layer_norm", "cross_entropy", device, steps=3)
    options = {"keep": keep, "first_order": first_order}
    setting.check("meta_gradient", weights=weights, **options)


@pytest.mark.parametrize("lr", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("weights", [(), (0.5, 0.5)])
def test_gradients_only_where_they_are_asked_for(lr, inputs, weights, device):
    setting = Setting("gelu", "bce", device)
    setting.check("adapt_backward", lr=lr, inputs=inputs)
    setting.check("meta_gradient", lr=lr, inputs=inputs, weights=weights)
    without = setting.arguments("meta_gradient", weights=weights)[:-4]
    for op in (COMPILED, reference):
        loss, outputs, *grads = op.meta_gradient(*without, False, False, False, False)
        assert [g.numel() for g in grads] == [0, 0, 0, 0]
        expected = COMPILED.meta_gradient(*without, True, False, False, False)
        assert_same(loss, expected[0], 1e-14)
        assert_same(outputs, expected[1], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tasks", [1, 4, 9, 16, 17, 33])
def test_any_number_of_tasks(tasks, dtype, device):
    for name, loss in (("relu", "cross_entropy"), ("layer_norm", "mse")):
        for per_task in (False, True):
            setting = Setting(name, loss, device, dtype, per_task=per_task, tasks=tasks)
            for op in NAMES:
                setting.check(op)


@each_network
def test_every_network_with_many_tasks(name, device):
    setting = Setting(name, "mse", device, tasks=20)
    for op in NAMES:
        setting.check(op)


@each_loss
def test_every_loss_with_many_tasks(loss, device):
    setting = Setting("softplus", loss, device, tasks=20)
    for op in NAMES[1:]:
        setting.check(op)


@pytest.mark.parametrize("examples", [1, 2, 5, 6, 17])
def test_any_number_of_examples(examples, device):
    for support, queries in ((examples, 2), (2, examples)):
        setting = Setting("elu", "label_smoothing", device, support=support, queries=queries)
        for op in NAMES:
            setting.check(op)


@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 33, 65])
@pytest.mark.parametrize("tasks", [2, 20])
def test_any_width(width, tasks, device):
    torch.manual_seed(2)
    layers = [nn.Linear(3, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, width)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 3)).double().to(device)
    x, y, query_x, query_y = tasks_for("tanh", "cross_entropy", device, tasks=tasks)
    raw = Raw.of(net, F.cross_entropy, (3,))
    lr = torch.full((1, 1, 1), 0.1, dtype=torch.float64, device=device)
    check("gradient", *raw, x, y, True)
    check("forward", *raw, x)
    options = ([], 2, False, False, True, True, True, True)
    check("meta_gradient", *raw, lr, x, y, query_x, query_y, *options)


def test_no_example_is_counted_where_all_labels_are_ignored(device):
    setting = Setting("linear", "ignore_index", device)
    setting.data.support_y[1] = 1  # the ignored label
    setting.check("gradient")


@pytest.mark.parametrize("tasks", [3, 20])
def test_labels_without_a_class_are_refused(tasks, device):
    setting = Setting("linear", "cross_entropy", device, tasks=tasks)
    setting.data.support_y[1, 2] = 3
    for op in NAMES[3:]:
        with pytest.raises(ValueError, match=r"support_y: expected labels in 0..2, .* got 3"):
            getattr(COMPILED, op)(*setting.arguments(op))
    setting.data.support_y[1, 2] = 0
    setting.data.query_y[0, 0] = -2
    with pytest.raises(ValueError, match=r"query_y: expected labels in 0..2, .* got -2"):
        COMPILED.meta_gradient(*setting.arguments("meta_gradient"))
    with pytest.raises(ValueError, match=r"query_y: expected labels in 0..2, .* got -2"):
        COMPILED.check_labels(setting.raw[0], setting.data.support_y, setting.data.query_y)


def test_labels_to_ignore_and_targets_of_other_losses_pass_the_check(device):
    for loss in ("cross_entropy", "mse"):
        setting = Setting("linear", loss, device)
        setting.data.support_y[1] = -100  # the ignored label
        COMPILED.check_labels(setting.raw[0], setting.data.support_y, setting.data.query_y)


def strided(value):
    if not isinstance(value, Tensor) or (value.dtype == torch.int64 and value.ndim == 1):
        return value  # the code
    return torch.stack([value, value], -1)[..., 0]


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("tasks", [2, 20])
def test_strided_and_expanded_inputs(op, tasks, device):
    setting = Setting("tanh", "cross_entropy", device, tasks=tasks, per_task=True)
    arguments = setting.arguments(op)
    plain, other = (
        getattr(COMPILED, op)(*arguments),
        getattr(COMPILED, op)(*map(strided, arguments)),
    )
    if isinstance(plain, Tensor):
        plain, other = (plain,), (other,)
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)
    setting.data = type(setting.data)(*(t[:1].expand_as(t) for t in setting.data))
    setting.check(op)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("tasks", [3, 20])
def test_bits_repeat_and_inputs_stay(op, tasks, device):
    setting = Setting("gelu_tanh", "mse", device, torch.float32, tasks=tasks)
    arguments = setting.arguments(op)
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    for a, b in zip(results(op, arguments), results(op, arguments), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_an_infinite_loss_stays_in_its_task(device):
    setting = Setting("relu", "mse", device, tasks=20)
    setting.data.support_x[3, 0, 0] = math.inf
    *_, grads, _ = COMPILED.gradient(*setting.arguments("gradient"))
    finite = grads.isfinite().all(1).tolist()
    assert finite == [t != 3 for t in range(20)]


def one(value: float, *shape: int, device: str) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("tasks", [1, 20])
def test_golden_linear_neuron(tasks, device):
    """z = w x with L_s = (w x - y)^2 and L_q = (w u - v)^2; w = 2, x = 1, y = 1, lr = 1/4.

    g = 2 x (w x - y) = 2, H = 2 x^2 = 2, w_1 = 2 - 2/4 = 3/2. With u = 2, v = 1:
    L_q = (3 - 1)^2 = 4, dL_q/dw_1 = 2 u (w_1 u - v) = 8.
    d w   = 8 (1 - lr H) = 4; first order 8            d lr = -g 8 = -16
    d x   = -lr 8 dg/dx = -2 (4 w x - 2 y) = -12       d u = 2 w_1 (w_1 u - v) = 6
    """
    raw = Raw.of(nn.Linear(1, 1, bias=False).double().to(device), F.mse_loss, (1,))
    raw = raw._replace(theta=one(2.0, 1, device=device))
    x, y, u, v = (one(value, tasks, 1, 1, device=device) for value in (1.0, 1.0, 2.0, 1.0))
    lr = one(0.25, 1, 1, 1, device=device)
    for first_order, dw, dx in ((False, 4.0, -12.0), (True, 8.0, 0.0)):
        options = ([], 1, first_order, False, True, True, True, True)
        loss, z, *grads = COMPILED.meta_gradient(*raw, lr, x, y, u, v, *options)
        assert loss.item() == pytest.approx(4.0, rel=1e-14)
        assert z.flatten().tolist() == [3.0] * tasks
        sums = [g.sum().item() for g in grads]
        assert sums == pytest.approx([dw, -16.0, dx, 6.0], rel=1e-14)


@pytest.mark.parametrize(
    ("layer", "value", "slope", "curvature"),
    [
        # softplus(0) = ln 2, f' = sigmoid(0) = 1/2, f'' = s (1 - s) = 1/4
        (nn.Softplus(), math.log(2), 0.5, 0.25),
        # gelu(0) = 0, f' = Phi(0) = 1/2, f'' = 2 phi(0) = sqrt(2/pi)
        (nn.GELU(), 0.0, 0.5, math.sqrt(2 / math.pi)),
        # its tanh form: z/2 (1 + tanh(c (z + ..z^3))), c = sqrt(2/pi): f'' = c
        (nn.GELU(approximate="tanh"), 0.0, 0.5, math.sqrt(2 / math.pi)),
        # silu = z s: f' = 1/2, f'' = 2 s' = 1/2
        (nn.SiLU(), 0.0, 0.5, 0.5),
        # mish = z tanh(softplus): f' = tanh(ln 2) = 3/5, f'' = 2 (1 - 9/25) / 2
        (nn.Mish(), 0.0, 0.6, 0.64),
        # sigmoid: f' = s (1 - s) = 1/4, f'' = s' (1 - 2 s) = 0
        (nn.Sigmoid(), 0.5, 0.25, 0.0),
        # tanh: f' = 1, f'' = -2 tanh f' = 0;  ReLU'(0) = 0 by definition
        (nn.Tanh(), 0.0, 1.0, 0.0),
        (nn.ReLU(), 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("tasks", [1, 20])
def test_golden_neurons(layer, value, slope, curvature, tasks, device):
    """L = (f(w) - y)^2 at w = 0 with x = 1, y = f(0) - 1: L' = 2 f', H = 2 f'^2 + 2 f''."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), layer).double().to(device)
    raw = Raw.of(net, F.mse_loss, (1,))._replace(theta=one(0.0, 1, device=device))
    x, y = (one(number, tasks, 1, 1, device=device) for number in (1.0, value - 1.0))
    loss, outputs, gradient, _ = COMPILED.gradient(*raw, x, y, False)
    product, _ = COMPILED.hvp(*raw, x, y, one(1.0, tasks, 1, device=device), False)
    assert loss.tolist() == pytest.approx([1.0] * tasks, rel=1e-14)
    assert outputs.flatten().tolist() == pytest.approx([value] * tasks, rel=1e-14)
    assert gradient.flatten().tolist() == pytest.approx([2 * slope] * tasks, rel=1e-14)
    expected = [2 * slope**2 + 2 * curvature] * tasks
    assert product.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_golden_cross_entropy_and_layer_norm(device):
    """Two classes at logits (0, ln 3): p = (1/4, 3/4); label 0: loss ln 4, dz = (-3/4, 3/4).

    Smoothing 1/5 aims at (9/10, 1/10): loss 9/10 ln 4 + 1/10 ln 4/3, dz = (-13/20, 13/20). A layer
    norm without eps of (0, ln 3) gives (-1, 1).
    """
    x = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64, device=device)
    y = torch.zeros(1, 1, dtype=torch.int64, device=device)
    net = nn.Linear(2, 2).double().to(device)
    theta = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=torch.float64, device=device)
    smooth = 0.9 * math.log(4) + 0.1 * math.log(4 / 3)
    for smoothing, value, dz in ((0.0, math.log(4), 0.75), (0.2, smooth, 0.65)):
        raw = Raw.of(net, nn.CrossEntropyLoss(label_smoothing=smoothing), (2,))
        loss, _, gradient, _ = COMPILED.gradient(*raw._replace(theta=theta), x, y, False)
        assert loss.item() == pytest.approx(value, rel=1e-14)
        assert gradient[0, 4:].tolist() == pytest.approx([-dz, dz], rel=1e-14)
    norm = Raw.of(nn.LayerNorm(2, eps=0.0).double().to(device), F.mse_loss, (2,))
    outputs = COMPILED.forward(*norm, x)
    assert outputs.flatten().tolist() == pytest.approx([-1.0, 1.0], rel=1e-14)
