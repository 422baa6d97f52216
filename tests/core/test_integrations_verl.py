"""verl and EasyR1, against their published signatures.

The trainers are not installed: stand-ins call the adapters as the sources do, at the versions that each
adapter names. Log-probabilities are chosen; the rewards wanted are those of `common.rewards_from_logps`.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from raise_core.integrations import easyr1, verl
from tests.budget import assert_as_exact_as_fp32, assert_exact
from tests.core.adapter_cases import ROW_KINDS, SOLUTIONS, TEXTS, Batch, G, tokenizer


@pytest.fixture
def batch() -> Batch:
    made = Batch()
    assert (made.want.reward > 0).sum() >= 4 and made.score.unique().numel() >= 3
    return made


def test_verl_compute_score() -> None:
    """As the naive reward manager calls it; the first key is the reward, the others are logged."""
    got = verl.compute_score(
        data_source="d", solution_str=TEXTS[0], ground_truth="B",
        extra_info={"problem_type": "multiple choice", "num_turns": None, "rollout_reward_scores": {}},
    )  # fmt: skip
    assert got == {"score": 1.0, "acc": 1.0, "strict": 1.0}
    assert verl.compute_score("d", TEXTS[3], "B", kind="ocr") == {"score": 0.0, "acc": 0.0, "strict": 0.0}
    with pytest.raises(ValueError, match="d: got no kind of question; put it into extra_info"):
        verl.compute_score("d", TEXTS[0], "B", {})
    with pytest.raises(ValueError, match="d: ground_truth is None"):
        verl.compute_score("d", TEXTS[0], None, kind="ocr")  # type: ignore[arg-type]


def test_verl_apply_confidence(batch: Batch) -> None:
    data = batch.proto()
    data.batch["rm_scores"] = data.batch["token_level_scores"].clone()
    data.batch["token_level_rewards"] = data.batch["token_level_scores"] - 0.25  # a KL was taken off
    before = data.batch["token_level_scores"].clone()
    assert verl.apply_confidence(data, tokenizer(), group_size=G) is data
    for key in ("token_level_scores", "rm_scores"):
        last = data.batch[key][torch.arange(len(TEXTS)), batch.mask.sum(1) - 1]
        for got, want in zip(last.tolist(), batch.want.reward.tolist(), strict=True):
            assert_as_exact_as_fp32(got, want, name=key)
        assert (data.batch[key] != 0).sum() <= len(TEXTS)
    moved = data.batch["token_level_scores"] - before
    kept = data.batch["token_level_rewards"] + 0.25 - before
    assert_as_exact_as_fp32(float((kept - moved).abs().max()), 0.0, name="the KL is still in")
    assert_exact(data.batch["confidence"], batch.want.confidence, name="confidence")
    assert_exact(data.batch["text_score"], batch.score, name="text score")


def test_verl_tensordict(batch: Batch) -> None:
    """A TensorDict iterates over rows, not keys: only .keys(), [] and []= are used."""

    class Rows(dict):
        def __iter__(self) -> Any:
            raise AssertionError("iterated")

        def __contains__(self, key: object) -> bool:
            raise AssertionError("`in` is refused by TensorDict")

        def keys(self) -> Any:
            return list(dict.keys(self))

    data = batch.proto()
    data.batch = Rows(data.batch)
    verl.apply_confidence(data, tokenizer())
    assert_exact(data.batch["confidence"], batch.want.confidence, name="confidence")


@pytest.mark.parametrize(
    ("change", "options", "wanted"),
    [
        ({"ref_log_prob": None}, {}, "batch\\['ref_log_prob'\\] is missing: no reference policy was run"),
        ({"responses": None}, {}, "batch\\['responses'\\] is missing, got"),
        ({}, {"temperature": 0.6}, "logits / 0.6"),
        ({}, {"strict": "kind"}, "non_tensor_batch\\['kind'\\] is missing"),
        ({}, {"strict": lambda data: [True]}, "strict: got 1 values, wanted one for each of 8"),
        ({}, {"group_size": 8}, "group 0: got 4 completions, wanted group_size 8"),
        ({"token_level_scores": torch.ones(8, 9)}, {}, "token_level_scores\\[0\\]: got a text score of 9"),
        ({"response_mask": torch.zeros(8, 9)}, {}, "response_mask\\[0\\]: got no response token"),
    ],
)
def test_verl_refuses(batch: Batch, change: dict[str, Any], options: dict[str, Any], wanted: str) -> None:
    data = batch.proto(**change)
    data.batch = {key: value for key, value in data.batch.items() if value is not None}
    with pytest.raises(ValueError, match=wanted):
        verl.apply_confidence(data, tokenizer(), **options)


def test_verl_needs_to_know_the_temperature(batch: Batch) -> None:
    data = batch.proto()
    data.meta_info = {}
    with pytest.raises(ValueError, match="temperature: got None"):
        verl.apply_confidence(data, tokenizer())


def test_verl_v1_trainer(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_compute_advantage` of a v1 trainer: scores in the transfer queue, nested, are rewritten before."""

    class Fields(dict):
        def __init__(self, values: Any, batch_size: int = 8) -> None:
            super().__init__(values)
            self.batch_size = batch_size

        def to_padded_tensor(self) -> Any:
            return {k: v for k, v in self.items() if isinstance(v, torch.Tensor)}

    data = batch.proto()
    stored = {"rm_scores": data.batch["token_level_scores"], "responses": batch.responses,
              "ref_log_prob": batch.logps, "response_mask": batch.mask,
              "uid": SimpleNamespace(tolist=lambda: batch.uid)}  # fmt: skip
    extra = [{"reward_extra_info": {"strict": float(s)}} for s in batch.graded.strict]
    queue, proto, padding = (
        ModuleType(n) for n in ("transfer_queue", "verl.protocol", "verl.workers.utils.padding")
    )
    queue.kv_batch_get = lambda keys, partition_id, select_fields: Fields({**stored, "extra_fields": extra})  # type: ignore[attr-defined]
    queue.kv_batch_put = lambda keys, partition_id, fields: stored.update(fields)  # type: ignore[attr-defined]
    proto.DataProto = lambda batch: SimpleNamespace(batch=batch, non_tensor_batch={}, meta_info={})  # type: ignore[attr-defined]
    padding.response_to_nested = lambda values, mask: values  # type: ignore[attr-defined]
    for module in (queue, proto, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    class Trainer:
        tokenizer = tokenizer()
        config = SimpleNamespace(
            actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(temperature=1.0, n=G))
        )

        def _compute_advantage(self, keys: Any, metrics: Any) -> Any:
            return stored["rm_scores"].sum(1)

    class Ours(verl.ConfidenceMixin, Trainer):
        pass

    metrics: dict[str, float] = {}
    keys = type("Keys", (list,), {"keys": list(range(8)), "partition_id": "train"})(range(8))
    got = Ours()._compute_advantage(keys, metrics)
    for have, want in zip(got.tolist(), batch.want.reward.tolist(), strict=True):
        assert_as_exact_as_fp32(have, want, name="rm_scores")
    assert metrics["confidence/mean"] == float(batch.want.confidence.mean())


