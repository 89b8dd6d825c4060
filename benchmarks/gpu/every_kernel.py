"""Every CUDA kernel on small inputs, forward and derivative, compared with the CPU's.

    python -m benchmarks.gpu.every_kernel [--profile]

compute-sanitizer watches this program. Inputs are copied from the host and the ops are called
directly, so that no kernel of PyTorch runs: an error is then fastmeta's. Copying a result back
makes initcheck look at every entry of it. `--profile` fails if a kernel of csrc/ was not launched.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import fastmeta as fm
from benchmarks.common.agreement import TOLERANCE, relative_error
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.outcomes import NOT_AVAILABLE
from fastmeta.core.backend import CONVOLUTION, KERNELS, WIDE_DTYPES
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.engines.program.lowering import Lowering

METRICS = ("euclidean", "cosine")  # differences with a root, and products with norms
# T, Q, N, D: odd sizes; one tile of prototypes, in whole accesses; large tiles; a split sum.
PAIRS = ((2, 7, 65, 17), (1, 20, 3, 32), (256, 3, 65, 5), (1, 1100, 65, 8))
UPDATES = ((3, 1023), (2, 64))  # T, P: single values, and whole accesses
SUPPORTS = ((2, 40, 5, 33), (2, 40, 5, 64))  # T, S, N, D, likewise
HEADS = (("cross_entropy", 5), ("mse", 5), ("logistic", 1))  # losses and ways
# T, B, C, O, H, W, groups, of 3 x 3 kernels: large tiles, narrow ones, small ones and split sums;
# a small number of channels; depthwise.
CONVOLUTIONS = (
    *((33, 2, 8, 70, 9, 8, 1), (66, 2, 12, 20, 9, 8, 1), (2, 3, 6, 7, 6, 7, 1)),
    *((2, 3, 3, 5, 6, 7, 1), (2, 3, 5, 10, 6, 7, 5)),
)
NORMS = ((2, 3, 5, 99), (1, 70, 3, 1))  # T, B, C, P
# A network, the shape of its examples, and the scale of its parameters: one that a block has in its
# shared memory, one too large for that, and one of images.
NETWORKS = (
    (lambda: fm.models.MLP([3, 8, 2]), (3,), 0.35),
    (lambda: fm.models.MLP([40, 300, 300, 3]), (40,), 0.06),
    (lambda: fm.models.Conv4(3, 3, 1, 16), (1, 16, 16), 0.3),
)

Call = tuple[str, tuple[Any, ...]]  # an op of torch.ops.fastmeta and its arguments


@dataclass
class Draws:
    """Reproducible inputs of one dtype, in memory of the host."""

    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(dtype or self.dtype)

    def labels(self, classes: int, *shape: int) -> torch.Tensor:
        return torch.randint(classes, shape, generator=self.generator)

    def images(self, t: int, b: int, c: int, h: int, w: int) -> torch.Tensor:
        return self.rows(t, b, h, w, c).permute(0, 1, 4, 2, 3)  # as the kernels read them


def calls(dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Arguments of every op that `device` has, in memory of the host."""
    draw = Draws(dtype)
    yield from metric_calls(draw)
    yield from head_calls(draw)
    yield from layer_calls(draw, device)
    yield from program_calls(draw)


def metric_calls(draw: Draws) -> Iterator[Call]:
    """Inner updates, prototypes, distances and their losses."""
    for t, p in UPDATES:
        for lr in ((1, 1), (t, 1), (1, p), (t, p)):
            for op in ("inner_update", "inner_update_backward"):
                yield op, (draw.rows(t, p), draw.rows(t, p), draw.rows(*lr, dtype=draw.wide))
    for t, s, n, d in SUPPORTS:
        yield "prototypes", (draw.rows(t, s, d), draw.labels(n, t, s), n)
        yield "prototypes_backward", (draw.rows(t, n, d), draw.labels(n, t, s))
    for t, q, n, d in PAIRS:
        for metric in METRICS:
            x, y, target = draw.rows(t, q, d), draw.rows(t, n, d), draw.labels(n, t, q)
            yield "pairwise_distance", (x, y, metric)
            yield "pairwise_distance_backward", (draw.rows(t, q, n), x, y, metric)
            yield "prototype_loss", (x, target, y, metric, 0.5)
            weight = draw.rows(t, q, dtype=draw.wide)
            yield "prototype_loss_backward", (weight, x, target, y, metric, 0.5)


