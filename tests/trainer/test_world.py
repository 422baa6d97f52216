"""The demo world: claims, lies, chains and answers say what they should, and Match reads them back."""

import random

import numpy as np
import pytest

from raise_trainer import world


def scenes(n: int = 60) -> list[world.Scene]:
    rng = random.Random(0)
    return [world.draw_scene(rng, kind) for kind in world.TASKS_OF for _ in range(n)]


def questions() -> list[tuple[world.Scene, str]]:
    return [(scene, task) for scene in scenes() for task in world.TASKS_OF[scene.kind]]


def test_a_true_chain_and_its_answer_match_and_a_false_one_does_not() -> None:
    rng = random.Random(1)
    for scene, task in questions():
        options = world.options_of(task)
        truth, lie = world.claim(scene, task), world.false_claim(rng, scene, task, options)
        assert truth != lie
        answer = world.answer_text(task, truth, options, rng)
        assert world.answer_claim(task, answer, options) == world.chain_claim(
            task, world.chain_text(task, truth)
        )
        assert world.answer_follows_chain(task, world.chain_text(task, truth), answer, options)
        assert not world.answer_follows_chain(task, world.chain_text(task, lie), answer, options)


@pytest.mark.parametrize("task", world.TASKS)
@pytest.mark.parametrize(
    "text", ["", "E", "B. ", "a red", "red green ring moves left", "\x00", "the the the"]
)
def test_text_that_claims_nothing_never_matches(task: str, text: str) -> None:
    assert not world.answer_follows_chain(task, text, text, world.options_of(task))


def test_a_letter_with_another_options_text_claims_nothing() -> None:
    options = world.options_of("colour")
    assert options[1] == "B. green"
    assert world.answer_claim("colour", "B. green", options) == ("green",)
    assert world.answer_claim("colour", "B", options) == ("green",)
    assert world.answer_claim("colour", "B. red", options) is None


def test_numbers_match_by_value() -> None:
    assert world.answer_follows_chain("when", "it appears at 1.0 seconds", "1", ())
    assert not world.answer_follows_chain("when", "it appears at 1.0 seconds", "1.5", ())


def test_a_description_with_two_colours_claims_nothing() -> None:
    assert world.answer_claim("describe", "a red ring moves left", ()) == ("red", "ring", "left")
    assert world.answer_claim("describe", "a red green ring moves left", ()) is None


def test_every_phrasing_names_the_three_words_once() -> None:
    words = ("blue", "square", "up")
    for phrasing in world.PHRASINGS:
        assert world.answer_claim("describe", phrasing.format(*words), ()) == words


def test_frames_show_the_claim() -> None:
    for scene in scenes(10):
        frames = world.render(scene)
        assert frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3) and frames.dtype == np.uint8
        for thing in scene.things:
            shown = (frames == world.COLOURS[thing.colour]).all(-1).any((1, 2))  # [F]
            assert shown[thing.appears :].all()
            if thing.appears and sum(t.colour == thing.colour for t in scene.things) == 1:
                assert not shown[: thing.appears].any()


def test_a_move_goes_its_way() -> None:
    for scene in scenes(20):
        if scene.kind == "move":
            thing = scene.things[0]
            mask = (world.render(scene) == world.COLOURS[thing.colour]).all(-1)
            (y0, x0), (y1, x1) = (np.argwhere(mask[f]).mean(0) for f in (0, -1))
            dx, dy = world.DIRECTIONS[thing.direction]
            assert (x1 - x0) * dx + (y1 - y0) * dy > world.SIZE / 4
