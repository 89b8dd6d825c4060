"""Second-order meta-gradients through every layer and function, vmapped, against an unrolled graph.

PyTorch has a rule for vmap for most of them, and some of its rules have been wrong.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.engines import assert_equal, run
from tests.helpers.layers import LAYERS, ONCE_DIFFERENTIABLE
from tests.helpers.unrolled import meta_gradient


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_meta_gradient_through_a_layer(name, training):
    net, tasks = LAYERS[name].network_and_tasks()
    net.train(training)
    lr = torch.tensor(0.05, dtype=torch.float64)
    options = {"steps": 2, "first_order": name in ONCE_DIFFERENTIABLE}
    expected = meta_gradient(net, tasks, F.mse_loss, lr, training=training, **options)
    actual = run(net, tasks, lr, F.mse_loss, norm_statistics="running", **options)
    if options["first_order"]:
        expected = expected._replace(support_x=None)
    assert_equal(actual, expected)


@pytest.mark.parametrize("name", sorted(ONCE_DIFFERENTIABLE))
def test_a_layer_without_a_second_derivative_is_refused(name):
    net, tasks = LAYERS[name].network_and_tasks()
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        run(net, tasks, torch.tensor(0.05, dtype=torch.float64), F.mse_loss, steps=2)
