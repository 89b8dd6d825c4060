"""The GPU benchmarks on the CPU, tiny: all of them but events and graphs."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

import fastmeta as fm
from benchmarks.common.agreement import relative_error
from benchmarks.common.networks import MLP, Conv4
from benchmarks.common.timers import CudaTimer, HostTimer, Spread
from benchmarks.common.workloads import Workload
from benchmarks.gpu import every_kernel, kernel_list, ops, outcomes, results
from benchmarks.gpu.measure import OURS, Measure, Sizes
from benchmarks.gpu.precision import float32_products
from benchmarks.gpu.workloads import all_measures

TINY = Sizes(
    small=(6, 3, 4),
    small_tasks=(1, 2),
    big=(40, 9, 4),
    big_checked=16,
    big_chunk=16,
    updates=((2, 7), (1, 50)),
    support=(2, 6, 3, 4),
    pairs=(2, 5, 4, 3),
    images=(2, 3, 2, 5),
    head=(2, 2, 4, 3, 2, 5),
    programs=(
        Workload("sin1", MLP((1, 3, 1)), "mse", 2, 4, 3, 1, 0.1),
        Workload("hvp_mlp_t1", MLP((4, 3, 2)), "cross_entropy", 1, 4, kind="hvp"),
    ),
    image_programs=(Workload("omni_paper", Conv4(2, 3, 1, 16), "cross_entropy", 2, 3, 3, 1, 0.1),),
    copy_bytes=1024,
    matrix=16,
    rounds=2,
    long_rounds=2,
    graph=3,
)
PEAKS = {"copy": 1e9, "float32": 1e9, "tf32": 1e9, "bfloat16": 1e9}

needs_native = pytest.mark.skipif(
    not fm.build_info()["native"], reason="the native extension was not built"
)


def only(op: str, **changes) -> Measure:
    return dataclasses.replace(next(m for m in all_measures(TINY) if m.op == op), **changes)


def test_everything_is_measured_and_agrees(capsys):
    kept = []
    content = ops.run(HostTimer(), TINY, 60, lambda c: kept.append(len(c["rows"])))
    rows = content["rows"]
    assert kept == list(range(1, len(rows) + 1)) and len(rows) == len(list(all_measures(TINY)))
    assert all(value > 0 for value in content["ceilings"].values())
    for row in rows:
        assert "error" not in row and set(row["ratios"]) == set(row["errors"]) - {OURS}, row
        assert all(s["median"] > 0 for s in row["seconds"].values())
        assert row["op"] != "inner_update" or row["of_copy"] > 0
        assert row["workload"] != "proto_big" or (row["of_floor"] > 0 and row["peak_bytes"] > 0)
    assert {row["op"] for row in rows} == set(fm.core.backend.NAMES)
    assert json.loads(json.dumps(content)) == content
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(rows) and "% of floor" in printed[-1]


def test_all_rows_of_the_table_are_measured():
    measured = {
        (head["workload"], head["what"], head["dtype"], head["how"])
        for head in map(ops.head, all_measures(Sizes()))
    }
    shown = {(s.workload, s.what, s.dtype, s.how) for s in results.SHOWN}
    assert shown <= measured


def test_what_decides_about_most_is_measured_first():
    measures = list(all_measures(Sizes()))
    order = list(dict.fromkeys(measure.workload for measure in measures))
    small = ["sin1", "sin5", "anil", "proto_small, T = 1", "proto_small, T = 32"]
    networks = ["omni_paper", "omni_20w", "mini_conv5", "omni_mlp", "hvp_mlp_t1"]
    assert order[: len(small) + len(networks)] == [*small, *networks]
    assert order[len(small) + len(networks) + 2] == "proto_big"
    precisions = [m.precision for m in measures if m.workload == "omni_paper"]
    assert precisions == ["tf32", "float32"]


def test_a_contender_that_differs_gets_no_ratio():
    measure = only("inner_update")
    off = {**measure.contenders, "off": lambda p, g, lr: (p - 1.01 * lr * g,)}
    row = ops.measured(dataclasses.replace(measure, contenders=off), HostTimer(), PEAKS, TINY)
    assert set(row["ratios"]) == {"torch backend"} and row["errors"]["off"] > 1e-4
    assert "off differs by" in ops.line(row)


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_a_wrong_result_of_ours_is_an_error(wrong, monkeypatch):
    measure = only("prototypes")
    exact = ops.in_float64
    monkeypatch.setattr(ops, "in_float64", lambda *a: tuple(x + wrong for x in exact(*a)))
    row = ops.attempted(measure, HostTimer(), PEAKS, TINY)
    assert row["error"].startswith("the result is off by") and "ratios" not in row
    assert "ERROR" in ops.line(row)


def test_a_wrong_replay_is_noticed():
    measure = next(m for m in all_measures(TINY) if m.in_graph)

    class Stale(HostTimer):
        def captured(self, call, calls):
            captured = super().captured(call, calls)
            right = captured.call
            captured.call = lambda i: tuple(x * 2 for x in right(i))
            return captured

    row = ops.measured(measure, Stale(), PEAKS, TINY)
    assert "error" in row and row["agree"] == []


def test_a_workload_that_fails_does_not_cost_the_others():
    def fail(*inputs: torch.Tensor):
        raise RuntimeError("CUDA out of memory.\nmore")

    measure = only("inner_update", contenders={OURS: fail})
    row = ops.attempted(measure, HostTimer(), PEAKS, TINY)
    assert row["error"] == "CUDA out of memory." and row["op"] == "inner_update"
    assert ops.line(row).endswith("eager: CUDA out of memory.")


def test_without_time_left_rows_are_skipped_with_the_reason():
    rows = ops.run(HostTimer(), TINY, -1.0, lambda content: None)["rows"]
    assert all(row["skipped"] == "the -1 s were used up" for row in rows)


def test_each_measure_has_its_own_precision(monkeypatch):
    """As torch's setting, and in its row; the setting of before comes back."""
    seen = {}

    def measured(measure, *rest):
        seen[measure.op, measure.precision] = torch.backends.cudnn.allow_tf32
        return {}

    monkeypatch.setattr(ops, "measured", measured)
    before = torch.backends.cudnn.allow_tf32
    for measure in all_measures(TINY):
        ops.attempted(measure, HostTimer(), PEAKS, TINY)
        assert ops.head(measure)["dtype"] == measure.precision
        assert torch.backends.cudnn.allow_tf32 == before
    allowed = {name for name, tf32 in seen.items() if tf32}
    assert allowed == {("task_conv2d", "tf32"), ("task_program", "tf32")}
    assert ("task_conv2d", "bfloat16") in seen


