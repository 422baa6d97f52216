"""`raise-core doctor`: names everything, offers a command for what is missing, and runs where much is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raise_core as rc
from raise_core.ops.impl import kernels as kernel_module
from raise_trainer import doctor
from raise_trainer.media import decoders

ROOT = Path(__file__).resolve().parents[2]


def names(list_name: str) -> set[str]:
    """The packages of a list in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == list_name:
            texts = [e.value for e in node.value.elts if isinstance(e, ast.Constant)]  # type: ignore[attr-defined]
            return {re.match(r"[\w-]+", text)[0].lower() for text in texts}  # type: ignore[index]
    raise AssertionError(list_name)


def test_it_knows_the_packages_of_the_train_extra_and_no_others() -> None:
    wanted = names("TRAIN") | names("VERIFY")
    assert wanted == {*doctor.NEEDED, "decord", "av"} - {"torch"}


def test_here_nothing_needed_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.run_doctor()
    said = capsys.readouterr().out
    for name in ("python", *doctor.NEEDED, "GPU", *doctor.ON_GPU, "attention", "C compiler"):
        assert re.search(rf"^[! ] {re.escape(name)} ", said, re.MULTILINE), name
    assert f"  torch  {torch.__version__.split('+')[0]}" in re.sub(" +", "  ", said)
    assert rc.chosen_impl(torch.zeros(1)) in said
    assert all(f"decoder {name}" in said for name in decoders.DECODERS)


def test_what_is_missing_is_marked_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.version

    def version(name: str) -> str:
        if name in ("jiwer", "peft"):
            raise doctor.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(decoders, "_missing", lambda module: "does not load (x)" if module == "av" else "")
    doctor.run_doctor()
    said = capsys.readouterr().out
    assert "! jiwer " in said and "! decoder pyav" in said and "does not load (x)" in said
    assert "pip install -e '.[train]'    # peft, jiwer, decoder pyav" in said


def test_no_compiler_or_a_broken_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = kernel_module("_compiled")
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    assert [f.fix for f in doctor.kernels() if f.name == "C compiler"] == ["apt install gcc"]
    monkeypatch.setattr(compiled, "find_compiler", lambda: ["false"])
    compiled._load_once.cache_clear()
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    (found,) = [f for f in doctor.kernels() if f.name == "compiled kernels"]
    compiled._load_once.cache_clear()
    assert "could not compile" in found.state and found.fix
    monkeypatch.setenv(compiled.SWITCH, "0")
    (off,) = [f for f in doctor.kernels() if f.name == "compiled kernels"]
    assert off.state == "turned off by RAISE_COMPILED=0" and off.fix == "unset RAISE_COMPILED"


def test_a_gpu_wants_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class About:
        name, total_memory = "H100", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: About)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(doctor, "installed", lambda name: "3.8" if name == "triton" else "")
    found = {f.name: f for f in doctor.gpu()}
    assert found["GPU 0"].state == "H100, 80 GiB, bfloat16"
    assert found["triton"].fix == "" and found["flash-attn"].fix == doctor.GPU == found["liger-kernel"].fix


def test_it_runs_without_torch_and_without_the_rest() -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'numpy', 'pydantic', 'rich', 'yaml', 'tyro', 'av'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "sys.argv = ['raise-core', 'doctor']\n"
        "from raise_trainer.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for check in ("gpu", "attention", "kernels", "decoders"):
        assert re.search(rf"^! {check} +cannot be examined: No module named", done.stdout, re.MULTILINE)
    assert "pip install -e '.[train]'" in done.stdout
