"""CAVIA (Zintgraf et al. 2019): each task adapts five numbers that the network reads.

    python examples/cavia_sinusoid.py

Sinusoid regression. The inner loop moves the context; the outer loop learns the network, through
the inner steps. MAML moves all parameters of the same network.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm


class Cavia(nn.Module):
    """A network that reads its inputs beside a context, which every task starts from zero."""

    def __init__(self, context=5, hidden=40):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context))
        self.body = fm.models.MLP([1 + context, hidden, hidden, 1])

    def forward(self, x):
        return self.body(torch.cat([x, self.context.expand(x.shape[0], -1)], -1))


def meta_train(learner, batches, iterations):
    optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    for iteration in range(iterations):
        learner.meta_gradient(*batches[iteration]).assign_to(learner)
        optimizer.step()


def main(iterations=500):
    torch.manual_seed(0)
    sinusoid = fm.data.Sinusoid()
    batches = fm.data.Episodes(sinusoid, 1, 10, 10, tasks=25, seed=0)
    test = fm.data.Episodes(sinusoid, 1, 10, 10, tasks=200, seed=1)[0]
    learners = {
        "CAVIA": fm.MAML(Cavia(), lr=1.0, steps=2, loss=F.mse_loss, adapt="context"),
        "MAML": fm.MAML(Cavia(), lr=0.01, steps=2, loss=F.mse_loss),
    }
    for name, learner in learners.items():
        before = learner.meta_gradient(*test).loss.item()
        meta_train(learner, batches, iterations)
        after = learner.meta_gradient(*test).loss.item()
        size = learner.layout.numel
        print(f"{name}: {size} numbers a task, loss on new tasks {before:.2f} -> {after:.2f}")
        if not after < 0.8 * before:
            raise SystemExit(f"meta-training {name} did not help")


if __name__ == "__main__":
    main()
