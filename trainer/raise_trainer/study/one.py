"""The three jobs a study is made of; each runs in any process, and a finished one is never done again."""

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ..json_lines import read_json_lines
from ..logbook import Logbook
from .arms import ARMS
from .compute import step_operations
from .learning import STAGE, learn
from .measures import measure
from .records import Record
from .seeds import Seed, open_seed, warm_start
from .sizes import Sizes

CURVE = (
    "loss", "reward_mean", "accuracy", "match", "confidence_mean", "completion_tokens_mean", "entropy", "kl",
    "equal_groups_share",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Warm start of a seed, operations of an arm after it, or an arm with a seed (`steps` of them)."""

    kind: Literal["warm start", "count", "run"]
    seed: int
    arm: str = ""
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.kind if not self.arm else f'{self.kind} {self.arm}'}, seed {self.seed}"


def do(job: Job, work: Path, sizes: Sizes) -> Record:
    """Do a job on one thread and return what is to be kept; `work` holds data, weights and logs."""
    torch.set_num_threads(1)
    begun = time.process_time()
    with quiet_log(work / f"seed-{job.seed}" / (job.arm or "shared") / job.kind.replace(" ", "-")) as log:
        seed = _seed(work, job.seed, sizes)
        model = warm_start(work, seed, log)
        record: Record = {"arm": job.arm, "seed": job.seed}
        if job.kind == "count":
            record["operations"] = step_operations(ARMS[job.arm], seed, model, sizes, log)
        elif job.kind == "run":
            record |= _run(job, seed, model, log)
    return record | {"processor_seconds": time.process_time() - begun}


@functools.lru_cache(maxsize=1)
def _seed(work: Path, seed: int, sizes: Sizes) -> Seed:
    """A process does the arms of a seed one after the other, and decodes its videos once."""
    with tempfile.TemporaryDirectory() as folder, quiet_log(Path(folder) / "log") as log:
        return open_seed(work, seed, sizes, log)


@contextmanager
def quiet_log(folder: Path) -> Iterator[Logbook]:
    """A log that says nothing on the terminal; what an earlier, killed attempt left is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as file:
        yield Logbook(folder, Console(file=file, width=160))


def _run(job: Job, seed: Seed, model: Any, log: Logbook) -> Record:
    arm = ARMS[job.arm]
    learn(arm, model, seed.data, seed.config, log, steps=job.steps)
    found = measure(model, seed)
    for name, figures in found.items():
        log.write(name, job.steps, **figures)
    lines = [line for _, line in read_json_lines(log.out / "metrics.jsonl") if line["stage"] == STAGE]
    curve = {key: [line[key] for line in lines] for key in CURVE if lines and key in lines[0]}
    settings = {"kind": arm.kind, "method": dict(arm.method), "reference": arm.reference, "steps": job.steps}
    questions = {name: len(prompts) for name, prompts in seed.tests.items()}
    return {
        "settings": json.loads(json.dumps(settings)),
        "questions": questions,
        "figures": found,
        "curve": curve,
    }
