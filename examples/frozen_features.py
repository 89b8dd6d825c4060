"""Heads on the features of a small network: train it, freeze it, store features, score all heads.

    python examples/frozen_features.py
    python examples/frozen_features.py --data omniglot:PATH --minutes 5 --tasks 10000 --out omniglot

The network is the Conv4 of a ProtoNet. Its features are of characters that it was not trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import fastmeta as fm
from fastmeta.data import Features, from_spec
from fastmeta.training.config import TrainConfig
from fastmeta.training.files import write_atomically
from fastmeta.training.head_scores import score_heads
from fastmeta.training.loop import train
from fastmeta.training.run_folder import load_run

BATCH = 500  # images in one forward pass


def features_of(learner: fm.ProtoNet, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Features [M, D] of all evaluation images, and the names of their classes [M]."""
    source = from_spec(data, "evaluation")
    assert isinstance(source, fm.data.ClassImages)
    with torch.no_grad():
        parts = [learner(images / 255) for images in source.flat.float().split(BATCH)]
    return torch.cat(parts).numpy(), np.repeat(source.class_names, source.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="glyphs", help="glyphs, or omniglot:PATH")
    parser.add_argument("--minutes", type=float, default=0.1, help="of training")
    parser.add_argument("--tasks", type=int, default=200, help="of each score")
    parser.add_argument("--out", type=Path, default=Path("frozen"), help="folder")
    options = parser.parse_args()
    run = options.out / "run"
    config = TrainConfig(
        "protonet", data=options.data, out=str(run), iterations=10**6, time_limit=options.minutes,
        train_ways=20, queries=5,
    )  # fmt: skip
    result = train(config, overwrite=True)
    learner = load_run(run).learner.eval()
    assert isinstance(learner, fm.ProtoNet)
    x, y = features_of(learner, options.data)
    stored = options.out / "features.npz"
    write_atomically(stored, lambda file: np.savez(file, x=x, y=y))
    print(f"{result.iteration} iterations, then {len(x):,} features of {x.shape[1]} numbers")
    table = options.out / "heads.md"
    found = score_heads(Features.load(stored), queries=5, tasks=options.tasks, out=table)
    print(f"\n{found.table()}\n{table}")


if __name__ == "__main__":
    main()
