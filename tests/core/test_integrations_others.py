"""ms-swift, OpenRLHF, slime and Video-R1; the examples, against their published signatures.

The trainers are not installed: stand-ins call the adapters as the sources do, at the versions that each
adapter names. Log-probabilities are chosen; the rewards wanted are those of `common.rewards_from_logps`.
"""

from __future__ import annotations

import asyncio
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raise_core import group_advantages
from raise_core.integrations import common, ms_swift, openrlhf, slime, video_r1
from tests.budget import assert_as_exact_as_fp32, assert_exact
from tests.core.adapter_cases import ROW_KINDS, SOLUTIONS, TEXTS, Batch, G, encode, tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "adapters"


@pytest.fixture
def batch() -> Batch:
    made = Batch()
    assert (made.want.reward > 0).sum() >= 4 and made.score.unique().numel() >= 3
    return made


def swift_batches(batch: Batch, **change: Any) -> list[dict[str, Any]]:
    """Two micro-batches as `_prepare_batch_inputs` leaves them: prompts in front, GRPOBatch beside."""
    made = []
    for rows in (slice(0, 3), slice(3, 8)):
        prompt = torch.full((len(batch.ids[rows]), 5), 9)
        grpo = SimpleNamespace(completion_mask=batch.mask[rows], ref_per_token_logps=batch.logps[rows],
                               old_per_token_logps=2 * batch.logps[rows])  # fmt: skip
        vars(grpo).update({k: v if v is None else v[rows] for k, v in change.items()})
        tokens = torch.cat([prompt, batch.responses[rows]], 1)
        made.append({"model_inputs": {"input_ids": tokens}, "grpo_batch": grpo})
    return made


class SwiftTrainer:
    """swift's own part: what it gets is what its advantages would come from."""

    temperature = 1.0
    reward_func_names = ("Format", "TextScore")
    processing_class = SimpleNamespace(tokenizer=tokenizer())

    def _compute_advantages(self, samples: Any, rewards_per_func: Any, batch_encoded_inputs: Any) -> Any:
        return rewards_per_func


class SwiftOurs(ms_swift.ConfidenceMixin, SwiftTrainer):
    pass


def swift_samples(batch: Batch) -> list[Any]:
    return [SimpleNamespace(prompt_id=uid, extra={"problem_type": kind})
            for uid, kind in zip(batch.uid, ROW_KINDS, strict=True)]  # fmt: skip


def test_swift_orm() -> None:
    """Called positionally, with columns of all kinds beside; None where there is no solution."""
    orm = ms_swift.TextScore(args=object())
    got = orm(
        TEXTS, solution=[None, *SOLUTIONS[1:]], problem_type=ROW_KINDS, messages=[[]] * 8, trainer_state=None
    )
    assert got == [None, *common.grade(TEXTS, SOLUTIONS, ROW_KINDS).score.tolist()[1:]]
    with pytest.raises(ValueError, match=r"column 'problem_type' .* is missing, got \['solution'\]"):
        orm(TEXTS, solution=SOLUTIONS)
    with pytest.raises(TypeError, match=r"completions\[0\]: got list, wanted the decoded text"):
        orm([[1, 2]], solution=["B"], problem_type=["ocr"])  # type: ignore[list-item]


def test_swift_advantages(batch: Batch) -> None:
    rewards = torch.stack([torch.full((8,), 0.25), batch.score], 1)
    got = SwiftOurs()._compute_advantages(swift_samples(batch), rewards, swift_batches(batch))
    assert_exact(got[:, 0], rewards[:, 0], name="the other reward")
    assert_exact(got[:, 1], batch.want.reward, name="confidence rewards")
    assert_exact(rewards[:, 1], batch.score, name="the argument is not written")


def test_swift_leaves_rows_without_reward_alone(batch: Batch) -> None:
    rewards = torch.stack([torch.zeros(8), batch.score], 1)
    rewards[:4, 1] = math.nan
    got = SwiftOurs()._compute_advantages(swift_samples(batch), rewards, swift_batches(batch))
    assert bool(got[:4, 1].isnan().all())
    assert_exact(got[4:, 1], batch.want.reward[4:], name="the other group")


