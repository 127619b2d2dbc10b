"""Checkpoints come back whole; what is not one is refused in one line, before any tensor is used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nsa_cli import checkpoint as checkpoint_module
from nsa_cli.checkpoint import load_checkpoint, load_state, read_info, save_checkpoint, save_state
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from tests.test_tokenizer import BPETokenizer, byte_level_spec

NSA = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=8)
DENSE = ModelConfig(dim=16, depth=2, heads=2, kv_heads=1, dim_head=8, context=32)
SPARSE = ModelConfig(dim=16, depth=2, heads=2, kv_heads=1, dim_head=8, context=32, nsa=NSA)
IDS = torch.arange(40)[None] * 7 % 256


def random_model(config: ModelConfig) -> nn.Module:
    """Every parameter random: what is zero at the start would hide a tensor that is not loaded."""
    model = build_model(config, kernel="torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint of a sparse model."""
    target = tmp_path / "ckpt.safetensors"
    save_checkpoint(target, random_model(SPARSE), config=SPARSE, step=7)
    return target


def rewrite(
    path: Path,
    *,
    metadata: Callable[[dict[str, str]], Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
) -> None:
    """The same safetensors file with something changed in its metadata or tensors."""
    with safe_open(path, framework="pt") as handle:
        values = dict(handle.metadata())
    loaded = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if metadata is not None:
        metadata(values)
    if tensors is not None:
        tensors(loaded)
    path.unlink()
    save_file(loaded, path, values)


def refused(read: Callable[[Path], Any], path: Path) -> str:
    """Message and hint of a refusal with exit 3, each one line."""
    with pytest.raises(NsaError) as caught:
        read(path)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert str(path) in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


# What a checkpoint keeps


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_loaded_model_has_the_logits_of_the_saved_one(tmp_path: Path, config: ModelConfig, tied: bool) -> None:
    config = ModelConfig.from_dict(config.to_dict() | {"tie_embeddings": tied})
    model = random_model(config)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, config=config)
    assert ("to_logits.weight" in load_file(path)) == (not tied)
    loaded, info = load_checkpoint(path)
    assert not loaded.training
    assert info.config == loaded.config == config
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0, atol=0)


def test_loading_leaves_the_random_numbers_as_they_were(path: Path) -> None:
    before = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_file_says_everything_in_json_strings(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    extra = {"fingerprint": "abc", "val_loss": 1.5, "train": {"steps": 3}}
    save_checkpoint(path, random_model(DENSE), config=DENSE, step=12, extra=extra)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "nsa-checkpoint"
    values = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    assert values["format_version"] == 1
    assert values["config"] == DENSE.to_dict()
    assert values["tokenizer"] == {"name": "bytes"}
    assert values["versions"]["torch"] == str(torch.__version__)
    assert {key: values[key] for key in extra} == extra
    info = read_info(path)
    assert (info.step, info.tokenizer.name, info.metadata["val_loss"]) == (12, "bytes", 1.5)
    assert info.metadata == {"format": "nsa-checkpoint", **values}


def test_a_bpe_vocabulary_travels_inside_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = BPETokenizer(byte_level_spec())
    config = ModelConfig.from_dict(DENSE.to_dict() | {"vocab_size": tokenizer.vocab_size})
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, random_model(config), config=config, tokenizer=tokenizer)
    again = load_checkpoint(path)[1].tokenizer
    assert again.to_dict() == tokenizer.to_dict()
    assert again.decode(again.encode(b"the ferry")) == b"the ferry"


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_any_dtype_reads_any_dtype_and_none_keeps_the_files(
    tmp_path: Path, saved: torch.dtype, wanted: torch.dtype | None
) -> None:
    model = random_model(DENSE).to(saved)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, config=DENSE)
    loaded, _ = load_checkpoint(path, dtype=wanted)
    for (name, tensor), original in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert tensor.dtype == (wanted or saved), name
        torch.testing.assert_close(tensor, original.to(tensor.dtype), rtol=0, atol=0)


