"""Parquet: a row is a document; the package is an extra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_cli.data import ByteTokenizer, Corpus, Documents, load_corpus, reading
from nsa_cli.errors import ExitCode, NsaError


def load(*sources: Path, **options: Any) -> Corpus:
    settings: dict[str, Any] = {"val_fraction": 0.0, "context": 2, **options}
    return load_corpus([str(source) for source in sources], ByteTokenizer(), **settings)


def refusal(code: ExitCode, *sources: Path, **options: Any) -> str:
    with pytest.raises(NsaError) as caught:
        load(*sources, **options)
    assert caught.value.exit_code == code
    return f"{caught.value.message} | {caught.value.hint}"


def write(path: Path, **columns: Any) -> Path:
    pytest.importorskip("pyarrow", reason="pip install 'nsa-cli[data]'")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_every_row_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_ROWS", 2)
    write(tmp_path / "a.parquet", text=[f"row {i}" for i in range(7)], other=list(range(7)))
    corpus = load(tmp_path)
    assert bytes(corpus.train) == b"\n".join(b"row %d" % i for i in range(7))
    assert isinstance(corpus.training, Documents)
    assert corpus.training.offsets.tolist() == [0, 6, 12, 18, 24, 30, 36, 41]


def test_the_text_key_names_the_column_and_a_missing_one_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", body=["some text"], n=[3])
    assert bytes(load(path, text_key="body").train) == b"some text"
    told = refusal(ExitCode.BAD_INPUT, path)
    assert "no column 'text'" in told
    assert "this file has body, n" in told


def test_a_null_or_a_number_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", text=["one", None, "two", None])
    corpus = load(path, strict=False)
    assert bytes(corpus.train) == b"one\ntwo"
    assert corpus.notices[0].startswith(f"passed over 2 records without text; the first: {path}, row 2: 'text' is null")
    assert "row 2: 'text' is null" in refusal(ExitCode.BAD_INPUT, path)
    assert "row 1: 'text' is int, not text" in refusal(ExitCode.BAD_INPUT, write(path, text=[1, 2]), strict=False)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", text=["one"])
    for content in (b"just text", path.read_bytes()[:-10]):
        path.write_bytes(content)
        assert f"{path} is not a parquet file that can be read" in refusal(ExitCode.BAD_INPUT, path, strict=False)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    told = refusal(ExitCode.FAILURE, tmp_path / "a.parquet")
    assert "a.parquet file needs the pyarrow package" in told.replace(f"{tmp_path}/", "").replace("a.parquet: a .", "a.")
    assert "pip install 'nsa-cli[data]'" in told
