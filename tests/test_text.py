"""What goes in and out of `nsa sample` as bytes: framing, streaming, stop strings, JSON."""

from __future__ import annotations

import base64
import codecs
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nsa_cli.config import ModelConfig
from nsa_cli.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.generation.sampling import SamplingConfig
from nsa_cli.generation.text import StreamFilter, TextOptions, TokenText, incomplete_tail, run, split_prompts
from nsa_cli.model import Transformer, build_model

# Few symbols, so that stop strings overlap themselves and one another, and characters of one to four bytes.
STOPS = st.lists(st.text("ab€\n", min_size=1, max_size=4).map(str.encode), max_size=3)
TEXTS = st.one_of(
    st.text("ab€é😀\n", max_size=24).map(str.encode),
    st.lists(st.sampled_from([b"a", b"b", b"\xe2", b"\x82", b"\xac", b"\xf0", b"\xff", b"\xc3"])).map(b"".join),
)


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """Bytes, and the same bytes in pieces, empty ones too."""
    data = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=len(data) + 2)))
    return data, [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _offline(data: bytes, stops: Sequence[bytes]) -> bytes:
    starts = [data.find(stop) for stop in stops]
    return data[: min((start for start in starts if start >= 0), default=len(data))]


@settings(max_examples=300)
@given(split_texts(), STOPS)
def test_any_split_into_tokens_gives_the_text_before_the_earliest_stop(
    split: tuple[bytes, list[bytes]], stops: list[bytes]
) -> None:
    data, pieces = split
    stream = StreamFilter(stops)
    shown = b"".join([*[stream.feed(piece) for piece in pieces], stream.finish()])
    assert shown == _offline(data, stops)


@given(split_texts(), STOPS)
def test_once_stopped_nothing_more_comes(split: tuple[bytes, list[bytes]], stops: list[bytes]) -> None:
    stream = StreamFilter(stops)
    for piece in split[1]:
        before = stream.stopped
        shown = stream.feed(piece)
        assert not (before and shown)
    assert not stream.stopped or stream.finish() == b""


@given(st.text("aé€😀", max_size=20), st.data())
def test_no_piece_ends_inside_a_character(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=30)))
    stream = StreamFilter(["é€".encode()])
    for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        stream.feed(raw[a:b]).decode("utf-8")
    stream.finish().decode("utf-8")


