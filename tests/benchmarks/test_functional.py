"""The benchmark of the functional engine: its contenders agree, and a wrong one is told."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks.functional import command
from benchmarks.functional.contenders import CONTENDERS, OURS, Problem, task_loop
from benchmarks.functional.networks import CASES


@pytest.mark.rotating
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_task_loops(name):
    case = replace(CASES[name], tasks=2, support=5, queries=5)
    expected = task_loop(Problem(case, torch.float64))()
    for contender in (OURS, "task loop"):
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


def test_the_table_has_a_line_for_each_contender(monkeypatch, capsys):
    small(monkeypatch)
    assert command.main(options(only=["siren"], threads=torch.get_num_threads())) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[12:24].strip() for line in lines] == list(CONTENDERS)
    assert not [line for line in lines if "WRONG" in line]
    assert lines[0].split()[3:5] == ["ms", "1.00"]


def test_a_wrong_gradient_is_told(monkeypatch, capsys):
    small(monkeypatch)

    def doubled(problem: Problem):
        step = task_loop(problem)
        return lambda: (step()[0], 2 * step()[1])

    monkeypatch.setitem(command.CONTENDERS, "adjoint", doubled)
    command.main(options(only=["siren"], threads=torch.get_num_threads()))
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(wrong) == 1
    assert "adjoint" in wrong[0]
    assert "relative error 1.0e+00" in wrong[0]
