"""The import order of the package: each part imports only from what stands below it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "cond_diffusion"
LEAVES = {"errors", "seeding", "images", "files", "hub", "device"}
# From top to bottom; the parts of one line stand side by side and do not import each other.
ORDER = [{"cli"}, {"evaluation"}, {"training"}, {"pipeline"}, {"data"}, {"models", "diffusion"}, {"config"}, LEAVES]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(file: Path) -> list[str]:
    """Return what a module imports, anywhere in it: of this package the module, of others the name at the top."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from cond_diffusion.config import schedule` imports a module, `from ...schedule import X` a name of one.
            found += [f"{node.module}.{a.name}" if _is_package(node.module) else node.module for a in node.names]
    return found


def _is_package(module: str) -> bool:
    return (PACKAGE.parent / Path(*module.split(".")) / "__init__.py").exists() and module.startswith("cond_diffusion")


def own(imports: list[str]) -> set[str]:
    names = {name_of(file) for file in MODULES}
    return {name.removeprefix("cond_diffusion.") for name in imports if name.startswith("cond_diffusion.")} & names


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_a_module_imports_only_from_below(file: Path):
    part = name_of(file).split(".")[0]
    for other in {name.split(".")[0] for name in own(imports_of(file))} - {part}:
        among_leaves = part in LEAVES and other in LEAVES
        assert LEVEL[other] > LEVEL[part] or among_leaves, f"{name_of(file)} imports {other}"


def test_there_are_no_cycles():
    TopologicalSorter({name_of(file): own(imports_of(file)) for file in MODULES}).prepare()


def test_the_mathematics_knows_tensors_and_options_and_nothing_else():
    allowed = {"torch", "jaxtyping", "cond_diffusion"}
    for file in (PACKAGE / "diffusion").glob("*.py"):
        others = {name.split(".")[0] for name in imports_of(file)} - allowed
        assert others <= sys.stdlib_module_names, file.name


def test_options_import_no_torch():
    for file in (PACKAGE / "config").glob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(file)} & {"torch", "transformers", "accelerate"}


def test_the_top_level_holds_what_it_should():
    there = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert there == {f"{leaf}.py" for leaf in LEAVES} | {part for parts in ORDER[:-1] for part in parts} | {"assets"}
