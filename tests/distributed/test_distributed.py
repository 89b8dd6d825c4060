"""Training on several processes: the outcome of one, whatever ends or kills them on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastmeta as fm
from fastmeta import cli, distributed
from fastmeta.data import Episode, Episodes, Glyphs, Sinusoid
from fastmeta.training import loop as training
from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_factory import build_learner
from fastmeta.training.learner_options import METRIC_LEARNERS
from fastmeta.training.metrics_log import read_metrics
from fastmeta.training.run_folder import begin_folder, was_started_by
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import (
    images,
    maml,
    protonet,
    relative,
    run,
    sinusoid,
    weights,
    without_seconds,
)

# PyTorch's own sums over tasks are rounded by how many there are.
NATIVE = fm.build_info()["native"]
ROUNDING = 1e-6 if NATIVE else 5e-6
each_number = pytest.mark.parametrize("ranks", [2, 4])


def numbers(tensors: list[torch.Tensor]) -> list[list[float]]:
    """Values that can be compared to the last bit, and sent between processes."""
    return [tensor.detach().double().flatten().tolist() for tensor in tensors]


def as_tensor(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in values for value in row], dtype=torch.float64)


# The meta-gradient of all ranks is that of one process


def meta_gradient(
    config: TrainConfig, tasks: int, dtype: torch.dtype = torch.float32
) -> list[list[float]]:
    """The mean loss, and the meta-gradient of a meta-batch, as the ranks compute them together."""
    torch.manual_seed(0)
    sources = {"sinusoid": Sinusoid, "images": images, "glyphs": small_glyphs}
    source = Glyphs("validation", size=24) if config.algorithm == "relation" else None
    source = source or sources[config.data]()
    episode = Episodes(source, config.ways, config.shots, config.queries, tasks)[3]
    learner = build_learner(config, list(episode.support_x.shape[2:])).to(dtype)
    if config.algorithm in METRIC_LEARNERS:
        distributed.share_batch_statistics(learner)
    floats = (t.to(dtype) if t.is_floating_point() else t for t in episode)
    loss, _ = learner.meta_loss(*distributed.split_tasks(Episode(*floats)))
    (distributed.task_weight(tasks) * loss).backward()
    mean = distributed.average_gradients(learner, [distributed.task_weight(tasks) * loss.item()])
    return [mean, *numbers([p.grad for p in learner.parameters() if p.grad is not None])]


def small_glyphs() -> Glyphs:
    return Glyphs("validation", size=16, examples=4)


LEARNERS = ["fomaml", "anil", "reptile", "metasgd", "mamlpp", "metacurvature", "imaml"]


def check_equal_to_one_process(
    config: TrainConfig,
    ranks: int,
    tasks: int,
    dtype: torch.dtype = torch.float32,
    tolerance: float = ROUNDING,
) -> None:
    alone = as_tensor(meta_gradient(config, tasks, dtype))
    together = on_ranks(ranks, meta_gradient, config, tasks, dtype)
    assert all(gradient == together[0] for gradient in together)
    assert (as_tensor(together[0]) - alone).abs().max() <= tolerance


@pytest.mark.rotating
@each_number
@pytest.mark.parametrize("tasks", [8, 5])
def test_sinusoid_s_meta_gradient(tmp_path, ranks, tasks):
    check_equal_to_one_process(sinusoid(tmp_path), ranks, tasks)


@each_number
def test_glyphs_meta_gradient(tmp_path, ranks):
    config = TrainConfig("maml", "glyphs", str(tmp_path), hidden=4, queries=3)
    check_equal_to_one_process(config, ranks, 5)


@each_number
def test_a_protonet_s_meta_gradient_through_shared_norms(tmp_path, ranks):
    config = TrainConfig("protonet", "glyphs", str(tmp_path), hidden=4, queries=3)
    check_equal_to_one_process(config, ranks, 5, torch.float64, 1e-9)


@pytest.mark.parametrize("algorithm", ["matching", "siamese", "relation"])
def test_a_metric_learner_s_meta_gradient_through_shared_norms(tmp_path, algorithm):
    """A relation module's norms, too: statistics over the pairs of all ranks."""
    config = TrainConfig(algorithm, "glyphs", str(tmp_path), hidden=4, queries=3)
    check_equal_to_one_process(config, 2, 3, torch.float64, 1e-9)


def test_a_protonet_s_meta_gradient_in_float32(tmp_path):
    # One process's own, through four norms of all tasks, is 7e-6 from the exact one.
    check_equal_to_one_process(protonet(tmp_path), 2, 3, tolerance=2e-5)


@pytest.mark.rotating
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_learner_s_meta_gradient(tmp_path, algorithm):
    check_equal_to_one_process(relative(algorithm, tmp_path), 2, 3)


