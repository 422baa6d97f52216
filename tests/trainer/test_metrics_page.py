"""docs/metrics.md and what runs write name the same figures."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from raise_trainer import loop, tiny
from raise_trainer.completions import Completion
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import save_model
from raise_trainer.evaluate import summary
from raise_trainer.train import run_sft, run_train
from raise_trainer.train_config import check

PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
SMALL: dict[str, Any] = {
    "dtype": "float32", "template": "plain", "steps": 1, "prompts": 2, "group_size": 2, "max_new_tokens": 6,
    "frames": 8, "pixels": 56 * 56, "gradient_checkpointing": False, "lr": 1e-3, "workers": 0,
    "mask_truncated": False, "kl": 0.04,
}  # fmt: skip
# When an update was, when another engine samples, with a third number in `clip`, with a PRM.
SOMETIMES = {"skipped", "sampler_gap", "clip_dual"}
STEPS = {"step_score_mean", "answer_score_mean", "steps_mean", "prm_too_long_share"}  # test_chain_reward.py


def page(heading: str) -> set[str]:
    """The keys in the first column of a section's tables."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    keys = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    return set(keys)


def keys(file: Path, stage: str = "") -> set[str]:
    """Of all lines of a stage, without those that every line has."""
    records = map(json.loads, file.read_text().splitlines())
    found = {key for record in records if stage in ("", record["stage"]) for key in record}
    return found - {"stage", "step"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A step of each kind of training of a random model."""
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", train_videos=3, test_questions=1, seed=0, advance=lambda n=1: None)
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, folder / "model")
    given = SMALL | {"model": str(folder / "model")}
    train = given | {"data": folder / "data/train.json", "out": folder / "train"}
    more = {"bonus": {"format": 0.1, "t-grpo": 0.3, "grpo-care": 0.5}, "resample": 1}
    return {
        "train": run_train(check(train | {"eval_data": folder / "data/test.json"})),
        "bonuses": run_train(check(train | more | {"out": folder / "bonuses"})),
        "sft": run_sft(check(given | {"data": folder / "data/sft.json", "out": folder / "sft"})),
    }


@pytest.mark.parametrize(
    "heading, run, stage",
    [
        ("Training", ("train", "bonuses"), "train"),
        ("Evaluation", ("train",), "evaluate"),
        ("Supervised", ("sft",), "train"),
    ],
)
def test_what_is_written_is_on_the_page_and_the_other_way_round(
    runs: dict[str, Path], heading: str, run: tuple[str, ...], stage: str
) -> None:
    written = {key for name in run for key in keys(runs[name] / "metrics.jsonl", stage)}
    named = page(heading)
    assert written and written - named == set() and named - written - SOMETIMES - STEPS == set()


def test_times_are_on_the_page(runs: dict[str, Path]) -> None:
    written = keys(runs["train"] / "timings.jsonl") | keys(runs["sft"] / "timings.jsonl")
    assert page("Times") == written | {"judge"}


def test_the_demos_own_figures_are_on_the_page() -> None:
    plain = set(summary([])) | {"accuracy_greedy", "match_greedy"}
    assert page("Demo") == plain | {"accuracy/TASK", "match/TASK", "peak_gib"}
    judged = set(re.findall(r'^ +"(\w+)":', inspect.getsource(loop._judged), re.MULTILINE))
    assert judged == {"accuracy", "match"} <= page("Demo")


def test_every_field_of_a_completion_is_on_the_page() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Completions\n")[2]
    assert all(f"`{name}`" in section for name in Completion.model_fields)


def test_each_key_has_one_meaning_in_a_section() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for heading in ("Training", "Supervised", "Evaluation", "Times"):
        (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        named = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
        assert len(named) == len(set(named)) > 0
