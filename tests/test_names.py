"""The folder `kernels/` owns no module, and `import raise_core` is light and changes nothing global.

Hugging Face ships a package called `kernels`, which transformers looks for on import: a regular package of
ours by that name would answer in its place and break `from transformers import ...`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT, SLACK = 0.050, 2  # seconds

# Gives all that transformers takes from such a package: decorators that change nothing, classes of anything.
STAND_IN = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""
LLAMA = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__module__)"


def python(code: str, *, path: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose first import folder is `cwd`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(code: str, *, path: Path | None = None, cwd: Path = ROOT) -> str:
    done = python(code, path=path, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def stand_in(site: Path) -> Path:
    """A distribution called `kernels`, of a version that the installed transformers imports from."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    info = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    return site


def released(site: Path) -> Path:
    """The newest release of Hugging Face's package, without what it needs in turn."""
    options = ["--quiet", "--no-deps", "--retries", "0", "--timeout", "15", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"Hugging Face `kernels` cannot be installed here: {done.stderr.strip()[-200:]}")
    return site


def test_the_folder_is_no_regular_package() -> None:
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        assert ROOT not in Path(spec.origin).parents
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "trainer" / "__init__.py").exists()


def test_transformers_without_hugging_face_kernels() -> None:
    """In this process: the repository root is on its path, as for `python -m` and `python -c`."""
    assert str(ROOT) in sys.path
    if any(found.metadata["Name"] == "kernels" for found in distributions(name="kernels")):
        pytest.skip("Hugging Face `kernels` is installed here")
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.__module__ == "transformers.models.llama.modeling_llama"


@pytest.mark.parametrize("install", [stand_in, released])
def test_transformers_with_hugging_face_kernels(install, tmp_path: Path) -> None:
    site = install(tmp_path / "site")
    where = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert output(f"{where}; {LLAMA}", path=site).splitlines() == [
        str(site / "kernels" / "__init__.py"),
        "transformers.models.llama.modeling_llama",
    ]


def test_the_stand_in_shows_a_shadow(tmp_path: Path) -> None:
    """With `kernels/__init__.py` in the folder one runs from, the same import fails."""
    root = tmp_path / "root"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "__init__.py").touch()
    done = python(LLAMA, path=stand_in(tmp_path / "site"), cwd=root)
    assert done.returncode != 0
    assert str(root / "kernels" / "__init__.py") in done.stderr


def test_imported_by_the_folder_name() -> None:
    done = python("import kernels.raise_kernels")
    assert done.returncode != 0
    assert "imported as 'kernels.raise_kernels'; the package is called 'raise_kernels'" in done.stderr


# Prints what `import raise_core` did, as JSON. Everything outside the base install is refused, as if missing.
INSPECT = """
import json, logging, os, sys, threading, time, warnings
import torch

class Missing:
    names = set("triton transformers tokenizers torchvision rouge_score jiwer decord av numpy matplotlib "
                "safetensors rich jinja2 raise_trainer".split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def callables():
    for name, module in list(sys.modules.items()):
        for key, value in list(vars(module).items()):
            if callable(value):
                yield f"{name}.{key}", value
            if type in type(value).__mro__ and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    if callable(member) or hasattr(type(member), "__get__"):
                        yield f"{name}.{key}.{inner}", member

def settings():
    return [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            list(warnings.filters), list(logging.getLogger().handlers), logging.getLogger().level,
            threading.active_count(), dict(os.environ), list(sys.meta_path), list(sys.path)]

def cpu_seconds():
    read, write = os.pipe()
    if os.fork() == 0:
        start = time.process_time()
        import raise_core
        os.write(write, str(time.process_time() - start).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 100))

sys.meta_path.insert(0, Missing())
costs = [cpu_seconds() for _ in range(8)]
modules, things, state = set(sys.modules), dict(callables()), settings()
import raise_core
now = dict(callables())
print(json.dumps({
    "loaded": list({name.partition(".")[0] for name in set(sys.modules) - modules} - sys.stdlib_module_names),
    "patched": [name for name, thing in things.items() if now.get(name) is not thing],
    "settings kept": settings() == state,
    "cost": min(costs),
}))
"""

PATCHING = """
import time, torch, colorsys, pytest
torch.nn.functional.softmax = colorsys.rgb_to_hsv
torch.nn.Module.forward = lambda self: None
torch.set_default_dtype(torch.float64)
until = time.process_time() + 0.15
while time.process_time() < until: pass
"""


def test_import_of_raise_core() -> None:
    """It needs torch alone, changes no function, class or setting, and costs < 50 ms beyond torch.

    The cost is CPU time in forked processes, the least of several, with slack for a machine under load, where
    it has been seen to double.
    """
    seen = json.loads(output(INSPECT))
    assert set(seen["loaded"]) <= {"raise_core", "raise_kernels", "torch"}
    assert seen["patched"] == []
    assert seen["settings kept"]
    assert seen["cost"] < LIMIT * SLACK


def test_the_inspection_sees_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "raise_core.py").write_text(PATCHING, encoding="utf-8")
    seen = json.loads(output(INSPECT, cwd=tmp_path))
    assert "pytest" in seen["loaded"]
    assert {"torch.nn.functional.softmax", "torch.nn.modules.module.Module.forward"} <= set(seen["patched"])
    assert not seen["settings kept"]
    assert seen["cost"] > LIMIT * SLACK
