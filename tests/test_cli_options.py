from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer

from nsa_cli.benchmark.options import CPU_SHAPE, CUDA_SHAPE, BenchOptions
from nsa_cli.cli import options
from nsa_cli.cli.app import COMMANDS, app
from nsa_cli.cli.machine import find_machine
from nsa_cli.cli.resolve import Resolved, flag_message, read_config, resolve, settings_of, unknown_variables
from nsa_cli.cli.train import configurations
from nsa_cli.config import PRESETS, ModelConfig, NSAConfig, TrainConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.generation import SamplingConfig

SETTINGS = {name: settings_of(command) for name, command in COMMANDS.items()}


def resolved(command: str = "train", **sources: Any) -> Resolved:
    return resolve(command, SETTINGS, **{"flags": {}, "environment": {}, **sources})


def refused(code: ExitCode, **sources: Any) -> NsaError:
    with pytest.raises(NsaError) as caught:
        resolved(**sources)
    assert caught.value.exit_code == code
    return caught.value


def test_a_flag_beats_the_environment_beats_the_file_beats_the_preset_beats_the_default() -> None:
    flags, environment = {"lr": 0.1}, {"NSA_LR": "0.2"}
    file: dict[str, Any] = {"lr": 0.4, "train": {"lr": 0.3}}
    layers = [
        (resolved(flags=flags, environment=environment, file=file), 0.1, "--lr"),
        (resolved(environment=environment, file=file), 0.2, "NSA_LR"),
        (resolved(file=file, file_name="run.toml"), 0.3, "run.toml [train]"),
        (resolved(file={"lr": 0.4}, file_name="run.toml"), 0.4, "run.toml"),
        (resolved(), PRESETS["tiny"]["train"]["lr"], "preset tiny"),
    ]
    for settings, value, origin in layers:
        assert (settings["lr"], str(settings.origins["lr"])) == (value, origin)
    assert (resolved()["weight_decay"], str(resolved().origins["weight_decay"])) == (0.1, "default")


def test_the_preset_itself_may_come_from_anywhere() -> None:
    for sources in (
        {"flags": {"preset": "small"}},
        {"environment": {"NSA_PRESET": "small"}},
        {"file": {"preset": "small"}},
    ):
        assert resolved(**sources)["dim"] == PRESETS["small"]["model"]["dim"]


def test_every_name_of_a_flag_works_outside_the_command_line() -> None:
    assert resolved(environment={"NSA_CONTEXT": "64"})["context"] == 64
    assert resolved(environment={"NSA_SEQ_LEN": "64"})["context"] == 64
    assert resolved(file={"seq-len": 64})["context"] == 64
    assert resolved(environment={"NSA_DENSE": "1", "NSA_JSON": "yes"}).values["sparse"] is False
    assert resolved(file={"dense": False})["sparse"] is True
    assert resolved(environment={"NSA_NO_COMPILE": "true"})["compile"] is False
    assert resolved("bench", environment={"NSA_SEQ_LEN": "512,1024"})["seq_len"] == [512, 1024]
    assert resolved("bench", file={"seq_len": 512})["seq_len"] == [512]
    assert resolved("bench", environment={"NSA_GROUP": "attention,training"})["group"] == ["attention", "training"]
    assert resolved("sample", environment={"NSA_STOP": "a, b"})["stop"] == ["a, b"]
    assert resolved(environment={"NSA_LR": ""})["lr"] == PRESETS["tiny"]["train"]["lr"]


def test_a_mistyped_variable_is_named_with_the_nearest_one_and_other_programs_are_left_alone() -> None:
    right = {"NSA_TOP_K": "5", "NSA_NO_COMPILE": "1", "NSA_CONFIG": "a.toml", "NSA_TEST_SEED": "3", "NSA_STEPY": "", "X": "1"}
    assert unknown_variables(SETTINGS, right) == []
    found = unknown_variables(SETTINGS, {"NSA_STEPZ": "5", "NSA_QQQQQQQ": "1"})
    assert found == ["NSA_QQQQQQQ is no setting, and ignored", "NSA_STEPZ is no setting, and ignored: did you mean NSA_STEPS?"]