# Whole runs


def trained(config: TrainConfig, **how: Any) -> dict[str, Any]:
    result = run(config, **how)
    seen = {name: getattr(result, name) for name in ("iteration", "stopped", "metrics")}
    return seen | {"weights": numbers(weights(result)), "files": os.listdir(config.out)}


def reptile(out: Path, **options: Any) -> TrainConfig:
    return relative("reptile", out, **options)


@pytest.mark.rotating
@pytest.mark.parametrize("make", [sinusoid, maml, reptile])
def test_a_run_is_that_of_one_process(tmp_path, make):
    options = {"meta_batch": 5, "eval_every": 2, "eval_tasks": 2}
    alone = trained(make(tmp_path / "a", **options))
    together = on_ranks(2, trained, make(tmp_path / "b", **options))
    assert together[0]["weights"] == together[1]["weights"]
    assert together[0]["metrics"] == together[1]["metrics"]
    difference = as_tensor(together[0]["weights"]) - as_tensor(alone["weights"])
    # Where sums are PyTorch's, a bias ahead of a norm follows the sign of their rounding.
    assert difference.abs().max() <= (1e-6 if NATIVE else 1e-2)
    for ours, its in zip(together[0]["metrics"], alone["metrics"], strict=True):
        assert without_seconds([ours])[0] == pytest.approx(without_seconds([its])[0], abs=ROUNDING)


def test_a_protonet_s_losses_are_those_of_one_process(tmp_path):
    alone = trained(protonet(tmp_path / "a", meta_batch=3))
    together = on_ranks(2, trained, protonet(tmp_path / "b", meta_batch=3))
    assert together[0]["weights"] == together[1]["weights"]
    ours, its = ([m["loss"] for m in found["metrics"]] for found in (together[0], alone))
    assert ours == pytest.approx(its, abs=1e-5)


def writers(config: TrainConfig) -> list[str]:
    """What this rank writes."""
    seen = []
    for name in ("save_checkpoint", "draw_curves", "begin_folder"):
        setattr(training, name, lambda *_, name=name: seen.append(name))
    training.read_metrics = lambda _: []
    appended = training.MetricsLog.append
    training.MetricsLog.append = lambda *_: (seen.append("append"), appended(*_))[1]
    Path(config.out).mkdir(exist_ok=True)
    run(config)
    return seen


def test_rank_0_alone_writes(tmp_path):
    first, second = on_ranks(2, writers, sinusoid(tmp_path, iterations=1))
    assert first == ["begin_folder", "append", "save_checkpoint", "draw_curves"]
    assert second == []


@pytest.mark.rotating
def test_ranks_resume_bit_for_bit(tmp_path):
    straight = on_ranks(2, trained, reptile(tmp_path / "a", iterations=6))[0]
    on_ranks(2, trained, reptile(tmp_path / "b", iterations=3, lr_cosine=6))
    config = reptile(tmp_path / "b", iterations=6)
    resumed = on_ranks(2, trained_on, config)
    assert resumed[0]["weights"] == resumed[1]["weights"] == straight["weights"]
    for other in resumed:
        assert without_seconds(other["metrics"]) == without_seconds(straight["metrics"])


def trained_on(config: TrainConfig) -> dict[str, Any]:
    return trained(config, resume=True)


@pytest.mark.rotating
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    straight = trained(sinusoid(tmp_path / "a", iterations=6))
    on_ranks(2, trained, sinusoid(tmp_path / "b", iterations=3))
    resumed = trained_on(sinusoid(tmp_path / "b", iterations=6))
    assert as_tensor(resumed["weights"]) == pytest.approx(as_tensor(straight["weights"]), abs=1e-6)


# What one rank meets, all ranks heed


def interrupted(config: TrainConfig) -> dict[str, Any]:
    """A run of which rank 1 gets SIGTERM in the third step."""
    sample = Sinusoid.sample

    def sample_then_signal(self, rng, *sizes):
        interrupted.draws += 1
        if distributed.rank() == 1 and interrupted.draws == 4:  # the first tells the shape
            signal.raise_signal(signal.SIGTERM)
        return sample(self, rng, *sizes)

    interrupted.draws = 0
    Sinusoid.sample = sample_then_signal
    return trained(config)


@pytest.mark.rotating
def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path):
    for result in on_ranks(2, interrupted, sinusoid(tmp_path, iterations=10)):
        assert (result["stopped"], result["iteration"]) == ("SIGTERM", 3)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 3


@pytest.mark.rotating
def test_the_time_limit_ends_all_ranks_after_the_same_step(tmp_path):
    config = sinusoid(tmp_path, iterations=10**9, time_limit=0.3 / 60)
    results = on_ranks(2, trained, config)
    assert {result["stopped"] for result in results} == {"time limit"}
    assert results[0]["iteration"] == results[1]["iteration"] > 0


