"""README against the program: its command lines parse, its flags exist, its Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from nsa_cli.cli.app import COMMANDS, app
from tests.command_line import ROOT, environment, text, write_checkpoint

README = ROOT / "README.md"
SHELL = ("", "sh", "bash", "shell", "console")
OPERATORS = set("|&;<>()") | {"&&", "||", ">>", "<<", "|&", "<(", ">(", ";;", "$("}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)


def command_lines(page: str) -> Iterator[list[str]]:
    """The arguments of every `nsa` in the fenced shell blocks, wherever it stands in its line."""
    for language, content in blocks(page):
        if language not in SHELL:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            for place, word in enumerate(words):
                # Not a word of a comment or of another command's arguments: only where a command may stand.
                starts = (
                    place == 0 or words[place - 1] in OPERATORS or "=" in words[place - 1] or words[place - 1] == "time"
                )
                if word == "nsa" and starts:
                    rest = words[place + 1 :]
                    end = next((i for i, each in enumerate(rest) if set(each) <= set("|&;<>()")), len(rest))
                    yield rest[:end]


def parse(arguments: list[str]) -> None:
    """The real parser, without running anything; typer's usage errors pass through."""
    group: Any = typer.main.get_command(app)
    try:
        group.make_context("nsa", list(arguments)).close()
        if arguments and arguments[0] in group.commands:
            group.commands[arguments[0]].make_context(arguments[0], arguments[1:]).close()
    except typer.Exit:
        # --help and --version leave at once.
        return


def flags() -> set[str]:
    group: Any = typer.main.get_command(app)
    everything = [group, *group.commands.values()]
    return {"--help"} | {
        name for command in everything for option in command.params for name in (*option.opts, *option.secondary_opts)
    }


@pytest.fixture(scope="module")
def page() -> str:
    return README.read_text(encoding="utf-8")


def test_every_command_line_parses_and_every_command_is_shown(page: str) -> None:
    lines = list(command_lines(page))
    assert {line[0] for line in lines if line} >= set(COMMANDS)
    for line in lines:
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"nsa {shlex.join(line)}: {error}")


def test_every_flag_exists(page: str) -> None:
    named = set(re.findall(r"`(--[a-z][\w-]*)", page))
    assert named
    assert named <= flags(), named - flags()


def test_the_python_runs(page: str, tmp_path: Path) -> None:
    snippets = [content for language, content in blocks(page) if language in ("python", "py")]
    assert snippets
    (tmp_path / "data.txt").write_text(text())
    write_checkpoint(tmp_path / "ckpt.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_these_tests_see_what_is_wrong() -> None:
    sample = "```sh\nX=1 nsa train a.txt --steps 3 && echo nsa | nsa sample x > y  # nsa no\nout=$(nsa bench)\n```\n"
    assert list(command_lines(sample)) == [["train", "a.txt", "--steps", "3"], ["sample", "x"], ["bench"]]
    with pytest.raises(Exception, match="--stepz"):
        parse(["train", "a.txt", "--stepz", "3"])
    parse(["--help"])
    assert {"--seq-len", "--context", "--dense", "-q"} <= flags()
