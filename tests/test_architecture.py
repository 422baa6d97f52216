"""The import arrows, the sizes and the public surface, read from the source with `ast`.

    raise_kernels  <-  raise_core.ops  <-  raise_core  <-  raise_trainer        nobody imports bench or tests

Each check is a function of a root folder that returns what it found wrong, so that `BAD` can show it to fail.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "raise_kernels": "kernels/raise_kernels",
    "raise_core": "raise_core",
    "raise_trainer": "trainer/raise_trainer",
}
OTHERS = ("bench", "tests", "examples", "setup.py")
FORBIDDEN = {
    "raise_kernels": {"raise_core", "raise_trainer", "transformers", "bench", "tests", "kernels"},
    "raise_core": {"raise_trainer", "bench", "tests", "kernels", "trainer"},
    "raise_trainer": {"raise_kernels", "bench", "tests", "kernels", "trainer"},
}
# What `import raise_core` may need: everything else is imported where it is used.
BASE_INSTALL = {"torch", "raise_core"}
MAX_FILE, AIM_MEDIAN, MAX_P95, MAX_KERNEL = 400, 120, 60, 90


def sources(root: Path, *folders: str) -> list[Path]:
    """The .py files of some folders (or single files) under the root, sorted; a missing folder holds none."""
    found = [
        path
        for folder in folders
        for path in ([root / folder] if folder.endswith(".py") else (root / folder).rglob("*.py"))
        if path.is_file()
    ]
    return sorted(found)


def imports(path: Path, package_root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file: relative ones resolved, dynamic literals too."""
    package = path.relative_to(package_root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def arrow_faults(root: Path) -> list[str]:
    """Imports that go against the arrows, and doors between the packages other than raise_core/ops/."""
    faults, doors = [], set()
    for package, folder in PACKAGES.items():
        for path in sources(root, folder):
            for line, name in imports(path, (root / folder).parent):
                top, where = name.partition(".")[0], f"{path.relative_to(root)}:{line}"
                if top in FORBIDDEN[package]:
                    faults.append(f"{where}: {package} imports {name}")
                if package == "raise_core" and top == "raise_kernels":
                    doors.add(path.parent.relative_to(root).as_posix())
                reads_meaning = name.startswith("raise_kernels.reference")
                if package == "raise_kernels" and reads_meaning and not is_meaning(path):
                    faults.append(f"{where}: a kernel file imports the reference")
    if doors != {"raise_core/ops"}:
        faults.append(f"raise_kernels is to be imported in raise_core/ops alone, not in {sorted(doors)}")
    return faults


def is_meaning(path: Path) -> bool:
    """The reference itself (it may be several files), and the façade that lists it."""
    return path.stem.startswith("reference") or path.name == "__init__.py"


def weight_faults(root: Path) -> list[str]:
    """Module-level imports of raise_core from outside the base install."""
    faults = []
    for path in sources(root, "raise_core"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top not in BASE_INSTALL | {"raise_kernels"} | sys.stdlib_module_names:
                    faults.append(f"{path.relative_to(root)}:{node.lineno}: imports {name} on import")
    return faults


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def function_lengths(root: Path, *, kernels: bool) -> dict[str, int]:
    """Lines of each function from its `def` to its end, docstring included; @triton.jit kernels apart."""
    return {
        f"{path.relative_to(root)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno)
        - node.lineno
        + 1
        for path in sources(root, *PACKAGES.values())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_kernel(node) == kernels
    }


def size_faults(root: Path) -> list[str]:
    """Files over 400 lines; kernels over 90 lines; 95th percentile of the other functions over 60."""
    faults = [
        f"{path.relative_to(root)} has {lines} lines, at most {MAX_FILE} wanted"
        for path in sources(root, *PACKAGES.values(), *OTHERS)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE
    ]
    for name, lines in function_lengths(root, kernels=True).items():
        if lines > MAX_KERNEL:
            faults.append(f"{name} is a kernel of {lines} lines, at most {MAX_KERNEL} wanted")
    lengths = function_lengths(root, kernels=False)
    if (p95 := percentile_95(list(lengths.values()))) > MAX_P95:
        longest = sorted(lengths, key=lengths.__getitem__)[-3:]
        faults.append(
            f"95th percentile of function length is {p95:.0f}, at most {MAX_P95} wanted; longest: {longest}"
        )
    return faults


def percentile_95(values: list[int]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else float(sum(values))


def documented(path: Path, root: Path) -> Iterator[str]:
    """Faults of one file's public functions, classes and methods: no docstring, or a missing annotation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if ast.get_docstring(tree) is None:
        yield f"{path.relative_to(root)}: no module docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}: no docstring"
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield from function_faults(
                        method, f"{path.relative_to(root)}:{method.lineno} {node.name}.", True
                    )
        elif isinstance(node, ast.FunctionDef):
            yield from function_faults(node, f"{path.relative_to(root)}:{node.lineno} ", False)


def function_faults(node: ast.FunctionDef, where: str, is_method: bool) -> Iterator[str]:
    """A dunder needs annotations and no docstring; a kernel's pointers have no types to write."""
    dunder = node.name.startswith("__") and node.name.endswith("__")
    if node.name.startswith("_") and not dunder:
        return
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if not dunder and "overload" not in decorators and ast.get_docstring(node) is None:
        yield f"{where}{node.name}: no docstring"
    if is_kernel(node):
        return
    positional = [*node.args.posonlyargs, *node.args.args]
    if is_method and "staticmethod" not in decorators:
        positional = positional[1:]
    every = [*positional, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    for argument in every:
        if argument is not None and argument.annotation is None:
            yield f"{where}{node.name}: {argument.arg} has no annotation"
    if node.returns is None and node.name != "__init__":
        yield f"{where}{node.name}: no return annotation"


def doc_faults(root: Path) -> list[str]:
    """Public names of the three packages without a docstring or an annotation."""
    return [fault for path in sources(root, *PACKAGES.values()) for fault in documented(path, root)]


def tolerance_faults(root: Path) -> list[str]:
    """Literal tolerances other than 0 in tests; only tests/budget.py may hold them."""
    faults = []
    for path in sources(root, "tests"):
        if path.name == "budget.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.keyword) or node.arg not in (
                "atol",
                "rtol",
                "abs_tol",
                "rel_tol",
                "abs",
                "rel",
            ):
                continue
            if isinstance(node.value, ast.Constant) and node.value.value != 0:
                faults.append(
                    f"{path.relative_to(root)}:{node.value.lineno}: {node.arg}={node.value.value!r}"
                )
    return faults


CHECKS = [arrow_faults, weight_faults, size_faults, doc_faults, tolerance_faults]


@pytest.mark.parametrize("check", CHECKS)
def test_source(check) -> None:
    faults = check(ROOT)
    assert not faults, "\n".join(faults)


def test_sizes_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in sources(ROOT, *PACKAGES.values())]
    functions = list(function_lengths(ROOT, kernels=False).values())
    assert lines and functions
    report = (
        f"source: {len(lines)} files, median {median(lines):.0f} lines (aim <= {AIM_MEDIAN}), "
        f"longest {max(lines)}; {len(functions)} functions, median {median(functions):.0f} lines, "
        f"95th percentile {percentile_95(functions):.0f}"
    )
    with capsys.disabled():
        print(f"\n{report}")


def test_public_names_resolve() -> None:
    module = importlib.import_module("raise_core")
    assert module.__all__, "raise_core.__all__ is empty"
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


GOOD = {
    "raise_core/__init__.py": '"""Doc."""\n',
    "raise_core/ops/stats.py": '"""Doc."""\n\nimport raise_kernels\n',
    "kernels/raise_kernels/__init__.py": '"""Doc."""\n\nfrom raise_kernels.reference import x\n',
    "kernels/raise_kernels/reference.py": '"""Doc."""\n\nimport torch\n\nx = 1\n',
}
LONG = '"""Doc."""\n\n\ndef _f() -> None:\n' + "    pass\n" * 61
BAD = {
    # check, file, its text, part of the fault
    "up": (
        arrow_faults,
        "kernels/raise_kernels/a.py",
        "import raise_core",
        "raise_kernels imports raise_core",
    ),
    "up, from": (
        arrow_faults,
        "kernels/raise_kernels/a.py",
        "from raise_trainer import x",
        "imports raise_trainer.x",
    ),
    "up, deferred": (
        arrow_faults,
        "kernels/raise_kernels/a.py",
        "def f():\n    import transformers",
        "imports transformers",
    ),
    "up, dynamic": (
        arrow_faults,
        "raise_core/a.py",
        "importlib.import_module('raise_trainer.cli')",
        "raise_trainer.cli",
    ),
    "folder name": (
        arrow_faults,
        "raise_core/a.py",
        "import kernels.raise_kernels",
        "imports kernels.raise_kernels",
    ),
    "second door": (
        arrow_faults,
        "raise_core/a.py",
        "import raise_kernels",
        "['raise_core', 'raise_core/ops']",
    ),
    "no door": (arrow_faults, "raise_core/ops/stats.py", "", "not in []"),
    "past the core": (
        arrow_faults,
        "trainer/raise_trainer/a.py",
        "import raise_kernels",
        "raise_trainer imports",
    ),
    "bench": (arrow_faults, "trainer/raise_trainer/a.py", "from bench import x", "imports bench.x"),
    "tests": (arrow_faults, "raise_core/a.py", "from tests.budget import x", "imports tests.budget.x"),
    "reference": (
        arrow_faults,
        "kernels/raise_kernels/a.py",
        "from raise_kernels.reference import x",
        "reference",
    ),
    "reference, relative": (
        arrow_faults,
        "kernels/raise_kernels/a.py",
        "from . import reference",
        "reference",
    ),
    "reference, deeper": (
        arrow_faults,
        "kernels/raise_kernels/b/a.py",
        "from ..reference import x",
        "reference",
    ),
    "heavy": (
        weight_faults,
        "raise_core/a.py",
        "from transformers import x",
        "imports transformers on import",
    ),
    "heavy, plain": (weight_faults, "raise_core/a.py", "import numpy as np", "imports numpy on import"),
    "file": (size_faults, "bench/a.py", "x = 1\n" * 401, "bench/a.py has 401 lines"),
    "function": (size_faults, "raise_core/a.py", LONG, "95th percentile of function length is 62"),
    "kernel": (
        size_faults,
        "kernels/raise_kernels/a.py",
        "@triton.jit\ndef f():\n" + "    pass\n" * 90,
        "is a kernel of 91 lines",
    ),
    "module undocumented": (doc_faults, "raise_core/a.py", "x = 1", "no module docstring"),
    "function undocumented": (
        doc_faults,
        "raise_core/a.py",
        '"""D."""\ndef f() -> None: ...',
        "f: no docstring",
    ),
    "class undocumented": (
        doc_faults,
        "kernels/raise_kernels/a.py",
        '"""D."""\nclass A: ...',
        "A: no docstring",
    ),
    "method undocumented": (
        doc_faults,
        "raise_core/a.py",
        '"""D."""\nclass A:\n    """D."""\n    def f(self) -> None: ...',
        "A.f: no docstring",
    ),
    "argument": (
        doc_faults,
        "raise_core/a.py",
        '"""D."""\ndef f(x, *, y: int) -> None:\n    """D."""',
        "x has no annotation",
    ),
    "return": (
        doc_faults,
        "raise_core/a.py",
        '"""D."""\ndef f(x: int):\n    """D."""',
        "f: no return annotation",
    ),
    "tolerance": (tolerance_faults, "tests/test_a.py", "assert_close(a, b, atol=1e-3, rtol=0)", "atol=0.001"),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_good_tree_passes(tmp_path: Path) -> None:
    write_tree(tmp_path, GOOD)
    assert [fault for check in CHECKS for fault in check(tmp_path)] == []


@pytest.mark.parametrize("case", BAD)
def test_bad_tree_fails(case: str, tmp_path: Path) -> None:
    check, name, text, expected = BAD[case]
    write_tree(tmp_path, {**GOOD, name: text})
    faults = check(tmp_path)
    assert len(faults) == 1
    assert expected in faults[0]
