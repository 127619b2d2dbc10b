"""The training loop: forward, backward, update; log, validate, save; stop on a signal and go on from a state.

It prints nothing and knows no command line: a Reporter is told what happens. On a GPU the host runs ahead of the device
and waits for it only where it reads a number: at logged steps, validations and saves.

Order within a step: update, metrics line (with the validation's loss, when one is due), save. A state is thus saved
only when every line up to its step is in the metrics file, and a resumed run needs no line from before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, TrainConfig
from nsa_cli.data import Corpus
from nsa_cli.model import Transformer
from nsa_cli.model.peaks import peak_flops
from nsa_cli.training.batches import Batch, training_batches, validation_batches
from nsa_cli.training.device import arithmetic, deterministic_on_cpu, explained_errors, random_states, set_random_states
from nsa_cli.training.distill import DistillingLoss
from nsa_cli.training.distributed import Team
from nsa_cli.training.divergence import name_batch
from nsa_cli.training.graphs import CapturedGradients
from nsa_cli.training.health import selection_health
from nsa_cli.training.metrics import Clock, MetricsLog, bits_per_byte, finite, model_flops_utilisation
from nsa_cli.training.optim import Diverged, clipped_update
from nsa_cli.training.prepare import Prepared, prepare
from nsa_cli.training.run import Reporter, RunPaths, SilentReporter, TrainResult
from nsa_cli.training.schedule import learning_rate
from nsa_cli.training.signals import Interruption, catch_signals
from nsa_cli.training.validation import evaluating, validation_loss

SamplerHook = Callable[[Transformer, int, Callable[[], bool]], str | None]


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
    init_from: Path | None = None,
    distill_from: Path | None = None,
    overwrite: bool = False,
    force_data: bool = False,
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
    init_from: a checkpoint whose weights a new run begins with (nsa_cli.training.convert); not with `resume`.
    distill_from: a checkpoint to learn from besides the text (nsa_cli.training.distill); a resumed run remembers its own.
    force_data: go on from `resume` with other data; its validation losses then count from nothing.
    notices: lines for the metrics header, already shown to the user; a kernel's fallback is added to them and reported.
    sampler_hook(model, step, should_stop): called every sample_every steps (0: after each validation), in eval mode without
    gradients; its random numbers do not disturb the run's. Text that it returns goes into the step's line as "sample".
    should_stop says that a signal came; what it returns then is left to the resumed run.
    team: the processes that share the work, from `open_team`; every one calls this with the same arguments but `device`.
    The first alone writes files, has its reporter told, and takes part in nothing else that the others do not. The same
    tokens give the same losses, within the order of additions, on any number of them.

    A BrokenPipeError of the reporter is raised again once state and weights of the step reached are saved.

    Raises NsaError. Exit 1: out of memory, files not writable. 2: paths exist without `overwrite`, sizes that do not
    fit. 3: a state that cannot be read or continued. 4: diverged. 5: kernel not available. ValueError: a dtype that
    cannot train, a vocabulary that is not the tokenizer's.
    """
    device, team = torch.device(device), team or Team()
    reporter = team.reporter(reporter or SilentReporter())
    with deterministic_on_cpu(device):
        ready = prepare(
            model_config, config, corpus, paths=paths, device=device, kernel=kernel, dtype=dtype, resume=resume,
            init_from=init_from, distill_from=distill_from, overwrite=overwrite, force_data=force_data, reporter=reporter,
            notices=notices, team=team,
        )  # fmt: skip
        files, progress, saved, header = ready.files, ready.progress, ready.saved, ready.header
        log = team.log(MetricsLog(paths.metrics))
        run = _Run(ready, log, reporter, sampler_hook)
        if not ready.moves and run.done:
            why = f"has done all of its {config.steps} steps"
            if run.status == "patience":
                why = f"was ended by --patience {config.patience} at step {progress.step}"
            reporter.notice(f"{paths.last} {why}: nothing to do")
            return run.result(run.status, None)
        info = header
        if team.first:
            files.remove_leftovers()
        if saved is None:
            # Killed after this the new run can be resumed; killed before it, an earlier one is still whole.
            files.save_state(progress, elapsed_s=0.0)
            log.start(header)
        else:
            record = {"event": "resume", "from_step": progress.step, "data": header["data"], **ready.machine}
            log.resume(saved.paths.metrics, progress.step, header, record)
            info = {**header, **record}
        if progress.step == 0 and team.first:
            files.take_over()
        try:
            with catch_signals() as heard, run.diverging_batch_named(), run.saved_when_nobody_reads():
                run.reporter = team.listened(reporter, heard)
                run.reporter.start(info)
                result = run.to_the_end(team.interruption(heard))
                team.wait()
                return result
        finally:
            log.close()


