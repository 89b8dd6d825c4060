"""Dataset distillation (Wang et al. 2018): points on which a new network learns a whole data set.

    python examples/distill_dataset.py

Twenty steps on ten learned points replace training on two thousand. The points get their exact
gradient through all steps, for several initialisations at once: each is a task with a start of its
own.
"""

import math

import torch
import torch.nn.functional as F

import fastmeta as fm


def moons(count):
    """Two interleaved half circles with noise: x ``[count, 2]``, y ``[count]``."""
    y = torch.randint(0, 2, (count,))
    angle = torch.rand(count) * math.pi
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 1, torch.tensor([1.0, 0.5]) - x, x)
    return x + 0.1 * torch.randn(count, 2), y


def starts(net, count):
    """Initialisations of a network ``[count, P]``."""
    rows = []
    for _ in range(count):
        for layer in net.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        rows.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return torch.stack(rows)


def main(iterations=200, tasks=8):
    torch.manual_seed(0)
    x, y = moons(2000)
    net = fm.models.MLP([2, 32, 2])
    points = torch.randn(10, 2, requires_grad=True)
    labels = torch.arange(10) % 2
    maml = fm.MAML(net, lr=0.5, steps=20)
    support_y, query = labels.expand(tasks, -1), (x.expand(tasks, -1, -1), y.expand(tasks, -1))

    def accuracy():
        adapted = maml.adapt_tasks(
            points.detach().expand(tasks, -1, -1), support_y, start=starts(net, tasks)
        )
        return (adapted(query[0]).argmax(-1) == query[1]).float().mean().item()

    before = accuracy()
    optimizer = torch.optim.Adam([points], 0.05)
    for iteration in range(iterations):
        part = torch.randint(len(x), (tasks, 100))
        loss, _ = maml.meta_loss(
            points.expand(tasks, -1, -1), support_y, x[part], y[part], start=starts(net, tasks)
        )
        (points.grad,) = torch.autograd.grad(loss, points)
        optimizer.step()
        if iteration % 50 == 0:
            print(f"iteration {iteration}: loss after 20 steps {loss.item():.3f}")
    after = accuracy()
    print(f"accuracy of new networks: {before:.3f} on random points, {after:.3f} on learned ones")
    if not after > before + 0.1:
        raise SystemExit("the points were not learned")
    F.cross_entropy(net(points), labels)  # ordinary points: any network takes them


if __name__ == "__main__":
    main()
