"""Where a setting's value comes from: flag, environment, config file, preset, default, in this order.

`resolve` is a pure function of what those hold; `load` hands it the real ones. Names are read off the commands'
signatures, so nothing here lists a flag. An unknown key or a value of the wrong type in the file ends with exit code 3.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from nsa_cli.cli.options import number, preset_values, whole_number
from nsa_cli.config import PRESETS
from nsa_cli.errors import ExitCode, NsaError

T = TypeVar("T")
_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NOT_IN_FILE = ("config", "version")


@dataclass(frozen=True)
class Setting:
    """One option of one command. keys: its names outside the command line, each with whether it says the opposite
    (`dense` of `sparse`); kind: int, float, bool, str or Path; choices: the allowed texts, if they are few; free_text:
    its metavar is TEXT, so that a comma in it means itself."""

    name: str
    flag: str
    keys: Mapping[str, bool]
    kind: type
    choices: tuple[str, ...]
    many: bool
    default: Any
    free_text: bool = False

    def read(self, value: Any, from_text: bool) -> Any:
        """`value` as this setting's type; ValueError says what it must be. from_text: an environment variable's, where
        commas or blanks part a list."""
        if self.many:
            items = value.replace(",", " ").split() if from_text and not self.free_text else value
            return [self._read_one(item, from_text) for item in (items if isinstance(items, list) else [items])]
        return self._read_one(value, from_text)

    def _read_one(self, value: Any, from_text: bool) -> Any:
        if from_text and self.kind in (int, float):
            return whole_number(value) if self.kind is int else number(value)
        if from_text and self.kind is bool:
            if value.lower() not in _ON + _OFF:
                raise ValueError(f"{value!r} is neither true nor false")
            return value.lower() in _ON
        expected: dict[type, tuple[tuple[type, ...], str]] = {
            int: ((int,), "an integer"),
            float: ((int, float), "a number"),
            bool: ((bool,), "true or false"),
            str: ((str,), "a string"),
            Path: ((str,), "a string"),
        }
        accepted, wanted = expected[self.kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(f"{value!r} is not {wanted}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(self.choices)}")
        return self.kind(value)


@dataclass(frozen=True)
class Origin:
    """Where a value comes from; `detail` is the flag, variable, file and table, or preset."""

    kind: Literal["flag", "environment", "file", "preset", "default", "derived"]
    detail: str = ""

    def __str__(self) -> str:
        return {"default": "default", "preset": f"preset {self.detail}"}.get(self.kind, self.detail)


@dataclass(frozen=True)
class Resolved:
    """The values of a command's settings and where each came from."""

    values: dict[str, Any]
    origins: dict[str, Origin]
    flags: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def chosen(self, name: str) -> bool:
        """Whether the user set it, by flag, environment or file."""
        return self.origins[name].kind in ("flag", "environment", "file")

    def derive(self, name: str, value: Any, reason: str) -> None:
        """Replace a value that the user did not choose."""
        self.values[name] = value
        self.origins[name] = Origin("derived", reason)

    def report(self) -> list[str]:
        """Every setting that has a value, with its origin: "--lr 0.002 (preset tiny)"."""
        lines = [f"{self.flags[name]} {value} ({self.origins[name]})" for name, value in self.values.items() if value is not None]
        return sorted(lines)

    def make(self, build: Callable[..., T], fields: Mapping[str, str] | None = None, **extra: Any) -> T:
        """`build` called with the settings it has parameters for. Its ValueError becomes a usage error that names the
        flag, or the file where the value stands. fields: its parameters that have another name here."""
        fields = fields or {}
        names = {name: fields.get(name, name) for name in inspect.signature(build).parameters if name not in extra}
        given = {name: self.values[key] for name, key in names.items() if self.values.get(key) is not None}
        try:
            return build(**given, **extra)
        except ValueError as error:
            name = str(error).split(" = ")[0]
            origin = self.origins.get(names.get(name, name), Origin("default"))
            known = {name: self.flags[key] for name, key in names.items() if key in self.flags}
            hint = f"{known.get(name, name)} comes from {origin}" if origin.kind != "flag" else ""
            code = ExitCode.BAD_INPUT if origin.kind == "file" else ExitCode.USAGE
            raise NsaError(flag_message(str(error), known), hint, code) from error


