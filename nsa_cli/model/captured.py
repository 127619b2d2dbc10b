"""A decoding step of the whole model as a CUDA graph: at one token a pass, launches cost more than all that they launch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nsa_cli.model.cache import Cache
from nsa_cli.model.transformer import Transformer

WARM_UPS = 2
"""Steps before a capture, in which kernels are compiled, libraries make their handles and the cache takes its full size."""


DENSE_UP_TO = 4096
"""Tokens of a dense model's cache: a captured step masks all of its capacity, which costs more than launches in a longer one."""


def can_capture(model: Transformer, capacity: int) -> bool:
    """Whether a step asks the host for nothing and gains by it: on a CUDA GPU, with Triton's kernels, or dense and short."""
    if model.device.type != "cuda" or isinstance(model, FSDPModule):  # whose passes gather weights from other processes
        return False
    return model.kernel == "triton" if model.config.nsa is not None else capacity <= DENSE_UP_TO


class CapturedStep:
    """`model(ids, cache=cache)` for one token a row, replayed: the same graph for every length up to the cache's capacity."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros(len(cache.host_lengths), 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.refused = False

    def __call__(self, ids: Tensor) -> Tensor:
        """Append ids int64 [rows]; logits float32 [rows, 1, vocab] of what follows, overwritten by the next call."""
        cache = self.cache
        if not self.refused and (self.graph is None or cache.longest + 1 > cache.capacity):
            self._try_to_capture()
        if self.graph is None:
            logits: Tensor = self.model(ids[:, None], cache=cache)
            return logits
        self.ids.copy_(ids[:, None])
        self.graph.replay()
        cache.host_lengths = [length + 1 for length in cache.host_lengths]
        return self.logits

    def _try_to_capture(self) -> None:
        """A step that cannot be captured here (a driver, a library) is made as before, slower and right: told once."""
        self.graph = None
        mark, stream = self.cache.mark(), torch.cuda.current_stream(self.model.device) if torch.cuda.is_available() else None
        try:
            self._capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if stream is not None:  # a capture that failed leaves its own behind
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize(self.model.device)
            self.graph, self.refused, self.cache.static = None, True, False
            self.cache.back_to(mark)
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            warnings.warn(f"decoding goes on without a CUDA graph, which could not be captured: {reason}", stacklevel=2)

    def _capture(self) -> None:
        cache, device = self.cache, self.model.device
        cache.reserve(cache.longest + 1)
        cache.static = True
        mark = cache.mark()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.model(self.ids, cache=cache)
                cache.back_to(mark)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread's questions to the device (a collective library's watchdog) do not spoil the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = self.model(self.ids, cache=cache)
        self.graph = graph
