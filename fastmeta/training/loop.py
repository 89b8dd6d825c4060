"""Meta-training: episodes in, checkpoints, metrics and a learning curve out."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from tqdm import tqdm

from fastmeta import distributed
from fastmeta.data import Episode, Episodes, Source
from fastmeta.learners.schedules import cosine_schedule
from fastmeta.training.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from fastmeta.training.config import TrainConfig, check_same_run, read_options
from fastmeta.training.environment import cpu_threads, training_environment
from fastmeta.training.evaluation import Evaluator, query_scores
from fastmeta.training.interruption import Interruption
from fastmeta.training.learner_factory import Learner, build_learner
from fastmeta.training.learner_options import METRIC_LEARNERS
from fastmeta.training.metrics_log import MetricsLog, read_metrics
from fastmeta.training.plots import Curve, draw_curves
from fastmeta.training.run_folder import (
    CHECKPOINT,
    CURVE,
    METRICS,
    begin_folder,
    check_folder,
    was_started_by,
)
from fastmeta.training.sources import training_sources

__all__ = ["Result", "TrainConfig", "train"]

_SMALL = 2**18  # parameters up to which one thread takes the optimizer's step fastest


@dataclass(frozen=True)
class Result:
    """Outcome of a training run.

    Attributes:
        config: options of the run.
        learner: the trained :class:`fastmeta.ProtoNet`, :class:`fastmeta.MAML` or relative of it.
        iteration: outer steps taken, summed over all sessions.
        seconds: training time, summed over all sessions.
        stopped: ``"finished"``, ``"time limit"``, ``"SIGINT"`` or ``"SIGTERM"``.
        metrics: records of the log, one per iteration.
    """

    config: TrainConfig
    learner: Learner
    iteration: int
    seconds: float
    stopped: str
    metrics: list[dict[str, Any]]

    @property
    def curve(self) -> Curve:
        """Learning curve; its legend names the ways if training and validation differ in them."""
        ways, train_ways = self.config.ways, self.config.train_ways
        if train_ways in (None, ways):
            return Curve(self.config.title, self.metrics)
        return Curve(
            self.config.title,
            self.metrics,
            training=f"{train_ways}-way training",
            validation=f"{ways}-way validation",
        )


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    source: Source | None = None,
) -> Result:
    """Meta-train a learner and leave the run in the folder ``config.out``.

    The folder holds ``config.json``; ``metrics.jsonl`` with a line per iteration; the checkpoint
    ``checkpoint.pt``; and at the end ``curve.png``. The run resumes from its checkpoint bit for
    bit; on a GPU, as far as PyTorch's own kernels are deterministic. A killed run loses only the
    work since its last checkpoint. SIGINT, SIGTERM and the time limit end it with a checkpoint.
    The caller's random state, thread count and signal handlers are restored.

    Under torchrun, every process trains its share of each meta-batch. The result equals the result
    of one process up to rounding. Only rank 0 writes. Processes that torchrun restarts continue
    from the checkpoint.

    Args:
        config: options of the run.
        resume: continue from the checkpoint in the folder, or from the start if it has none yet.
        overwrite: replace the run in the folder.
        source: your own images to draw training tasks from, instead of ``config.data``.

    Raises:
        FileNotFoundError: the data are missing, or there is nothing to resume.
        FileExistsError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is given.
        FloatingPointError: the loss is not finite.
        ValueError: options contradict each other, the data, or the run to resume; or there are
            fewer tasks than processes.
        ConnectionError: another process of the training has ended.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp()
        >>> result = train(TrainConfig("maml", "sinusoid", out, hidden=8, iterations=3))
        >>> result.iteration, result.stopped
        (3, 'finished')
    """
    with distributed.process_group():
        _check_share(config)
        stop = Interruption(config.time_limit)
        out, launch = Path(config.out), distributed.launch_id()
        resume = distributed.on_rank_zero(lambda: _resolve_resume(out, resume, overwrite, launch))
        with stop.listening(), training_environment(config):
            training, validator = training_sources(config, source)
            episodes = Episodes(
                training,
                config.train_ways or config.ways,
                config.shots,
                config.queries,
                config.meta_batch,
                config.seed,
                config.device,
            )
            run = _Run(config, list(episodes[0].support_x.shape[2:]))
            if resume:
                run.restore(distributed.on_rank_zero(lambda: _saved_state(config)))
            distributed.on_rank_zero(lambda: begin_folder(config, resume, launch))
            stopped = _loop(run, episodes, validator, stop)
        metrics = distributed.on_rank_zero(lambda: read_metrics(out / METRICS))
        result = Result(config, run.learner, run.iteration, run.seconds, stopped, metrics)
        distributed.on_rank_zero(lambda: draw_curves(out / CURVE, [result.curve], config.score))
    return result


def _check_share(config: TrainConfig) -> None:
    if config.meta_batch < (size := distributed.world_size()):
        raise ValueError(
            f"meta_batch: expected at least one task for each of {size} processes, "
            f"got {config.meta_batch}"
        )
    distributed.select_device(config.device)


def _resolve_resume(out: Path, resume: bool, overwrite: bool, launch: str) -> bool:
    """Whether the run resumes: always after a restart by torchrun, else if asked to."""
    if was_started_by(out, launch):
        return True
    check_folder(out, resume, overwrite)
    return resume


def _saved_state(config: TrainConfig) -> dict[str, Any] | None:
    """Checkpoint to resume from; None if the run was killed before it wrote one.

    Raises:
        ValueError: it is of another run, has more iterations, or is damaged.
    """
    out, options = Path(config.out), dataclasses.asdict(config)
    if not (out / CHECKPOINT).exists():
        check_same_run(options, read_options(out))
        return None
    state = load_checkpoint(out / CHECKPOINT)
    check_same_run(options, state["config"])
    taken = state["iteration"]
    if taken > config.iterations:
        raise ValueError(f"iterations: {taken} are taken already, got {config.iterations}")
    return state


class _Run:
    """Everything that changes during the training, with methods to save and restore it."""

    def __init__(self, config: TrainConfig, input_shape: list[int]) -> None:
        self.config = config
        self.input_shape = input_shape
        self.iteration = 0
        self.seconds = 0.0
        self.learner = build_learner(config, input_shape)
        if config.algorithm in METRIC_LEARNERS and distributed.world_size() > 1:
            distributed.share_batch_statistics(self.learner)
        self.autocast = torch.autocast(
            torch.device(config.device).type,
            dtype=torch.bfloat16,
            enabled=config.precision == "bfloat16",
        )
        self.parameters = list(self.learner.parameters())
        rule = getattr(self.learner, "rule", None)
        self.memory = nn.Module() if rule is None else rule  # buffers of the inner rule
        self.small = sum(parameter.numel() for parameter in self.parameters) <= _SMALL
        # Fused takes half as long on a small network. A checkpoint keeps the form it was made with.
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        self.optimizer = kind(self.parameters, lr=config.lr, fused=True)
        self.schedule = _schedule(self.optimizer, config)

    def step(self, episode: Episode, stop: Interruption) -> dict[str, Any]:
        """Take one outer step and return its record for the log."""
        for parameter in self.parameters:  # optimizer.zero_grad() takes 10 times as long
            parameter.grad = None
        weight = distributed.task_weight(len(episode.support_x))
        episode = distributed.split_tasks(episode)
        with self.autocast:
            loss, logits = self.learner.meta_loss(*episode)
        (loss if weight == 1 else weight * loss).backward()
        found = weight * loss.item(), weight * query_scores(logits, episode.query_y).mean().item()
        value, score, *votes = distributed.average_gradients(
            self.parameters, [*found, *stop.votes()]
        )
        distributed.average_buffers(self.memory, weight)
        stop.count(votes)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss became {value} in iteration {self.iteration + 1}; "
                "a smaller lr or inner_lr may help"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        # A fused optimizer wakes all threads for every tensor, which takes longer than the step.
        with cpu_threads(1 if self.small else None):
            self.optimizer.step()
        self.schedule.step()
        self.iteration += 1
        return {"iteration": self.iteration, "loss": value, self.config.score: score, "lr": lr}

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "config": dataclasses.asdict(self.config),
            "input_shape": self.input_shape,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": rng_state(torch.device(self.config.device)),
        }
        save_checkpoint(Path(self.config.out) / CHECKPOINT, state)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore the state of a checkpoint; None leaves the run at its start."""
        if state is None:
            return
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_rng_state(state["rng"], torch.device(self.config.device))


