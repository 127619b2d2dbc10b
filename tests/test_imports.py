"""The house's one direction (design: cli -> the wings -> checkpoint | data | model -> ops), read off the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command_line import ROOT, environment, write_checkpoint

PACKAGE = ROOT / "nsa_cli"
WINGS = ("training", "generation", "benchmark", "inspection")
LEAVES = ("config", "errors")
SHELVES = ("checkpoint", "data", "model")
HEAVY = ("torch", "numpy", "triton", "rotary_embedding_torch", "safetensors", "einops")


@dataclass(frozen=True)
class Import:
    """module: what is imported, a dotted name; at_load: whether importing the file imports it, or a call does."""

    file: Path
    line: int
    module: str
    at_load: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def room(file: Path) -> str:
    """The part of the house that a file belongs to: cli, training, ops, checkpoint, config, ..."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    late |= {id(inner) for node in ast.walk(tree) if _for_types_only(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            assert node.module is not None
            names = [node.module]
            if node.module == "nsa_cli":
                names = [f"nsa_cli.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) not in late)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


FILES = sorted(PACKAGE.rglob("*.py"))
ALL = [found for file in FILES for found in imports(file)]


def own(found: Import) -> str | None:
    """The room that an import of this package reaches; None for other packages."""
    if found.top != "nsa_cli":
        return None
    parts = found.module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def allowed(importer: str) -> set[str]:
    common = {*LEAVES, "__init__", "__version__"}
    if importer in LEAVES:
        return {*LEAVES}
    if importer == "ops":
        return {"ops", *common}
    if importer in SHELVES:
        return {"ops", *SHELVES, *common}
    if importer in WINGS:
        return {importer, "ops", *SHELVES, *common}
    # cli, __main__ and __init__ look down on everything.
    return {"cli", "ops", *WINGS, *SHELVES, *common}


def test_imports_go_down_the_house_and_no_wing_knows_another() -> None:
    wrong = [found for found in ALL if (target := own(found)) is not None and target not in allowed(room(found.file))]
    assert not wrong, "\n".join(map(str, wrong))


def test_every_room_of_the_house_was_looked_at() -> None:
    assert {room(file) for file in FILES} >= {"cli", "ops", *WINGS, *SHELVES, *LEAVES}


def test_the_command_line_and_the_leaves_load_nothing_heavy() -> None:
    light = [found for found in ALL if room(found.file) in ("cli", "__init__", "__main__", *LEAVES)]
    assert light
    wrong = [found for found in light if found.at_load and found.top in HEAVY]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_leaves_need_the_standard_library_alone() -> None:
    wrong = [
        found
        for found in ALL
        if room(found.file) in LEAVES and found.top != "nsa_cli" and found.top not in sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("package", "home"), [("rich", "cli/output.py"), ("typer", "cli"), ("click", "nowhere"), ("triton", "ops/triton")]
)
def test_a_package_with_one_home_is_imported_nowhere_else(package: str, home: str) -> None:
    wrong = [found for found in ALL if found.top == package and not found.file.is_relative_to(PACKAGE / home)]
    assert not wrong, "\n".join(map(str, wrong))


def test_help_loads_no_torch_numpy_triton_or_rotary_package() -> None:
    program = (
        "import sys\nfrom nsa_cli.cli.app import run\n"
        "code = run(['--help'])\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert code == 0 and not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("train", "sample", "bench", "inspect"))


def test_sampling_and_inspecting_on_a_cpu_load_no_compiler(tmp_path: Path) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "ckpt.safetensors"))
    for command in (["sample", checkpoint, "--max-tokens", "2"], ["inspect", checkpoint]):
        program = (
            "import sys\nfrom nsa_cli.cli.app import run\n"
            f"assert run({[*command, '--device', 'cpu']!r}) == 0\n"
            "heavy = [name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'triton') if name in sys.modules]\n"
            "assert not heavy, heavy\n"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, input=b"hi", env=environment(), cwd=ROOT)
        assert result.returncode == 0, result.stderr.decode()
