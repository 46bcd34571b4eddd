"""The import order of the package: each part imports only from the levels below it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "cond_diffusion"
LEAVES = {"errors", "seeding", "images", "files", "hub", "device"}
# From top to bottom; parts on the same level do not import each other.
ORDER = [{"cli"}, {"evaluation"}, {"training"}, {"pipeline"}, {"data"}, {"models", "diffusion"}, {"config"}, LEAVES]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(file: Path) -> list[str]:
    """Return the modules that a file imports, including imports inside functions."""
    imports: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: relative import"
            assert node.module is not None
            # `from cond_diffusion.config import schedule` imports a module, `from ...schedule import X` a name in it.
            imports += [f"{node.module}.{a.name}" if _is_package(node.module) else node.module for a in node.names]
    return imports


def _is_package(module: str) -> bool:
    return (PACKAGE.parent / Path(*module.split(".")) / "__init__.py").exists() and module.startswith("cond_diffusion")


def within_package(imports: list[str]) -> set[str]:
    names = {name_of(file) for file in MODULES}
    return {name.removeprefix("cond_diffusion.") for name in imports if name.startswith("cond_diffusion.")} & names


def test_modules_import_only_from_lower_levels():
    for file in MODULES:
        part = name_of(file).split(".")[0]
        for other in {name.split(".")[0] for name in within_package(imports_of(file))} - {part}:
            assert LEVEL[other] > LEVEL[part] or {part, other} <= LEAVES, f"{name_of(file)} imports {other}"


def test_imports_have_no_cycles():
    TopologicalSorter({name_of(file): within_package(imports_of(file)) for file in MODULES}).prepare()


def test_diffusion_imports_only_torch_and_this_package():
    allowed = {"torch", "jaxtyping", "cond_diffusion"}
    for file in (PACKAGE / "diffusion").glob("*.py"):
        others = {name.split(".")[0] for name in imports_of(file)} - allowed
        assert others <= sys.stdlib_module_names, file.name


def test_config_does_not_import_torch():
    for file in (PACKAGE / "config").glob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(file)} & {"torch", "transformers", "accelerate"}


def test_package_contains_only_known_parts():
    assert len(MODULES) <= 50
    parts_on_disk = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert parts_on_disk == {f"{leaf}.py" for leaf in LEAVES} | {*LEVEL} - LEAVES | {"assets", "py.typed"}


def test_text_files_are_opened_with_a_named_encoding():
    """The locale's may be another; ruff's PLW1514 does not see the methods of paths."""
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                names = {keyword.arg for keyword in node.keywords}
                assert node.func.attr not in ("read_text", "write_text") or "encoding" in names, f"{file}:{node.lineno}"