def flag_message(message: str, flags: Mapping[str, str]) -> str:
    """A configuration's ValueError in flags: `compress_block = 5: ...` is `--compress-block 5: ...`."""
    name, separator, rest = message.partition(" = ")
    if separator and name in flags:
        message = f"{flags[name]} {rest}".replace(" True: ", ": ", 1)
    pattern = r"(?<![\w-])(" + "|".join(map(re.escape, flags)) + r")(?= = | \+ \w+ = )"
    return re.sub(pattern, lambda match: flags[match[1]], message) if flags else message


def settings_of(command: Callable[..., Any]) -> dict[str, Setting]:
    """The options of a command by parameter name, read off its signature."""
    hints = get_type_hints(command, include_extras=True)
    settings = {}
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if get_origin(hint) is not Annotated:
            continue
        kind, declaration = get_args(hint)[:2]
        # typer takes the first name for a default until it has read the signature itself.
        declared = [declaration.default, *(declaration.param_decls or ())]
        names = [part for part in declared if isinstance(part, str) and part.startswith("-")]
        if not names:
            continue
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        many = get_origin(kind) is list
        kind = get_args(kind)[0] if many else kind
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        keys = {}
        for forms in names:
            for opposite, flag in enumerate(forms.split("/")):
                if flag.startswith("--"):
                    keys[flag.removeprefix("--").replace("-", "_")] = bool(opposite)
        flag = names[0].split("/")[0]
        free_text = declaration.metavar == "TEXT"
        settings[name] = Setting(name, flag, keys, str if choices else kind, choices, many, parameter.default, free_text)
    return settings


def resolve(
    command: str,
    commands: Mapping[str, Mapping[str, Setting]],
    *,
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, Any] | None = None,
    file_name: str = "config file",
) -> Resolved:
    """Every setting of `command` and its origin.

    commands: the settings of all commands, by name. flags: what stood on the command line, by parameter name.
    environment: the process's variables. file: a parsed TOML document; a key at its top is every command's that knows
    it, a key in the table [command] that command's alone, and wins. Errors: NsaError, exit code 3 for the file, 2 for
    the environment.
    """
    settings = commands[command]
    found = _from_file(command, commands, file or {}, file_name)
    found |= _from_environment(settings, environment)
    found |= {name: (value, Origin("flag", settings[name].flag)) for name, value in flags.items() if name in settings}
    preset, defaults = {}, {}
    if "preset" in settings:
        chosen = found.get("preset", (settings["preset"].default,))[0]
        defaults = preset_values(chosen)
        preset = {name: chosen for section in PRESETS[chosen].values() for name in section}
    for name, setting in settings.items():
        if name in found:
            continue
        value = defaults.get(name) if setting.default is None else setting.default
        found[name] = (value, Origin("preset", preset[name]) if name in preset else Origin("default"))
    values = {name: value for name, (value, _) in found.items()}
    origins = {name: origin for name, (_, origin) in found.items()}
    return Resolved(values, origins, {name: setting.flag for name, setting in settings.items()})


def _from_environment(settings: Mapping[str, Setting], environment: Mapping[str, str]) -> dict[str, tuple[Any, Origin]]:
    found = {}
    for name, setting in settings.items():
        for key, opposite in setting.keys.items():
            variable = f"NSA_{key.upper()}"
            text = environment.get(variable, "")
            if not text:
                continue
            try:
                value = setting.read(text, from_text=True)
            except ValueError as error:
                hint = f"it stands for {setting.flag}; unset it or give a right value"
                raise NsaError(f"environment variable {variable}: {error}", hint, ExitCode.USAGE) from None
            found[name] = (not value if opposite else value, Origin("environment", variable))
    return found


