"""Several processes under torchrun: one run, the first of them its only voice and its only writer of files.

Every process builds the same model, sees its share of a step's windows and takes part in every collective call in the
same order. What decides the course of the run (the loss, the gradient norm, a validation, a signal) is a sum or a
maximum over all, so that all decide alike. The random numbers of process 0 are those of a run alone; another process's
begin anew at every step, from seed, step and rank: the state of process 0 is all that a resumption needs, on any number
of processes.

`Team()` is one process alone: its methods then do nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from nsa_cli.config import Parallel
from nsa_cli.errors import ExitCode, NsaError, tells_errors
from nsa_cli.model import Transformer
from nsa_cli.model.parallel import ContextParallel
from nsa_cli.training.agreement import AgreedInterruption, Listened, NoLog
from nsa_cli.training.metrics import MetricsLog
from nsa_cli.training.run import Reporter, SilentReporter
from nsa_cli.training.signals import Interruption

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: for data that one of them still reads, for a kernel that it compiles."""

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ERROR_KEY = "nsa/error"


class ToldElsewhere(NsaError):
    """The run failed, and another of its processes says why: leave with the exit code and without a word."""


@dataclass(frozen=True)
class Team:
    """The processes of one run, seen from one of them.

    rank: its number. world: how many there are. device: its own; None when alone, where the caller chooses. parallel: what
    they hold: "ddp", each a whole copy of weights and moments, or "fsdp", each a shard of them. context: those of them that
    share every sequence with this one; None where each has sequences of its own.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    parallel: Parallel = "ddp"
    context: ContextParallel | None = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to speak with."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files and tells the user."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return not self.alone and self.parallel == "fsdp"

    def record(self) -> dict[str, Any]:
        """How many processes there are and how they share the work, for the metrics header."""
        return {
            "world_size": self.world,
            "parallel": None if self.alone else self.parallel,
            "context_parallel": self._sharers,
        }

    @property
    def _sharers(self) -> int:
        return 1 if self.context is None else self.context.size

    def weights_device(self, device: torch.device) -> torch.device:
        """Where whole weights lie before the first step: a model that is sharded may be too large for one GPU."""
        return torch.device("cpu") if self.sharded else device

    @property
    def replicas(self) -> int:
        """Copies of the model that each see windows of their own."""
        return self.world // self._sharers

    @property
    def replica(self) -> int:
        """The number of this process's copy."""
        return self.rank // self._sharers

    def require_context(self, tokens: int) -> None:
        """NsaError with exit 2 for a context that the processes of a sequence cannot share evenly."""
        pieces = 2 * self._sharers
        if self.context is not None and tokens % pieces:
            message = f"--seq-len {tokens} cannot be cut into {pieces} equal pieces, two for each process of a sequence"
            nearest = max(1, round(tokens / pieces)) * pieces
            raise NsaError(message, f"--seq-len {nearest} can", ExitCode.USAGE)

    @contextmanager
    def sequences_whole(self, model: Transformer) -> Iterator[None]:
        """The model as every process runs it for itself: to sample from, where nothing is shared."""
        shared, model.context_parallel = model.context_parallel, None
        try:
            yield
        finally:
            model.context_parallel = shared

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as a step calls it: its gradients become the mean over the processes. A sharded model does so itself."""
        if self.alone or self.sharded:
            return model
        own = [self.device] if self.device is not None and self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True)

    def synchronised(self, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: only the last one of a step sends its gradients, unless they would
        otherwise have to be held whole."""
        if isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, the same bits on each."""
        if self.alone:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of a step; process 0 goes on with those it has, as a run alone would."""
        if not self.first:
            mixed = np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(mixed[0]))

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """NsaError with exit 3 unless every process has these JSON values; nobody goes on before all have asked."""
        if self.alone:
            return
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, json.dumps(facts, sort_keys=True))
        theirs = [json.loads(text) for text in found]
        for rank, other in enumerate(theirs):
            for name, value in theirs[0].items():
                if other.get(name) != value:
                    message = f"process {rank} has {name} {other.get(name)}, process 0 has {value}"
                    raise NsaError(message, "give every process the same data and settings", ExitCode.BAD_INPUT)

    def wait(self) -> None:
        """For all: the files are written, and nobody leaves and has torchrun end the others before."""
        if not self.alone:
            dist.all_reduce(torch.zeros(1))

    def from_first(self, value: dict[str, Any]) -> dict[str, Any]:
        """Process 0's value, of JSON types, on all of them."""
        if self.alone:
            return value
        text = [json.dumps(value)]
        dist.broadcast_object_list(text)
        return dict(json.loads(text[0]))

    def interruption(self, heard: Interruption) -> Interruption:
        """What the processes agree on; `heard` is what this one caught itself."""
        return heard if self.alone else AgreedInterruption(heard)

    def reporter(self, reporter: Reporter) -> Reporter:
        """The user's, for the first process; the others tell nobody."""
        return reporter if self.first else SilentReporter()

    def listened(self, reporter: Reporter, heard: Interruption) -> Reporter:
        """A reporter whose reader may leave: the run then ends on all processes as after a signal (SIGPIPE, exit 141)."""
        return reporter if self.alone else Listened(reporter, heard)

    def log(self, log: MetricsLog) -> MetricsLog:
        """The metrics file, for the first process."""
        return log if self.first else NoLog(log.path)