def test_wrappers_of_compile_and_ddp_leave_no_trace_in_the_names(tmp_path: Path) -> None:
    model = random_model(SPARSE)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    inner = {name.replace("attn.", "attn._orig_mod."): tensor for name, tensor in model.state_dict().items()}
    for number, state in enumerate([wrapped, inner, torch.compile(model), nn.ModuleDict({"module": model})]):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, state, config=SPARSE)
        torch.testing.assert_close(load_checkpoint(path)[0](IDS), model(IDS), rtol=0, atol=0)


def test_tied_and_strided_and_shared_tensors_are_written_once_and_right(tmp_path: Path) -> None:
    model = random_model(DENSE)
    state = dict(model.state_dict())
    state["to_logits.weight"] = state["token_emb.weight"]
    state["norm.weight"] = state["layers.0.attn_norm.weight"]
    state["layers.0.attn.to_q.weight"] = state["layers.0.attn.to_q.weight"].T.contiguous().T
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, state, config=DENSE)
    del state["to_logits.weight"]
    loaded = load_checkpoint(path)[0].state_dict()
    assert set(loaded) == set(state)
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_a_checkpoint_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="belong to the format"):
        save_checkpoint(path, random_model(DENSE), config=DENSE, extra={"step": 3})
    with pytest.raises(ValueError, match="vocab_size = 256: must be the bpe tokenizer's 300"):
        save_checkpoint(path, random_model(DENSE), config=DENSE, tokenizer=BPETokenizer(byte_level_spec()))
    assert not path.exists()


def test_reading_the_header_makes_no_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    real = checkpoint_module.build_model

    def build(*arguments: Any, **others: Any) -> Any:
        devices.append(str(others["device"]))
        return real(*arguments, **others)

    monkeypatch.setattr(checkpoint_module, "build_model", build)
    assert read_info(path).step == 7
    assert devices == ["meta"]


# What is refused


