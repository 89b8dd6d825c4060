"""The ops on a GPU: time against plain PyTorch, and against the peak of the device.

    python -m benchmarks.gpu.ops [--json FILE] [--seconds 110]

Times are of CUDA events around several calls; contenders take turns, and the ratio of two is the
median over rounds. Before anything is timed each contender is compared with plain PyTorch in
float64; one that differs gets no ratio. Inputs and outputs rotate among so many that none is left
in the cache. float32 is IEEE float32; tf32 is float32 whose convolutions may be rounded to it.

- eager: calls one after the other from Python, with the check of the labels.
- graph of n: n calls captured in one CUDA graph, and the time of one of them.
- of copy: bytes a second that the op must move, over the bytes a second of a large device-to-device
  copy in the same rounds.
- of floor: operations a second that the op must do, over the operations a second of a large matrix
  product in the same precision.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastmeta as fm
from benchmarks.common.agreement import relative_error
from benchmarks.common.timers import Call, CudaTimer, Seconds, Spread, Timer
from benchmarks.gpu.measure import OURS, Contender, Inputs, Measure, Sizes, in_torch
from benchmarks.gpu.precision import convolutions, float32_products
from benchmarks.gpu.runner import write_json
from benchmarks.gpu.workloads import all_measures
from benchmarks.memory.meta import peak
from fastmeta.training.timing import ratio

COPY = "copy"
Row = dict[str, Any]


def copy_call(timer: Timer, size: int) -> Call:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return lambda number: target.copy_(source)


def ceilings(timer: Timer, sizes: Sizes) -> dict[str, float]:
    """Bytes a second of a large copy, and operations a second of a large matrix product."""
    calls = {COPY: copy_call(timer, sizes.copy_bytes)}
    seconds = timer.interleave(calls, sizes.rounds, 4)[COPY]
    ceilings = {COPY: 2 * sizes.copy_bytes / statistics.median(seconds)}
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        a, b = (torch.randn(sizes.matrix, sizes.matrix, device=timer.device) for _ in range(2))
        a, b = a.to(dtype), b.to(dtype)
        with float32_products(precision):
            product = {name: lambda number, a=a, b=b: a @ b}
            seconds = timer.interleave(product, sizes.long_rounds, 2)[name]
        ceilings[name] = 2 * sizes.matrix**3 / statistics.median(seconds)
    return ceilings


def worst(errors: Sequence[float]) -> float:
    """The largest error; NaN if any is."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def errors(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return worst([relative_error(a, e) for a, e in zip(outputs, expected, strict=True)])


def in_float64(contender: Contender, inputs: Inputs) -> Inputs:
    with fm.use_backend("torch"):
        return contender(*(x.double() if x.is_floating_point() else x for x in inputs))


def rotating(contender: Contender, sets: list[Inputs]) -> Call:
    """The call with this number takes the next inputs, and its output stays alive for a while."""
    kept: list[Any] = [None] * len(sets)

    def call(number: int) -> Inputs:
        place = number % len(sets)
        kept[place] = contender(*sets[place])
        return kept[place]

    return call


def drawn(measure: Measure, timer: Timer) -> list[Inputs]:
    """Draw inputs that together are four times the cache, at most 8 of them."""
    generator = torch.Generator(timer.device).manual_seed(0)
    first = measure.draw(generator)
    size = sum(x.numel() * x.element_size() for x in first)
    count = min(8, max(1, math.ceil(4 * timer.cache_bytes / size)))
    return [first, *(measure.draw(generator) for _ in range(count - 1))]


def agreement(measure: Measure, inputs: Inputs, calls: dict[str, Contender]) -> dict[str, float]:
    expected = in_float64(measure.contenders[OURS], inputs)
    return {name: errors(call(*inputs), expected) for name, call in calls.items()}


def rounding(measure: Measure, inputs: Inputs) -> float:
    """The error of plain PyTorch by its precision only; others may have four times as much."""
    ours = measure.contenders[OURS]
    return errors(in_torch(ours)(*inputs), in_float64(ours, inputs))


def prepared(measure: Measure, timer: Timer, sets: list[Inputs]) -> dict[str, Call]:
    """The calls to time, in a graph where the measure says so."""
    calls = {name: rotating(c, sets) for name, c in measure.contenders.items()}
    if not measure.in_graph:
        return calls
    return {name: timer.captured(call, measure.calls) for name, call in calls.items()}


def replayed_errors(
    measure: Measure, calls: dict[str, Any], sets: list[Inputs]
) -> dict[str, float]:
    """Errors of what a replay of each graph leaves in the output of its last call."""
    expected = in_float64(measure.contenders[OURS], sets[(measure.calls - 1) % len(sets)])
    for call in calls.values():
        call(0)
    return {name: errors(call.output, expected) for name, call in calls.items()}


def timed(measure: Measure, timer: Timer, calls: dict[str, Call], copy_bytes: int) -> Seconds:
    if measure.moved:
        calls = {**calls, COPY: copy_call(timer, copy_bytes)}
    if not measure.in_graph:
        return timer.interleave(calls, measure.rounds, measure.calls)
    seconds = timer.interleave(calls, measure.rounds, 1)
    return {name: [s / measure.calls for s in taken] for name, taken in seconds.items()}