@contextmanager
def open_team(device: str = "auto", parallel: Parallel = "ddp", context: int = 1) -> Iterator[Team]:
    """The processes that torchrun started, joined for the time of the context; alone where it did not.

    device: --device's value; each process gets a GPU of its own (cuda:LOCAL_RANK), or the CPU. GPUs speak through NCCL, and
    what the hosts tell each other goes through gloo. parallel: see Team. context: processes that share a
    sequence, neighbours by rank; it divides their number.

    An error inside is told once: the first process that has one raises it, and on the others, which fail in the next
    collective call, ToldElsewhere is raised. Before they can speak with each other, it is raised on all but the first; of
    those without a GPU the first on its machine tells. Errors of its own: NsaError, exit 2 for a device that many cannot share
    and for a context that does not divide them, 5 for too few GPUs or a launcher that is not torchrun.
    """
    world = os.environ.get("WORLD_SIZE", "")
    processes = int(world) if world.isdecimal() and int(world) > 1 else 1
    if context < 1 or processes % context:
        message = f"--context-parallel {context}: must divide the processes, of which there {_are(processes)}"
        hint = f"torchrun --nproc-per-node {max(context, 2)} -m nsa_cli train ... starts more; 1 is the default"
        raise _by_the_first(message, hint, ExitCode.USAGE)
    if processes == 1:
        yield Team(parallel=parallel)
        return
    if missing := [name for name in _LAUNCHED if not os.environ.get(name)]:
        message = f"WORLD_SIZE={world} without {missing[0]}: torchrun sets all of {', '.join(_LAUNCHED)}"
        hint = "torchrun --nproc-per-node 2 -m nsa_cli train ..., or unset WORLD_SIZE to run one process"
        raise _by_the_first(message, hint, ExitCode.UNAVAILABLE)
    own = _own_device(device, int(os.environ["LOCAL_RANK"]), processes)
    backend = "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        sharers = None
        if context > 1:
            group, _ = dist.new_subgroups(context, timeout=TIMEOUT)
            sharers = ContextParallel(group, rank % context, context)
        team = Team(rank, size, own, parallel, sharers)
        yield team
        team.wait()
    except Exception as error:
        told = _told_once(error, store, rank)
        _leave(own)
        raise told from error
    dist.destroy_process_group()


def _by_the_first(message: str, hint: str, code: ExitCode) -> NsaError:
    """The error that every process finds by itself, as the first tells it and the others keep it."""
    return (NsaError if tells_errors() else ToldElsewhere)(message, hint, code)


def _are(processes: int) -> str:
    return "is one" if processes == 1 else f"are {processes}"


def _own_device(name: str, local: int, world: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda:"):
        message = f"--device {name} is one GPU, and this is one of {world} processes"
        raise _by_the_first(message, "use --device cuda: each process takes its own", ExitCode.USAGE)
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if local >= count:
        message = f"--device {name}: process {local} of this machine finds {count} CUDA GPU{'' if count == 1 else 's'}"
        fewer = f"torchrun --nproc-per-node {count}, or " if count else ""
        kind = NsaError if local == count else ToldElsewhere
        raise kind(message, f"{fewer}--device cpu", ExitCode.UNAVAILABLE)
    return torch.device("cuda", local)


def _leave(own: torch.device) -> None:
    """After an error. NCCL, told to end in good order, would wait for processes that wait for this one."""
    if own.type == "cuda":
        with suppress(RuntimeError, AttributeError):
            dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _told_once(error: Exception, store: Any, rank: int) -> Exception:
    """The error to raise here: this one, if no other process had one before."""
    if _lost_somebody(error):
        hint = "a process that was killed says nothing: look for a lack of memory; --resume goes on from the last state"
        error = NsaError("another process of this run has died", hint, ExitCode.FAILURE)
    code = ExitCode.USAGE if isinstance(error, ValueError) else ExitCode.FAILURE
    if isinstance(error, BrokenPipeError):
        code = ExitCode.CLOSED_PIPE
    told = {"rank": rank, "message": str(error), "code": error.exit_code if isinstance(error, NsaError) else int(code)}
    try:
        claimed = json.loads(store.compare_set(_ERROR_KEY, "", json.dumps(told)))
    except RuntimeError:  # the store went away with the process that kept it
        return error
    if claimed["rank"] == rank:
        return error
    return ToldElsewhere(f"process {claimed['rank']} failed: {claimed['message']}", "", claimed["code"])


def _lost_somebody(error: Exception) -> bool:
    """Whether a collective call failed because another process is gone: gloo raises RuntimeError with its own file name."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "NCCL", "Connection closed by peer"))
