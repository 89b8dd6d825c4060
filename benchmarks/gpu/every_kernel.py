"""Every CUDA kernel on small inputs, forward and derivative, compared with the CPU's.

    python -m benchmarks.gpu.every_kernel [--profile]

compute-sanitizer watches this program. Inputs are copied from the host and the ops are called
directly, so that no kernel of PyTorch runs: an error is then fastmeta's. Copying a result back
makes initcheck look at every entry of it. float32 comes twice: IEEE, and rounded to TF32 where
convolutions and task programs may. `--profile` fails if a kernel of csrc/, or one of kernels.txt by
its full name, was not launched.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from benchmarks.common.agreement import TF32_TOLERANCE, TOLERANCE, relative_error
from benchmarks.gpu import kernel_list
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.outcomes import NOT_AVAILABLE
from benchmarks.gpu.precision import convolutions, float32_products
from fastmeta.core.backend import CONVOLUTION, KERNELS, WIDE_DTYPES
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.engines.program.lowering import Lowering
from fastmeta.ops.activation import KINDS
from fastmeta.ops.pair_scores import ACTIVATIONS
from tools.cuda_check import readable

METRICS = ("euclidean", "cosine")  # differences with a root, and products with norms
# T, Q, N, D: odd sizes; one tile of prototypes, in whole accesses; large tiles; a split sum.
PAIRS = ((2, 7, 65, 17), (1, 20, 3, 32), (256, 3, 65, 5), (1, 1100, 65, 8))
UPDATES = ((3, 1023), (2, 64))  # T, P: single values, and whole accesses
SUPPORTS = ((2, 40, 5, 33), (2, 40, 5, 64))  # T, S, N, D, likewise
HEADS = (("cross_entropy", 5), ("mse", 5), ("logistic", 1))  # losses and ways
# T, B, C, O, H, W, groups, of 3 x 3 kernels: large tiles, large ones of the gradient of images,
# narrow ones, small ones and split sums; a small number of channels; depthwise.
CONVOLUTIONS = (
    *((33, 2, 8, 70, 9, 8, 1), (66, 2, 36, 8, 9, 8, 1), (66, 2, 12, 20, 9, 8, 1)),
    *((2, 3, 6, 7, 6, 7, 1), (2, 3, 3, 5, 6, 7, 1), (2, 3, 5, 10, 6, 7, 5)),
)
NORMS = ((2, 3, 5, 99), (1, 70, 3, 1))  # T, B, C, P


@dataclass(frozen=True)
class Net:
    """A network, the shape of its examples, the scale of its parameters, and sizes of a call.

    A smooth one has no ReLU and no maximum, whose gradients jump where TF32 rounds across 0.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    scale: float
    smooth: bool = False
    loss: Callable[..., torch.Tensor] = F.mse_loss
    tasks: int = 2
    examples: int = 5
    steps: int = 1


def large_products() -> nn.Module:
    """All of 64 x 128 at least, and long; with 66 tasks they fill the multiprocessors."""
    return nn.Sequential(nn.Linear(96, 256), nn.Tanh(), nn.Linear(256, 3))


def normed_examples() -> nn.Module:
    return nn.Sequential(nn.Linear(400, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 3))


def smooth_images() -> nn.Module:
    first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(2)
    second = nn.Conv2d(8, 8, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(8 * 4 * 4, 3)
    return nn.Sequential(*first, *second)


def layers_of_images() -> nn.Module:
    """Those that Conv4 has not: norms without a pool, depthwise convolutions, both pools."""
    first = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.Tanh()
    last = nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 6, 3), nn.LeakyReLU(0.1), nn.AvgPool2d(2, 1)
    return nn.Sequential(*first, *depthwise, *last, nn.Flatten(), nn.Linear(6 * 2 * 2, 3))