def test_a_model_that_is_only_run_is_float32_on_every_device_unless_told() -> None:
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        machine = find_machine(resolved("sample", flags={"dtype": name, "device": "cpu"}), allow_fallback=True)
        for device in ("cpu", "cuda"):
            assert replace(machine, device=torch.device(device)).weights_dtype == dtype


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_one() -> None:
    error = refused(ExitCode.BAD_INPUT, file={"train": {"learning": 1, "lr": 1}}, file_name="run.toml")
    assert "run.toml" in error.message
    assert "'learning'" in error.message
    assert refused(ExitCode.BAD_INPUT, file={"batch_token": 1}).hint == "did you mean 'batch_tokens'?"
    assert refused(ExitCode.BAD_INPUT, file={"trian": {"lr": 1}}).hint == "did you mean 'train'?"
    # A table is read whole whatever command runs: a typing error shows at once, not at the next command.
    assert "did you mean 'top_k'" in refused(ExitCode.BAD_INPUT, file={"sample": {"topk": 1}}).hint


def test_a_key_of_another_command_may_stand_at_the_top_but_not_in_this_ones_table() -> None:
    assert resolved("sample", file={"lr": 1.0, "top_k": 5})["top_k"] == 5
    refused(ExitCode.BAD_INPUT, file={"train": {"top_k": 5}})


@pytest.mark.parametrize(
    "file",
    [{"lr": "fast"}, {"steps": 1.5}, {"steps": True}, {"compile": 1}, {"schedule": "sine"}, {"out": 3}, {"train": 1}],
)
def test_a_value_of_the_wrong_type_in_the_file_is_refused(file: dict[str, Any]) -> None:
    assert next(iter(file)) in refused(ExitCode.BAD_INPUT, file=file).message


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    for variable, value in (("NSA_LR", "fast"), ("NSA_COMPILE", "perhaps"), ("NSA_KERNEL", "cuda")):
        assert f"environment variable {variable}: '{value}'" in refused(ExitCode.USAGE, environment={variable: value}).message


