"""Inner rules against the same ones by hand, unrolled, in both engines."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.engines import step_sizes
from tests.helpers.networks import Tasks, build, classification, regression, relative_error
from tests.helpers.programs import build as build_program
from tests.helpers.programs import tasks_for
from tests.helpers.unrolled_rules import CASES, Case, RuleGradient, rule_gradient

EXACT = 1e-9

ENGINES = ["functional", "program"]
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_rule = pytest.mark.parametrize("name", CASES)
each_order = pytest.mark.parametrize("first_order", [False, True])


@pytest.fixture(autouse=True)
def kernels(request, device):
    engine = getattr(request.node, "callspec", None)
    engine = engine.params.get("engine") if engine else None
    if engine == "program" and (fm.core.backend.PROGRAM, device) not in fm.core.backend.KERNELS:
        pytest.skip(f"the extension has no task program for {device}")


def run(
    net: nn.Module,
    tasks: Tasks,
    lr: Tensor,
    steps: int,
    case: Case,
    step_weights=None,
    loss=F.cross_entropy,
    **options: object,
) -> RuleGradient:
    """The learner's meta-gradient, by ``meta_loss`` and ``backward``."""
    maml = fm.MAML(net, lr, steps, loss=loss, learn_lr=True, rule=case.rule, **options)
    maml.zero_grad()
    support_x, query_x = (x.detach().requires_grad_() for x in (tasks.support_x, tasks.query_x))
    data = support_x, tasks.support_y, query_x, tasks.query_y
    value, logits = maml.meta_loss(*data, step_weights)
    value.backward()
    theta = torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])
    learned = {name: p.grad for name, p in case.learned.items()}
    rest = maml.lr.grad, support_x.grad, query_x.grad, learned
    return RuleGradient(value.detach(), logits, theta, *rest)


def assert_equal(actual: RuleGradient, expected: RuleGradient, tolerance: float = EXACT) -> None:
    for name in ("loss", "logits", "theta", "lr", "support_x", "query_x"):
        got, wanted = getattr(actual, name), getattr(expected, name)
        assert (got is None) == (wanted is None), name
        assert wanted is None or relative_error(got, wanted) < tolerance, name
    assert actual.learned.keys() == expected.learned.keys()
    for name, wanted in expected.learned.items():
        got = actual.learned[name]
        assert (got - wanted).abs().max() < tolerance * max(1.0, float(wanted.abs().max())), name


@pytest.fixture
def problem(device):
    """A network, its tasks and step sizes a parameter."""
    net = build("mlp", device)
    return net, classification("mlp", device), step_sizes(net)


@each_engine
@each_order
@pytest.mark.parametrize("steps", [1, 2, 3])
@each_rule
def test_meta_gradients_equal_the_unrolled_ones(name, steps, first_order, engine, problem):
    net, tasks, lr = problem
    case = CASES[name](net)
    expected = rule_gradient(net, tasks, F.cross_entropy, lr, steps, case, first_order)
    options = {"first_order": first_order, "engine": engine}
    assert_equal(run(net, tasks, lr, steps, case, **options), expected)


@each_engine
@each_rule
def test_learned_hyperparameters_matter(name, engine, problem):
    """Otherwise the equality above could be one of zeros."""
    net, tasks, lr = problem
    case = CASES[name](net)
    learned = run(net, tasks, lr, 3, case, engine=engine).learned
    assert all(grad.abs().max() > 1e-7 for grad in learned.values()), learned


@each_engine
@each_rule
def test_query_losses_of_every_step_and_step_sizes_of_every_step(name, engine, problem):
    net, tasks, lr = problem
    case, weights = CASES[name](net), [0.25, 0.0, 1.5]
    lr = torch.stack([lr, 0.5 * lr, 1.5 * lr])
    expected = rule_gradient(net, tasks, F.cross_entropy, lr, 3, case, step_weights=weights)
    assert_equal(run(net, tasks, lr, 3, case, weights, engine=engine), expected)