@pytest.mark.parametrize(
    ("attributes", "change", "wanted"),
    [
        ({}, {"ref_per_token_logps": None}, "source: got 'ref', but its log-probabilities were not computed"),
        ({"temperature": 0.9}, {}, "logits / 0.9"),
        ({"text_score": "raise"}, {}, "text_score: got 'raise', wanted one of the rewards"),
        ({"group_size": 3}, {}, "group 0: got 4 completions, wanted group_size 3; a group is split over"),
        ({}, {"completion_mask": torch.ones(8, 12)}, "padding_free"),
    ],
)
def test_swift_refuses(batch: Batch, attributes: dict[str, Any], change: dict[str, Any], wanted: str) -> None:
    trainer = SwiftOurs()
    vars(trainer).update(attributes)
    rewards = torch.stack([torch.zeros(8), batch.score], 1)
    with pytest.raises(ValueError, match=wanted):
        trainer._compute_advantages(swift_samples(batch), rewards, swift_batches(batch, **change))


def test_swift_policy_as_source(batch: Batch) -> None:
    trainer = SwiftOurs()
    trainer.source = "old"
    rewards = torch.stack([torch.zeros(8), batch.score], 1)
    got = trainer._compute_advantages(
        swift_samples(batch), rewards, swift_batches(batch, ref_per_token_logps=None)
    )
    want = common.rewards_from_logps(
        2 * batch.logps, batch.ids, tokenizer(), batch.score, batch.graded.strict, batch.uid
    )
    assert_exact(got[:, 1], want.reward, name="reward")


def test_openrlhf_reward_func() -> None:
    """As SingleTurnAgentExecutor calls it: one query, prompt and label, positionally, in a thread."""
    func = openrlhf.make_reward_func(kind="multiple_choice", response_start="<|assistant|>")
    prompt = "Which? e.g. <answer>B</answer>"
    got = asyncio.run(asyncio.to_thread(func, [prompt + " <answer>A</answer><|end|>"], [prompt], ["A"]))
    assert got["rewards"].tolist() == got["scores"].tolist() == [1.0]
    for text in (" well", " B</answer>", " <answer></answer>"):
        none = func([prompt + text], [prompt], ["B"])
        assert none["rewards"].tolist() == [0.0] and none["extra_logs"]["answered"].tolist() == [0.0]
    expanded = "<image><image>" + prompt + "<|assistant|><answer>A</answer>"
    assert func([expanded], [prompt], ["A"])["rewards"].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"queries\[0\]: does not begin with its prompt"):
        func(["another"], [prompt], ["A"])


def rollout(text: str, **change: Any) -> dict[str, Any]:
    ids = encode(text)
    return {"observation_tokens": [9, 9, 9, *ids], "action_ranges": [(3, 3 + len(ids))], "label": "B",
            "rollout_log_probs": [0.0] * 3 + [-0.5] * len(ids), "extra_logs": {"kept": 1},
            **change}  # fmt: skip


def test_openrlhf_agent() -> None:
    made = rollout("so <answer>B</answer>")
    got = openrlhf.add_confidence(made, tokenizer(), kind="multiple_choice", temperature=1.0)
    assert_as_exact_as_fp32(got["reward"], math.exp(-0.5 * math.exp(-0.1)), name="SCRE of one token")
    assert got["scores"] == 1.0 and got["extra_logs"]["kept"] == 1


