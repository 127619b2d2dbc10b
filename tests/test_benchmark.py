"""The benchmark: its clock, its gates, its sentences, and a whole small report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.benchmark import BenchOptions, BenchReport, Figures, Row, cases, load_report, parity, run_bench
from nsa_cli.benchmark import runner as runner_module
from nsa_cli.benchmark.dense import Variant, fastest, variants
from nsa_cli.benchmark.machine import Ceilings, measure_ceilings, settled_threads
from nsa_cli.benchmark.measuring import Bench
from nsa_cli.benchmark.memory import peak_bytes
from nsa_cli.benchmark.options import Shape
from nsa_cli.benchmark.parity import Parity
from nsa_cli.benchmark.regression import compare_reports
from nsa_cli.benchmark.report import find_crossovers, parity_gate, report_from_dict
from nsa_cli.benchmark.runner import Runner
from nsa_cli.benchmark.timing import Deadline, Timing, WallClock, Work, measure, percentile, summarize
from nsa_cli.config import NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.ops import reference
from tests.inputs import LONG

CPU = torch.device("cpu")
SMALL = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=5, window=12)
SHAPE = Shape(heads=4, kv_heads=2, dim_head=8, model_dim=16, model_depth=1)


class FakeClock:
    """A clock whose runs take the seconds it was given, one after another."""

    method = "fake"

    def __init__(self, seconds: Iterator[float]) -> None:
        self._seconds = seconds
        self.batches: list[int] = []

    def seconds(self, work: Work, setup: Work | None = None, repeats: int = 1) -> list[float]:
        self.batches.append(repeats)
        taken = []
        for _ in range(repeats):
            if setup is not None:
                setup()
            work()
            taken.append(next(self._seconds))
        return taken


def options(**changes: Any) -> BenchOptions:
    values: dict[str, Any] = {
        "seq_lens": (150,), "ladder": False, "heads": 4, "kv_heads": 2, "dim_head": 8, "model_dim": 16,
        "nsa": SMALL, "budget_s": 0.001, "limit_s": 100.0,
    }  # fmt: skip
    return BenchOptions(**{**values, **changes})


@pytest.fixture(scope="module")
def report() -> BenchReport:
    said: list[str] = []
    found = run_bench(options(seq_lens=(33, 150)), CPU, progress=said.append)
    assert said
    return found


def test_percentiles_lie_linearly_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([7.0], 0.9) == 7.0
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]) == Timing(
        median_s=6.0, p10_s=2.0, p90_s=10.0, repeats=11
    )
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_repeats_go_on_until_the_budget_is_spent_and_setup_precedes_each() -> None:
    calls: list[str] = []
    timing = measure(
        lambda: calls.append("work"), clock=FakeClock(iter([0.25] * 99)), budget_s=2.0,
        setup=lambda: calls.append("setup"),
    )  # fmt: skip
    assert timing.repeats == 8
    assert calls == ["setup", "work"] * 8


def test_a_slow_case_gets_the_least_repeats_and_a_fast_one_the_most() -> None:
    slow = measure(lambda: None, clock=FakeClock(iter([9.0, 7.0, 8.0])), budget_s=10.0)
    assert slow == Timing(median_s=8.0, p10_s=pytest.approx(7.2), p90_s=pytest.approx(8.8), repeats=3)
    assert measure(lambda: None, clock=FakeClock(iter([1e-6] * 500)), budget_s=1.0).repeats == 100


def test_two_repeats_are_enough_for_runs_far_beyond_the_budget_and_timed_runs_before_count() -> None:
    assert measure(lambda: None, clock=FakeClock(iter([1.6] * 9)), budget_s=1.0).repeats == 2
    assert measure(lambda: None, clock=FakeClock(iter([0.9] * 9)), budget_s=1.0).repeats == 3
    timing = measure(lambda: None, clock=FakeClock(iter([4.0] * 9)), budget_s=1.0, before=[2.0])
    assert timing == Timing(median_s=3.0, p10_s=2.2, p90_s=3.8, repeats=2)


def test_repeats_end_early_when_the_next_would_pass_the_deadline() -> None:
    now = iter([0.0, 4.0, 8.0])
    deadline = Deadline(10.0, now=lambda: next(now))
    timing = measure(
        lambda: None, clock=FakeClock(iter([4.0] * 9)), budget_s=99.0, remaining_s=deadline.remaining_s
    )  # fmt: skip
    assert timing.repeats == 2


def test_the_wall_clock_measures_the_work_and_not_its_disposal() -> None:
    class Slow:
        def __del__(self) -> None:
            torch.randn(600, 600) @ torch.randn(600, 600)

    assert WallClock().seconds(Slow)[0] < 1e-3


@pytest.mark.parametrize(("device", "counted"), [("cpu", [9.0]), ("cuda", [])])
def test_a_first_run_which_compiles_kernels_is_not_counted(
    device: str, counted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ceilings = FakeClock(iter([9.0])), Ceilings(flops_per_s=1.0, bytes_per_s=1.0)
    bench = Bench(torch.device(device), torch.float32, clock, ceilings, Deadline(99.0), 1.0)
    monkeypatch.setattr(bench, "peak", lambda work: (work(), 5)[1])
    assert bench.peak_and_seconds(lambda: None) == (5, counted)


def test_runs_are_handed_to_the_clock_together_once_their_length_is_known() -> None:
    clock = FakeClock(iter([0.5] + [0.125] * 99))
    assert measure(lambda: None, clock=clock, budget_s=1.0).repeats == 5
    assert clock.batches == [1, 2, 2]


def test_peak_memory_counts_a_temporary_that_is_gone_at_the_end() -> None:
    def work() -> None:
        torch.ones(64 * 2**20 // 4).sum()

    for _ in range(2):
        peak, method = peak_bytes(work, CPU)
        assert 60 * 2**20 < peak < 80 * 2**20, method


def test_a_busy_machine_is_measured_on_half_of_its_threads_and_says_so() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with settled_threads(probe=lambda threads: float(threads)) as notice:
            assert torch.get_num_threads() == 2
            assert "2 of 4" in notice
        with settled_threads(probe=lambda threads: 1.0 / threads) as notice:
            assert torch.get_num_threads() == 4
            assert notice == ""
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_roofline_takes_the_tighter_ceiling() -> None:
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0)
    assert ceilings.share(flops=50, moved_bytes=1, seconds=1.0) == 0.5
    assert ceilings.share(flops=50, moved_bytes=9, seconds=2.0) == 0.45


def test_the_ceiling_is_float32s_where_bfloat16_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(device: torch.device, dtype: torch.dtype, *_: Any) -> tuple[int, Timing]:
        return 10, summarize([2.0 if dtype == torch.bfloat16 else 1.0])

    monkeypatch.setattr("nsa_cli.benchmark.machine._largest_product", product)
    monkeypatch.setattr("nsa_cli.benchmark.machine.COPY_BYTES", {"cpu": 4096})
    assert measure_ceilings(CPU, torch.bfloat16, WallClock(), budget_s=0.001).flops_per_s == 2000.0


@pytest.mark.parametrize(("nsa", "tokens"), LONG[:3])
def test_sampled_rows_are_rows_of_the_reference(nsa: NSAConfig, tokens: int) -> None:
    work = cases.make_workload(tokens, SHAPE, 2, nsa, device=CPU, dtype=torch.float32, seed=3)
    x, at = {name: value.detach() for name, value in work.tensors.items()}, work.queries
    o_cmp, block_indices = reference.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], nsa)
    importance = reference.importance(reference.compressed_probabilities(x["q"], x["k_cmp"], nsa), tokens, nsa)
    cmp_rows, imp_rows = parity.compressed_rows(x["q"][:, :, at], x["k_cmp"], x["v_cmp"], at, tokens, nsa)
    torch.testing.assert_close(cmp_rows, o_cmp[:, :, at])
    torch.testing.assert_close(imp_rows, importance[:, :, at])
    whole = reference.nsa_attention(*(x[n] for n in ("q", "k", "v", "k_cmp", "v_cmp", "gates")), nsa,
                                    k_win=x["k_win"], v_win=x["v_win"])  # fmt: skip
    rows = cases.sparse_operator(work, "torch", block_indices).rows(*x.values())
    torch.testing.assert_close(rows, whole[:, :, at])
    dense = torch.nn.functional.scaled_dot_product_attention(
        x["q"], x["k"].repeat_interleave(2, 1), x["v"].repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(parity.dense_rows(x["q"][:, :, at], x["k"], x["v"], at), dense[:, :, at])
    assert parity.check_selection(block_indices[:, :, at], imp_rows, at, nsa, 1e-5) == ""


def test_a_wrong_selection_is_named() -> None:
    tokens, at = 107, torch.tensor([100])
    imp = torch.rand(1, 1, tokens, SMALL.num_select_blocks(tokens))
    right = reference.select(imp, SMALL)[:, :, at]
    rows = imp[:, :, at]

    def check(block_indices: torch.Tensor) -> str:
        return parity.check_selection(block_indices, rows, at, SMALL, 1e-5)

    assert check(right) == ""
    free = [j for j in range(1, 11) if j not in right.flatten().tolist()]
    worst = min(free, key=lambda j: float(rows[..., j]))
    places = [i for i, j in enumerate(right.flatten().tolist()) if 0 < j < 11]
    swapped = right.clone()
    swapped[..., places[0]] = worst
    assert "more important" in check(swapped.sort(-1).values)
    first = right.clone()
    first[..., 0] = free[0]
    assert "forced" in check(first.sort(-1).values)
    future = right.clone()
    future[..., places[-1]] = 13
    assert "future" in check(future.sort(-1).values)
    repeated = right.clone()
    repeated[..., 1] = repeated[..., 0]
    assert "different blocks" in check(repeated)


def test_what_is_not_finite_is_red_and_rounding_beside_a_zero_gradient_is_not() -> None:
    one = torch.ones(4)
    assert not parity.compare([("out", one * torch.nan, one)], 1e-2).ok
    assert parity.compare([("dq", one * 1e-7, one * 0), ("dv", one, one)], 1e-5).ok
    assert not parity.compare([("dq", one * 1e-3, one * 0), ("dv", one, one)], 1e-5).ok
    assert not parity.compare([("out", one * 1e-7, one * 0)], 1e-5).ok


def test_memory_is_poisoned_only_inside() -> None:
    with parity.poisoned(CPU):
        assert torch.empty(8).isnan().all()
        assert torch.ones(1).new_empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_variant_that_cannot_run_is_passed_over_and_the_fastest_is_taken() -> None:
    candidates = variants(CPU, 2)
    assert [candidate.expanded for candidate in candidates] == [False, True]
    seconds = iter([3.0, 1.0])
    assert fastest(candidates, lambda variant: lambda: None, FakeClock(seconds), budget_s=0.1) == candidates[1]

    def broken(variant: Variant) -> Callable[[], object]:
        if variant.expanded:
            raise RuntimeError("No available kernel")
        return lambda: None

    assert fastest(candidates, broken, FakeClock(iter([1.0] * 9)), budget_s=0.1) == candidates[0]


def test_a_report_has_every_row_measured_and_green(report: BenchReport) -> None:
    compared = ("forward", "backward", "training step", "decode attention", "prefill", "decode")
    branches = [f"branch {name}, {way}" for name in cases.BRANCHES for way in ("forward", "backward")]
    assert {row.name for row in report.rows} == {f"{case} @ {n}" for case in (*compared, *branches) for n in (33, 150)}
    assert report.ok, report.gates
    for row in report.rows:
        assert row.note == ""
        assert row.sparse is not None
        assert row.sparse.timing is not None
        assert (row.dense is None) == row.is_branch
        assert (row.speedup is None) == row.is_branch
        assert row.sparse.roofline is not None
        assert row.sparse.roofline > 0
        if row.case in ("forward", "backward", "decode", "decode attention") or row.is_branch:
            assert row.sparse.parity is not None
            assert row.sparse.parity.relative_l2 < 1e-5
    assert [crossover.case for crossover in report.crossovers] == list(compared)
    assert all("sparse" in sentence for sentence in report.crossover)
    assert report.environment["torch"] == torch.__version__
    assert report.config["kernel"] == "torch"
    assert report.config["shape"]["dtype"] == "float32"


def test_json_reads_back_the_same_and_csv_has_a_line_a_row(report: BenchReport) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert report_from_dict(json.loads(text)).to_dict() == report.to_dict()
    lines = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(lines) == len(report.rows)
    row, line = report.rows[0], lines[0]
    assert row.sparse is not None
    assert row.sparse.timing is not None
    assert float(line["sparse_median_s"]) == row.sparse.timing.median_s
    assert (line["case"], int(line["seq_len"]), line["sparse_ok"]) == (row.case, row.seq_len, "true")


def test_no_speed_is_reported_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.nsa_attention

    def wrong(*args: Any, **named: Any) -> torch.Tensor:
        return right(*args, **named) * 1.01

    monkeypatch.setattr(cases, "nsa_attention", wrong)
    report = run_bench(options(), CPU)
    rows = {row.case: row for row in report.rows}
    for case in ("forward", "backward"):
        figures = rows[case].sparse
        assert figures is not None
        assert figures.timing is None
        assert figures.roofline is None
        assert rows[case].speedup is None
        assert rows[case].dense.timing is not None
    assert rows["training step"].sparse is rows["decode"].sparse is None
    assert "relative L2" in rows["decode"].note
    assert rows["branch selected, forward"].sparse.timing is not None
    assert not report.ok
    assert not report.crossovers
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_leak_in_the_selection_makes_its_rows_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(work: cases.Workload, kernel: str) -> torch.Tensor:
        block_indices = select(work, kernel)
        block_indices[block_indices == 0] = 1
        return block_indices

    select = cases.select
    monkeypatch.setattr("nsa_cli.benchmark.runner.select", leaky)
    report = run_bench(options(groups=("branches", "decode")), CPU)
    rows = {row.case: row for row in report.rows}
    assert rows["branch compressed + selection, forward"].sparse.timing is None
    assert "selection" in rows["decode"].note
    assert not report.ok


def test_an_interrupted_report_holds_what_was_measured_and_says_that_more_is_missing(report: BenchReport, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(report.to_dict()))
    said: list[str] = []
    wanted = options(seq_lens=(33, 150), compare=earlier)
    found = run_bench(wanted, CPU, progress=said.append, should_stop=lambda: len(said) > 3)
    assert [row.name for row in found.rows] == [row.name for row in report.rows][:2]
    assert found.rows[0].dense is not None
    assert found.rows[0].sparse is not None
    assert found.notices[-1] == "interrupted: what had not been measured is missing"
    assert found.comparison == ()
    assert found.ok


def test_rows_that_would_not_end_in_time_are_left_out_and_named() -> None:
    report = run_bench(options(seq_lens=(40, 300), limit_s=0.02, groups=("attention",)), CPU)
    late = [row for row in report.rows if row.seq_len == 300]
    assert late
    assert any("time limit" in row.note for row in late)
    assert any("time limit" in notice for notice in report.notices)
    for row in report.rows:
        assert row.note or (row.dense is not None and row.sparse is not None)


def figures(median_s: float, check: Parity | None = None) -> Figures:
    timing = Timing(median_s=median_s, p10_s=median_s, p90_s=median_s, repeats=3)
    return Figures(kernel="k", timing=timing, peak_bytes=1, flops=1, moved_bytes=1, roofline=0.5, parity=check)


def row(case: str, tokens: int, dense_s: float | None, sparse_s: float) -> Row:
    dense = None if dense_s is None else figures(dense_s)
    return Row(case=case, seq_len=tokens, dense=dense, sparse=figures(sparse_s))


@pytest.mark.parametrize(
    ("speedups", "wins_from", "words"),
    [
        ((0.5, 0.9, 1.5, 3.0), 4096, "wins from 4,096 tokens, not at 2,048 (3.00x at 8,192)"),
        ((1.5, 2.0, 2.5, 3.0), 1024, "the shortest length measured"),
        ((0.2, 0.3, 0.4, 0.9), None, "at none of the lengths measured (1,024, 2,048, 4,096, 8,192), 0.90x at 8,192"),
        ((1.1, 0.9, 1.5, 3.0), 4096, "wins from 4,096 tokens"),
        ((0.9, 1.2, 1.5, 0.8), None, "does not win at the longest length measured (0.80x at 8,192)"),
    ],
)
def test_the_crossover_is_the_length_from_which_sparse_keeps_winning(
    speedups: tuple[float, ...], wins_from: int | None, words: str
) -> None:
    rows = [row("forward", 1024 << i, speedup, 1.0) for i, speedup in enumerate(speedups)]
    (found,) = find_crossovers([*reversed(rows), row("branch window, forward", 1024, None, 1.0)])
    assert found.wins_from == wins_from
    assert words in found.sentence


def test_one_length_brings_a_ladder_of_shorter_powers_of_two_and_several_do_not() -> None:
    assert BenchOptions().lengths() == (1024, 4096, 16384)
    assert BenchOptions(seq_lens=(5000,)).lengths() == (2048, 5000)
    assert BenchOptions(seq_lens=(65536,)).lengths() == (1024, 4096, 16384, 65536)
    assert BenchOptions(seq_lens=(1024,)).lengths() == (1024,)
    assert BenchOptions(seq_lens=(1,)).lengths() == (1,)
    assert BenchOptions(seq_lens=(8192, 512)).lengths() == (512, 8192)
    assert BenchOptions(seq_lens=(131072,), ladder=False).lengths() == (131072,)


def test_the_lengths_asked_for_come_before_the_rungs_that_only_name_the_crossover() -> None:
    bench = Bench(CPU, torch.float32, WallClock(), Ceilings(flops_per_s=1.0, bytes_per_s=1.0), Deadline(1.0), 1.0)
    runner = Runner(BenchOptions(), SHAPE, "torch", bench, lambda text: None)
    attention = [tokens for tokens, models in runner._order() if not models]
    assert attention == [1024, 16384, 4096]
    assert runner._order().index((16384, True)) < runner._order().index((4096, False))


def test_a_side_is_left_out_when_another_length_says_that_it_would_not_end_in_time() -> None:
    now = [0.0]
    deadline = Deadline(100.0, now=lambda: now[0])
    bench = Bench(CPU, torch.float32, WallClock(), Ceilings(flops_per_s=1.0, bytes_per_s=1.0), deadline, 1.0)
    runner = Runner(options(), SHAPE, "torch", bench, lambda text: None)
    assert runner._side("forward", "dense", 1000, lambda: figures(2.0)) == (figures(2.0), "")
    assert runner._side("forward", "dense", 3900, lambda: figures(30.0))[0] == figures(30.0)
    assert runner._side("forward", "dense", 4900, lambda: figures(47.0))[0] == figures(47.0)
    measured, note = runner._side("forward", "dense", 5200, lambda: figures(1.0))
    assert measured is None
    assert note == "dense left out, about 53 s a run: time limit"
    now[0] = 101.0
    assert runner._side("forward", "dense", 10, lambda: figures(1.0))[0] is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_a_side_that_does_not_fit_into_memory_is_left_out_and_the_report_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(bench: Bench, step: object) -> Figures:
        raise error

    monkeypatch.setattr("nsa_cli.benchmark.runner.measure_dense", too_large)
    rows = {row.case: row for row in run_bench(options(seq_lens=(40,), groups=("decode",)), CPU).rows}
    assert rows["decode attention"].note == "dense left out: out of memory"
    assert rows["decode attention"].dense is None
    assert rows["decode attention"].sparse.timing is not None
    assert rows["decode"].dense.timing is not None


def test_a_length_whose_inputs_do_not_fit_into_memory_is_left_out_and_the_others_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_small_batches(tokens: int, shape: Shape, batch: int, *given: object, **named: object) -> object:
        if tokens == 56 and batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_workload(tokens, shape, batch, *given, **named)  # type: ignore[arg-type]

    make_workload = runner_module.make_workload
    monkeypatch.setattr(runner_module, "make_workload", of_small_batches)
    asked = options(seq_lens=(40, 56), batch=2, groups=("attention", "branches", "decode"))
    report = run_bench(asked, CPU)
    rows = {(row.case, row.seq_len): row for row in report.rows}
    assert rows["forward", 40].sparse.timing is not None
    assert rows["forward", 56].note == rows["backward", 56].note == "left out with its inputs: out of memory"
    assert rows["decode attention", 56].sparse.timing is not None  # one sequence's attention was right
    assert "56 tokens: branches left out with their inputs: out of memory" in report.notices
    monkeypatch.setattr(Runner, "_check_one", lambda self, tokens: runner_module.TOO_LARGE)
    rows = {(row.case, row.seq_len): row for row in run_bench(asked, CPU).rows}
    assert rows["decode", 56].note == "sparse not timed: out of memory"


def test_models_are_not_timed_on_wrong_attention_whose_row_was_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*given: object) -> Figures:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nsa_cli.benchmark.runner.measure_forward", too_large)
    monkeypatch.setattr(Runner, "_check_one", lambda self, tokens: "output: wrong")
    rows = {row.case: row for row in run_bench(options(seq_lens=(40,), groups=("attention", "decode")), CPU).rows}
    assert rows["forward"].note == "dense left out: out of memory; sparse left out: out of memory"
    assert rows["decode"].note == "sparse not timed: output: wrong"


def test_a_batch_too_large_for_one_pass_is_read_in_several_and_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_cli.benchmark.models.PREFILL_TOKENS", 100)
    report = run_bench(options(seq_lens=(40,), batch=5, groups=("decode",)), CPU)
    assert report.ok
    rows = {row.case: row for row in report.rows}
    for side in (rows["decode"].dense, rows["decode"].sparse):
        assert side.parity.ok
        assert side.timing is not None
    whole = rows["decode"].sparse.cache_bytes
    monkeypatch.setattr("nsa_cli.benchmark.models.PREFILL_TOKENS", 1 << 17)
    again = run_bench(options(seq_lens=(40,), batch=5, groups=("decode",)), CPU)
    assert {row.case: row for row in again.rows}["decode"].sparse.cache_bytes == whole


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seq_lens": ()}, "seq_lens"),
        ({"seq_lens": (0,)}, "seq_lens"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads"),
        ({"dim_head": 257}, "dim_head"),
        ({"groups": ("speed",)}, "groups"),
        ({"dtype": "float8"}, "dtype"),
        ({"kernel": "cuda"}, "kernel"),
        ({"limit_s": 0.0}, "limit_s"),
    ],
)
def test_wrong_options_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} = "):
        options(**changes)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("kernel", ["triton", "flex"])
def test_what_is_not_available_ends_with_5(kernel: str) -> None:
    with pytest.raises(NsaError) as caught:
        run_bench(options(kernel=kernel), CPU)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


def slower(report: BenchReport, dense: float, sparse: float) -> tuple[Row, ...]:
    """The report's rows with all times multiplied."""

    def stretch(side: Figures | None, factor: float) -> Figures | None:
        return side and figures(side.timing.median_s * factor)

    return tuple(
        Row(case=r.case, seq_len=r.seq_len, dense=stretch(r.dense, dense), sparse=stretch(r.sparse, sparse)) for r in report.rows
    )


