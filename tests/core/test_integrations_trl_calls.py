"""The reward function and the mixin as TRL calls them, without TRL: bad rows, groups, log-probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist

import raise_core as rc
from raise_core.integrations.trl import ConfidenceMixin, ConfidenceReward
from tests.budget import assert_exact
from tests.core.adapter_cases import Batch, G, encode, tokenizer
from tests.tiny_models import text_model

LOGP = math.log(0.5)


def call(reward: ConfidenceReward, texts: list[str], **change: Any) -> list[float | None]:
    """One call for a group, as TRL makes it: keywords, columns as lists, its own arguments beside."""
    ids = [encode(text) for text in texts]
    given = {
        "prompts": ["Which?"] * len(texts), "completions": texts, "completion_ids": ids,
        "solution": ["B"] * len(texts), "problem_type": ["multiple choice"] * len(texts),
        "ref_logps": [[LOGP] * len(row) for row in ids], "trainer_state": object(), "index": [0] * len(texts),
    }  # fmt: skip
    given |= change
    return reward(**{k: v for k, v in given.items() if v is not None})


def lent(**options: Any) -> ConfidenceReward:
    return ConfidenceReward(processing_class=tokenizer(), **options)


def test_lent_log_probabilities_by_hand() -> None:
    got = call(lent(), ["a <answer>B</answer>", "<answer>A</answer>", "no", "<answer></answer>"])
    want = torch.tensor(math.exp(-0.1), dtype=torch.float64).mul(LOGP).exp()
    assert got[1:] == [0.0, 0.0, 0.0]  # wrong, no tags, nothing inside: never a confidence of 1
    assert got[0] is not None and abs(got[0] - float(want)) <= torch.finfo(torch.float32).eps


def test_what_is_logged() -> None:
    extra: dict[str, Any] = {}
    metric: dict[str, float] = {}
    call(lent(), ["<answer>B</answer>", "no"], solution=["B", None], log_extra=extra.__setitem__,
         log_metric=metric.__setitem__)  # fmt: skip
    assert extra["text_score"] == [1.0, None] and extra["confidence"][1] is None
    assert metric["confidence/mean"] == extra["confidence"][0]
    assert metric["confidence/text_score"] == 1.0 and metric["confidence/answer_missing_share"] == 0.0


def test_none_where_there_is_no_solution_or_no_log_probability() -> None:
    texts = ["<answer>B</answer>"] * 4
    ids = encode(texts[0])
    some = [[LOGP] * len(ids), None, [LOGP] * len(ids), [LOGP] * len(ids)]
    got = call(lent(group_size=4), texts, ref_logps=some, solution=["B", "B", None, "B"])
    assert [value is None for value in got] == [False, True, True, False]
    assert call(lent(), texts, solution=[None] * 4) == [None] * 4


def test_open_rows_are_ranked_inside_their_group() -> None:
    batch = Batch()
    rows = [row[: len(ids)].tolist() for row, ids in zip(batch.logps, batch.ids, strict=True)]
    from tests.core.adapter_cases import ROW_KINDS, SOLUTIONS, TEXTS

    for options in ({"group_size": G}, {}):
        got = call(lent(**options), TEXTS, prompts=["a"] * G + ["b"] * G, ref_logps=rows, solution=SOLUTIONS,
                   problem_type=ROW_KINDS)  # fmt: skip
        assert_exact(torch.tensor(got), batch.want.reward, name="reward")


def test_another_measure_of_confidence() -> None:
    """Half of the text score's weight, each answer by its least sure token; none without an answer."""
    texts = ["<answer>B</answer>", "<answer>A</answer>", "no"]
    ids = [encode(text) for text in texts]
    logps = [[math.log(0.25)] * len(row) for row in ids]
    got = call(lent(measure=rc.min_prob, confidence_share=0.5), texts, ref_logps=logps)
    assert got == [0.625, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"measure: got \[-.*wanted a number from 0 to 1"):
        call(lent(measure=rc.sum_logp), texts, ref_logps=logps)


def test_one_kind_for_all_and_other_columns() -> None:
    reward = lent(kind="numerical", solution_column="answer")
    got = call(reward, ["<answer>7</answer>"], solution=None, problem_type=None, answer=["7.0"])
    assert got[0] is not None and got[0] > 0


