"""Training: the loop, its schedule and optimizer, what it records, and how it stops and goes on.

`run` and `schedule` need no torch; `train` and the rest load it.
"""

from nsa_cli.training.dryrun import dry_run
from nsa_cli.training.loop import train
from nsa_cli.training.resume import run_settings, run_tokenizer
from nsa_cli.training.run import Reporter, RunPaths, SilentReporter, TrainResult
from nsa_cli.training.schedule import learning_rate

__all__ = [
    "Reporter",
    "RunPaths",
    "SilentReporter",
    "TrainResult",
    "dry_run",
    "learning_rate",
    "run_settings",
    "run_tokenizer",
    "train",
]