def test_only_what_became_slower_than_dense_and_in_itself_is_a_regression(report: BenchReport) -> None:
    here = report.environment
    other = {**report.environment, "device_name": "another machine"}
    compared, gate = compare_reports(report, report.rows, here, 0.1)
    assert gate.ok
    assert len(compared) == len(report.rows)
    _, gate = compare_reports(report, slower(report, 1.0, 1.3), here, 0.1)
    assert not gate.ok
    assert "forward @ 150" in gate.detail
    compared, gate = compare_reports(report, slower(report, 1.3, 1.3), here, 0.1)
    assert {item["name"].split(" ")[0] for item in compared if item["regression"]} == {"branch"}
    assert compare_reports(report, slower(report, 0.5, 0.5), other, 0.1)[1].ok
    assert not compare_reports(report, slower(report, 0.5, 0.7), other, 0.1)[1].ok


def test_a_row_that_turned_red_is_a_regression(report: BenchReport) -> None:
    red = Parity(max_error=1.0, relative_l2=1.0, tolerance=1e-5, ok=False, detail="output")
    before = report.rows[0]
    wrong = Figures(
        kernel="torch", timing=None, peak_bytes=1, flops=1, moved_bytes=1, roofline=None, parity=red
    )  # fmt: skip
    rows = (Row(case=before.case, seq_len=before.seq_len, dense=before.dense, sparse=wrong),)
    assert not parity_gate(rows).ok
    _, gate = compare_reports(report, rows, report.environment, 0.1)
    assert "red" in gate.detail