def diverged(config: TrainConfig) -> dict[str, Any]:
    """A run in which the second loss of rank 1 is not finite."""
    meta_loss = training.build_learner(config, [1]).meta_loss.__func__
    calls = []

    def spoilt(self, *episode):
        calls.append(episode)
        loss, outputs = meta_loss(self, *episode)
        spoils = distributed.rank() == 1 and len(calls) == 2
        return (loss * float("nan") if spoils else loss), outputs

    type(training.build_learner(config, [1])).meta_loss = spoilt
    return trained(config)


@pytest.mark.rotating
def test_a_loss_that_diverges_on_one_rank_ends_all(tmp_path):
    for error in on_ranks(2, diverged, sinusoid(tmp_path, checkpoint_every=1)):
        assert isinstance(error, FloatingPointError)
        assert "the loss became nan in iteration 2" in str(error)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 1


def test_a_folder_with_a_run_is_refused_on_all_ranks(tmp_path):
    trained(sinusoid(tmp_path))
    for error in on_ranks(2, trained, sinusoid(tmp_path)):
        assert isinstance(error, FileExistsError)
        assert "already holds a run" in str(error)


def test_there_is_a_task_for_every_rank(tmp_path):
    for error in on_ranks(2, trained, sinusoid(tmp_path, meta_batch=1)):
        assert isinstance(error, ValueError)
        assert str(error).startswith("meta_batch: expected at least one task for each of 2 proc")
    assert not (tmp_path / "config.json").exists()


def left_alone() -> str:
    if distributed.rank() == 1:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return "gone"
    net = nn.Linear(2, 1)
    distributed.average_gradients(net)
    return "not reached"


def test_a_process_that_has_ended_is_named():
    error, gone = on_ranks(2, left_alone)
    assert gone == "gone"
    assert isinstance(error, ConnectionError)
    assert "another process of this training has ended" in str(error)


# Helpers of one's own loop


def slices(tasks: int) -> list[int]:
    mine = distributed.task_slice(tasks)
    return [*range(tasks)[mine]]


def test_tasks_are_split_evenly_and_in_order():
    parts = on_ranks(4, slices, 10)
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert [task for part in parts for task in part] == list(range(10))
    errors = on_ranks(2, slices, 1)
    assert [str(error) for error in errors] == [
        "tasks: expected at least one for each of 2 processes, got 1"
    ] * 2


def averages() -> dict[str, Any]:
    """Gradients that some ranks lack, of several types and strides, and numbers beside them."""
    first = distributed.rank() == 0
    own = distributed.rank() + 1.0
    image = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    image.grad = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last) * own
    half, lone, never, frozen = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    half.data = half.data.bfloat16()
    half.grad = torch.full((2,), own, dtype=torch.bfloat16)
    lone.grad = torch.full((2,), 8.0) if first else None
    frozen.requires_grad_(False)
    frozen.grad = torch.ones(2) * own
    parameters = [image, half, lone, never, frozen]
    values = distributed.average_gradients(parameters, [own, 0.25])
    return {
        "values": values,
        "image": image.grad.flatten().tolist(),
        "strides": image.grad.stride() == image.stride(),
        "half": (half.grad.tolist(), half.grad.dtype == torch.bfloat16),
        "lone": lone.grad.tolist(),
        "never": never.grad is None,
        "frozen": frozen.grad.tolist(),
    }


def test_gradients_are_averaged():
    for rank, found in enumerate(on_ranks(2, averages)):
        assert found == {
            "values": [1.5, 0.25],
            "image": [1.5 * i for i in range(24)],
            "strides": True,
            "half": ([1.5, 1.5], True),
            "lone": [4.0, 4.0],
            "never": True,
            "frozen": [rank + 1.0] * 2,
        }


def normed(shape: list[int], dtype: torch.dtype, momentum: float | None) -> list[list[float]]:
    """Outputs, gradients and statistics of a norm whose rows are split 1 to 3."""
    torch.manual_seed(0)
    norm = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3, momentum=momentum, dtype=dtype)
    nn.init.normal_(norm.weight)
    norm = distributed.share_batch_statistics(norm)
    x, slope = (torch.randn(shape, dtype=dtype) * 3 + 100 for _ in range(2))
    mine = slice(None)
    if distributed.world_size() == 2:
        mine = slice(0, 1) if distributed.rank() == 0 else slice(1, None)
    x = x[mine].clone().requires_grad_()
    (norm(x) * slope[mine]).sum().backward()
    norm(x.detach() * 2)
    trained = [norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return numbers([norm(x)[:, 0], x.grad, *trained, norm.eval()(x)])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [[4, 3], [4, 3, 5, 2]])
