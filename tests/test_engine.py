"""Decoding in batches with a cache gives what each prompt would get alone without one."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.generation.engine import MAX_ROWS, Continuation, decode, generate, plan_batches
from nsa_cli.generation.sampling import SamplingConfig
from nsa_cli.model import Cache, Transformer, accounting, build_model

CONTEXT = 24
NSA = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, num_local=1, window=6)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [60, 61], [7] * 31, list(range(9))]


def _model(nsa: NSAConfig | None = NSA, **changes: Any) -> Transformer:
    values = {"vocab_size": 64, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 8, "context": CONTEXT}
    model = build_model(ModelConfig(nsa=nsa, **(values | changes)), kernel="torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return model.eval()


def _greedy(**changes: Any) -> SamplingConfig:
    return SamplingConfig(temperature=0, **({"max_tokens": 20} | changes))


def _tokens(found: list[Continuation]) -> list[list[int]]:
    return [continuation.tokens for continuation in found]


@pytest.mark.parametrize("nsa", [NSA, None], ids=["sparse", "dense"])
def test_greedy_text_is_the_same_with_and_without_the_cache(nsa: NSAConfig | None) -> None:
    """Beyond the trained context, for prompts of different lengths."""
    model = _model(nsa)
    config = _greedy(max_tokens=CONTEXT + 6)
    cached = generate(model, PROMPTS, config)
    assert _tokens(cached) == _tokens(generate(model, PROMPTS, config, use_cache=False))
    assert all(len(tokens) == CONTEXT + 6 for tokens in _tokens(cached))
    assert len({tuple(tokens) for tokens in _tokens(cached)}) == len(PROMPTS)


def test_sampled_text_is_the_same_with_and_without_the_cache() -> None:
    model = _model()
    config = SamplingConfig(top_k=20, max_tokens=15, continuations=2)
    cached = generate(model, PROMPTS, config)
    assert _tokens(cached) == _tokens(generate(model, PROMPTS, config, use_cache=False))


def test_greedy_text_is_the_argmax_of_the_full_forward_pass() -> None:
    model = _model()
    text = list(PROMPTS[1])
    for _ in range(12):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert generate(model, [PROMPTS[1]], _greedy(max_tokens=12))[0].tokens == text[17:]


@pytest.mark.parametrize("prefill_tokens", [1, 7, 40])
@pytest.mark.parametrize("token_budget", [1, 100, 300])
def test_batches_and_chunks_change_nothing(prefill_tokens: int, token_budget: int) -> None:
    model, config = _model(), SamplingConfig(max_tokens=9, continuations=3, seed=5)
    found: list[Continuation] = []
    decode(model, PROMPTS, config, on_finish=found.append, token_budget=token_budget, prefill_tokens=prefill_tokens)
    found.sort(key=lambda c: (c.prompt, c.continuation))
    assert [(c.prompt, c.continuation) for c in found] == [(i, k) for i in range(len(PROMPTS)) for k in range(3)]
    assert _tokens(found) == _tokens(generate(model, PROMPTS, config))


def test_a_prompt_gets_the_same_text_whoever_stands_beside_it() -> None:
    model, config = _model(), SamplingConfig(max_tokens=12, seed=11)
    whole = generate(model, PROMPTS, config)
    beside = generate(model, [PROMPTS[3], PROMPTS[1], [0] * 50], config)
    assert beside[1].tokens == whole[1].tokens
    # The same prompt at another index, by another number, or from another seed is another draw.
    same = generate(model, [PROMPTS[1]] * 2, SamplingConfig(max_tokens=12, seed=11, continuations=2))
    other_seed = generate(model, [PROMPTS[1]], SamplingConfig(max_tokens=12, seed=12))
    assert len({tuple(tokens) for tokens in _tokens([*same, *other_seed])}) == 5


def test_a_finished_sequence_leaves_and_the_others_go_on_alike() -> None:
    """Row i of a batch of 20 stops after i + 1 tokens."""
    model, config = _model(), SamplingConfig(max_tokens=18, seed=2)
    prompts = [[i, i + 1, i + 2] for i in range(20)]
    whole = generate(model, prompts, config)
    seen: dict[int, int] = {}
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))

    def stop(prompt: int, continuation: int, token: int) -> bool:
        seen[prompt] = seen.get(prompt, 0) + 1
        return seen[prompt] == prompt + 1

    found = generate(model, prompts, config, on_token=stop)
    for i, continuation in enumerate(found):
        assert continuation.tokens == whole[i].tokens[: i + 1]
        assert continuation.finish_reason == ("stop" if i < 18 else "length")
    assert rows[0] == 20
    assert rows[-1] <= 4


def test_continuations_share_one_reading_of_their_prompt() -> None:
    model = _model()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    generate(model, [PROMPTS[3]], SamplingConfig(max_tokens=4, continuations=6))
    assert shapes == [(1, 31), (6, 1), (6, 1), (6, 1)]
    shapes.clear()
    decode(model, [[1] * 50], SamplingConfig(max_tokens=2, continuations=3), on_finish=lambda c: None, token_budget=110)
    assert shapes == [(1, 50), (2, 1), (1, 1)]


def test_a_long_prompt_is_read_in_chunks() -> None:
    model = _model()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    decode(model, [[3] * 50], _greedy(max_tokens=1), on_finish=lambda c: None, prefill_tokens=20)
    assert shapes == [(1, 20), (1, 20), (1, 10)]


def test_tokens_are_handed_over_as_they_are_drawn() -> None:
    seen: list[tuple[int, int, int]] = []
    found = generate(_model(), PROMPTS[:2], _greedy(max_tokens=3), on_token=lambda *token: bool(seen.append(token)))
    wanted = [(i, 0, found[i].tokens[step]) for step in range(3) for i in range(2)]
    assert seen == wanted


def test_log_probabilities_belong_to_the_tokens_drawn() -> None:
    model = _model()
    found = generate(model, PROMPTS, SamplingConfig(temperature=1.5, top_k=9, max_tokens=6), logprobs=True)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt + continuation.tokens])
        with torch.no_grad():
            wanted = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = wanted.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(continuation.logprobs), wanted, atol=1e-4, rtol=1e-4)
    assert generate(model, PROMPTS[:1], _greedy())[0].logprobs is None


def test_an_interrupt_ends_at_the_next_token_and_begins_nothing_more() -> None:
    drawn: list[int] = []
    found: list[Continuation] = []
    stats = decode(
        _model(),
        [[1], [2]],
        _greedy(max_tokens=1000),
        on_finish=found.append,
        on_token=lambda prompt, number, token: bool(drawn.append(token)),
        should_stop=lambda: len(drawn) >= 3,
        token_budget=1,
    )
    assert stats.interrupted
    assert [(c.prompt, len(c.tokens), c.finish_reason) for c in found] == [(0, 3, "interrupted")]


def test_an_interrupt_is_heard_between_the_chunks_of_a_prefill() -> None:
    polls: list[None] = []
    found: list[Continuation] = []
    stats = decode(
        _model(),
        [[1] * 100],
        _greedy(),
        on_finish=found.append,
        should_stop=lambda: bool(polls.append(None)) or len(polls) > 2,
        prefill_tokens=10,
    )
    assert stats.interrupted
    assert (found, len(polls), stats.tokens) == ([], 3, 0)


def test_totals_count_every_prompt_and_token_once() -> None:
    config = SamplingConfig(max_tokens=5, continuations=2)
    stats = decode(_model(), PROMPTS, config, on_finish=lambda c: None)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.tokens == 5 * 2 * len(PROMPTS)
    assert stats.cache_bytes > 0
    assert stats.tokens_per_s > 0
    assert not stats.interrupted


def test_totals_tell_what_the_cache_holds_and_what_a_step_reads_of_it() -> None:
    model = _model()
    stats = decode(model, [[1] * 20, [2] * 31], _greedy(max_tokens=9), on_finish=lambda c: None)
    assert stats.cache_bytes == 2 * accounting.cache_bytes(model.config, 31 + 9, 4)
    assert stats.read_bytes == sum(accounting.decode_read_bytes(model.config, n + 8, 4) for n in (20, 31))


def test_a_cache_goes_when_its_rows_go_on_in_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Cache] = weakref.WeakSet()
    select, counts = Cache.select, []

    def watched(self: Cache, rows: Any) -> Cache:
        chosen = select(self, rows)
        alive.update((self, chosen))
        counts.append(len(alive))
        return chosen

    monkeypatch.setattr(Cache, "select", watched)
    ends = {i: 2 + 3 * i for i in range(6)}
    drawn = [0] * 6
    def stops(prompt: int, continuation: int, token: int) -> bool:
        drawn[prompt] += 1
        return drawn[prompt] >= ends[prompt]

    generate(_model(), [[i + 1] for i in range(6)], _greedy(max_tokens=30), on_token=stops)
    assert len(counts) >= 4
    assert max(counts) == 2


def test_memory_that_does_not_suffice_ends_with_the_flags_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Transformer, "forward", exhausted)
    with pytest.raises(NsaError, match="3 sequences of up to 25 tokens, whose cache alone takes") as caught:
        generate(_model(), [[1] * 5, [2], [3]], _greedy())
    assert caught.value.exit_code == ExitCode.FAILURE
    assert "--max-tokens" in caught.value.hint
    assert "--dtype bfloat16" in caught.value.hint


def test_a_step_that_cannot_be_captured_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in graphs fall back to ordinary ones where there is no CUDA, with one warning and the same text."""
    model, prompts, greedy = _model(None, depth=1), PROMPTS[:3], _greedy(max_tokens=8)
    want = generate(model, prompts, greedy)
    monkeypatch.setattr("nsa_cli.generation.engine.can_step", lambda model: True)
    monkeypatch.setattr("nsa_cli.generation.engine.EAGER_STEPS", 3)
    monkeypatch.setattr("nsa_cli.generation.engine.CAPTURED_FROM", 1)
    with pytest.warns(UserWarning, match="without a CUDA graph") as told:
        got = generate(model, prompts, greedy)
    assert len(told) == 1
    assert _tokens(got) == _tokens(want)


