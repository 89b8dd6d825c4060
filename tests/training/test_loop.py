"""Training from Python: every option counts, runs resume bit for bit, folders are guarded."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastmeta.data import Episodes, Sinusoid
from fastmeta.learners.metric.protonet import ProtoNet
from fastmeta.training import evaluation, sources
from fastmeta.training import loop as training
from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.config import TrainConfig, read_options
from fastmeta.training.learner_factory import build_learner
from fastmeta.training.loop import train
from fastmeta.training.metrics_log import read_metrics
from fastmeta.training.run_folder import load_run
from tests.helpers.runs import TINY, equal, images, maml, protonet, run, sinusoid, without_seconds


@pytest.fixture
def episodes(monkeypatch) -> list[tuple[torch.Size, int]]:
    """Shapes of the support and numbers of queries that a ProtoNet trains on."""
    seen = []
    meta_loss = ProtoNet.meta_loss

    def spy(self, support_x, support_y, query_x, query_y):
        seen.append((support_x.shape[:2], query_x.shape[1], int(support_y.max()) + 1))
        return meta_loss(self, support_x, support_y, query_x, query_y)

    monkeypatch.setattr(ProtoNet, "meta_loss", spy)
    return seen


# What a run leaves behind


def test_a_run_leaves_its_files_and_its_result(tmp_path):
    result = run(protonet(tmp_path / "new" / "run", iterations=3))
    files = {file.name for file in (tmp_path / "new" / "run").iterdir()}
    assert files == {"config.json", "checkpoint.pt", "metrics.jsonl", "curve.png"}
    assert (result.iteration, result.stopped) == (3, "finished")
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == result.metrics
    assert [list(m) for m in result.metrics] == [
        ["iteration", "loss", "accuracy", "lr", "seconds"]
    ] * 3
    assert [m["iteration"] for m in result.metrics] == [1, 2, 3]
    assert 0 < result.metrics[0]["seconds"] <= result.metrics[2]["seconds"]


def test_a_regression_run_logs_its_mean_squared_error(tmp_path):
    record = run(sinusoid(tmp_path, iterations=1)).metrics[0]
    assert record["mse"] == pytest.approx(record["loss"])
    assert "accuracy" not in record


def test_the_checkpoint_holds_what_training_needs(tmp_path):
    result = run(sinusoid(tmp_path))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert set(state) == {
        *("format", "config", "input_shape", "iteration", "seconds"),
        *("learner", "optimizer", "schedule", "rng"),
    }
    assert TrainConfig(**state["config"]) == result.config == TrainConfig(**read_options(tmp_path))


def test_a_learner_loads_as_it_was_trained(tmp_path):
    result = run(protonet(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = load_run(tmp_path / "b")
    assert loaded.iteration == 4
    state = loaded.learner.state_dict()
    assert all(torch.equal(state[k], v) for k, v in result.learner.state_dict().items())


def test_the_curve_tells_ways_apart_where_training_has_others(tmp_path):
    curve = run(protonet(tmp_path / "a", ways=3, train_ways=6)).curve
    assert (curve.training, curve.validation) == ("6-way training", "3-way validation")
    curve = run(protonet(tmp_path / "b")).curve
    assert (curve.label, curve.training) == ("ProtoNet on images", "training")


def test_training_learns(tmp_path):
    result = run(protonet(tmp_path, hidden=8, iterations=40, lr=0.01, train_ways=10))
    assert result.metrics[-1]["loss"] < 0.5 * result.metrics[0]["loss"]
    assert result.metrics[-1]["accuracy"] > 0.9


def test_the_process_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    run(sinusoid(tmp_path, threads=torch.get_num_threads() + 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == before[1:]


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", 0.01), ("lr_halve_every", 1), ("seed", 7), ("metric", "cosine"), ("iterations", 5)],
)
def test_protonet_options_change_the_weights(tmp_path, option, value):
    usual = run(protonet(tmp_path / "a"))
    changed = run(protonet(tmp_path / "b", **{option: value}))
    assert not equal(usual, changed)


@pytest.mark.rotating
@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 3), ("inner_lr", 0.1), ("first_order", True), ("learn_lr", True)],
)
@pytest.mark.parametrize("make", [sinusoid, maml])
def test_maml_options_change_the_weights(tmp_path, make, option, value):
    usual, changed = run(make(tmp_path / "a")), run(make(tmp_path / "b", **{option: value}))
    before, after = (dict(result.learner.module.named_parameters()) for result in (usual, changed))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_learned_step_sizes_move(tmp_path):
    fixed, learned = (run(sinusoid(tmp_path / str(flag), learn_lr=flag)) for flag in (False, True))
    assert torch.as_tensor(fixed.learner.lr).item() == pytest.approx(0.01)
    assert abs(learned.learner.lr.item() - 0.01) > 1e-4


def test_sizes_of_the_training_tasks(tmp_path, episodes):
    run(protonet(tmp_path, ways=3, shots=2, queries=4, meta_batch=5, iterations=2))
    assert episodes == [(torch.Size([5, 6]), 12, 3)] * 2


def test_train_ways_are_for_training_alone(tmp_path, episodes, monkeypatch):
    adapted = []
    adapt_tasks = ProtoNet.adapt_tasks

    def spy(self, support_x, support_y, **options):
        adapted.append(support_x.shape[1])
        return adapt_tasks(self, support_x, support_y, **options)

    monkeypatch.setattr(ProtoNet, "adapt_tasks", spy)
    run(protonet(tmp_path, ways=3, train_ways=8, eval_every=4, eval_tasks=5))
    assert episodes[0] == (torch.Size([2, 8]), 24, 8)
    assert set(adapted) == {3}


def test_hidden_is_the_width(tmp_path):
    for hidden in (4, 6):
        learner = build_learner(protonet(tmp_path, hidden=hidden), [1, 16, 16])
        assert next(learner.parameters()).shape[0] == hidden
        learner = build_learner(sinusoid(tmp_path, hidden=hidden), [1])
        assert sum(p.numel() for p in learner.parameters() if p.requires_grad) == (
            2 * hidden + hidden * (hidden + 1) + hidden + 1
        )


def test_the_learning_rate_halves(tmp_path):
    result = run(sinusoid(tmp_path, iterations=5, lr=0.08, lr_halve_every=2))
    assert [m["lr"] for m in result.metrics] == [0.08, 0.08, 0.04, 0.04, 0.02]


def test_threads_are_set_while_training(tmp_path, monkeypatch):
    seen = []
    sample = Sinusoid.sample
    monkeypatch.setattr(
        Sinusoid,
        "sample",
        lambda self, *sizes: (seen.append(torch.get_num_threads()), sample(self, *sizes))[1],
    )
    run(sinusoid(tmp_path, threads=3))
    assert set(seen) == {3}


def test_data_and_protocol_choose_the_source(tmp_path, monkeypatch):
    asked = []

    def from_spec(*spec, min_images):
        asked.append(spec)
        return images()

    monkeypatch.setattr(sources, "from_spec", from_spec)
    train(TrainConfig("protonet", "omniglot:x", str(tmp_path), protocol="paper", **TINY))
    assert asked == [("omniglot:x", "train", "paper")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_where_the_learner_is(tmp_path):
    result = run(protonet(tmp_path, device="cuda"))
    assert {p.device.type for p in result.learner.parameters()} == {"cuda"}


def test_checkpoints_come_as_often_as_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda _, state: saved.append(state))
    run(sinusoid(tmp_path, iterations=7, checkpoint_every=3))
    assert [state["iteration"] for state in saved] == [3, 6, 7]


def test_the_time_limit_ends_a_run_with_a_checkpoint(tmp_path):
    result = run(sinusoid(tmp_path, iterations=10**9, time_limit=0.5 / 60))
    assert result.stopped == "time limit"
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == result.iteration > 0
    resumed = run(sinusoid(tmp_path, iterations=result.iteration + 1), resume=True)
    assert resumed.iteration == result.iteration + 1


# Validation


def test_validation_comes_as_often_as_asked(tmp_path):
    result = run(protonet(tmp_path, eval_every=2, eval_tasks=5))
    validated = [m["iteration"] for m in result.metrics if "validation" in m]
    assert validated == [2, 4]
    assert all("validation_interval" in m for m in result.metrics if "validation" in m)


@pytest.mark.parametrize(("option", "value"), [("eval_tasks", 50), ("eval_steps", 5)])
def test_validation_options_change_its_score(tmp_path, option, value):
    options = {"eval_every": 4, "eval_tasks": 5}
    usual = run(sinusoid(tmp_path / "a", **options))
    changed = run(sinusoid(tmp_path / "b", **{**options, option: value}))
    assert equal(usual, changed)
    assert usual.metrics[-1]["validation"] != changed.metrics[-1]["validation"]


def test_validation_leaves_training_as_it_is(tmp_path):
    plain = run(sinusoid(tmp_path / "a"))
    assert equal(plain, run(sinusoid(tmp_path / "b", eval_every=1)))


def test_validation_classes_do_not_train():
    source = images(40)
    names = [f"alphabet/character{i:02d}" for i in range(10)]
    source.class_names = [f"{n}{turn}" for turn in ("", "@90", "@180", "@270") for n in names]
    kept, held_out = sources.hold_out(source, ways=2)
    characters = [{n.partition("@")[0] for n in part.class_names} for part in (kept, held_out)]
    assert [len(part) for part in characters] == [8, 2]
    assert not characters[0] & characters[1]
    assert (kept.num_classes, held_out.num_classes) == (32, 8)
    row = source.class_names.index(held_out.class_names[3])
    assert torch.equal(held_out.images[3], source.images[row])


def test_training_and_validation_draw_from_their_own_classes(tmp_path, monkeypatch):
    drawn = []

    class Spy(Episodes):
        def __init__(self, source, *sizes, **options):
            drawn.append(source.num_classes)
            super().__init__(source, *sizes, **options)

    for module in (training, evaluation):
        monkeypatch.setattr(module, "Episodes", Spy)
    run(protonet(tmp_path / "a", eval_every=2))
    run(protonet(tmp_path / "b"))
    assert drawn == [5, 35, 40]


@pytest.mark.parametrize(
    ("data", "protocol", "expected"),
    [
        ("glyphs", "official", ("validation",)),
        ("omniglot:x", "paper", ("x", "validation")),
        ("omniglot:x", "official", None),
        ("sinusoid", "official", None),
    ],
)
def test_the_data_s_own_validation_part_is_preferred(
    tmp_path, monkeypatch, data, protocol, expected
):
    for name in ("Glyphs", "Omniglot"):
        monkeypatch.setattr(sources, name, lambda *arguments: arguments)
    config = TrainConfig("maml", data, str(tmp_path), protocol=protocol)
    assert sources.validation_source(config) == expected


# Resuming


class Noisy(nn.Module):
    """An encoder whose training depends on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("make", [sinusoid, protonet, maml])
