"""Imports only go down the floors that CONTRIBUTING.md lists."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def floors() -> dict[str, int]:
    """{"lumen.sparse": 5, ...}; "then" within a floor makes a storey of its own."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = re.findall(r"^\d\. (.*`.*)$", text, re.MULTILINE)
    storeys = [part for line in lines for part in line.split(", then ")]
    places = {name: place for place, storey in enumerate(storeys) for name in re.findall(r"`([^`]+)`", storey)}
    return {name.removesuffix(".py"): place for name, place in places.items()}


def floor_of(module: str, known: dict[str, int]) -> int | None:
    return next((place for name, place in known.items() if f"{module}.".startswith(f"{name}.")), None)


def imported(path: pathlib.Path) -> set[str]:
    """The modules of ours that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("lumen", "pallas_kernels", "train", "evaluate")}


def test_imports_go_down():
    known = floors()
    assert {"pallas_kernels", "lumen.training", "train", "lumen.cli"} <= known.keys()
    files = [*ROOT.glob("lumen/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    wrong = []
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module == "lumen":
            assert not imported(path)
            continue
        own = floor_of(module, known)
        assert own is not None, f"CONTRIBUTING.md gives {module} no floor"
        for name in sorted(imported(path)):
            below = floor_of(name, known)
            if below is None or below > own:
                wrong.append(f"{module} imports {name}")
    assert wrong == []
