"""The regression run: ratios, turns, revisions on disk, workers in processes; no real clock."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from benchmarks import cli
from benchmarks.regression import command, race, revisions, worker, workloads
from benchmarks.regression.process import Failed, Process
from benchmarks.regression.ratios import Ratio, slower_than

ROOT = Path(__file__).parents[2]


class Fake:
    """A revision whose step takes `seconds` by its own word; `log` gets the turns."""

    def __init__(self, seconds, log=None, fails_on=""):
        self.seconds, self.log, self.fails_on = seconds, [] if log is None else log, fails_on

    def prepare(self, name):
        if name == self.fails_on:
            raise Failed(f"base: expected a reply to prepare, got AttributeError: {name}")

    def time(self, calls):
        self.log.append((self, calls))
        return self.seconds * calls


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(race, "SETTLE", 0.0)


# Ratios


def test_rounds_are_paired_so_that_a_drift_of_the_machine_cancels():
    assert Ratio.of([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == Ratio(2.0, 2.0, 2.0, 2.0)


def test_the_spread_runs_from_the_10th_to_the_90th_percentile():
    present = [1.0 + k / 10 for k in range(11)]
    ratio = Ratio.of([1.0] * 11, present)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.1, 1.9))


def test_one_disturbed_round_leaves_median_and_best():
    ratio = Ratio.of([1.0] * 5, [1.0, 1.0, 9.0, 1.0, 1.0])
    assert (ratio.median, ratio.best) == (1.0, 1.0)
    assert ratio.high > 1.0


def test_rounds_must_come_in_pairs():
    with pytest.raises(ValueError):
        Ratio.of([1.0, 1.0], [1.0, 1.0, 1.0])


def test_a_ratio_at_the_threshold_is_not_slower():
    ratios = {name: Ratio(m, m, m, m) for name, m in (("a", 1.05), ("b", 1.06), ("c", 0.9))}
    assert slower_than(1.05, ratios) == ["b"]


# Turns


def test_the_order_of_turns_flips_each_round_after_a_pause():
    log, pauses = [], []
    base, present = Fake(1.0, log), Fake(2.0, log)
    times = race.race(base, present, 3, 4, pauses.append)
    assert log == [(side, 4) for side in (base, present, present, base, base, present)]
    assert pauses == [race.SETTLE] * 6
    assert (times.base, times.present) == ([1.0] * 3, [2.0] * 3)


@pytest.mark.parametrize(("step", "calls"), [(9.0, 1), (0.2, 1), (0.1, 2), (1e-3, 200)])
def test_a_turn_takes_about_the_seconds_asked_for(step, calls):
    assert race.calls_per_turn(Fake(step), 0.2) == calls


def test_a_disturbed_timing_does_not_shorten_the_turns():
    class Disturbed(Fake):
        def time(self, calls):
            return super().time(calls) * (10 if len(self.log) % 3 == 1 else 1)

    assert race.calls_per_turn(Disturbed(1e-3), 0.2) == 200


@pytest.mark.parametrize(("calls", "seconds"), [(1, 3.0), (4, 12.0)])
def test_a_step_before_the_clock_starts_is_not_timed(calls, seconds):
    now, made = [0.0], []

    def step():
        made.append(1)
        now[0] += 3.0

    assert worker.seconds_of(step, calls, lambda: now[0]) == seconds
    assert len(made) == calls + (calls > 1)


def test_compare_finds_the_known_ratio_and_skips_what_fails(no_pause, capsys):
    report = command.compare(Fake(1e-3, fails_on="hvp"), Fake(2e-3), ["sin1", "hvp"], 3, 0.01)
    assert report.ratios["sin1"].median == pytest.approx(2.0)
    assert list(report.errors) == ["hvp"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["sin1", "1.000", "ms", "2.000", "ms", *["2.000"] * 4]
    assert "AttributeError" in lines[2]
    assert command.verdict(report, 3.0) == 1


@pytest.mark.parametrize(("threshold", "code"), [(1.05, 1), (2.5, 0)])
def test_the_exit_code_follows_the_threshold(no_pause, capsys, threshold, code):
    report = command.compare(Fake(1e-3), Fake(2e-3), ["sin1"], 3, 0.01)
    assert command.verdict(report, threshold) == code
    assert ("slower than 1.05 times the base: sin1" in capsys.readouterr().out) == bool(code)


# Processes

STUB = """
import sys
from benchmarks.regression.worker import Worker, serve

class Stub(Worker):
    def time(self, calls):
        return {{"seconds": {seconds} * calls}}

def broken():
    raise AttributeError("module 'fastmeta' has no attribute 'hvp'")

