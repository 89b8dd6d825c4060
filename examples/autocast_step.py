"""Training in bfloat16: a compiled step under autocast, and its difference from float32.

    python examples/autocast_step.py

It runs on a GPU if the machine has one, and there also in float16 with a gradient scaler.
"""

import copy

import torch
from torch import nn

import fastmeta as fm

WAYS, STEPS = 5, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.bfloat16: 0.1, torch.float16: 0.02}  # of a loss, relative to float32


def network() -> nn.Module:
    torch.manual_seed(0)
    return fm.models.Conv4(hidden=8, ways=WAYS).to(DEVICE)


def losses(learner: nn.Module, dtype: torch.dtype | None) -> list[float]:
    """Losses of a few training steps: compiled with autocast inside, or eager in float32."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    options = {"num_classes": WAYS} if isinstance(learner, fm.ProtoNet) else {}

    def step(support_x, support_y, query_x, query_y):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            return learner.meta_loss(support_x, support_y, query_x, query_y, **options)[0]

    if dtype is not None:
        # Leave backend out for Inductor, which takes a C++ compiler and a while.
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    values = []
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = step(*EPISODES[i])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
    return values


GLYPHS = fm.data.Glyphs("test", examples=4)
EPISODES = fm.data.Episodes(GLYPHS, WAYS, shots=1, queries=3, tasks=4, seed=0, device=DEVICE)
LEARNERS = {
    "ProtoNet": fm.ProtoNet(fm.models.Conv4(hidden=8, ways=None).to(DEVICE), scale=0.1),
    "MAML": fm.MAML(network(), lr=0.1, steps=2),
}

for name, learner in LEARNERS.items():
    exact = losses(copy.deepcopy(learner), None)
    for dtype in [torch.bfloat16] + [torch.float16] * (DEVICE == "cuda"):
        values = losses(copy.deepcopy(learner), dtype)
        pairs = zip(values, exact, strict=True)
        error = max(abs(a - b) / abs(b) for a, b in pairs)
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{name} in {kind} on {DEVICE}: losses {', '.join(f'{x:.4f}' for x in values)}; "
            f"from float32 they differ by at most {error:.1%}"
        )
        if not 0 < error < BOUNDS[dtype]:
            raise SystemExit(f"{name}: expected a difference up to {BOUNDS[dtype]:.0%}")
