"""The results of a run of the peers' benchmark, their place in the documents, the command line."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from benchmarks import cli
from benchmarks.memory.program import allocated_peak
from benchmarks.peers import driver, first_screen, process, results, run, tables
from benchmarks.peers.contenders import MATRIX, OURS
from tests.benchmarks.fake_peers import contender

KEPT = ("cpu", "cuda", "epyc-cpu", "images-cpu", "some-cpu")


def measured(label: str, median: float, ratio: float) -> dict:
    spread = {"first_quartile": 0.9 * median, "median": median, "third_quartile": 1.1 * median}
    return {
        **{"label": label, "status": "measured", "facts": {}, "seconds": spread},
        **{"ratio": ratio, "flops_per_second": 2e9, "of_peak": 0.25},
    }


def small_report() -> dict:
    rows = {
        MATRIX.name: measured("matrix product", 0.1, 1.0),
        OURS: measured("fastmeta", 69.96e-6, 1.0),
        "jax": measured("JAX", 1.2345e-3, 17.64),
        "higher": {"label": "higher", "status": "missing", "reason": "No module named 'higher'"},
    }
    workload = {"what": "MLP 1-40-40-1", "kind": "meta", "flops": 10**7, "contenders": rows}
    facts = {"processor": "Some CPU", "threads": "2", "torch": "2.13.0", "date": "today"}
    return {"device": "cpu", "rounds": 3, "facts": facts, "workloads": {"sin1": workload}}


# Tables


def test_the_table_shows_times_ratios_and_what_is_missing():
    lines = tables.markdown(small_report(), "a.png").splitlines()
    assert lines[0].startswith("Some CPU, threads 2, torch 2.13.0; float32.")
    assert lines[2:8] == [
        "| | sin1 |",
        "| --- | --- |",
        "| **fastmeta** | 70.0 us |",
        "| JAX | 1.23 ms (17.6) |",
        "| higher | missing |",
        "| fastmeta, of the matrix peak | 25 % |",
    ]
    assert "- higher: No module named 'higher' (sin1)" in lines
    assert lines[-1].endswith("(a.png)")


def test_the_text_shows_quartiles_and_reasons():
    text = tables.of_workload("sin1", small_report()["workloads"]["sin1"])
    assert text.startswith("sin1: MLP 1-40-40-1; 10 MFLOP a step")
    assert "1.11 ms to 1.36 ms" in text
    assert text.endswith("higher: missing (No module named 'higher')")


def test_a_workload_without_results_is_named_with_its_reason():
    text = tables.of_workload("x", {"what": "?", "flops": 1, "reason": "no reference: gone"})
    assert text.endswith("no reference: gone")


@pytest.mark.parametrize(
    "seconds, shown",
    [(9.994e-6, "9.99 us"), (0.9996e-3, "1.00 ms"), (0.25, "250 ms"), (99.96, "100 s")],
)
def test_durations_have_three_digits(seconds, shown):
    assert tables.duration(seconds) == shown


@pytest.mark.parametrize("value, shown", [(0.06251, "0.0625"), (9.999, "10.0"), (1234.0, "1230")])
def test_ratios_have_three_digits(value, shown):
    assert tables.digits(value) == shown


# Files


def test_json_picture_and_table_lie_in_one_folder(tmp_path):
    folder = tmp_path / "new" / "folder"
    results.save(small_report(), folder)
    image, table = results.render(results.load("cpu", folder), folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        *("peers-cpu.json", "peers-cpu.md", "peers-cpu.png"),
    ]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert table.read_text() == tables.markdown(small_report(), "peers-cpu.png") + "\n"


def test_a_picture_of_nothing_measured_is_drawn(tmp_path):
    report = small_report()
    for row in report["workloads"]["sin1"]["contenders"].values():
        row |= {"status": "failed", "reason": "it would not"}
    assert results.render(report, tmp_path)[0].stat().st_size > 0


def test_a_kept_run_stands_on_the_page(tmp_path, monkeypatch):
    kept, page = tmp_path / "results", tmp_path / "page.md"
    monkeypatch.setattr(results, "PAGE", page)
    kept.mkdir()
    page.write_text("a\n<!-- peers cpu -->\nold\n<!-- end of peers cpu -->\nb\n")
    results.save(small_report(), tmp_path)
    results.render(small_report(), tmp_path)
    results.keep("cpu", tmp_path, kept, page)
    assert sorted(p.name for p in kept.iterdir()) == ["peers-cpu.json", "peers-cpu.png"]
    text = page.read_text()
    assert text.startswith("a\n<!-- peers cpu -->\nSome CPU") and text.endswith("-->\nb\n")
    shown = results.between(text, "peers cpu").group()
    assert shown == tables.markdown(small_report(), "results/peers-cpu.png")


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers of 'peers cuda', got none"):
        results.between("<!-- peers cpu -->\n\n<!-- end of peers cpu -->", "peers cuda")


@pytest.mark.parametrize("name", KEPT)
def test_the_page_shows_the_committed_results(name):
    shown = results.between(results.PAGE.read_text(), f"peers {name}").group()
    assert shown == results.shown(name)


def test_every_committed_run_is_on_the_page():
    found = {path.stem.removeprefix("peers-") for path in results.KEPT.glob("peers-*.json")}
    assert found <= set(KEPT)


@pytest.mark.parametrize("document", first_screen.DOCUMENTS, ids=lambda path: path.name)
def test_first_screens_show_the_committed_numbers(document):
    text, page = document.read_text(), first_screen.DOCUMENTS[document]
    assert results.between(text, first_screen.BLOCK).group() == first_screen.numbers(page)
    assert first_screen.PICTURE in text.partition("<!-- numbers -->")[0]


def test_first_screens_follow_the_kept_runs(tmp_path, monkeypatch):
    document, kept = tmp_path / "README.md", tmp_path / "results"
    document.write_text("<!-- numbers -->\nold\n<!-- end of numbers -->\n")
    monkeypatch.setattr(first_screen, "DOCUMENTS", {document: "page.md"})
    shutil.copytree(results.KEPT, kept)
    (kept / first_screen.PICTURE).unlink()
    first_screen.keep(kept)
    assert "(page.md#mlps)" in document.read_text() and "old" not in document.read_text()
    assert (kept / first_screen.PICTURE).exists()


def test_the_fastest_peer_is_not_fastmeta():
    workload = small_report()["workloads"]["sin1"]
    workload["contenders"]["fastmeta-autograd"] = measured("fastmeta, backward", 1e-5, 1.5)
    workload["contenders"]["slow"] = measured("slow", 1.0, 400.0)
    assert first_screen.fastest_peer(workload) == ("JAX", 17.64)
    assert first_screen.fastest_peer(workload, ["slow"]) == ("slow", 400.0)


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--workload", "sin2"], "unknown workload 'sin2'; there are sin1_t1, sin1, sin5"),
        (["run", "--peer", "jacks"], "unknown peer 'jacks'; there are fastmeta-autograd, fastm"),
        (["run", "--rounds", "1"], "expected a whole number of at least 2, got '1'"),
        (["run", "--threads", "many"], "expected a whole number of at least 1, got 'many'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_report_of_no_run_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["report", "--out", str(tmp_path)]) == 1
    assert "peers-cpu.json; `run` makes it" in capsys.readouterr().err


def test_a_report_prints_and_draws_what_a_run_left(tmp_path, capsys):
    results.save(small_report(), tmp_path)
    assert cli.main(["report", "--out", str(tmp_path)]) == 0
    assert "JAX" in capsys.readouterr().out
    assert (tmp_path / "peers-cpu.png").exists() and (tmp_path / "peers-cpu.md").exists()


def test_a_run_measures_in_processes_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process, "ENVIRONMENT", tmp_path / "none")
    fakes = [contender("different"), contender("absent")]
    right = "tests.benchmarks.fake_peers:right"
    monkeypatch.setattr(driver, "MATRIX", replace(MATRIX, build=right))
    monkeypatch.setattr(driver, "REFERENCES", {"meta": contender("right")})
    monkeypatch.setattr(run, "contenders_for", lambda *_: fakes)
    arguments = ["run", "--workload", "sin1_t1", "--rounds", "2", "--threads", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1  # fastmeta was not measured
    report = json.loads((tmp_path / "peers-cpu.json").read_text())
    rows = report["workloads"]["sin1_t1"]["contenders"]
    assert {name: row["status"] for name, row in rows.items()} == {
        **{MATRIX.name: "measured", "different": "differs", "absent": "missing"},
    }
    assert report["facts"]["threads"] == "1" and "numpy" in report["facts"]
    assert (tmp_path / "peers-cpu.png").exists()
    printed = capsys.readouterr().out
    assert "sin1_t1: MLP 1-40-40-1, T = 1" in printed
    assert "the absent one: missing (its device is not on this machine)" in printed


# Memory


def test_what_a_native_op_allocates_within_itself_is_counted():
    x = torch.ones(1000)
    assert allocated_peak(lambda: (x + x) * (x + x)) == 3 * 4000
    assert allocated_peak(lambda: None) == 0
    x = torch.rand(100, 100).t()
    assert allocated_peak(lambda: torch.linalg.inv(x)) > 2 * 4 * 10**4  # result, and a copy within


def test_a_workspace_that_a_thread_keeps_from_call_to_call_is_counted():
    kept = threading.local()

    def run() -> None:
        if not hasattr(kept, "memory"):
            kept.memory = torch.empty(1000)

    run()
    assert allocated_peak(run) == 4000
