"""The demo world: short videos of coloured shapes, questions about them, and chains that may lie.

A scene is a few shapes on dark ground, 8 frames at 4 frames per second (2 s). The ground gets bluer to the
right and greener to the bottom, so that a patch shows where it is: the vision tower knows no absolute
position. Three kinds of scene:

    move    one shape crosses the picture            asks: colour, shape, direction, describe
    order   two shapes, the second appears later     asks: first, when
    count   one to four shapes                       asks: count

Every question has a true *claim* (what the video shows) and every chain of thought states one claim, so that
"does the answer follow from the chain" is decided exactly, by parsing both (`answer_follows_chain`).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 56  # pixels, width = height
FRAMES = 8
RAMP = 70  # levels of green and blue across the ground
FPS = 4
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 80, 240),
    "yellow": (240, 220, 40),
}
SHAPES = ("square", "ring", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WHEN = ("0.5", "1.0", "1.5")  # seconds; a temporal patch of the model is 0.5 s
STRICT = ("colour", "shape", "direction", "first", "when", "count")
TASKS = (*STRICT, "describe")
TASKS_OF = {
    "move": ("colour", "shape", "direction", "describe"),
    "order": ("first", "when"),
    "count": ("count",),
}


@dataclass(frozen=True)
class Thing:
    """One shape: where it starts and ends and its radius [pixels], when it appears [frames]."""

    colour: str
    shape: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    appears: int = 0
    direction: str = ""


@dataclass(frozen=True)
class Scene:
    """What one video shows."""

    kind: str
    things: tuple[Thing, ...]
    ground: int  # grey level the ground starts from, 0..255


def draw_scene(rng: random.Random, kind: str) -> Scene:
    """One random scene of a kind."""
    ground = rng.randrange(0, 40)
    if kind == "move":
        direction = rng.choice(tuple(DIRECTIONS))
        dx, dy = DIRECTIONS[direction]
        radius = rng.uniform(9, 12)
        half = SIZE / 2 - radius - 1  # a crossing from edge to edge
        cx, cy = (rng.uniform(radius, SIZE - radius) if d == 0 else SIZE / 2 for d in (dx, dy))
        thing = Thing(
            rng.choice(tuple(COLOURS)),
            rng.choice(SHAPES),
            (cx - dx * half, cy - dy * half),
            (cx + dx * half, cy + dy * half),
            radius,
            direction=direction,
        )
        return Scene(kind, (thing,), ground)
    cells = [(x, y) for x in (SIZE * 0.25, SIZE * 0.75) for y in (SIZE * 0.25, SIZE * 0.75)]
    rng.shuffle(cells)
    if kind == "order":
        colours = rng.sample(tuple(COLOURS), 2)
        appears: tuple[int, ...] = (0, int(float(rng.choice(WHEN)) * FPS))
    else:
        n = rng.randint(1, 4)
        colours = [rng.choice(tuple(COLOURS)) for _ in range(n)]
        appears = (0,) * n
    things = [
        Thing(colour, rng.choice(SHAPES), cell, cell, rng.uniform(9, 11), appears=frame)
        for colour, cell, frame in zip(colours, cells, appears, strict=False)
    ]
    return Scene(kind, tuple(things), ground)


def render(scene: Scene, count: int = FRAMES) -> np.ndarray:
    """The first to last frame of a scene, `[count, SIZE, SIZE, 3]` uint8 RGB; moves take the whole video."""
    ramp = np.linspace(0, RAMP, SIZE).astype(np.uint8)
    ground = np.full((SIZE, SIZE, 3), scene.ground, np.uint8)
    ground[..., 1] += ramp[:, None]
    ground[..., 2] += ramp[None, :]
    frames = []
    for f in range(count):
        image = Image.fromarray(ground)
        pen = ImageDraw.Draw(image)
        for thing in scene.things:
            if f < thing.appears:
                continue
            a = f / (count - 1)
            x, y = ((1 - a) * s + a * e for s, e in zip(thing.start, thing.end, strict=True))
            _draw(pen, thing, x, y)
        frames.append(np.asarray(image))
    return np.stack(frames)


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float) -> None:
    r, fill = thing.radius, COLOURS[thing.colour]
    if thing.shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=4)
    else:
        pen.line((x - r, y - r, x + r, y + r), fill=fill, width=3)
        pen.line((x - r, y + r, x + r, y - r), fill=fill, width=3)


# --- questions -------------------------------------------------------------------------------------------

QUESTION = {
    "colour": "What colour is the shape?",
    "shape": "Which shape is in the video?",
    "direction": "Which way does the shape move?",
    "first": "Which colour came first?",
    "when": "At what second does the second shape appear?",
    "count": "How many shapes are there?",
    "describe": "Describe what happens.",
}
PROBLEM_TYPE = {
    **dict.fromkeys(("colour", "shape", "direction", "first"), "multiple choice"),
    **dict.fromkeys(("when", "count"), "numerical"),
    "describe": "free-form",
}
# The values each word of a claim can take, where no options list them.
DOMAIN = {
    "when": (WHEN,),
    "count": (("1", "2", "3", "4"),),
    "describe": (tuple(COLOURS), SHAPES, tuple(DIRECTIONS)),
}
CHAIN = {
    "colour": "the colour is {}",
    "shape": "the shape is a {}",
    "direction": "it moves {}",
    "first": "the first is {}",
    "when": "it appears at {} seconds",
    "count": "there are {} shapes",
    "describe": "i see a {} {} moving {}",
}
# Several ways to say the same thing. The references of a row are a sample of them, so a right description
# scores below 1, and two right ones score differently.
PHRASINGS = (
    "a {0} {1} moves {2}",
    "the {0} {1} goes {2}",
    "{2} goes a {1} that is {0}",
    "a {1} coloured {0} is moving {2}",
    "the video shows a {0} {1} moving {2}",
    "one {0} {1} slides {2}",
)


def claim(scene: Scene, task: str) -> tuple[str, ...]:
    """What the video truly shows, as the words that answer `task`."""
    first = scene.things[0]
    match task:
        case "colour" | "first":
            return (first.colour,)
        case "shape":
            return (first.shape,)
        case "direction":
            return (first.direction,)
        case "when":
            return (f"{scene.things[1].appears / FPS:.1f}",)
        case "count":
            return (str(len(scene.things)),)
        case "describe":
            return (first.colour, first.shape, first.direction)
    raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")


def false_claim(rng: random.Random, scene: Scene, task: str, options: Sequence[str]) -> tuple[str, ...]:
    """A claim that contradicts the video in one word; for multiple choice, another option's."""
    truth = list(claim(scene, task))
    i = rng.randrange(len(truth))
    values = [o.split(". ", 1)[1] for o in options] or DOMAIN[task][i]
    truth[i] = rng.choice([value for value in values if value != truth[i]])
    return tuple(truth)


