"""Every flag of every command, defined once: a flag means the same wherever it stands.

A name here is an annotated type; a command's signature chooses names and gives their defaults. A flag's long forms are
also its names in the environment (NSA_<FLAG>) and in a config file (resolve.py). Flags that set a field of the
configurations have no default in a signature: theirs come from the preset, and the help says which.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from nsa_cli.config import (
    PRESETS,
    BranchKV,
    Compression,
    CompressRope,
    FeedForward,
    Kernel,
    ModelConfig,
    NSAConfig,
    Parallel,
    Schedule,
    TrainConfig,
)

Preset = Literal["tiny", "small", "base"]
DType = Literal["auto", "float32", "bfloat16"]

MODEL, SPARSE, OPTIMISATION, DATA, OUTPUT = "Model", "Sparse attention", "Optimisation", "Data", "Output"
SAMPLING, PROMPTS, MEASURING, LOOKING, RUNNING = "Sampling", "Prompts", "Measuring", "Looking", "Running"

_SECTIONS: tuple[tuple[str, Any], ...] = (("model", ModelConfig), ("nsa", NSAConfig), ("train", TrainConfig))


def whole_number(text: str | int) -> int:
    """An integer as a user writes it; ValueError quotes what is not one."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an integer") from None


def number(text: str | float) -> float:
    """A number as a user writes it; ValueError quotes what is not one."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def preset_values(preset: str) -> dict[str, Any]:
    """Every field of the three configurations under a preset: its own values over the dataclasses' defaults."""
    values: dict[str, Any] = {}
    for section, cls in _SECTIONS:
        values |= {field.name: field.default for field in dataclasses.fields(cls)} | PRESETS[preset][section]
    return values


def _preset_text(field: str) -> str:
    """[default: 2] where the presets agree, else each one's value."""
    values = {preset: preset_values(preset)[field] for preset in PRESETS}
    distinct = set(map(str, values.values()))
    if distinct == {"None"}:
        return ""
    if len(distinct) == 1:
        return _default_text(*values.values())
    listed = ", ".join(f"{preset} {'none' if value is None else value}" for preset, value in values.items())
    return f" [dim]\\[{listed}][/dim]"


def _default_text(*values: Any) -> str:
    text = str(values[0])
    return f" [dim]\\[default: {text.lower() if text in ('True', 'False') else text}][/dim]"


