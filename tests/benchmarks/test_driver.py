"""The driver of the peers' benchmark: processes, comparison, turns."""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
import pytest

from benchmarks.common.timers import Spread
from benchmarks.common.workloads import WORKLOADS, draw
from benchmarks.peers import driver, process
from benchmarks.peers.contenders import CONTENDERS, MATRIX, OURS, contenders_for
from benchmarks.peers.driver import Race, Turns, calls_per_turn, compared, disagreement, measure
from benchmarks.peers.process import Process, Unable
from benchmarks.peers.step import Problem
from benchmarks.peers.worker import timed
from fastmeta.training.timing import ratio
from tests.benchmarks import fake_peers
from tests.benchmarks.fake_peers import contender

SIN1 = WORKLOADS["sin1"]
GRADIENT = {"loss": np.array(1.0), "gradient": np.array([3.0, 4.0])}


class Fake:
    """A worker without a process: a step takes `seconds`; `log` gets every turn it takes."""

    def __init__(self, name, log, seconds=0.1, result=GRADIENT, fails_in="", after=0):
        self.name, self.log, self.seconds, self.result = name, log, seconds, result
        self.fails_in, self.left, self.closed = fails_in, after, False

    def _maybe_fail(self, what):
        if self.fails_in == what:
            if self.left == 0:
                status = "missing" if what == "prepare" else "failed"
                raise Unable(status, f"{what} went wrong")
            self.left -= 1

    def prepare(self):
        self._maybe_fail("prepare")
        return {"facts": {"library": "1.0"}, "flops": None}

    def check(self):
        return self.result

    def time(self, calls):
        self._maybe_fail("time")
        self.log.append(self.name)
        return self.seconds * calls

    def close(self):
        self.closed = True


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(driver, "SETTLE", 0.0)


def raced(fakes, rounds=3):
    """The rows of a run of these fakes by name, with a matrix product of 1 s among them."""
    contenders = [contender(name) for name in fakes]
    workers = {"reference": Fake("reference", []), MATRIX.name: Fake("matrix", [], 1.0), **fakes}
    said = []
    result = measure(SIN1, contenders, lambda c: workers[c.name], rounds, said.append)
    assert len(said) == 1 + len(fakes)
    assert all(worker.closed for worker in workers.values())
    return result["contenders"]


# Turns


def test_rounds_go_a_b_c_a_b_c(no_pause):
    log = []
    raced({name: Fake(name, log) for name in "abc"}, rounds=4)
    assert log[-12:] == list("abc") * 4


def test_ratios_are_medians_over_rounds_to_fastmeta(no_pause):
    log = []
    rows = raced({OURS: Fake(OURS, log, 0.1), "slow": Fake("slow", log, 0.35)})
    assert rows["slow"]["ratio"] == pytest.approx(3.5) and rows[OURS]["ratio"] == 1
    assert rows["slow"]["seconds"] == Spread.of([0.35] * 3).as_dict()
    assert rows["slow"]["flops_per_second"] == pytest.approx(SIN1.flops / 0.35)
    assert rows["slow"]["of_peak"] == pytest.approx(1 / 0.35)
    assert "ratio" not in rows[MATRIX.name]


def test_without_fastmeta_there_are_times_but_no_ratios(no_pause):
    rows = raced({"other": Fake("other", [])})
    assert rows["other"]["status"] == "measured" and "ratio" not in rows["other"]


@pytest.mark.parametrize(
    "fake, status, reason",
    [
        ({"fails_in": "prepare"}, "missing", "prepare went wrong"),
        ({"fails_in": "time"}, "failed", "time went wrong"),
        ({"fails_in": "time", "after": 2}, "failed", "time went wrong"),  # in the second round
        ({"result": {**GRADIENT, "loss": np.array(1.1)}}, "differs", "by 1.0e-01, allowed is"),
        ({"result": {**GRADIENT, "gradient": np.array([3.0])}}, "differs", "by inf"),
        ({"result": {**GRADIENT, "loss": np.array(math.nan)}}, "differs", "by nan"),
    ],
)
def test_one_that_fails_differs_or_is_missing_says_so_and_costs_the_others_nothing(
    fake, status, reason, no_pause
):
    rows = raced({OURS: Fake(OURS, []), "odd": Fake("odd", [], **fake), "last": Fake("last", [])})
    assert rows["odd"]["status"] == status and reason in rows["odd"]["reason"]
    assert "ratio" not in rows["odd"] and "seconds" not in rows["odd"]
    assert rows["last"]["ratio"] == 1


def test_a_slow_one_stops_after_fewer_rounds_and_is_compared_with_the_same_ones(no_pause):
    ours, slow = Turns(Fake(OURS, [], 0.1), 20), Turns(Fake("slow", [], 40.0), 20)
    assert (ours.rounds, slow.rounds) == (20, driver.FEWEST)
    ours.seconds, slow.seconds = [1.0, 2.0, 4.0, 100.0], [2.0, 4.0, 8.0]
    assert driver.ratio_of(slow, ours) == ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 2