@each_engine
@pytest.mark.parametrize("chunk", [1, 2])
@each_rule
def test_the_result_does_not_depend_on_the_chunk(name, chunk, engine, problem):
    net, tasks, lr = problem
    case = CASES[name](net)
    expected = run(net, tasks, lr, 2, case, engine=engine)
    assert_equal(run(net, tasks, lr, 2, case, engine=engine, task_chunk=chunk), expected, 1e-12)


@pytest.mark.parametrize("mode", ["forward", "finite_difference"])
@each_rule
def test_other_products(name, mode, problem):
    net, tasks, lr = problem
    case = CASES[name](net)
    expected = run(net, tasks, lr, 2, case)
    tolerance = EXACT if mode == "forward" else 1e-5
    assert_equal(run(net, tasks, lr, 2, case, hvp_mode=mode), expected, tolerance)


@each_engine
@each_rule
def test_images(name, engine, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    case, lr = CASES[name](net), torch.tensor(0.05, dtype=torch.float64, device=device)
    expected = rule_gradient(net, tasks, F.cross_entropy, lr, 2, case)
    assert_equal(run(net, tasks, lr, 2, case, engine=engine), expected)


@each_engine
@pytest.mark.parametrize("network", ["frozen", "residual", "norms_of_each_step"])
def test_other_networks_give_the_same_by_both_engines(network, engine, device):
    net, tasks = build_program(network, device), tasks_for(network, "mse", device)
    lr = torch.tensor(0.05, dtype=torch.float64, device=device)
    results = []
    for other in ("functional", engine):
        rule = fm.rules.Adam(eps=1e-2)
        case = Case(rule, lambda *_: None)
        results.append(run(net, tasks, lr, 3, case, [0.5, 0.0, 1.0], F.mse_loss, engine=other))
    assert_equal(results[1], results[0])


@each_engine
@each_order
@each_rule
def test_a_loss_on_adapted_tasks_gives_the_meta_gradient(name, first_order, engine, problem):
    net, tasks, lr = problem
    case = CASES[name](net)
    options = {"first_order": first_order, "engine": engine, "rule": case.rule}
    maml = fm.MAML(net, lr, 3, learn_lr=True, **options)
    wanted = torch.autograd.grad(maml.meta_loss(*tasks)[0], list(maml.parameters()))
    outputs = maml.adapt_tasks(*tasks[:2])(tasks.query_x)
    own = F.cross_entropy(outputs.flatten(0, 1), tasks.query_y.flatten())
    actual = torch.autograd.grad(own, list(maml.parameters()))
    for got, expected in zip(actual, wanted, strict=True):
        assert relative_error(got, expected) < EXACT


@each_engine
@each_rule
def test_the_gradient_as_a_value(name, engine, problem):
    net, tasks, lr = problem
    case = CASES[name](net)
    expected = run(net, tasks, lr, 2, case, engine=engine)
    maml = fm.MAML(net, lr, 2, learn_lr=True, rule=case.rule, engine=engine)
    result = maml.meta_gradient(*tasks)
    assert relative_error(result.grads, expected.theta) < EXACT
    assert relative_error(result.lr_grad, expected.lr) < EXACT
    assert list(result.rule_grads) == list(case.learned)
    maml.zero_grad()
    result.assign_to(maml)
    for key, p in case.learned.items():
        assert torch.equal(p.grad, result.rule_grads[key])
        assert (p.grad - expected.learned[key]).abs().max() < EXACT


@each_engine
def test_without_gradients(engine, problem):
    net, tasks, lr = problem
    maml = fm.MAML(net, lr, 3, rule=fm.rules.Adam(), engine=engine)
    loss, outputs = maml.meta_loss(*tasks)
    with torch.no_grad():
        again, same = maml.meta_loss(*tasks)
        adapted = maml.adapt_tasks(*tasks[:2])(tasks.query_x)
    assert not again.requires_grad
    assert relative_error(again, loss.detach()) < 1e-14
    assert relative_error(same, outputs) < 1e-14
    assert relative_error(adapted, outputs) < 1e-12


@each_engine
@pytest.mark.parametrize("mode", [False, True])
def test_the_plain_rule_is_no_rule(mode, engine, problem):
    net, tasks, lr = problem
    plain, none = (
        fm.MAML(net, lr, 3, mode, rule=rule, engine=engine) for rule in (fm.rules.SGD(), None)
    )
    assert plain.explain() == none.explain()
    results = (maml.meta_gradient(*tasks) for maml in (plain, none))
    grads = [result.grads for result in results]
    assert torch.equal(*grads)


@each_engine
def test_a_rule_that_changes_between_calls_is_seen(engine, problem):
    net, tasks, _ = problem
    rule = fm.rules.SGD()
    maml = fm.MAML(net, 0.1, 3, rule=rule, engine=engine)
    before = [maml.meta_gradient(*tasks).grads for _ in range(4)][-1]
    rule.weight_decay = 0.5
    expected = fm.MAML(net, 0.1, 3, rule=fm.rules.SGD(weight_decay=0.5)).meta_gradient(*tasks).grads
    assert relative_error(maml.meta_gradient(*tasks).grads, expected) < EXACT
    maml.rule = None
    assert relative_error(maml.meta_gradient(*tasks).grads, before) < EXACT


def test_dropout_draws_the_same_masks_on_the_way_back(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 4)).double().to(device)
    tasks = Tasks(*(t[:1] for t in classification("mlp", device)))
    case, lr = CASES["momentum"](net), step_sizes(net)
    torch.manual_seed(5)
    actual = run(net, tasks, lr, 2, case)
    torch.manual_seed(5)
    expected = rule_gradient(net, tasks, F.cross_entropy, lr, 2, case)
    assert_equal(actual, expected)


