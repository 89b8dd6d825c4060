"""A test-time-training layer (Sun et al. 2024) inside a transformer block.

    python examples/ttt_transformer.py

The layer's memory is a small network. Each sequence adapts it to its own tokens, a chunk at a time:
a read of the queries, then one gradient step on keys and values. Training goes through the steps.
The task is to continue a sequence whose rule, a rotation of its own, only the sequence shows.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm


class TTTLayer(nn.Module):
    """Reads of a memory that takes a step on each chunk, ``[T, N, width]`` -> ``[T, N, width]``."""

    def __init__(self, width, chunk):
        super().__init__()
        self.chunk = chunk
        self.memory = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.key, self.value, self.query = (nn.Linear(width, width) for _ in range(3))
        self.rate = nn.Parameter(torch.tensor(0.0))  # of the step, before the softplus

    def forward(self, tokens):
        theta = torch.cat([p.flatten() for p in self.memory.parameters()]).expand(len(tokens), -1)
        projections = self.key(tokens), self.value(tokens), self.query(tokens)
        chunks = (projection.split(self.chunk, 1) for projection in projections)
        reads, rate = [], F.softplus(self.rate)
        for k, v, q in zip(*chunks, strict=True):
            reads.append(fm.task_call(self.memory, theta, q))  # before the chunk is learned
            theta = theta - rate * fm.task_gradient(self.memory, F.mse_loss, theta, k, v).grads
        return torch.cat(reads, 1)


class Block(nn.Module):
    """A transformer block with the layer in the place of attention."""

    def __init__(self, width=32, chunk=4):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mixer = TTTLayer(width, chunk)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def sequences(count, length=24):
    """Points on circles: each sequence turns by an angle of its own, ``[count, length + 1, 2]``."""
    angle, start = torch.rand(2, count, 1) * 2 * math.pi
    turns = start + angle * torch.arange(length + 1)
    return torch.stack([turns.cos(), turns.sin()], -1)


def main(iterations=150):
    torch.manual_seed(0)
    pair = nn.Linear(4, 32), nn.Linear(32, 2)  # a token: two points in a row
    net = nn.ModuleDict({"embed": pair[0], "block": Block(), "head": pair[1]})

    def loss_of(points):
        tokens = torch.cat([points[:, :-2], points[:, 1:-1]], -1)
        return F.mse_loss(net["head"](net["block"](net["embed"](tokens))), points[:, 2:])

    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    test = sequences(100)
    before = loss_of(test).item()
    for iteration in range(iterations):
        loss = loss_of(sequences(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 50 == 0:
            print(f"iteration {iteration}: loss {loss.item():.3f}")
    after = loss_of(test).item()
    print(f"loss on new sequences: {before:.3f} before, {after:.3f} after training")
    if not after < 0.3 * before:
        raise SystemExit("training did not help")


if __name__ == "__main__":
    main()
