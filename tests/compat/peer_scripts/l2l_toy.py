"""As learn2learn's examples/maml_toy.py: a module without inputs gives a distribution."""

import learn2learn as l2l
import torch as th
from torch import distributions as dist
from torch import nn, optim

from tests.helpers.deterministic import digest, wave

DIM = 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(wave(DIM))
        self.sigma = nn.Parameter(th.abs(wave(DIM, start=1)) + 0.1)

    def forward(self, x=None):
        return dist.Normal(self.mu, self.sigma)


model = Model()
maml = l2l.algorithms.MAML(model, lr=1e-2)
opt = optim.Adam(maml.parameters())
RESULT = []

for i in range(5):
    step_loss = 0.0
    for t in range(4):
        mu_i, sigma_i = wave(DIM, start=i + t), wave(DIM, start=i - t)

        learner = maml.clone()
        proposal = learner()
        loss = (mu_i - proposal.mean).pow(2).sum() + (sigma_i - proposal.variance).pow(2).sum()
        learner.adapt(loss)

        proposal = learner()
        adapt_loss = (mu_i - proposal.mean).pow(2).sum() + (sigma_i - proposal.variance).pow(
            2
        ).sum()
        step_loss += adapt_loss
    step_loss = step_loss / 4
    RESULT.append(step_loss.item())
    opt.zero_grad()
    step_loss.backward()
    opt.step()

RESULT += digest(model.mu, model.sigma)