@each_engine
@pytest.mark.parametrize("rule", [fm.rules.Adam(), fm.rules.RMSProp()], ids=lambda r: r.title)
def test_meta_gradients_where_no_gradient_reaches_some_parameters(rule, engine, device):
    """Dead units, in float32, where the second moment stays zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)).to(device)
    with torch.no_grad():
        net[0].bias[:2] = -100
    tasks = Tasks(*(t.float() for t in regression(device)))
    maml = fm.MAML(net, 0.01, 3, loss=F.mse_loss, rule=rule, engine=engine)
    grads = maml.meta_gradient(*tasks).grads
    assert grads.isfinite().all()
    assert grads.any()


@each_engine
def test_meta_curvature_at_the_identity_is_maml(engine, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    plain = fm.MAML(net, 0.1, 3, engine=engine).meta_gradient(*tasks)
    rule = fm.rules.MetaCurvature(net)
    curved = fm.MAML(net, 0.1, 3, rule=rule, engine=engine).meta_gradient(*tasks)
    assert relative_error(curved.grads, plain.grads) < EXACT
    assert relative_error(curved.loss, plain.loss) < 1e-14


@each_engine
def test_equal_step_sizes_of_layers_and_steps_are_maml(engine, problem):
    net, tasks, _ = problem
    plain = fm.MAML(net, 0.1, 3, engine=engine).meta_gradient(*tasks).grads
    sizes = torch.full((3, 6), 0.1, dtype=torch.float64)
    found = fm.MAML(net, sizes, 3, learn_lr=True, engine=engine).meta_gradient(*tasks).grads
    assert relative_error(found, plain) < EXACT


@each_rule
def test_half_precision(name, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    half = [t.bfloat16() if t.is_floating_point() else t for t in tasks]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    case = CASES[name](net)
    expected = rule_gradient(net, tasks, F.cross_entropy, lr, 2, case)
    maml = fm.MAML(net.bfloat16(), 0.1, 2, rule=case.rule)
    grads = maml.meta_gradient(*half).grads
    assert grads.dtype == torch.bfloat16
    assert relative_error(grads.double(), expected.theta) < 0.2


def test_copies_and_state_dicts_hold_the_hyperparameters(problem):
    net, tasks, _ = problem
    maml = fm.MAML(net, 0.1, 2, rule=CASES["adam"](net).rule)
    assert "rule.beta1" in maml.state_dict()
    grads = maml.meta_gradient(*tasks).grads
    for twin in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(twin.meta_gradient(*tasks).grads, grads)


def test_hyperparameters_changed_since_are_noticed(problem):
    net, tasks, _ = problem
    maml = fm.MAML(net, 0.1, 2, rule=CASES["momentum"](net).rule)
    adapted = maml.adapt_tasks(*tasks[:2]).params
    with torch.no_grad():
        maml.rule.momentum.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        adapted.sum().backward()


def test_explain_says_what_takes_the_steps(problem):
    net, tasks, _ = problem
    rule = fm.rules.ClipNorm(1.0, fm.rules.Adam())
    text = fm.MAML(net, 0.1, 2, rule=rule, engine="functional").explain()
    assert "Inner steps: 2 by ClipNorm before Adam, second order" in text
    maml = fm.MAML(net, 0.1, 2, rule=rule)
    if maml.explain().startswith("Task program"):
        assert "Task program, one call a step: linear" in maml.explain(*tasks[:2])


def test_a_program_that_is_required_is_required_of_every_rule(problem):
    _, tasks, _ = problem
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).double()
    maml = fm.MAML(net, 0.1, rule=fm.rules.Adam(), engine="program")
    for call in (lambda: maml.meta_loss(*tasks), lambda: maml.adapt_tasks(*tasks[:2])):
        with pytest.raises(ValueError, match="there is no task program: "):
            call()


def test_no_graph_of_the_steps_of_a_rule(problem):
    net, tasks, _ = problem
    maml = fm.MAML(net, 0.1, rule=fm.rules.Adam(), cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph=True: "):
        maml.meta_loss(*tasks)
    if fm.build_info()["native"]:
        program = maml._engine.program
        assert "the inner rule is Adam" in program.why_no_graph(program.program())


def test_a_clone_takes_plain_steps_only(problem):
    net, tasks, _ = problem
    learner = fm.MAML(net, 0.1, rule=fm.rules.Adam()).clone()
    loss = F.cross_entropy(learner(tasks.support_x[0]), tasks.support_y[0])
    with pytest.raises(ValueError, match=r"rule: expected plain descent for adapt, got Adam"):
        learner.adapt(loss)
    plain = fm.MAML(net, 0.1, rule=fm.rules.SGD()).clone()
    plain.adapt(F.cross_entropy(plain(tasks.support_x[0]), tasks.support_y[0]))


def test_memory_holds_no_graph_of_the_steps(problem):
    net, tasks, _ = problem
    maml = fm.MAML(net, 0.1, 4, rule=fm.rules.Adam(), engine="functional")
    adapted = maml.adapt_tasks(*tasks[:2]).params
    kept = adapted.grad_fn.saved_tensors
    # theta, the step size and the data; theta_k, g_k and two states of each of four steps
    assert len(kept) == 4 + 4 * 4
    assert all(tensor.grad_fn is None for tensor in kept[4:])


def test_freezing_what_a_preconditioner_was_made_for_is_noticed(problem):
    net, tasks, _ = problem
    maml = fm.MAML(net, 0.1, rule=fm.rules.MetaCurvature(net))
    net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"was made for, 0.weight .*, got 2.weight"):
        maml.meta_loss(*tasks)


def test_a_rule_without_an_update_says_so(problem):
    net, tasks, _ = problem
    with pytest.raises(NotImplementedError, match="Rule has no update"):
        fm.MAML(net, 0.1, rule=fm.rules.Rule()).meta_loss(*tasks)
