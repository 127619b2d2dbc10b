"""Which case is measured at which length, in what order, and what is left out when the time limit comes near."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from nsa_cli.benchmark.cases import (
    Operator,
    Workload,
    branch_operators,
    dense_operator,
    make_workload,
    select,
    selection_parity,
    sparse_operator,
)
from nsa_cli.benchmark.decoding import Step, measure_dense, measure_sparse
from nsa_cli.benchmark.dense import Variant, fastest, variants
from nsa_cli.benchmark.measuring import Bench, check_forward, measure_backward, measure_forward
from nsa_cli.benchmark.models import Subject, measure_prefill_and_decode, measure_training, subjects
from nsa_cli.benchmark.options import BenchOptions, Shape
from nsa_cli.benchmark.report import Figures, Row
from nsa_cli.errors import ExitCode, NsaError, is_out_of_memory
from nsa_cli.model import accounting

FORWARD, BACKWARD, TRAINING, PREFILL, DECODE = "forward", "backward", "training step", "prefill", "decode"
STEP = "decode attention"
TOO_LARGE = "out of memory"
Made = TypeVar("Made")
LEAST_RUNS = 2
"""What a side costs at least, in runs: the first one, compared with the reference, and one that is timed."""
PICK_TOKENS = 2048
"""On a CPU the dense variant is picked on the first tokens: the longer the input, the less the variants differ."""


@dataclass
class Runner:
    """Goes through the lengths: first the shortest, which tells what the others will cost, then those that were asked
    for, with the time that is left the other rungs of the ladder, the longest first, attention before models, and last
    the branches of the lengths that were asked for."""

    options: BenchOptions
    shape: Shape
    kernel: str
    bench: Bench
    progress: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    _seconds: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    _picked: dict[tuple[str, int], Variant] = field(default_factory=dict)

    def run(self) -> None:
        """Fill `rows` and `notices`."""
        faults: dict[int, str] = {}
        for tokens, models in self._order():
            if self.bench.deadline.stopped():
                break
            if models:
                self._models(tokens, faults[tokens])
            else:
                faults[tokens] = self._attention(tokens)
        for tokens in self.options.seq_lens if "branches" in self.options.groups else ():
            self._branches(tokens)
        self.rows.sort(key=lambda row: row.seq_len)
        if self.bench.deadline.stopped():
            self.notices.append("interrupted: what had not been measured is missing")
        elif any("time limit" in row.note for row in self.rows):
            self.notices.append(f"some rows were left out to end within the time limit of {self.options.limit_s:g} s")
        elif self.bench.deadline.remaining_s() < 0:
            self.notices.append("the time limit cut the repeats of the last rows short")

    def _order(self) -> list[tuple[int, bool]]:
        """Lengths in the order of their measurement, each for attention (False) and then for the models (True)."""
        lengths, asked = self.options.lengths(), self.options.seq_lens
        first, others = lengths[0], lengths[1:]
        wanted = [first, *(n for n in others if n in asked)]
        rungs = [n for n in reversed(others) if n not in asked]
        both = [(n, models) for n in wanted for models in (False, True)]
        return [*both, *((n, models) for models in (False, True) for n in rungs)]

    def _models(self, tokens: int, fault: str) -> None:
        if "training" in self.options.groups:
            self._training(tokens, fault)
        if "decode" in self.options.groups:
            self._decode(tokens, fault)

    def _attention(self, tokens: int) -> str:
        """Attention's rows at one length; what is wrong with sparse attention there, or "".

        Without these rows one sequence's is still run once, compared and not timed: the model's rows need it right.
        """
        options, bench = self.options, self.bench
        if tokens not in options.seq_lens and not bench.deadline.allows(self._run_s(FORWARD, "sparse", tokens)):
            for case in (FORWARD, BACKWARD) if "attention" in options.groups else ():
                self._add(case, tokens, None, None, "left out: time limit")
            return ""
        if "attention" not in options.groups:
            return self._check_one(tokens)
        inputs = self._fitting(lambda: self._inputs(tokens, options.batch))
        if inputs is None:
            for case in (FORWARD, BACKWARD):
                self._add(case, tokens, None, None, f"left out with its inputs: {TOO_LARGE}")
            return self._check_one(tokens)
        work, block_indices = inputs
        fault = selection_parity(work, block_indices)
        whole = sparse_operator(work, self.kernel, block_indices)
        for case in (FORWARD, BACKWARD):
            sparse, note = self._side(case, "sparse", tokens, partial(self._operator, whole, case, work, fault))
            dense, dense_note = self._side(case, "dense", tokens, partial(self._dense, work, case))
            self._add(case, tokens, dense, sparse, dense_note, note)
            if sparse is not None and sparse.parity is not None:
                fault = fault or sparse.parity.detail
            elif case == FORWARD and note.endswith(TOO_LARGE):
                fault = fault or self._check_one(tokens)
        return fault

    def _check_one(self, tokens: int) -> str:
        """What is wrong with sparse attention of one sequence, or ""."""

        def check() -> str:
            work, block_indices = self._inputs(tokens, 1)
            whole = sparse_operator(work, self.kernel, block_indices)
            return selection_parity(work, block_indices) or check_forward(self.bench, whole, work.queries)[0].detail

        fault = self._fitting(check)
        return TOO_LARGE if fault is None else fault

    def _branches(self, tokens: int) -> None:
        """A row for each branch of a length that was asked for: last, since they explain the others' figures."""
        options, bench = self.options, self.bench
        if bench.deadline.remaining_s() <= 0:
            return
        inputs = self._fitting(lambda: self._inputs(tokens, options.batch))
        if inputs is None:
            self.notices.append(f"{tokens:,} tokens: branches left out with their inputs: {TOO_LARGE}")
            return
        work, block_indices = inputs
        selection = selection_parity(work, block_indices)
        for case in (FORWARD, BACKWARD):
            for operator in branch_operators(work, self.kernel, block_indices):
                known = selection if operator.name.startswith("compressed") else ""
                name = f"branch {operator.name}, {case}"
                measure = partial(self._operator, operator, case, work, known)
                figures, note = self._side(name, "sparse", tokens, measure)
                self._add(name, tokens, None, figures, note)

    def _inputs(self, tokens: int, batch: int) -> tuple[Workload, Tensor]:
        """Random inputs, and what the kernel selects of them."""
        bench, options = self.bench, self.options
        work = make_workload(tokens, self.shape, batch, options.nsa, device=bench.device, dtype=bench.dtype, seed=options.seed)
        return work, select(work, self.kernel)

    def _fitting(self, work: Callable[[], Made]) -> Made | None:
        """What `work` makes, or None where memory does not suffice."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # the error's frames, which held it, are gone
        return None

    def _operator(self, operator: Operator, case: str, work: Workload, fault: str) -> Figures:
        run = measure_forward if case == FORWARD else measure_backward
        return run(self.bench, operator, work.queries, fault)

    def _dense(self, work: Workload, case: str) -> Figures:
        key = (case, work.tokens if work.device.type == "cuda" else min(work.tokens, PICK_TOKENS))
        if key not in self._picked:
            self._picked[key] = self._pick(work, case, key[1])
        return self._operator(dense_operator(work, self._picked[key]), case, work, "")

    def _pick(self, work: Workload, case: str, tokens: int) -> Variant:
        """The fastest dense variant on the workload's first tokens."""
        candidates = variants(work.device, work.shape.heads // work.shape.kv_heads)
        if len(candidates) == 1:
            return candidates[0]
        inputs = [work.tensors[name][:, :, :tokens].detach().requires_grad_() for name in ("q", "k", "v")]

        def prepare(variant: Variant) -> Callable[[], object]:
            if case == FORWARD:
                return lambda: _without_gradients(variant, inputs)
            out = variant(*inputs)
            grad = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

        found = fastest(candidates, prepare, self.bench.clock, budget_s=self.bench.budget_s / 10)
        if found is None:
            message = "no fused attention of PyTorch runs with these sizes: nothing to compare with"
            raise NsaError(message, "change --dim-head or --dtype", ExitCode.UNAVAILABLE)
        return found

    def _training(self, tokens: int, fault: str) -> None:
        dense, sparse = self._subjects(tokens)
        dense_side, dense_note = self._side(TRAINING, "dense", tokens, lambda: measure_training(self.bench, dense))
        sparse_side, note = self._side(TRAINING, "sparse", tokens, lambda: measure_training(self.bench, sparse), fault)
        self._add(TRAINING, tokens, dense_side, sparse_side, dense_note, note)

    def _decode(self, tokens: int, fault: str) -> None:
        """One layer's attention in a step; prefill and decode, two rows: decoding starts from the prefilled cache."""
        options = self.options
        step = Step(tokens=tokens, shape=self.shape, batch=options.batch, nsa=options.nsa, kernel=self.kernel, seed=options.seed)
        dense, dense_note = self._side(STEP, "dense", tokens, lambda: measure_dense(self.bench, step))
        sparse, note = self._side(STEP, "sparse", tokens, lambda: measure_sparse(self.bench, step), fault)
        self._add(STEP, tokens, dense, sparse, dense_note, note)
        sides: list[Sequence[Figures | None]] = []
        notes = []
        for subject in self._subjects(tokens):
            known = fault if subject.label == "sparse" else ""
            decoded: list[Figures] = []
            measure_both = partial(self._prefill, subject, decoded)
            prefilled, note = self._side(PREFILL, subject.label, tokens, measure_both, known)
            sides.append((prefilled, decoded[0] if decoded else None))
            notes.append(note)
        for case, dense, sparse in zip((PREFILL, DECODE), *sides, strict=True):
            self._add(case, tokens, dense, sparse, *notes)

    def _prefill(self, subject: Subject, decoded: list[Figures]) -> Figures:
        prefilled, decode = measure_prefill_and_decode(self.bench, subject)
        decoded.append(decode)
        return prefilled

    def _subjects(self, tokens: int) -> tuple[Subject, Subject]:
        options = self.options
        return subjects(tokens, self.shape, options.nsa, self.kernel, options.batch, options.seed)

    def _side(
        self, case: str, label: str, tokens: int, work: Callable[[], Figures], fault: str = ""
    ) -> tuple[Figures | None, str]:
        """Measure one side of a row, or say why not: it is known to be wrong, would not end in time, or does not fit into
        memory, where the other side may."""
        if fault:
            return None, f"{label} not timed: {fault}"
        run_s, deadline = self._run_s(case, label, tokens), self.bench.deadline
        if deadline.stopped():
            return None, f"{label} left out: interrupted"
        if deadline.remaining_s() <= 0 or not deadline.allows(LEAST_RUNS * run_s):
            return None, f"{label} left out, about {run_s:.0f} s a run: time limit"
        self.progress(f"{tokens:,} tokens: {case}{'' if case.startswith('branch') else ', ' + label}")
        figures = self._fitting(work)
        if figures is None:
            return None, f"{label} left out: {TOO_LARGE}"
        if figures.timing is not None:
            self._seconds[case, label] = tokens, figures.timing.median_s
        return figures, ""

    def _run_s(self, case: str, label: str, tokens: int) -> float:
        """About what one run takes: another length's seconds times the ratio of their operations; 0 when unknown."""
        other, seconds = self._seconds.get((case, label), (tokens, 0.0))
        return seconds * self._flops(case, label, tokens) / self._flops(case, label, other)

    def _flops(self, case: str, label: str, tokens: int) -> float:
        if case in (TRAINING, PREFILL):
            config = self._subjects(tokens)[label == "sparse"].config
            flops = accounting.model_flops_per_token(config)
            return tokens * (flops.training if case == TRAINING else flops.forward)
        if case == STEP:
            return accounting.decode_read_tokens(tokens, self.options.nsa if label == "sparse" else None)
        shape, backward = self.shape, case == BACKWARD
        if label == "dense":
            return accounting.dense_attention_flops(tokens, shape.heads, shape.dim_head, backward=backward)
        nsa = self.options.nsa
        return accounting.sparse_attention_flops(tokens, shape.heads, shape.dim_head, nsa, backward=backward).total

    def _add(self, case: str, tokens: int, dense: Figures | None, sparse: Figures | None, *notes: str) -> None:
        if dense is None and sparse is None and self.bench.deadline.stopped():
            return
        note = "; ".join(note for note in notes if note)
        self.rows.append(Row(case=case, seq_len=tokens, dense=dense, sparse=sparse, note=note))


def _without_gradients(variant: Variant, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return variant(*inputs)