def test_a_missing_or_malformed_config_file_is_unusable_input(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("lr = = 1\n")
    for path in (tmp_path / "none.toml", bad, tmp_path):
        with pytest.raises(NsaError) as caught:
            read_config(path)
        assert caught.value.exit_code == ExitCode.BAD_INPUT
        assert str(path) in caught.value.message


def test_every_field_of_the_configurations_is_a_flag_of_train() -> None:
    fields = {name for cls in (ModelConfig, NSAConfig, TrainConfig) for name in inspect.signature(cls).parameters}
    assert fields - set(SETTINGS["train"]) == {"vocab_size", "nsa"}


def test_every_command_has_the_common_flags_with_one_meaning() -> None:
    for name in ("device", "dtype", "kernel", "seed", "json", "quiet", "verbose", "config"):
        assert len({(s[name].flag, s[name].kind, s[name].choices, s[name].default) for s in SETTINGS.values()}) == 1, name


def test_presets_make_the_configurations_they_hold() -> None:
    assert set(get_args(options.Preset)) == set(PRESETS)
    for preset, parts in PRESETS.items():
        model, recipe = configurations(resolved(flags={"preset": preset, "sparse": True}), 256)
        assert model == ModelConfig(**parts["model"], nsa=NSAConfig(**parts["nsa"]))
        assert recipe == TrainConfig(**parts["train"])
    assert configurations(resolved(), 256)[0].nsa is None


def test_defaults_in_signatures_are_those_of_the_wings() -> None:
    def same(command: str, config: Any, names: dict[str, str]) -> None:
        for name, parameter in inspect.signature(config).parameters.items():
            setting = SETTINGS[command].get(names.get(name, name))
            if setting is not None and setting.default is not None and name not in ("seed", "device"):
                default = tuple(setting.default) if setting.many else setting.default
                assert default == parameter.default, name

    same("sample", SamplingConfig, {})
    same("bench", BenchOptions, {"seq_lens": "seq_len", "limit_s": "limit", "budget_s": "budget"})
    shapes = {"heads": "BenchHeads", "kv_heads": "BenchKvHeads", "dim_head": "BenchDimHead"}
    shapes |= {"model_dim": "BenchDim", "model_depth": "BenchDepth"}
    for field, alias in shapes.items():
        shown = f"[CPU {getattr(CPU_SHAPE, field)}, CUDA {getattr(CUDA_SHAPE, field)}]"
        assert shown in get_args(getattr(options, alias))[1].help, field


def test_the_help_of_bench_says_the_papers_geometry_and_that_of_train_the_presets() -> None:
    group: Any = typer.main.get_command(app)
    shown = {name: {option.name: option.help for option in group.commands[name].params} for name in ("train", "bench")}
    assert shown["bench"]["window"] == r"Tokens of the sliding window (w). [dim]\[default: 512][/dim]"
    assert shown["train"]["window"] == r"Tokens of the sliding window (w). [dim]\[tiny 32, small 64, base 512][/dim]"


def test_heads_alone_keeps_the_presets_group_size_where_it_divides() -> None:
    def kv_heads(**flags: Any) -> int:
        return configurations(resolved(flags=flags), 256)[0].kv_heads

    assert kv_heads(heads=8) == 4
    assert kv_heads(heads=3) == 3
    assert kv_heads(heads=16, preset="base") == 2
    assert kv_heads(heads=8, kv_heads=1) == 1
    settings = resolved(flags={"heads": 8})
    configurations(settings, 256)
    assert str(settings.origins["kv_heads"]) == "from --heads"


def test_a_context_alone_keeps_the_step_a_multiple_of_it() -> None:
    def batch(**flags: Any) -> tuple[int, int | None]:
        recipe = configurations(resolved(flags=flags), 256)[1]
        return recipe.batch_tokens, recipe.micro_batch_tokens

    assert batch(context=100) == (2000, None)
    assert batch(context=4096) == (4096, None)
    assert batch(context=100, batch_tokens=300) == (300, None)
    assert batch(context=16384, preset="base") == (524288, 32768)
    assert batch(context=65536, preset="base") == (524288, 65536)


def test_a_sparse_flag_for_a_dense_model_is_refused_on_the_command_line_alone() -> None:
    with pytest.raises(NsaError, match="--window 64 shapes sparse attention") as caught:
        configurations(resolved(flags={"window": 64}), 256)
    assert caught.value.exit_code == ExitCode.USAGE
    assert configurations(resolved(file={"window": 64}, environment={"NSA_NUM_INIT": "0"}), 256)[0].nsa is None


def test_a_wrong_value_names_its_flag_and_where_it_came_from() -> None:
    cases: list[tuple[dict[str, Any], ExitCode, str]] = [
        (
            {"flags": {"sparse": True, "compress_block": 7}},
            ExitCode.USAGE,
            "--compress-stride 4: must divide --compress-block",
        ),
        ({"flags": {"context": 0}}, ExitCode.USAGE, "--seq-len 0: must be an integer of at least 1"),
        ({"file": {"dropout": 2}, "file_name": "run.toml"}, ExitCode.BAD_INPUT, "--dropout 2.0: must be"),
        ({"environment": {"NSA_BETA1": "1.5"}}, ExitCode.USAGE, "--beta1 1.5: must be"),
    ]
    for sources, code, message in cases:
        with pytest.raises(NsaError) as caught:
            configurations(resolved(**sources), 256)
        assert caught.value.exit_code == code
        assert caught.value.message.startswith(message)
    assert "--beta1 comes from NSA_BETA1" in caught.value.hint


def test_a_configurations_message_is_told_in_flags() -> None:
    flags = {
        "num_selected": "--num-selected",
        "num_init": "--num-init",
        "num_local": "--num-local",
        "window": "--window",
    }
    with pytest.raises(ValueError, match="num_selected") as caught:
        NSAConfig(num_selected=2)
    told = flag_message(str(caught.value), flags)
    assert told.startswith("--num-selected 2: must be at least --num-init + --num-local = 1 + 2")
    assert flag_message("a window is open", flags) == "a window is open"
