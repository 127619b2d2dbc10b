"""Inspection: what it reports is what the model did, and looking changes nothing."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.inspection import Inspection, clip_prompt, inspect_prompt
from nsa_cli.inspection.statistics import entropy_nats, selection_statistics, tag_of
from nsa_cli.model import Transformer, build_model
from nsa_cli.model.trace import record
from tests import oracle

NSA = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=5, window=12)
CONFIG = ModelConfig(vocab_size=31, dim=16, depth=3, heads=4, kv_heads=2, dim_head=8, context=128, nsa=NSA)
TOKENS = 107


def random_model(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Transformer:
    model = build_model(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def random_ids(tokens: int = TOKENS) -> list[int]:
    return torch.randint(31, (tokens,)).tolist()


@pytest.fixture
def model(seed: int) -> Transformer:
    return random_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_does_not_change_the_logits(dtype: torch.dtype) -> None:
    model, ids = random_model(dtype=dtype), random_ids()
    batch = torch.tensor([ids])
    with torch.no_grad():
        before = model(batch)
        seen: list[torch.Tensor] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
        inspect_prompt(model, ids)
        handle.remove()
        after = model(batch)
    assert len(seen) == 1
    assert torch.equal(seen[0], before)
    assert torch.equal(after, before)


def test_looking_leaves_the_model_as_it_was(model: Transformer) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    inspect_prompt(model, random_ids())
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dropout_model_in_training_mode_is_inspected_without_dropout() -> None:
    model, ids = random_model(replace(CONFIG, dropout=0.5)), random_ids()
    quiet = inspect_prompt(model.eval(), ids).to_dict()
    assert inspect_prompt(model.train(), ids).to_dict() == quiet


def test_scores_and_selections_are_those_of_the_forward_pass(model: Transformer) -> None:
    """From the recorded queries and keys, by the oracle: the definition, not the model's own report of itself."""
    ids = random_ids()
    with torch.no_grad(), record(model) as layers:
        model(torch.tensor([ids]))
    result = inspect_prompt(model, ids, queries=(-1, 40, 0))
    assert [(view.layer, view.query) for view in result.views] == [(i, q) for i in range(3) for q in (106, 40, 0)]
    for view in result.views:
        trace = layers[view.layer]
        _, p = oracle.compressed(trace.q_cmp, trace.k_cmp, trace.k_cmp, NSA)
        imp = oracle.importance(p, 2, NSA)
        visible = oracle.num_compressed(view.query + 1, NSA)
        assert [block.block for block in view.blocks] == list(range(visible))
        for block in view.blocks:
            tokens = oracle.compressed_tokens(block.block, NSA)
            assert (block.first, block.last) == (tokens[0], tokens[-1])
        for head in view.heads:
            assert head.scores == pytest.approx(p[0, head.head, view.query, :visible], abs=1e-6)
            assert sum(head.scores) == pytest.approx(1.0 if visible else 0.0, abs=1e-6)
            assert head.group == head.head // 2
            gates = trace.gates[0, head.head, view.query].tolist()
            assert [head.gate_cmp, head.gate_slc, head.gate_win] == gates
        for group in view.groups:
            cur = view.query // NSA.select_block
            assert group.importance == pytest.approx(imp[0, group.group, view.query, : cur + 1], abs=1e-5)
            assert len(group.importance) == cur + 1
            padded = [s.block for s in group.selected] + [-1] * (NSA.num_selected - len(group.selected))
            assert padded == trace.block_indices[0, group.group, view.query].tolist()
            assert all(s.importance == group.importance[s.block] for s in group.selected)


def test_selected_blocks_are_tagged_and_end_at_the_query(model: Transformer) -> None:
    view = inspect_prompt(model, random_ids(), layers=[0], queries=[101]).views[0]
    for group in view.groups:
        tags = {s.block: s.tag for s in group.selected}
        assert tags[0] == "init"
        assert tags[11] == tags[12] == "local"
        assert [tag for block, tag in tags.items() if block not in (0, 11, 12)] == ["top", "top"]
        assert [(s.first, s.last) for s in group.selected if s.block in (0, 12)] == [(0, 7), (96, 101)]


