"""A run killed anywhere, also during a save, and resumed writes the same metrics, byte for byte.

`python tests/trainer/test_checkpoints_kill.py FOLDER KILLS SEED` does it; the test runs that with RAISE_KILLS
kills (3 unless told). Every life of a run is a fork of one process, so that only the first imports torch.
A life is killed at the n-th file operation in its folder, or some milliseconds after it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 9, 2
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
LATE = (0.0, 0.02, 0.4)  # seconds at most from the operation to the kill: in a file, or in a later step
Kill = tuple[int, float, signal.Signals]  # after how many operations, how much later, by what


class Rows:
    """Shuffled epochs; a row lost or used twice would show in the metrics."""

    def __init__(self) -> None:
        self.stream, self.pool = random.Random(7), list[int]()

    def next(self) -> int:
        self.pool = self.pool or self.stream.sample(range(5), 5)
        return self.pool.pop()

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.getstate(), "pool": list(self.pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.setstate(state["stream"])
        self.pool = list(state["pool"])


def build() -> Any:
    import torch

    import raise_core as rc
    from raise_trainer.checkpoints import TrainingState
    from tests.tiny_models import text_model

    random.seed(0)
    model = text_model("Llama", attention_dropout=0.2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    reference = rc.EmaReference(model, every=1, decay=0.9)
    streams = {"own": torch.Generator()}
    return TrainingState(
        model,
        optimizer,
        schedule,
        reference,
        Rows(),
        generators=streams,
        config={"steps": STEPS},
        data="5 rows",
    )


def step(state: Any) -> dict[str, Any]:
    import torch

    row = state.sampler.next()
    ids = (torch.randint(2, 90, (2, 6), generator=state.generators["own"]) + row) % 180
    loss = state.model(input_ids=ids, labels=ids).loss
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    state.step += 1
    state.reference.update(state.model, state.step)
    with state.reference.active() as scored:
        score = scored(input_ids=ids, labels=ids).loss.item()
    state.counters["tokens"] = state.counters.get("tokens", 0) + ids.numel()
    return {"loss": loss.item(), "score": score, "row": row, "draw": random.random(), **state.counters}


def train(folder: Path) -> None:
    """One life of the run."""
    from raise_trainer.checkpoints import Checkpoints, graceful_stop, truncate_log

    state = build()
    log = folder / "metrics.jsonl"
    checkpoints = Checkpoints(folder / "checkpoints", keep_best="min")
    with graceful_stop() as stop:
        checkpoints.resume(state)
        truncate_log(log, state.step)
        while state.step < STEPS and not stop.agreed():
            line = {"step": state.step, **step(state)}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if state.step % EVERY == 0 or stop.agreed():
                checkpoints.save(state, state.step, line["loss"], logs=[log])


def life(folder: Path, kill: Kill | None) -> tuple[int, int]:
    """Fork, train, perhaps kill; the exit status as `waitpid` gives it, and the number of file operations."""
    folder.mkdir(exist_ok=True)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = watch(folder, kill, tell)
            train(folder)
            os.write(tell, count().to_bytes(4, "big"))
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    said = os.read(told, 4)
    if kill is not None and said == b"now":
        time.sleep(kill[1])
        os.kill(child, kill[2])
        said = os.read(told, 4)
    os.close(told)
    return os.waitpid(child, 0)[1], int.from_bytes(said, "big")


def watch(folder: Path, kill: Kill | None, tell: int) -> Callable[[], int]:
    """Count the file operations in `folder`; at the one to die at, die, or tell the parent."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        seen += 1
        if kill is not None and seen == kill[0]:
            if kill[1]:
                os.write(tell, b"now")
            else:
                os.kill(os.getpid(), kill[2])

    sys.addaudithook(hook)
    return lambda: seen


def main(place: Path, kills: int, seed: int) -> None:
    """Kill `kills` runs once or twice each; print what happened, one JSON object."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import tests.tiny_models  # noqa: F401  all before the forks

    torch.set_num_threads(1)
    rng = random.Random(seed)
    status, operations = life(place / "whole", None)
    assert status == 0, "the uninterrupted run failed"
    wanted = (place / "whole/metrics.jsonl").read_bytes()
    faults, in_save, died = [], 0, 0
    for i in range(kills):
        folder = place / f"run {i}"
        by = signal.SIGTERM if i % 5 == 4 else signal.SIGKILL
        for again in range(1 + i % 2):
            late = rng.random() * rng.choice(LATE)
            kill = (rng.randint(1, operations >> again), late, by)
            status, _ = life(folder, kill)
            died += status == signal.SIGKILL
            if status not in (0, int(signal.SIGKILL)) or (by == signal.SIGTERM and status):
                faults.append(f"run {i}, {kill}: exit status {status}")
            in_save += any((folder / "checkpoints").glob(".*-*"))
        status, _ = life(folder, None)
        left = [path.name for path in (folder / "checkpoints").glob(".*")]
        if status or left or (folder / "metrics.jsonl").read_bytes() != wanted:
            faults.append(f"run {i}, {kill}: status {status}, {left} left, or other metrics")
        shutil.rmtree(folder)
    lines = len(wanted.splitlines())
    print(json.dumps({"lines": lines, "killed": died, "in_save": in_save, "faults": faults}))


def test_killed_runs_write_the_metrics_of_the_uninterrupted_one(tmp_path: Path) -> None:
    kills = int(os.environ.get("RAISE_KILLS", "3"))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT}/trainer:{ROOT}/kernels",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["lines"] == STEPS and told["faults"] == []
    # The first kills of this seed: some hit a save, so that half a checkpoint was there to be passed over.
    assert told["killed"] >= 2 and told["in_save"] >= 1, told


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
