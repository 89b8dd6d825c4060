"""A script for higher runs on fastmeta with its import line changed.

    python examples/higher_innerloop.py

Five-way one-shot classification of characters (fm.data.Glyphs) with a network of 784, 64 and 5
units: the inner loop as higher's documentation writes it, with inner step sizes that are learned,
one for each parameter group.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
import fastmeta.compat.higher as higher  # was: import higher


def query_loss(net, inner_opt, task, step_sizes, steps=3, track=True):
    """The loss of one task's queries after inner steps on its support, and their accuracy."""
    x_spt, y_spt, x_qry, y_qry = task
    with higher.innerloop_ctx(
        net,
        inner_opt,
        copy_initial_weights=False,
        override={"lr": step_sizes},
        track_higher_grads=track,
    ) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fnet(x_spt), y_spt))
        logits = fnet(x_qry)
    accuracy = (logits.argmax(1) == y_qry).float().mean()
    return F.cross_entropy(logits, y_qry), accuracy


def accuracy_on(test, net, inner_opt, step_sizes):
    tasks = list(zip(*test, strict=True))
    return sum(
        query_loss(net, inner_opt, t, step_sizes, track=False)[1].item() for t in tasks
    ) / len(tasks)


def main(iterations=60, tasks=8):
    torch.manual_seed(0)
    train = fm.data.Episodes(fm.data.Glyphs("train"), ways=5, shots=1, queries=5, tasks=tasks)
    test = fm.data.Episodes(fm.data.Glyphs("test"), ways=5, shots=1, queries=5, tasks=100)[0]

    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 5))
    groups = [{"params": net[1].parameters()}, {"params": net[3].parameters()}]
    inner_opt = torch.optim.SGD(groups, lr=0.1)
    step_sizes = [torch.tensor(0.1, requires_grad=True) for _ in groups]
    meta_opt = torch.optim.Adam([*net.parameters(), *step_sizes], lr=2e-3)

    before = accuracy_on(test, net, inner_opt, step_sizes)
    for iteration in range(iterations):
        meta_opt.zero_grad()
        total = 0.0
        for task in zip(*train[iteration], strict=True):
            loss, _ = query_loss(net, inner_opt, task, step_sizes)
            (loss / tasks).backward()
            total += loss.item() / tasks
        meta_opt.step()
        if iteration % 20 == 0:
            print(f"iteration {iteration}: query loss {total:.3f}")
    after = accuracy_on(test, net, inner_opt, step_sizes)
    learned = ", ".join(f"{step_size.item():.3f}" for step_size in step_sizes)
    print(f"accuracy on new characters: {before:.1%} before, {after:.1%} after meta-training")
    print(f"inner step sizes, 0.1 at first: {learned}")
    if not after > before + 0.05:
        raise SystemExit("meta-training did not help")


if __name__ == "__main__":
    main()
