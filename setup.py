"""Packages, extras and the one `package_dir` line.

`kernels/` and `trainer/` are plain folders, not packages: a top-level package called `kernels` would shadow
Hugging Face's `kernels` and break `from transformers import ...` (see DESIGN.md, section 5).
"""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds: the oldest versions the tests run with, which are the newest that Python 3.10 can have of
# av, matplotlib and transformers.
TRITON = "triton>=3.8; platform_system == 'Linux'"
TRL = "trl>=1.16; python_version >= '3.11'"
VERIFY = ["rouge-score>=0.1.2", "jiwer>=4.0"]
TRAIN = [
    *VERIFY,
    "transformers>=5.20",
    "torchvision>=0.29",
    "decord>=0.6",
    "av>=17.1",
    "safetensors>=0.8",
    "pydantic>=2.14",
    "pyyaml>=6.0",
    "accelerate>=1.15",
    "peft>=0.21.2",
    "rich>=15.0",
    "jinja2>=3.1",
    "matplotlib>=3.10",
    "numpy>=2.0",
    "pillow>=12.0",
    "tyro>=1.0",
]

setup(
    name="raise-core",
    version="0.1.0",
    description="Fused reward kernels and a compact GRPO trainer for (video) language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["raise_core", "raise_core.*"]),
        *find_packages("kernels", include=["raise_kernels", "raise_kernels.*"]),
        *find_packages("trainer", include=["raise_trainer", "raise_trainer.*"]),
    ],
    package_dir={"raise_kernels": "kernels/raise_kernels", "raise_trainer": "trainer/raise_trainer"},
    package_data={
        "raise_core": ["py.typed"],
        "raise_kernels": ["py.typed", "csrc/*"],
        "raise_trainer": ["py.typed", "templates/*", "templates/prompts/*"],
    },
    install_requires=["torch>=2.14"],
    extras_require={
        "train": TRAIN,
        "trl": [TRL],
        "gpu": [TRITON, "flash-attn>=2.8", "liger-kernel>=0.6"],
        "bench": [
            TRITON,
            "pytest>=9.0",
            "pytest-benchmark>=5.2",
            "matplotlib>=3.10",
            "rich>=15.0",
            "transformers>=5.20",
            # what is compared with: the versions that were run
            TRL,
            "liger-kernel>=0.8.5; platform_system == 'Linux'",
            "cut-cross-entropy>=25.1.1; platform_system == 'Linux'",
        ],
        "test": [
            *TRAIN,
            TRITON,
            "pytest>=9.0",
            "pytest-benchmark>=5.2",
            "pytest-xdist>=3.8",
            TRL,
            "hypothesis>=6.150",
            # linters at one minor version: a newer one may find fault with code that nobody touched
            "ruff==0.17.*",
            "mypy==2.4.*",
            # tests/test_packaging.py builds without a network, so the build backend has to be there already
            "build>=1.2",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["raise-core = raise_trainer.cli:main"]},
)
