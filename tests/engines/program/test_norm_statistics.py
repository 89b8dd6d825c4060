"""Norms by running statistics in evaluation, where a learner is asked for them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.program.fast_path import CachedMetaGradient
from fastmeta.engines.program.lowering import Lowering
from tests.helpers.networks import Tasks, relative_error
from tests.helpers.programs import build, tasks_for, with_running_statistics
from tests.helpers.unrolled import meta_gradient

EXACT = 1e-9
ENGINES = ("functional", "program")
NAMES = ("conv4", "conv4_stride", "residual_images", "batch_norm_of_features", "sequences")

each_engine = pytest.mark.parametrize("engine", ENGINES)
each_network = pytest.mark.parametrize("name", NAMES)


def evaluated(name: str) -> nn.Module:
    return with_running_statistics(build(name)).eval()


def learner(net: nn.Module, engine: str, steps: int = 2, **options) -> fm.MAML:
    options = {"norm_statistics": "running", **options}
    return fm.MAML(net, 0.1, steps, engine=engine, **options)


def unrolled(net: nn.Module, tasks: Tasks, steps: int = 2) -> Tensor:
    lr = torch.tensor(0.1, dtype=torch.float64)
    params = meta_gradient(net, tasks, F.cross_entropy, lr, steps, training=None).params
    return ParameterLayout.of(net).flatten(params)


def gradient(maml: fm.MAML, tasks: Tasks) -> Tensor:
    return maml.meta_gradient(*tasks).grads


@each_network
@each_engine
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_gradients_in_evaluation_are_pytorchs(name, engine, steps):
    net, tasks = evaluated(name), tasks_for(name)
    before = {key: buffer.clone() for key, buffer in net.named_buffers()}
    actual = gradient(learner(net, engine, steps), tasks)
    assert relative_error(actual, unrolled(net, tasks, steps)) < EXACT
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, before[key])


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_each_exact_product_of_the_functional_engine(mode):
    net, tasks = evaluated("conv4"), tasks_for("conv4")
    actual = gradient(learner(net, "functional", hvp_mode=mode), tasks)
    assert relative_error(actual, unrolled(net, tasks)) < EXACT
    actual = gradient(learner(net, "functional", task_chunk=1), tasks)
    assert relative_error(actual, unrolled(net, tasks)) < EXACT


def each_result(maml: fm.MAML, tasks: Tasks) -> dict[str, Tensor]:
    """What every method gives."""
    theta = ParameterLayout.of(maml.module).flatten(dict(maml.module.named_parameters())).detach()
    results = dict(zip(("loss", "outputs", "grads"), maml.meta_gradient(*tasks), strict=False))
    results["meta_loss"] = maml.meta_loss(*tasks)[0].detach()
    results["hvp"] = maml.hvp(theta, tasks[:2], theta.cos())
    with torch.no_grad():
        adapted = maml.adapt_tasks(*tasks[:2])
        results |= {"adapted": adapted.params, "queries": adapted(tasks.query_x)}
    return results


@each_network
def test_every_method_of_both_engines_goes_by_running_statistics(name):
    net, tasks = evaluated(name), tasks_for(name)
    functional, program = (each_result(learner(net, engine), tasks) for engine in ENGINES)
    by_batch = each_result(learner(net, "program", norm_statistics="batch"), tasks)
    for key, expected in functional.items():
        assert relative_error(program[key], expected) < EXACT
        assert relative_error(by_batch[key], expected) > 1e-3


@each_engine
def test_the_outputs_of_adapted_tasks_are_those_of_the_module_itself(engine):
    net, tasks = evaluated("conv4"), tasks_for("conv4")
    with torch.no_grad():
        outputs = learner(net, engine, steps=0).adapt_tasks(*tasks[:2])(tasks.query_x)
    assert relative_error(outputs[1], net(tasks.query_x[1]).detach()) < EXACT


@each_engine
def test_in_training_the_batch_counts_and_running_statistics_stay(engine):
    net, tasks = evaluated("conv4").train(), tasks_for("conv4")
    before = {key: buffer.clone() for key, buffer in net.named_buffers()}
    actual = each_result(learner(net, engine), tasks)
    expected = each_result(learner(net, engine, norm_statistics="batch"), tasks)
    for key, value in expected.items():
        assert torch.equal(actual[key], value)
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, before[key])


def track(maml: fm.MAML) -> None:
    """As a user lets norms track statistics: calls of the module in training mode."""
    maml.module.train()
    with torch.no_grad():
        maml.module(torch.randn(8, 1, 16, 16, dtype=torch.float64))
    maml.module.eval()


def replace(maml: fm.MAML) -> None:
    for module in maml.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var = 2 * module.running_var


def load(maml: fm.MAML) -> None:
    state = maml.module.state_dict()
    maml.module.load_state_dict({key: value * 1.5 for key, value in state.items()})


def scale(maml: fm.MAML) -> None:
    for key, buffer in maml.module.named_buffers():
        if key.endswith("running_mean"):
            buffer.mul_(-2)


CHANGES = {"in place": scale, "load_state_dict": load, "tracked": track, "replaced": replace}


@each_engine
@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_taken_again_sees_new_statistics(change, engine):
    torch.manual_seed(2)
    maml, tasks = learner(evaluated("conv4"), engine), tasks_for("conv4")
    for _ in range(3):
        before = gradient(maml, tasks)
    CHANGES[change](maml)
    after, expected = gradient(maml, tasks), unrolled(maml.module, tasks)
    assert relative_error(after, expected) < EXACT
    assert relative_error(before, expected) > 1e-3


@pytest.mark.skipif(fm.core.backend._C is None, reason="needs the compiled extension")
def test_a_prepared_gradient_reads_the_statistics_at_each_call(monkeypatch):
    answers, call = [], CachedMetaGradient.__call__
    monkeypatch.setattr(
        CachedMetaGradient, "__call__", lambda *args: answers.append(call(*args)) or answers[-1]
    )
    maml, tasks = learner(evaluated("conv4"), "program"), tasks_for("conv4")
    for _ in range(3):
        gradient(maml, tasks)
    scale(maml)
    actual = gradient(maml, tasks)
    assert [answer is not None for answer in answers] == [True, True]
    assert relative_error(actual, unrolled(maml.module, tasks)) < EXACT


def test_switching_the_option_of_a_learner_takes_effect():
    maml, tasks = learner(evaluated("conv4"), "program"), tasks_for("conv4")
    results = []
    for statistics in ("running", "batch", "running"):
        maml.norm_statistics = statistics
        results.append([gradient(maml, tasks) for _ in range(3)][-1])
    assert torch.equal(results[0], results[2])
    assert relative_error(results[1], results[0]) > 1e-3


def test_a_changed_dtype_is_not_kept():
    net = evaluated("conv4")
    lowering = Lowering(net, F.cross_entropy, "running")
    assert lowering.current(net, F.cross_entropy, "running")
    net.features[0][1].running_mean.data = torch.zeros(3)
    assert not lowering.current(net, F.cross_entropy, "running")


@each_engine
def test_one_example_is_enough(engine):
    net = evaluated("batch_norm_of_features")
    tasks = tasks_for("batch_norm_of_features", support=1, queries=1)
    assert relative_error(gradient(learner(net, engine), tasks), unrolled(net, tasks)) < EXACT


def test_norms_that_track_nothing_keep_to_the_batch():
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), *norms, nn.Flatten(), nn.LazyLinear(3))
    net(torch.zeros(2, 1, 16, 16))
    net, tasks = net.double().eval(), tasks_for("conv4")
    for engine in ENGINES:
        assert relative_error(gradient(learner(net, engine), tasks), unrolled(net, tasks)) < EXACT


@pytest.mark.parametrize("norm_statistics", ["batch", "running"])
def test_a_norm_that_no_longer_tracks_reads_what_it_has(norm_statistics):
    """PyTorch's own semantics of batch norm, whatever the option says."""
    net, tasks = evaluated("conv4"), tasks_for("conv4")
    for block in net.features:
        block[1].track_running_stats = False
    for engine in ENGINES:
        maml = learner(net, engine, norm_statistics=norm_statistics)
        assert relative_error(gradient(maml, tasks), unrolled(net, tasks)) < EXACT