def test_a_resumed_run_is_the_same_run(tmp_path, make):
    options = {"lr_halve_every": 3, "eval_every": 4, "eval_tasks": 2}
    straight = run(make(tmp_path / "a", iterations=8, **options))
    run(make(tmp_path / "b", iterations=4, **options))
    resumed = run(make(tmp_path / "b", iterations=8, **options), resume=True)
    assert equal(straight, resumed)
    assert without_seconds(straight.metrics) == without_seconds(resumed.metrics)
    assert resumed.metrics[-1]["seconds"] >= resumed.metrics[3]["seconds"]


def test_a_resumed_run_draws_the_same_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "build_learner", lambda config, shape: ProtoNet(Noisy()))
    straight = run(protonet(tmp_path / "a", iterations=6))
    run(protonet(tmp_path / "b", iterations=3))
    resumed = run(protonet(tmp_path / "b", iterations=6), resume=True)
    assert equal(straight, resumed)
    assert without_seconds(straight.metrics) == without_seconds(resumed.metrics)


KILLED = """
import os, signal, sys
from fastmeta import cli
from fastmeta.training.metrics_log import MetricsLog

append = MetricsLog.append

def append_then_die(log, record):
    append(log, record)
    if record["iteration"] == 14:
        log._file.write('{"iteration": 15, "los')
        log._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

MetricsLog.append = append_then_die
cli.main(sys.argv[1:])
"""


