"""`raise-core doctor`: what is installed, what a run would use, the command that mends what is missing.

Needs nothing but the standard library to start: it is run where something else is missing.
"""

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

TRAIN, GPU = "pip install -e '.[train]'", "pip install -e '.[gpu]'"
# What the trainer needs, as setup.py lists it; tests/trainer/test_doctor.py compares the two.
NEEDED = (
    "torch", "transformers", "torchvision", "accelerate", "peft", "rouge-score", "jiwer", "safetensors",
    "numpy", "pillow", "pydantic", "pyyaml", "rich", "tyro", "jinja2", "matplotlib",
)  # fmt: skip
ON_GPU = ("triton", "flash-attn", "liger-kernel")


@dataclass(frozen=True)
class Finding:
    """One line: what, how it stands, and the command that mends it ("" when nothing is to be done)."""

    name: str
    state: str
    fix: str = ""


def installed(package: str) -> str:
    """Its version, "" when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def packages() -> Iterator[Finding]:
    """Python and the packages the trainer needs."""
    yield Finding("python", platform.python_version())
    for name in NEEDED:
        found = installed(name)
        yield Finding(name, found) if found else Finding(name, "not installed", TRAIN)


def gpu() -> Iterator[Finding]:
    """The GPUs, and the packages that are for them."""
    import torch

    there = torch.cuda.is_available()
    if not there:
        built = torch.version.cuda or torch.version.hip or "the CPU alone"
        yield Finding("GPU", f"none visible to torch (built for {built}); runs on the CPU")
    for i in range(torch.cuda.device_count() if there else 0):
        about = torch.cuda.get_device_properties(i)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use dtype=float32"
        yield Finding(f"GPU {i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}")
    for name in ON_GPU:
        found = installed(name)
        if found or not there:
            yield Finding(name, found or "not installed, and not needed without a GPU")
        else:
            yield Finding(name, "not installed", GPU)


def attention() -> Iterator[Finding]:
    """What a model's attention runs on."""
    import torch

    if torch.cuda.is_available():
        on = torch.backends.cuda
        kinds = {
            "flash": on.flash_sdp_enabled() and on.is_flash_attention_available(),
            "memory-efficient": on.mem_efficient_sdp_enabled(),
            "cuDNN": on.cudnn_sdp_enabled(),
            "plain": on.math_sdp_enabled(),
        }
        backends = ", ".join(name for name, enabled in kinds.items() if enabled)
    else:
        backends = "the CPU's"
    yield Finding("attention", f"sdpa (default), eager or flash; sdpa may use {backends} kernels")


def kernels() -> Iterator[Finding]:
    """Which implementation the reward operations choose, and the C code behind the CPU's."""
    import torch

    import raise_core as rc
    from raise_core.ops.impl import kernels as module

    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fallback, which the line says
            chosen = rc.chosen_impl(torch.zeros(1, device=kind))
        fix = GPU if kind == "cuda" and chosen == "reference" else ""
        yield Finding(f"kernels on {kind}", chosen, fix)
    compiled = module("_compiled")
    compiler = compiled.find_compiler()
    if compiler is None:
        yield Finding("C compiler", "none; the CPU runs slower PyTorch code", "apt install gcc")
        return
    yield Finding("C compiler", " ".join(compiler))
    if os.environ.get(compiled.SWITCH) == "0":
        yield Finding("compiled kernels", f"turned off by {compiled.SWITCH}=0", f"unset {compiled.SWITCH}")
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = compiled.library("token_stats") is not None
    if loaded:
        yield Finding("compiled kernels", "load")
    else:
        reason = str(said[0].message).splitlines()[0] if said else "they do not load"
        yield Finding("compiled kernels", reason[:200], "CC=clang raise-core doctor")


def decoders() -> Iterator[Finding]:
    """The video decoders, in the order in which they are tried."""
    from .media.decoders import DECODERS

    packages = {"decord": "decord", "torchcodec": "torchcodec", "pyav": "av"}
    missing = {name: decoder.missing for name, decoder in DECODERS.items()}
    for name, why in missing.items():
        state = f"{installed(packages[name])} {why}".strip()
        # torchcodec is extra: the others read what it reads
        yield Finding(f"decoder {name}", state, TRAIN if why and name != "torchcodec" else "")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, gpu, attention, kernels, decoders)


def examine() -> list[Finding]:
    """Every finding; a check that cannot run is one itself."""
    found = list[Finding]()
    for check in CHECKS:
        try:
            found += check()
        except (ImportError, OSError, RuntimeError) as error:
            found.append(Finding(check.__name__, f"cannot be examined: {error}", TRAIN))
    return found


def run_doctor() -> None:
    """Print what was found, and under it the commands that mend it."""
    found = examine()
    width = max(len(finding.name) for finding in found)
    for finding in found:
        mark = "!" if finding.fix else " "
        print(f"{mark} {finding.name:<{width}}  {finding.state}")
    fixes = dict.fromkeys(finding.fix for finding in found if finding.fix)
    if not fixes:
        print("\nNothing is missing.")
        return
    print("\nTo mend what is marked:")
    for fix in fixes:
        names = ", ".join(finding.name for finding in found if finding.fix == fix)
        print(f"  {fix}    # {names}")
