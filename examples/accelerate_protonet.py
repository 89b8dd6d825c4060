"""A ProtoNet trained by Hugging Face Accelerate, on one device or on many.

    python examples/accelerate_protonet.py
    accelerate launch --num_processes 2 --cpu examples/accelerate_protonet.py

Needs ``pip install accelerate``. Accelerate gets the encoder, which is what it may wrap for several
processes or for mixed precision; the learner is built on what comes back.
"""

from __future__ import annotations

import sys

import torch

import fastmeta as fm

try:
    from accelerate import Accelerator
except ImportError:
    print("accelerate is missing: pip install accelerate", file=sys.stderr)
    sys.exit(77)

TASKS, STEPS = 4, 40


def accuracy(learner: fm.ProtoNet, episode: fm.data.Episode) -> float:
    learner.eval()
    with torch.no_grad():
        logits = learner.adapt_tasks(episode.support_x, episode.support_y)(episode.query_x)
    learner.train()
    return (logits.argmax(-1) == episode.query_y).float().mean().item()


def main() -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    # In several processes the norms go by the tasks of all of them, as they do in one.
    encoder = fm.distributed.share_batch_statistics(fm.models.Conv4(hidden=16, ways=None))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    encoder, optimizer = accelerator.prepare(encoder, optimizer)
    learner = fm.ProtoNet(encoder)

    training, held_out = (
        fm.data.Episodes(source, 5, 1, 5, tasks, device=accelerator.device)
        for source, tasks in ((fm.data.Glyphs("validation"), TASKS), (fm.data.Glyphs("test"), 50))
    )
    before = accuracy(learner, held_out[0])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = learner.meta_loss(*fm.distributed.split_tasks(training[step]))
        accelerator.backward(fm.distributed.task_weight(TASKS) * loss)
        optimizer.step()
        if step % 10 == 0:
            accelerator.print(f"step {step:2}: loss {loss.item():.3f}")
    after = accuracy(learner, held_out[0])
    accelerator.print(f"5-way 1-shot accuracy on new characters: {before:.1%}, then {after:.1%}")
    if not after > before:
        raise SystemExit("the ProtoNet has not learnt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
