"""Training on several processes: what one would have done, one voice, one writer, one end."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.checkpoint import load_state, read_info
from nsa_cli.cli.app import run as command
from nsa_cli.cli.resolve import resolve, settings_of
from nsa_cli.cli.train import _fit_team, train
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model.parallel import ContextParallel
from nsa_cli.training.batches import BatchPlan
from nsa_cli.training.distributed import Team, open_team
from nsa_cli.training.graphs import refuse_cuda_graph
from tests.command_line import text
from tests.processes import FOUR, TOGETHER, UNEVEN, launch, run_to_the_end, said
from tests.training_runs import curve, documents_corpus, records, run, same_tensors, steps, text_corpus, weights


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder of its own for each process's text."""
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()
    return tmp_path


def same_curve(folder: Path, one: str, other: str, rel: float = 1e-5) -> None:
    """Equal losses, validations and gradient norms, but for the order of additions."""
    first, second = curve(folder, one), curve(folder, other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for line, again in zip(first, second, strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert (key in again) == (key in line), (line["step"], key)
            assert key not in line or again[key] == pytest.approx(line[key], rel=rel), (line["step"], key)


def same_over_all(folder: Path, world: int) -> None:
    """A sequence over all processes: logits, loss and gradients of one, dense and sparse, to 1e-5 in float32."""
    for rank in range(world):
        differences = said(folder, rank)["differences"]
        assert len(differences) == 6
        assert all(value < 1e-5 for value in differences.values()), differences


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("windows", "micro"), [(5, 2), (1, 1), (8, 3), (4, 9), (16, 1)])
def test_replicas_share_a_step_once_in_equally_many_parts(windows: int, micro: int, replicas: int) -> None:
    plan = BatchPlan(windows, micro)
    shares = [plan.parts(replica, replicas) for replica in range(replicas)]
    assert len({len(parts) for parts in shares}) == 1
    seen = [i for parts in shares for part, counted in parts if counted for i in range(part.start, part.stop)]
    assert seen == list(range(windows))
    assert all(counted in (0, part.stop - part.start) and part.stop - part.start <= micro for p in shares for part, counted in p)
    assert max(sum(counted for _, counted in parts) for parts in shares) == -(-windows // replicas)


WAYS = ("ddp", "fsdp")
PAIRED = ("context ddp", "context fsdp")
"""Two processes a sequence."""


def test_two_processes_train_as_one_and_each_can_go_on_where_the_other_stopped(folders: Path) -> None:
    corpus = text_corpus(folders)
    for sparse in (False, True):
        run(folders, corpus, f"one {sparse}", sparse=sparse, config=UNEVEN)
    run(folders, corpus, "bfloat16 one", sparse=True, dtype=torch.bfloat16, config=UNEVEN)
    for way in WAYS:
        run(folders, corpus, f"{way} after one", config={**UNEVEN, "steps": 2})
    assert launch(2, "runs", folders) == [0, 0]
    for way in PAIRED:
        for sparse in (False, True):
            same_curve(folders, f"one {sparse}", f"{way} {sparse}")
    same_over_all(folders, 2)
    for way in WAYS:
        for sparse in (False, True):
            same_curve(folders, f"one {sparse}", f"{way} {sparse}")
            header = records(folders, f"{way} {sparse}")[0]
            assert (header["world_size"], header["parallel"]) == (2, way)
        run(folders, corpus, f"one after {way}", config=UNEVEN, resume=folders / f"one after {way}.safetensors")
        for name, sizes in ((f"{way} after one", [1, 2]), (f"one after {way}", [2, 1])):
            same_curve(folders, "one False", name)
            assert [record["world_size"] for record in records(folders, name) if "event" in record] == sizes
        same_curve(folders, "bfloat16 one", f"bfloat16 {way}", rel=1e-2)
        assert {tensor.dtype for tensor in weights(folders, f"bfloat16 {way}").values()} == {torch.float32}
        # A NaN that one process meets is no process's update.
        assert [line["skipped"] for line in steps(folders, f"bad number {way}")] == [0, 0, 1, 1, 1]
        assert all(bool(tensor.isfinite().all()) for tensor in weights(folders, f"bad number {way}").values())
    assert [said(folders, rank)["skipped"] for rank in (0, 1)] == [[1, 1], [1, 1]]
    # Whoever looks at the model in a validation has all of it, whatever is shared: two validations in ten runs.
    assert said(folders, 1)["seen"] == [[1, 5, 256]] * 20
    # The reader of process 0 went away, and both stopped where the state was saved.
    left = [said(folders, rank)["left"] for rank in (0, 1)]
    assert left == [[signal.SIGPIPE, left[0][1]]] * 2
    assert load_state(folders / "left alone.state.safetensors")[1]["step"] == left[0][1] < 10
    assert curve(folders, "whole") == curve(folders, "parts"), "with dropout, the same bits on as many processes"
    assert same_tensors(weights(folders, "whole"), weights(folders, "parts"))
    assert not list(folders.glob("**/*.tmp"))


def test_four_processes_train_as_one_although_some_have_nothing_to_do(folders: Path) -> None:
    run(folders, text_corpus(folders), "one", sparse=True, config=UNEVEN)
    assert launch(4, "runs", folders) == [0] * 4
    for way in FOUR:
        same_curve(folders, "one", f"{way} True")
        assert records(folders, f"{way} True")[0]["context_parallel"] == (2 if way in PAIRED else 1)
    same_over_all(folders, 4)


def test_pieces_are_shared_in_a_way_that_balances_the_causal_triangle() -> None:
    for size in (1, 2, 3, 4):
        sharers = [ContextParallel(None, rank, size) for rank in range(size)]  # type: ignore[arg-type]
        tokens = 24 * size
        seen = [sharer.split(torch.arange(tokens), 0) for sharer in sharers]
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(tokens))
        assert len({int((positions + 1).sum()) for positions in seen}) == 1, "equally many (query, key) pairs each"
        with pytest.raises(ValueError, match=f"a multiple of {2 * size}"):
            sharers[0].ranges(tokens + 1)


def test_a_context_that_cannot_be_shared_is_refused_with_one_that_can() -> None:
    team = Team(0, 4, context=ContextParallel(None, 0, 4))  # type: ignore[arg-type]
    team.require_context(64)
    with pytest.raises(NsaError, match="--seq-len 60 cannot be cut into 8") as caught:
        team.require_context(60)
    assert (caught.value.exit_code, caught.value.hint) == (ExitCode.USAGE, "--seq-len 64 can")
    alone = "--context-parallel 2: must divide the processes, of which there is one"
    with pytest.raises(NsaError, match=alone), open_team(context=2):
        pass


def test_packed_documents_a_dense_start_and_a_teacher_are_shared_out_too(folders: Path) -> None:
    corpus = documents_corpus(folders / "2")
    run(folders, corpus, "dense", config={**UNEVEN, "steps": 2})
    start = {"init_from": folders / "dense.safetensors", "distill_from": folders / "dense.safetensors"}
    run(folders, corpus, "one", sparse=True, config=TOGETHER, **start)
    assert launch(2, "together", folders) == [0, 0]
    for way in WAYS:
        same_curve(folders, "one", way)
        last, want = steps(folders, way)[-1], steps(folders, "one")[-1]
        assert last["distill_kl"] == pytest.approx(want["distill_kl"], rel=1e-3)
        assert [path.name for path in sorted(folders.glob(f"{way}.step-*"))] == [f"{way}.step-00000004.safetensors"]


def test_an_error_on_one_process_ends_all_and_is_told_once(folders: Path) -> None:
    assert launch(2, "errors", folders) == [0, 0]
    first, second = (said(folders, rank)["failure"] for rank in (0, 1))
    assert (second["kind"], second["message"], second["code"]) == ("NsaError", "no room on the second machine", 1)
    assert (first["kind"], first["code"]) == ("ToldElsewhere", 1)
    assert "no room on the second machine" in first["message"]

    told = [said(folders, rank)["other data"] for rank in (0, 1)]
    assert {each["code"] for each in told} == {ExitCode.BAD_INPUT}
    assert sorted(each["kind"] for each in told) == ["NsaError", "ToldElsewhere"]
    assert all("process 1 has data" in each["message"] for each in told)
    assert not list(folders.glob("other data*"))


def test_a_signal_to_one_process_stops_all_at_one_step_with_the_state_saved(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text())
    assert launch(2, "stopped", tmp_path) == [ExitCode.TERMINATED] * 2
    _, meta = load_state(tmp_path / "ckpt.state.safetensors")
    assert meta["step"] == read_info(tmp_path / "ckpt.safetensors").step == steps(tmp_path)[-1]["step"]


def test_torchrun_trains_says_everything_once_and_gives_the_losses_of_one_process(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "data.txt").write_text(text())
    monkeypatch.chdir(tmp_path)
    line = "train data.txt --sparse --dim 16 --depth 1 --heads 2 --seq-len 32 --batch-tokens 128 --steps 4 --log-every 1"
    line += " --eval-every 2 --device cpu"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_to_the_end([*torchrun, "-m", "nsa_cli", *line.split(), "--out", "two.safetensors"], cwd=tmp_path)
    told = done.stderr.decode()
    assert (done.returncode, done.stdout) == (0, b"two.safetensors\n"), told
    assert len(re.findall(r"on 2 processes \(ddp\), cpu", told)) == 1
    assert len(re.findall("finished at step 4", told)) == 1
    assert command([*line.split(), "--out", "one.safetensors", "-q"]) == 0
    same_curve(tmp_path, "one", "two")


def test_what_many_processes_cannot_share_is_refused(monkeypatch: Any, capsys: Any) -> None:
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with open_team("cpu") as team:
        assert team.alone
    # What several processes would tear apart, and one reads.
    with pytest.raises(NsaError, match="stdin") as caught:
        _fit_team(["data.txt", "-"], resolve("train", {"train": settings_of(train)}, flags={}, environment={}), Team(1, 2))
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(NsaError, match="this run has 2"):
        refuse_cuda_graph(torch.device("cuda"), "triton", processes=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(["train", "data.txt", "--device", "cpu"]) == ExitCode.UNAVAILABLE
    assert "WORLD_SIZE=2 without MASTER_PORT" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", "1")
    assert command(["train", "data.txt", "--device", "cuda:0"]) == ExitCode.USAGE
    assert "--device cuda:0 is one GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_a_wrong_command_line_is_told_by_the_first_of_torchruns_processes(
    monkeypatch: Any, capsys: Any, rank: str, told: bool
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, value)
    assert command(["train", "data.txt", "--stepz", "3"]) == ExitCode.USAGE
    assert ("--stepz" in capsys.readouterr().err) == told


@pytest.mark.parametrize("rank", ["0", "1", "2"])
def test_what_is_refused_before_the_processes_can_speak_is_told_by_the_first(
    tmp_path: Path, monkeypatch: Any, capsys: Any, rank: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(text(2000))
    Path("run.toml").write_text("[train]\nstepz = 3\n")
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    for flags, code, message in (
        ("--context-parallel 2", ExitCode.USAGE, "--context-parallel 2: must divide the processes, of which there are 3"),
        ("--config run.toml", ExitCode.BAD_INPUT, "stepz"),
        ("", ExitCode.UNAVAILABLE, "WORLD_SIZE=3 without MASTER_ADDR"),
    ):
        assert command(["train", "data.txt", *flags.split()]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err if rank == "0" else captured.err == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert command(["train", "data.txt", "--device", "cuda:1"]) == ExitCode.USAGE
    assert bool(capsys.readouterr().err) == (rank == "0")
    # One GPU for three processes: the first that has none says so, which is not the first of all.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if rank != "0":
        assert command(["train", "data.txt", "--device", "cuda"]) == ExitCode.UNAVAILABLE
        assert ("process 1 of this machine finds 1 CUDA GPU" in capsys.readouterr().err) == (rank == "1")
