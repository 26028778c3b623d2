"""Imports run downward only: cli -> analysis -> training -> models -> fusion -> nn -> ops -> primitives -> kernels, extension."""

import ast
from pathlib import Path

import pytest

import resnet_fused

PACKAGE = Path(resnet_fused.__file__).parent
# The floor of each part of the package; a module may import from its own part and from lower floors.
FLOORS = {
    "train": 10, "__main__": 10,  # the command's other doors: python -m resnet_fused.train, python -m resnet_fused
    "cli": 9,
    "analysis": 8,  # measures what training does
    "training": 7, "doctor": 7,
    "models": 6,
    "fusion": 5.5,  # models fuses the nets whose units have no fused twin of their own
    "nn": 5,
    "functional": 4,
    "ops": 3,
    "primitives": 2,
    "cuda_kernels": 1.5,  # the operators that extension loads, and what they decline
    "triton_kernels": 1, "extension": 1,
    "version": 0, "_C": 0,
}  # fmt: skip
ROOT_MODULE = ""  # resnet_fused/__init__.py gathers what is public, from any floor


def part_of(module: str) -> str:
    """The part that a dotted name under resnet_fused belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else ROOT_MODULE


def module_name(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything of this package that a file imports, wherever the statement stands."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` may name a module: judge it by its full name.
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "resnet_fused"}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_downward(path):
    part = part_of(module_name(path))
    if part == ROOT_MODULE:
        return
    assert part in FLOORS, f"{part} has no floor: put it into FLOORS and into docs/design.md"
    upward = {
        name for name in imports_of(path)
        if part_of(name) in FLOORS and part_of(name) != part and FLOORS[part_of(name)] >= FLOORS[part]
    }
    assert not upward, f"{module_name(path)} imports {sorted(upward)}, which is not below it"


def test_the_check_can_fail(tmp_path, monkeypatch):
    bad = tmp_path / "resnet_fused" / "primitives" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from ..nn import units\nfrom resnet_fused.models import create_model\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "resnet_fused")
    assert imports_of(bad) == {"resnet_fused.nn.units", "resnet_fused.models.create_model"}
    with pytest.raises(AssertionError, match="not below it"):
        test_imports_run_downward(bad)
