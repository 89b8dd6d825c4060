"""A script for learn2learn runs on fastmeta with its import line changed, and gives its numbers.

    python examples/learn2learn_maml.py

Sinusoid regression (Finn et al. 2017) as learn2learn's own example writes it: clone, adapt,
backward, one task at a time. At the end fastmeta computes the same meta-gradient without the loop.
"""

import copy

import torch
from torch import nn, optim

import fastmeta as fm
import fastmeta.compat.learn2learn as l2l  # was: import learn2learn as l2l


class SineModel(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.hidden1 = nn.Linear(1, dim)
        self.hidden2 = nn.Linear(dim, dim)
        self.hidden3 = nn.Linear(dim, 1)

    def forward(self, x):
        x = torch.relu(self.hidden1(x))
        x = torch.relu(self.hidden2(x))
        return self.hidden3(x)


def looped_loss(maml, batch, lossfn, adapt_steps):
    """The mean query loss of a batch of tasks after adaptation."""
    losses = []
    for x_support, y_support, x_query, y_query in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(adapt_steps):
            support_loss = lossfn(learner(x_support), y_support)
            learner.adapt(support_loss)
        losses.append(lossfn(learner(x_query), y_query))
    return torch.stack(losses).mean()


def main(shots=10, tasks_per_batch=16, iterations=100, adapt_lr=0.01, meta_lr=0.001, adapt_steps=5):
    torch.manual_seed(0)
    sinusoid = fm.data.Sinusoid()
    batches = fm.data.Episodes(sinusoid, 1, shots, shots, tasks_per_batch, seed=0)
    test = fm.data.Episodes(sinusoid, 1, shots, shots, 100, seed=1)[0]

    model = SineModel(dim=40)
    maml = l2l.algorithms.MAML(model, lr=adapt_lr, first_order=False, allow_unused=True)
    opt = optim.Adam(maml.parameters(), meta_lr)
    lossfn = nn.MSELoss(reduction="mean")

    before = looped_loss(maml, test, lossfn, adapt_steps).item()
    for iteration in range(iterations):
        meta_train_loss = looped_loss(maml, batches[iteration], lossfn, adapt_steps)
        opt.zero_grad()
        meta_train_loss.backward()
        opt.step()
        if iteration % 25 == 0:
            print(f"iteration {iteration}: meta-train loss {meta_train_loss.item():.3f}")
    after = looped_loss(maml, test, lossfn, adapt_steps).item()
    print(f"loss on new tasks: {before:.3f} before, {after:.3f} after meta-training")
    if not after < 0.9 * before:
        raise SystemExit("meta-training did not help")

    difference = difference_to_one_call(maml, batches[iterations], lossfn, adapt_steps)
    print(f"meta_loss of all {tasks_per_batch} tasks in one call: the gradient to {difference:.0e}")
    if difference > 1e-6:
        raise SystemExit("meta_loss and the loop disagree")


def difference_to_one_call(maml, batch, lossfn, adapt_steps):
    """Between the loop's meta-gradient and fastmeta's own, relative, in float64."""
    maml = copy.deepcopy(maml).double()
    batch = [tensor.double() for tensor in batch]
    params = list(maml.parameters())
    loss = looped_loss(maml, batch, lossfn, adapt_steps)
    looped = nn.utils.parameters_to_vector(torch.autograd.grad(loss, params))
    fast = fm.MAML(maml.module, lr=maml.lr, steps=adapt_steps, loss=lossfn)
    loss, _ = fast.meta_loss(*batch)
    at_once = nn.utils.parameters_to_vector(torch.autograd.grad(loss, params))
    return ((looped - at_once).norm() / looped.norm()).item()


if __name__ == "__main__":
    main()
