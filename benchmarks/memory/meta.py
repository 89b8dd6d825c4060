"""Peak memory of the second-order meta-gradient, against an unrolled graph.

    python -m benchmarks.memory.meta [--tasks 4] [--hidden 64]

Conv4 on 28x28 images, 5-way 1-shot with 75 queries, float32, K = 2 and K = 10. Compared are

- fastmeta: the adjoint of the functional engine with ``memory="recompute"``, the least that it can
  take, all tasks together and with ``task_chunk=1``; of task programs
  ``benchmarks.memory.program`` gives the memory;
- unrolled: ``create_graph=True`` through all K steps, vmapped over all tasks; the strongest
  ordinary way to run the tasks together;
- unrolled, task by task: ``backward`` after each task, the least memory that unrolling takes.

On the CPU memory is counted, not sampled: the bytes of the tensors that operators allocate, and of
those alive the peak (``tests.helpers.memory``); it agrees with torch's allocator to 0.1 %.
The count is the same every time, unlike the resident size of the process, which includes memory
that the allocator holds back and that earlier work left. On a GPU: the caching allocator's peak.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from tests.helpers.memory import peak_bytes
from tests.helpers.networks import Tasks
from tests.helpers.unrolled import vmapped_meta_loss

STEPS = (2, 10)
INNER_LR = 0.4


def omniglot_like(tasks: int, device: torch.device) -> Tasks:
    """Random tasks in the sizes of 5-way 1-shot Omniglot: S = 5, Q = 75."""
    generator = torch.Generator().manual_seed(0)

    def examples(shots: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(tasks, 5 * shots, 1, 28, 28, generator=generator)
        y = torch.arange(5).repeat_interleave(shots).expand(tasks, -1)
        return x.to(device), y.contiguous().to(device)

    return Tasks(*examples(1), *examples(15))


def ways(net: nn.Module, tasks: Tasks) -> dict[str, Callable[[int], None]]:
    """Ways to fill the gradients of ``net`` by K inner steps, by name."""

    def adjoint(task_chunk: int | None) -> Callable[[int], None]:
        def run(steps: int) -> None:
            options = {"task_chunk": task_chunk, "memory": "recompute", "engine": "functional"}
            maml = fm.MAML(net, INNER_LR, steps, **options)
            maml.meta_loss(*tasks)[0].backward()

        return run

    def unrolled(steps: int) -> None:
        vmapped_meta_loss(net, tasks, F.cross_entropy, INNER_LR, steps).backward()

    def unrolled_loop(steps: int) -> None:
        for index in range(len(tasks.support_x)):
            task = Tasks(*(tensor[index : index + 1] for tensor in tasks))
            vmapped_meta_loss(net, task, F.cross_entropy, INNER_LR, steps).backward()

    return {
        "fastmeta": adjoint(None),
        "fastmeta, task_chunk=1": adjoint(1),
        "unrolled": unrolled,
        "unrolled, task by task": unrolled_loop,
    }


def peak(run: Callable[[], None], device: torch.device) -> int:
    """The peak of the bytes that ``run`` holds, besides the bytes alive before it."""
    if device.type != "cuda":
        return peak_bytes(run)
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(tasks: int, hidden: int, device: torch.device) -> dict[str, dict[int, int]]:
    """Peak bytes by way and K."""
    torch.manual_seed(0)
    net = fm.models.Conv4(hidden, 5).to(device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Unrolling under vmap cannot write running statistics.
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    data = omniglot_like(tasks, device)
    result: dict[str, dict[int, int]] = {}
    for name, run in ways(net, data).items():
        run(1)  # creates the gradients and whatever a first call keeps
        result[name] = {steps: peak(lambda s=steps, r=run: r(s), device) for steps in STEPS}
    return result


def report(peaks: dict[str, dict[int, int]], tasks: int, parameters: int) -> str:
    lines = [f"{'peak memory, MB':26}" + "".join(f"{f'K = {steps}':>10}" for steps in STEPS)]
    for name, row in peaks.items():
        lines.append(f"{name:26}" + "".join(f"{row[steps] / 1e6:10.1f}" for steps in STEPS))
    own, unrolled = peaks["fastmeta"], peaks["unrolled"]
    few, many = (own[steps] - 4 * steps * tasks * parameters for steps in STEPS)
    lines += [
        f"fastmeta / unrolled at K = {STEPS[1]}: {own[STEPS[1]] / unrolled[STEPS[1]]:.3f}"
        " (at most 0.25)",
        f"K = {STEPS[1]} / K = {STEPS[0]} without the K P parameters of each task: "
        f"{many / few:.3f} (at most 1.2)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    peaks = measure(options.tasks, options.hidden, options.device)
    parameters = sum(p.numel() for p in fm.models.Conv4(options.hidden, 5).parameters())
    print(
        f"Conv4-{options.hidden}, 28x28, 5-way 1-shot, S = 5, Q = 75, T = {options.tasks}, "
        f"P = {parameters}, float32, {options.device}, torch {torch.__version__}"
    )
    print(report(peaks, options.tasks, parameters))


if __name__ == "__main__":
    main()