def norm_with(**buffers: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).double().eval()
    for name, buffer in buffers.items():
        setattr(net[1], name, buffer)
    return net


REASONS = {
    "a buffer of it is torch.float32 on cpu, unlike the parameters": {"running_var": torch.ones(3)},
    "a buffer of it has shape [2], not [3]": {"running_mean": torch.ones(2).double()},
    "a buffer of it is no plain tensor, or requires a gradient": {
        "running_mean": torch.ones(3).double().requires_grad_()
    },
}


@pytest.mark.parametrize("words", REASONS)
def test_statistics_that_do_not_lower_say_why(words):
    program = Lowering(norm_with(**REASONS[words]), F.mse_loss, "running").program((1, 4, 4))
    assert program == f"model.1 is a BatchNorm2d: {words}"


def test_statistics_are_frozen_parameters_once_each():
    net = norm_with()
    net.append(net[1])
    program = Lowering(net, F.mse_loss, "running").program((1, 4, 4))
    assert list(map(id, program.frozen)) == [id(net[1].running_mean), id(net[1].running_var)]


def test_an_unknown_choice_is_an_error():
    expected = r"norm_statistics: expected one of batch, running, got 'population'"
    with pytest.raises(ValueError, match=expected):
        fm.MAML(nn.Linear(3, 2), norm_statistics="population")


def test_explain_says_what_norms_go_by():
    net = evaluated("conv4")
    words = "batch norm 3 by running statistics, relu"
    assert words in learner(net, "program").explain()
    assert "Norms in evaluation mode go by the running" in learner(net, "functional").explain()
    for engine in ENGINES:
        text = learner(net, engine, norm_statistics="batch").explain()
        assert "running" not in text
    net.train()
    assert "running" not in learner(net, "program").explain()


def test_a_copy_and_a_clone_keep_the_option():
    net, tasks = evaluated("conv4"), tasks_for("conv4")
    maml = learner(net, "auto")
    expected = gradient(maml, tasks)
    for other in (copy.deepcopy(maml), maml.clone()):
        assert relative_error(gradient(other, tasks), expected) < EXACT


def test_a_loss_with_options_of_its_own():
    net, tasks = evaluated("conv4"), tasks_for("conv4")
    loss = functools.partial(F.cross_entropy, label_smoothing=0.1)
    results = [gradient(learner(net, engine, loss=loss), tasks) for engine in ENGINES]
    assert relative_error(*results) < EXACT
