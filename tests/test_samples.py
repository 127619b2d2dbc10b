"""The sample text is what its script writes, and the sample scripts run as a user would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent.parent / "samples"
SCRIPTS = sorted(SAMPLES.glob("*.sh"))
TINY = ["--dim", "16", "--depth", "1", "--eval-tokens", "1024"]


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command away from the repository, its exit code checked; `nsa` is this tree's."""
    environment = os.environ | {
        "NSA": f"{sys.executable} -m nsa_cli",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(SAMPLES.parent),
        "PYTHONIOENCODING": "utf-8",
        **variables,
    }
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    return done


def test_the_tales_are_the_bytes_that_their_script_writes(tmp_path: Path) -> None:
    written = run(sys.executable, SAMPLES / "make_tales.py", cwd=tmp_path, PYTHONHASHSEED="123").stdout
    assert written.encode() == (SAMPLES / "tales.txt").read_bytes()
    assert len(written) >= 100_000


def test_another_seed_tells_other_tales(tmp_path: Path) -> None:
    one, two = (
        run(sys.executable, SAMPLES / "make_tales.py", "--seed", seed, "--bytes", "5000", cwd=tmp_path).stdout
        for seed in "12"
    )
    assert one != two
    assert 5000 <= len(one) < 10_000


def test_every_tale_needs_at_its_end_what_it_said_at_its_start() -> None:
    tales = (SAMPLES / "tales.txt").read_text().split("\n\n\n")[:-1]
    assert len(tales) > 100
    assert len(set(tales)) == len(tales)
    for tale in tales:
        thing, receiver, message = re.search(r'Take this (.+?) to (\w+), the .*say to h\w+: (.+?)\."', tale).groups()
        hero = re.match(r"\d+\. (\w+) and the", tale).group(1)
        arrival, home = tale.split("\n\n")[-2:]
        assert message in arrival.lower(), tale
        assert f"{receiver} has the {thing} now" in home, tale
        assert f'"And the money?" {hero} laid ' in home, tale
        assert len(tale) - tale.index(message) > 800, "nothing to remember"


def test_the_coins_of_every_tale_add_up() -> None:
    words = re.split(" ", "no one two three four five six seven eight nine ten eleven twelve")
    numbers = {word: number for number, word in enumerate(words)}
    for tale in (SAMPLES / "tales.txt").read_text().split("\n\n\n")[:-1]:
        have = numbers[re.search(r"counted (\w+) coins? into", tale).group(1)]
        home = tale.split("\n\n")[-1]
        spent = sum(numbers[word] for word in re.findall(r"(?:took (?:me over the water for )?)(\w+) coins?", home))
        earned = sum(numbers[word] for word in re.findall(r"earned (\w+) coins?", home))
        assert numbers[re.search(r"laid (\w+) coins?", home).group(1)] == have - spent + earned, tale


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_executable_strict_and_without_syntax_errors(script: Path) -> None:
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", script], check=True)


def test_there_are_scripts_and_the_readme_names_each() -> None:
    assert len(SCRIPTS) >= 3
    readme = (SAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in [*SCRIPTS, SAMPLES / "tales.txt"])


def test_stories_are_trained_and_told_in_one_pipe(tmp_path: Path) -> None:
    done = run(SAMPLES / "stories.sh", *TINY, cwd=tmp_path, STEPS="2", OUT=str(tmp_path / "out"))
    stories = done.stdout.split("\n\n* * *\n\n")
    assert [story[:6] for story in stories] == ["In the", "On a n", '"Who s', ""]
    assert (tmp_path / "out" / "stories.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left where it was run"


@pytest.mark.slow
def test_dense_and_sparse_are_trained_and_compared(tmp_path: Path) -> None:
    done = run(SAMPLES / "dense_and_sparse.sh", *TINY, cwd=tmp_path, STEPS="2", OUT=str(tmp_path / "out"))
    assert re.match(r"dense: 7\.\d+ bits per byte.*\nsparse: 7\.\d+ bits per byte", done.stdout)
    assert "--- dense\n" in done.stdout
    assert "--- sparse\n" in done.stdout


@pytest.mark.slow
def test_the_gate_writes_its_baseline_once_and_then_compares(tmp_path: Path) -> None:
    variables = {"SEQ_LEN": "256", "TOLERANCE": "99"}
    first = run(SAMPLES / "bench_gate.sh", "base.json", "--budget", "0.05", cwd=tmp_path, **variables)
    assert "wrote base.json" in first.stderr
    before = (tmp_path / "base.json").read_bytes()
    second = run(SAMPLES / "bench_gate.sh", "base.json", "--budget", "0.05", cwd=tmp_path, **variables)
    assert "regression" in second.stdout
    assert (tmp_path / "base.json").read_bytes() == before


def test_the_kernel_table_prints_a_block_a_shape(tmp_path: Path) -> None:
    """With small blocks and one short length: in Triton's interpreter where there is no GPU."""
    geometry = [
        "--compress-block", "8", "--compress-stride", "4", "--select-block", "8", "--num-selected", "3", "--window",
        "8", "--num-local", "1", "--budget", "0.01",
    ]  # fmt: skip
    sizes = {"SHAPES": "2,1,16 2,2,16", "SEQ_LENS": "24", "NSA_KERNEL_TABLE": ""}
    table = run(SAMPLES / "kernel_table.sh", *geometry, cwd=tmp_path, **sizes).stdout
    assert "2 query heads, 1 key/value heads of 16" in table
    assert "2 query heads, 2 key/value heads of 16" in table
    assert table.count("triton") == 4
    assert table.count("agree with the float32 reference") == 2


@pytest.mark.slow
def test_the_decode_table_prints_models_and_what_sample_itself_takes(tmp_path: Path) -> None:
    tiny = ["--heads", "2", "--kv-heads", "1", "--dim-head", "16", "--dim", "16", "--depth", "1", "--budget", "0.01"]
    sizes = {"ATTENTION": "", "BASE": "1,64", "TOKENS": "8", "PRESET": "tiny"}
    table = run(SAMPLES / "decode_table.sh", *tiny, cwd=tmp_path, **sizes).stdout
    assert table.count("decode attention: sparse wins") == 1
    assert len(re.findall(r"nsa: 1 prompts, 8 tokens, [\d,]+ tokens/s; cache: ", table)) == 2
    assert not list(tmp_path.iterdir())
