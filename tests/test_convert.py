"""A run that begins from a checkpoint: what is copied, how close a sparse start is to its dense model, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.checkpoint import load_checkpoint, save_checkpoint
from nsa_cli.cli.app import run as command
from nsa_cli.config import COMPRESSIONS, NSAConfig
from nsa_cli.data import ByteTokenizer
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import Transformer, build_model
from nsa_cli.model.trace import record
from nsa_cli.training.convert import CLOSED_GATE, start_from
from tests.models import DENSE, TOKENS, random_ids, random_model, with_nsa
from tests.test_tokenizer import byte_level_spec
from tests.training_runs import CONTEXT, Told, curve, model_config, records, run, same_tensors, text_corpus, weights

EVERYTHING = {"num_selected": -(-DENSE.context // 8), "window": DENSE.context}
"""Every block selected, the window as wide as the context."""
BRANCHES = pytest.mark.parametrize("branch_kv", ["independent", "shared"])


def started(dense: Transformer, **nsa: Any) -> Transformer:
    model = build_model(with_nsa(**nsa), dtype=torch.float64).eval()
    start_from(model, dense)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@BRANCHES
@pytest.mark.parametrize("compress", COMPRESSIONS)
@torch.no_grad()
def test_a_sparse_start_that_sees_everything_has_the_dense_models_logits(compress: Any, branch_kv: Any) -> None:
    dense, ids = random_model(DENSE), random_ids(2)
    model = started(dense, **EVERYTHING, compress=compress, branch_kv=branch_kv)
    closed = branch_kv == "shared" and compress in ("mean", "attention-pool", "gated")
    assert relative(model(ids), dense(ids)) < (1e-2 if closed else 1e-4)
    with record(model) as layers:
        model(ids)
    for layer in layers:
        cmp, slc, win = layer.gates.unbind(-1)
        assert torch.equal(slc, torch.full_like(slc, 0.5))
        assert torch.equal(win, slc)
        assert torch.allclose(cmp, torch.tensor(CLOSED_GATE if closed else 0.0, dtype=cmp.dtype).sigmoid())


@torch.no_grad()
def test_packed_documents_and_short_texts_start_as_the_dense_model_too() -> None:
    dense = random_model(DENSE)
    model = started(dense, **EVERYTHING)
    ids, ends = random_ids(), torch.tensor([0, 3, 50, TOKENS], dtype=torch.int32)
    assert relative(model(ids, cu_seqlens=ends), dense(ids, cu_seqlens=ends)) < 1e-4
    for tokens in (1, 3, 9):
        assert relative(model(ids[:, :tokens]), dense(ids[:, :tokens])) < 1e-4


@torch.no_grad()
def test_the_gates_of_selection_and_window_share_one_by_the_tokens_that_each_reads() -> None:
    dense = random_model(DENSE)
    for window, share in ((40, 0.5), (120, 0.25), (10_000, 40 / 168)):
        model = started(dense, num_selected=5, window=window)
        with record(model) as layers:
            model(random_ids())
        assert torch.allclose(layers[0].gates[..., 1], torch.tensor(share).double())
        assert torch.allclose(layers[0].gates[..., 2], torch.tensor(1 - share).double())


@BRANCHES
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_every_parameter_of_a_sparse_start_learns(compress: Any, branch_kv: Any) -> None:
    model = started(random_model(DENSE), compress=compress, branch_kv=branch_kv).train()
    ids = random_ids(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    alive: set[str] = set()
    for _ in range(3):  # what lies below a zero layer learns once that layer has left zero
        model(ids[:, :-1], ids[:, 1:]).backward()
        alive |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-7}
        optimizer.step()
        optimizer.zero_grad()
    # What a linear network adds to every block's key alike, softmax takes away again.
    excused = {f"layers.{i}.attn.compress_k.pos" for i in range(2)} if "mlp" not in compress else set()
    assert alive | excused == {name for name, _ in model.named_parameters()} | excused


@pytest.mark.parametrize("compress", COMPRESSIONS)
@torch.no_grad()
def test_compressed_keys_start_as_block_means(compress: Any) -> None:
    attention = started(random_model(DENSE), compress=compress).layers[0].attn
    x = 0.3 * torch.randn(2, 2, 7, 4, 8, dtype=torch.float64)
    expected = x.mean(-2) * (0.5 if compress == "gated" else 1.0)
    assert relative(attention.compress_k(x), expected) < (0.1 if "mlp" in compress else 1e-12)


@torch.no_grad()
def test_the_report_names_every_parameter_once() -> None:
    dense = random_model(DENSE)
    for compress, part in (("mlp", set()), ("mean", {f"layers.{i}.attn.to_v.weight[cmp]" for i in range(2)})):
        model = build_model(with_nsa(compress=compress), dtype=torch.float64)
        start = start_from(model, dense)
        assert start.kind == "dense to sparse"
        assert set(start.copied) == set(dense.state_dict())
        assert set(start.new) == set(model.state_dict()) - set(start.copied) | part
        assert start.unused == ()
        k = model.layers[1].attn.to_k.weight
        assert torch.equal(k, dense.layers[1].attn.to_k.weight.repeat(3, 1))


def dense_run(folder: Path, corpus: Any, **options: Any) -> Path:
    run(folder, corpus, "dense", **options)
    return folder / "dense.safetensors"


def test_a_sparse_run_from_a_dense_one_says_how_close_it_starts_and_what_became_of_every_parameter(tmp_path: Path) -> None:
    corpus, told = text_corpus(tmp_path), Told()
    dense = dense_run(tmp_path, corpus, config={"steps": 40, "eval_every": 20})
    run(tmp_path, corpus, sparse=True, init_from=dense, reporter=told, config={"steps": 2, "eval_every": 0})
    header = records(tmp_path)[0]["init_from"]
    assert header["kind"] == "dense to sparse"
    assert header["step"] == 40
    assert header["copied"]
    assert header["new"]
    assert header["unused"] == []
    (notice,) = (text for text in told.notices if "begins from" in text)
    assert f"{len(header['copied'])} parameters copied, {len(header['new'])} new, 0 unused" in notice
    last = [line for line in records(tmp_path, "dense") if "val_loss" in line][-1]
    assert header["source_val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    # Fresh weights are ln 256 = 5.5 nats from anything; window and selection hold 24 of 32 tokens here.
    assert 0 < header["kl_nats"] < 0.2
    assert header["val_loss"] < header["source_val_loss"] + 0.3


def test_a_start_that_sees_everything_is_at_no_distance(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    dense = dense_run(tmp_path, corpus)
    nsa = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=CONTEXT)
    run(tmp_path, corpus, init_from=dense, model={"nsa": nsa}, config={"steps": 1})
    header = records(tmp_path)[0]["init_from"]
    assert header["kl_nats"] < 1e-8
    assert header["val_loss"] == pytest.approx(header["source_val_loss"], rel=1e-6)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_run_from_its_own_kind_starts_with_the_same_weights(tmp_path: Path, sparse: bool) -> None:
    corpus = text_corpus(tmp_path)
    run(tmp_path, corpus, "first", sparse=sparse)
    told = Told()
    run(tmp_path, corpus, sparse=sparse, init_from=tmp_path / "first.safetensors", config={"lr": 0.0}, reporter=told)
    assert same_tensors(weights(tmp_path), weights(tmp_path, "first"))
    header = records(tmp_path)[0]["init_from"]
    assert (header["new"], header["unused"], header["kl_nats"]) == ([], [], 0.0)


def test_a_resumed_run_needs_no_init_from_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise Killed

    corpus = text_corpus(tmp_path)
    dense = dense_run(tmp_path, corpus, model={"dropout": 0.1})
    options: dict[str, Any] = {"sparse": True, "model": {"dropout": 0.1}}
    run(tmp_path, corpus, "whole", init_from=dense, **options)
    with pytest.raises(Killed):  # before its first save: only the state of step 0 is there
        run(tmp_path, corpus, init_from=dense, reporter=Told(kill), **options)
    dense.unlink()
    run(tmp_path, corpus, resume=tmp_path / "ckpt.safetensors", **options)
    assert curve(tmp_path) == curve(tmp_path, "whole")
    assert same_tensors(weights(tmp_path), weights(tmp_path, "whole"))
    assert records(tmp_path)[0]["init_from"] == records(tmp_path, "whole")[0]["init_from"], "lost with the resumption"


def test_a_start_and_a_resumption_at_once_are_refused_with_exit_2(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    dense = dense_run(tmp_path, corpus, config={"steps": 1})
    with pytest.raises(NsaError, match=r"--init-from .* begins a run") as caught:
        run(tmp_path, corpus, init_from=dense, resume=dense)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("source", "target", "named"),
    [
        ({}, {"depth": 3}, "--depth 3 contradicts .* 2"),
        ({}, {"ff": "swiglu"}, "--ff swiglu contradicts .* gelu"),
        ({"sparse": True}, {}, "--dense contradicts .* sparse"),
        ({"sparse": True}, {"nsa": replace(model_config(True).nsa, compress="mean")}, "--compress mean contradicts .* mlp"),  # type: ignore[type-var]
    ],
    ids=["depth", "ff", "dense", "compress"],
)
def test_another_shape_is_refused_by_name_with_exit_2_and_leaves_no_file(
    tmp_path: Path, source: Any, target: Any, named: str
) -> None:
    corpus = text_corpus(tmp_path)
    path = dense_run(tmp_path, corpus, config={"steps": 1}, **source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NsaError, match=named) as caught:
        run(tmp_path, corpus, init_from=path, model=target)
    assert caught.value.exit_code == ExitCode.USAGE
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data.txt and dense.safetensors, of a shape that no preset has."""
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("a fox, a dog and a hen. " * 100)
    config = model_config(dim=16, heads=2, kv_heads=1, context=24)
    torch.manual_seed(0)
    save_checkpoint("dense.safetensors", build_model(config), config=config, tokenizer=ByteTokenizer())
    return tmp_path


