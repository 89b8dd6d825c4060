"""`make gpu` without a GPU: its steps are stubs, what they print is given."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import machine, outcomes, steps
from benchmarks.gpu.runner import Outcome, Step, is_good, run_steps, seconds_for, write_json
from tests.benchmarks.gpu.stub_steps import FAIL, PASS, stub

ROOT = Path(__file__).resolve().parents[3]
HANG = "import time; print('begun', flush=True); time.sleep(60)"


def statuses(report: dict) -> dict[str, str]:
    return {name: step["status"] for name, step in report["steps"].items()}


# Running steps


def test_a_failing_step_does_not_stop_the_rest(tmp_path, capfd):
    report = run_steps([stub("a", FAIL), stub("b", PASS)], tmp_path, {"gpu": "stub"}, 20)
    assert statuses(report) == {"a": "failed", "b": "passed"}
    assert report["steps"]["a"]["exit_code"] == 4 and report["gpu"] == "stub"
    assert "broken" in (tmp_path / "a.txt").read_text()
    assert "fine" in capfd.readouterr().out
    assert not is_good(report)


def test_nothing_follows_a_step_that_is_needed(tmp_path):
    report = run_steps([stub("build", FAIL, needed=True), stub("b", PASS)], tmp_path, {}, 20)
    assert report["steps"]["b"] == {
        "status": "skipped",
        "seconds": 0.0,
        "reason": "build did not pass",
    }


def test_a_hanging_step_is_stopped_with_its_children_and_keeps_its_output(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HANG!r}])"
    hang = stub("hang", child, share=1.0)
    begun = time.monotonic()
    report = run_steps([hang, stub("b", PASS, share=9.0)], tmp_path, {}, 10)
    assert time.monotonic() - begun < 9
    assert statuses(report) == {"hang": "timed out", "b": "passed"}
    assert report["steps"]["hang"]["reason"].startswith("stopped after")
    assert "begun" in (tmp_path / "hang.txt").read_text()


def test_a_step_without_time_left_is_skipped_with_the_reason(tmp_path):
    report = run_steps([stub("a", PASS), stub("b", PASS)], tmp_path, {}, 0.0)
    assert statuses(report) == {"a": "skipped", "b": "skipped"}
    assert report["steps"]["b"]["reason"] == "0 s of the budget were left"
    assert not is_good(report)


def test_a_step_may_use_what_is_left_but_for_the_shares_of_later_ones():
    three = [stub(name, PASS, share=share) for name, share in (("a", 10), ("b", 20), ("c", 5))]
    assert seconds_for(three, 0, left=100) == 75
    assert seconds_for(three, 1, left=100) == 95
    assert seconds_for(three, 0, left=30) == 10
    assert seconds_for(three, 2, left=3) == 3


def test_what_cannot_run_here_is_not_available_and_no_failure(tmp_path):
    report = run_steps([stub("a", FAIL, missing="no such tool")], tmp_path, {}, 20)
    assert report["steps"]["a"]["status"] == "not available"
    assert report["steps"]["a"]["reason"] == "no such tool" and is_good(report)


def test_a_program_that_is_not_there_fails_its_step(tmp_path):
    report = run_steps([Step("a", ["no-such-program"], 5, "a.txt")], tmp_path, {}, 20)
    assert report["steps"]["a"]["status"] == "failed"
    assert "no-such-program" in report["steps"]["a"]["reason"]


def test_the_report_is_whole_on_disk_after_every_step(tmp_path):
    show = f"print(open({str(tmp_path / 'report.json')!r}).read())"
    seen = []

    def read(code: int, output: str) -> Outcome:
        seen.append(statuses(json.loads(output)))
        return Outcome("passed")

    report = run_steps([stub(n, show, read=read) for n in "ab"], tmp_path, {}, 20)
    assert seen == [{"a": "not run", "b": "not run"}, {"a": "passed", "b": "not run"}]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt", "report.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "report.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"new": object()})
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": 1}


def test_a_run_that_is_told_to_end_takes_its_steps_along(tmp_path):
    pid = tmp_path / "pid"
    step = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); {HANG}"
    script = (
        "from benchmarks.gpu import __main__ as driver\n"
        "from tests.benchmarks.gpu.stub_steps import stub\n"
        "driver.machine.unfit = lambda: ''\n"
        "driver.machine.describe = lambda: {'capability': '9.0'}\n"
        f"driver.all_steps = lambda *_: [stub('a', {PASS!r}), stub('b', {step!r})]\n"
        "driver.main()\n"
    )
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        machine.python("-c", script), env=environment, stdout=subprocess.PIPE, text=True
    )
    while run.stdout.readline() != "begun\n":
        assert run.poll() is None
    run.terminate()
    assert run.wait(timeout=10) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert statuses(report) == {"a": "passed", "b": "not run"}


# The table of steps


def test_the_steps_fit_the_budget_and_the_files_are_few(tmp_path):
    table = steps.all_steps(tmp_path, "9.0")
    assert sum(step.share for step in table) <= steps.BUDGET < 8 * 60
    assert table[0].name == "build" and table[0].needed
    files = {step.output for step in table} | {"report.json", "tests.xml", "ops.json"}
    assert len(files) <= 8 and not any("/" in name for name in files)
    assert table[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_what_is_worth_most_comes_first(tmp_path):
    names = [step.name for step in steps.all_steps(tmp_path, "9.0")]
    checks = ["racecheck", "memcheck", "initcheck"]
    assert names == ["build", "kernels", "benchmarks", *checks, "tests"]


def test_a_build_as_slow_as_it_may_be_leaves_every_step_its_share(tmp_path):
    table = steps.all_steps(tmp_path, "9.0")
    left = steps.BUDGET
    for number, step in enumerate(table):
        assert seconds_for(table, number, left) >= step.share
        left -= seconds_for(table, number, left)
    assert left >= 0


@pytest.mark.rotating
def test_a_part_that_fails_or_hangs_costs_no_earlier_result(tmp_path):
    """Nor what the part itself had found."""
    rows = {"ceilings": {}, "rows": [{"op": "x"}]}
    measured = tmp_path / "ops.json"
    measure = f"open({str(measured)!r}, 'w').write({json.dumps(rows)!r})"
    parts = (
        ("kernels", "print('14 kernels')", outcomes.of_kernels),
        ("benchmarks", measure, outcomes.of_benchmarks(measured)),
        ("racecheck", "raise SystemExit(9)", outcomes.of_sanitizer),
        ("tests", HANG, outcomes.of_tests(tmp_path / "tests.xml")),
    )
    table = [stub(name, code, share=1.0, read=read) for name, code, read in parts]
    run_steps(table, tmp_path, {}, 5)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert list(statuses(kept).values()) == ["passed", "passed", "failed", "timed out"]
    assert kept["steps"]["kernels"]["reason"] == "14 kernels"
    assert kept["steps"]["benchmarks"]["rows"] == rows["rows"]
    assert "begun" in (tmp_path / "tests.txt").read_text()


def test_the_sanitizers_watch_our_kernels_but_initcheck_all(monkeypatch):
    monkeypatch.setattr(steps, "cuda_tool", lambda name: f"/cuda/{name}")
    watched = {tool: steps.sanitizer(tool).command for tool in ("memcheck", "initcheck")}
    assert "kns=fastmeta" in watched["memcheck"] and "kns=fastmeta" not in watched["initcheck"]
    monkeypatch.setattr(steps, "cuda_tool", lambda name: None)
    assert steps.sanitizer("racecheck").missing == "compute-sanitizer was not found"


def test_the_plugin_keeps_what_needs_a_cuda_device(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cpu', 'cuda'])\n"
        "def test_a(device): pass\n"
        "@pytest.mark.skipif(False, reason='needs a CUDA device')\n"
        "def test_b(): pass\n"
        "def test_c_cuda(): pass\n"
        "@pytest.mark.parametrize('script', ['ddp_body.py', 'cuda_graph.py'])\n"
        "def test_d(script): pass\n"
    )
    command = machine.python("-m", "pytest", "-c", "/dev/null", "-p", "benchmarks.gpu.on_device")
    run = subprocess.run(
        [*command, "-v", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    kept = ["test_a[cuda]", "test_b", "test_d[cuda_graph.py]"]
    assert re.findall(r"::(\S+) PASSED", run.stdout) == kept, run.stdout


# The command


def test_without_cuda_it_says_why_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch(r"make gpu: torch .*(without CUDA|no CUDA device)\n", run.stderr)


def test_without_a_device_or_nvcc_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.unfit() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "cuda_tool", lambda name: None)
    assert machine.unfit().startswith("there is no nvcc")
    monkeypatch.setattr(machine, "cuda_tool", lambda name: "/cuda/bin/nvcc")
    assert machine.unfit() == ""


def test_without_torch_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert machine.unfit() == f"torch is not installed for {sys.executable}"


def test_versions_and_commit_of_this_machine(monkeypatch):
    found = machine.versions()
    assert found["torch"] == torch.__version__ and found["python"].startswith("3.")
    assert machine.settings()["float32_matmul_precision"] == torch.get_float32_matmul_precision()
    monkeypatch.setenv("FASTMETA_COMMIT", "abc")
    assert machine.commit() == {"commit": "abc", "dirty": None}
    assert machine.output_of("no-such-program") is None
