"""The benchmark of the functional engine: its contenders agree, and a wrong one is told."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.functional import command
from benchmarks.functional.contenders import CONTENDERS, LEAST_MEMORY, OURS, Problem, task_loop
from benchmarks.functional.networks import CASES


@pytest.mark.rotating
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_task_loops(name):
    case = replace(CASES[name], tasks=2, support=5, queries=5)
    expected = task_loop(Problem(case, torch.float64))()
    for contender in (OURS, LEAST_MEMORY):
        loss, grads = CONTENDERS[contender](Problem(case, torch.float64))()
        assert command.relative_error(grads, expected[1]) < command.MOST
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-10)


def options(**more: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args(["--rounds", "2"])), **more})


def small(monkeypatch) -> None:
    case = replace(CASES["siren"], tasks=2, support=5, queries=5)
    monkeypatch.setitem(command.CASES, "siren", case)


def cells(capsys) -> list[str]:
    """Of the last row that was printed."""
    return [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]


def test_the_row_has_a_cell_for_each_contender(monkeypatch, capsys):
    small(monkeypatch)
    assert command.main(options(only=["siren"], threads=torch.get_num_threads())) == 0
    name, ours, *others, fastest = cells(capsys)
    assert name == "siren"
    number = r"[\d,.]+"
    assert re.fullmatch(rf"{number} \w+, {number} MiB", ours)
    times = [re.fullmatch(rf"{number} \w+ \(([\d.]+)\), {number} MiB", cell) for cell in others]
    assert len(times) == len(CONTENDERS) - 1
    assert min(float(t.group(1)) for t in times[1:] if t) == float(fastest)


def test_contenders_may_be_left_out(monkeypatch, capsys):
    small(monkeypatch)
    chosen = options(only=["siren"], threads=torch.get_num_threads(), beside=["task loop"])
    assert command.main(chosen) == 0
    _name, _ours, *others, fastest = cells(capsys)
    assert [bool(cell) for cell in others] == [False] * (len(CONTENDERS) - 2) + [True]
    assert float(fastest) > 0


def test_the_command_line_changes_a_case():
    case = command.changed(CASES["mish"], options(tasks=64, steps=5))
    assert (case.tasks, case.steps) == (64, 5)
    assert command.changed(CASES["mish"], options()) == CASES["mish"]


def doubled(problem: Problem):
    step = task_loop(problem)
    return lambda: (step()[0], 2 * step()[1])


@pytest.mark.parametrize(("name", "status"), [("adjoint", 0), (OURS, 1)])
def test_a_wrong_gradient_is_told(name, status, monkeypatch, capsys):
    small(monkeypatch)
    monkeypatch.setitem(command.CONTENDERS, name, doubled)
    assert command.main(options(only=["siren"], threads=torch.get_num_threads())) == status
    wrong = [i for i, cell in enumerate(cells(capsys)) if "WRONG: relative error 1.0e+00" in cell]
    assert wrong == [command.COLUMNS.index(name)]


def test_a_wrong_contender_is_not_the_fastest(monkeypatch):
    small(monkeypatch)
    errors = dict.fromkeys(CONTENDERS, 0.0)
    monkeypatch.setitem(command.CONTENDERS, "adjoint", lambda _: lambda: None)  # takes no time
    case = command.CASES["siren"]
    assert float(command.row("siren", case, 2, errors)[-1]) < 0.1
    assert float(command.row("siren", case, 2, {**errors, "adjoint": 1.0})[-1]) > 0.1


def test_the_profile_shows_the_largest_shares(monkeypatch, capsys):
    small(monkeypatch)
    assert command.main(options(only=["siren"], profile=True)) == 0
    name, shares = cells(capsys)
    assert name == "siren"
    percents = [int(share) for share in re.findall(r"\w+ (\d+) %", shares)]
    assert len(percents) == command.MOST_SHOWN
    assert percents == sorted(percents, reverse=True) and sum(percents) <= 100
