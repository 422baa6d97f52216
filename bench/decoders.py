"""decord, torchcodec and PyAV on the same mp4 files: time to open, and to read the frames a sample asks for.

    python -m bench decoders                 records go to bench/results/decoders.jsonl
    python -m bench decoders --quick         one small file, one round, nothing recorded: does everything run?

One thread, one process, the files in the page cache. Decoders take turns, round after round; figures are
medians. "read" is all that `raise_trainer.media.video.decode_video` does: header, opening, sampling, decoding
to RGB. "open" is the decoder's own part of it before the first frame. Frames are those of the sample, not
those decoded on the way to them. On a machine with other work the figure per CPU second is the steadier one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from bench.record import RESULTS, provenance
from raise_trainer.clips import write_mp4
from raise_trainer.media.decoders import DECODERS
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import Decoded, decode_video

FPS = 30
SIZES = [(224, 224), (640, 360), (1280, 720)]
SECONDS = [4, 30]
SAMPLINGS = {"16 frames": Sampling(frames=16), "2 fps": Sampling(fps=2)}
ROUNDS = {4: 5, 30: 2}  # a long video takes seconds to read


@dataclass(frozen=True)
class Film:
    """One file to read."""

    path: Path
    width: int
    height: int
    seconds: int


def film(folder: Path, width: int, height: int, seconds: int) -> Film:
    """Blocks that move in front of a gradient, without noise, so at a low bit rate (recorded as bytes)."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 127, width), np.linspace(0, 127, height))
    ground = np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)
    blocks = rng.integers(0, 255, (8, 3), dtype=np.uint8)
    side = height // 5
    frames = np.empty((seconds * FPS, height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = ground
        for k, colour in enumerate(blocks):
            left, top = (k * 97 + i * (k + 1)) % (width - side), (k * 53 + i * (8 - k) // 2) % (height - side)
            frame[top : top + side, left : left + side] = colour
    path = folder / f"{width}x{height}-{seconds}s.mp4"
    write_mp4(path, frames, FPS)
    return Film(path, width, height, seconds)


def read(path: Path, sampling: Sampling, name: str) -> tuple[float, float, float, Decoded]:
    """Seconds to open a file, seconds and CPU seconds to read the sample, the sample."""
    start = time.perf_counter()
    with DECODERS[name].open(path) as video:
        assert video.total
        opened = time.perf_counter() - start
    start, busy = time.perf_counter(), time.process_time()
    frames = decode_video(path, sampling, name)
    return opened, time.perf_counter() - start, time.process_time() - busy, frames


def import_seconds(name: str) -> float:
    """Seconds of a decoder's import in a fresh process, after that of numpy."""
    code = (
        "import numpy, time; start = time.perf_counter(); "
        f"import {DECODERS[name].module}; print(time.perf_counter() - start)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(found.stdout)


def measure(one: Film, label: str, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One file and sample: the decoders in turn, round after round, after a call that does not count."""
    sampling = SAMPLINGS[label]
    first = {name: read(one.path, sampling, name)[3] for name in names}
    base = first[names[0]]
    opens: dict[str, list[float]] = {name: [] for name in names}
    reads: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            opened, took, spent, _ = read(one.path, sampling, name)
            opens[name].append(opened)
            reads[name].append(took)
            busy[name].append(spent)
    made = []
    for name in names:
        off = np.abs(first[name].pixels.astype(np.int16) - base.pixels).max()
        took = median(reads[name])
        made.append(
            {
                "decoder": name,
                "width": one.width,
                "height": one.height,
                "seconds": one.seconds,
                "bytes": one.path.stat().st_size,
                "sampling": label,
                "frames": len(base.indices),
                "same_indices": first[name].indices == base.indices,
                "levels_off": int(off),
                "open_s": median(opens[name]),
                "read_s": took,
                "read_cpu_s": median(busy[name]),
                "read_quartiles_s": quantiles(reads[name], n=4)[::2] if rounds > 1 else [took, took],
                "rounds": rounds,
                "frames_per_s": len(base.indices) / took,
                "frames_per_cpu_s": len(base.indices) / median(busy[name]),
            }
        )
    return made


def about() -> dict[str, Any]:
    """What the records were made with."""
    versions: dict[str, str | None] = {}
    for package in ("decord", "torchcodec", "av", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return provenance() | {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "decoder_threads": 1,
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a file and sample, a column pair a decoder."""
    names = list(dict.fromkeys(r["decoder"] for r in records))
    head = [f"{name} frames/s, per CPU second, open ms" for name in names]
    lines = ["| file | sample | " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(names)]
    rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in records:
        key = (r["width"], r["height"], r["seconds"], r["sampling"], r["frames"])
        rows.setdefault(key, {})[r["decoder"]] = r
    for (width, height, seconds, label, frames), cells in rows.items():
        figures = [
            f"{c['frames_per_s']:.1f}, {c['frames_per_cpu_s']:.1f}, {c['open_s'] * 1000:.1f}"
            for c in (cells[n] for n in names)
        ]
        sample = f"{label}" if str(frames) in label else f"{label}: {frames} frames"
        lines.append(f"| {width}x{height}, {seconds} s | {sample} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write the files, measure, record, print. Exit status 1 when two decoders give different frames."""
    parser = argparse.ArgumentParser(prog="python -m bench decoders", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small file, one round, nothing recorded")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="records go here (JSON lines)")
    options = parser.parse_args(arguments)
    absent = {name: decoder.missing for name, decoder in DECODERS.items() if decoder.missing}
    names = [name for name in DECODERS if name not in absent]
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for width, height in [(64, 64)] if options.quick else SIZES:
            for seconds in [1] if options.quick else SECONDS:
                one = film(Path(folder), width, height, seconds)
                for label in SAMPLINGS:
                    made += measure(one, label, names, 1 if options.quick else ROUNDS[seconds])
    imports = {name: median(import_seconds(name) for _ in range(1 if options.quick else 3)) for name in names}
    common = about()
    records = [common | record | {"import_s": imports[record["decoder"]]} for record in made]
    print(table(records))
    print("import:", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in imports.items()))
    for name, reason in absent.items():
        print(f"{name} {reason}")
    out = options.out or (None if options.quick else RESULTS / "decoders.jsonl")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return int(not all(r["same_indices"] and r["levels_off"] <= 2 for r in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
