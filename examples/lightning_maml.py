"""Any learner in Lightning: MAML on sinusoids, and then a ProtoNet on glyphs, by the same module.

    python examples/lightning_maml.py

Needs ``pip install lightning``. An endless ``fm.data.Episodes`` is the data loader. With
``L.Trainer(strategy="ddp", devices=N)`` every process takes its share of the tasks.
"""

from __future__ import annotations

import logging
import sys
import warnings

import torch
from torch.utils.data import DataLoader

import fastmeta as fm

try:
    import lightning as L
except ImportError:
    print("lightning is missing: pip install lightning", file=sys.stderr)
    sys.exit(77)


class MetaLearning(L.LightningModule):
    """Meta-trains a learner: the batches are episodes, and the outer loop is Adam."""

    def __init__(self, learner: fm.MAML | fm.ANIL | fm.ProtoNet, lr: float) -> None:
        super().__init__()
        self.learner = learner
        self.lr = lr

    def training_step(self, episode: fm.data.Episode, _: int) -> torch.Tensor:
        weight = fm.distributed.task_weight(len(episode.support_x))
        loss, _ = self.learner.meta_loss(*fm.distributed.split_tasks(episode))
        return weight * loss

    def validation_step(self, episode: fm.data.Episode, _: int) -> None:
        adapted = self.learner.adapt_tasks(episode.support_x, episode.support_y)
        outputs = adapted(episode.query_x)
        if episode.query_y.is_floating_point():
            self.log("mse", (outputs - episode.query_y).square().mean())
        else:
            self.log("accuracy", (outputs.argmax(-1) == episode.query_y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.learner.parameters(), lr=self.lr)


def scores(module: MetaLearning, episodes: fm.data.Episodes, steps: int) -> tuple[float, float]:
    """The validation's score before and after meta-training."""
    held_out = DataLoader([episodes[2**62 + i] for i in range(5)], batch_size=None)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        inference_mode=False,  # adaptation takes gradients
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    results = []
    for fit in (False, True):
        if fit:
            trainer.fit(module, episodes)
        (score,) = trainer.validate(module, held_out, verbose=False)[0].values()
        results.append(score)
    return results[0], results[1]


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    mlp = fm.models.MLP([1, 40, 40, 1])
    maml = fm.MAML(mlp, lr=0.01, steps=1, loss=torch.nn.functional.mse_loss)
    waves = fm.data.Episodes(fm.data.Sinusoid(), ways=1, shots=10, queries=10, tasks=25)
    before, after = scores(MetaLearning(maml, lr=1e-3), waves, steps=300)
    print(f"MAML on sinusoids: MSE {before:.2f} before, {after:.2f} after meta-training")
    if not after < 0.9 * before:
        raise SystemExit("MAML has not learnt")

    proto = fm.ProtoNet(fm.models.Conv4(hidden=16, ways=None))
    source = fm.data.Glyphs("validation")
    glyphs = fm.data.Episodes(source, ways=5, shots=1, queries=5, tasks=4)
    before, after = scores(MetaLearning(proto, lr=1e-2), glyphs, steps=30)
    print(f"ProtoNet on glyphs: accuracy {before:.1%} before, {after:.1%} after meta-training")
    if not after > before:
        raise SystemExit("the ProtoNet has not learnt")


if __name__ == "__main__":
    main()