def test_a_workload_without_a_reference_says_so():
    result = measure(
        SIN1, [], lambda c: Fake("reference", [], fails_in="prepare"), 3, lambda line: None
    )
    assert result["reason"] == "no reference: prepare went wrong" and not result["contenders"]


@pytest.mark.parametrize("seconds, calls", [(1e-5, 20_000), (0.1, 2), (3.0, 1)])
def test_a_turn_takes_about_its_time(seconds, calls):
    found = calls_per_turn(Fake("a", [], seconds))
    assert found == (calls, pytest.approx(seconds))


def test_an_interrupted_race_leaves_no_worker_behind():
    class Interrupted(Fake):
        def check(self):
            raise KeyboardInterrupt

    workers = {"reference": Fake("reference", []), MATRIX.name: Fake("m", []), "a": Fake("a", [])}
    workers["b"] = Interrupted("b", [])
    with pytest.raises(KeyboardInterrupt):
        measure(SIN1, [contender("a"), contender("b")], lambda c: workers[c.name], 2, str)
    assert all(worker.closed for worker in workers.values())


def test_the_largest_error_counts():
    found = {"loss": np.array(1.0), "gradient": np.array([3.0, 4.5])}
    assert disagreement(found, GRADIENT) == pytest.approx(0.1)
    assert disagreement(GRADIENT, GRADIENT) == 0


def test_a_row_of_what_differs_takes_no_turns():
    expected, found = ({"loss": np.array(value)} for value in (1.0, 2.0))
    race = Race(lambda c: Fake(c.name, [], result=found), expected, 3)
    with ExitStack() as stack:
        assert race.enter(contender("a"), stack)["error"] == 1
    assert not race.taking


@pytest.mark.parametrize("rounding, status", [(0.24, "differs"), (0.26, "agrees")])
def test_four_times_the_rounding_of_the_plainest_way_is_no_difference(rounding, status):
    expected, found = ({"loss": np.array(value)} for value in (1.0, 2.0))
    worker = Fake("a", [], result=found)
    assert compared(contender("a"), worker, expected, rounding)["status"] == status


# Processes


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "ENVIRONMENT", tmp_path / "none")
    np.savez(tmp_path / "data.npz", **draw(SIN1))
    begun = []

    def begin(name, limit=30.0):
        begun.append(Process(contender(name), "sin1", tmp_path, "cpu", 1, limit))
        return begun[-1]

    yield begin
    for worker in begun:
        worker.close()


def test_a_process_prepares_checks_and_times(start):
    worker = start("right")
    assert worker.prepare() == {"facts": {"numpy": np.__version__}, "flops": None}
    assert np.array_equal(worker.check()["gradient"], draw(SIN1)["theta"] * 2)
    assert 0 < worker.time(10) < 1


@pytest.mark.parametrize(
    "name, status, reason",
    [
        ("absent", "missing", "its device is not on this machine"),
        ("unimportable", "missing", "No module named 'a_library_that_is_nowhere'"),
        ("broken", "failed", "RuntimeError: no such layer"),
        ("dying", "failed", "its process ended with 7: last words"),
    ],
)
def test_a_process_says_why_it_cannot(name, status, reason, start):
    with pytest.raises(Unable) as caught:
        start(name).prepare()
    assert (caught.value.status, str(caught.value)) == (status, reason)


def test_a_process_that_hangs_is_ended(start):
    with pytest.raises(Unable, match="prepare took more than 2 s"):
        start("hanging", limit=2.0).prepare()


def test_only_steps_that_are_repeated_are_warmed_up():
    step = fake_peers.right(Problem(SIN1, draw(SIN1)))
    calls = []
    counted = type(step)(run=lambda: calls.append(1), read=step.read)
    timed(counted, 1)
    assert len(calls) == 1
    timed(counted, 3)
    assert len(calls) == 1 + 4


# The table


def test_names_are_unique_for_each_kind():
    names = [(c.name, c.kind) for c in CONTENDERS]
    assert len(set(names)) == len(names)


def test_peers_are_chosen_by_name_and_fastmeta_is_always_there():
    assert [c.name for c in contenders_for("meta", "cpu", ["jax"])] == [OURS, "jax"]
    assert len(contenders_for("hvp", "cpu")) == sum(c.kind == "hvp" for c in CONTENDERS)


def test_on_cuda_all_but_jax_come_in_a_graph_too():
    names = [c.name for c in contenders_for("meta", "cuda", ["higher", "jax"])]
    assert names == [OURS, f"{OURS}-graph", "higher", "higher-graph", "jax"]
    own = f"{OURS}-replay"
    found = [[c.name for c in contenders_for("meta", device)] for device in ("cpu", "cuda")]
    assert own not in found[0]
    assert own in found[1] and f"{own}-graph" not in found[1]
