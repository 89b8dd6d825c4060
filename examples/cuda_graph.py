"""A whole training iteration as one CUDA graph: meta-loss, backward and the optimizer's step.

    python examples/cuda_graph.py

Needs a GPU. The iteration runs a few times on a side stream, which loads the kernels and makes the
optimizer's state, is captured once, and is then replayed with every new meta-batch copied in.
"""

import copy
import sys
import time

import torch
import torch.nn.functional as F

import fastmeta as fm

if not torch.cuda.is_available():
    print("this example needs a CUDA device", file=sys.stderr)
    sys.exit(77)

TASKS, ITERATIONS, WARMUP = 25, 200, 3


def learner() -> fm.MAML:
    torch.manual_seed(0)
    net = fm.models.MLP([1, 40, 40, 1]).cuda()
    # The graph is the caller's own: the learner makes none inside it.
    return fm.MAML(net, lr=0.01, steps=5, loss=F.mse_loss, cuda_graph=False)


def iteration(maml: fm.MAML, optimizer: torch.optim.Optimizer, data) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss, _ = maml.meta_loss(*data)
    loss.backward()
    optimizer.step()
    return loss.detach()


def adam(maml: fm.MAML) -> torch.optim.Adam:
    return torch.optim.Adam(maml.parameters(), lr=1e-3, capturable=True)


source = fm.data.Episodes(fm.data.Sinusoid(), 1, shots=10, queries=10, tasks=TASKS, device="cuda")
episodes = [source[i] for i in range(ITERATIONS)]

eager = learner()
graphed = copy.deepcopy(eager)
optimizer, twin = adam(graphed), adam(eager)

data = [tensor.clone() for tensor in episodes[0]]  # the tensors that the graph reads
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    for _ in range(WARMUP):
        iteration(graphed, optimizer, data)
torch.cuda.current_stream().wait_stream(stream)
graph = torch.cuda.CUDAGraph()
optimizer.zero_grad(set_to_none=True)  # gradients then lie in the graph's memory
with torch.cuda.graph(graph):
    static_loss = iteration(graphed, optimizer, data)
for _ in range(WARMUP):  # a capture runs nothing
    iteration(eager, twin, episodes[0])


def replayed(episode) -> torch.Tensor:
    for static, tensor in zip(data, episode, strict=True):
        static.copy_(tensor)
    graph.replay()
    return static_loss.clone()


def timed(step) -> tuple[list[float], float]:
    """The losses, and milliseconds an iteration."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    losses = [step(episode) for episode in episodes]
    torch.cuda.synchronize()
    return torch.stack(losses).tolist(), 1e3 * (time.perf_counter() - start) / ITERATIONS


losses, milliseconds = timed(replayed)
_, eager_milliseconds = timed(lambda episode: iteration(eager, twin, episode))
pairs = zip(graphed.parameters(), eager.parameters(), strict=True)
difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
print(f"{ITERATIONS} iterations of {TASKS} tasks, loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"replayed {milliseconds:.3f} ms an iteration, without a graph {eager_milliseconds:.3f} ms")
print(f"parameters differ by at most {difference:.1e}")
if difference > 1e-3:
    raise SystemExit("the graph and the iteration without one part")
