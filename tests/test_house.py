"""The rooms of the house: who may import what. import-linter holds the arrows (`make lint`); here
are the faces: a room of the engine is entered through its `__init__`, never through its files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import holdfast

PACKAGE = Path(holdfast.__file__).parent
ENGINE = [
    *sorted((PACKAGE / "checkpoint").glob("*/__init__.py")),
    PACKAGE / "prove" / "__init__.py",
    PACKAGE / "training" / "inference" / "__init__.py",
]
OTHERS = [
    PACKAGE / room / "__init__.py"
    for room in (
        "training",
        "training/options",
        "training/text",
        "manage",
        "monitor",
        "monitor/terminal",
        "monitor/web",
        "exchange",
        "serving",
        "serving/engine",
        "serving/api",
        "adapters",
        "cli",
    )
]


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each `from module import name` of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name


def _face(path: Path) -> list[str]:
    """Return the `__all__` of a room."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} does not say what the room is for"
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert isinstance(names, list)
    return names


def _entered_past_the_face(face: Path, *, by_module: bool) -> list[str]:
    """Return the imports from outside a room that its face does not allow."""
    names = _face(face)
    room = ".".join(("holdfast", *face.parent.relative_to(PACKAGE).parts))
    allowed = {f"{room}.{name}" for name in names} if by_module else set()
    for name in names:  # a room within this one has a face of its own
        inner = face.parent / name / "__init__.py"
        if by_module and inner.is_file():
            allowed |= {f"{room}.{name}.{module}" for module in _face(inner)}
    return [
        f"{path.relative_to(PACKAGE)}: from {module} import {name}"
        for path in PACKAGE.rglob("*.py")
        if face.parent not in path.parents
        for module, name in _imports(path)
        if (module.startswith(room + ".") and module not in allowed)
        or (module == room and name not in names)
    ]


def test_a_room_of_the_engine_is_entered_through_its_face_never_through_its_files() -> None:
    wrong = [line for face in ENGINE for line in _entered_past_the_face(face, by_module=False)]
    assert not wrong, "\n".join(wrong)


def test_of_the_other_rooms_only_the_modules_that_the_face_names_are_imported() -> None:
    """Their faces name modules, not names: each command loads only what it needs."""
    wrong = [line for face in OTHERS for line in _entered_past_the_face(face, by_module=True)]
    assert not wrong, "\n".join(wrong)


def test_a_face_that_names_what_is_not_there_is_found() -> None:
    for face in OTHERS:
        missing = [n for n in _face(face) if not _is_module(face.parent / n)]
        assert not missing, f"{face}: {missing}"


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_few_files_lie_flat_in_a_room_of_the_engine() -> None:
    crowded = {
        str(face.parent): count
        for face in ENGINE
        if (count := len([p for p in face.parent.glob("*.py") if p != face])) > 12
    }
    assert not crowded
