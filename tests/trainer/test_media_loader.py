"""Worker processes: order, one decode a file, time limit, retries, dead workers, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raise_trainer.errors import BadMedia, UserError
from raise_trainer.media.cache import FrameCache
from raise_trainer.media.frames import Frames
from raise_trainer.media.loader import MediaLoader
from raise_trainer.media.quarantine import Quarantine
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import Request
from tests.trainer import media_cases as cases

TOLD = "tests.trainer.media_cases:told"
SAMPLING = Sampling(frames=2)
Ask = Callable[..., Request]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """A request whose file tells the decode function what to do."""

    def make(what: str, name: str = "") -> Request:
        path = tmp_path / f"{name or what}.txt"
        path.write_text(what)
        return Request(path, SAMPLING)

    return make


def tries(request: Request) -> int:
    """How often a file was decoded."""
    log = request.path.with_suffix(".tries")
    return len(log.read_text().splitlines()) if log.exists() else 0


def value(frames: Frames | BadMedia) -> int:
    assert isinstance(frames, Frames), frames
    return int(frames.pixels[0, 0, 0, 0])


def gone(pid: int) -> bool:
    """No process, not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_in_order_once_each_and_equal_to_decoding_here(tmp_path: Path) -> None:
    requests = []
    for i in range(3):
        path = cases.write(tmp_path / f"{i}.mp4", cases.pictures(12 + 4 * i))
        requests += [Request(path, Sampling(frames=4)), Request(path, Sampling(frames=8))]
    batch = [*requests, *reversed(requests), Request(tmp_path / "none.mp4", SAMPLING)]
    with MediaLoader(workers=2) as there, MediaLoader(workers=0) as here:
        far, near = there.load(batch), here.load(batch)
        assert here.pids == [] and len(there.pids) == 2
    assert isinstance(far[-1], BadMedia) and str(far[-1]) == str(near[-1]) and "No such file" in str(far[-1])
    for got, want, request in zip(far[:-1], near[:-1], batch, strict=False):
        assert isinstance(got, Frames) and isinstance(want, Frames)
        assert torch.equal(got.pixels, want.pixels) and got.indices == want.indices
        assert len(got.pixels) == request.sampling.frames
    assert far[0] is far[11] and near[0] is near[11]


def test_faults_of_the_file_of_the_user_and_of_the_code(ask: Ask) -> None:
    with MediaLoader(workers=1, decode=TOLD) as loader:
        good, bad, again = ask("value 5"), ask("bad cannot be read"), ask("value 6")
        found = loader.load([good, bad, again, good])
        assert [value(found[0]), value(found[2]), value(found[3])] == [5, 6, 5]
        assert isinstance(found[1], BadMedia) and str(found[1]) == f"{bad.path}: cannot be read"
        assert [tries(request) for request in (good, bad, again)] == [1, 1, 1]
        with pytest.raises(UserError, match="install it"):
            loader.load([ask("user install it")])
        with pytest.raises(RuntimeError, match=r"(?s)no fault of the file.*ZeroDivisionError"):
            loader.load([ask("bug oops")])
        assert value(loader.load([ask("value 9")])[0]) == 9
        assert value(loader.load([ask("torch")])[0]) == 0  # decoding processes stay light


def test_a_hung_file_is_killed_tried_again_and_given_up(ask: Ask) -> None:
    once, always, good = ask("hang 1"), ask("hang 99"), ask("value 3")
    with MediaLoader(workers=1, timeout_s=1.0, retries=1, decode=TOLD) as loader:
        found = loader.load([once, always, good])
    assert value(found[0]) == 0 and tries(once) == 2
    assert isinstance(found[1], BadMedia) and tries(always) == 2
    assert str(always.path) in str(found[1]) and "timed out after 1 s" in str(found[1])
    assert value(found[2]) == 3


