"""The study's data: what training never shows, what the shifted sets hold; the demo's are unchanged."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from raise_trainer import world
from raise_trainer.clips import read_frames
from raise_trainer.dataset import write_dataset
from raise_trainer.study import world_shift
from raise_trainer.study.world_shift import LONG, SEEN, WITHHELD, draw_scene, write_study_data

KINDS = ("move", "order", "count")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "data"
    write_study_data(folder, train_videos=60, test_questions=20, shifted_questions=20, seed=3)
    return folder


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((root / f"{name}.json").read_text())
    return loaded


def test_every_pair_is_on_one_side() -> None:
    assert set(SEEN).isdisjoint(WITHHELD) and len(SEEN) + len(WITHHELD) == 12
    assert {c for c, _ in WITHHELD} == {c for c, _ in SEEN} == set(world.COLOURS)
    assert {s for _, s in SEEN} == {s for _, s in WITHHELD} == set(world.SHAPES)


@pytest.mark.parametrize("allowed", [SEEN, WITHHELD], ids=["seen", "withheld"])
@pytest.mark.parametrize("kind", KINDS)
def test_scenes_hold_the_allowed_pairs_alone(kind: str, allowed: tuple[tuple[str, str], ...]) -> None:
    rng, met = random.Random(0), set()
    for _ in range(200):
        scene = draw_scene(rng, kind, allowed)
        pairs = [(thing.colour, thing.shape) for thing in scene.things]
        assert set(pairs) <= set(allowed)
        assert kind != "order" or len({colour for colour, _ in pairs}) == 2
        met |= set(pairs)
    assert met == set(allowed)


def test_the_files_show_what_they_promise(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scenes that were drawn, file by file: pairs of training and of new_pairs have none in common."""
    drawn: list[tuple[int, world.Scene]] = []
    render = world.render

    def kept(scene: world.Scene, count: int) -> Any:
        drawn.append((count, scene))
        return render(scene, count)

    monkeypatch.setattr(world_shift.world, "render", kept)
    write_study_data(tmp_path / "d", train_videos=60, test_questions=20, shifted_questions=20, seed=3)
    clips = sorted((tmp_path / "d" / "clips").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    of = {clip.name.split("-")[0]: set[tuple[str, str]]() for clip in clips}
    for clip, (count, scene) in zip(clips, drawn, strict=True):
        name = clip.name.split("-")[0]
        of[name] |= {(thing.colour, thing.shape) for thing in scene.things}
        assert count == (LONG if name == "long" else world.FRAMES)
    assert set(of) == {"train", "test", "new_pairs", "long"}
    assert of["new_pairs"] <= set(WITHHELD)
    assert (of["train"] | of["test"] | of["long"]) <= set(SEEN) and of["train"] == set(SEEN)
    assert rows(root, "train") == rows(tmp_path / "d", "train")  # the same seed, the same rows


def test_no_supervised_text_names_a_withheld_pair(root: Path) -> None:
    texts = [row["process"] + row["solution"] for row in rows(root, "sft")]
    texts += [text for row in rows(root, "train") for text in row.get("references", ())]
    assert len(texts) > 100
    words = [text.replace("<", " ").replace(">", " ").split() for text in texts]
    assert not any(world_shift.withheld_in(some) for some in words)
    assert any("i" in some and "see" in some for some in words)  # descriptions, the only ones with both


def test_videos_and_questions_of_the_sets(root: Path) -> None:
    for name, least in (("test", 20), ("new_pairs", 20), ("long", 20)):
        some = rows(root, name)
        assert least <= len(some) < least + 4
        assert len({r["problem_id"] for r in some}) == len(some)
    frames = read_frames(root / rows(root, "long")[0]["path"], LONG)
    assert len(frames.pixels) == frames.total == LONG
    every = [r["problem_id"] for name in ("train", "test", "new_pairs", "long") for r in rows(root, name)]
    assert len(set(every)) == len(every)


def test_the_demo_s_own_data_are_what_they_were(tmp_path: Path) -> None:
    """Rows and rendered frames of the demo, by a digest taken before the study was there."""
    write_dataset(tmp_path / "d", train_videos=20, test_questions=12, seed=0, advance=lambda _: None)
    digest = hashlib.sha256()
    for name in ("sft", "train", "test"):
        digest.update((tmp_path / "d" / f"{name}.json").read_bytes())
    for seed, kind in enumerate(KINDS):
        digest.update(world.render(draw(seed, kind)).tobytes())
    assert digest.hexdigest() == DEMO


def draw(seed: int, kind: str) -> world.Scene:
    return world.draw_scene(random.Random(seed), kind)


DEMO = "b3492378f5d922928d0a8c25334c774cc9081cd47202ca694fced0d958c8f063"