def test_a_shared_norm_is_a_norm_of_all_ranks_rows(shape, momentum):
    alone = normed(shape, torch.float64, momentum)
    first, second = on_ranks(2, normed, shape, torch.float64, momentum)
    for index in (0, 1, 6):  # outputs and gradients, row by row
        assert first[index] + second[index] == pytest.approx(alone[index], abs=1e-9)
    for index in (2, 3):  # each rank's part of the gradients
        total = [a + b for a, b in zip(first[index], second[index], strict=True)]
        assert total == pytest.approx(alone[index], abs=1e-9)
    for index in (4, 5):
        assert first[index] == second[index] == pytest.approx(alone[index], abs=1e-9)


def test_sharing_statistics_keeps_the_tensors():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2, affine=False)))
    names = list(net.state_dict())
    before = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    shared = distributed.share_batch_statistics(net)
    assert list(shared.state_dict()) == names
    assert {name: t.data_ptr() for name, t in shared.state_dict().items()} == before
    assert isinstance(shared[1][0], distributed.SyncBatchNorm)


# Launches


def test_a_launch_knows_its_own_run(tmp_path):
    config = sinusoid(tmp_path / "run")
    out = Path(config.out)
    assert not was_started_by(out, "a")
    begin_folder(config, resume=False, launch="a")
    assert was_started_by(out, "a")
    assert not was_started_by(out, "b")
    begin_folder(config, resume=True, launch="b")
    assert [was_started_by(out, launch) for launch in ("a", "b", "")] == [False, True, False]
    begin_folder(config, resume=False)
    assert not was_started_by(out, "b")


def test_a_restarted_launch_goes_on_even_where_it_was_to_overwrite(tmp_path, monkeypatch):
    run(sinusoid(tmp_path, iterations=9))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    run(sinusoid(tmp_path, iterations=3), overwrite=True)
    result = run(sinusoid(tmp_path, iterations=5), overwrite=True)
    assert [record["iteration"] for record in result.metrics] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(training._Run, "step", None)  # all five are taken
    assert run(sinusoid(tmp_path, iterations=5)).iteration == 5
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(FileExistsError):
        run(sinusoid(tmp_path, iterations=5))


@pytest.fixture
def one_of_two(monkeypatch):
    """The environment of torchrun's second process."""
    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("command", ["eval x", "compare --out x", "demo --out x"])
def test_other_commands_are_for_one_process(one_of_two, capsys, command):
    assert cli.main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastmeta, rank 1: {command.split()[0]} runs in one process")


def test_gpus_are_not_chosen_by_number(monkeypatch):
    distributed.select_device("cuda:1")  # one process may
    # A string: the function ``process_group`` hides its module of the same name.
    monkeypatch.setattr(sys.modules["fastmeta.distributed.process_group"], "world_size", lambda: 2)
    distributed.select_device("cpu")
    with pytest.raises(ValueError, match="device: expected 'cuda' for 2 processes"):
        distributed.select_device("cuda:1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.select_device("cuda")
    assert chosen == [1]


KILLED = """
import os, signal, sys
from fastmeta import cli
from fastmeta.training import loop as train

deaths = {("0", "1"): 14, ("1", "0"): 25}  # restarts and rank: the step that is its last
last = deaths.get((os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]))
step = train._Run.step

def step_then_die(run, *arguments):
    record = step(run, *arguments)
    if record["iteration"] == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return record

train._Run.step = step_then_die
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.rotating
def test_killed_workers_lose_nothing_that_was_saved(tmp_path):
    """Rank 1 dies, then rank 0, and torchrun starts both anew each time."""
    options = {"iterations": 30, "checkpoint_every": 10}
    straight = on_ranks(2, trained, sinusoid(tmp_path / "a", **options))[0]
    (tmp_path / "killed.py").write_text(KILLED)
    launch = "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=2"
    command = f"{tmp_path / 'killed.py'} train maml --data sinusoid --hidden 4 --queries 3"
    command += f" --meta-batch 2 --iterations 30 --checkpoint-every 10 --out {tmp_path / 'b'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch.split(), *command.split()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,  # seconds, for a machine that others are using too
    )
    assert done.returncode == 0, done.stderr
    assert "30 of 30 iterations" in done.stdout
    saved = load_checkpoint(tmp_path / "b" / "checkpoint.pt")
    assert numbers(list(saved["learner"].values())) == straight["weights"]
    assert saved["iteration"] == 30
    metrics = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert without_seconds(metrics) == without_seconds(straight["metrics"])
    assert done.stderr.count("SIGKILL") >= 2 or done.stderr.count("exitcode: -9") >= 2, done.stderr