def unknown_variables(commands: Mapping[str, Mapping[str, Setting]], environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like a setting and is no command's: "NSA_STEPZ is no setting ...".

    A notice and no error: others may name their variables so, and the tests do (NSA_TEST_SEED).
    """
    known = {f"NSA_{key.upper()}" for settings in commands.values() for setting in settings.values() for key in setting.keys}
    known.add("NSA_KERNEL_TABLE")  # no setting of a command: nsa_cli.ops.triton.tuning reads it
    lines = []
    for name in sorted(environment):
        if environment[name] and name.startswith("NSA_") and not name.startswith("NSA_TEST_") and name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            lines.append(f"{name} is no setting, and ignored" + (f": did you mean {close[0]}?" if close else ""))
    return lines


def _from_file(
    command: str, commands: Mapping[str, Mapping[str, Setting]], file: Mapping[str, Any], file_name: str
) -> dict[str, tuple[Any, Origin]]:
    found: dict[str, tuple[Any, Origin]] = {}
    top = {key: value for key, value in file.items() if key not in commands}
    everywhere = {key for settings in commands.values() for key in _file_keys(settings)}
    for key, value in top.items():
        name = key.replace("-", "_")
        if name not in everywhere:
            raise _unknown_key(key, "", everywhere | set(commands), file_name)
        if name in _file_keys(commands[command]):
            found |= _file_value(commands[command], name, value, file_name, file_name)
    for table, settings in commands.items():
        values = file.get(table, {})
        if not isinstance(values, Mapping):
            raise NsaError(f"{file_name}: {table} = {values!r} is not a table", f"write [{table}]", ExitCode.BAD_INPUT)
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in _file_keys(settings):
                raise _unknown_key(key, table, _file_keys(settings), file_name)
            if table == command:
                found |= _file_value(settings, name, value, f"{file_name} [{table}]", file_name)
    return found


def _file_keys(settings: Mapping[str, Setting]) -> set[str]:
    return {key for setting in settings.values() if setting.name not in _NOT_IN_FILE for key in setting.keys}


def _file_value(
    settings: Mapping[str, Setting], key: str, value: Any, where: str, file_name: str
) -> dict[str, tuple[Any, Origin]]:
    setting = next(setting for setting in settings.values() if key in setting.keys)
    try:
        read = setting.read(value, from_text=False)
    except ValueError as error:
        raise NsaError(f"{where}: {key}: {error}", f"it stands for {setting.flag}", ExitCode.BAD_INPUT) from None
    return {setting.name: (not read if setting.keys[key] else read, Origin("file", where))}


def _unknown_key(key: str, table: str, known: set[str], file_name: str) -> NsaError:
    close = difflib.get_close_matches(key.replace("-", "_"), sorted(known), n=1)
    place = f"table [{table}]" if table else "top level"
    hint = f"did you mean '{close[0]}'?" if close else "keys are the flags' names: --lr is lr"
    return NsaError(f"{file_name}: unknown key '{key}' at the {place}", hint, ExitCode.BAD_INPUT)


def read_config(path: Path) -> dict[str, Any]:
    """A TOML document; missing, unreadable or malformed ends with exit code 3."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise NsaError(f"{path}: {reason}", "--config takes a TOML file", ExitCode.BAD_INPUT) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NsaError(f"{path}: not TOML: {error}", "write key = value lines", ExitCode.BAD_INPUT) from None


def load(ctx: typer.Context) -> Resolved:
    """`resolve` for the command being run, with this process's command line, environment and config file."""
    group: Any = ctx.find_root().command
    commands = {name: settings_of(command.callback) for name, command in group.commands.items()}
    mine = commands.get(ctx.info_name or "", {})
    flags = {
        # typer before 0.29 makes a Path of an option only when it calls the command, after this.
        name: Path(value) if isinstance(value, str) and name in mine and mine[name].kind is Path else value
        for name, value in ctx.params.items()
        if _on_command_line(ctx, name)
    }
    ctx.obj["verbose"] = bool(flags.get("verbose"))
    path = flags.get("config") or os.environ.get("NSA_CONFIG")
    file = read_config(Path(path)) if path else None
    name = ctx.info_name or ""
    resolved = resolve(
        name, commands, flags=flags, environment=os.environ, file=file, file_name=str(path) if path else "config file"
    )
    ctx.obj["verbose"] = resolved["verbose"]
    if unknown := unknown_variables(commands, os.environ):
        from nsa_cli.cli.output import Messages

        Messages(quiet=resolved["quiet"]).list_settings(unknown)
    return resolved


def _on_command_line(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
