"""Runs of several processes, for tests: `launch` starts this file, which imports once, forks, and plays one scenario.

Forks stand for torchrun's processes: they have its environment, and cost no import each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.command_line import ROOT, environment

if TYPE_CHECKING:
    from nsa_cli.model.parallel import ContextParallel
    from nsa_cli.training.distributed import Team

CONSTANT = {"schedule": "constant", "eval_every": 2, "save_every": 0}
UNEVEN = {**CONSTANT, "steps": 4, "batch_tokens": 5 * 32, "micro_batch_tokens": 2 * 32, "eval_tokens": 5 * 32}
"""Five windows a step and a validation: no number of processes but one shares them out evenly."""

FOUR = ("ddp", "context fsdp")
"""Of the ways to train, those that four processes try."""


TOGETHER = {**UNEVEN, "keep": 1, "save_every": 2}


def launch(world: int, scenario: str, folder: Path) -> list[int]:
    """Exit codes of the processes; what they say goes to this test's own output."""
    command = [sys.executable, "-m", "tests.processes", str(world), scenario, str(folder)]
    done = run_to_the_end(command, cwd=ROOT)
    print(done.stderr.decode())
    assert done.returncode == 0, "the scenario itself failed"
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes


def run_to_the_end(command: list[str], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """A command that starts others; all of them are ended where they take too long."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=cwd, env=environment(), start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on
        time.sleep(5)
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def said(folder: Path, rank: int) -> dict[str, Any]:
    """What a process left for the test."""
    found: dict[str, Any] = json.loads((folder / f"said.{rank}.json").read_text())
    return found


def _free_port(turn: int) -> int:
    """A port that nobody listens on, below those that the system hands out: no other test's connection takes it meanwhile."""
    for step in range(1000):
        port = 10_000 + (2 * (os.getpid() + 7919 * step) + turn) % 20_000
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def main(world: int, name: str, folder: Path) -> None:
    """Fork the processes and wait for them."""
    ports = _free_port(0), _free_port(1)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_play, args=(name, folder, rank, world, ports)) for rank in range(world)]
    for process in processes:
        process.start()
    if name == "stopped":
        _stop(processes, folder)
    for process in processes:
        process.join()
    print(json.dumps([process.exitcode for process in processes]))


def _play(name: str, folder: Path, rank: int, world: int, ports: tuple[int, int]) -> None:
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": ports[0], "SECOND_PORT": ports[1]}
    os.environ.update({key: str(value) for key, value in sizes.items()}, MASTER_ADDR="127.0.0.1")
    sys.stdout = sys.stderr
    told = SCENARIOS[name](folder, rank)
    if isinstance(told, dict):
        (folder / f"said.{rank}.json").write_text(json.dumps(told))
    sys.exit(told if isinstance(told, int) else 0)


def _stop(processes: list[Any], folder: Path) -> None:
    """SIGTERM to the second process, once the run has logged three steps."""
    metrics = folder / "ckpt.metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)


def _runs(folder: Path, rank: int) -> dict[str, Any]:
    """Runs that the test makes again in one process, and some that it cannot."""
    import torch
    import torch.distributed as dist

    from nsa_cli.model.parallel import ContextParallel
    from nsa_cli.training.distributed import open_team
    from tests.training_runs import run, text_corpus

    seen = []

    def look(model: torch.nn.Module, step: int, should_stop: Callable[[], bool]) -> None:
        seen.append(list(model(torch.zeros(1, 5, dtype=torch.int64)).shape))

    with open_team("cpu", context=2) as pairs:
        corpus, team = text_corpus(folder / str(rank)), replace(pairs, context=None)
        ways = {"ddp": team, "fsdp": replace(team, parallel="fsdp")}
        shared = {"context ddp": pairs, "context fsdp": replace(pairs, parallel="fsdp")}
        few = {name: way for name, way in (ways | shared).items() if team.world == 2 or name in FOUR}
        for sparse in (False, True) if team.world == 2 else (True,):
            for name, way in few.items():
                config = {**UNEVEN, "recompute": name == "context fsdp"}
                run(folder, corpus, f"{name} {sparse}", sparse=sparse, config=config, team=way, sampler_hook=look)
        assert dist.group.WORLD is not None
        told: dict[str, Any] = {"differences": _differences(ContextParallel(dist.group.WORLD, rank, team.world))}
        told["seen"] = seen
        if team.world > 2:
            return told
        for name, way in ways.items():
            begun = f"{name} after one"
            run(folder, corpus, begun, config=UNEVEN, resume=folder / f"{begun}.safetensors", team=way)
            run(folder, corpus, f"one after {name}", config={**UNEVEN, "steps": 2}, team=way)
            run(
                folder, corpus, f"bfloat16 {name}", sparse=True, dtype=torch.bfloat16, config=UNEVEN, team=way, sampler_hook=look
            )
        for name, steps in (("whole", 4), ("parts", 2)):
            run(folder, corpus, name, model={"dropout": 0.1}, config={**UNEVEN, "steps": steps}, team=team)
        resume = folder / "parts.safetensors"
        run(folder, corpus, "parts", model={"dropout": 0.1}, config=UNEVEN, resume=resume, team=team)
        told["left"] = _left_alone(folder, team)
        return told | {"skipped": [_bad_number(folder, name, way) for name, way in ways.items()]}


