"""The examples in the documentation of clone_module, update_module and detach_module."""

import learn2learn as l2l
import torch
from learn2learn.utils import clone_module, detach_module
from torch import nn

from tests.helpers.deterministic import digest, filled, wave

X, y, lr = wave(6, 20), wave(6, 2, start=2), 0.1
loss = nn.MSELoss()
net = filled(nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2)))

clone = clone_module(net)
error = loss(clone(X), y)
grads = torch.autograd.grad(error, clone.parameters(), create_graph=True)
updates = [-lr * g for g in grads]
l2l.update_module(clone, updates=updates)
updated = loss(clone(X), y)
updated.backward()
through = [p.grad.clone() for p in net.parameters()]

detach_module(clone, keep_requires_grad=True)
loss(clone(X), y).backward()
RESULT = [error.item(), updated.item(), *digest(*through)]
RESULT += digest(*(p.grad for p in clone.parameters()))