def test_where_gradients_jump_plain_pytorch_says_how_far(monkeypatch):
    monkeypatch.setattr(ops, "errors", lambda outputs, expected: 3e-4)
    measure = only("task_program", jumps=True)
    assert ops.measured(measure, HostTimer(), PEAKS, TINY)["agree"] != []
    strict = dataclasses.replace(measure, jumps=False)
    assert ops.measured(strict, HostTimer(), PEAKS, TINY)["agree"] == []


def test_the_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_inputs_rotate_and_outputs_stay():
    class SmallCache(HostTimer):
        cache_bytes = 60

    measure = only("inner_update")
    sets = ops.drawn(measure, SmallCache())
    assert len(sets) == 3  # 60 bytes and lr's 4, four times the cache is 240
    call = ops.rotating(lambda *inputs: inputs, sets)
    assert [call(i)[0] is sets[i % len(sets)][0] for i in range(5)] == [True] * 5


class Played:
    """Stands for every class of torch.cuda that CudaTimer uses, and writes down what is done."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def __call__(self, *args, **options) -> Played:
        return self

    def __enter__(self) -> None:
        self.done.append("enter")

    def __exit__(self, *_) -> None:
        self.done.append("exit")

    def elapsed_time(self, end: Played) -> float:
        return 6.0

    def __getattr__(self, name: str):
        return lambda *args: self.done.append(name)


@pytest.fixture
def played(monkeypatch) -> list[str]:
    done: list[str] = []
    for name in ("Event", "Stream", "stream", "CUDAGraph", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Played(done))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait for the device"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return done


def test_events_surround_the_calls_of_a_round(played):
    timer = CudaTimer()
    assert timer.cache_bytes == 1 << 20 and timer.device == torch.device("cuda", 0)
    contenders = {name: lambda i, n=name: played.append(f"{n}{i}") for name in "ab"}
    seconds = timer.interleave(contenders, rounds=1, calls=2)
    assert seconds == {"a": [0.003], "b": [0.003]}
    of_b = ["wait for the device", "record", "b2", "b3", "record", "synchronize"]
    assert played[-len(of_b) :] == of_b


def test_a_graph_is_warmed_up_on_another_stream_and_replayed(played):
    numbers = []
    graph = CudaTimer().captured(lambda i: numbers.append(i) or i, 4)
    assert numbers == [0, 1, 2, 0, 1, 2, 3] and graph.output == 3
    assert played == ["wait_stream", "enter", "exit", "wait_stream", "enter", "exit"]
    graph(0)
    assert played[-1] == "replay"


def test_the_command_writes_rows_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fm, "backend_of", lambda op, device: "native")
    monkeypatch.setattr(ops, "CudaTimer", HostTimer)
    monkeypatch.setattr(ops, "Sizes", lambda: TINY)
    monkeypatch.setattr("sys.argv", ["ops", "--json", str(tmp_path / "ops.json")])
    assert ops.main() == 0
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert len(rows) == len(list(all_measures(TINY)))


def test_the_command_refuses_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ops"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fm, "backend_of", lambda op, device: "torch")
    with pytest.raises(SystemExit, match="built without inner_update for CUDA"):
        ops.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        ops.main()


def test_relative_error():
    one = torch.ones(4)
    assert relative_error(one, one) == 0
    assert relative_error(1.1 * one, one) == pytest.approx(0.1)
    assert math.isnan(relative_error(one * math.nan, one))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(1), torch.zeros(1)) == 1
    with pytest.raises(ValueError, match=r"shapes differ: \[2\] and \[3\]"):
        relative_error(torch.ones(2), torch.ones(3))


def test_spread_is_of_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)


@needs_native
def test_every_op_of_the_kernel_check_runs_and_is_right():
    said = []
    assert every_kernel.run("cpu", said.append) == 0
    assert len(said) == 1 and said[0].endswith("calls on cpu, 0 wrong results")
    ops = {op for op, _ in every_kernel.ALL_INPUTS[1].calls("cpu")}
    pairs = {f"{op}{suffix}" for op in fm.core.backend.OPS for suffix in ("", "_backward")}
    convolutions = {f"task_conv2d{suffix}" for suffix in ("", "_input", "_weight")}
    norms = {f"task_batch_norm{suffix}" for suffix in ("", "_backward", "_backward_backward")}
    activations = {f"activation{suffix}" for suffix in ("", "_backward", "_backward_backward")}
    scores = {f"pair_scores{suffix}" for suffix in ("", "_backward", "_tangent", "_bend")}
    pools = {f"pair_pool{suffix}" for suffix in ("", "_backward", "_gather")}
    ridges = {"ridge_head", "ridge_head_backward"}
    others = scores | pools | ridges | {"nearest", "task_program_meta_gradient"}
    assert ops == {*pairs, *convolutions, *norms, *activations, *others}


def test_float32_is_checked_as_ieee_and_as_tf32():
    """TF32 is PyTorch's default for convolutions, and near 3e-4."""
    of_float32 = [x for x in every_kernel.ALL_INPUTS if x.dtype == torch.float32]
    assert [(x.tf32, x.tolerance) for x in of_float32] == [(False, 1e-4), (True, 2e-3)]
    ieee, tf32 = of_float32
    assert (str(ieee), str(tf32)) == ("torch.float32", "TF32")
    ops = {op for op, _ in tf32.calls("cpu")}
    convolutions = {f"task_conv2d{suffix}" for suffix in ("", "_input", "_weight")}
    assert ops == {*convolutions, "task_program_meta_gradient"}


