"""A decoding step against the operator that it is a part of: with torch, with Triton's kernels, and as a graph would do it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime import interpreter

from nsa_cli.benchmark.parity import poisoned
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.model import Transformer, build_model, nsa
from nsa_cli.ops import nsa_attention
from nsa_cli.ops.decode import decode_attention
from nsa_cli.ops.dispatch import nsa_attention_and_selection
from nsa_cli.ops.triton import decode, group, group_tiles
from nsa_cli.ops.triton.device import has_tiles
from tests.inputs import relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NAMES = ("compress_block", "compress_stride", "select_block", "num_selected", "num_init", "num_local", "window")

# l, d, l', n, num_init, num_local, w · query heads, key/value heads, D, Dv · lengths · capacity · whether the window is a ring
CASES = [
    ((8, 4, 16, 4, 1, 2, 32), (4, 2, 32, 32), [200, 130, 7, 1, 16], 256, True),
    ((8, 4, 16, 4, 1, 2, 32), (4, 2, 32, 32), [200, 200], 201, False),
    ((32, 16, 64, 5, 1, 2, 50), (6, 1, 16, 24), [700], 700, True),
    ((4, 4, 4, 3, 0, 0, 5), (3, 3, 8, 8), [33, 12], 40, False),
    ((4, 4, 4, 3, 0, 0, 5), (2, 1, 8, 8), [37], 37, True),
    ((12, 4, 24, 4, 1, 1, 31), (16, 1, 80, 80), [100, 99], 128, True),
    ((8, 4, 16, 4, 1, 2, 32), (2, 2, 16, 16), [5], 6, True),
    ((1, 1, 1, 6, 1, 1, 4), (4, 2, 8, 8), [40, 3], 64, True),
    ((16, 16, 128, 3, 1, 2, 7), (32, 1, 16, 16), [500], 512, False),
    ((2, 1, 4, 4, 1, 2, 9), (2, 1, 16, 16), [61, 61, 61], 64, True),
]


BATCH = ((32, 16, 64, 16, 1, 2, 512), (16, 2, 64, 64), [2_000, 1, 31, 700, 1_999, 64, 1_024, 513] * 8, 2_048, True)
"""A group for nearly every multiprocessor: one launch on a GPU, in half precision."""
LONG = ((32, 16, 64, 16, 1, 2, 512), (64, 4, 128, 128), [65_536, 8_192, 77], 65_600, True)


class Step:
    """Random caches of one step, and the same keys and values in order, for the whole operator."""

    def __init__(self, case: tuple[object, ...], device: str, dtype: torch.dtype) -> None:
        sizes, (h, g, d, e), self.lengths, capacity, self.ring = case  # type: ignore[misc]
        self.config = NSAConfig(**dict(zip(NAMES, sizes, strict=True)))
        b, config = len(self.lengths), self.config

        def draw(heads: int, places: int, width: int) -> Tensor:
            return torch.randn(b, heads, places, width, device=device).to(dtype)

        blocks = config.num_compressed(capacity)
        self.q, self.q_cmp = draw(h, 1, d), draw(h, 1, d)
        self.gates = torch.rand(b, h, 1, 3, device=device).to(dtype)
        self.k, self.v = draw(g, capacity, d), draw(g, capacity, e)
        self.k_cmp, self.v_cmp = draw(g, blocks, d), draw(g, blocks, e)
        self.k_own, self.v_own = (draw(g, capacity, d), draw(g, capacity, e)) if self.ring else (self.k, self.v)

    def run(self, kernel: str) -> tuple[Tensor, Tensor]:
        """The step, with NaN in every place that it must not read, or nonsense where torch reads and masks it (other lengths)."""
        poison = math.nan if kernel == "triton" or min(self.lengths) == max(self.lengths) else 1e3
        config, (k, v, k_cmp, v_cmp) = self.config, (x.clone() for x in (self.k, self.v, self.k_cmp, self.v_cmp))
        rings: list[Tensor | None] = [None, None]
        if self.ring:
            rings = [x.new_full((*x.shape[:2], config.window, x.shape[3]), poison) for x in (self.k_own, self.v_own)]
        for row, length in enumerate(self.lengths):
            for x, count in ((k, length), (v, length), *((x, config.num_compressed(length)) for x in (k_cmp, v_cmp))):
                x[row, :, count:] = poison
            for ring, source in zip(rings, (self.k_own, self.v_own), strict=True):
                for token in range(max(0, length - config.window), length):
                    if ring is not None:
                        ring[row, :, token % config.window] = source[row, :, token]
        at = torch.tensor(self.lengths, device=k.device) - 1
        with poisoned(k.device):
            return decode_attention(
                self.q, k, v, k_cmp, v_cmp, self.gates, config, lengths=self.lengths, positions=at, q_cmp=self.q_cmp,
                k_win=rings[0], v_win=rings[1], kernel=kernel,
            )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        """Row by row, in float32, by the whole operator."""
        parts = []
        for row, n in enumerate(self.lengths):
            c = self.config.num_compressed(n)
            of = slice(row, row + 1)
            cut = [(self.k, n), (self.v, n), (self.k_cmp, c), (self.v_cmp, c), (self.k_own, n), (self.v_own, n)]
            k, v, k_cmp, v_cmp, k_win, v_win = (x[of, :, :count].float() for x, count in cut)
            q, q_cmp, gates = (x[of].float() for x in (self.q, self.q_cmp, self.gates))
            at, options = torch.tensor([[n - 1]], device=q.device), {"q_cmp": q_cmp, "k_win": k_win, "v_win": v_win}
            args = (q, k, v, k_cmp, v_cmp, gates, self.config)
            parts.append(nsa_attention_and_selection(*args, **options, kernel="torch", positions=at))
        return torch.cat([out for out, _ in parts]), torch.cat([indices for _, indices in parts])


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_last_row_of_the_whole_operator(case: tuple[object, ...], kernel: str) -> None:
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    out, indices = step.run(kernel)
    assert torch.equal(indices, chosen)
    assert relative_l2(out, want) < 2e-6
    again, _ = step.run(kernel)
    assert torch.equal(out, again)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], ((4, 1, 64, 5, 1, 2, 50), (2, 1, 16, 16), [700], 1024, True)], ids=str)
def test_a_step_is_right_on_the_grid_of_a_large_gpu(case: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and shares of 132 multiprocessors, on whatever runs this."""
    monkeypatch.setattr("nsa_cli.ops.triton.decode.cores", lambda device: 132)
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    out, indices = step.run("triton")
    assert torch.equal(indices, chosen)
    assert relative_l2(out, want) < 2e-6


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every call that can be one launch be one; names what was launched."""
    launches: list[str] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append("attend_group")
            return self.kernel[grid]

    monkeypatch.setattr(group, "DTYPES", (*group.DTYPES, torch.float32))
    monkeypatch.setattr(group, "GROUPS", 0)
    monkeypatch.setattr(group, "attend_group", Counted(group.attend_group))
    return launches


GROUP_CASES = [
    *(CASES[i] for i in (0, 1, 2, 6)),
    ((16, 8, 32, 6, 1, 2, 40), (5, 1, 16, 24), [300, 31, 17, 1, 299], 320, False),
    ((16, 16, 64, 6, 0, 1, 70), (20, 2, 40, 24), [900, 31], 901, True),
    ((16, 16, 16, 3, 0, 0, 5), (3, 3, 8, 8), [130], 136, True),
]


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_a_batch_in_one_launch_is_the_last_row_of_the_whole_operator(case: tuple[object, ...], one_launch: list[str]) -> None:
    """In fresh memory full of NaN, and with the same bits a second time."""
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    (out, indices), (again, _) = step.run("triton"), step.run("triton")
    assert len(one_launch) == 2
    assert torch.equal(indices, chosen)
    assert relative_l2(out, want) < 2e-6
    assert torch.equal(out, again)


@pytest.mark.parametrize(
    "case",
    [
        CASES[5],  # blocks that are no whole sets of keys
        ((8, 1, 64, 4, 1, 2, 32), (4, 2, 16, 16), [70], 100, True),  # blocks of too many compressed keys
        ((8, 4, 16, 4, 1, 2, 32), (17, 1, 16, 16), [70], 100, True),  # groups of too many heads
    ],
    ids=str,
)
def test_what_one_launch_does_not_take_goes_through_several(case: tuple[object, ...], one_launch: list[str]) -> None:
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    out, indices = step.run("triton")
    assert one_launch == []
    assert torch.equal(indices, chosen)
    assert relative_l2(out, want) < 2e-6


def test_only_batches_with_a_group_for_most_multiprocessors_are_one_launch(
    one_launch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "GROUPS", 0.75)
    monkeypatch.setattr(group, "cores", lambda device: 8)
    for rows, launches in ((2, 0), (3, 1)):
        Step(((8, 4, 16, 4, 1, 2, 32), (4, 2, 16, 16), [40] * rows, 48, True), DEVICE, torch.float32).run("triton")
        assert len(one_launch) == launches


@pytest.mark.parametrize("path", ["one launch", "four", "a selection of its own"])
def test_scores_that_are_no_numbers_choose_no_more_blocks_than_there_are_places(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave other sequences as they are."""
    monkeypatch.setattr(group, "DTYPES", (torch.float32,))
    monkeypatch.setattr(group, "GROUPS", 0 if path == "one launch" else math.inf)
    if path == "a selection of its own":
        monkeypatch.setattr(decode, "CHOICE_WIDTH", 0)
    step = Step(((4, 4, 8, 4, 1, 1, 9), (2, 1, 16, 16), [150, 150], 160, True), DEVICE, torch.float32)
    want, chosen = step.run("triton")
    step.q_cmp[0, 0, 0, 0] = math.inf  # NaN for some blocks, nothing for others
    out, indices = step.run("triton")
    assert torch.equal(out[1], want[1])
    assert torch.equal(indices[1], chosen[1])
    rows = indices[0, :, 0]
    assert ((rows >= 0) & (rows <= 149 // 8)).all()
    assert (rows[:, 1:] > rows[:, :-1]).all()


TILE_CASES = [
    BATCH,
    ((32, 16, 64, 16, 1, 2, 512), (64, 4, 128, 128), [8_205, 4_097, 77], 8_205, False),
    ((32, 16, 64, 16, 1, 2, 512), (16, 2, 64, 64), [32_000, 20_011], 32_768, True),
    ((32, 16, 64, 5, 1, 1, 31), (10, 2, 80, 120), [1_501, 1, 11, 700], 1_501, True),
    ((16, 8, 16, 6, 1, 2, 64), (6, 6, 64, 64), [901, 17, 11, 700], 901, True),
    ((16, 16, 128, 7, 0, 1, 100), (12, 4, 48, 64), [4_001, 3, 2_500], 4_001, False),
    ((32, 8, 32, 9, 2, 3, 130), (32, 2, 64, 64), [4_001, 3, 2_500], 4_001, True),
    ((16, 8, 48, 4, 0, 0, 31), (9, 1, 128, 64), [400, 399, 11], 450, True),
    ((32, 16, 64, 16, 1, 2, 512), (1, 1, 64, 128), [31, 5], 31, True),
]


@pytest.mark.gpu
@pytest.mark.skipif(not has_tiles(torch.device(DEVICE)), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", TILE_CASES, ids=lambda case: str(case)[:90])
def test_a_batch_by_tiles_is_the_operator_in_float32_on_a_gpu(
    case: tuple[object, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles of both sizes, and the choice of the kernel that is portable."""
    calls, attend = [], group_tiles.attend_in_one

    def counted(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append(named)
        return attend(*args, **named)

    monkeypatch.setattr(group_tiles, "attend_in_one", counted)
    monkeypatch.setattr(group_tiles, "KEY_BYTES", math.inf)
    step = Step(case, "cuda", dtype)
    want, chosen = step.expected()
    longest, error = step.lengths.index(max(step.lengths)), 5e-3 if dtype == torch.bfloat16 else 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(decode, "has_tiles", lambda device: False)
        patch.setattr(group, "GROUPS", 0)
        others, portable = step.run("triton")
    assert not calls
    for sizes in (group_tiles.TILE_BYTES, group_tiles.TILE_BYTES[::-1]):
        monkeypatch.setattr(group_tiles, "TILE_BYTES", sizes)
        (out, indices), (again, _) = step.run("triton"), step.run("triton")
        assert torch.equal(out, again)
        for reference, choice in ((want, chosen), (others, portable)):
            same = (indices == choice).all(-1).all(1)[:, 0]
            assert same.float().mean() > 0.9 or len(same) < 10
            assert same[longest] or reference is want  # near ties of rounded scores
            assert relative_l2(out[same], reference[same]) < error
    assert len(calls) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not has_tiles(torch.device(DEVICE)), reason="needs a Hopper GPU")
@pytest.mark.parametrize("tiles", [True, False])
def test_one_launch_breaks_ties_and_keeps_its_places_whatever_the_scores_on_a_gpu(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal scores go to the lower block; queries and keys without a number leave other sequences as they are."""
    monkeypatch.setattr(decode, "has_tiles", lambda device: tiles)
    monkeypatch.setattr(group_tiles, "KEY_BYTES", math.inf)
    monkeypatch.setattr(group, "GROUPS", 0)
    step = Step(((32, 16, 64, 16, 1, 2, 512), (16, 2, 64, 64), [8_000, 8_000, 8_000], 8_192, True), "cuda", torch.float16)
    step.q_cmp[0] = 0
    (before, chosen) = step.run("triton")
    step.q_cmp[1, 0, 0, 0] = math.inf
    step.k_cmp[1, :, 60:200] = math.nan
    out, indices = step.run("triton")
    assert indices[0, 0, 0].tolist() == [*range(14), 123, 124]
    assert torch.equal(indices[::2], chosen[::2])
    assert torch.equal(out[::2], before[::2])
    rows = indices[1, :, 0]
    assert ((rows >= 0) & (rows <= 124)).all()
    assert (rows[:, 1:] > rows[:, :-1]).all()


def test_tiles_take_what_the_copy_engine_can_bring() -> None:
    """Rows of whole 16 bytes, heads one behind the other; any part of a longer cache."""
    cache = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    assert group_tiles._is_flat(cache)
    assert group_tiles._is_flat(cache[:, :, :30])
    assert group_tiles._is_flat(cache[1:, :, :, :40])
    assert group_tiles._rows(cache[:, :, :30]) == 40 != group_tiles._rows(torch.zeros(2, 3, 30, 64))
    for other in (cache.transpose(1, 2), cache[:, :2], cache[..., 1:], cache[..., ::2], torch.zeros(2, 3, 40, 20)[..., :18]):
        assert not group_tiles._is_flat(other)


PATHS = {"a selection by its own kernel": 0, "four kernels": decode.CHOICE_WIDTH}


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[8]], ids=str)
def test_a_selection_by_a_kernel_of_its_own_is_the_same(case: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What long caches take, on short ones; in fresh memory full of NaN, and with the same bits a second time."""
    monkeypatch.setattr(decode, "CHOICE_WIDTH", 0)
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    (out, indices), (again, _) = step.run("triton"), step.run("triton")
    assert torch.equal(indices, chosen)
    assert relative_l2(out, want) < 2e-6
    assert torch.equal(out, again)


@pytest.mark.skipif(DEVICE != "cpu", reason="what Triton's interpreter shows")
@pytest.mark.parametrize("path", [*PATHS, "one kernel"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_kernels_that_begin_early_touch_nothing_that_the_kernel_before_is_at(
    case: tuple[object, ...], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a program waits, what the kernel before wrote is NaN, and the program writes nothing; every program waits once."""
    if path in PATHS:
        monkeypatch.setattr(decode, "CHOICE_WIDTH", PATHS[path])
    else:
        monkeypatch.setattr(group, "DTYPES", (torch.float32,))
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    written: list[tuple[Tensor, Tensor]] = []  # by the kernel before, and what it wrote
    held: list[tuple[Tensor, Tensor]] = []  # this kernel's tensors, as its program found them
    waits: list[tuple[int, ...]] = []
    programs: list[tuple[int, ...]] = []

    def begin(*place: int) -> None:
        set_place(*place)
        programs.append(place)
        for x, _ in written:
            x.fill_(math.nan if x.is_floating_point() else -9)
        held[:] = [(x, x.clone()) for x, _ in held]

    def wait(OVERLAP: bool) -> None:
        waits.append(programs[-1])
        assert all(torch.equal(x.view(torch.uint8), kept.view(torch.uint8)) for x, kept in held)
        for x, content in written:
            x.copy_(content)

    class Watched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **named: Any) -> None:
                before = {x.data_ptr(): (x, x.clone()) for x in args if isinstance(x, Tensor) and x.numel() > 0}
                held[:] = before.values()
                if not programs:  # the call's own inputs, made just before
                    written[:] = [(x, x.clone()) for x in args[:4]]
                self.kernel[grid](*args, **named)
                for x, content in written:
                    x.copy_(content)
                same = [torch.equal(x.view(torch.uint8), kept.view(torch.uint8)) for x, kept in before.values()]
                written[:] = [(x, x.clone()) for (x, _), kept in zip(before.values(), same, strict=True) if not kept]

            return launch

    set_place = interpreter.interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", begin)
    monkeypatch.setattr(decode, "follow", wait)
    monkeypatch.setattr(group, "follow", wait)
    monkeypatch.setattr(group, "attend_group", Watched(group.attend_group))
    for name in ("attend_split", "block_scores", "select_blocks", "gather_split", "merge"):
        monkeypatch.setattr(decode, name, Watched(getattr(decode, name)))
    out, indices = step.run("triton")
    assert torch.equal(indices, chosen)
    assert relative_l2(out, want) < 2e-6
    assert waits == programs
    assert (len(programs) == len(step.lengths) * step.k.shape[1]) == (path == "one kernel")


def test_a_step_by_torch_takes_any_layout_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of PyTorch's kernels leave the heads of a group inside."""
    attention = F.scaled_dot_product_attention

    def across(*args: Tensor, **named: Any) -> Tensor:
        return attention(*args, **named).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", across)
    step = Step(CASES[0], DEVICE, torch.float32)
    assert relative_l2(step.run("torch")[0], step.expected()[0]) < 2e-6


def test_a_step_past_32k_tokens_is_right() -> None:
    case = ((32, 16, 64, 16, 1, 2, 512), (4, 1, 16, 16), [33_333, 32_769], 33_400, True)
    step = Step(case, DEVICE, torch.float32)
    want, chosen = step.expected()
    for kernel in ("torch", "triton"):
        out, indices = step.run(kernel)
        assert torch.equal(indices, chosen)
        assert relative_l2(out, want) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, LONG, BATCH], ids=lambda case: str(case)[:90])
def test_a_step_in_half_precision_is_the_operator_in_float32_on_a_gpu(case: tuple[object, ...], dtype: torch.dtype) -> None:
    step = Step(case, "cuda", dtype)
    want, chosen = step.expected()
    out, indices = step.run("triton")
    assert (indices == chosen).all(-1).float().mean() > 0.9  # near ties of rounded scores
    same = (indices == chosen).all(-1).all(1)[:, 0]
    assert relative_l2(out[same], want[same]) < 1e-2
    assert torch.equal(out, step.run("triton")[0])


TINY = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=6)


