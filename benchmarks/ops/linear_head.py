"""The linear head's two forms: forward and backward of `fm.linear_head`, float32.

    python -m benchmarks.ops.linear_head [--rounds 30] [--threads 2]

32 tasks of 5 ways. One line a size: the times of each form, and which one `form="auto"` takes.
They take turns. Freed memory is kept, as in `python -m fastmeta train`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

import fastmeta as fm
from fastmeta.ops._linear_head_arguments import checked_head
from fastmeta.ops.linear_head import uses_kernel_form
from fastmeta.training.allocator import keep_freed_memory
from fastmeta.training.timing import interleave

TASKS, WAYS = 32, 5
FORMS = ("primal", "dual")
# S, D, K.
SIZES = (
    *((25, 1600, steps) for steps in (1, 5, 50)),
    *((5, features, 5) for features in (64, 640, 1600)),
    *((25, 64, steps) for steps in (1, 5, 20)),
    *((25, 640, steps) for steps in (1, 5)),
    *((100, 640, steps) for steps in (1, 5, 20)),
)


def _inputs(support: int, features: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TASKS, support, features, generator=generator)
    labels = torch.randint(WAYS, (TASKS, support), generator=generator)
    weight, bias = torch.zeros(WAYS, features), torch.zeros(WAYS)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    return x, labels, weight, bias


def passes(support: int, features: int, steps: int) -> dict[str, Callable[[], object]]:
    """Forward and backward in each form."""
    x, labels, weight, bias = _inputs(support, features)
    upstream = torch.randn(TASKS, WAYS, features, generator=torch.Generator().manual_seed(1))

    def forward_and_backward(form: str) -> object:
        adapted, _ = fm.linear_head(x, labels, weight, bias, lr=0.1, steps=steps, form=form)
        return torch.autograd.grad(adapted, (x, weight, bias), upstream)

    return {form: lambda form=form: forward_and_backward(form) for form in FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.linear_head", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print("   S     D   K    primal      dual   auto")
    for size in SIZES:
        seconds = interleave(passes(*size), options.rounds)
        times = "".join(f"{1e3 * statistics.median(seconds[form]):7.2f} ms" for form in FORMS)
        support, features, steps = size
        head = checked_head(*_inputs(support, features), "cross_entropy")
        chosen = FORMS[uses_kernel_form("auto", head, steps)]
        print(f"{support:4}{features:6}{steps:4}{times}   {chosen}")


if __name__ == "__main__":
    main()