def options_of(task: str) -> list[str]:
    """Options "A. red", "B. green", … of a multiple-choice question; empty for the other kinds."""
    if PROBLEM_TYPE[task] != "multiple choice":
        return []
    values = {"shape": SHAPES, "direction": tuple(DIRECTIONS)}.get(task, tuple(COLOURS))
    return [f"{letter}. {text}" for letter, text in zip("ABCD", values, strict=False)]


def chain_text(task: str, words: Sequence[str]) -> str:
    """The chain of thought that states a claim."""
    return CHAIN[task].format(*words)


def answer_text(task: str, words: Sequence[str], options: Sequence[str], rng: random.Random) -> str:
    """The answer that follows from a claim: its option, its number, or one phrasing of its description."""
    if task == "describe":
        return rng.choice(PHRASINGS).format(*words)
    if not options:
        return words[0]
    return next(o for o in options if o.split(". ", 1)[1] == words[0])


def references(rng: random.Random, words: Sequence[str], n: int = 3) -> list[str]:
    """`n` phrasings of one description."""
    return [phrasing.format(*words) for phrasing in rng.sample(PHRASINGS, n)]


# --- reading completions back ----------------------------------------------------------------------------

_CHAIN_PATTERN = {
    task: re.compile(re.escape(text).replace(r"\{\}", r"([a-z0-9.]+)")) for task, text in CHAIN.items()
}
_WORDS = {word: i for i, words in enumerate((COLOURS, SHAPES, DIRECTIONS)) for word in words}


def task_of(data_source: str) -> str:
    """The task a row's `data_source` names, "demo/colour" for example. ValueError if it is none of ours."""
    head, _, task = data_source.partition("/")
    if head != "demo" or task not in TASKS:
        raise ValueError(f"data_source {data_source!r}, expected 'demo/' and one of {', '.join(TASKS)}")
    return task


def chain_claim(task: str, chain: str) -> tuple[str, ...] | None:
    """The claim a chain of thought states, or None when it states none."""
    found = _CHAIN_PATTERN[task].fullmatch(chain.strip())
    return tuple(map(_plain, found.groups())) if found else None


def answer_claim(task: str, answer: str, options: Sequence[str]) -> tuple[str, ...] | None:
    """The claim an answer makes, or None when it makes none.

    A multiple-choice answer is one of the options as written, or its letter alone: a letter with another
    option's text claims nothing. Numbers are compared by value. A description claims the one colour,
    shape and direction it names.
    """
    answer = answer.strip()
    if task == "describe":
        named: list[set[str]] = [set(), set(), set()]
        for word in answer.split():
            if word in _WORDS:
                named[_WORDS[word]].add(word)
        return tuple(next(iter(words)) for words in named) if all(len(w) == 1 for w in named) else None
    if options:
        chosen = [option for option in options if answer in (option, option[0])]
        return (chosen[0].split(". ", 1)[1],) if chosen else None
    return (_plain(answer),) if answer else None


def _plain(word: str) -> str:
    """A number in one spelling ("1" for "1.0"); any other word as it is."""
    try:
        return f"{float(word):g}"
    except ValueError:
        return word


def answer_follows_chain(task: str, chain: str, answer: str, options: Sequence[str]) -> bool:
    """Match: the chain states a claim and the answer makes the same one."""
    stated = chain_claim(task, chain)
    return stated is not None and stated == answer_claim(task, answer, options)
