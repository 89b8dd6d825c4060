"""The command line: ``python -m fastmeta train|eval|compare|info|demo``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastmeta import distributed
from fastmeta.core.checks import check_count
from fastmeta.ops._checks import METRICS
from fastmeta.training.allocator import keep_freed_memory
from fastmeta.training.config import (
    ALGORITHMS,
    OPTIMIZERS,
    POOLS,
    PRECISIONS,
    PROTOCOLS,
    TrainConfig,
    check_same_run,
    read_options,
)
from fastmeta.training.timing import duration

if TYPE_CHECKING:
    from fastmeta.training.loop import Result


_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line behind ``python -m fastmeta``; ``None``: this process's.

    Returns:
        The exit status: 0; 2 after an error of the user's, told in one line on stderr;
        128 + the signal's number where SIGINT or SIGTERM ended the training early, or where the
        reader of the output went away.
    """
    given = vars(_parser().parse_args(arguments))
    keep_freed_memory()
    command, debug = given.pop("command"), given.pop("debug")
    try:
        status = command(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader went away, as `head` does; what is left must not be flushed into its pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except _USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"{_name()}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastmeta: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmeta", description="Fast meta-learning for PyTorch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_compare(commands)
    _add_command(commands, "info", _info, "say what a bug report needs: versions, build, backends")
    demo = _add_command(commands, "demo", _demo, "meta-train twice, compare speed, in 2.5 minutes")
    demo.add_argument("--out", metavar="DIR", required=True, help="folder for runs and picture")
    demo.add_argument("--seconds", type=float, help="training time of each learner (45)")
    return parser


def _add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    """A subparser that keeps only the options given: the defaults stand where they are used."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    parser.add_argument("--debug", action="store_true", default=False, help="show tracebacks")
    return parser


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", _train, "meta-train a learner")
    parser.add_argument("algorithm", choices=ALGORITHMS)
    _add_common(parser, "run")
    proto = parser.add_argument_group("ProtoNet")
    proto.add_argument("--train-ways", type=int, metavar="N", help="ways in training (--ways)")
    proto.add_argument("--metric", choices=METRICS, help="distance (sqeuclidean)")
    _add_inner_loop(parser)


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    """The options that do not belong to some learners alone; ``what`` is in the folder."""
    parser.epilog = "In parentheses: what an option is when it is left out."
    run = parser.add_argument_group(what)
    run.add_argument("--out", metavar="DIR", required=True, help=f"folder of the {what}")
    run.add_argument("--resume", action="store_true", help=f"go on where the {what} in DIR stopped")
    run.add_argument("--overwrite", action="store_true", help=f"replace the {what} in DIR")
    run.add_argument("--iterations", type=int, metavar="I", help="outer steps (2000)")
    run.add_argument("--time-limit", type=float, metavar="MIN", help="stop after MIN minutes")
    run.add_argument(
        "--checkpoint-every", type=int, metavar="I", help="iterations in between (200)"
    )
    run.add_argument(
        "--eval-every", type=int, metavar="I", help="iterations in between; 0: none (0)"
    )
    run.add_argument("--eval-tasks", type=int, metavar="T", help="tasks of a validation (100)")
    run.add_argument("--seed", type=int, metavar="SEED", help="of weights and tasks (0)")
    run.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (cpu)")
    run.add_argument("--threads", type=int, metavar="THREADS", help="CPU threads")
    data = parser.add_argument_group("tasks")
    known = "omniglot:PATH, images:PATH or images:PATH@SIZE, glyphs, sinusoid"
    data.add_argument("--data", metavar="DATA", help=known)
    data.add_argument("--protocol", choices=PROTOCOLS, help="Omniglot split (official)")
    data.add_argument("--ways", type=int, metavar="N", help="classes a task (5)")
    data.add_argument(
        "--shots", type=int, metavar="K", help="support examples a class (1, sinusoid 10)"
    )
    data.add_argument("--queries", type=int, metavar="Q", help="queries a class (15, sinusoid 10)")
    usual = "tasks an iteration (ProtoNet 4, others 16, sinusoid 25)"
    data.add_argument("--meta-batch", type=int, metavar="T", help=usual)
    both = parser.add_argument_group("learner")
    both.add_argument(
        "--hidden", type=int, metavar="H", help="channels of Conv4 (64), units of the MLP (40)"
    )
    both.add_argument("--pool", choices=POOLS, help="how Conv4 halves images (max)")
    both.add_argument("--precision", choices=PRECISIONS, help="of training (float32)")
    usual = "of the outer loop (adam, Reptile sgd)"
    both.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help=usual)
    both.add_argument("--lr", type=float, metavar="LR", help="outer step size (adam 0.001, sgd 1)")
    both.add_argument("--lr-halve-every", type=int, metavar="I", help="iterations; 0: constant (0)")
    usual = "iterations over which the step size falls by a cosine; 0: none (MAML++, Reptile: all)"
    both.add_argument("--lr-cosine", type=int, metavar="I", help=usual)


def _add_inner_loop(parser: argparse.ArgumentParser) -> None:
    maml = parser.add_argument_group("MAML and its relatives")
    usual = "inner steps in training (1; FOMAML, ANIL, MAML++ and Reptile 5; iMAML 16)"
    maml.add_argument("--steps", type=int, metavar="K", help=usual)
    usual = "and in evaluation (--steps, Reptile 50)"
    maml.add_argument("--eval-steps", type=int, metavar="K", help=usual)
    usual = "inner step size (0.4; FOMAML, ANIL, MAML++, iMAML 0.1; sinusoid 0.01; Reptile 0.001)"
    maml.add_argument("--inner-lr", type=float, metavar="A", help=usual)
    learned = "MAML, FOMAML, ANIL: learn the inner step size"
    maml.add_argument("--learn-lr", action="store_true", help=learned)
    first = "MAML, ANIL, Meta-SGD, Meta-Curvature: leave second derivatives out"
    maml.add_argument("--first-order", action="store_true", help=first)
    usual = "Reptile: examples of an inner step in training (10)"
    maml.add_argument("--inner-batch", type=int, metavar="B", help=usual)
    usual = "MAML++: iterations until the last step's loss is alone (1000)"
    maml.add_argument("--multi-step-iterations", type=int, metavar="I", help=usual)
    usual = "MAML++: iterations of first order at the start (0)"
    maml.add_argument("--first-order-iterations", type=int, metavar="I", help=usual)
    usual = "iMAML: weight of the distance to the start (2)"
    maml.add_argument("--regularization", type=float, metavar="LAMBDA", help=usual)
    usual = "iMAML: iterations of conjugate gradients (5)"
    maml.add_argument("--cg-steps", type=int, metavar="N", help=usual)
    usual = "iMAML: added to the diagonal that they solve with (1)"
    maml.add_argument("--cg-damping", type=float, metavar="DELTA", help=usual)


def _add_eval(commands: Any) -> None:
    parser = _add_command(commands, "eval", _eval, "score a trained run on evaluation tasks")
    parser.add_argument("out", metavar="DIR", help="folder of the run")
    parser.add_argument("--tasks", type=int, metavar="T", help="number of tasks (600)")
    parser.add_argument("--ways", type=int, metavar="N", help="classes a task (as trained for)")
    parser.add_argument("--shots", type=int, metavar="K", help="support examples a class")
    parser.add_argument("--queries", type=int, metavar="Q", help="queries a class")
    parser.add_argument("--steps", type=int, metavar="K", help="all but ProtoNet: inner steps")
    parser.add_argument("--data", metavar="DATA", help="other data than trained on")
    parser.add_argument("--seed", type=int, metavar="SEED", help="of the tasks (0)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, ... (as trained on)")
    parser.add_argument("--threads", type=int, metavar="THREADS", help="CPU threads")


def _add_compare(commands: Any) -> None:
    summary = "meta-train learners on the same tasks, score them, draw a table and a picture"
    parser = _add_command(commands, "compare", _compare, summary)
    usual = f"{', '.join(ALGORITHMS)} (all that the data allow)"
    parser.add_argument(
        "--algorithms", nargs="+", choices=ALGORITHMS, metavar="ALGORITHM", help=usual
    )
    usual = "an option of one learner, such as maml.steps=2 or maml.learn_lr=true; repeatable"
    parser.add_argument("--set", action="append", metavar="ALGORITHM.OPTION=VALUE", help=usual)
    usual = "compare the runs in these folders instead, and train nothing"
    parser.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help=usual)
    parser.add_argument("--tasks", type=int, metavar="T", help="evaluation tasks (600)")
    _add_common(parser, "comparison")


def _train(given: dict[str, Any]) -> int:
    from fastmeta.training.loop import train

    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    with distributed.process_group():
        if resume:
            begun = distributed.on_rank_zero(lambda: read_options(Path(given["out"])))
            check_same_run(given, begun)
            given = begun | given
        _need_data(given)
        distributed.select_device(given.get("device", "cpu"))
        result = train(TrainConfig(**given), resume=resume, overwrite=overwrite)
        if distributed.rank() == 0:
            print(_summary(result))
    if result.stopped.startswith("SIG"):
        return 128 + signal.Signals[result.stopped]
    return 0


def _summary(result: Result) -> str:
    config, last = result.config, result.metrics[-100:]
    head = f"{config.title}: {result.iteration:,} of {config.iterations:,} iterations"
    head += f" in {duration(result.seconds)}"
    if result.stopped != "finished":
        head += f", stopped by {result.stopped.replace('time', 'the time')}"
    lines = [f"{head}."]
    if last:
        mean = sum(record[config.score] for record in last) / len(last)
        score = f"MSE {mean:.3f}" if config.regression else f"accuracy {100 * mean:.2f} %"
        lines.append(f"Training {score}, mean of the last {len(last)}; see {config.out}/curve.png.")
    if result.iteration < config.iterations:
        again = f"python -m fastmeta train {config.algorithm} --out {config.out} --resume"
        lines.append(f"Go on with: {again}")
    else:
        lines.append(f"Evaluate with: python -m fastmeta eval {config.out}")
    return "\n".join(lines)


def _eval(given: dict[str, Any]) -> int:
    from fastmeta.training.evaluation import evaluate_run

    _need_one_process("eval")
    _set_threads(given)
    print(evaluate_run(Path(given.pop("out")), **given))
    return 0


def _set_threads(given: dict[str, Any]) -> None:
    if "threads" in given:
        torch.set_num_threads(check_count("threads", given.pop("threads"), least=1))


def _compare(given: dict[str, Any]) -> int:
    from fastmeta.training.compare import compare, compare_runs
    from fastmeta.training.compare.report import PICTURE, TABLE

    _need_one_process("compare")
    out = Path(given.pop("out"))
    how: dict[str, Any] = {
        name: given.pop(name) for name in ("tasks", "overwrite") if name in given
    }
    how["report"] = partial(print, flush=True)
    if "runs" in given:
        if wrong := sorted(set(given) - {"runs", "queries", "device", "threads"}):
            raise ValueError(f"{wrong[0]}: the runs in --runs are there, and not trained")
        _set_threads(given)
        comparison = compare_runs(given.pop("runs"), out, **how, **given)
    else:
        resume = given.pop("resume", False)
        comparison = compare(_planned(out, resume, given), out, resume=resume, **how)
    print(f"\n{comparison.table()}\n\nTable and commands: {out}/{TABLE}, picture: {out}/{PICTURE}")
    if number := comparison.stopped_by:
        again = f"python -m fastmeta compare --out {out} --resume"
        print(f"Stopped by {number.name}. Go on with: {again}")
        return 128 + number
    return 2 if any(entry.error for entry in comparison.entries) else 0


def _planned(out: Path, resume: bool, given: dict[str, Any]) -> list[TrainConfig]:
    """The configs of a comparison's learners; one that goes on needs no options."""
    from fastmeta.training.compare.plan import parse_setting, plan, resumed_plan

    own: dict[str, dict[str, Any]] = {}
    for algorithm, option, value in map(parse_setting, given.pop("set", [])):
        own.setdefault(algorithm, {})[option] = value
    if not resume:
        _need_data(given)
    return (resumed_plan if resume else plan)(out, own=own, **given)


def _need_data(given: dict[str, Any]) -> None:
    if "data" not in given:
        raise ValueError("data: give --data omniglot:PATH, images:PATH, glyphs or sinusoid")


def _need_one_process(command: str) -> None:
    if distributed.launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError(f"{command} runs in one process, without torchrun; train takes several")


def _name() -> str:
    """Who speaks: which rank, where the program is one of several."""
    return f"fastmeta, rank {os.environ['RANK']}" if distributed.launched() else "fastmeta"


def _info(_: dict[str, Any]) -> int:
    from fastmeta.cli.info import report

    print(report())
    return 0


def _demo(given: dict[str, Any]) -> int:
    from fastmeta.cli.demo import demo

    _need_one_process("demo")
    demo(Path(given.pop("out")), **given)
    return 0


def _one_line(error: BaseException) -> str:
    """The message without line breaks; a missing module's with the way to get it."""
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and "pip install" not in message:
        message += "; pip install 'fastmeta[train]'"
    return message or type(error).__name__
