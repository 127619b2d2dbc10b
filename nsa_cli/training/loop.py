"""The training loop: forward, backward, update; log, validate, save; stop on a signal and go on from a state.

It prints nothing and knows no command line: a Reporter is told what happens. On a GPU the host runs ahead of the device
and waits for it only where it reads a number: at logged steps, validations and saves.

Order within a step: update, metrics line (with the validation's loss, when one is due), save. A state is thus saved
only when every line up to its step is in the metrics file, and a resumed run needs no line from before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.model import Transformer, build_model
from nsa_cli.ops.dispatch import resolve_kernel
from nsa_cli.training.batches import BatchPlan, plan_batches, training_batches, validation_batches
from nsa_cli.training.device import deterministic_on_cpu, explained_errors
from nsa_cli.training.distributed import Team
from nsa_cli.training.graphs import CapturedGradients, refuse_cuda_graph
from nsa_cli.training.metrics import Clock, MetricsLog, bits_per_byte, finite, header_record, machine_record
from nsa_cli.training.optim import FiniteGuard, clipped_update, make_optimizer
from nsa_cli.training.resume import check_continues, read_run
from nsa_cli.training.run import Reporter, RunPaths, SilentReporter, TrainResult
from nsa_cli.training.saving import Progress, RunFiles
from nsa_cli.training.schedule import learning_rate, warmup_steps
from nsa_cli.training.signals import Interruption, catch_signals
from nsa_cli.training.validation import evaluating, validation_loss

SamplerHook = Callable[[Transformer, int], None]


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    *,
    paths: RunPaths,
    device: str | torch.device = "cpu",
    kernel: str = "auto",
    dtype: torch.dtype | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    notices: Sequence[str] = (),
    sampler_hook: SamplerHook | None = None,
    team: Team | None = None,
) -> TrainResult:
    """Trains a model from its seed, or from a saved state, and writes `paths`.

    dtype: of the arithmetic; None is bfloat16 autocast on CUDA and float32 elsewhere. Weights and moments are float32,
    or float64 for torch.float64. On a CPU the same call gives the same bits.
    resume: last weights or state file of a run to go on with (nsa_cli.training.resume says with which settings). Its
    metrics lines up to its step are kept or, for other paths, copied. A finished run is left as it is (for other
    paths: copied).
    notices: lines for the metrics header, already shown to the user; a kernel's fallback is added to them and reported.
    sampler_hook(model, step): called after each validation, in eval mode without gradients; its random numbers do not
    disturb the run's.
    team: the processes that share the work, from `open_team`; every one calls this with the same arguments but `device`.
    The first alone writes files, has its reporter told, and takes part in nothing else that the others do not. The same
    tokens give the same losses, within the order of additions, on any number of them.

    A BrokenPipeError of the reporter is raised again once state and weights of the step reached are saved.

    Raises NsaError. Exit 1: out of memory, files not writable. 2: paths exist without `overwrite`, sizes that do not
    fit. 3: a state that cannot be read or continued. 4: diverged. 5: kernel not available. ValueError: a dtype that
    cannot train, a vocabulary that is not the tokenizer's.
    """
    device = torch.device(device)
    team = team or Team()
    reporter = team.reporter(reporter or SilentReporter())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype = {dtype}: must be bfloat16, float32 or float64 (float16 would need loss scaling)")
    if model_config.vocab_size != corpus.tokenizer.vocab_size:
        size = corpus.tokenizer.vocab_size
        raise ValueError(f"vocab_size = {model_config.vocab_size}: must be the tokenizer's {size}")
    plan = plan_batches(model_config, config)
    team.require_context(model_config.context)
    saved = None if resume is None else read_run(resume)
    moves = saved is None or saved.moves_to(paths)
    if moves and not overwrite:
        paths.refuse_existing()
    if saved is not None:
        check_continues(saved, model_config, config, corpus)
    settings = {"model": model_config.to_dict(), "train": config.to_dict()}
    team.require_same({"data": corpus.fingerprint, **settings, "step": 0 if saved is None else saved.step})
    sparse = model_config.nsa is not None  # dense attention is SDPA whatever the kernel
    name, fallback = resolve_kernel(kernel, device, allow_fallback=True) if sparse else ("torch", None)
    if fallback is not None:
        notices = [*notices, fallback]
        reporter.notice(fallback)
    if saved is None and (warmup := warmup_steps(config)) < config.warmup:
        reporter.notice(f"warm-up shortened from {config.warmup} to {warmup} steps, half of --steps {config.steps}")
    with deterministic_on_cpu(device):
        torch.manual_seed(config.seed)
        weights = torch.float64 if dtype is torch.float64 else torch.float32
        model = build_model(
            model_config, device=device, dtype=weights, kernel="auto" if kernel == "auto" else name,
            weights_device=team.weights_device(device),
        )  # fmt: skip
        model.context_parallel, model.recompute = team.context, config.recompute
        if config.cuda_graph:
            refuse_cuda_graph(device, model.kernel if sparse else "dense", processes=team.world, recompute=config.recompute)
        machine = machine_record(model, config, device=device, dtype=dtype, notices=notices, processes=team.record())
        header = header_record(model, corpus, machine)
        optimizer, guard = make_optimizer(model, config), FiniteGuard(device)
        files = RunFiles(paths, model, optimizer, guard, config, corpus, device, team.first)
        log = team.log(MetricsLog(paths.metrics))
        progress, elapsed_s = Progress(), 0.0
        if saved is not None:
            progress, elapsed_s = files.restore(saved), float(saved.meta["elapsed_s"])
            for path in files.restore_files(saved, progress) if team.first else []:
                reporter.notice(f"restored {path}")
            progress = Progress(**team.from_first(vars(progress)))
        if team.sharded:
            from nsa_cli.training.sharding import gather, shard

            optimizer = shard(model, optimizer, config, device=device, world=team.world, dtype=dtype)
            files = replace(files, optimizer=optimizer, gather=gather)
        run = _Run(files, progress, plan, dtype, Clock(elapsed_s), log, reporter, sampler_hook, team)
        if not moves and progress.step >= config.steps and progress.pending is None:
            reporter.notice(f"{paths.last} has done all of its {config.steps} steps: nothing to do")
            return run.result("finished", None)
        info = header
        if saved is None:
            # Killed after this the new run can be resumed; killed before it, an earlier one is still whole.
            files.save_state(progress, elapsed_s=0.0)
            log.start(header)
        else:
            record = {"event": "resume", "from_step": progress.step, **machine}
            log.resume(saved.paths.metrics, progress.step, header, record)
            info = {**header, **record}
        try:
            with catch_signals() as heard, run.saved_when_nobody_reads():
                run.reporter = team.listened(reporter, heard)
                run.reporter.start(info)
                result = run.to_the_end(team.interruption(heard))
                team.wait()
                return result
        finally:
            log.close()


class _Run:
    """One run in progress: what `train` has set up, and the step they all take part in."""

    def __init__(
        self,
        files: RunFiles,
        progress: Progress,
        plan: BatchPlan,
        dtype: torch.dtype,
        clock: Clock,
        log: MetricsLog,
        reporter: Reporter,
        sampler_hook: SamplerHook | None,
        team: Team,
    ) -> None:
        self.files, self.progress, self.plan = files, progress, plan
        self.clock, self.log, self.reporter, self.sampler_hook = clock, log, reporter, sampler_hook
        self.model, self.config, self.corpus, self.device = files.model, files.config, files.corpus, files.device
        self.context = self.model.config.context
        self.team, self.wrapped = team, team.wrap(self.model)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self.wrapped
        if self.config.compile:
            self.forward = torch.compile(self.wrapped)
        self.dtype = dtype
        self.captured: CapturedGradients | None = None
        if self.config.cuda_graph:
            self.captured = CapturedGradients(self.forward, self.model.parameters(), self.autocast)
        self.line: dict[str, Any] = {}
        self.saved_step: int | None = None

    @contextmanager
    def saved_when_nobody_reads(self) -> Iterator[None]:
        """Saves the step reached when the Reporter finds its reader gone (BrokenPipeError), which then goes on up."""
        try:
            yield
        except BrokenPipeError:
            if self.saved_step != self.progress.step:
                self.save()
            raise

    def to_the_end(self, interruption: Interruption) -> TrainResult:
        """Steps until the last one, or until a signal came; the state is saved either way."""
        progress, steps = self.progress, self.config.steps
        self.model.train()
        with explained_errors(self.plan.micro, self.context):
            if progress.pending is not None:
                self.finish_step(progress.pending, interruption)
            while progress.step < steps and not interruption:
                self.step(interruption)
                interruption.poll()
                self.reporter.progress(progress.step, steps, self.line)
        done = progress.step >= steps and progress.pending is None
        if not done:
            self.reporter.notice(f"{interruption.name}: saving at step {progress.step}; a second signal leaves at once")
        if self.saved_step != progress.step:
            self.save()
        result = self.result("finished" if done else "interrupted", None if done else interruption.signum)
        self.reporter.finish(finite({"event": "finish", **vars(result), "checkpoint": str(result.checkpoint)}))
        return result

    def step(self, interruption: Interruption) -> None:
        """One update and what is due after it."""
        step = self.progress.step + 1
        loss, norm, lr = self.update(step)
        self.progress.step = step
        self.clock.count(self.plan.windows * self.context)
        if self.device.type == "cpu":
            self.files.guard.check()  # costs nothing where nothing runs ahead
        validate = self.due(step, self.config.eval_every) and len(self.corpus.val) > 0
        log = validate or step in (1, self.config.steps) or step % self.config.log_every == 0
        line = finite(self.measured(step, loss, norm, lr)) if log else None
        if validate:
            self.progress.pending = line
        self.finish_step(line, interruption)

    def due(self, step: int, every: int) -> bool:
        """At multiples of `every` and at the last step; never for 0."""
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def update(self, step: int) -> tuple[Tensor, Tensor, float]:
        """Gradients of the whole batch and one update: mean loss, gradient norm (on the device) and learning rate."""
        seed, train = self.config.seed, self.corpus.train
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        batches = training_batches(
            train, self.plan, seed=seed, step=step, context=self.context, device=self.device, **self.share
        )
        team, count = self.team, len(self.plan.parts(**self.share))
        team.seed(seed, step)
        if self.captured is not None:
            self.captured.begin()
        for number, (inputs, targets, share) in enumerate(batches, start=1):
            if self.captured is not None:
                total += self.captured(inputs, targets, share)
                continue
            with team.synchronised(self.wrapped, last=number == count):
                with self.autocast():
                    loss = self.forward(inputs, targets) * (share * team.replicas)
                loss.backward()
            total += loss.detach()
        total = team.mean(total)
        lr = learning_rate(step, self.config)
        grad_clip = self.config.grad_clip
        norm = clipped_update(self.files.optimizer, self.files.guard, step=step, loss=total, lr=lr, grad_clip=grad_clip)
        return total, norm, lr

    @property
    def share(self) -> dict[str, int]:
        """Which of how many shares of a batch this process sees."""
        return {"replica": self.team.replica, "replicas": self.team.replicas}

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 arithmetic over float32 weights when asked for; float32 and float64 need none."""
        if self.dtype is not torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def measured(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> dict[str, Any]:
        """The metrics line of a step without a validation; the host waits for the device here."""
        skipped = self.files.guard.check()
        nats = float(loss.item())
        line: dict[str, Any] = {
            "step": step,
            "loss": nats,
            "bits_per_byte": bits_per_byte(nats, len(self.corpus.train), self.corpus.train_bytes),
            "lr": lr,
            "grad_norm": float(norm.item()),
            "skipped": skipped,
            "tokens_per_s": round(self.clock.tokens_per_s(), 1),
            "elapsed_s": round(self.clock.elapsed_s, 3),
        }
        if self.model.config.nsa is not None:
            line["gates"] = self.model.gate_means()
        return line

    def finish_step(self, line: dict[str, Any] | None, interruption: Interruption) -> None:
        """Validation if the step's line waits for one, the line, a save if one is due.

        An interrupted validation leaves all three to the resumed run.
        """
        progress = self.progress
        if line is not None and progress.pending is not None:
            with self.clock.paused():
                measured = self.validate(interruption)
            if measured is None:
                return
            progress.pending = None
            line = {**line, **finite(measured)}
        if line is not None:
            self.line = line
            self.log.write(line)
            self.reporter.metrics(line)
        if progress.best_step == progress.step or self.due(progress.step, self.config.save_every):
            self.save()

    def validate(self, interruption: Interruption) -> dict[str, Any] | None:
        """val_loss and val_bits_per_byte of the weights as they are; None if interrupted. Remembers the best."""
        progress, corpus = self.progress, self.corpus
        batches = validation_batches(
            corpus.val, self.plan, context=self.context, max_tokens=self.config.eval_tokens, device=self.device,
            **self.share,
        )  # fmt: skip
        with evaluating(self.model):
            loss = validation_loss(
                self.forward, batches, autocast=self.autocast, interruption=interruption, mean=self.team.mean
            )
            if loss is None:
                return None
            if self.sampler_hook is not None:
                with self.team.sequences_whole(self.model):
                    self.sampler_hook(self.model, progress.step)
        progress.val_loss = loss if math.isfinite(loss) else None
        if progress.val_loss is not None and (progress.best_val_loss is None or loss < progress.best_val_loss):
            progress.best_val_loss, progress.best_step = loss, progress.step
        return {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, len(corpus.val), corpus.val_bytes)}

    def save(self) -> None:
        """All files of this step; a diverged run is not saved over a good one."""
        self.files.guard.check()
        with self.clock.paused():
            self.files.save(self.progress, elapsed_s=self.clock.elapsed_s)
        self.saved_step = self.progress.step

    def result(self, status: Any, signum: int | None) -> TrainResult:
        """The run's end as its caller sees it."""
        progress = self.progress
        return TrainResult(
            step=progress.step,
            status=status,
            signal=signum,
            val_loss=progress.val_loss,
            best_val_loss=progress.best_val_loss,
            best_step=progress.best_step,
            skipped=self.files.guard.check(),
            elapsed_s=round(self.clock.elapsed_s, 3),
            checkpoint=self.files.paths.last,
        )
