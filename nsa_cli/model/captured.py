"""A decoding step of the whole model as a CUDA graph: the host sends one launch instead of a hundred."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from nsa_cli.model.cache import Cache
from nsa_cli.model.step import Step

WARM_UPS = 2
"""Steps before a capture, in which kernels are compiled and libraries make their handles."""


class CapturedStep:
    """`model(ids, cache=cache)` for one token a row, by `Step`: replayed, with the same two graphs for every length up to the
    cache's capacity, one for the steps that complete a compressed block in some row and one for the others."""

    def __init__(self, step: Step, cache: Cache) -> None:
        self.step, self.cache = step, cache
        self.ids = torch.zeros(len(cache.host_lengths), dtype=torch.int64, device=cache.device)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.refused = False
        step.reserve(cache)

    def __call__(self, ids: Tensor, *, capture: bool = True) -> Tensor:
        """Append ids int64 [rows]; logits float32 [rows, vocab] of what follows, overwritten by the next call.

        capture: whether a graph may be made now, which takes as long as some steps.
        """
        cache = self.cache
        if cache.longest + 1 > cache.capacity:
            self.step.reserve(cache)
            self.graphs = {}
        blocks = self.step.completes(cache)
        if blocks not in self.graphs and capture and not self.refused:
            self._try_to_capture(blocks)
        self.ids.copy_(ids)
        if blocks in self.graphs:
            graph, logits = self.graphs[blocks]
            graph.replay()
        else:
            logits = self.step(self.ids, cache, blocks=blocks)
        cache.host_lengths = [length + 1 for length in cache.host_lengths]
        return logits

    def _try_to_capture(self, blocks: bool) -> None:
        """A step that cannot be captured here (a driver, a library) is made launch by launch, slower and right: told once."""
        mark, stream = self.cache.mark(), torch.cuda.current_stream(self.cache.device) if torch.cuda.is_available() else None
        try:
            self._capture(blocks)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if stream is not None:  # a capture that failed leaves its own behind
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize(self.cache.device)
            self.graphs, self.refused = {}, True
            self.cache.back_to(mark)
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            warnings.warn(f"decoding goes on without a CUDA graph, which could not be captured: {reason}", stacklevel=3)

    def _capture(self, blocks: bool) -> None:
        cache, device = self.cache, self.cache.device
        mark = cache.mark()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step(self.ids, cache, blocks=blocks)
                cache.back_to(mark)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)
        # Another thread's questions to the device (a collective library's watchdog) do not spoil the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = self.step(self.ids, cache, blocks=blocks)
        self.graphs[blocks] = (graph, logits)
