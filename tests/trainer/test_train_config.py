"""Settings: a name or number alone, or a name with its value; every form survives being written and read."""

import json
from pathlib import Path
from typing import Any

import pytest

from raise_trainer.errors import UserError
from raise_trainer.method import Method
from raise_trainer.row_files import RowSource
from raise_trainer.train_config import EMA_DECAY, FREE, TrainConfig, as_yaml, check, load

NEEDED = {"model": "m", "data": "rows.json", "out": "run"}
FORMS: list[dict[str, Any]] = [
    {},
    {"reference": "policy"},
    {"reference": {"ema": 0.9}},
    {"kl": 0.04},
    {"kl": {"k1": 0.02}},
    {"clip": [0.2, 0.28]},
    {"clip": [0.2, 0.28, 3.0]},
    {"bonus": {"format": 0.1, "t-grpo": 0.3}},
    {"engine": "http://localhost:8000"},
    {"frames": {"fps": 2.0, "max": 32}, "pixels": {"min": 3136, "max": 50176}},
    {"eval_data": {"path": "test.json", "frames": 32, "root": "media", "pixels": 9000}},
    {"data": ["a.json", {"path": "b.json", "reward": "igsr"}]},
]


@pytest.mark.parametrize("given", FORMS, ids=lambda form: ", ".join(form))
def test_what_is_written_reads_the_same(tmp_path: Path, given: dict[str, Any]) -> None:
    config = check(NEEDED | given)
    (tmp_path / "c.yaml").write_text(as_yaml(config))
    assert load(tmp_path / "c.yaml") == config


def test_every_field_has_a_text_and_there_are_at_most_forty() -> None:
    fields = TrainConfig.model_fields
    assert len(fields) <= 40 and all(field.description for field in fields.values())
    assert set(FREE) <= set(fields)


def test_a_name_with_its_value_reaches_the_method() -> None:
    config = check(NEEDED | {"kl": {"k1": 0.02}, "reference": {"ema": 0.9}})
    method = Method.of(config)
    assert (method.kl, method.kl_estimator) == config.kl_term == (0.02, "k1")
    assert config.ema_decay == 0.9 and check(NEEDED).ema_decay == EMA_DECAY
    assert check(NEEDED | {"kl": 0.04}).kl_term == (0.04, "k3")


def test_a_data_file_keeps_its_own_sampling(tmp_path: Path) -> None:
    row = {"problem": "q", "data_type": "text", "problem_type": "numerical", "solution": "<answer>1</answer>"}
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(row))
    own = {"path": str(tmp_path / "b.jsonl"), "frames": {"fps": 1.0}, "pixels": {"min": 784, "max": 1568}}
    config = check(NEEDED | {"data": [str(tmp_path / "a.jsonl"), own], "frames": 8})
    first, second = (row.sampling for row in RowSource.open(config.data, config.sampling))
    assert first == config.sampling() and first is not None and first.frames == 8
    assert second is not None and (second.fps, second.min_pixels, second.max_pixels) == (1.0, 784, 1568)
    (alone,) = {row.sampling for row in RowSource.open(config.data)}
    assert alone is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"frames": {"fps": 2, "min": 8, "max": 4}}, "frames: .*min is 8, max 4"),
        ({"frames": 1}, "frames: got 1"),
        ({"pixels": {"max": 4}}, "pixels"),
        ({"kl": {"k4": 1}}, "kl: got"),
        ({"kl": {"k1": 0.1, "k2": 0.1}}, "kl: got"),
        ({"kl": -1}, "kl: got -1"),
        ({"reference": {"ema": 1.5}}, "reference: got"),
        ({"reference": "old"}, "reference: got 'old'"),
        ({"bonus": {"formal": 0.1}}, "bonus: got"),
        ({"clip": [0.2]}, "clip: got"),
        ({"engine": "vlm"}, "engine: got 'vlm'; .*'generate', 'vllm' or the http"),
        ({"tracker": "mlflow"}, "tracker: got 'mlflow'"),
        ({"igsr_variant": "balanced"}, "unknown setting 'igsr_variant'"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(NEEDED | given)