class _Run:
    """One run in progress: what `prepare` has set up, and the step they all take part in."""

    def __init__(
        self, ready: Prepared, log: MetricsLog, reporter: Reporter, sampler_hook: SamplerHook | None = None
    ) -> None:
        files, team, teacher = ready.files, ready.team, ready.teacher
        self.files, self.progress, self.plan, self.dtype = files, ready.progress, ready.plan, ready.dtype
        self.clock, self.log = Clock(0.0 if ready.saved is None else float(ready.saved.meta["elapsed_s"])), log
        self.reporter, self.sampler_hook = reporter, sampler_hook
        self.model, self.config, self.corpus, self.device = files.model, files.config, files.corpus, files.device
        self.context = self.model.config.context
        self.team, self.wrapped = team, team.wrap(self.model)
        self.forward: Callable[..., Tensor] = self.wrapped
        if self.config.compile:
            self.forward = torch.compile(self.wrapped)
        self.objective = self.forward
        if teacher is not None:
            self.objective = DistillingLoss(self.forward, teacher, self.config.distill_weight)
        self.parts = () if teacher is None else (2,)
        peak = peak_flops(self.device, self.dtype)
        self.peak = None if peak is None else peak * team.world  # devices of one kind
        self.captured: CapturedGradients | None = None
        if self.config.cuda_graph:
            self.captured = CapturedGradients(self.objective, self.model.parameters(), self.autocast)
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

    @contextmanager
    def diverging_batch_named(self) -> Iterator[None]:
        """Adds the data that the first bad step saw to the error of a diverged run, and to the metrics."""
        try:
            yield
        except Diverged as error:
            seed, tokens = self.config.seed, self.corpus.training
            with self.team.synchronised(self.wrapped, last=False):
                named, record = name_batch(error, self.model, tokens, self.plan, seed=seed, autocast=self.autocast)
            self.log.write(record)
            raise named from error

    @property
    def over(self) -> bool:
        """Whether no step is left: all are done, or the last validations were no better."""
        patience = self.config.patience
        return self.progress.step >= self.config.steps or 0 < patience <= self.progress.stale

    @property
    def done(self) -> bool:
        """Whether nothing at all is left, the last step's validation included."""
        return self.over and self.progress.pending is None

    @property
    def status(self) -> Literal["finished", "patience", "interrupted"]:
        """How the run stands, for its result."""
        if not self.done:
            return "interrupted"
        return "finished" if self.progress.step >= self.config.steps else "patience"

    def to_the_end(self, interruption: Interruption) -> TrainResult:
        """Steps until the last one, or until a signal came; the state is saved either way."""
        progress, steps = self.progress, self.config.steps
        self.model.train()
        with explained_errors(self.plan.micro, self.context):
            if progress.pending is not None:
                self.finish_step(progress.pending, interruption)
            while not self.over and not interruption:
                self.step(interruption)
                interruption.poll()
                self.reporter.progress(progress.step, steps, self.line)
        if not self.done:
            self.reporter.notice(f"{interruption.name}: saving at step {progress.step}; a second signal leaves at once")
        if self.saved_step != progress.step:
            self.save()
        result = self.result(self.status, None if self.done else interruption.signum)
        self.reporter.finish(finite({"event": "finish", **vars(result), "checkpoint": str(result.checkpoint)}))
        return result

    def step(self, interruption: Interruption) -> None:
        """One update and what is due after it."""
        step = self.progress.step + 1
        made = self.update(step, interruption)
        if made is None:
            return
        loss, norm, lr = made
        self.progress.step = step
        self.clock.count(self.plan.windows * self.context)
        if self.device.type == "cpu":
            self.files.guard.check()  # costs nothing where nothing runs ahead
        look = self.validates(step) or self.samples(step)
        log = look or step in (1, self.config.steps) or step % self.config.log_every == 0
        line = finite(self.measured(step, loss, norm, lr)) if log else None
        if look:
            self.progress.pending = line
        self.finish_step(line, interruption)

    def due(self, step: int, every: int) -> bool:
        """At multiples of `every` and at the last step; never for 0."""
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def validates(self, step: int) -> bool:
        """Whether the step ends with a validation."""
        return self.due(step, self.config.eval_every) and self.corpus.val_tokens != 0

    def samples(self, step: int) -> bool:
        """Whether the step ends with a sample."""
        every = self.config.sample_every
        return self.sampler_hook is not None and (self.due(step, every) if every else self.validates(step))

    def update(self, step: int, interruption: Interruption) -> tuple[Tensor, Tensor, float] | None:
        """Gradients of the whole batch and one update: mean loss (or its parts), gradient norm (on the device) and
        learning rate.

        None if a signal came between two micro-batches: all is then as it was before the step.
        """
        before = random_states(self.device)
        seed, train = self.config.seed, self.corpus.training
        total = torch.zeros(self.parts, dtype=torch.float32, device=self.device)
        batches = training_batches(
            train, self.plan, seed=seed, step=step, context=self.context, device=self.device, **self.share
        )
        team, count = self.team, len(self.plan.parts(**self.share))
        team.seed(seed, step)
        if self.captured is not None:
            self.captured.begin()
        for number, (inputs, targets, share, cu_seqlens, *_) in enumerate(batches, start=1):
            if interruption:
                self.files.optimizer.zero_grad(set_to_none=True)
                set_random_states(self.device, before)
                return None
            if self.captured is not None:
                total += self.captured(inputs, targets, share)
                continue
            with team.synchronised(self.wrapped, last=number == count):
                with self.autocast():
                    loss = self.objective(inputs, targets, cu_seqlens) * (share * team.replicas)
                loss.sum().backward()
            total += loss.detach()
        total = team.mean(total)
        lr = learning_rate(step, self.config)
        grad_clip = self.config.grad_clip
        norm = clipped_update(self.files.optimizer, self.files.guard, step=step, loss=total.sum(), lr=lr, grad_clip=grad_clip)
        return total, norm, lr

    @property
    def share(self) -> dict[str, int]:
        """Which of how many shares of a batch this process sees."""
        return {"replica": self.team.replica, "replicas": self.team.replicas}

    def autocast(self) -> AbstractContextManager[Any]:
        """That of the run's dtype on its device."""
        return arithmetic(self.device, self.dtype)

    def measured(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> dict[str, Any]:
        """The metrics line of a step without a validation; the host waits for the device here."""
        skipped = self.files.guard.check()
        nats, *distilled = loss.reshape(-1).tolist()
        line: dict[str, Any] = {
            "step": step,
            "loss": nats,
            "bits_per_byte": bits_per_byte(nats, len(self.corpus.train), self.corpus.train_bytes),
            "lr": lr,
            "grad_norm": float(norm.item()),
            "skipped": skipped,
            **self.speed(self.clock.tokens_per_s()),
            "elapsed_s": round(self.clock.elapsed_s, 3),
        }
        if distilled:
            line["distill_kl"] = distilled[0] / self.config.distill_weight
        if self.model.config.nsa is not None:
            line["gates"] = self.model.gate_means()
        return line

    def speed(self, tokens_per_s: float) -> dict[str, float | None]:
        """tokens_per_s and mfu as a metrics line has them."""
        mfu = model_flops_utilisation(self.model.config, tokens_per_s, self.peak)
        return {"tokens_per_s": round(tokens_per_s, 1), "mfu": None if mfu is None else round(mfu, 4)}

    def finish_step(self, line: dict[str, Any] | None, interruption: Interruption) -> None:
        """Validation and sample if the step's line waits for them, the line, a save if one is due.

        Interrupted, it leaves all of them to the resumed run.
        """
        progress = self.progress
        if line is not None and progress.pending is not None:
            with self.clock.paused():
                seen = self.look(interruption)
            if seen is None:
                return
            progress.pending = None
            line = {**line, **finite(seen)}
            if self.status == "patience":
                line["status"] = "patience"
        if line is not None:
            self.line = line
            self.log.write(line)
            self.reporter.metrics(line)
        if progress.best_step == progress.step or self.due(progress.step, self.config.save_every):
            self.save()

    def look(self, interruption: Interruption) -> dict[str, Any] | None:
        """val_loss, val_bits_per_byte and (sparse) selection of the weights as they are, and a sample; None if interrupted."""
        progress, corpus = self.progress, self.corpus
        seen: dict[str, Any] = {}
        loss: float | None = None
        with evaluating(self.model):
            if self.validates(progress.step):
                found = validation_loss(
                    self.forward, self.validation_batches(), autocast=self.autocast, interruption=interruption,
                    weights=corpus.weights, mean=self.team.mean,
                )  # fmt: skip
                if found is None:
                    return None
                loss = found.loss
                seen |= {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, len(corpus.val), corpus.val_bytes)}
                seen |= found.details()
                window = next(self.validation_batches()).inputs[:1, : self.context]
                with self.team.sequences_whole(self.model):
                    health = selection_health(self.model, window, autocast=self.autocast)
                seen |= {"selection": health} if health else {}
            if self.sampler_hook is not None and self.samples(progress.step):
                # A sharded model's weights come in the run's dtype, and its own arithmetic must be told so.
                mixed = self.autocast() if self.team.sharded else nullcontext()
                with self.team.sequences_whole(self.model), mixed:
                    text = self.sampler_hook(self.model, progress.step, lambda: bool(interruption))
                if interruption:
                    return None
                seen |= {} if text is None else {"sample": text}
        if loss is not None:
            progress.judge(loss)
        return seen

    def validation_batches(self) -> Iterator[Batch]:
        """This process's share of the fixed batches of a validation, the same every time."""
        tokens, source, context = self.config.eval_tokens, self.corpus.validation, self.context
        return validation_batches(source, self.plan, context=context, max_tokens=tokens, device=self.device, **self.share)

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