def test_an_earlier_report_is_compared_and_another_shape_is_refused(report: BenchReport, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report.to_dict()))
    again = run_bench(options(seq_lens=(33,), groups=("attention",), compare=old, tolerance=1000.0), CPU)
    assert [gate.name for gate in again.gates] == ["parity", "regression"]
    assert [item["name"] for item in again.comparison] == ["forward @ 33", "backward @ 33"]
    assert again.ok
    for changes, words in (({"heads": 8}, "heads"), ({"seq_lens": (34,), "groups": ("attention",)}, "no row")):
        with pytest.raises(NsaError, match=words) as caught:
            run_bench(options(compare=old, **changes), CPU)
        assert caught.value.exit_code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": "other"}', '{"format": "nsa-bench"}',
                                     '{"format": "nsa-bench", "format_version": 1, "rows": []}'])  # fmt: skip
def test_an_unusable_earlier_report_ends_with_3(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NsaError, match=r"old\.json") as caught:
        load_report(path)
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_benchmark_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_bench(options(seq_lens=(20,), groups=("decode",)), CPU)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
def test_a_small_report_on_a_gpu_is_green() -> None:
    report = run_bench(options(seq_lens=(300,), dim_head=64, heads=8, kv_heads=2, dtype="bfloat16"), torch.device("cuda"))
    assert report.ok, report.gates
    assert report.methods["time"].startswith("CUDA events")