def _schedule(optimizer: Optimizer, config: TrainConfig) -> LRScheduler:
    if config.lr_cosine:
        return cosine_schedule(optimizer, config.lr_cosine)
    return StepLR(optimizer, step_size=config.lr_halve_every or 2**62, gamma=0.5)


def _loop(run: _Run, episodes: Episodes, validator: Evaluator | None, stop: Interruption) -> str:
    config = run.config
    begun = time.monotonic() - run.seconds
    writes = distributed.rank() == 0
    logging = MetricsLog(Path(config.out) / METRICS, run.iteration) if writes else nullcontext()
    total = config.iterations if config.time_limit is None else None
    quiet = None if writes else True
    bar = tqdm(desc=config.title, total=total, initial=run.iteration, disable=quiet)
    stopped = ""
    with logging as log, bar:
        while run.iteration < config.iterations and not (stopped := stop.reason()):
            record = run.step(episodes[run.iteration], stop)
            if validator and run.iteration % config.eval_every == 0:
                found = validator(run.learner, config.eval_steps)
                record |= {"validation": found.mean, "validation_interval": found.interval}
            run.seconds = time.monotonic() - begun
            if log:
                log.append(record | {"seconds": round(run.seconds, 3)})
            bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            bar.update()
            if run.iteration % config.checkpoint_every == 0:
                _save(run, log)
        _save(run, log)
    return stopped or "finished"


def _save(run: _Run, log: MetricsLog | None) -> None:
    """Write log and checkpoint to disk, on the rank that has the log."""
    if log:
        log.sync()
        run.save()
