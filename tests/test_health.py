"""Health of the selection: each measure against its definition, query by query, and what a run records of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import nsa_cli.training.loop as loop
from nsa_cli.inspection.statistics import selection_statistics, tag_of
from nsa_cli.model import Transformer
from nsa_cli.model.trace import record
from nsa_cli.training import health
from nsa_cli.training.health import Health, selection_health
from tests.models import DENSE, random_ids, random_model, with_nsa
from tests.training_runs import run, steps, text_corpus


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def measured(model: Transformer, ids: torch.Tensor) -> Health:
    return selection_health(model, ids, autocast=nullcontext)


def expected(model: Transformer, ids: torch.Tensor) -> Health:
    """By sets, one query of one group at a time."""
    with record(model) as layers:
        model(ids)
    found: Health = {"entropy_nats": [], "entropy_share": [], "changed": [], "never_selected": []}
    for trace in layers:
        nsa, tokens = trace.nsa, ids.shape[1]
        entropies, shares, changed, taken, stood = [], [], [], set(), set()
        for g in range(trace.block_indices.shape[1]):
            rows = [[j for j in row if j >= 0] for row in trace.block_indices[0, g].tolist()]
            for t in range(tokens):
                current = t // nsa.select_block
                importance = trace.importance(t)[0, g, 0, : current + 1].tolist()
                facts = selection_statistics(t, importance, rows[t], rows[t - 1] if t else None, nsa)
                if facts.entropy_share is not None:
                    entropies.append(facts.entropy_nats)
                    shares.append(facts.entropy_share)
                if current + 1 <= nsa.num_selected or nsa.num_init + nsa.num_local == nsa.num_selected:
                    continue
                free = [j for j in rows[t] if tag_of(j, t, nsa) == "top"]
                changed += [j not in rows[t - 1] for j in free]
                taken |= {(g, j) for j in free}
                stood |= {(g, j) for j in range(current + 1) if tag_of(j, t, nsa) == "top"}
        for name, values in (("entropy_nats", entropies), ("entropy_share", shares), ("changed", changed)):
            found[name].append(sum(values) / len(values) if values else None)
        found["never_selected"].append(len(stood - taken) / len(stood) if stood else None)
    return found


@pytest.mark.parametrize(
    "nsa", [{}, {"num_init": 0, "num_local": 0, "num_selected": 2}, {"num_selected": 3}, {"num_selected": 14}], ids=str
)
def test_every_measure_is_its_definition_query_by_query(nsa: dict[str, Any]) -> None:
    model, ids = random_model(with_nsa(**nsa)), random_ids()
    found, right = measured(model, ids), expected(model, ids)
    assert found.keys() == right.keys()
    for name, values in right.items():
        assert len(values) == 2, "a number a layer"
        for ours, theirs in zip(found[name], values, strict=True):
            assert (ours is None) == (theirs is None), name
            assert ours is None or ours == pytest.approx(theirs, rel=1e-5), name
    no_choice = nsa.get("num_selected") in (3, 14)  # all places forced, and as many places as blocks
    assert (found["changed"][0] is None) == no_choice
    assert (found["never_selected"][0] is None) == no_choice


def test_a_selection_that_tells_nothing_apart_shows() -> None:
    model = random_model(with_nsa(compress="linear"))
    for block in model.layers:
        block.attn.compress_k.w.zero_()
    found = measured(model, random_ids())
    for layer in range(2):
        assert found["entropy_share"][layer] > 0.9
        assert found["changed"][layer] == 0.0, "equal importance goes to the lower blocks"
        assert found["never_selected"][layer] == pytest.approx(9 / 11), "blocks 1 and 2 of 1 to 11"


def test_few_queries_are_looked_at_in_long_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(with_nsa()), random_ids()
    whole = measured(model, ids)
    for name, value in (("QUERIES", 40), ("SCORES", 40 * 4 * 53)):
        with monkeypatch.context() as patch:
            patch.setattr(health, name, value)
            sampled = measured(model, ids)
        assert sampled["never_selected"] == whole["never_selected"], "counted over all queries"
        assert sampled["entropy_nats"] != whole["entropy_nats"]
        assert sampled["entropy_nats"] == pytest.approx(whole["entropy_nats"], rel=0.2)


def test_texts_too_short_for_a_block_have_no_numbers_and_dense_models_no_health() -> None:
    assert measured(random_model(with_nsa()), random_ids(tokens=3)) == {name: [None, None] for name in measured_names()}
    assert measured(random_model(DENSE), random_ids()) == {}


def measured_names() -> tuple[str, ...]:
    return ("entropy_nats", "entropy_share", "changed", "never_selected")


def test_validations_of_sparse_runs_record_it_from_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, shapes = text_corpus(tmp_path), []

    def spy(model: Transformer, ids: torch.Tensor, **options: Any) -> Health:
        shapes.append(tuple(ids.shape))
        return selection_health(model, ids, **options)

    monkeypatch.setattr(loop, "selection_health", spy)
    with torch.enable_grad():
        run(tmp_path, corpus, sparse=True, config={"steps": 4, "eval_every": 2})
        run(tmp_path, corpus, "dense", config={"steps": 2, "eval_every": 2})
    lines = steps(tmp_path)
    assert [("selection" in line) for line in lines] == ["val_loss" in line for line in lines] == [False, True] * 2
    assert set(lines[1]["selection"]) == set(measured_names())
    assert all(len(values) == 2 for values in lines[1]["selection"].values())
    assert shapes[0] == (1, 32)
    assert "selection" not in steps(tmp_path, "dense")[-1]