def truths() -> list[str]:
    pairs = zip(SOLUTIONS, ROW_KINDS, strict=True)
    return [json.dumps({"solution": s, "problem_type": k}) for s, k in pairs]


def test_easyr1_reward_and_advantage(batch: Batch) -> None:
    """As AutoRewardManager calls the file's function, then compute_advantage with its wrapper."""
    assert (easyr1.REWARD_TYPE, easyr1.REWARD_NAME) == ("batch", "raise_core")
    inputs = [{"response": t, "response_length": len(i), "ground_truth": g}
              for t, i, g in zip(TEXTS, batch.ids, truths(), strict=True)]  # fmt: skip
    graded = easyr1.compute_score(inputs)
    assert [row["overall"] for row in graded] == batch.score.tolist()
    assert graded[3] == {"overall": 0.0, "accuracy": 0.0, "answered": 0.0}
    (stray,) = easyr1.compute_score([inputs[0] | {"response": "B</answer>"}])
    assert stray["answered"] == 0.0
    data = batch.proto(ref_log_probs=batch.logps)
    data.batch["token_level_rewards"] = data.batch["token_level_scores"].clone()
    data.non_tensor_batch = {"uid": batch.uid, "ground_truth": truths()}
    seen: list[Any] = []

    def compute_advantage(data: Any, adv_estimator: str, gamma: float = 1.0) -> Any:
        seen.append((adv_estimator, gamma))
        return data.batch["token_level_rewards"].sum(1)

    ours = easyr1.with_confidence(compute_advantage, tokenizer(), strict=easyr1.strict_of_truth, group_size=G)
    for have, want in zip(ours(data, "grpo", gamma=0.5).tolist(), batch.want.reward.tolist(), strict=True):
        assert_as_exact_as_fp32(have, want, name="reward")
    assert seen == [("grpo", 0.5)]


def test_easyr1_names_the_truth_it_cannot_read() -> None:
    truth = '{"solution": "B", "problem_type": "ocr"}'
    rows = [{"response": "", "response_length": 0, "ground_truth": given} for given in (truth, "B")]
    with pytest.raises(ValueError, match="row 1: ground_truth 'B' is not"):
        easyr1.compute_score(rows)
    assert easyr1.compute_score(rows[1:], kind="numerical")[0]["overall"] == 0
