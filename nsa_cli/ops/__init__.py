"""Native Sparse Attention on tensors: the public operators and nothing of any model.

Letters of a layout: b batch, h query head, g key/value head, t query token, s key token, d head dim, c compressed block,
j selection block, n selected slot.
"""

from nsa_cli.ops.dispatch import compressed_attention, nsa_attention, selected_attention, window_attention

__all__ = ["compressed_attention", "nsa_attention", "selected_attention", "window_attention"]