def test_a_block_both_first_and_newest_is_init() -> None:
    assert [tag_of(0, t, NSA) for t in (0, 7, 8, 100)] == ["init"] * 4
    assert [tag_of(1, t, NSA) for t in (8, 16, 24)] == ["local", "local", "top"]
    none = replace(NSA, num_init=0, num_local=0)
    assert tag_of(0, 0, none) == "top"


def test_statistics_are_the_numbers_worked_out_by_hand() -> None:
    stats = selection_statistics(33, [1.0, 1.0, 0.0, 2.0, 0.0], [0, 1, 3, 4], [0, 2, 3, 4], NSA)
    # Shares 1/4, 1/4, 1/2: entropy 2 * (1/4) ln 4 + (1/2) ln 2. Block 1 (8..15) is the only top pick: 33 - 15.
    assert stats.entropy_nats == pytest.approx(1.5 * math.log(2))
    assert stats.entropy_share == pytest.approx(1.5 * math.log(2) / math.log(5))
    assert stats.selected_share == 1.0
    assert stats.changed == 1
    assert stats.top_distances == (18,)
    assert selection_statistics(33, [1.0, 1.0, 0.0, 2.0, 4.0], [0, 3], [0, 3], NSA).selected_share == 3 / 8
    inside = selection_statistics(10, [0.0, 1.0], [1], [0], replace(NSA, num_init=0, num_local=0))
    assert inside.top_distances == (0,)
    assert entropy_nats([2.0]) == 0.0
    assert entropy_nats([3.0, 3.0, 3.0]) == pytest.approx(math.log(3))


def test_a_query_that_sees_no_compressed_block_has_no_entropy(model: Transformer) -> None:
    view = inspect_prompt(model, random_ids(), queries=[0]).views[0]
    assert view.blocks == ()
    assert all(head.scores == () for head in view.heads)
    for group in view.groups:
        assert [s.block for s in group.selected] == [0]
        assert group.statistics.entropy_nats is group.statistics.selected_share is group.statistics.changed is None


def test_a_prompt_of_one_token_can_be_inspected(model: Transformer) -> None:
    result = inspect_prompt(model, [3])
    assert result.queries == (0,)
    assert result.arrays()["scores"].shape == (3, 1, 4, 0)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_neighbours_selection_is_compared(model: Transformer) -> None:
    ids = random_ids()
    views = inspect_prompt(model, ids, queries=(90, 91)).views
    for before, after in zip(views[::2], views[1::2], strict=True):
        for mine, theirs in zip(after.groups, before.groups, strict=True):
            old, new = {s.block for s in theirs.selected}, {s.block for s in mine.selected}
            assert mine.statistics.changed == len(new - old)


def test_json_is_lossless(model: Transformer) -> None:
    result = inspect_prompt(model, random_ids(), queries=(-1, 0, 50))
    written = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(written) == result.to_dict()
    again = json.loads(written)
    assert again["tokens"] == TOKENS
    assert again["geometry"]["select_block"] == 8
    scores = again["views"][0]["heads"][1]["scores"]
    assert tuple(scores) == result.views[0].heads[1].scores
    assert np.float32(scores[0]) == scores[0], "a float32 was rounded on its way"