def head(measure: Measure) -> Row:
    return {
        "op": measure.op,
        "workload": measure.workload,
        "what": measure.what,
        "dtype": measure.precision,
        "how": f"graph of {measure.calls}" if measure.in_graph else "eager",
    }


def measured(measure: Measure, timer: Timer, peaks: dict[str, float], sizes: Sizes) -> Row:
    """One row: errors, times, ratios, and how near they come to the ceilings."""
    row, sets = head(measure), drawn(measure, timer)
    errors = agreement(measure, measure.checked(sets[0]), dict(measure.contenders))
    calls = prepared(measure, timer, sets)
    if measure.in_graph:
        replayed = replayed_errors(measure, calls, sets)
        errors = {name: worst([error, replayed[name]]) for name, error in errors.items()}
    allowed = max(measure.tolerance, 4 * rounding(measure, sets[0]) if measure.jumps else 0)
    agree = {name for name, error in errors.items() if error <= allowed}
    row |= {"errors": errors, "agree": sorted(agree), "calls": measure.calls}
    if measure.memory:
        ours = measure.contenders[OURS]
        row["peak_bytes"] = peak(lambda: ours(*sets[0]), timer.device)
    seconds = timed(measure, timer, calls, sizes.copy_bytes)
    row["seconds"] = {name: Spread.of(taken).as_dict() for name, taken in seconds.items()}
    if OURS not in agree:
        return row | {"error": f"the result is off by {errors[OURS]:.1e}"}
    rivals = sorted(agree - {OURS})
    row["ratios"] = {name: ratio(seconds[name], seconds[OURS]) for name in rivals}
    if measure.moved:
        share = measure.moved / (2 * sizes.copy_bytes)
        row["of_copy"] = share * ratio(seconds[COPY], seconds[OURS])
    if measure.flops:
        row["of_floor"] = measure.flops / statistics.median(seconds[OURS]) / peaks[row["dtype"]]
    return row


def attempted(measure: Measure, timer: Timer, peaks: dict[str, float], sizes: Sizes) -> Row:
    """Measure a row, or record its error: one workload must not cost the others."""
    try:
        with convolutions(measure.tf32):
            return measured(measure, timer, peaks, sizes)
    except (RuntimeError, ValueError) as error:
        return head(measure) | {"error": str(error).splitlines()[0]}


def line(row: Row) -> str:
    """A row of the text table."""
    name = f"{row['op']}, {row['workload']}, {row['what']}, {row['dtype']}, {row['how']}"
    if "skipped" in row or "seconds" not in row:
        return f"{name}: {row.get('skipped') or row['error']}"
    low, middle, high = (
        1e6 * row["seconds"][OURS][k] for k in ("first_quartile", "median", "third_quartile")
    )
    parts = [f"{middle:.5g} us ({low:.5g} to {high:.5g})"]
    parts += [f"{name} / {OURS} {value:.3g}" for name, value in row.get("ratios", {}).items()]
    parts += [
        f"{row[f'of_{limit}']:.1%} of {limit}" for limit in (COPY, "floor") if f"of_{limit}" in row
    ]
    parts += [f"peak {row['peak_bytes'] / 1e9:.3f} GB"] if "peak_bytes" in row else []
    parts += [f"ERROR: {row['error']}"] if "error" in row else []
    differ = sorted(set(row["errors"]) - set(row["agree"]) - {OURS})
    parts += [f"{other} differs by {row['errors'][other]:.1e}" for other in differ]
    return f"{name}: " + ", ".join(parts)


def run(
    timer: Timer, sizes: Sizes, seconds: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure everything; passes all rows so far to `keep` after every row."""
    end = time.monotonic() + seconds
    with float32_products("highest"):
        peaks = ceilings(timer, sizes)
        print(f"copy {peaks[COPY] / 1e12:.2f} TB/s, matrix product in TFLOP/s:", end="")
        print("".join(f" {k} {v / 1e12:.0f}" for k, v in peaks.items() if k != COPY), flush=True)
        content: dict[str, Any] = {"ceilings": peaks, "rows": []}
        for measure in all_measures(sizes):
            if time.monotonic() > end:
                row = head(measure) | {"skipped": f"the {seconds:.0f} s were used up"}
            else:
                row = attempted(measure, timer, peaks, sizes)
            content["rows"].append(row)
            print(line(row), flush=True)
            keep(content)
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--seconds", type=float, default=110, help="time after which none is begun")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu.ops: torch finds no CUDA device")
    for op in fm.core.backend.NAMES:
        if fm.backend_of(op, "cuda") != "native":
            sys.exit(f"benchmarks.gpu.ops: fastmeta was built without {op} for CUDA")
    content = run(
        CudaTimer(),
        Sizes(),
        options.seconds,
        lambda content: write_json(options.json, content) if options.json else None,
    )
    return 0 if all("ratios" in row for row in content["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
