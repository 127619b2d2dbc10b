"""Files in pieces: nothing lost, cut after lines or between characters, the same whatever the reader hands out at once."""

from __future__ import annotations

import io
import json
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.data import reading
from nsa_cli.data.reading import Broken, Piece, read_pieces

SIZES = st.integers(4, 40)


def pieces(data: bytes, size: int) -> list[Piece]:
    with patch.object(reading, "PIECE_BYTES", size):
        return list(read_pieces(["-"], "text", io.BytesIO(data), Broken(strict=True)))


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), SIZES)
def test_a_text_is_its_pieces(data: bytes, size: int) -> None:
    found = pieces(data, size)
    assert b"".join(piece.text for piece in found) == data
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    offset = 0
    for piece in found:
        assert piece.offset == offset
        assert len(piece.text) <= 2 * size
        offset += len(piece.text)
    assert len(found) == 1 or all(piece.text for piece in found)


@given(st.lists(st.text(max_size=3), max_size=60), SIZES)
def test_a_piece_ends_after_a_line_or_else_before_a_character(lines: list[str], size: int) -> None:
    for piece in pieces("\n".join(lines).encode(), size)[:-1]:
        piece.text.decode()
        assert piece.text.endswith(b"\n") or b"\n" not in piece.text


@given(st.lists(st.text(max_size=30), max_size=20), SIZES)
def test_a_line_of_jsonl_is_whole_wherever_blocks_end(texts: list[str], size: int) -> None:
    file: Any = io.BytesIO("\n".join(json.dumps({"text": text}) for text in texts).encode())
    with patch.object(reading, "PIECE_BYTES", size):
        found = list(reading._records("a.jsonl", file, "text", Broken(strict=True)))
    assert [piece.text.decode() for piece in found] == texts
    assert all(piece.last for piece in found)
