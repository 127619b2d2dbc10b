"""A decoding step of the whole model as a CUDA graph: at one token a pass, launches cost more than all that they launch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from nsa_cli.model import Cache, Transformer

WARM_UPS = 2
"""Steps before a capture, in which kernels are compiled, libraries make their handles and the cache takes its full size."""


def can_capture(model: Transformer) -> bool:
    """Whether a step of the model asks the host for nothing: on a CUDA GPU, dense or with Triton's kernels."""
    return model.device.type == "cuda" and (model.config.nsa is None or model.kernel == "triton")


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
        mark = self.cache.mark()
        try:
            self._capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
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
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self.model(self.ids, cache=cache)
        self.graph = graph
