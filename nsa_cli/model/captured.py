"""A decoding step of the whole model as a CUDA graph: the host sends one launch instead of a hundred."""

from __future__ import annotations

import warnings
from functools import cache
from typing import cast

import torch
from torch import Tensor

from nsa_cli.model.cache import Cache, Mark
from nsa_cli.model.step import Step


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


class CapturedStep:
    """`model(ids, cache=cache)` for one token a row, by `Step`: replayed, with the same two graphs for every length up to the
    cache's capacity, one for the steps that complete a compressed block in some row and one for the others.

    Where the kernels cannot run, steps are the model's own; where no graph can be captured, they are made launch by launch:
    slower and right, and told once for each `Step`.
    """

    def __init__(self, step: Step, cache: Cache) -> None:
        self.step, self.cache = step, cache
        self.ids = torch.zeros(len(cache.host_lengths), dtype=torch.int64, device=cache.device)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.capacity = 0

    def __call__(self, ids: Tensor, *, capture: bool = True) -> Tensor:
        """Append ids int64 [rows]; logits float32 [rows, vocab] of what follows, overwritten by the next call.

        capture: whether a graph may be made now, which takes as long as some steps.
        """
        cache, step = self.cache, self.step
        if cache.longest + 1 > self.capacity or cache.capacity != self.capacity:
            step.reserve(cache)
            self.graphs, self.capacity = {}, cache.capacity
        self.ids.copy_(ids)
        blocks = step.completes(cache)
        if capture and step.can_capture and self._kind(blocks) in step.proven and blocks not in self.graphs:
            self._try_to_capture(blocks)
        if blocks in self.graphs:
            graph, logits = self.graphs[blocks]
            graph.replay()
        else:
            launched = self._launched(blocks) if step.can_run else None
            if launched is None:
                return cast(Tensor, step.model(self.ids[:, None], cache=cache))[:, -1]
            logits = launched
        cache.host_lengths = [length + 1 for length in cache.host_lengths]
        return logits

    def _kind(self, blocks: bool) -> tuple[bool, int]:
        return blocks, len(self.ids)

    def _launched(self, blocks: bool) -> Tensor | None:
        """A step without a graph, None where the kernels cannot be compiled or run: the first of each kind shows it."""
        if self._kind(blocks) in self.step.proven:
            return self.step(self.ids, self.cache, blocks=blocks)
        mark = self.cache.mark()
        try:
            logits = self.step(self.ids, self.cache, blocks=blocks)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's own: no compiler, too little on-chip memory
            self.cache.back_to(mark)
            self.step.can_run = False
            _tell("decoding goes on without kernels of its own, which cannot run here", error)
            return None
        self.step.proven.add(self._kind(blocks))
        return logits

    def _try_to_capture(self, blocks: bool) -> None:
        mark, stream = self.cache.mark(), torch.cuda.current_stream(self.cache.device) if torch.cuda.is_available() else None
        try:
            self._capture(blocks, mark)
        except RuntimeError as error:  # a driver, a library, or the graph's own memory
            if stream is not None:  # a capture that failed leaves its own behind
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize(self.cache.device)
            self.graphs, self.step.can_capture = {}, False
            self.cache.back_to(mark)
            _tell("decoding goes on without a CUDA graph, which could not be captured", error)

    def _capture(self, blocks: bool, mark: Mark) -> None:
        cache, device = self.cache, self.cache.device
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries make their handles for the stream
            self.step(self.ids, cache, blocks=blocks)
            cache.back_to(mark)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)
        # Another thread's questions to the device (a collective library's watchdog) do not spoil the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = self.step(self.ids, cache, blocks=blocks)
        self.graphs[blocks] = (graph, logits)


def _tell(what: str, error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(f"{what}: {reason}", stacklevel=4)
