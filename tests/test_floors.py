"""The order of the rooms: every import goes down, none goes in a circle, and no folder is a hall."""

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# From the ground up. Rooms on one floor do not import each other; llada_jax itself, the front door, may import all.
FLOORS = (
    ("_moved", "config_renames", "errors", "plots", "token_text"),
    ("chat_template", "chips", "config_flag", "folder", "runtime", "sharding"),
    ("attention", "command_line", "config_fields", "micro_batches", "tokenizer"),
    ("data", "model"),
    ("checkpoint", "diffusion", "sampling"),
    ("evaluation", "interop", "monitoring", "serving"),
    ("reinforcement",),
    ("training",),
    ("pod", "train"),
    ("bench",),
)
MOST_FILES = 20


def modules(root: Path) -> dict[str, Path]:
    """{dotted name: file} of the package in `root`."""
    files = (root / "llada_jax").rglob("*.py")
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    targets = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {name if name in known else node.module for name in names}
    return {target for target in targets if target in known and target != "llada_jax"}


def climbs(root: Path, floors=FLOORS) -> list[str]:
    """ "MODULE imports MODULE" for every import between rooms that does not go down a floor."""
    known = modules(root)
    floor = {room: i for i, rooms in enumerate(floors) for room in rooms}
    return [
        f"{module} imports {target}"
        for module, file in known.items()
        if module != "llada_jax"
        for target in imports_of(file, known)
        if room_of(module) != room_of(target) and floor[room_of(module)] <= floor[room_of(target)]
    ]


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in modules(ROOT) if module != "llada_jax"}
    assert rooms == {room for rooms in FLOORS for room in rooms}


def test_no_import_goes_up_or_across():
    assert climbs(ROOT) == []


@pytest.mark.parametrize(
    "line", ["from llada_jax.b import two", "import llada_jax.b.two", "    import llada_jax.b.two"]
)
def test_an_import_that_climbs_is_found(tmp_path, line):
    for room, name, text in (("a", "one", f"if 1:\n    pass\n    {line.strip()}\n"), ("b", "two", "")):
        (tmp_path / "llada_jax" / room).mkdir(parents=True)
        (tmp_path / "llada_jax" / room / f"{name}.py").write_text(text)
    assert climbs(tmp_path, (("a",), ("b",))) == climbs(tmp_path, (("a", "b"),)) != []
    assert climbs(tmp_path, (("b",), ("a",))) == []


@pytest.mark.parametrize("top", ["llada_jax", "configs", "experiments", "tests", "tools"])
def test_no_folder_has_more_than_twenty_files(top):
    for folder in [ROOT / top, *(ROOT / top).rglob("*/")]:
        if "__pycache__" not in folder.parts and "goldens" not in folder.parts:
            files = [file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".pyc"]
            assert len(files) <= MOST_FILES, f"{folder}: {len(files)} files"
