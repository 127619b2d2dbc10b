"""The key/value cache: what a layer has to remember to decode one token at a time.

Tensors are named by what they hold ("k", "v" for dense attention; "k_slc", "k_cmp" and so on for sparse), [b, g, places, d],
zero where nothing was written, and grow by doubling. Lengths are known on the host, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """One layer's named buffers. `places(tokens)` of a buffer is tokens, or compressed blocks for names ending in _cmp."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def write(self, name: str, x: Tensor, rows: Tensor | None, places: Tensor | slice, capacity: int) -> Tensor:
        """Put x into the buffer `name` of at least `capacity` places and return the whole buffer.

        rows None: x [b, g, m, d] goes to the places slice of every row. Otherwise x [m, g, d] goes to the pairs
        (rows[i], places[i]).
        """
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[2] < capacity:
            batch = x.shape[0] if rows is None else self._batch()
            grown = x.new_zeros(batch, x.shape[1], capacity, x.shape[-1])
            if buffer is not None:
                grown[:, :, : buffer.shape[2]] = buffer
            buffer = self.buffers[name] = grown
        if rows is None:
            buffer[:, :, places] = x.to(buffer.dtype)
        else:
            buffer[rows, :, places] = x.to(buffer.dtype)
        return buffer

    def _batch(self) -> int:
        return next(iter(self.buffers.values())).shape[0]


class Cache:
    """What `Transformer.make_cache` returns and `Transformer.forward(ids, cache=...)` extends.

    lengths: tokens that every sequence of the batch holds.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.device = device
        self.capacity = max(capacity, 1)
        self.host_lengths = [0] * batch

    @property
    def lengths(self) -> Tensor:
        """int64 [b] on the model's device."""
        return torch.tensor(self.host_lengths, device=self.device)

    @property
    def longest(self) -> int:
        return max(self.host_lengths, default=0)

    @property
    def uniform(self) -> bool:
        """Whether all sequences have the same length."""
        return len(set(self.host_lengths)) <= 1

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(b.numel() * b.element_size() for layer in self.layers for b in layer.buffers.values())

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens a sequence, doubling at least, so that growing costs little a token."""
        if tokens > self.capacity:
            self.capacity = max(tokens, 2 * self.capacity)

    def set_lengths(self, lengths: Tensor | Sequence[int]) -> None:
        """Keep only the first lengths[b] tokens of each sequence (after a right-padded prefill, say).

        What lies beyond is never read, and is overwritten by the next tokens. Raises ValueError for a longer length.
        """
        wanted = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if len(wanted) != len(self.host_lengths):
            raise ValueError(f"lengths has {len(wanted)} entries: the cache holds {len(self.host_lengths)} sequences")
        for i, (new, old) in enumerate(zip(wanted, self.host_lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"lengths[{i}] = {new}: must be between 0 and the cached {old}")
        self.host_lengths = wanted

    def select(self, rows: Tensor | Sequence[int]) -> Cache:
        """A cache of the given rows of the batch, in that order, each as often as named."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        chosen = Cache(len(self.layers), 0, self.capacity, self.device)
        chosen.host_lengths = [self.host_lengths[i] for i in index.tolist()]
        index = index.to(self.device)
        for mine, theirs in zip(chosen.layers, self.layers, strict=True):
            mine.buffers = {name: buffer.index_select(0, index) for name, buffer in theirs.buffers.items()}
        return chosen