@pytest.mark.parametrize(
    ("options", "change", "wanted"),
    [
        ({}, {"solution": None}, r"column 'solution' \(the right answers\) is missing, got"),
        ({}, {"problem_type": None}, r"column 'problem_type' .* or give kind="),
        ({}, {"problem_type": ["riddle"] * 4}, "row 0: kind: got 'riddle', wanted one of multiple_choice"),
        ({}, {"solution": ["B"] * 3}, "column 'solution': got 3 values, wanted one for each of 4 rows"),
        ({}, {"ref_logps": None}, "reference: got None and no ref_logps column"),
        ({}, {"ref_logps": [[0.0]] * 4}, r"logps\[0\]: got 1 log-probabilities, wanted 3"),
        ({"group_size": 3}, {}, "got 4 rows here, wanted a multiple of 3; a group is split over calls"),
        (
            {"group_size": 2},
            {"prompts": ["a", "b", "b", "b"]},
            r"prompts\[1\]: got another prompt than row 0",
        ),
        ({}, {"prompts": [{"x": np.zeros(2)} for _ in range(4)]}, "prompts: got arrays"),
    ],
)
def test_bad_calls_are_refused(options: dict[str, Any], change: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        call(lent(**options), ["<answer>B</answer>"] * 4, **change)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"reference": "teacher"}, "reference: got 'teacher', wanted a model"),
        ({"confidence_share": 2.0}, "confidence_share: got 2.0"),
        ({"tau": 0.9}, "tau"),
        ({"variant": "new"}, "variant"),
        ({"strict_kinds": ("riddle",)}, "kind: got 'riddle'"),
    ],
)
def test_bad_settings_are_refused_at_once(arguments: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        ConfidenceReward(processing_class=tokenizer(), **arguments)


def test_unknown_options_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'etta'"):
        ConfidenceReward(etta=0.2)


def test_a_name_needs_attach_and_a_processing_class_is_needed() -> None:
    with pytest.raises(ValueError, match="reference: got 'ema' and no ref_logps column"):
        call(ConfidenceReward("ema", tokenizer()), ["<answer>B</answer>"], ref_logps=None)
    with pytest.raises(ValueError, match="processing_class: got None"):
        call(ConfidenceReward(), ["<answer>B</answer>"])


def test_several_processes_need_the_group_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match="group_size: got None on several processes"):
        call(lent(), ["<answer>B</answer>"])
    with pytest.raises(
        ValueError, match="got 3 rows on each of 2 processes, wanted a multiple of 4; a group"
    ):
        call(lent(group_size=4), ["<answer>B</answer>"] * 3)


def test_a_model_in_training_mode_is_scored_in_evaluation_mode_and_left_as_it_was() -> None:
    model = text_model("Llama", attention_dropout=0.5).train()
    reward = ConfidenceReward(
        model, tokenizer(), template_options={"chat_template": "{{ messages[0].content }}"}
    )
    prompts: Any = [[{"role": "user", "content": "Which?"}]] * 2
    texts = ["a <answer>B</answer>", "<answer>B</answer>"]
    got = call(reward, texts, prompts=prompts, ref_logps=None)
    assert model.training and got == call(reward, texts, prompts=prompts, ref_logps=None)
    model.eval()
    encoded = tokenizer()(text=["Which?"], return_tensors="pt")
    want = rc.Scorer(model).rewards(
        [encoded], [[encode(t) for t in texts]], [1.0, 1.0], [True, True], tokenizer()
    )
    assert_exact(torch.tensor(got), want.reward, name="reward")


def stand_in(**state: Any) -> Any:
    """What `attach` takes of a trainer."""
    plugin = SimpleNamespace(zero_stage=state.pop("zero_stage", 0))
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    return SimpleNamespace(accelerator=accelerator, processing_class=tokenizer(), **state)


def test_attach_refuses_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="deepspeed: got ZeRO-3"):
        ConfidenceReward("ema").attach(stand_in(zero_stage=3))
    with pytest.raises(ValueError, match='how: got "copy", but TRL binds forward'):
        ConfidenceReward("ema").attach(stand_in(), how="copy")


class Base:
    """GRPOTrainer's part in a mixin's life: log-probabilities of two models, then rewards."""

    def __init__(self, beta: float, temperature: float) -> None:
        self.beta, self.temperature = beta, temperature

    def _get_per_token_logps_and_entropies(
        self,
        model: float,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
    ) -> Any:
        return torch.full((len(input_ids), logits_to_keep), model), None, None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        return inputs


class Mixed(ConfidenceMixin, Base):
    pass


def test_the_mixin_lends_the_last_log_probabilities_before_the_rewards() -> None:
    trainer = Mixed(beta=0.1, temperature=1.0)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    for model in (-1.0, -2.0):  # the policy, then the reference
        trainer._get_per_token_logps_and_entropies(model, torch.zeros(2, 5), mask, 3, batch_size=1)
    rows = [{"solution": "A"}, {"solution": "B"}]
    made = trainer._calculate_rewards(rows, None, None, [[5, 6], [7]])
    assert made == [{"solution": "A", "ref_logps": [-2.0, -2.0]}, {"solution": "B", "ref_logps": None}]
    assert rows[0] == {"solution": "A"}


def test_the_mixin_refuses_a_temperature_unless_told() -> None:
    with pytest.raises(ValueError, match=r"logits / 0\.8"):
        Mixed(beta=0.1, temperature=0.8)
    with pytest.raises(ValueError, match="beta: got 0"):
        Mixed(beta=0.0, temperature=1.0)

    class Any_(Mixed):
        any_temperature = True

    assert Any_(beta=0.1, temperature=0.8).temperature == 0.8
