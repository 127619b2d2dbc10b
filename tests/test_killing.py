"""A training run killed at any moment, in a save too, goes on to the bits of one that was never killed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_cli.checkpoint import load_checkpoint, load_state
from tests.killing import KEPT, STEPS, Lives, leftovers, lives, wait_for_a_save, wait_for_lines
from tests.training_runs import curve, same_tensors, weights

MOST_LEFTOVERS = 10
"""A temporary file and its folder for each of the four files of a run, and for a numbered copy."""


@pytest.fixture(scope="module")
def forked() -> Iterator[Lives]:
    with lives() as server:
        yield server


def state_step(folder: Path) -> int | None:
    """Step of the state; every file that is there is read to its end, and none may be broken or behind."""
    if not (folder / "ckpt.state.safetensors").exists():
        assert not list(folder.glob("ckpt*")), "the state is the first file of a run"
        return None
    tensors, meta = load_state(folder / "ckpt.state.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())
    for path in folder.glob("ckpt*.safetensors"):
        if ".state." not in path.name:
            assert load_checkpoint(path)[1].step <= meta["step"]
    logged = logged_steps(folder)
    assert meta["step"] <= len(logged) <= meta["step"] + 1, "every step is saved right after its line"
    return int(meta["step"])


def logged_steps(folder: Path) -> list[int]:
    """Steps in the metrics, of which only the last line may be cut off."""
    path = folder / "ckpt.metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [record["step"] for record in records if "step" in record]
    assert steps == list(range(1, len(steps) + 1))
    return steps


def kill_and_resume(forked: Lives, folder: Path, *, kills: int, seed: int) -> str:
    """Runs in folders below `folder`, each killed up to six times on its way, until there were `kills` kills.

    A kill comes a random moment after a random step has been logged, or as soon as a file is being written after it.
    Returns one line about what was met.
    """
    numbers = random.Random(seed)
    whole = folder / "whole"
    whole.mkdir()
    forked.begin(whole)
    assert forked.end() == 0
    killed, in_a_save, runs, before_any_state = 0, 0, 0, 0
    while killed < kills:
        runs += 1
        here = folder / f"run{runs}"
        here.mkdir()
        saved: int | None = None
        for line in sorted(numbers.randrange(STEPS) for _ in range(min(6, kills - killed))):
            before = leftovers(here)
            child = forked.begin(here)
            wait_for_lines(here, line)
            if numbers.random() < 0.5:
                wait_for_a_save(here)
            else:
                time.sleep(numbers.uniform(0.0, 0.1))
            code = forked.kill(child)
            if code == 0:  # it was faster
                break
            assert code == -9
            killed += 1
            left = leftovers(here)
            assert len(left) <= MOST_LEFTOVERS, left
            step = state_step(here)
            assert step is not None or saved is None
            assert (saved or 0) <= (step or 0), "a saved step was lost"
            saved = step
            in_a_save += not left <= before
            before_any_state += step is None
        else:
            forked.begin(here)
            assert forked.end() == 0
        assert state_step(here) == STEPS
        assert leftovers(here) == set()
        assert {path.name for path in here.iterdir()} == {path.name for path in whole.iterdir()}
        assert curve(here) == curve(whole)
        names = [path.name.removesuffix(".safetensors") for path in whole.glob("*.safetensors")]
        assert len(names) == 3 + KEPT
        assert all(same_tensors(weights(here, name), weights(whole, name)) for name in names)
    return (
        f"seed {seed}: {killed} kills in {runs} runs of {STEPS} steps, {in_a_save} of them within a save, "
        f"{before_any_state} before the first state; every run ended with the bits of the uninterrupted one"
    )


def test_a_run_killed_six_times_at_random_ends_with_the_same_bits(forked: Lives, tmp_path: Path, seed: int) -> None:
    print(kill_and_resume(forked, tmp_path, kills=6, seed=seed))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sixty_kills_at_random_lose_nothing(forked: Lives, tmp_path: Path, seed: int) -> None:
    told = kill_and_resume(forked, tmp_path, kills=60, seed=seed)
    print(told)
    assert ", 0 of them within a save" not in told
