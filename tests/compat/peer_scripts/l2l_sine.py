"""Sinusoid regression as in learn2learn's examples/maml_sine.py: the mean of many tasks' losses."""

import learn2learn as l2l
import torch
from torch import nn, optim

from tests.helpers.deterministic import digest, filled, wave


class SineModel(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.hidden1 = nn.Linear(1, dim)
        self.hidden2 = nn.Linear(dim, dim)
        self.hidden3 = nn.Linear(dim, 1)

    def forward(self, x):
        x = nn.functional.relu(self.hidden1(x))
        x = nn.functional.relu(self.hidden2(x))
        return self.hidden3(x)


model = filled(SineModel(dim=8))
maml = l2l.algorithms.MAML(model, lr=0.01, first_order=False, allow_unused=True)
opt = optim.Adam(maml.parameters(), 0.001)
lossfn = nn.MSELoss(reduction="mean")
RESULT = []

for iteration in range(4):
    meta_train_loss = 0.0
    for i in range(3):
        learner = maml.clone()
        inputs = 5 * wave(20, 1, start=i + iteration)
        targets = (i + 1) * torch.sin(inputs - i)
        x_support, y_support = inputs[::2], targets[::2]
        x_query, y_query = inputs[1::2], targets[1::2]
        for _ in range(5):
            support_preds = learner(x_support)
            support_loss = lossfn(support_preds, y_support)
            learner.adapt(support_loss)
        query_preds = learner(x_query)
        query_loss = lossfn(query_preds, y_query)
        meta_train_loss += query_loss
    meta_train_loss = meta_train_loss / 3
    RESULT.append(meta_train_loss.item())
    opt.zero_grad()
    meta_train_loss.backward()
    opt.step()

RESULT += digest(*maml.parameters())
