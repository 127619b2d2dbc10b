"""`nsa bench --tune`: what is measured, refused, kept and written; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nsa_cli.benchmark import BenchOptions, tune
from nsa_cli.benchmark.cases import make_workload
from nsa_cli.benchmark.timing import Work
from nsa_cli.benchmark.tune import TuneReport, run_tune
from nsa_cli.cli.app import run
from nsa_cli.config import NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.ops.triton import launch, tuning
from nsa_cli.ops.triton.tuning import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = tuning.device_name(DEVICE)
NSA = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=8)
OPTIONS = BenchOptions(
    seq_lens=(9, 25), heads=2, kv_heads=1, dim_head=16, nsa=NSA, dtype="float32", kernel="triton", budget_s=1e-6
)  # fmt: skip
FLAGS = ["--heads=2", "--kv-heads=1", "--dim-head=16", "--seq-len=25", "--compress-block=8", "--compress-stride=4",
         "--budget=0.01", "--select-block=8", "--num-selected=4", "--window=8", "--dtype=float32"]  # fmt: skip
FIRST = tuning.default("compressed", 64, torch.float32)
FAST, SLOW, WRONG, BROKEN = Tile(32, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(128, 128, 4, 1)
SECONDS = {FAST: 0.5, SLOW: 0.995, WRONG: 0.1}


def tile_of(kernel: str) -> Tile:
    return tuning.tile(kernel, width=16, group=2, dtype=torch.float32, device=DEVICE)


class TileClock:
    """A clock whose seconds are those of the fastest configuration in use: it runs nothing, the interpreter being slow."""

    method = "fake"

    def __init__(self) -> None:
        self.slower: list[float] = []  # of the first readings

    def seconds(self, work: Work, setup: Work | None = None, repeats: int = 1) -> list[float]:
        taken = min(SECONDS.get(tile_of(kernel), 1.0) for kernel in tuning.KERNELS)
        return [taken * (self.slower.pop(0) if self.slower else 1.0) for _ in range(repeats)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces the candidates: few(kernel=[tile, ..]); the clock goes by the tile in use."""

    def replace(**tiles: list[Tile]) -> None:
        monkeypatch.setattr(tune, "CANDIDATES", {kernel: tuple(some) for kernel, some in tiles.items()})

    monkeypatch.setattr(tune, "make_clock", lambda device: TileClock())
    monkeypatch.delenv(tuning.TABLE_VARIABLE, raising=False)
    tuning._device_table.cache_clear()
    yield replace
    tuning._device_table.cache_clear()


def tuned(path: Path) -> TuneReport:
    return run_tune(OPTIONS, path, DEVICE)


