"""From files to token windows: tokenizer, corpus and sampler. numpy only; torch is the model's business."""

from nsa_cli.data.corpus import Corpus, load_corpus
from nsa_cli.data.sampler import training_batch, validation_windows, window_starts
from nsa_cli.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_dict

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "Tokenizer",
    "load_corpus",
    "load_tokenizer",
    "tokenizer_from_dict",
    "training_batch",
    "validation_windows",
    "window_starts",
]