def head_calls(draw: Draws) -> Iterator[Call]:
    """Linear heads with every loss, in both forms."""
    for loss, n in HEADS:
        for dual in (False, True):
            t, s, d, steps = 2, 7, 33, 3
            targets = draw.rows(t, s, n) if loss == "mse" else draw.labels(max(2, n), t, s)
            head = draw.rows(t, s, d), targets, draw.rows(t, n, d), draw.rows(t, n)
            options = (draw.rows(t, steps, dtype=draw.wide).abs() / 100, loss, 0.1, dual)
            yield "linear_head", (*head, *options)
            *adapted, predictions, products = torch.ops.fastmeta.linear_head(*head, *options)
            lr, *rest = options
            kept = lr, predictions, products
            yield "linear_head_backward", (*adapted, *head, *kept, *rest, False, True)


def layer_calls(draw: Draws, device: str) -> Iterator[Call]:
    """Convolutions and batch norms with weights of each task."""
    has_convolution = draw.dtype in KERNELS.get((CONVOLUTION, device), ())
    for t, b, c, o, h, w, groups in CONVOLUTIONS if has_convolution else ():
        x, weight = draw.images(t, b, c, h, w), draw.rows(t, o, c // groups, 3, 3)
        z = draw.images(t, b, o, h, w)
        options = ([1, 1], [1, 1], [1, 1], groups)
        yield "task_conv2d", (x, weight, draw.rows(t, o), *options)
        yield "task_conv2d_input", (z, weight, [h, w], *options)
        yield "task_conv2d_weight", (z, x, [3, 3], *options)
    for t, b, c, p in NORMS if draw.dtype in WIDE_DTYPES else ():
        v, g, x = draw.rows(t, b, c, p), draw.rows(t, b, c, p), draw.rows(t, b, c, p)
        weight, bias = draw.rows(t, c), draw.rows(t, c)
        yield "task_batch_norm", (x, weight, bias, 1e-5)
        yield "task_batch_norm_backward", (g, x, weight, 1e-5)
        yield "task_batch_norm_backward_backward", (v, bias, weight, g, x, weight, 1e-5)


def program_calls(draw: Draws) -> Iterator[Call]:
    """Meta-gradients of the task programs of every network."""
    for make, shape, scale in NETWORKS if draw.dtype in WIDE_DTYPES else ():
        program = Lowering(make(), F.mse_loss).program(shape)
        theta = draw.rows(program.layout.numel) * scale
        lr, examples = (
            torch.full((1, 1, 1), 0.1, dtype=draw.dtype),
            (draw.rows(2, 5, *shape), draw.rows(2, 5, *program.output_shape)),
        )
        options = ([], 1, *(False, True, True, True, True, True))
        yield (
            "task_program_meta_gradient",
            (
                *(program.code, theta, theta.new_empty(0), lr, *examples, *examples),
                *options,
            ),
        )


def results(op: str, arguments: tuple[Any, ...], device: str) -> list[torch.Tensor]:
    stays = 1 if op.startswith("task_program") else 0  # a program's code
    moved = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments[stays:])
    out = getattr(torch.ops.fastmeta, op)(*arguments[:stays], *moved)
    return [x.cpu() for x in ([out] if isinstance(out, torch.Tensor) else out)]


def run(device: str, report: Callable[[str], None] = print) -> int:
    """Call every op; returns how many results differ from the CPU's."""
    wrong = count = 0
    for dtype, tolerance in TOLERANCE.items():
        for op, arguments in calls(dtype, device):
            count += 1
            on_cpu = results(op, arguments, "cpu")
            for actual, e in zip(results(op, arguments, device), on_cpu, strict=True):
                error = relative_error(actual, e)
                if not error <= tolerance:
                    shapes = [list(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
                    report(f"{op} {dtype} {shapes}: error {error:.1e}, at most {tolerance:.0e}")
                    wrong += 1
    report(f"{count} calls on {device}, {wrong} wrong results")
    return wrong


def kernels_of_sources() -> set[str]:
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.cu*")))
    return set(re.findall(r"__global__[^{;]*?(\w+_kernel)\(", text))


def profiled(device: str) -> int:
    """Run under the profiler and compare the kernels that it saw with the kernels of csrc/."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wrong = run(device)
    seen = " ".join(event.key for event in profile.key_averages())
    expected = kernels_of_sources()
    launched = {name for name in expected if re.search(rf"\b{name}\b", seen)}
    if not launched:
        print("the profiler recorded no kernel")
        return 1 if wrong else NOT_AVAILABLE
    if missing := sorted(expected - launched):
        print(f"not launched: {', '.join(missing)}")
        return 1
    print(f"{len(launched)} kernels of csrc/ were launched, {wrong} results were wrong")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if not fm.build_info()["native"]:
        sys.exit(f"fastmeta: {fm.build_info()['reason']}")
    if options.profile:
        return profiled(options.device)
    return 1 if run(options.device) else 0


if __name__ == "__main__":
    sys.exit(main())