def test_networks_in_tf32_have_no_gradient_that_jumps():
    """Rounding across 0 of a ReLU changes a gradient by percents."""
    jumping = (torch.nn.ReLU, torch.nn.LeakyReLU, torch.nn.MaxPool2d)
    for net in every_kernel.NETWORKS:
        jumps = any(isinstance(layer, jumping) for layer in net.make().modules())
        assert not (net.smooth and jumps), net
    steps = [call for call in every_kernel.ALL_INPUTS[-1].calls("cpu") if "program" in call[0]]
    assert len(steps) == sum(net.smooth for net in every_kernel.NETWORKS) >= 3


def settings() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("tf32, inside", [(False, (False, "highest")), (True, (True, "high"))])
def test_the_device_computes_in_the_precision_of_the_inputs(tf32, inside, monkeypatch):
    """And the CPU, which it is compared with, in the precision of before."""
    seen = {}

    def results(op, arguments, device):
        seen[device] = settings()
        return []

    monkeypatch.setattr(every_kernel, "results", results)
    before = settings()
    inputs = every_kernel.Inputs(torch.float32, 1e-4, tf32)
    assert list(every_kernel.wrong_results(inputs, ("op", ()), "other")) == []
    assert seen == {"cpu": before, "other": inside} and settings() == before


