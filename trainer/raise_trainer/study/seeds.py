"""What all arms of a seed share: data, prompts, and the warm-started model, each made once and kept."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from .. import tiny
from ..config import DemoConfig
from ..data import Refused, load_rows
from ..demo import Prepared, prepare
from ..demo import warm_start as train_warm_start
from ..logbook import Logbook
from ..prompts import Prompt, PromptBuilder
from .sizes import Sizes
from .world_shift import TEST_SETS, write_study_data


@dataclass(frozen=True)
class Seed:
    """Settings, training data and test sets of a seed; held_out is `data.test` too."""

    config: DemoConfig
    data: Prepared
    tests: dict[str, list[Prompt]]


def open_seed(work: Path, seed: int, sizes: Sizes, log: Logbook) -> Seed:
    """The seed's data, written when it is not there yet, every video decoded."""
    root = work / f"seed-{seed}" / "data"

    def write(folder: Path) -> None:
        write_study_data(
            folder, train_videos=sizes.train_videos, test_questions=sizes.test_questions,
            shifted_questions=sizes.shifted_questions, seed=seed,
        )  # fmt: skip

    if not root.exists():
        whole(root, write)
    config = sizes.demo(seed, out=log.out, data=root)
    data = prepare(config, log)
    tests = {"held_out": data.test}
    for name, test in TEST_SETS.items():
        if name not in tests:
            builder = PromptBuilder(
                data.processor, frames=test.frames, max_length=tiny.CONTEXT - config.max_new_tokens
            )
            rows = load_rows(root / f"{test.rows}.json", root, on_bad="fail", refused=Refused())
            tests[name] = [builder(row) for row in rows]
    return Seed(config, data, tests)


def warm_start(work: Path, seed: Seed, log: Logbook) -> Any:
    """The warm-started model of a seed; trained when its weights are not there yet."""
    path = work / f"seed-{seed.config.seed}" / "warm.safetensors"
    if not path.exists():
        model = train_warm_start(seed.data, seed.config, log)
        whole(path, lambda part: save_model(model, str(part)))
    model = tiny.build_model(seed.data.processor, seed=seed.config.seed)
    load_model(model, path)
    return model


def is_warm(work: Path, seed: int) -> bool:
    """Whether a seed's data and warm-started weights are there."""
    folder = work / f"seed-{seed}"
    return (folder / "data").exists() and (folder / "warm.safetensors").exists()


def whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file or folder beside its place and move it there, so that what is there is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.part"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write(part)
    os.replace(part, path)
