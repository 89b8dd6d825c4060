"""The workloads of the benchmark: their sizes, numbers and operation counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.common.networks import MLP, Conv4, draw_parameters, parameter_count
from benchmarks.common.workloads import WORKLOADS, Workload, draw
from benchmarks.peers.modules import TorchProblem
from benchmarks.peers.step import Problem

SMALL_CONV = Workload("conv", Conv4(3, 5, 1, 16), "cross_entropy", 2, 5, 10, 1, 0.4)
SMALL_HVP = Workload("hvp", MLP((6, 4, 3)), "cross_entropy", 2, 9, kind="hvp")
SMALL = [replace(WORKLOADS["sin1"], tasks=3), SMALL_CONV, SMALL_HVP]


def test_operations_of_sin1_by_hand():
    # Forward, an example: 2 * (1*40 + 40*40 + 40*1) = 80 + 3200 + 80.
    gradient = 10 * (2 * 80 + 3 * 3280)  # 10 examples
    product = 10 * (2 * 80 + 6 * 3280)
    assert gradient == 100_000 and product == 198_400
    assert WORKLOADS["sin1"].flops == 25 * (gradient + product + gradient) == 9_960_000
    assert WORKLOADS["sin5"].flops == 25 * (5 * (gradient + product) + gradient)
    assert WORKLOADS["sin1_t1"].flops == WORKLOADS["sin1"].flops // 25


def test_operations_of_a_hessian_vector_product_by_hand():
    first, rest = 2 * 784 * 512, 2 * (512 * 512 + 512 * 10)
    assert WORKLOADS["hvp_mlp_t1"].flops == 128 * (3 * first + 8 * rest)
    assert WORKLOADS["hvp_mlp_t32"].flops == 32 * WORKLOADS["hvp_mlp_t1"].flops


def test_operations_of_a_convolution_are_those_of_its_products():
    size, channels, hidden = 16, 1, 3
    first = 2 * 9 * channels * hidden * size * size
    second = 2 * 9 * hidden * hidden * 8 * 8
    assert SMALL_CONV.network.layer_flops()[:2] == [first, second]


@pytest.mark.parametrize(
    "name, parameters",
    [("sin1", 1761), ("omni_mlp", 246_597), ("hvp_mlp_t1", 669_706), ("omni_conv1", 112_261)],
)
def test_parameters_by_hand(name, parameters):
    assert WORKLOADS[name].parameters == parameters


def test_the_same_seed_draws_the_same_numbers():
    workload = WORKLOADS["sin1"]
    one, two, other = draw(workload, 3), draw(workload, 3), draw(workload, 4)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["theta"], other["theta"])


def test_sinusoids_are_those_of_maml():
    tasks = draw(WORKLOADS["sin1"])
    assert tasks["support_x"].shape == tasks["support_y"].shape == (25, 10, 1)
    assert np.abs(tasks["support_x"]).max() <= 5 and np.abs(tasks["query_y"]).max() <= 5
    assert tasks["support_x"].dtype == np.float32


def test_labels_go_class_by_class():
    tasks = draw(WORKLOADS["omni_mlp"])
    assert tasks["support_y"][0].tolist() == [0, 1, 2, 3, 4]
    assert np.bincount(tasks["query_y"][3]).tolist() == [15] * 5


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
def test_the_module_has_the_parameters_of_the_table(workload):
    problem = TorchProblem(Problem(workload, draw(workload)))
    shapes = [tuple(p.shape) for p in problem.module.parameters()]
    assert shapes == [p.shape for p in workload.network.parameters()]
    outputs = problem.module(torch.rand(7, *workload.network.input_shape))
    assert outputs.shape == (7, workload.network.outputs)


def test_parameters_are_drawn_as_pytorch_does():
    network = Conv4(3, 5, 1, 16)
    theta = draw_parameters(network, np.random.default_rng(0))
    assert theta.shape == (parameter_count(network),) and theta.dtype == np.float32
    weight, bias, gain, shift, _ = np.split(theta, (27, 30, 33, 36))
    assert np.abs(weight).max() <= 1 / 3 and np.abs(bias).max() <= 1 / 3 and weight.std() > 0.1
    assert (gain == 1).all() and (shift == 0).all()