@given(st.binary(max_size=8))
def test_an_incomplete_tail_is_what_a_utf8_decoder_waits_for(data: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    assert incomplete_tail(data) == len(decoder.getstate()[0])


def test_only_what_is_in_doubt_is_held_back() -> None:
    stream = StreamFilter([b"END", b"\n\n"])
    fed = [b"one E", b"N", b"x\n", b"t", "€".encode()[:2], "€".encode()[2:], b"\nE", b"\n", b"more"]
    shown = [stream.feed(piece) for piece in fed]
    assert shown == [b"one ", b"", b"ENx", b"\nt", b"", "€".encode(), b"\n", b"E", b"\nmore"]
    assert not stream.stopped


def test_a_stop_string_may_end_and_another_begin_in_one_token() -> None:
    stream = StreamFilter([b"ab", b"abab!", b"cab"])
    assert stream.feed(b"xxcabyy") == b"xx"
    assert stream.stopped
    # A stop string that is complete waits for one that began before it.
    longer = StreamFilter([b"b", b"abc"])
    assert (longer.feed(b"xab"), longer.stopped) == (b"x", False)
    assert (longer.feed(b"c"), longer.stopped) == (b"", True)
    shorter = StreamFilter([b"b", b"abc"])
    assert (shorter.feed(b"xab"), shorter.feed(b"x"), shorter.stopped) == (b"x", b"a", True)


def test_a_stop_string_that_was_waiting_cuts_the_text_at_its_end() -> None:
    stream = StreamFilter([b"b", b"abc"])
    assert (stream.feed(b"xab"), stream.finish()) == (b"x", b"a")


@pytest.mark.parametrize(
    ("data", "framing", "prompts"),
    [
        (b"", "lines", []),
        (b"", "whole", []),
        (b"", "null", []),
        (b"hi", "lines", [b"hi"]),
        (b"hi\n", "lines", [b"hi"]),
        (b"\n", "lines", [b""]),
        (b"a\n\nb\r\n", "lines", [b"a", b"", b"b\r"]),
        (b"a\xff\n\x00", "lines", [b"a\xff", b"\x00"]),
        (b"a\nb\n", "whole", [b"a\nb\n"]),
        (b"a\nb\x00c\n\x00", "null", [b"a\nb", b"c\n"]),
        (b"a\nb", "null", [b"a\nb"]),
        (b"\x00", "null", [b""]),
    ],
)
def test_prompts_are_cut_out_of_the_input(data: bytes, framing: Any, prompts: list[bytes]) -> None:
    assert split_prompts(data, framing) == prompts


class Script(nn.Module):
    """A stand-in for the model: after a prompt, it says what a dict has for the prompt, one id a step, then 'z'
    forever."""

    def __init__(self, answers: dict[bytes, bytes], vocab: int = 256) -> None:
        super().__init__()
        self.answers = answers
        self.config = ModelConfig(vocab_size=vocab)
        self.device = torch.device("cpu")

    def forward(self, ids: Tensor, cache: ScriptCache, counts: Sequence[int] | None = None, last: bool = False) -> Tensor:
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        counts = counts or [ids.shape[1]] * len(ids)
        for row, new in enumerate(ids.tolist()):
            for place, token in enumerate(new[: counts[row]]):
                cache.rows[row].append(token)
                text = bytes(cache.rows[row])
                prompt = max((p for p in self.answers if text.startswith(p)), key=len, default=None)
                said = b"" if prompt is None else self.answers[prompt][len(text) - len(prompt) :]
                logits[row, place, said[0] if said else ord("z")] = 50.0
        if last:
            return logits[torch.arange(len(ids)), torch.tensor(counts) - 1][:, None]
        return logits

    def make_cache(self, batch: int, capacity: int) -> ScriptCache:
        return ScriptCache([[] for _ in range(batch)])


class ScriptCache:
    nbytes = itemsize = 0

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    @property
    def host_lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def select(self, rows: Tensor) -> ScriptCache:
        return ScriptCache([list(self.rows[i]) for i in rows.tolist()])


def _run(model: Any, stdin: bytes, *, max_tokens: int = 8, n: int = 1, **options: Any) -> tuple[list[bytes], dict[str, Any]]:
    """The pieces that were written, and the summary."""
    pieces: list[bytes] = []
    sampling = options.pop("sampling", None) or SamplingConfig(temperature=0, max_tokens=max_tokens, continuations=n)
    should_stop = options.pop("should_stop", None)
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    text = TextOptions(sampling=sampling, **options)
    summary = run(model, tokenizer, io.BytesIO(stdin), pieces.append, text, should_stop=should_stop)
    return pieces, summary


def test_one_prompt_keeps_its_newlines_and_gets_one_at_the_end() -> None:
    pieces, summary = _run(Script({b"hi": b" a\nb\n"}), b"hi\n")
    assert b"".join(pieces) == b" a\nb\nzzz\n"
    assert summary["tokens"] == 8
    assert summary["finish_reasons"] == {"length": 1}


def test_text_comes_as_it_is_made_and_in_whole_characters() -> None:
    pieces, _ = _run(Script({b"hi": "a€é".encode()}), b"hi\n", max_tokens=7)
    assert pieces == [b"a", "€".encode(), "é".encode(), b"z", b"\n"]


def test_bytes_that_are_no_character_pass_through_raw() -> None:
    pieces, _ = _run(Script({b"\xff": b"\xfe\xe2a\xe2\x82"}), b"\xff\n", max_tokens=5)
    assert b"".join(pieces) == b"\xfe\xe2a\xe2\x82\n"


def test_line_i_answers_prompt_i_when_there_are_several() -> None:
    answers = {b"one": b" is\nnot this", b"two": b"\n", b"three": b" is a long answer\n", b"\n": b"blank\n"}
    pieces, summary = _run(Script(answers), b"one\ntwo\n\nthree\n", max_tokens=30)
    assert b"".join(pieces) == b" is\n\nblank\n is a long answer\n"
    assert summary["finish_reasons"] == {"stop": 4}


def test_the_first_unfinished_continuation_streams_while_others_wait() -> None:
    pieces, _ = _run(Script({b"a": b"123\n", b"b": b"4\n", b"c": b"5\n"}), b"a\nb\nc\n")
    assert pieces[:3] == [b"1", b"2", b"3"]
    assert b"".join(pieces) == b"123\n4\n5\n"


def test_an_empty_prompt_starts_from_a_newline() -> None:
    pieces, _ = _run(Script({b"\n": b"begin"}), b"\n", max_tokens=5)
    assert b"".join(pieces) == b"begin\n"


def test_no_prompt_is_unusable_input_with_a_remedy() -> None:
    with pytest.raises(NsaError, match="no prompt") as caught:
        _run(Script({}), b"")
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert "echo" in caught.value.hint


def test_whole_is_one_prompt_to_the_byte() -> None:
    pieces, _ = _run(Script({b"a\nb\n": b"c\nd"}), b"a\nb\n", framing="whole", max_tokens=3)
    assert b"".join(pieces) == b"c\nd\n"


def test_null_frames_both_ways_and_keeps_newlines() -> None:
    model = Script({b"a\n": b"x\ny\x00not this", b"b": b"\n\n\n"})
    pieces, _ = _run(model, b"a\n\x00b\x00", framing="null", max_tokens=4)
    assert b"".join(pieces) == b"x\ny\x00\n\n\nz\x00"


def test_a_stop_string_is_found_wherever_it_starts_and_is_not_shown() -> None:
    model = Script({b"a": b"12STstSTOP3", b"b": b"STOP", b"c": b"1ST"})
    pieces, summary = _run(model, b"a\nb\nc\n", stops=(b"STOP", b"never"), max_tokens=20)
    assert b"".join(pieces).split(b"\n")[:2] == [b"12STst", b""]
    assert b"".join(pieces).split(b"\n")[2] == b"1ST" + b"z" * 17
    assert summary["finish_reasons"] == {"stop": 2, "length": 1}


def test_what_was_held_back_is_not_lost_at_the_end() -> None:
    pieces, _ = _run(Script({b"a": b"12STO"}), b"a\n", stops=(b"STOP",), max_tokens=5)
    assert b"".join(pieces) == b"12STO\n"


def test_echo_puts_the_prompt_before_its_continuation_at_once() -> None:
    pieces, _ = _run(Script({b"ab": b"cd", b"x": b"y\n"}), b"ab\n", echo=True, max_tokens=2)
    assert pieces == [b"ab", b"c", b"d", b"\n"]
    pieces, _ = _run(Script({b"ab": b"cd\n", b"x": b"y\n"}), b"ab\nx\n", echo=True, n=2)
    assert b"".join(pieces) == b"abcd\nabcd\nxy\nxy\n"


def test_json_has_one_object_a_continuation_in_order() -> None:
    pieces, _ = _run(Script({b"a": b"1\n2", b"b": "é".encode()}), b"a\nb\n", jsonl=True, n=2, max_tokens=3)
    records = [json.loads(line) for line in b"".join(pieces).splitlines()]
    assert [(r["index"], r["continuation"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert records[0] == {
        "prompt": "a", "text": "1\n2", "index": 0, "continuation": 0, "tokens": 3, "finish_reason": "length",
    }  # fmt: skip
    assert records[3]["text"] == "éz"
    assert all(piece.endswith(b"\n") for piece in pieces)


def test_every_json_object_ends_with_the_facts_of_the_run() -> None:
    facts = {"kernel": "torch", "notice": "no GPU"}
    pieces, _ = _run(Script({b"a": b"1", b"b": b"2"}), b"a\nb\n", jsonl=True, facts=facts)
    for piece in pieces:
        assert list(json.loads(piece).items())[-2:] == list(facts.items())


def test_json_does_not_depend_on_how_many_prompts_there_are() -> None:
    model = Script({b"a": b"1\n2", b"b": b"3"})
    alone, _ = _run(model, b"a\n", jsonl=True)
    beside, _ = _run(model, b"a\nb\n", jsonl=True)
    assert beside[0] == alone[0]


def test_json_loses_no_byte() -> None:
    pieces, _ = _run(Script({b"\xe9": b"ok\xff"}), b"\xe9\n", jsonl=True, max_tokens=3)
    record = json.loads(pieces[0])
    assert record["text"] == "ok\ufffd"
    assert base64.b64decode(record["text_base64"]) == b"ok\xff"
    assert base64.b64decode(record["prompt_base64"]) == b"\xe9"


def test_json_carries_log_probabilities_and_timings_when_asked() -> None:
    pieces, _ = _run(Script({b"a": b"1X"}), b"a\n", jsonl=True, logprobs=True, timings=True, stops=(b"X",))
    record = json.loads(pieces[0])
    assert record["text"] == "1"
    assert record["token_ids"] == list(b"1X")
    assert record["logprobs"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert record["elapsed_s"] >= 0
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "options", [{"stops": (b"a", b"")}, {"framing": "words"}, {"logprobs": True}, {"timings": True}], ids=str
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).rstrip("s")):
        TextOptions(**options)


def test_an_interrupted_text_is_shown_as_far_as_it_came() -> None:
    polls = iter([False] * 4 + [True] * 100)
    pieces, summary = _run(Script({b"a": b"123456"}), b"a\n", stops=(b"34",), should_stop=lambda: next(polls))
    assert b"".join(pieces) == b"123\n"
    assert summary["interrupted"]
    assert summary["finish_reasons"] == {"interrupted": 1}


def test_a_closed_pipe_ends_the_run() -> None:
    def write(data: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(Script({}), ByteTokenizer(), io.BytesIO(b"a\n"), write, TextOptions())  # type: ignore[arg-type]


def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn() -> None:
    model = build_model(ModelConfig(vocab_size=300, dim=16, depth=1, heads=2, kv_heads=1, dim_head=8))
    sampling = SamplingConfig(temperature=50.0, max_tokens=200)
    pieces, _ = _run(model, b"a\n", sampling=sampling, jsonl=True, logprobs=True)
    assert max(json.loads(pieces[0])["token_ids"]) < 256


def _tiny(vocab: int = 256) -> Transformer:
    return build_model(ModelConfig(vocab_size=vocab, dim=32, depth=2, heads=2, kv_heads=1, dim_head=16, context=32)).eval()


def test_a_prompts_text_does_not_depend_on_its_neighbours() -> None:
    model = _tiny()
    sampling = SamplingConfig(max_tokens=12, continuations=2, seed=3)
    beside, _ = _run(model, b"same\nother\nthird line\n", sampling=sampling, jsonl=True)
    for neighbour in (b"x\nother\ny\n", b"a much longer neighbour than that\nother\n"):
        pieces, _ = _run(model, neighbour, sampling=sampling, jsonl=True)
        assert pieces[2:4] == beside[2:4]
    assert json.loads(beside[2])["text"] != json.loads(beside[3])["text"]


def _bpe(kind: str) -> BPETokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "byte-level":
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        replace, fuse = tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()
        inner.decoder = tokenizers.decoders.Sequence([replace, tokenizers.decoders.ByteFallback(), fuse])
        alphabet = []
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "metaspace" else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<unk>", *fallback], show_progress=False
    )
    inner.train_from_iterator(["the cat sat on the mat, the dog sat too; naïve café €5"] * 3, trainer)
    spec = json.loads(inner.to_str())
    # A trained fallback byte counts as an ordinary piece of the vocabulary, not as a special one.
    spec["added_tokens"] = []
    return BPETokenizer(spec)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_tokens_of_any_tokenizer_add_up_to_the_whole_text(kind: str) -> None:
    tokenizer: Tokenizer = _bpe(kind)
    text = "the cat 😀 sat on the naïve café mat €5 " * 3
    ids = tokenizer.encode(text.encode()).tolist()
    whole = tokenizer.decode(ids)
    for start in [k for k in range(1, 12) if incomplete_tail(tokenizer.decode(ids[:k])) == 0]:
        stream, shown = TokenText(tokenizer, ids[:start]), StreamFilter()
        pieces = [shown.feed(stream.feed(token)) for token in ids[start:]]
        for piece in pieces:
            piece.decode("utf-8")
        assert b"".join([*pieces, shown.finish()]) == whole[len(tokenizer.decode(ids[:start])) :]
    assert np.asarray(ids).max() < tokenizer.vocab_size
