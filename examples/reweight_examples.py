"""Learning to reweight examples (Ren et al. 2018), where most labels of one class are wrong.

    python examples/reweight_examples.py

At each step of the training, one inner step with weights of zero shows which examples would lower
the loss on a few clean ones: the gradient to the weights is exact, also at zero.
"""

import torch
import torch.nn.functional as F

import fastmeta as fm


def draw(count, wrong=0.0):
    """Two classes of points in 10 dimensions, and whether each label is right."""
    y = torch.randint(0, 2, (count,))
    x = torch.randn(count, 10) + 0.8 * (2 * y[:, None] - 1)
    right = torch.rand(count) >= wrong
    # One class is hidden under labels of the other.
    return x, torch.where(right, y, torch.zeros_like(y)), right | (y == 0)


def weights(net, noisy, clean):
    """The weight of each noisy example ``[1, B]``."""
    one_step = fm.MAML(net, lr=0.1, normalize_weights=False)
    weight = torch.zeros(noisy[0].shape[:2], requires_grad=True)
    loss, _ = one_step.meta_loss(*noisy, *clean, support_weight=weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    weight = (-gradient).clamp(min=0)
    return weight / weight.sum().clamp(min=1e-12)


def train(reweighted, iterations=200):
    torch.manual_seed(0)
    (x, y, right), (clean_x, clean_y, _), (test_x, test_y, _) = (
        draw(1000, 0.8),
        draw(20),
        draw(2000),
    )
    net = fm.models.MLP([10, 32, 2])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    kept = []
    for _ in range(iterations):
        part = torch.randint(len(x), (100,))
        noisy = x[None, part], y[None, part]
        weight = torch.full((1, 100), 0.01)
        if reweighted:
            weight = weights(net, noisy, (clean_x[None], clean_y[None]))
            kept.append(weight[0, right[part]].sum().item())
        each = F.cross_entropy(net(noisy[0][0]), noisy[1][0], reduction="none")
        optimizer.zero_grad()
        (weight[0] * each).sum().backward()
        optimizer.step()
    if reweighted:
        print(f"weight on right labels: {sum(kept) / len(kept):.2f}")
    return (net(test_x).argmax(1) == test_y).float().mean().item()


def main():
    plain, reweighted = train(False), train(True)
    print(f"accuracy: {plain:.3f} with equal weights, {reweighted:.3f} with learned ones")
    if not reweighted > plain + 0.05:
        raise SystemExit("learned weights did not help")


if __name__ == "__main__":
    main()
