"""LoRA (Hu et al. 2022) as the parameters that a task adapts, on a frozen network.

    python examples/lora_adapt.py

A network is pretrained on the mean of many sinusoids and frozen. MAML then learns where two thin
matrices a layer start, so that three gradient steps on ten points turn it into one of them. PEFT
names its matrices `lora_A` and `lora_B`, which the same pattern selects.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm


class LoRA(nn.Module):
    """A frozen linear layer plus the product of two thin ones."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x):
        return self.base(x) + self.lora_up(self.lora_down(x))


def pretrained(batches, iterations=200):
    net = nn.Sequential(
        *(nn.Linear(1, 40), nn.ReLU()), *(nn.Linear(40, 40), nn.ReLU()), nn.Linear(40, 1)
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for iteration in range(iterations):
        episode = batches[iteration]
        F.mse_loss(net(episode.query_x), episode.query_y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def main(iterations=500):
    torch.manual_seed(0)
    sinusoid = fm.data.Sinusoid()
    batches = fm.data.Episodes(sinusoid, 1, 10, 10, tasks=25, seed=0)
    test = fm.data.Episodes(sinusoid, 1, 10, 10, tasks=200, seed=1)[0]
    net = pretrained(batches)
    base_loss = F.mse_loss(net(test.query_x), test.query_y).item()
    adapters = nn.Sequential(*(LoRA(m) if isinstance(m, nn.Linear) else m for m in net))
    maml = fm.MAML(adapters, lr=0.02, steps=3, loss=F.mse_loss, adapt="*lora_*", learn_lr=True)
    optimizer = torch.optim.Adam(maml.parameters(), 3e-3)
    for iteration in range(iterations):
        maml.meta_gradient(*batches[iteration]).assign_to(maml)
        optimizer.step()
    loss = maml.meta_gradient(*test).loss.item()
    total = sum(math.prod(p.shape) for p in net.parameters())
    print(maml.explain())
    print(f"{maml.layout.numel} numbers a task beside {total} frozen ones")
    print(f"loss on new tasks: {base_loss:.2f} pretrained, {loss:.2f} adapted")
    if not loss < 0.8 * base_loss:
        raise SystemExit("meta-training did not help")


if __name__ == "__main__":
    main()
