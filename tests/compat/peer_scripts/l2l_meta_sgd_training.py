"""Meta-SGD trained by an outer optimizer, several steps a task, tasks of a clone of a clone."""

import learn2learn as l2l
import torch
from learn2learn.algorithms import MetaSGD
from torch import nn

from tests.helpers.deterministic import digest, filled, wave

model = filled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
meta = MetaSGD(model, lr=0.1)
opt = torch.optim.Adam(meta.parameters(), lr=0.01)
loss = nn.CrossEntropyLoss()
RESULT = []

for iteration in range(4):
    opt.zero_grad()
    for t in range(2):
        x, y = wave(9, 4, start=iteration + t), torch.arange(9) % 3
        learner = meta.clone()
        for _ in range(2):
            learner.adapt(loss(learner(x), y))
        again = learner.clone()
        again.adapt(loss(again(x), y), first_order=True)
        error = loss(again(-x), y)
        error.backward()
        RESULT += [error.item(), l2l.utils.accuracy(again(x), y).item()]
    opt.step()

RESULT += digest(*meta.parameters())