def _differences(parallel: ContextParallel) -> dict[str, float]:
    """One sequence over all processes against each process's own pass over the whole: the largest differences."""
    import torch
    import torch.distributed as dist

    from tests.models import DENSE, SPARSE, random_ids, random_model, with_nsa

    def mean(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x / parallel.size

    told: dict[str, float] = {}
    shared_kv = with_nsa(branch_kv="shared", compress_rope="block")
    for name, config in {"dense": DENSE, "sparse": SPARSE, "shared": shared_kv}.items():
        for tokens in (96, 2 * parallel.size):  # some queries each, and one query a piece
            torch.manual_seed(tokens)
            model = random_model(replace(config, depth=1), dtype=torch.float32, std=0.2)
            ids, targets = random_ids(2, tokens), random_ids(2, tokens)
            whole = model(ids, targets)
            whole.backward()
            wanted = {key: parameter.grad for key, parameter in model.named_parameters()}
            logits = model(ids).detach()
            model.zero_grad()
            model.context_parallel = parallel
            part = model(ids, targets)
            part.backward()
            far = [float((model(ids) - parallel.split(logits)).abs().max())]
            far.append(abs(float(mean(part.detach()) - whole)))
            for key, parameter in model.named_parameters():
                assert parameter.grad is not None
                want = wanted[key]
                assert want is not None
                far.append(float((mean(parameter.grad) - want).norm() / want.norm().clamp(min=1e-6)))
            told[f"{name} {tokens}"] = max(far)
    return told


def _bad_number(folder: Path, name: str, team: Team) -> int:
    """Skipped updates of a run in which the second process alone meets a NaN, at its third micro-batch."""
    import math

    import pytest

    from tests.training_runs import hook_losses, run, text_corpus

    with pytest.MonkeyPatch.context() as patch:
        if team.rank == 1:
            hook_losses(patch, lambda call, training, loss: loss * math.nan if training and call == 3 else None)
        corpus, config = text_corpus(folder / str(team.rank)), {"steps": 5, "eval_every": 0}
        return run(folder, corpus, f"bad number {name}", config=config, team=team).skipped


def _left_alone(folder: Path, team: Team) -> tuple[int | None, int]:
    """Signal and step of a run whose reader goes away at its second step."""
    from tests.training_runs import Told, run, text_corpus

    def leave(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise BrokenPipeError

    corpus, config = text_corpus(folder / str(team.rank)), {"steps": 100, "eval_every": 0, "save_every": 0}
    result = run(folder, corpus, "left alone", config=config, reporter=Told(leave), team=team)
    return result.signal, result.step


def _errors(folder: Path, rank: int) -> dict[str, Any]:
    """Each process has text of its own; then the second one fails in the middle of a run."""
    import pytest

    from nsa_cli.errors import NsaError
    from nsa_cli.training.distributed import open_team
    from tests.training_runs import hook_losses, run, text_corpus

    def fail(call: int, training: bool, loss: Any) -> None:
        if call == 4:
            raise NsaError("no room on the second machine", "make some", 1)

    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, text in (("other data", f"process {rank} reads this. "), ("failure", "a fox and a dog. ")):
            try:
                with open_team("cpu") as team:
                    run(folder, text_corpus(folder / str(rank), text), name, team=team)
            except NsaError as error:
                told[name] = {"kind": type(error).__name__, "message": error.message, "code": error.exit_code}
            os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
            if rank == 1:
                hook_losses(patch, fail)
    return told


def _together(folder: Path, rank: int) -> dict[str, Any]:
    """Packed documents, a start from a dense model that is the teacher too, numbered copies: on two processes."""
    from nsa_cli.training.distributed import open_team
    from tests.training_runs import documents_corpus, run

    with open_team("cpu") as team:
        corpus = documents_corpus(folder / str(rank))
        start = {"init_from": folder / "dense.safetensors", "distill_from": folder / "dense.safetensors"}
        for name, way in {"ddp": team, "fsdp": replace(team, parallel="fsdp")}.items():
            run(folder, corpus, name, sparse=True, config=TOGETHER, team=way, **start)
    return {}


def _stopped(folder: Path, rank: int) -> int:
    """The command line, until a signal comes."""
    from nsa_cli.cli.app import run

    sizes = "--dim 16 --depth 1 --heads 2 --seq-len 32 --batch-tokens 128 --device cpu --log-every 1 --eval-every 0"
    out = ["--out", str(folder / "ckpt.safetensors")]
    return run(["train", str(folder / "text.txt"), *out, *sizes.split(), "--steps", "1000000", "--schedule", "constant"])


SCENARIOS: dict[str, Callable[[Path, int], dict[str, Any] | int]] = {
    "runs": _runs,
    "errors": _errors,
    "together": _together,
    "stopped": _stopped,
}

if __name__ == "__main__":
    import nsa_cli.training  # noqa: F401  (before the fork)

    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
