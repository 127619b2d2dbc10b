"""From files to token windows: tokenizer, corpus and sampler. numpy only; torch is the model's business."""

from nsa_cli.data.corpus import Corpus, load_corpus, shard_tokenizer
from nsa_cli.data.documents import NO_TARGET, Documents, Windows, join_windows
from nsa_cli.data.mixture import Mixture, Source
from nsa_cli.data.sampler import step_draws, training_batch, validation_windows, window_starts
from nsa_cli.data.synthetic import Synthetic
from nsa_cli.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict

__all__ = [
    "NO_TARGET",
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "Documents",
    "Mixture",
    "Source",
    "Synthetic",
    "Tokenizer",
    "Windows",
    "join_windows",
    "load_corpus",
    "load_tokenizer",
    "shard_tokenizer",
    "step_draws",
    "tokenizer_from_dict",
    "training_batch",
    "validation_windows",
    "window_starts",
]
