"""The outcomes of `make gpu`, and the results that are kept and shown."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import machine, outcomes, results
from benchmarks.gpu.runner import run_steps, write_json
from benchmarks.peers.results import NOTHING, PAGE, between
from tests.benchmarks.gpu.stub_steps import FAIL, PASS, stub

# Outcomes


@pytest.mark.parametrize(
    "code, output, status, found",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed", {"errors": 0}),
        (9, "========= ERROR SUMMARY: 12 errors", "failed", {"errors": 12}),
        (1, "========= ERROR SUMMARY: 0 errors", "failed", {"errors": 0}),
        (
            *(0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
            *("passed", {"errors": 0}),
        ),
        (
            *(9, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
            *("failed", {"errors": 2}),
        ),
        (
            *(1, "========= Error: Device not supported. Please refer to the documentation"),
            *("not available", {"reason": "Device not supported"}),
        ),
        (255, "========= Error: couldn't find exit code.", "failed", {"exit_code": 255}),
        (0, "", "failed", {"reason": "it printed no summary"}),
    ],
)
def test_what_a_sanitizer_found(code, output, status, found):
    outcome = outcomes.of_sanitizer(code, f"208 calls on cuda, 0 wrong results\n{output}\n")
    assert outcome.status == status
    assert found.items() <= outcome.summary.items()


def test_counts_of_tests_are_those_of_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
    )
    junit = tmp_path / "tests.xml"
    command = machine.python("-m", "pytest", "-q", "-c", "/dev/null", f"--junitxml={junit}")
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    outcome = outcomes.of_tests(junit)(run.returncode, run.stdout)
    assert outcome.status == "failed"
    counts = {"tests": 3, "passed": 1, "failures": 1, "skipped": 1, "errors": 0}
    assert counts.items() <= outcome.summary.items()
    assert outcome.summary["first_failures"] == ["test_it::test_b"]


def test_tests_that_leave_no_results_or_run_none_have_failed(tmp_path):
    junit = tmp_path / "tests.xml"
    assert outcomes.of_tests(junit)(4, "").status == "failed"
    empty = '<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0"/></testsuites>'
    junit.write_text(empty)
    assert outcomes.of_tests(junit)(0, "").status == "failed"


def test_benchmarks_that_were_stopped_keep_their_rows(tmp_path):
    measured = tmp_path / "ops.json"
    assert outcomes.of_benchmarks(measured)(1, "").summary["rows"] == []
    write_json(measured, {"ceilings": {"copy": 1.0}, "rows": [{"op": "x"}]})
    code = "import time; time.sleep(60)"
    step = stub("benchmarks", code, share=0.5, read=outcomes.of_benchmarks(measured))
    found = run_steps([step], tmp_path, {}, 1.0)["steps"]["benchmarks"]
    assert found["status"] == "timed out" and found["rows"] == [{"op": "x"}]


def test_whether_all_kernels_ran():
    assert outcomes.of_kernels(0, "a\n14 kernels\n").summary["reason"] == "14 kernels"
    assert outcomes.of_kernels(1, "not launched: a_kernel").status == "failed"
    unseen = outcomes.of_kernels(outcomes.NOT_AVAILABLE, "the profiler recorded no kernel")
    assert unseen.status == "not available"


# Kept results


def small_row(seconds: float, **options) -> dict:
    return {
        **{"op": "prototype_loss", "workload": "proto_small, T = 1", "what": "forward"},
        **{"dtype": "float32", "how": "graph of 20", "ratios": {"composition": 3.0}},
        **{"seconds": {"fastmeta": {"median": seconds}}, **options},
    }


def test_a_whole_run_is_kept_and_shown(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    rows = json.dumps({"ceilings": {}, "rows": [small_row(12.34e-6)]})
    measure = f"open({str(out / 'ops.json')!r}, 'w').write({rows!r}); print('12.3 us')"
    stubs = [
        stub("build", PASS, needed=True),
        stub("memcheck", PASS, missing="compute-sanitizer was not found"),
        stub(
            "benchmarks",
            measure,
            output="ops.txt",
            read=outcomes.of_benchmarks(out / "ops.json"),
        ),
    ]
    monkeypatch.setattr(driver.machine, "unfit", lambda: "")
    facts = {"gpu": "NVIDIA H200", "capability": "9.0"}
    monkeypatch.setattr(driver.machine, "describe", lambda: facts)
    monkeypatch.setattr(driver, "all_steps", lambda *_: stubs)
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert driver.main() == 0
    assert "not available (compute-sanitizer was not found)" in capsys.readouterr().out
    kept = results.keep(out, tmp_path / "results")
    assert kept.name == "nvidia-h200"
    assert sorted(p.name for p in kept.iterdir()) == ["ops.txt", "report.json"]
    assert (kept / "ops.txt").read_text() == "12.3 us\n"
    lines = results.table(results.committed(tmp_path / "results")).splitlines()
    assert lines[0] == "| workload | aim | NVIDIA H200 |"
    assert lines[2].endswith("a call in a CUDA graph | at most 15 us | 12.3 us |")
    assert lines[3].endswith("| | |")


def test_a_run_that_failed_is_not_kept(tmp_path):
    run_steps([stub("a", FAIL)], tmp_path, {"gpu": "x"}, 20)
    with pytest.raises(ValueError, match="expected a run in which nothing failed, got a failed"):
        results.keep(tmp_path, tmp_path / "results")


def test_a_wrong_or_skipped_row_leaves_its_cell_empty():
    wrong = small_row(1e-6, error="the result is off")
    del wrong["ratios"]
    report = {"gpu": "X", "steps": {"benchmarks": {"rows": [wrong]}}}
    assert results.table([report]).splitlines()[2].endswith("| at most 15 us | |")


def test_the_page_shows_the_committed_results():
    shown = between(PAGE.read_text(), "gpu").group()
    committed = results.committed()
    assert shown == (results.table(committed) if committed else NOTHING)