@pytest.mark.gpu
@pytest.mark.parametrize("nsa", [NSA, None], ids=["sparse", "dense"])
def test_captured_steps_draw_the_same_text_on_a_gpu(nsa: NSAConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the reserved room, so that graphs are captured anew in a larger cache. The two ways round differently, so that no
    prompt may repeat one token: all its blocks would be equal, and rounding would say which of them are selected."""
    monkeypatch.setattr("nsa_cli.generation.engine._RESERVED_TOKENS", 12)
    config = _model(nsa).config
    model = build_model(config, device="cuda", kernel="auto").eval()
    prompts = [[(7 * i * i + 3 * i) % 64 for i in range(31)] if len(set(p)) < len(p) else p for p in PROMPTS]
    greedy = _greedy(max_tokens=40)
    monkeypatch.setattr("nsa_cli.generation.engine.CAPTURED_FROM", 1)
    with warnings.catch_warnings():  # a capture that failed says so
        warnings.simplefilter("error")
        captured = generate(model, prompts, greedy)
    monkeypatch.setattr("nsa_cli.generation.engine.can_step", lambda model: False)
    assert _tokens(captured) == _tokens(generate(model, prompts, greedy))


def test_no_tokens_wanted_is_an_empty_continuation() -> None:
    found = generate(_model(), PROMPTS[:2], _greedy(max_tokens=0))
    assert [(c.tokens, c.finish_reason) for c in found] == [([], "length")] * 2


def test_no_prompts_is_no_continuations() -> None:
    assert generate(_model(), [], _greedy()) == []


@pytest.mark.parametrize(("prompt", "message"), [([], "has no tokens"), ([64], "token 64.*0 to 63"), ([-1, 3], "token -1")])
def test_a_prompt_that_cannot_be_read_is_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 1 .*{message}"):
        generate(_model(), [[1], prompt], _greedy())


def test_broken_weights_are_told_from_text() -> None:
    model = _model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NsaError, match="not finite") as caught:
        generate(model, [[1]], _greedy())
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_training_goes_on_after_sampling_in_the_middle_of_it() -> None:
    """Dropout is off for the samples and on again after them, and nothing made meanwhile breaks a backward pass."""
    torch.manual_seed(0)
    model = _model(dropout=0.5).train()
    first, second = (generate(model, PROMPTS, _greedy(max_tokens=40)) for _ in range(2))
    assert _tokens(first) == _tokens(second)
    assert model.training
    ids = torch.randint(64, (2, 40))
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 5), st.integers(1, 3000))
def test_a_batch_stays_within_the_budget_unless_one_prompt_exceeds_it(rows: list[int], n: int, budget: int) -> None:
    batches = list(plan_batches(rows, n, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        count = len(batch) * n
        assert len(batch) == 1 or (count * max(rows[i] for i in batch) <= budget and count <= MAX_ROWS)
        assert batch == sorted(batch)


def test_the_first_prompt_is_in_the_first_batch() -> None:
    assert 0 in next(iter(plan_batches([900, 1, 1, 1, 800], 1, 1000)))