@pytest.mark.rotating
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    straight = run(sinusoid(tmp_path / "a", iterations=20, checkpoint_every=10))
    command = "train maml --data sinusoid --hidden 4 --queries 3 --meta-batch 2 --iterations 20"
    command += f" --checkpoint-every 10 --out {tmp_path / 'b'}"
    killed = subprocess.run([sys.executable, "-c", KILLED, *command.split()], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "b" / "metrics.jsonl").read_text().endswith('{"iteration": 15, "los')
    assert load_checkpoint(tmp_path / "b" / "checkpoint.pt")["iteration"] == 10
    config = sinusoid(tmp_path / "b", iterations=20, checkpoint_every=10)
    resumed = train(config, resume=True)
    assert equal(straight, resumed)
    assert without_seconds(straight.metrics) == without_seconds(resumed.metrics)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    straight = run(sinusoid(tmp_path))
    (tmp_path / "checkpoint.pt").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iter')
    assert equal(straight, run(sinusoid(tmp_path), resume=True))
    with pytest.raises(ValueError, match="seed: the run to resume began with 0, got 1"):
        (tmp_path / "checkpoint.pt").unlink()
        run(sinusoid(tmp_path, seed=1), resume=True)


@pytest.mark.parametrize(
    "options",
    [{"shots": 3}, {"lr": 0.5}, {"seed": 1}, {"steps": 2}, {"learn_lr": True}, {"hidden": 5}],
)
def test_resuming_with_another_option_is_refused(tmp_path, options):
    run(sinusoid(tmp_path))
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}: the run to resume began with .*, got {value}"):
        run(sinusoid(tmp_path, **options), resume=True)


