"""The example in the documentation of learn2learn's MAML."""

import learn2learn as l2l
from torch import nn

from tests.helpers.deterministic import digest, filled, wave

X, y = wave(6, 20), wave(6, 10, start=2)
loss = nn.MSELoss()

linear = l2l.algorithms.MAML(filled(nn.Linear(20, 10)), lr=0.01)
clone = linear.clone()
error = loss(clone(X), y)
clone.adapt(error)
error = loss(clone(X), y)
error.backward()

RESULT = [error.item(), *digest(linear.module.weight.grad, linear.module.bias.grad)]