def test_what_was_faster_than_one_slow_reading_alone_is_not_kept(
    few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = TileClock()
    clock.slower = [3.0]  # the configuration in use, while the machine was busy
    monkeypatch.setattr(tune, "make_clock", lambda device: clock)
    few(compressed=[SLOW])
    (kernel,) = tuned(tmp_path / "table.json").kernels
    assert not clock.slower
    assert kernel.after == kernel.before
    assert kernel.after_s == kernel.before_s


def test_the_table_that_it_writes_is_the_one_that_launches_use(
    few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    few(compressed=[SLOW, FAST], compressed_dkv=[SLOW])
    said: list[str] = []
    report = run_tune(OPTIONS, path, DEVICE, progress=said.append)
    forward, backward = report.kernels
    assert (forward.kernel, forward.way, forward.before, forward.after) == ("compressed", "forward", FIRST, FAST)
    assert (forward.before_s, forward.after_s, forward.tried, forward.refused) == (1.0, 0.5, 2, {})
    assert (backward.kernel, backward.way, backward.after) == ("compressed_dkv", "backward", backward.before)
    assert said[1] == f"compressed: {FIRST} -> {FAST}; forward 1000.000 -> 500.000 ms; 0 of 2 refused"
    assert "compressed_dkv" in said[2]
    assert report.sizes["seq_len"] == 25
    keys = {"compressed/float32/64/2": FAST, "compressed_dkv/float32/64/2": backward.before}
    assert tuning.read_table(path) == {NAME: keys}
    assert tile_of("compressed") == FIRST
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
    tuning._device_table.cache_clear()
    assert tile_of("compressed") == FAST


@pytest.mark.parametrize("error", [OutOfResources(300, 227, "shared memory"), RuntimeError("PassManager::run failed")], ids=type)
def test_a_candidate_that_cannot_run_is_refused_and_the_next_one_tried(
    error: Exception, few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = launch.attend_forward

    def fails(*given: Any) -> Tensor:
        if tile_of("compressed") == BROKEN:
            raise error
        return right(*given)

    monkeypatch.setattr(launch, "attend_forward", fails)
    few(compressed=[BROKEN, FAST])
    (found,) = tuned(tmp_path / "table.json").kernels
    assert found.after == FAST
    assert found.refused == {str(BROKEN): f"{type(error).__name__}: {error}"}
    assert "1 of 2 refused" in str(found)


@pytest.mark.parametrize(("kernel", "name"), [("compressed", "attend_forward"), ("compressed_dq", "attend_dq")])
def test_a_candidate_that_gives_something_else_is_refused_however_fast(
    kernel: str, name: str, few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(launch, name)

    def wrong(branch: str, *given: Any, **named: Any) -> Any:
        result = right(branch, *given, **named)
        out: Tensor = given[3] if name == "attend_forward" else given[7]
        if branch == "cmp" and tile_of(kernel) == WRONG:
            out.mul_(1.01)
        return result

    monkeypatch.setattr(launch, name, wrong)
    few(**{kernel: [WRONG]})
    (found,) = tuned(tmp_path / "table.json").kernels
    assert found.after == found.before
    assert "relative L2" in found.refused[str(WRONG)]


def test_one_percent_less_is_no_accident_and_less_than_that_is(few: Callable[..., None], tmp_path: Path) -> None:
    few(compressed=[SLOW])
    (found,) = tuned(tmp_path / "table.json").kernels
    assert (found.after, found.after_s, found.refused) == (FIRST, 1.0, {})


def test_what_the_table_holds_of_other_devices_and_kernels_stays(few: Callable[..., None], tmp_path: Path) -> None:
    path, other = tmp_path / "table.json", {"compressed/256": Tile(128, 64, 8, 3), "window/256/4": Tile()}
    before = {"Another GPU": other, NAME: {"compressed/float32/64/2": SLOW, "importance/128": Tile(64, 128)}}
    path.write_text(tuning.table_to_json(before))
    few(compressed=[FAST])
    (found,) = tuned(path).kernels
    assert found.before == SLOW
    after = {"compressed/float32/64/2": FAST, "importance/128": Tile(64, 128)}
    assert tuning.read_table(path) == {"Another GPU": other, NAME: after}


@pytest.mark.parametrize("content", ["", "[]", '{"a": {"compressed/256": {"columns": 3}}}', None])
def test_a_file_that_is_no_table_ends_with_3_before_anything_runs(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "make_workload", lambda *given, **named: pytest.fail("measured"))
    path = tmp_path / "table.json"
    if content is None:
        path = tmp_path / "none" / "table.json"
    else:
        path.write_text(content)
    with pytest.raises(NsaError, match=r"table\.json") as caught:
        tuned(path)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert content is None or path.read_text() == content


def test_an_error_leaves_no_override_behind_and_no_table(
    few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(compressed=[FAST])
    path, right, calls = tmp_path / "table.json", launch.select, []

    def fails_later(*given: Any) -> Tensor:
        calls.append(tile_of("compressed"))
        if calls[-1] == FAST:
            raise ValueError("a shape")
        return right(*given)

    monkeypatch.setattr(launch, "select", fails_later)
    with pytest.raises(ValueError, match="a shape"):
        tuned(path)
    assert calls[-1] == FAST
    assert tile_of("compressed") == FIRST
    assert not path.exists()


@pytest.mark.parametrize(
    ("nsa", "idle"),
    [(NSA, ()), (replace(NSA, num_selected=2, num_init=1, num_local=1), ("selected_parts", "selected_gradient_parts")),
     (replace(NSA, num_init=0, num_local=0), ("forced_dkv",))],
)  # fmt: skip
def test_kernels_that_a_geometry_never_runs_are_left_alone(nsa: NSAConfig, idle: tuple[str, ...]) -> None:
    work = make_workload(25, OPTIONS.shape("cpu"), 1, nsa, device=DEVICE, dtype=torch.float32, seed=0)
    tuner = tune.Tuner(work, TileClock(), 0.0, {})
    assert tuner.kernels() == [kernel for kernel in tuning.KERNELS if kernel not in ("window", "window_dq", *idle)]


def test_every_kernel_has_a_few_candidates_that_differ() -> None:
    for kernel in tune.CANDIDATES:
        assert 4 <= len(tune.candidates(kernel, torch.bfloat16)) <= 10, kernel
        assert all(tile.stages == 1 for tile in tune.candidates(kernel, torch.float32)), kernel


def test_the_command_says_a_line_a_kernel_on_stderr_and_the_result_on_stdout(
    few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few(compressed=[FAST])
    assert run(["bench", "--tune", "table.json", *FLAGS]) == 0
    said = capfd.readouterr()
    assert f"nsa: compressed: {FIRST} -> {FAST}; forward" in said.err
    assert "table.json" in said.out
    assert str(FAST) in said.out
    assert run(["bench", "--tune", "table.json", "--json", "--quiet", *FLAGS]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["kernels"][0]["after"] == asdict(FAST)
    assert said.err == ""
    assert tuning.read_table(tmp_path / "table.json")[NAME]["compressed/float32/64/2"] == FAST


@pytest.mark.parametrize("flags", ["--csv", "--compare old.json", "--kernel torch"])
def test_flags_that_mean_nothing_beside_it_are_refused(flags: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--tune", "table.json", *flags.split()]) == ExitCode.USAGE
    assert flags.split()[0] in capfd.readouterr().err


@pytest.mark.usefixtures("no_interpreter")
def test_without_a_gpu_it_ends_with_5_and_says_so_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--tune", str(tmp_path / "table.json"), "--device", "cpu", *FLAGS]) == ExitCode.UNAVAILABLE
    said = capfd.readouterr()
    error, *hint = said.err.splitlines()
    assert error == "nsa: error: kernel 'triton' needs a CUDA GPU"
    assert len(hint) <= 1
    assert said.out == ""
    assert not list(tmp_path.iterdir())
