"""Bytes to ids and back, for the byte tokenizer and for BPE vocabularies of several kinds."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict
from nsa_cli.data import tokenizer as tokenizer_module
from nsa_cli.errors import ExitCode, NsaError

TEXT = "The ferry left at noon.\nThe ferry came back at noon, grün und müde: 渡し船 🚣.\n" * 20


def byte_level_spec() -> dict[str, Any]:
    """A GPT-2 like tokenizer.json, with a special token and with truncation and padding left switched on."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    inner.enable_truncation(8)
    inner.enable_padding(length=16)
    return json.loads(inner.to_str())


def fallback_spec() -> dict[str, Any]:
    """A SentencePiece like tokenizer.json: words begin with a mark, unknown characters become byte tokens."""
    pytest.importorskip("tokenizers")
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
            "vocab": {piece: place for place, piece in enumerate(pieces)}, "merges": ["▁ a", "a b"],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer(byte_level_spec())


@given(st.binary(max_size=200))
def test_bytes_come_back_exactly(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data)
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(ids) == data
    assert tokenizer.count_bytes(ids) == len(data)


@given(st.text(max_size=80))
def test_text_comes_back_exactly_from_a_byte_level_vocabulary(bpe: BPETokenizer, text: str) -> None:
    ids = bpe.encode(text.encode())
    assert ids.dtype == np.uint16
    assert bpe.decode(ids.tolist()) == text.encode()
    assert bpe.count_bytes(ids) == len(text.encode())


@given(st.text(max_size=40), st.data())
def test_a_byte_level_text_may_be_decoded_in_any_pieces(bpe: BPETokenizer, text: str, data: st.DataObject) -> None:
    ids = bpe.encode(text.encode()).tolist()
    cut = data.draw(st.integers(0, len(ids)))
    assert bpe.decode(ids[:cut]) + bpe.decode(ids[cut:]) == text.encode()


@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=20))
def test_a_longer_sequence_only_appends_to_the_text_of_a_byte_fallback_vocabulary(text: str) -> None:
    tokenizer = BPETokenizer(fallback_spec())
    ids = tokenizer.encode(text.encode()).tolist()
    parts = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(parts)), parts
    assert parts[-1] == text.encode()
    assert tokenizer.count_bytes(np.array(ids, dtype=np.uint16)) == len(parts[-1])


def test_an_unfinished_character_is_its_bytes_and_no_replacement_character() -> None:
    tokenizer = BPETokenizer(fallback_spec())
    ids = tokenizer.encode("渡".encode()).tolist()
    assert tokenizer.decode(ids[:-1]) == "渡".encode()[:-1]


def test_truncation_and_padding_of_the_file_are_switched_off(bpe: BPETokenizer) -> None:
    assert bpe.decode(bpe.encode(TEXT.encode()).tolist()) == TEXT.encode()
    assert bpe.decode(bpe.encode(b"a").tolist()) == b"a"


def test_a_special_token_in_the_text_is_one_token_and_comes_back(bpe: BPETokenizer) -> None:
    ids = bpe.encode(b"one<|end|>two").tolist()
    assert 0 in ids
    assert bpe.decode(ids) == b"one<|end|>two"


def test_long_texts_are_encoded_in_pieces_that_lose_nothing(
    bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1, 7, 64, 10**6):
        monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARS", size)
        assert bpe.decode(bpe.encode(TEXT.encode()).tolist()) == TEXT.encode(), size


def test_bytes_that_are_not_utf8_are_refused_by_bpe_with_their_offset(bpe: BPETokenizer) -> None:
    with pytest.raises(NsaError, match=r"byte 0xff at offset 3 is not UTF-8") as caught:
        bpe.encode(b"abc\xffd")
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert "--tokenizer" in caught.value.hint


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: BPETokenizer(byte_level_spec())])
def test_a_tokenizer_survives_json(make: Any) -> None:
    tokenizer: Tokenizer = make()
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.name, again.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    assert again.to_dict() == tokenizer.to_dict()
    assert again.encode(TEXT.encode()).tolist() == tokenizer.encode(TEXT.encode()).tolist()


def test_a_vocabulary_with_a_hole_has_room_for_its_highest_id() -> None:
    spec = byte_level_spec()
    spec["model"]["vocab"]["zzz"] = 70_000
    tokenizer = BPETokenizer(spec)
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.encode(b"a").dtype == np.uint32
    assert tokenizer.decode([69_999]) == b""


@pytest.mark.parametrize("wrong", [-1, 300])
def test_an_id_outside_the_vocabulary_is_refused(bpe: BPETokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"token id {wrong}"):
        bpe.decode([1, wrong])
    with pytest.raises(ValueError, match=f"token id {wrong}"):
        ByteTokenizer().decode([1, wrong])


def test_no_path_means_bytes_and_a_path_means_its_vocabulary(tmp_path: Path) -> None:
    assert load_tokenizer(None).name == "bytes"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(byte_level_spec()))
    assert load_tokenizer(str(path)).vocab_size == 300


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"model": 3}'])
def test_a_bad_tokenizer_file_is_one_line_and_exit_3(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NsaError, match="tokenizer") as caught:
        load_tokenizer(str(path))
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(NsaError) as caught:
        load_tokenizer(str(path))
    assert "nsa-cli[bpe]" in caught.value.hint


@pytest.mark.parametrize("values", [{}, {"name": "morse"}, {"name": "bpe"}, {"name": "bpe", "tokenizer": 3}])
def test_a_dict_of_no_known_tokenizer_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tokenizer name"):
        tokenizer_from_dict(values)
