"""The lines that must work as written, run as a user would: in a shell, through real pipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from nsa_cli.checkpoint import read_info
from tests.command_line import shell, text


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the first line has been run on data.txt."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "data.txt").write_text(text(20_000))
    result = shell("nsa train data.txt --sparse --kernel triton --steps 12 --dim 32 --depth 2", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == b"ckpt.safetensors\n"
    return folder


def test_train_writes_its_four_files(here: Path) -> None:
    names = {"ckpt.safetensors", "ckpt.best.safetensors", "ckpt.state.safetensors", "ckpt.metrics.jsonl"}
    assert {path.name for path in here.glob("ckpt*")} == names
    info = read_info(here / "ckpt.safetensors")
    assert info.step == 12
    assert info.config.nsa is not None
    assert info.config.nsa.window == 32


def test_sample_answers_a_prompt_from_echo(here: Path) -> None:
    first = shell('echo "hi" | nsa sample ckpt.safetensors', cwd=here)
    assert (first.returncode, first.stderr) == (0, b"")
    assert first.stdout.endswith(b"\n")
    assert len(first.stdout) > 200
    line = "printf 'hi\\nthe cat\\n' | nsa sample ckpt.safetensors --max-tokens 20 --jsonl -n 2 --stop z"
    several = shell(line, cwd=here, NSA_SEED="3")
    records = [json.loads(record) for record in several.stdout.splitlines()]
    assert [(record["prompt"], record["continuation"]) for record in records] == [
        ("hi", 0), ("hi", 1), ("the cat", 0), ("the cat", 1),
    ]  # fmt: skip
    assert all("z" not in record["text"] for record in records)


def test_bench_reports_a_table_and_json_that_it_can_compare_with(here: Path) -> None:
    flags = "--seq-len 128 --no-ladder --heads 4 --kv-heads 2 --dim-head 16 --dim 32 --budget 0.02"
    flags += " --compress-block 8 --compress-stride 4 --select-block 16 --num-selected 4 --window 32 --device cpu"
    result = shell(
        f"nsa bench {flags} --json > old.json && nsa bench {flags} --compare old.json --tolerance 1000", cwd=here
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((here / "old.json").read_text())
    assert {row["seq_len"] for row in report["rows"]} == {128}
    table = result.stdout.decode()
    assert "…" not in table
    for part in ("forward", "backward", "training step", "prefill", "decode", "dense", "sparse", "ok    regression"):
        assert part in table
    assert re.search(r"sparse (wins|does not win)", table)


def test_inspect_shows_all_at_full_width_and_json_holds_the_same(here: Path) -> None:
    line = "echo 'the cat sat on a mat and the dog ran far' | nsa inspect ckpt.safetensors"
    result = shell(f"{line} --query -1 --query 3 --npz arrays.npz | cat", cwd=here, COLUMNS="20")
    assert (result.returncode, result.stderr) == (0, b"")
    table = result.stdout.decode()
    assert "…" not in table
    assert re.search(r"0 init .*\d local", table)
    assert all(f"head {head}" in table for head in range(4))
    found = json.loads(shell(f"{line} --query -1 --query 3 --json", cwd=here).stdout)
    assert (found["layers"], found["queries"], found["checkpoint"]) == ([0, 1], [39, 3], "ckpt.safetensors")
    first = found["views"][0]
    for head in first["heads"]:
        for score in head["scores"]:
            assert f"{score:.4f}" in table
    arrays = np.load(here / "arrays.npz", allow_pickle=False)
    assert np.array_equal(arrays["scores"][0, 0, 0], np.float32(first["heads"][0]["scores"]))