def test_a_dead_worker_is_replaced_and_named(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    once, always = ask("abort 1"), ask("abort 99")
    goods = [ask(f"value {i}") for i in range(10)]
    with MediaLoader(workers=2, retries=2, decode=TOLD) as loader:
        found = loader.load([*goods[:5], once, always, *goods[5:]])
    assert [value(f) for f in (*found[:5], *found[7:])] == list(range(10))
    assert value(found[5]) == 0 and tries(once) == 2
    assert isinstance(found[6], BadMedia) and tries(always) == 3
    assert "SIGABRT" in str(found[6]) and str(always.path) in str(found[6])
    assert [tries(good) for good in goods] == [1] * 10
    dead = set(once.path.with_suffix(".tries").read_text().split()[:1])
    assert all(f"decoding process {pid} ended (SIGABRT)" in caplog.text for pid in dead)


def test_prefetch_works_ahead_and_forgets_what_is_not_wanted(ask: Ask) -> None:
    first, second, dropped = ask("value 1"), ask("value 2"), ask("value 3")
    with MediaLoader(workers=1, decode=TOLD) as loader:
        loader.prefetch([first, second])
        assert until(lambda: tries(second) == 1)
        assert [value(f) for f in loader.load([second, first])] == [2, 1]
        loader.prefetch([ask("slow 0.5"), dropped])
        loader.prefetch([first])
        assert value(loader.load([first])[0]) == 1
        assert (tries(first), tries(second), tries(dropped)) == (2, 1, 0)


def test_what_is_quarantined_is_not_tried(ask: Ask, tmp_path: Path) -> None:
    listed, good = ask("value 1"), ask("value 2")
    quarantine = Quarantine(tmp_path / "q.jsonl")
    quarantine.add(0, listed.path, BadMedia("known to be bad"))
    for workers in (0, 1):
        with MediaLoader(workers=workers, quarantine=quarantine, decode=TOLD) as loader:
            loader.prefetch([listed])
            found = loader.load([listed])
        assert isinstance(found[0], BadMedia) and str(found[0]) == "known to be bad"
    assert tries(listed) == 0 and tries(good) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_frames_come_from_the_cache_the_second_time(tmp_path: Path, workers: int) -> None:
    request = Request(cases.write(tmp_path / "a.mp4", cases.pictures(8)), Sampling(frames=4))
    caches = [FrameCache(tmp_path / "cache", max_bytes=10**8) for _ in range(2)]
    found = []
    for cache in caches:
        with MediaLoader(workers=workers, cache=cache) as loader:
            found += loader.load([request])
            assert len(loader.pids) == (workers if cache is caches[0] else 0)  # nobody had to start
    assert (caches[0].hits, caches[1].hits) == (0, 1)
    assert torch.equal(found[0].pixels, found[1].pixels) and found[0].indices == found[1].indices


def test_a_decode_function_that_is_not_there(ask: Ask) -> None:
    with (
        MediaLoader(workers=1, decode="no_such_module:decode") as loader,
        pytest.raises(RuntimeError, match="no_such_module"),
    ):
        loader.load([ask("value 1")])


def test_what_a_decoder_prints_does_not_disturb(ask: Ask) -> None:
    with MediaLoader(workers=1, decode="tests.trainer.media_cases:noisy") as loader:
        assert value(loader.load([ask("value 1")])[0]) == 7


def test_closing_ends_the_workers_also_in_the_middle_of_a_file(ask: Ask) -> None:
    loader = MediaLoader(workers=2, decode=TOLD)
    stuck = ask("hang 99")
    loader.load([ask("value 1"), ask("value 2")])
    loader.prefetch([stuck, ask("value 3")])
    assert until(lambda: tries(stuck) == 1)
    pids = loader.pids
    loader.close()
    loader.close()
    assert pids and all(gone(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        loader.load([stuck])


def test_a_loader_that_nobody_closes_leaves_nothing(ask: Ask) -> None:
    loader = MediaLoader(workers=1, decode=TOLD)
    loader.load([ask("value 1")])
    pids = loader.pids
    del loader
    assert len(pids) == 1 and until(lambda: gone(pids[0]))


@pytest.mark.parametrize("field", ["workers", "retries", "timeout_s"])
def test_settings_that_cannot_be(field: str) -> None:
    with pytest.raises(UserError, match=f"{field}=-1"):
        MediaLoader(**{field: -1})


TRAINER = """
import sys
from pathlib import Path
from raise_trainer.media.loader import MediaLoader
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import Request

with MediaLoader(workers=1, timeout_s=300, decode=sys.argv[1]) as loader:
    good, hung = (Request(Path(p), Sampling(frames=2)) for p in sys.argv[2:])
    loader.load([good])
    print(*loader.pids, flush=True)
    loader.load([hung if {hang} else good])
    sys.stdin.read()
"""


@pytest.mark.parametrize("how, hang", [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_no_worker_outlives_an_interrupted_or_killed_trainer(ask: Ask, how: int, hang: bool) -> None:
    good, hung = ask("value 1"), ask("hang 99")
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.format(hang=hang), TOLD, str(good.path), str(hung.path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    assert until(lambda: tries(hung if hang else good) >= 1 + (not hang))
    trainer.send_signal(how)
    _, errors = trainer.communicate(timeout=30)
    assert until(lambda: gone(worker)), "the worker is still there"
    assert trainer.returncode == -how
    assert how != signal.SIGINT or "KeyboardInterrupt" in errors