# Two that a block has in its shared memory, the second with a long list of steps; some too large
# for that; and networks of images.
NETWORKS = (
    Net(lambda: fm.models.MLP([3, 8, 2]), (3,), 0.35),
    Net(lambda: fm.models.MLP([3, 8, 8, 2]), (3,), 0.35, steps=5),
    Net(lambda: fm.models.MLP([40, 300, 300, 3]), (40,), 0.06),
    Net(large_products, (96,), 0.1, smooth=True, tasks=66, examples=64),
    Net(normed_examples, (400,), 0.1, smooth=True, loss=F.cross_entropy, examples=20),
    Net(lambda: fm.models.Conv4(3, 3, 1, 16), (1, 16, 16), 0.3),
    Net(layers_of_images, (2, 9, 9), 0.3, loss=F.cross_entropy),
    Net(smooth_images, (3, 8, 8), 0.3, smooth=True, loss=F.cross_entropy),
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


@dataclass(frozen=True)
class Inputs:
    """Calls in one precision, and how far a result may be from the CPU's, which has no TF32."""

    dtype: torch.dtype
    tolerance: float
    tf32: bool = False

    def __str__(self) -> str:
        return "TF32" if self.tf32 else str(self.dtype)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        with convolutions(self.tf32), float32_products("high" if self.tf32 else "highest"):
            yield

    def calls(self, device: str) -> Iterator[Call]:
        """Arguments of every op that `device` has in this precision, in memory of the host."""
        draw = Draws(self.dtype)
        if not self.tf32:
            yield from metric_calls(draw)
            yield from head_calls(draw)
            yield from norm_calls(draw)
            yield from ridge_calls(draw)
            yield from activation_calls(draw)
            yield from pair_calls(draw)
        yield from convolution_calls(draw, device)
        yield from program_calls(draw, only_smooth=self.tf32)


ALL_INPUTS = (
    *(Inputs(dtype, tolerance) for dtype, tolerance in TOLERANCE.items()),
    Inputs(torch.float32, TF32_TOLERANCE, tf32=True),
)


def metric_calls(draw: Draws) -> Iterator[Call]:
    """Inner updates, prototypes, distances and losses over them."""
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
            present = draw.labels(4, t, n) > 0
            present[:, :2] = True  # an infinite distance has no relative error
            yield "nearest", (x, y, present, 2, metric)
            yield "prototype_loss", (x, target, y, metric, 0.5)
            weight = draw.rows(t, q, dtype=draw.wide)
            yield "prototype_loss_backward", (weight, x, target, y, metric, 0.5)
            of_support = torch.arange(n).remainder(2).repeat(t, 1)
            rows = (x, draw.labels(min(2, n), t, q), y, of_support, metric, 0.5, False)
            yield "matching_loss", rows
            yield "matching_loss_backward", (weight, *rows)


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


def convolution_calls(draw: Draws, device: str) -> Iterator[Call]:
    """Convolutions with weights of each task."""
    has_convolution = draw.dtype in KERNELS.get((CONVOLUTION, device), ())
    for t, b, c, o, h, w, groups in CONVOLUTIONS if has_convolution else ():
        x, weight = draw.images(t, b, c, h, w), draw.rows(t, o, c // groups, 3, 3)
        z = draw.images(t, b, o, h, w)
        options = ([1, 1], [1, 1], [1, 1], groups)
        yield "task_conv2d", (x, weight, draw.rows(t, o), *options)
        yield "task_conv2d_input", (z, weight, [h, w], *options)
        yield "task_conv2d_weight", (z, x, [3, 3], *options)


def norm_calls(draw: Draws) -> Iterator[Call]:
    """Batch norms with weights of each task."""
    for t, b, c, p in NORMS if draw.dtype in WIDE_DTYPES else ():
        v, g, x = draw.rows(t, b, c, p), draw.rows(t, b, c, p), draw.rows(t, b, c, p)
        weight, bias = draw.rows(t, c), draw.rows(t, c)
        yield "task_batch_norm", (x, weight, bias, 1e-5)
        yield "task_batch_norm_backward", (g, x, weight, 1e-5)
        yield "task_batch_norm_backward_backward", (v, bias, weight, g, x, weight, 1e-5)


def ridge_calls(draw: Draws) -> Iterator[Call]:
    """Ridge regression in both forms."""
    for dual in (False, True) if draw.dtype in WIDE_DTYPES else ():
        t, s, n, d = 2, 9, 5, 33
        x, y = draw.rows(t, s, d), draw.rows(t, s, n)
        fitted = x, y, draw.rows(t, s).abs(), 1 + draw.rows(t).abs()
        yield "ridge_head", (*fitted, True, dual)
        head, intercept, *kept = torch.ops.fastmeta.ridge_head(*fitted, True, dual)
        yield "ridge_head_backward", (head, intercept, *fitted, head, *kept, True, dual)


def activation_calls(draw: Draws) -> Iterator[Call]:
    """Activations of more numbers than a block has threads."""
    for kind in KINDS.values() if draw.dtype in WIDE_DTYPES else ():
        v, g, x = draw.rows(3, 100), draw.rows(3, 100), draw.rows(3, 100)
        code = (int(kind), 1.0, 20.0)
        yield "activation", (x, *code)
        yield "activation_backward", (g, x, *code)
        yield "activation_backward_backward", (v, g, x, *code)


def pair_calls(draw: Draws) -> Iterator[Call]:
    """Scores and pooled maps of all pairs, with sums over other rows in one part and in several."""
    for t, q, n, h in PAIRS:
        for kind in ACTIVATIONS:
            x, y, x_dot, y_dot = (draw.rows(t, rows, h) for rows in (q, n, q, n))
            weight, weight_dot = (draw.rows(t, h, dtype=draw.wide) for _ in range(2))
            bias, g = draw.rows(t, dtype=draw.wide), draw.rows(t, q, n)
            dots = x_dot, y_dot, weight_dot
            yield "pair_scores", (x, y, weight, bias, kind)
            yield "pair_scores_backward", (g, x, y, weight, kind)
            yield "pair_scores_tangent", (*dots, bias, x, y, weight, kind)
            yield "pair_scores_bend", (g, *dots, x, y, weight, kind)
    x, y = draw.rows(2, 7, 3, 9, 5), draw.rows(2, 4, 3, 9, 5)
    pooled, place = torch.ops.fastmeta.pair_pool(x, y, 2)
    yield "pair_pool", (x, y, 2)
    yield "pair_pool_backward", (pooled, place, [9, 5], 2)
    yield "pair_pool_gather", (x, y, place, 2)


def program_calls(draw: Draws, only_smooth: bool) -> Iterator[Call]:
    """Meta-gradients of the task programs of every network."""
    for net in NETWORKS if draw.dtype in WIDE_DTYPES else ():
        if net.smooth or not only_smooth:
            yield "task_program_meta_gradient", meta_step(draw, net)


def meta_step(draw: Draws, net: Net) -> tuple[Any, ...]:
    program = Lowering(net.make(), net.loss).program(net.shape)
    theta = draw.rows(program.layout.numel) * net.scale
    lr = torch.full((1, 1, 1), 0.1, dtype=draw.dtype)
    sizes, outputs = (net.tasks, net.examples), program.output_shape
    x = draw.rows(*sizes, *net.shape)
    has_labels = net.loss is F.cross_entropy
    y = draw.labels(*outputs, *sizes) if has_labels else draw.rows(*sizes, *outputs)
    options = ([], net.steps, *(False, True, True, True, True, True))
    return program.code, theta, theta.new_empty(0), lr, x, y, x, y, *options


def results(op: str, arguments: tuple[Any, ...], device: str) -> list[torch.Tensor]:
    stays = 1 if op.startswith("task_program") else 0  # a program's code
    moved = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments[stays:])
    out = getattr(torch.ops.fastmeta, op)(*arguments[:stays], *moved)
    values = [out] if isinstance(out, torch.Tensor) else out
    # Rounding may exchange neighbours, whose distances are then near each other.
    return [x.cpu() for x in values if x.is_floating_point()]


def wrong_results(inputs: Inputs, call: Call, device: str) -> Iterator[str]:
    """What is wrong with each result that differs from the CPU's."""
    op, arguments = call
    on_cpu = results(op, arguments, "cpu")
    with inputs.precision():
        on_device = results(op, arguments, device)
    for actual, e in zip(on_device, on_cpu, strict=True):
        error, most = relative_error(actual, e), inputs.tolerance
        if not error <= most:
            shapes = [list(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
            yield f"{op} {inputs} {shapes}: error {error:.1e}, at most {most:.0e}"


def run(device: str, report: Callable[[str], None] = print) -> int:
    """Call every op; returns how many results differ from the CPU's."""
    wrong = count = 0
    for inputs in ALL_INPUTS:
        for call in inputs.calls(device):
            count += 1
            for line in wrong_results(inputs, call, device):
                report(line)
                wrong += 1
    report(f"{count} calls on {device}, {wrong} wrong results")
    return wrong


def kernels_of_sources() -> set[str]:
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.cu*")))
    return set(re.findall(r"__global__[^{;]*?(\w+_kernel)\(", text))


def missing(names: set[str], multiprocessors: int) -> list[str]:
    """The kernels of csrc/ and of kernels.txt that are not among `names`, by their full names."""
    launched = {readable(name) for name in names}
    short = {name.partition("<")[0] for name in launched}
    wanted = kernels_of_sources() | kernel_list.expected(multiprocessors)
    return sorted(wanted - launched - short)


def profiled(device: str) -> int:
    """Run under the profiler and look for every kernel among what it saw."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wrong = run(device)
    seen = {event.key for event in profile.key_averages()}
    launched = {name for name in seen if "fastmeta::" in name}
    if not launched:
        print("the profiler recorded no kernel")
        return 1 if wrong else NOT_AVAILABLE
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if names := missing(launched, multiprocessors):
        print("seen:", *sorted(map(readable, launched)), sep="\n  ")
        print("not launched:", *names, sep="\n  ")
        print(f"{len(names)} kernels were not launched, {wrong} results were wrong")
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