@pytest.mark.parametrize("read", [read_info, load_checkpoint, load_state])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    assert "no such file" in refused(read, tmp_path / "missing.safetensors")
    assert "is a folder" in refused(read, tmp_path)
    assert "cannot read /dev/null" in refused(read, Path("/dev/null"))
    for name, content, reason in [
        ("empty", b"", "is empty"),
        ("text", b"once upon a time, in a file that was not a checkpoint\n", "not a safetensors file"),
        ("short", b"abc", "not a safetensors file"),
        ("pickle", b"\x80\x04\x95\x14" + bytes(7) + b"}\x94\x8c\x06weight\x94]\x94s." * 10, "not a safetensors file"),
        ("zip", b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        ("huge", struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert reason in refused(read, tmp_path / name), name


@given(st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    save_checkpoint(path, random_model(DENSE), config=DENSE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(load_checkpoint, path)


@given(st.data())
def test_a_flipped_byte_in_the_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    save_checkpoint(path, random_model(DENSE), config=DENSE)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    error = None
    try:
        load_checkpoint(path)
    except NsaError as raised:
        error = raised
    assert error is None or error.exit_code == ExitCode.BAD_INPUT
    assert error is None or "\n" not in error.message


def test_a_truncated_file_says_that_it_is_damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in refused(load_checkpoint, path)


@pytest.mark.parametrize("read", [read_info, load_checkpoint, load_state])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    for number, metadata in enumerate([None, {"format": "pt"}]):
        path = tmp_path / f"{number}.safetensors"
        save_file({"weight": torch.zeros(3)}, path, metadata)
        assert "not one of nsa's" in refused(read, path)


def test_a_newer_format_is_refused_with_both_versions(path: Path) -> None:
    rewrite(path, metadata=lambda values: values.update(format_version="2"))
    message = refused(read_info, path)
    assert "format_version 2" in message
    assert "reads up to 1" in message
    assert "pip install -U" in message


def edited_config(**changes: Any) -> Callable[[dict[str, str]], None]:
    def edit(values: dict[str, str]) -> None:
        values["config"] = json.dumps(json.loads(values["config"]) | changes)

    return edit


def setting(key: str, value: str) -> Callable[[dict[str, str]], None]:
    return lambda values: values.update({key: value})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (edited_config(heads=3), "layers.0.attn"),
        (edited_config(heads=0), "heads = 0"),
        (edited_config(heads="2"), "heads = '2'"),
        (edited_config(colour="red"), "colour"),
        (edited_config(nsa={"window": -1}), "window = -1"),
        (edited_config(nsa=[]), "nsa = []"),
        (edited_config(nsa=None), "has no place in its config"),
        (edited_config(depth=3), "layers.2.attn_norm.weight is missing"),
        (edited_config(depth=10**9), "depth = 1000000000"),
        (edited_config(dim=10**15), "damaged"),
        (edited_config(ff_mult=1e300), "damaged"),
        (edited_config(vocab_size=300), "vocab_size = 300"),
        (edited_config(tie_embeddings=False), "to_logits.weight is missing"),
        (setting("config", "[]"), "config = []"),
        (setting("config", "{"), "not JSON"),
        (setting("config", "[" * 100_000), "not JSON"),
        (setting("step", "-1"), "step = -1"),
        (setting("step", '"x"'), "step = 'x'"),
        (setting("tokenizer", '{"name": "morse"}'), "tokenizer name"),
        (setting("tokenizer", "3"), "tokenizer = 3"),
        (setting("format_version", "0"), "format_version is 0"),
        (setting("format_version", "true"), "format_version is True"),
        (setting("format_version", '"1"'), "format_version is '1'"),
        (lambda values: values.pop("config"), "has no config"),
        (lambda values: values.pop("format_version"), "format_version is None"),
    ],
)
def test_tampered_metadata_is_refused_before_any_tensor_is_read(
    path: Path, edit: Callable[[dict[str, str]], Any], reason: str
) -> None:
    rewrite(path, metadata=edit)
    for read in (read_info, load_checkpoint):
        assert reason in refused(read, path)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra has no place"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(17)}), "norm.weight has shape [17]"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(16, dtype=torch.int64)}), "dtype I64"),
        (lambda tensors: tensors.clear(), "depth = 2: the file has only 0 tensors"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    path: Path, edit: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    rewrite(path, tensors=edit)
    for read in (read_info, load_checkpoint):
        assert reason in refused(read, path)


def test_many_wrong_tensors_are_still_one_line(path: Path) -> None:
    rewrite(path, tensors=lambda tensors: [tensors.pop(name) for name in list(tensors)[:5]])
    assert "(and 4 more like this)" in refused(read_info, path)


# Resume states


def test_a_state_gives_back_tensors_of_every_dtype_and_its_meta(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.state.safetensors"
    shared = torch.randn(4, 4)
    tensors = {
        "moment": torch.randn(3, 2), "half": torch.randn(2).bfloat16(), "rng": torch.get_rng_state(),
        "step": torch.tensor(3), "none": torch.zeros(0), "shared": shared, "row": shared[1], "transposed": shared.T,
    }  # fmt: skip
    meta = {"step": 3, "best": None, "lr": 0.1, "nested": {"a": [1, 2.5, "x"]}}
    save_state(path, tensors, meta)
    loaded, again = load_state(path)
    assert again == meta
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_a_loaded_state_outlives_the_file_that_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.state.safetensors"
    save_state(path, {"x": torch.ones(5000)}, {})
    loaded, _ = load_state(path)
    save_state(path, {"x": torch.zeros(5000)}, {})
    assert loaded["x"].sum() == 5000


def test_a_state_where_a_checkpoint_is_wanted_names_the_checkpoint_and_the_other_way_round(path: Path) -> None:
    state = path.with_name("ckpt.state.safetensors")
    save_state(state, {"x": torch.zeros(2)}, {"step": 3})
    for read in (read_info, load_checkpoint):
        assert f"{state} is a resume state, not a checkpoint | give {path}" in refused(read, state)
    assert f"{path} is a checkpoint, not a resume state | give {state}" in refused(load_state, path)
    best = path.with_name("ckpt.best.safetensors")
    best.write_bytes(path.read_bytes())
    assert f"give {state}" in refused(load_state, best)


def test_a_state_without_meta_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.state.safetensors"
    save_state(path, {"x": torch.zeros(2)}, {})
    rewrite(path, metadata=lambda values: values.pop("meta"))
    assert "no 'meta'" in refused(load_state, path)
