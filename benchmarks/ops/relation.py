"""A relation network's step by `RelationModule.pairs`, beside the concatenation of all pairs.

    python -m benchmarks.ops.relation [--rounds 7] [--threads 1]

Forward and backward on one Omniglot task at the paper's sizes. "concatenated" is what users write:
every pair of maps through the whole module. "split" halves the first convolution only, and builds
all pairs ahead of the batch norm. The relation module by itself, and a whole step with the encoder.
All take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.models.relation import concatenated_scores
from fastmeta.training.timing import interleave

SETTINGS = {"5-way 1-shot, 95 queries": (5, 19), "20-way 1-shot, 200 queries": (20, 10)}


class Concatenated(nn.Module):
    """A relation module that has no ``pairs``."""

    def __init__(self, module: fm.models.RelationModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def split(module: fm.models.RelationModule, x: Tensor, y: Tensor) -> Tensor:
    """Scores from the halves of the first convolution; all pairs take the rest."""
    convolution, *rest = module.first
    of_support, of_query = convolution.weight.chunk(2, dim=1)
    a = F.conv2d(x.flatten(0, 1), of_query, None, padding=convolution.padding)
    b = F.conv2d(y.flatten(0, 1), of_support, convolution.bias, padding=convolution.padding)
    pairs = a.unflatten(0, x.shape[:2]).unsqueeze(2) + b.unflatten(0, y.shape[:2]).unsqueeze(1)
    z = nn.Sequential(*rest)(pairs.flatten(0, 2))
    return module.head(module.second(z)).view(pairs.shape[:3])


def of_module(ways: int, queries: int) -> dict[str, Callable[[], object]]:
    """Calls on feature maps that need a gradient."""
    module = fm.models.RelationModule()
    x, y = (torch.randn(1, n, 64, 5, 5, requires_grad=True) for n in (ways * queries, ways))
    forms = {
        "concatenated": lambda: concatenated_scores(module, x, y),
        "split": lambda: split(module, x, y),
        "pairs": lambda: module.pairs(x, y),
    }
    return {
        name: lambda form=form: form().sigmoid().mean().backward() for name, form in forms.items()
    }


def of_step(ways: int, queries: int) -> dict[str, Callable[[], object]]:
    """Calls of a learner's meta-loss and its gradient."""
    learner = fm.RelationNet(fm.models.RelationEncoder())
    twin = copy.deepcopy(learner)
    twin.relation = Concatenated(twin.relation)
    labels = torch.arange(ways).unsqueeze(0)
    images = (torch.randn(1, n, 1, 28, 28) for n in (ways, ways * queries))
    support_x, query_x = images
    batch = support_x, labels, query_x, labels.repeat(1, queries)
    return {
        "concatenated": lambda: twin.meta_loss(*batch)[0].backward(),
        "pairs": lambda: learner.meta_loss(*batch)[0].backward(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.relation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("| | concatenated / ms | split / ms | pairs / ms | pairs beside concatenated |")
    print("| --- | --- | --- | --- | --- |")
    for setting, sizes in SETTINGS.items():
        for what, calls in (("relation module", of_module), ("whole step", of_step)):
            taken = interleave(calls(*sizes), options.rounds)
            times = {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
            cells = [
                f"{times[n]:.1f}" if n in times else "-" for n in ("concatenated", "split", "pairs")
            ]
            ratio = times["concatenated"] / times["pairs"]
            print(f"| {setting}, {what} | {' | '.join(cells)} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