class PaperCommand(TyperCommand):
    """A command without presets, whose sparse attention is the paper's by default: its help says those values."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        paper = {field.name: field.default for field in dataclasses.fields(NSAConfig)}
        for option in self.params:
            if option.name in paper:
                text: str = getattr(option, "help", "")
                text = text.removesuffix(_preset_text(option.name)) + _default_text(paper[option.name])
                setattr(option, "help", text)  # noqa: B010


def _flag(names: str, text: str, panel: str, **settings: Any) -> Any:
    """One option: names as "--long -s" or "--yes/--no"."""
    return typer.Option(*names.split(), help=text, rich_help_panel=panel, **settings)


def _count(names: str, text: str, panel: str, **settings: Any) -> Any:
    return _flag(names, text, panel, parser=whole_number, metavar="N", **settings)


def _real(names: str, text: str, panel: str, **settings: Any) -> Any:
    return _flag(names, text, panel, parser=number, metavar="X", **settings)


def _field(make: Any, names: str, text: str, panel: str, **settings: Any) -> Any:
    """An option that sets the configuration field its first name spells; --seq-len is spelt context there."""
    field = names.split()[0].split("/")[0].removeprefix("--").replace("-", "_")
    field = {"seq_len": "context"}.get(field, field)
    return make(names, text + _preset_text(field), panel, **settings)


def _shape(names: str, text: str, cpu: int, cuda: int) -> Any:
    return _count(names, f"{text} [dim]\\[CPU {cpu}, CUDA {cuda}][/dim]", MEASURING)


_DTYPE_HELP = (
    "Arithmetic; auto is float32, and bfloat16 where train and bench run on a GPU. bfloat16 is faster there and may flip "
    "near ties in sample and inspect."
)

# Running: every command has these.
Device = Annotated[str, _flag("--device", "cpu, cuda, cuda:1, or auto: a GPU when there is one.", RUNNING, metavar="NAME")]
Dtype = Annotated[DType, _flag("--dtype", _DTYPE_HELP, RUNNING)]
KernelName = Annotated[Kernel, _flag("--kernel", "Sparse attention's implementation; all compute the same function.", RUNNING)]
Seed = Annotated[int, _count("--seed", "Decides every random number.", RUNNING)]
Json = Annotated[bool, _flag("--json", "JSON on stdout instead of text.", OUTPUT)]
Quiet = Annotated[bool, _flag("--quiet -q", "Nothing on stderr but errors.", OUTPUT)]
Verbose = Annotated[bool, _flag("--verbose -v", "Say where settings come from; errors with their traceback.", OUTPUT)]
Config = Annotated[
    Path | None,
    _flag("--config", "TOML file of settings: top-level keys, and a table a command.", RUNNING, metavar="FILE.toml"),
]

# Model.
PresetName = Annotated[Preset, _flag("--preset", "Sizes and training recipe to start from.", MODEL)]
Sparse = Annotated[bool, _flag("--sparse/--dense", "Native Sparse Attention, or dense attention.", MODEL)]
Dim = Annotated[int | None, _field(_count, "--dim", "Width of the residual stream.", MODEL)]
Depth = Annotated[int | None, _field(_count, "--depth", "Transformer blocks.", MODEL)]
Heads = Annotated[int | None, _field(_count, "--heads", "Query heads.", MODEL)]
KvHeads = Annotated[
    int | None,
    _field(
        _count,
        "--kv-heads",
        "Key/value heads; left out, --heads keeps the preset's group size where it divides.",
        MODEL,
    ),
]
DimHead = Annotated[int | None, _field(_count, "--dim-head", "Channels of a head.", MODEL)]
Context = Annotated[int | None, _field(_count, "--seq-len --context", "Tokens of one training window.", MODEL)]
Ff = Annotated[FeedForward | None, _field(_flag, "--ff", "Feed-forward network.", MODEL)]
FfMult = Annotated[float | None, _field(_real, "--ff-mult", "Its hidden width over --dim.", MODEL)]
Dropout = Annotated[float | None, _field(_real, "--dropout", "Dropped share of activations in training.", MODEL)]
TieEmbeddings = Annotated[
    bool | None,
    _field(_flag, "--tie-embeddings/--no-tie-embeddings", "One matrix reads tokens and predicts them.", MODEL),
]
RopeTheta = Annotated[float | None, _field(_real, "--rope-theta", "Base of the rotary frequencies.", MODEL)]

# Sparse attention.
CompressBlock = Annotated[int | None, _field(_count, "--compress-block", "Tokens of a compressed block (l).", SPARSE)]
CompressStride = Annotated[
    int | None, _field(_count, "--compress-stride", "Tokens between two of them (d); divides l and l'.", SPARSE)
]
SelectBlock = Annotated[int | None, _field(_count, "--select-block", "Tokens of a selection block (l').", SPARSE)]
NumSelected = Annotated[
    int | None, _field(_count, "--num-selected", "Selected blocks a query, forced ones included (n).", SPARSE)
]
NumInit = Annotated[int | None, _field(_count, "--num-init", "First blocks, always selected.", SPARSE)]
NumLocal = Annotated[int | None, _field(_count, "--num-local", "Newest blocks, always selected.", SPARSE)]
Window = Annotated[int | None, _field(_count, "--window", "Tokens of the sliding window (w).", SPARSE)]
Compress = Annotated[Compression | None, _field(_flag, "--compress", "Network that turns l tokens into one.", SPARSE)]
BranchKv = Annotated[
    BranchKV | None,
    _field(_flag, "--branch-kv", "Keys and values of a branch's own, or one pair for all three.", SPARSE),
]
CompressRopeName = Annotated[
    CompressRope | None, _field(_flag, "--compress-rope", "Rotary positions in the compressed branch.", SPARSE)
]

# Optimisation.
Steps = Annotated[int | None, _field(_count, "--steps", "Optimizer steps.", OPTIMISATION)]
BatchTokens = Annotated[int | None, _field(_count, "--batch-tokens", "Tokens of a step.", OPTIMISATION)]
MicroBatchTokens = Annotated[
    int | None,
    _field(_count, "--micro-batch-tokens", "Tokens on the device at once; gradients are accumulated.", OPTIMISATION),
]
Lr = Annotated[float | None, _field(_real, "--lr", "Peak learning rate.", OPTIMISATION)]
MinLrRatio = Annotated[float | None, _field(_real, "--min-lr-ratio", "Learning rate at the end, over --lr.", OPTIMISATION)]
ScheduleName = Annotated[Schedule | None, _field(_flag, "--schedule", "Course of the learning rate.", OPTIMISATION)]
Warmup = Annotated[int | None, _field(_count, "--warmup", "Steps up to the peak.", OPTIMISATION)]
DecayRatio = Annotated[float | None, _field(_real, "--decay-ratio", "Share of the steps that wsd decays over.", OPTIMISATION)]
WeightDecay = Annotated[float | None, _field(_real, "--weight-decay", "AdamW's decay, on matrices alone.", OPTIMISATION)]
Beta1 = Annotated[float | None, _field(_real, "--beta1", "AdamW's first moment.", OPTIMISATION)]
Beta2 = Annotated[float | None, _field(_real, "--beta2", "AdamW's second moment.", OPTIMISATION)]
GradClip = Annotated[float | None, _field(_real, "--grad-clip", "Largest gradient norm; 0 clips nothing.", OPTIMISATION)]
MaxSkipped = Annotated[
    int | None,
    _field(
        _count, "--max-skipped", "Updates skipped in a row, loss or gradient not finite, that end with exit 4.", OPTIMISATION
    ),
]
CudaGraph = Annotated[
    bool | None,
    _field(_flag, "--cuda-graph/--no-cuda-graph", "Replay each step as a CUDA graph: small models train faster.", RUNNING),
]
Recompute = Annotated[
    bool | None,
    _field(
        _flag, "--recompute/--no-recompute", "Keep each block's input alone, and compute the rest again: less memory.", RUNNING
    ),
]
ParallelName = Annotated[
    Parallel,
    _flag("--parallel", "Under torchrun each process holds all weights (ddp), or a shard of them (fsdp).", RUNNING),
]
ContextProcesses = Annotated[
    int, _count("--context-parallel", "Under torchrun, processes that share one sequence: for a long --seq-len.", RUNNING)
]
Compile = Annotated[bool | None, _field(_flag, "--compile/--no-compile", "Run the model through torch.compile.", RUNNING)]

# Data.
Data = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, globs, .gz, .jsonl, .parquet, token shards, - for stdin, or a task (synthetic:passkey, "
        "synthetic:mqar, synthetic:copying); with weights: web.txt@0.7 code/@0.3.",
        metavar="DATA",
        show_default=False,
    ),
]
TokenizerFile = Annotated[
    Path | None,
    _flag("--tokenizer", "tokenizer.json of byte pairs; without it, bytes are the tokens.", DATA, metavar="FILE"),
]
TextKey = Annotated[
    str, _flag("--text-key", "Field of a .jsonl line, or column of a .parquet file, that holds the text.", DATA, metavar="KEY")
]
ValFraction = Annotated[float | None, _field(_real, "--val-fraction", "Tail of the data held out for validation.", DATA)]
Pack = Annotated[
    bool | None,
    _field(_flag, "--pack/--no-pack", "Keep documents (files, .jsonl lines, .parquet rows) apart, or train on a stream.", DATA),
]
Shards = Annotated[
    Path | None,
    _flag(
        "--shards",
        "Tokenize into this folder once and map the tokens into memory; text over 512 MiB goes to the user's cache otherwise.",
        DATA,
        metavar="FOLDER",
        show_default=False,
    ),
]
Strict = Annotated[
    bool, _flag("--strict", "Refuse broken input, which is passed over, counted and named otherwise.", DATA)
]

# Output of training.
Out = Annotated[Path, _flag("--out", "Checkpoint to write; its other files stand beside it.", OUTPUT, metavar="CKPT")]
Resume = Annotated[
    Path | None, _flag("--resume", "Go on with this checkpoint's run.", OUTPUT, metavar="CKPT", show_default=False)
]
InitFrom = Annotated[
    Path | None,
    _flag(
        "--init-from",
        "Begin with this checkpoint's weights, in its shape; with --sparse a dense one is made sparse.",
        MODEL,
        metavar="CKPT",
    ),
]
DistillFrom = Annotated[
    Path | None,
    _flag("--distill-from", "Learn from this checkpoint's distribution besides the text.", OPTIMISATION, metavar="CKPT"),
]
DistillWeight = Annotated[
    float | None,
    _field(_real, "--distill-weight", "Weight of KL(teacher || student) in the loss, with --distill-from.", OPTIMISATION),
]
Overwrite = Annotated[bool, _flag("--overwrite", "Replace an existing --out.", OUTPUT)]
DryRun = Annotated[bool, _flag("--dry-run", "Show settings, costs and one step; write nothing.", OUTPUT)]
ForceData = Annotated[bool, _flag("--force-data", "Go on with --resume although the data has changed.", OUTPUT)]
SaveEvery = Annotated[int | None, _field(_count, "--save-every", "Steps between saved states; 0 saves at the end.", OUTPUT)]
LogEvery = Annotated[int | None, _field(_count, "--log-every", "Steps between metric lines.", OUTPUT)]
Log = Annotated[
    list[str] | None,
    _flag("--log", "Show the metrics there too: tensorboard or wandb; may be repeated.", OUTPUT, metavar="NAME"),
]
EvalEvery = Annotated[int | None, _field(_count, "--eval-every", "Steps between validations; 0 never validates.", OUTPUT)]
Patience = Annotated[
    int | None, _field(_count, "--patience", "Validations without a new best that end the run; 0 never does.", OUTPUT)
]
Keep = Annotated[int | None, _field(_count, "--keep", "Numbered weights kept of the last saves, ckpt.step-00000500 ...", OUTPUT)]
SampleEvery = Annotated[
    int | None, _field(_count, "--sample-every", "Steps between samples, shown and in the metrics; 0 makes none.", OUTPUT)
]
EvalTokens = Annotated[int | None, _field(_count, "--eval-tokens", "Most tokens of a validation.", OUTPUT)]

# Sampling.
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint that train wrote.", metavar="CKPT", show_default=False)]
Temperature = Annotated[float, _real("--temperature", "Divides the logits; 0 takes the likeliest token.", SAMPLING)]
TopK = Annotated[int | None, _count("--top-k", "Keep the K likeliest tokens.", SAMPLING)]
TopP = Annotated[float | None, _real("--top-p", "Keep the fewest likeliest tokens of this probability.", SAMPLING)]
MinP = Annotated[float | None, _real("--min-p", "Keep tokens at least this likely, over the likeliest.", SAMPLING)]
FilterThres = Annotated[float | None, _real("--filter-thres", "Keep the ceil((1 - X) V) highest logits, at least one.", SAMPLING)]
MaxTokens = Annotated[int, _count("--max-tokens", "Tokens of one continuation.", SAMPLING)]
Stop = Annotated[list[str] | None, _flag("--stop", "End before this text; may be given several times.", SAMPLING, metavar="TEXT")]
Continuations = Annotated[int, _count("--continuations -n", "Continuations of every prompt.", SAMPLING)]

# Prompts.
Whole = Annotated[bool, _flag("--whole", "All of stdin is one prompt.", PROMPTS)]
Null = Annotated[bool, _flag("--null", "NUL ends prompts and continuations; newlines are kept.", PROMPTS)]
Jsonl = Annotated[bool, _flag("--jsonl", "One JSON object a continuation.", OUTPUT)]
Echo = Annotated[bool, _flag("--echo", "Write the prompt before its continuation.", OUTPUT)]

Logprobs = Annotated[bool, _flag("--logprobs", "Token ids and their log-probabilities in the JSON.", OUTPUT)]
Timings = Annotated[bool, _flag("--timings", "Elapsed seconds in the JSON.", OUTPUT)]
Cache = Annotated[bool, _flag("--cache/--no-cache", "Keep keys and values, or recompute every token.", RUNNING)]

# Looking into a model.
Layers = Annotated[list[int] | None, _count("--layer", "Layer, from 0; may be repeated. All if left out.", LOOKING)]
QueryHeads = Annotated[list[int] | None, _count("--head", "Query head, from 0; may be repeated. All if left out.", LOOKING)]
Queries = Annotated[list[int], _count("--query", "Query token, from 0, or from the end below 0; may be repeated.", LOOKING)]
Npz = Annotated[Path | None, _flag("--npz", "Write the arrays to this file.", OUTPUT, metavar="FILE")]

# Measuring. The shape's defaults are the device's: a test holds them to nsa_cli.benchmark's.
SeqLens = Annotated[list[int], _count("--seq-len", "Tokens of the sequence; may be repeated.", MEASURING)]
Ladder = Annotated[
    bool | None,
    _flag(
        "--ladder/--no-ladder",
        "Shorter lengths too, to find where sparse wins. With one --seq-len if left out.",
        MEASURING,
    ),
]
Groups = Annotated[
    list[str] | None,
    _flag("--group", "Only these rows: attention, branches, training, decode; may be repeated.", MEASURING, metavar="NAME"),
]
Batch = Annotated[int, _count("--batch", "Sequences at once.", MEASURING)]
BenchHeads = Annotated[int | None, _shape("--heads", "Query heads.", 8, 64)]
BenchKvHeads = Annotated[int | None, _shape("--kv-heads", "Key/value heads.", 2, 4)]
BenchDimHead = Annotated[int | None, _shape("--dim-head", "Channels of a head.", 64, 128)]
BenchDim = Annotated[int | None, _shape("--dim", "Width of the model in the training, prefill and decode rows.", 256, 1024)]
BenchDepth = Annotated[int | None, _shape("--depth", "Its transformer blocks.", 1, 2)]
Limit = Annotated[float, _real("--limit", "Seconds the whole report may take; rows beyond are named and left out.", MEASURING)]
Budget = Annotated[float, _real("--budget", "Timed seconds of one measurement.", MEASURING)]
Compare = Annotated[
    Path | None,
    _flag("--compare", "An earlier --json; a row slower than it ends with exit code 6.", MEASURING, metavar="OLD.json"),
]
Tolerance = Annotated[float, _real("--tolerance", "How much slower than --compare a row may be, as a share.", MEASURING)]
Tune = Annotated[
    Path | None,
    _flag("--tune", "Instead, time the Triton kernels' launch configurations into this table.", MEASURING, metavar="TABLE.json"),
]
Csv = Annotated[bool, _flag("--csv", "CSV on stdout instead of a table.", OUTPUT)]
