"""Batch norm with a scale and a shift for each inner step (MAML++)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.program.lowering import Lowering
from fastmeta.models import PerStepBatchNorm1d, PerStepBatchNorm2d, inner_step
from fastmeta.ops.task_program.bytecode import Code, Opcode, at_step
from fastmeta.ops.task_program.reference import forward
from tests.helpers.networks import Tasks, relative_error
from tests.helpers.programs import Raw, build, lowered, shape_of, tasks_for
from tests.helpers.skips import needs_kernels
from tests.helpers.unrolled import meta_gradient, set_row, with_rows_by_hand

EXACT = 1e-9
ENGINES = ("functional", "program")
NAME = "norms_of_each_step"  # with 3, 2 and 4 rows; of the second the weight is frozen

each_engine = pytest.mark.parametrize("engine", ENGINES)


def unrolled(net: nn.Sequential, tasks: Tasks, steps: int, lr=0.1, **options) -> dict[str, Tensor]:
    """The meta-gradient by name of a twin whose norms work by hand."""
    lr = torch.as_tensor(lr, dtype=torch.float64)
    twin = with_rows_by_hand(net)
    return meta_gradient(twin, tasks, F.cross_entropy, lr, steps, at_step=set_row, **options).params


def by_name(maml: fm.MAML, tasks: Tasks, **options) -> dict[str, Tensor]:
    return ParameterLayout.of(maml.module).views(maml.meta_gradient(*tasks, **options).grads)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() < EXACT * scale, name


@each_engine
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_each_step_has_its_row(steps, first_order, engine):
    net, tasks = build(NAME), tasks_for(NAME)
    maml = fm.MAML(net, 0.1, steps, first_order, engine=engine)
    assert_same(by_name(maml, tasks), unrolled(net, tasks, steps, first_order=first_order))


@each_engine
def test_query_losses_of_each_step_take_its_row(engine):
    net, tasks, weights = build(NAME), tasks_for(NAME), [0.5, 0.0, 2.0]
    maml = fm.MAML(net, 0.1, 3, engine=engine)
    expected = unrolled(net, tasks, 3, step_weights=weights)
    assert_same(by_name(maml, tasks, step_weights=weights), expected)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_the_program_with_each_kind_of_memory_and_step_sizes(memory):
    net, tasks = build(NAME), tasks_for(NAME)
    elements = ParameterLayout.of(net).numel
    for lr in (torch.tensor(0.1), torch.linspace(0.05, 0.2, elements), torch.full((3, 1), 0.1)):
        maml = fm.MAML(net, lr.double(), 3, learn_lr=True, engine="program", memory=memory)
        other = fm.MAML(net, lr.double(), 3, learn_lr=True, engine="functional")
        actual, expected = (learner.meta_gradient(*tasks) for learner in (maml, other))
        assert relative_error(actual.grads, expected.grads) < EXACT
        assert relative_error(actual.lr_grad, expected.lr_grad) < EXACT


@pytest.mark.parametrize("options", [{"hvp_mode": "forward"}, {"task_chunk": 1}], ids=str)
def test_options_of_the_functional_engine(options):
    net, tasks = build(NAME), tasks_for(NAME)
    maml = fm.MAML(net, 0.1, 2, engine="functional", **options)
    assert_same(by_name(maml, tasks), unrolled(net, tasks, 2))


@each_engine
def test_rows_that_no_pass_reads_have_no_gradient(engine):
    net = build(NAME)
    gradients = by_name(fm.MAML(net, 0.1, 1, engine=engine), tasks_for(NAME))
    rows = [gradients[name].abs().sum(1) > 1e-6 for name in ("1.weight", "9.bias")]
    assert [row.tolist() for row in rows] == [[True, True, False], [True, True, False, False]]


def adapted_by_hand(net: nn.Sequential, tasks: Tasks, steps: int) -> tuple[Tensor, Tensor]:
    """theta_K and the outputs on the queries of the first task, one step after the other."""
    x, y, query_x, _ = (tensor[0] for tensor in tasks)
    twin = with_rows_by_hand(build(NAME))
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    params = {name: twin.get_parameter(name) for name in names}
    for k in range(steps):
        set_row(twin, k)
        loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
    set_row(twin, steps)
    outputs = torch.func.functional_call(twin, params, (query_x,))
    return torch.cat([p.flatten() for p in params.values()]).detach(), outputs.detach()


@each_engine
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_adapted_tasks_answer_at_the_last_step(steps, grad, engine):
    net, tasks = build(NAME), tasks_for(NAME)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    with torch.set_grad_enabled(grad):
        adapted = maml.adapt_tasks(*tasks[:2], steps=steps)
        outputs = adapted(tasks.query_x)
    theta, expected = adapted_by_hand(net, tasks, steps)
    assert relative_error(adapted.params[0], theta) < EXACT
    assert relative_error(outputs[0], expected) < EXACT


@each_engine
def test_the_gradient_through_adapted_tasks_is_the_meta_gradient(engine):
    net, tasks = build(NAME), tasks_for(NAME)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    outputs = maml.adapt_tasks(*tasks[:2])(tasks.query_x)
    loss = torch.stack(list(map(F.cross_entropy, outputs, tasks.query_y))).mean()
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    assert_same(grads, unrolled(net, tasks, 2))


def test_an_inner_rate_of_zero_leaves_the_rows_to_the_outer_optimizer():
    net, tasks = build(NAME), tasks_for(NAME)
    layout = ParameterLayout.of(net)
    rates = {name: 0.0 if name.partition(".")[0] in "1 9" else 0.1 for name in layout.names}
    for engine in ENGINES:
        maml = fm.MAML(net, rates, 2, engine=engine)
        adapted = maml.adapt_tasks(*tasks[:2]).task(1)
        assert torch.equal(adapted["1.weight"], net[1].weight)
        assert not torch.equal(adapted["0.weight"], net[0].weight)
        gradients = by_name(maml, tasks)
        assert_same(gradients, unrolled(net, tasks, 2, lr=list(rates.values())))
        assert (gradients["1.weight"].abs().sum(1) > 1e-6).all()


@each_engine
def test_hessian_vector_products_are_of_the_first_row(engine):
    net, tasks = build(NAME), tasks_for(NAME)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    theta = ParameterLayout.of(net).flatten(dict(net.named_parameters())).detach()
    with inner_step(2):
        product = maml.hvp(theta, tasks[:2], theta.cos())
    twin, (x, y, *_) = with_rows_by_hand(net), tasks
    params = [p for p in twin.parameters() if p.requires_grad]
    loss = F.cross_entropy(twin(x[0]), y[0])
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    slope = torch.cat([g.flatten() for g in grads])
    second = torch.autograd.grad(slope @ theta.cos(), params, materialize_grads=True)
    assert relative_error(product[0], torch.cat([g.flatten() for g in second])) < EXACT


def test_outside_a_learner_the_first_row_counts_unless_told_otherwise():
    norm, x = PerStepBatchNorm2d(2, steps=2), torch.randn(3, 2, 2, 2)
    plain = F.batch_norm(x, None, None, training=True)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        norm.bias.copy_(norm.weight + 1)
    for norm.training in (True, False):
        for k, row in {0: 0, 1: 1, 2: 2, 9: 2}.items():
            with inner_step(k):
                actual = norm(x)
            weight, bias = (p[row].view(2, 1, 1) for p in (norm.weight, norm.bias))
            torch.testing.assert_close(actual, plain * weight + bias)
        torch.testing.assert_close(norm(x)[:, 1], plain[:, 1] * 2 + 3)


def test_a_learner_leaves_the_step_as_it_was():
    norm, x = PerStepBatchNorm1d(3, steps=1).double(), torch.randn(4, 3).double()
    with torch.no_grad():
        norm.bias[1] = 1
    maml = fm.MAML(nn.Sequential(nn.Linear(3, 3).double(), norm), 0.1, 1, engine="functional")
    with inner_step(1):
        before = norm(x)
        maml.meta_gradient(x[None], torch.zeros(1, 4).long(), x[None], torch.zeros(1, 4).long())
        assert torch.equal(norm(x), before)
    with pytest.raises(KeyError), inner_step(1):
        raise KeyError
    assert not torch.equal(norm(x), before)


def test_features_and_sequences():
    for shape in ((5, 3), (5, 3, 4)):
        x = torch.randn(shape)
        expected = F.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(PerStepBatchNorm1d(3, 2)(x), expected)


def test_its_code_names_the_rows():
    program = lowered(build(NAME), F.cross_entropy, shape_of(NAME))
    norms = [i for i in Code.decode(program.code).instructions if i.opcode == Opcode.NORM]
    assert [i.args[-1] for i in norms] == [3, 2, 4, 4]
    assert norms[1].weight == -2 and norms[0].weight == 40
    assert program.per_step and not lowered(build("conv4"), F.cross_entropy, (1, 16, 16)).per_step


@needs_kernels
def test_explain_names_it():
    assert "per-step batch norm 4" in fm.MAML(build(NAME)).explain(*tasks_for(NAME)[:2])


def test_code_of_a_later_step():
    net, x = build(NAME), tasks_for(NAME).query_x
    code, theta, frozen = Raw.of(net, F.cross_entropy, shape_of(NAME))
    later = at_step(code, 2)
    assert Code.decode(later).first_step == 2 and Code.decode(code).first_step == 0
    assert torch.equal(Code.decode(later).encode(), later)
    with inner_step(2):
        expected = net(x[1]).detach()
    assert relative_error(forward(later, theta, frozen, x)[1], expected) < EXACT


@pytest.mark.skipif(fm.core.backend._C is None, reason="needs the compiled extension")
@pytest.mark.parametrize("step", [-1, 2**20])
def test_a_first_step_out_of_range_is_refused(step):
    code, theta, frozen = Raw.of(build(NAME), F.cross_entropy, shape_of(NAME))
    with pytest.raises(RuntimeError, match=f"unknown first step {step}"):
        torch.ops.fastmeta.task_program_forward(
            at_step(code, step), theta, frozen, tasks_for(NAME).query_x
        )


def test_what_does_not_lower_says_why():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), PerStepBatchNorm2d(2, 1))
    expected = "model.1 is a PerStepBatchNorm2d: it does not take examples of shape [3, 2, 2]"
    assert Lowering(net, F.mse_loss).program((1, 4, 4)) == expected


def test_errors():
    for channels, steps in ((0, 1), (3, -1)):
        with pytest.raises(ValueError, match="channels and steps: expected at least 1 and 0"):
            PerStepBatchNorm2d(channels, steps)
    for shape in ((2, 3), (2, 4, 5, 5)):
        with pytest.raises(ValueError, match="expected 4 dimensions with 3 channels in the second"):
            PerStepBatchNorm2d(3, 1)(torch.zeros(shape))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        PerStepBatchNorm1d(3, 1)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="k: expected at least 0, got -1"), inner_step(-1):
        pass
    with pytest.raises(TypeError, match=r"k: expected an integer, got 1\.0"), inner_step(1.0):
        pass