print("{{}}", flush=True)
workloads = {{"sin1": lambda: lambda: None, "hvp": broken, "end": lambda: sys.exit(3)}}
serve(Stub(workloads), sys.stdin, sys.stdout)
"""


def stub(name, seconds):
    return Process(name, ROOT, 1, (sys.executable, "-c", STUB.format(seconds=seconds)))


def test_two_processes_of_known_speed_measure_a_ratio_of_two(no_pause):
    with closing(stub("base", 1e-3)) as base, closing(stub("present", 2e-3)) as present:
        report = command.compare(base, present, ["sin1"], 5, 0.01)
    assert report.ratios["sin1"] == Ratio(*[pytest.approx(2.0)] * 4)


def test_an_error_in_a_worker_names_its_side_and_leaves_it_running():
    with closing(stub("base", 1e-3)) as base:
        with pytest.raises(Failed, match="base: expected a reply to prepare, got AttributeError"):
            base.prepare("hvp")
        base.prepare("sin1")
        assert base.time(2) == pytest.approx(2e-3)


def test_a_worker_that_ends_says_with_which_code():
    with (
        closing(stub("present", 1e-3)) as present,
        pytest.raises(Failed, match="present: expected a reply to prepare, got exit code 3"),
    ):
        present.prepare("end")


def test_a_worker_refuses_a_package_without_kernels(tmp_path):
    (tmp_path / "fastmeta").mkdir()
    source = "def build_info(): return {'native': False, 'reason': 'not compiled'}\n"
    (tmp_path / "fastmeta" / "__init__.py").write_text(source)
    with pytest.raises(Failed, match=r"expected compiled kernels in .*, got not compiled"):
        Process("base", tmp_path, 1)


def test_a_worker_refuses_the_package_of_another_folder(tmp_path):
    with pytest.raises(Failed, match=f"expected the package under {tmp_path}, got .*fastmeta"):
        Process("base", tmp_path, 1)


# Workloads


def test_the_workloads_that_a_change_of_layout_must_not_slow_are_among_them():
    required = {"sin1_t1", "sin1", "omni_mlp", "omni_conv1", "anil", "proto_small"}
    assert required <= set(workloads.WORKLOADS)


LARGE = {"omni_mlp", "omni_conv1"}  # the step of sin1 on larger networks


@pytest.mark.parametrize("name", [name for name in workloads.WORKLOADS if name not in LARGE])
def test_a_step_runs_again_with_the_same_result(name):
    step = workloads.WORKLOADS[name]()
    first, second = (tensors_of(step()) for _ in range(2))
    assert first and all(torch.isfinite(tensor).all() for tensor in first)
    torch.testing.assert_close(first, second)


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result.detach().clone()]
    return [tensor for part in result for tensor in tensors_of(part)]


def imports_of(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module.startswith("benchmarks"):
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in inner if is_module(name))


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def test_workers_import_the_public_package_only():
    """Another revision has its modules elsewhere."""
    left, seen = ["benchmarks.regression.worker", "benchmarks.regression.workloads"], set()
    while left:
        name = left.pop()
        if name not in seen and name.startswith("benchmarks"):
            left.extend(imports_of(name))
        seen.add(name)
    assert {"benchmarks.peers.fastmeta_steps", "fastmeta"} <= seen
    assert not [name for name in seen if name.startswith("fastmeta.")]


# Revisions


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ("git", *identity, *arguments)
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Two commits: the second changes Python only."""
    root = tmp_path / "clone"
    for file in ("csrc/op.cpp", "setup.py", "fastmeta/__init__.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("first\n")
    (root / ".gitignore").write_text("/build/\n*.so\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    (root / "fastmeta" / "__init__.py").write_text("second\n")
    git(root, "commit", "--quiet", "-am", "second")
    return root


def test_a_base_lies_in_a_folder_of_its_own_that_is_used_again(repository):
    commit = revisions.commit_of("HEAD~1", repository)
    assert commit == git(repository, "rev-parse", "HEAD~1")
    folder = revisions.checkout(commit, repository)
    assert (folder / "fastmeta" / "__init__.py").read_text() == "first\n"
    (folder / "build").mkdir()
    (folder / "build" / "kept.o").touch()
    assert revisions.checkout(commit, repository) == folder
    assert (folder / "build" / "kept.o").exists()
    assert git(repository, "status", "--porcelain") == ""


def test_a_deleted_folder_is_made_again(repository):
    commit = revisions.commit_of("HEAD~1", repository)
    folder = revisions.checkout(commit, repository)
    folder.rename(folder.with_name("elsewhere"))
    assert revisions.checkout(commit, repository) == folder


@pytest.mark.parametrize("revision", ["no-such", "", "--all"])
def test_an_unknown_base_is_refused(repository, monkeypatch, capsys, revision):
    monkeypatch.setattr(command, "ROOT", repository)
    assert cli.main(["regression", f"--base={revision}"]) == 2
    expected = f"base: expected a revision of the repository {repository}, got {revision!r}"
    assert expected in capsys.readouterr().err


def test_a_base_with_changes_is_refused(repository):
    commit = revisions.commit_of("HEAD~1", repository)
    folder = revisions.checkout(commit, repository)
    (folder / "setup.py").write_text("changed\n")
    with pytest.raises(revisions.Refused, match=r"base: expected no changes in .*, got setup\.py;"):
        revisions.checkout(commit, repository)


def test_a_base_of_another_commit_is_refused(repository):
    commit = revisions.commit_of("HEAD~1", repository)
    folder = revisions.checkout(commit, repository)
    git(folder, "checkout", "--quiet", git(repository, "rev-parse", "HEAD"))
    with pytest.raises(revisions.Refused, match=f"base: expected commit {commit}"):
        revisions.checkout(commit, repository)


@pytest.mark.parametrize(
    ("file", "same"),
    [("fastmeta/__init__.py", True), ("csrc/op.cpp", False), ("csrc/new.h", False)],
)
def test_kernels_are_the_same_until_their_sources_change(repository, file, same):
    assert revisions.has_same_kernels("HEAD~1", repository)
    (repository / file).write_text("third\n")
    assert revisions.has_same_kernels("HEAD~1", repository) == same


@pytest.mark.parametrize("same", [True, False])
def test_the_base_is_compiled_unless_its_kernels_are_the_same(repository, monkeypatch, same):
    compiled = []

    def build(folder):
        compiled.append(folder)
        (folder / "fastmeta" / "_C.so").write_text(folder.name)

    monkeypatch.setattr(revisions, "build", build)
    if not same:
        (repository / "csrc" / "op.cpp").write_text("third\n")
    base = revisions.prepare("HEAD~1", repository)
    assert compiled == ([repository] if same else [repository, base])
    assert (base / "fastmeta" / "_C.so").read_text() == ("clone" if same else base.name)


@pytest.mark.parametrize(
    ("environment", "program"),
    [({"PATH": ""}, r"g\+\+"), ({"PATH": "", "CXX": "my-c++ -m64"}, r"my-c\+\+")],
)
def test_a_missing_compiler_is_named(environment, program):
    with pytest.raises(revisions.Refused, match=f"compiler: expected {program} on PATH, got"):
        revisions.check_compiler(environment)


def test_a_failed_build_shows_its_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(revisions, "check_compiler", lambda environment: None)
    (tmp_path / "setup.py").write_text("import sys; print('the first error'); sys.exit(3)\n")
    with pytest.raises(revisions.Refused, match=r"build: expected .* to compile, got exit code 3"):
        revisions.build(tmp_path)
    assert "the first error" in capsys.readouterr().err


def test_a_build_without_an_extension_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "check_compiler", lambda environment: None)
    (tmp_path / "setup.py").touch()
    with pytest.raises(revisions.Refused, match="extension: expected one fastmeta/_C"):
        revisions.build(tmp_path)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --base"),
        (["--only", "sin2"], "argument --only: expected one of sin1_t1, sin1,"),
        (["--rounds", "1"], "argument --rounds: expected a whole number of at least 2, got '1'"),
        (["--rounds", "2.5"], "argument --rounds: expected a whole number of at least 2,"),
        (["--seconds", "0"], "argument --seconds: expected a number of at least 0.001, got '0'"),
        (["--threshold", "0.9"], "argument --threshold: expected a number of at least 1.0,"),
        (["--threshold", "nan"], "argument --threshold: expected a number of at least 1.0,"),
        (["--threads", "x"], "argument --threads: expected a whole number of at least 1, got 'x'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    base = ["--base", "HEAD"] if arguments else []
    with pytest.raises(SystemExit) as raised:
        cli.main(["regression", *base, *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_the_report_is_written_as_json(tmp_path, no_pause, monkeypatch):
    speed = {"base": 1e-3, "present": 2e-3}
    monkeypatch.setattr(revisions, "prepare", lambda revision, root: tmp_path)
    monkeypatch.setattr(command, "Process", lambda name, root, threads: stub(name, speed[name]))
    out = tmp_path / "new" / "report.json"
    options = ["--base", "HEAD", "--only", "sin1", "--rounds", "2", "--seconds", "0.01"]
    assert cli.main(["regression", *options, "--out", str(out)]) == 1
    found = json.loads(out.read_text())["workloads"]["sin1"]
    assert found["ratio"]["median"] == pytest.approx(2.0)
    assert found["seconds"]["present"] == pytest.approx([2e-3] * 2)