@pytest.mark.parametrize(
    ("change", "options", "wanted"),
    [
        ({"rollout_log_probs": None}, {}, "rollout_log_probs: got None"),
        ({}, {"kind": "free_form"}, "which IGSR rewards inside a prompt's group"),
        ({}, {"temperature": 0.5}, "logits / 0.5"),
    ],
)
def test_openrlhf_agent_refuses(change: dict[str, Any], options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        openrlhf.add_confidence(
            rollout("<answer>B</answer>", **change), tokenizer(),
            **{"kind": "multiple_choice", "temperature": 1.0, **options},
        )  # fmt: skip


def slime_data(batch: Batch, rows: slice = slice(0, 8)) -> dict[str, Any]:
    ids = batch.ids[rows]
    data = {
        "tokens": [torch.tensor([7, 8, *i]) for i in ids],
        "response_lengths": [len(i) for i in ids],
        "sample_indices": list(range(40, 48))[rows],
        "raw_reward": batch.score.tolist(),
        "local_raw_reward": batch.score[rows].tolist(),
        "ref_log_probs": [row[: len(i)] for row, i in zip(batch.logps[rows], ids, strict=True)],
        "strict": batch.graded.strict[rows].tolist(),
    }
    return data


ARGS = SimpleNamespace(
    n_samples_per_prompt=G, rollout_temperature=1.0, context_parallel_size=1, hf_checkpoint="-"
)


def test_slime_advantage(batch: Batch) -> None:
    data = slime_data(batch)
    custom = slime.make_custom_advantage(tokenizer(), strict=lambda data: data["strict"])
    assert custom(ARGS, data) is None
    want = group_advantages(batch.want.reward, torch.arange(8) // G)
    for b, advantage in enumerate(data["advantages"]):
        assert advantage.shape == (len(batch.ids[b]),)
        assert_exact(advantage.unique(), want[b : b + 1], name="one advantage for a response")
    assert data["confidence"] == batch.want.confidence.tolist()
    assert [r.tolist() for r in data["returns"]] == [a.tolist() for a in data["advantages"]]


@pytest.mark.parametrize(
    ("args", "change", "wanted"),
    [
        ({}, {"ref_log_probs": None}, "ref_log_probs: missing, no reference was run"),
        ({"context_parallel_size": 2}, {}, "context_parallel_size: got 2, wanted 1"),
        ({"rollout_temperature": 0.8}, {}, "logits / 0.8"),
        ({"n_samples_per_prompt": 3}, {}, "a group is split over processes or calls"),
        ({}, {"local_raw_reward": [0.5] * 7}, "raw_reward: got 7, wanted one for each of 8"),
        ({}, {"local_raw_reward": [0.5] * 7 + [-1.0]}, r"raw_reward\[7\]: got -1.0"),
    ],
)
def test_slime_refuses(batch: Batch, args: dict[str, Any], change: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        slime.make_custom_advantage(tokenizer())(
            SimpleNamespace(**{**vars(ARGS), **args}), {**slime_data(batch), **change}
        )


def test_video_r1(batch: Batch) -> None:
    """Each row by its own kind (Video-R1 looks at the first row's), then one group at a time."""
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    got = video_r1.accuracy_reward(
        prompts=[""] * 8, completions=completions, solution=SOLUTIONS, problem_type=ROW_KINDS
    )
    assert got == batch.score.tolist()
    reward = video_r1.confidence_column(
        SimpleNamespace(tokenizer=tokenizer()), batch.responses, batch.mask, batch.logps,
        batch.score.double(), kind=ROW_KINDS, num_generations=G,
    )  # fmt: skip
    assert_exact(reward, batch.want.reward.double(), name="reward")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"ref_per_token_logps": torch.zeros(8, 30)}, "cut the prompt off"),
        ({"accuracy": torch.full((8,), 1.3)}, "accuracy: got .* without bonuses"),
        ({"num_generations": 3}, "a group is split"),
        ({"kind": "riddle"}, "kind: got 'riddle'"),
    ],
)
def test_video_r1_refuses(batch: Batch, change: dict[str, Any], wanted: str) -> None:
    call = {"processing_class": tokenizer(), "completion_ids": batch.responses, "completion_mask": batch.mask,
            "ref_per_token_logps": batch.logps, "accuracy": batch.score, "kind": "ocr", **change}  # fmt: skip
    with pytest.raises(ValueError, match=wanted):
        video_r1.confidence_column(**call)


@pytest.mark.parametrize(
    "name", ["raw", "verl_trainer", "ms_swift_plugin", "easyr1_advantage", "openrlhf_agent",
             "slime_advantage", "video_r1_step"]
)  # fmt: skip
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "0." in capsys.readouterr().out