def _model(branch_kv: str, compress: str = "mlp", rope: str = "none", kernel: str = "triton") -> Transformer:
    nsa = NSAConfig(**{**vars(TINY), "branch_kv": branch_kv, "compress": compress, "compress_rope": rope})
    config = ModelConfig(vocab_size=97, dim=16, depth=1, heads=2, kv_heads=1, dim_head=8, context=64, nsa=nsa)
    return build_model(config, device=DEVICE, kernel=kernel).eval()


@pytest.mark.parametrize("branch_kv", ["independent", "shared"])
@torch.inference_mode()
def test_a_prompt_in_chunks_goes_through_the_training_kernels(branch_kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = (_model(branch_kv, kernel=kernel) for kernel in ("triton", "torch"))
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(97, (1, 29), device=DEVICE)
    offsets, attention = [], nsa.nsa_attention_and_selection

    def watched(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        offsets.append(named.get("offset"))
        return attention(*args, **named)

    monkeypatch.setattr(nsa, "nsa_attention_and_selection", watched)
    cache = model.make_cache(1, 29)
    got = torch.cat([model(piece, cache=cache) for piece in ids.split([11, 16, 2], 1)], 1)
    assert offsets == [None, 11, 27]
    assert relative_l2(got, reference(ids)) < 1e-5


def test_a_prefix_of_the_operator_is_what_a_step_continues() -> None:
    """The step's own reference is the plain operator: its last row, without positions."""
    step = Step(CASES[2], DEVICE, torch.float32)
    n = step.lengths[0]
    q, q_cmp = (torch.cat([torch.randn(1, 6, n - 1, 16, device=DEVICE), x], 2) for x in (step.q, step.q_cmp))
    gates = torch.cat([torch.rand(1, 6, n - 1, 3, device=DEVICE), step.gates], 2)
    c = step.config.num_compressed(n)
    out = nsa_attention(
        q, step.k, step.v, step.k_cmp[:, :, :c], step.v_cmp[:, :, :c], gates, step.config, q_cmp=q_cmp, k_win=step.k_own,
        v_win=step.v_own, kernel="torch",
    )  # fmt: skip
    assert relative_l2(step.run("torch")[0], out[:, :, -1:]) < 2e-6
