"""One transformer, dense or sparse. `build_model` is the only way to make one."""

from nsa_cli.model.build import build_model
from nsa_cli.model.cache import Cache
from nsa_cli.model.transformer import Transformer

__all__ = ["Cache", "Transformer", "build_model"]
