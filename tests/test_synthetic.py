"""Synthetic tasks: every answer follows from its input, examples are a function of their draw, accuracy is the metric."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from nsa_cli.cli.app import run as command
from nsa_cli.data import NO_TARGET, ByteTokenizer, Corpus, Mixture, Tokenizer, load_corpus, step_draws
from nsa_cli.data.synthetic import Synthetic, make_synthetic
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.training import batches
from nsa_cli.training.signals import Interruption
from nsa_cli.training.validation import Validation, validation_loss
from tests.test_tokenizer import BPETokenizer, byte_level_spec
from tests.training_runs import CONTEXT, curve, records, run, same_tensors, steps, weights

CPU = torch.device("cpu")
SMALL = "--dim 16 --depth 1 --heads 2 --seq-len 32 --batch-tokens 64 --steps 2 --eval-tokens 320 --device cpu"


def source(spec: str, context: int, tokenizer: Tokenizer | None = None, **options: Any) -> Synthetic:
    return make_synthetic(f"synthetic:{spec}", tokenizer or ByteTokenizer(), context=context, **options)


def examples(spec: str, length: int, draws: list[int], tokenizer: Tokenizer | None = None) -> list[tuple[list[int], list[int]]]:
    windows = source(spec, length, tokenizer).windows(np.array(draws, dtype=np.uint64), context=length)
    assert windows.graded
    assert windows.begins is None
    assert windows.inputs.shape == windows.targets.shape == (len(draws), length)
    return list(zip(windows.inputs.tolist(), windows.targets.tolist(), strict=True))


def solve_mqar(inputs: list[int], pairs: int, keys: int) -> list[int]:
    """Targets, read off the inputs alone."""
    memory = dict(zip(inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
    assert len(memory) == pairs
    return [memory[token] if place >= 2 * pairs and token < keys else NO_TARGET for place, token in enumerate(inputs)]


def solve_copying(inputs: list[int], tokens: int) -> list[int]:
    symbols = [token for token in inputs[:-tokens] if token != 0]
    assert inputs[-tokens:] == [1] * tokens
    return [NO_TARGET] * (len(inputs) - tokens) + symbols


def solve_passkey(inputs: list[int], tokenizer: Tokenizer, digits: int) -> list[int]:
    text = tokenizer.decode(inputs).decode()
    (key,) = re.findall(rf"The pass key is (\d{{{digits}}})\. Remember it\. \1 is the pass key\. ", text)
    answer = tokenizer.encode(key.encode()).tolist()
    assert re.search(r"What is the pass key\? The pass key is \d*$", text)
    assert inputs[len(inputs) - len(answer) + 1 :] == answer[:-1]
    return [NO_TARGET] * (len(inputs) - len(answer)) + answer


DRAWS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3)


@given(DRAWS, st.integers(1, 128), st.integers(0, 100))
def test_every_question_of_mqar_has_its_answer_before_it(draws: list[int], pairs: int, more: int) -> None:
    for inputs, targets in examples(f"mqar,pairs={pairs}", 4 * pairs - 1 + more, draws):
        solved = solve_mqar(inputs, pairs, 128)
        assert targets == solved
        assert sum(target != NO_TARGET for target in targets) == pairs
        assert [inputs[place + 1] for place, target in enumerate(targets[:-1]) if target != NO_TARGET] == [
            target for target in targets[:-1] if target != NO_TARGET
        ]


@given(DRAWS, st.integers(1, 30), st.integers(2, 254), st.integers(0, 100))
def test_copying_asks_for_the_symbols_in_their_order(draws: list[int], tokens: int, symbols: int, more: int) -> None:
    for inputs, targets in examples(f"copying,tokens={tokens},symbols={symbols}", 2 * tokens + more, draws):
        assert targets == solve_copying(inputs, tokens)
        assert max(inputs) < 2 + symbols


@given(DRAWS, st.integers(1, 12), st.integers(0, 500))
def test_a_passkey_stands_in_the_text_that_asks_for_it(draws: list[int], digits: int, more: int) -> None:
    tokenizer = ByteTokenizer()
    length = source(f"passkey,digits={digits}", 2000).task.least_length(tokenizer) + more
    for inputs, targets in examples(f"passkey,digits={digits}", length, draws):
        assert targets == solve_passkey(inputs, tokenizer, digits)


def test_a_passkey_is_text_to_any_vocabulary() -> None:
    tokenizer = BPETokenizer(byte_level_spec())
    for inputs, targets in examples("passkey,digits=4", 400, [1, 2, 3], tokenizer):
        assert targets == solve_passkey(inputs, tokenizer, 4)


def test_the_depth_of_a_passkey_is_where_it_was_put() -> None:
    def places(setting: str) -> list[float]:
        made = examples(f"passkey{setting}", 3000, list(range(99)))
        return sorted(bytes(inputs).index(b"The pass key is") / 3000 for inputs, _ in made)

    assert places(",depth=0")[-1] == 0
    assert places(",depth=1")[0] > 0.95
    anywhere = places("")
    assert anywhere[0] < 0.1
    assert 0.35 < anywhere[50] < 0.65
    assert anywhere[-1] > 0.85


def test_most_questions_of_a_small_power_come_soon() -> None:
    def median(power: float) -> float:
        found = examples(f"mqar,pairs=4,power={power}", 999, list(range(60)))
        return float(np.median([place for _, targets in found for place, target in enumerate(targets) if target != NO_TARGET]))

    assert median(0.01) < 100 < 300 < median(1.0)


def test_an_example_of_a_draw_is_fixed_for_good() -> None:
    none = NO_TARGET
    (inputs, targets), *_ = examples("mqar,pairs=2", 11, [7])
    assert inputs == [34, 189, 37, 162, 34, 189, 37, 162, 185, 142, 236]
    assert targets == [none, none, none, none, 189, none, 162, none, none, none, none]
    (inputs, targets), *_ = examples("copying,tokens=3", 9, [7])
    assert inputs == [0, 4, 0, 3, 14, 0, 1, 1, 1]
    assert targets == [none] * 6 + [4, 3, 14]
    (inputs, targets), *_ = examples("passkey,digits=3", 120, [7])
    needle = b"The pass key is 250. Remember it. 250 is the pass key. "
    assert bytes(inputs) == b"The grass " + needle + b"is green. The sWhat is the pass key? The pass key is 25"
    assert targets == [none] * 117 + list(b"250")


@pytest.mark.parametrize("spec", ["mqar", "copying,tokens=3", "passkey"])
def test_a_window_depends_on_its_own_draw_alone(spec: str) -> None:
    task, draws = source(spec, 150), step_draws(seed=1, step=2, count=9)
    whole, part = task.windows(draws, context=150), task.windows(draws[4:6], context=150)
    np.testing.assert_array_equal(whole.inputs[4:6], part.inputs)
    np.testing.assert_array_equal(whole.targets[4:6], part.targets)
    assert len({tuple(row) for row in whole.inputs.tolist()}) == 9
    near = np.array([2**64 - 1, 2**64 - 2, 2**63, 2**63 + 1], dtype=np.uint64)
    assert len({tuple(row) for row in task.windows(near, context=150).inputs.tolist()}) == 4


def test_validation_examples_are_the_same_every_time_and_not_those_of_training() -> None:
    task = source("mqar,pairs=4", CONTEXT)
    fixed = [window.inputs[0].tolist() for window in task.fixed_windows(context=CONTEXT, max_tokens=10 * CONTEXT)]
    assert fixed == [window.inputs[0].tolist() for window in task.fixed_windows(context=CONTEXT, max_tokens=10 * CONTEXT)]
    assert len(fixed) == 10
    for seed in (0, 1, 1337):
        trained = task.windows(step_draws(seed=seed, step=0, count=200), context=CONTEXT).inputs.tolist()
        assert not any(row in trained for row in fixed)


def test_short_examples_share_a_window_as_documents() -> None:
    task = source("copying,tokens=2,length=10", 32)
    draws = np.array([1, 2], dtype=np.uint64)
    windows = task.windows(draws, context=32)
    assert windows.begins is not None
    assert np.flatnonzero(windows.begins[0]).tolist() == [0, 10, 20, 30]
    parts = [slice(start, start + 10) for start in (0, 10, 20)]
    rows = [(windows.inputs[0, part].tolist(), windows.targets[0, part].tolist()) for part in parts]
    for inputs, targets in rows:
        assert targets == solve_copying(inputs, 2)
    assert rows[0] != rows[1]
    assert windows.targets[:, 30:].tolist() == [[NO_TARGET] * 2] * 2
    assert source("copying,tokens=2,length=10", 32, pack=False).windows(draws, context=32).begins is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mqr", "no task 'mqr' | did you mean 'mqar'? tasks are passkey, mqar, copying"),
        ("", "no task ''"),
        ("mqar,pair=3", "no parameter 'pair' | did you mean 'pairs'? mqar takes pairs, power, length"),
        ("mqar,pairs=few", "pairs 'few' is not an integer"),
        ("mqar,power=", "power '' is not a number"),
        ("mqar,power=0", "power = 0.0: must be above 0"),
        ("mqar,power=nan", "power = nan: must be above 0"),
        ("mqar,pairs=0", "pairs = 0: must be at least 1"),
        ("mqar,pairs=129", "pairs = 129: must be at most 128, the keys of a vocabulary of 256"),
        ("mqar,pairs=9", "an example takes at least 35 tokens, and it has 32 | --seq-len 35"),
        ("mqar,length=33", "length 33 is more than --seq-len 32"),
        ("copying,symbols=255", "symbols = 255: must be at most 254"),
        ("copying,tokens=0", "tokens = 0"),
        ("passkey,depth=2", "depth = 2.0: must be between 0 and 1, or -1"),
        ("passkey,digits=0", "digits = 0"),
        ("passkey", "takes at least 101 tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(spec: str, told: str) -> None:
    with pytest.raises(NsaError) as caught:
        source(spec, 32)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.message.startswith(f"synthetic:{spec}: ")
    assert told in f"{caught.value.message} | {caught.value.hint}"


def test_a_query_string_says_the_same() -> None:
    assert source("mqar?pairs=3&power=0.5", 32).fingerprint == source("mqar,power=0.5,pairs=3", 32).fingerprint
    assert source("mqar,pairs=3", 32).fingerprint != source("mqar,pairs=4", 32).fingerprint
    assert source("mqar,pairs=3", 32).fingerprint != source("mqar,pairs=3", 33).fingerprint


@pytest.mark.parametrize("spec", ["passkey,digits=3", "mqar,pairs=3,power=0.5", "copying,tokens=2,length=10"])
def test_what_is_spelled_out_makes_the_same_task(spec: str) -> None:
    made = source(spec, 128)
    assert make_synthetic(made.spelled_out, ByteTokenizer(), context=128).fingerprint == made.fingerprint


def load(*sources: str, **options: Any) -> Corpus:
    settings: dict[str, Any] = {"val_fraction": 0.2, "context": CONTEXT, **options}
    return load_corpus(sources, ByteTokenizer(), **settings)


def validated(corpus: Corpus, forward: Any, micro: int = 3) -> Validation:
    plan = batches.BatchPlan(micro, micro)
    fixed = batches.validation_batches(corpus.validation, plan, context=CONTEXT, max_tokens=20 * CONTEXT, device=CPU)
    found = validation_loss(
        forward, fixed, autocast=nullcontext, interruption=Interruption(), weights=corpus.weights
    )
    assert found is not None
    return found


def test_accuracy_is_the_share_of_right_answers() -> None:
    corpus = load("synthetic:mqar,pairs=4")

    def solver(wrong: int) -> Any:
        def forward(ids: torch.Tensor, targets: Any, cu_seqlens: Any) -> torch.Tensor:
            assert targets is None
            answers = torch.tensor([solve_mqar(row, 4, 128) for row in ids.tolist()])
            places = (answers != NO_TARGET).cumsum(1)
            answers = torch.where(places <= wrong, 0, answers).clamp(min=0)  # 0 is a key, and never an answer
            return 20.0 * F.one_hot(answers, 256).float()

        return forward

    assert validated(corpus, solver(0)).accuracy == 1.0
    assert validated(corpus, solver(1)).accuracy == 0.75
    assert validated(corpus, solver(4)).accuracy == 0.0
    assert validated(corpus, solver(0)).loss < 1e-5 < 19 < validated(corpus, solver(4)).loss


def test_a_task_is_learned_and_its_accuracy_recorded(tmp_path: Path) -> None:
    corpus = load("synthetic:copying,tokens=1,symbols=4,length=4")
    result = run(tmp_path, corpus, config={"steps": 40, "eval_every": 40, "batch_tokens": 512, "lr": 1e-2, "log_every": 40})
    line = steps(tmp_path)[-1]
    assert line["val_accuracy"] > 0.9
    assert "val_accuracies" not in line
    assert line["bits_per_byte"] is line["val_bits_per_byte"] is None
    assert result.val_loss == line["val_loss"] < 0.5
    assert records(tmp_path)[0]["data"]["train_tokens"] is None


@pytest.mark.parametrize("spec", ["synthetic:mqar,pairs=4", "synthetic:copying,tokens=3,length=13"])
def test_a_resumed_run_on_a_task_continues_to_the_same_bits(tmp_path: Path, spec: str) -> None:
    config = {"schedule": "constant", "eval_every": 2}
    run(tmp_path, load(spec), "whole", sparse=True, config={**config, "steps": 6})
    run(tmp_path, load(spec), "parts", sparse=True, config={**config, "steps": 4})
    run(tmp_path, load(spec), "parts", sparse=True, config={**config, "steps": 6}, resume=tmp_path / "parts.safetensors")
    assert same_tensors(weights(tmp_path, "whole"), weights(tmp_path, "parts"))
    assert curve(tmp_path, "whole") == curve(tmp_path, "parts")


def test_tasks_and_text_are_mixed_by_weight_and_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text and more of it " * 40)
    text, tasks = f"{tmp_path}/a.txt", ("synthetic:mqar,pairs=4", "synthetic:copying,tokens=4")
    corpus = load(f"{text}@0.5", f"{tasks[0]}@0.25", f"{tasks[1]}@0.25")
    assert isinstance(corpus.training, Mixture)
    windows = corpus.training.windows(step_draws(seed=1, step=1, count=2000), context=CONTEXT)
    answers = (windows.targets != NO_TARGET).sum(1)
    assert (answers == CONTEXT).mean() == pytest.approx(0.5, abs=0.05)
    assert (answers == 4).mean() == pytest.approx(0.5, abs=0.05)
    run(tmp_path, corpus, config={"steps": 2, "eval_every": 2})
    line = steps(tmp_path)[-1]
    assert line["val_losses"].keys() == {text, *tasks}
    assert line["val_accuracies"].keys() == set(tasks)
    assert line["val_accuracy"] == pytest.approx(sum(line["val_accuracies"].values()) / 2)
    with pytest.raises(NsaError, match="has no size that other DATA could be drawn beside"):
        load(text, tasks[0])


def test_a_file_that_is_called_like_a_task_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("synthetic:mqar").write_text("a file " * 40)
    assert bytes(load("synthetic:mqar").train).startswith(b"a file")


def test_without_a_held_out_share_a_task_is_not_validated(tmp_path: Path) -> None:
    result = run(tmp_path, load("synthetic:mqar,pairs=4", val_fraction=0.0), config={"val_fraction": 0.0, "steps": 2})
    assert result.best_val_loss is None


def test_the_command_line_trains_on_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(f"train synthetic:mqar,pairs=4 {SMALL}".split()) == 0
    told = capsys.readouterr().err
    assert "training data that is made as it is needed" in told
    assert re.search(r"val accuracy \d+\.\d%", told)
    assert records(tmp_path)[0]["data"]["sources"] == ["synthetic:mqar,pairs=4"]
    assert command(["train", "synthetic:mqar,pairs=5", "--resume", "ckpt.safetensors"]) == ExitCode.BAD_INPUT
    assert "the data was" in capsys.readouterr().err
    assert command(f"train synthetic:mqra {SMALL} --overwrite".split()) == ExitCode.BAD_INPUT
    assert "did you mean 'mqar'?" in capsys.readouterr().err
