"""Whole training steps under torch.compile: no graph break, and one graph for any number of tasks.

    python examples/compiled_step.py

ProtoNet is compiled from the encoder to the loss. The meta-losses of MAML, ANIL and their relatives
are one op of the graph, with the same results as without torch.compile.
"""

import copy
import shutil
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm

WAYS = 5
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"  # Inductor takes a C++ compiler
TASKS = (4, 3, 6, 2, 5)  # sizes of the meta-batches, one after another


def classification(tasks: int) -> fm.data.Episodes:
    return fm.data.Episodes(GLYPHS, ways=WAYS, shots=1, queries=3, tasks=tasks, seed=tasks)


def regression(tasks: int) -> fm.data.Episodes:
    return fm.data.Episodes(fm.data.Sinusoid(), 1, shots=10, queries=10, tasks=tasks, seed=tasks)


def protonet() -> nn.Module:
    return fm.ProtoNet(fm.models.MLP([784, 64, 32]))


def anil() -> nn.Module:
    return fm.ANIL(fm.models.MLP([784, 64, 32]), nn.Linear(32, WAYS), lr=0.1, steps=5)


def maml() -> nn.Module:
    return fm.MAML(fm.models.MLP([1, 40, 40, 1]), lr=0.01, steps=5, loss=F.mse_loss)


def training_step(
    learner: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Callable, Callable]:
    """The function to compile, and an iteration around it.

    ProtoNet gets the number of classes: reading it from the labels would break the graph.
    """
    options = {"num_classes": WAYS} if isinstance(learner, fm.ProtoNet) else {}

    def step(support_x, support_y, query_x, query_y):
        loss, _ = learner.meta_loss(support_x, support_y, query_x, query_y, **options)
        return loss

    def train(episode, call=step):
        optimizer.zero_grad()
        loss = call(*episode)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, train


GLYPHS = fm.data.Glyphs("test", examples=4)

for make, episodes in ((protonet, classification), (anil, classification), (maml, regression)):
    torch.manual_seed(0)
    learner = make()
    twin = copy.deepcopy(learner)
    torch._dynamo.utils.counters.clear()
    step, train = training_step(learner, torch.optim.SGD(learner.parameters(), 0.01))
    _, train_twin = training_step(twin, torch.optim.SGD(twin.parameters(), 0.01))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=BACKEND)
    start = time.perf_counter()
    for tasks in TASKS:
        episode = episodes(tasks)[0]
        loss, expected = train(episode, compiled), train_twin(episode)
        if abs(loss - expected) > 1e-4 * abs(expected):
            raise SystemExit(f"{tasks} tasks: the compiled loss is {loss}, eager's {expected}")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if graphs != 1:
        raise SystemExit(f"{type(learner).__name__}: {graphs} graphs, expected 1")
    pairs = zip(learner.parameters(), twin.parameters(), strict=True)
    difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
    print(
        f"{type(learner).__name__}: {len(TASKS)} steps of {', '.join(map(str, TASKS))} tasks in "
        f"{time.perf_counter() - start:.1f} s, {graphs} graph, no break; parameters differ from "
        f"eager's by at most {difference:.1e}"
    )
