"""The torch kernel as torch.compile takes it: called as it stands, between two graphs.

Its loops over chunks are not for tracing. A module of its own, since `torch.compiler.disable` loads the compiler, which takes
as long as torch itself.
"""

import torch

from nsa_cli.ops import torch_backend

compressed_attention = torch.compiler.disable(torch_backend.compressed_attention)
selected_attention = torch.compiler.disable(torch_backend.selected_attention)
window_attention = torch.compiler.disable(torch_backend.window_attention)