def test_arrays_say_the_same_and_load_without_pickle(model: Transformer) -> None:
    result = inspect_prompt(model, random_ids(), layers=[1, 2], heads=[0, 3], queries=(-1, 12, 0))
    buffer = io.BytesIO()
    np.savez(buffer, **result.arrays())
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as arrays:
        blocks, select_blocks = oracle.num_compressed(TOKENS, NSA), -(-TOKENS // 8)
        assert arrays["scores"].shape == (2, 3, 2, blocks)
        assert arrays["gates"].shape == (2, 3, 2, 3)
        assert arrays["importance"].shape == (2, 3, 2, select_blocks)
        assert arrays["block_indices"].shape == arrays["tags"].shape == (2, 3, 2, 5)
        assert arrays["compressed_ranges"].tolist() == [[2 * c, 2 * c + 3] for c in range(blocks)]
        assert arrays["selection_ranges"][-1].tolist() == [104, 106]
        assert arrays["ids"].tolist() == list(result.ids)
        for i in range(2):
            for j in range(3):
                view = result.views[3 * i + j]
                for h, head in enumerate(view.heads):
                    assert arrays["scores"][i, j, h, : len(head.scores)].tolist() == list(head.scores)
                    assert not arrays["scores"][i, j, h, len(head.scores) :].any()
                    assert arrays["gates"][i, j, h].tolist() == [head.gate_cmp, head.gate_slc, head.gate_win]
                for g, group in enumerate(view.groups):
                    places = len(group.selected)
                    assert arrays["block_indices"][i, j, g, :places].tolist() == [s.block for s in group.selected]
                    assert arrays["tags"][i, j, g, :places].tolist() == [s.tag for s in group.selected]
                    assert (arrays["block_indices"][i, j, g, places:] == -1).all()
                    entropy = group.statistics.entropy_nats
                    assert arrays["entropy_nats"][i, j, g] == pytest.approx(
                        math.nan if entropy is None else entropy, nan_ok=True
                    )


def test_layers_heads_and_queries_are_chosen_and_counted_from_the_end(model: Transformer) -> None:
    ids = random_ids()
    everything = inspect_prompt(model, ids, queries=range(TOKENS))
    some = inspect_prompt(model, ids, layers=[-1, 0, 2], heads=[2], queries=[5, -1, 5])
    assert (some.layers, some.heads, some.groups, some.queries) == ((2, 0), (2,), (1,), (5, 106))
    assert [(view.layer, view.query) for view in some.views] == [(2, 5), (2, 106), (0, 5), (0, 106)]
    for view in some.views:
        whole = everything.views[view.layer * TOKENS + view.query]
        assert view.heads == (whole.heads[2],)
        assert view.groups == (whole.groups[1],)


@pytest.mark.parametrize(
    ("flag", "choice", "limits"),
    [
        ("--layer", {"layers": [3]}, "-3 to 2"),
        ("--layer", {"layers": [0, -4]}, "-3 to 2"),
        ("--head", {"heads": [4]}, "-4 to 3"),
        ("--query", {"queries": [20]}, "-20 to 19"),
        ("--query", {"queries": [-21]}, "-20 to 19"),
    ],
)
def test_a_choice_out_of_range_names_flag_and_range(
    flag: str, choice: dict[str, list[int]], limits: str, model: Transformer
) -> None:
    with pytest.raises(NsaError) as error:
        inspect_prompt(model, random_ids(20), **choice)  # type: ignore[arg-type]
    assert error.value.exit_code == ExitCode.USAGE
    assert flag in error.value.message
    assert limits in error.value.message
    assert str(next(iter(choice.values()))[-1]) in error.value.message


def test_a_dense_model_is_refused_with_3() -> None:
    with pytest.raises(NsaError, match="dense") as error:
        inspect_prompt(random_model(replace(CONFIG, nsa=None)), [1, 2])
    assert error.value.exit_code == ExitCode.BAD_INPUT
    assert error.value.hint


def test_an_empty_prompt_is_refused_with_3(model: Transformer) -> None:
    with pytest.raises(NsaError, match="empty") as error:
        inspect_prompt(model, [])
    assert error.value.exit_code == ExitCode.BAD_INPUT


def test_weights_that_are_not_finite_are_refused_with_3(model: Transformer) -> None:
    with torch.no_grad():
        model.token_emb.weight.fill_(math.nan)
    with pytest.raises(NsaError, match="not finite") as error:
        inspect_prompt(model, random_ids())
    assert error.value.exit_code == ExitCode.BAD_INPUT


def test_a_long_prompt_is_cut_to_its_last_tokens_with_a_notice() -> None:
    ids, notice = clip_prompt(list(range(10)), 4)
    assert ids == [6, 7, 8, 9]
    assert notice is not None
    assert "10" in notice
    assert "4" in notice
    assert "\n" not in notice
    assert clip_prompt([1, 2, 3, 4], 4) == ([1, 2, 3, 4], None)
    assert clip_prompt([], 4) == ([], None)


@pytest.mark.parametrize("branch_kv", ["independent", "shared"])
@pytest.mark.parametrize("compress_rope", ["none", "block"])
@pytest.mark.parametrize("compress", ["mean", "mlp", "grouped-mlp"])
def test_every_kind_of_sparse_model_can_be_inspected(branch_kv: str, compress_rope: str, compress: str) -> None:
    nsa = replace(NSA, branch_kv=branch_kv, compress_rope=compress_rope, compress=compress)  # type: ignore[arg-type]
    result = inspect_prompt(random_model(replace(CONFIG, nsa=nsa)), random_ids(50))
    assert isinstance(result, Inspection)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
