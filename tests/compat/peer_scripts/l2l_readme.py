"""The loop in learn2learn's README, with an outer optimizer."""

import learn2learn as l2l
import torch
from torch import nn

from tests.helpers.deterministic import digest, filled, wave

model = filled(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))


def compute_loss(task_model):
    return nn.functional.mse_loss(task_model(wave(7, 3, start=iteration)), wave(7, 2, start=1))


maml = l2l.algorithms.MAML(model, lr=0.1)
opt = torch.optim.SGD(maml.parameters(), lr=0.05)
for iteration in range(10):  # noqa: B007
    opt.zero_grad()
    task_model = maml.clone()  # torch.clone() for nn.Modules
    adaptation_loss = compute_loss(task_model)
    task_model.adapt(adaptation_loss)  # computes gradient, update task_model in-place
    evaluation_loss = compute_loss(task_model)
    evaluation_loss.backward()  # gradients w.r.t. maml.parameters()
    opt.step()

RESULT = [adaptation_loss.item(), evaluation_loss.item(), *digest(*maml.parameters())]