def test_resuming_may_change_how_far_and_where(tmp_path):
    run(sinusoid(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    options = {"iterations": 6, "checkpoint_every": 1, "time_limit": 1.0, "threads": 1}
    resumed = run(sinusoid(tmp_path / "b", **options), resume=True)
    assert resumed.iteration == 6
    assert read_options(tmp_path / "b")["iterations"] == 6
    with pytest.raises(ValueError, match="iterations: 6 are taken already, got 5"):
        run(sinusoid(tmp_path / "b", iterations=5), resume=True)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch, number):
    append = training.MetricsLog.append

    def signal_at_three(log, record):
        append(log, record)
        if record["iteration"] == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(training.MetricsLog, "append", signal_at_three)
    result = run(sinusoid(tmp_path, iterations=10))
    assert result.stopped == signal.Signals(number).name
    assert result.iteration == len(result.metrics) == 3
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 3
    assert (tmp_path / "curve.png").exists()


@pytest.fixture
def interruptible():
    """SIGINT as in a shell's foreground: programs in its background are started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_the_program(tmp_path, monkeypatch, interruptible):
    def signal_twice(log, record):
        # Two signals sent from outside may reach the process as one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.MetricsLog, "append", signal_twice)
    with pytest.raises(KeyboardInterrupt):
        run(sinusoid(tmp_path))


# Folders and failures


def test_a_run_is_not_overwritten_unless_asked(tmp_path):
    first = run(sinusoid(tmp_path))
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(sinusoid(tmp_path, seed=1))
    assert equal(first, load_run(tmp_path))
    (tmp_path / "eval.json").write_text("{}")
    second = run(sinusoid(tmp_path, seed=1, iterations=2), overwrite=True)
    assert [m["iteration"] for m in second.metrics] == [1, 2]
    assert read_options(tmp_path)["seed"] == 1
    assert not (tmp_path / "eval.json").exists()


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        run(sinusoid(tmp_path / "none"), resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        run(sinusoid(tmp_path), resume=True, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        run(sinusoid(tmp_path / "file"))


def test_bad_data_leave_no_folder_behind(tmp_path):
    with pytest.raises(ValueError, match="ways"):
        run(protonet(tmp_path / "run", ways=1000))
    assert not (tmp_path / "run").exists()


def test_a_diverged_loss_is_named_and_its_weights_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss became \w+ in iteration 2"):
        run(sinusoid(tmp_path, lr=1e30, checkpoint_every=1))
    assert load_run(tmp_path).iteration == 1
    assert all(tensor.isfinite().all() for tensor in load_run(tmp_path).learner.parameters())


def test_images_must_be_square(tmp_path):
    with pytest.raises(ValueError, match="expected square images, got 8 x 16"):
        build_learner(protonet(tmp_path), [1, 8, 16])