LINE = "train data.txt --init-from dense.safetensors --steps 1 --device cpu"


def test_the_command_line_takes_shape_and_context_from_the_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"{LINE} --sparse --window 12 -v".split()) == 0
    shown = capsys.readouterr()
    config = load_checkpoint("ckpt.safetensors")[1].config
    assert replace(config, nsa=None) == load_checkpoint("dense.safetensors")[1].config
    assert config.nsa is not None
    assert config.nsa.window == 12
    assert "copied: layers.0.attn.to_q.weight" in shown.err
    assert "new: layers.0.attn.to_gates.bias" in shown.err
    assert "KL(source || start)" in shown.err
    # From sparse weights: the geometry too, but for what the user chooses and no weight depends on.
    line = "train data.txt --init-from ckpt.safetensors --steps 1 --device cpu -q --out two.safetensors"
    assert command([*line.split(), "--num-selected", "3", "--seq-len", "32"]) == 0
    assert load_checkpoint("two.safetensors")[1].config == replace(
        config, context=32, nsa=replace(config.nsa, num_selected=3)
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--dim 32", "--dim 32 contradicts dense.safetensors, where it is 16"),
        ("--sparse --heads 4", "--heads 4 contradicts dense.safetensors, where it is 2"),
        ("--no-tie-embeddings", "--tie-embeddings false contradicts dense.safetensors, where it is true"),
        ("--tokenizer tokenizer.json", "--init-from dense.safetensors has another tokenizer (bytes) than this run (bpe)"),
        ("--resume dense.safetensors", "--init-from dense.safetensors begins a run"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused_with_exit_2(
    here: Path, flags: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tokenizer.json").write_text(json.dumps(byte_level_spec()))
    before = sorted(Path().iterdir())
    assert command(f"{LINE} {flags}".split()) == ExitCode.USAGE
    assert named in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_an_unusable_checkpoint_is_refused_with_exit_3(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dense.safetensors").write_bytes(b"no tensors")
    assert command(LINE.split()) == ExitCode.BAD_INPUT
    assert "dense.safetensors is not a safetensors file" in capsys.readouterr().err


def test_a_start_in_a_config_file_serves_resumptions_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_INIT_FROM", "dense.safetensors")
    assert command(["train", "data.txt", "--sparse", "--steps", "1", "--device", "cpu", "-q", "--schedule", "constant"]) == 0
    assert command(["train", "data.txt", "--resume", "ckpt.safetensors", "--steps", "2", "--device", "cpu", "-q"]) == 0