@pytest.mark.parametrize("error, tf32, wrong", [(3e-4, False, 1), (3e-4, True, 0), (1, True, 1)])
def test_an_error_of_tf32_is_allowed_in_tf32_only(error, tf32, wrong, monkeypatch):
    scale = {"cpu": 1.0, "other": 1 + error}
    monkeypatch.setattr(every_kernel, "results", lambda op, a, d: [torch.full((3,), scale[d])])
    inputs = next(x for x in every_kernel.ALL_INPUTS[1:] if x.tf32 == tf32)
    assert len(list(every_kernel.wrong_results(inputs, ("op", ()), "other"))) == wrong


@needs_native
def test_the_kernel_check_names_a_wrong_result(monkeypatch):
    right = every_kernel.results

    def results(op, arguments, device):
        out = right(op, arguments, "cpu")
        return [x + 1 for x in out] if (op, device) == ("prototypes", "other") else out

    monkeypatch.setattr(every_kernel, "results", results)
    said = []
    shapes, dtypes = len(every_kernel.SUPPORTS), len(every_kernel.TOLERANCE)
    assert every_kernel.run("other", said.append) == shapes * dtypes
    assert said[0].startswith("prototypes torch.float64 [[2, 40, 33], [2, 40]]: error")


def test_the_kernels_of_the_sources_are_found():
    found = every_kernel.kernels_of_sources()
    assert {"update_kernel", "row_loss_kernel", "distance_kernel", "label_range_kernel"} <= found
    assert {"block_kernel", "product_kernel", "sum_over_tasks_kernel"} <= found
    assert all(name.endswith("_kernel") for name in found)


def test_the_list_of_kernels_has_every_kernel_of_the_sources():
    """And both forms of the sums of convolutions and of the largest product."""
    listed = kernel_list.listed()
    assert {name.partition("<")[0] for name in listed} == every_kernel.kernels_of_sources()
    for start in ("convolution_kernel<(MapTo)0, {}<float, ", "product_kernel<{}<float, "):
        for sums in ("ThreadSums", "TensorSums"):
            assert any(name.startswith(start.format(sums)) for name in listed)
    large = "product_kernel<ThreadSums<float, ProductTile<64, 128, 8, 8, 8, 1>>"
    assert any(name.startswith(large) for name in listed)


def as_profiled(names: set[str]) -> set[str]:
    """As the profiler writes them: with a return type, namespaces and parameters."""
    return {f"void fastmeta::(anonymous namespace)::{name}(long, float*)" for name in names}


def test_an_instance_of_a_template_that_did_not_run_is_noticed():
    listed = kernel_list.listed()
    other_tile = next(name for name in sorted(listed) if name.startswith("convolution_kernel"))
    assert every_kernel.missing(as_profiled(listed), 132) == []
    assert every_kernel.missing(as_profiled(listed - {other_tile}), 132) == [other_tile]
    # Another device chooses other tiles.
    assert every_kernel.missing(as_profiled(listed - {other_tile}), 108) == []
    without = {name for name in listed if not name.startswith("update_kernel")}
    assert every_kernel.missing(as_profiled(without), 108) == ["update_kernel"]


def test_kernels_that_the_profiler_saw_are_compared_with_the_list(monkeypatch, capsys):
    names = sorted(as_profiled(kernel_list.listed()))

    class Profile(Played):
        def __enter__(self):
            return self

        def key_averages(self):
            return [SimpleNamespace(key=name) for name in ["Memcpy HtoD", *self.done]]

    wrong = 0
    monkeypatch.setattr(every_kernel, "run", lambda device: wrong)
    h200 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    for seen, code, said in (
        (names, 0, f"{len(names)} kernels of csrc/ were launched, 0 results were wrong"),
        (names[1:], 1, "1 kernels were not launched, 0 results were wrong"),
        ([], outcomes.NOT_AVAILABLE, "the profiler recorded no kernel"),
    ):
        monkeypatch.setattr(torch.profiler, "profile", Profile(seen))
        assert every_kernel.profiled("cuda") == code
        assert capsys.readouterr().out.splitlines()[-1] == said
    wrong = 2
    assert every_kernel.profiled("cuda") == 1
