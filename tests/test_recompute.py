"""--recompute: the same bits from less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_cli.errors import NsaError
from nsa_cli.training.graphs import refuse_cuda_graph
from tests.models import DENSE, SPARSE, random_ids, random_model
from tests.training_runs import curve, run, same_tensors, text_corpus, weights

BOTH = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@BOTH
def test_a_run_that_recomputes_has_the_same_bits_with_dropout(tmp_path: Path, sparse: bool) -> None:
    corpus, settings = text_corpus(tmp_path), {"steps": 3, "eval_every": 2}
    for name, recompute in (("kept", False), ("again", True)):
        run(tmp_path, corpus, name, sparse=sparse, model={"dropout": 0.1}, config={**settings, "recompute": recompute})
    assert curve(tmp_path, "kept") == curve(tmp_path, "again")
    assert same_tensors(weights(tmp_path, "kept"), weights(tmp_path, "again"))


@BOTH
def test_a_backward_keeps_each_blocks_input_and_little_else(sparse: bool) -> None:
    model, ids = random_model(SPARSE if sparse else DENSE, dtype=torch.float32).train(), random_ids()
    kept = {}
    for model.recompute in (False, True):
        seen: dict[int, int] = {}

        def count(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(ids, ids).backward()
        kept[model.recompute] = sum(seen.values())
    assert kept[True] < kept[False] / 2, kept


def test_a_cuda_graph_of_a_step_that_recomputes_is_refused() -> None:
    with pytest.raises(NsaError, match="cannot capture --recompute"):
        refuse_cuda_graph(torch.device("cuda"), "triton", recompute=True)
