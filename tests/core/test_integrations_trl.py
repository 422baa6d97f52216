"""TRL's own GRPOTrainer with our rewards: a text model, a vision-language model, LoRA, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_core.integrations.trl import FILE, ConfidenceMixin, ConfidenceReward
from tests.budget import assert_exact, assert_within_error_budget
from tests.core.adapter_cases import KINDS, processor, tokenizer, word_ids
from tests.tiny_models import VOCAB, text_model, vision_model

pytest.importorskip("trl", reason="trl is not installed; pip install 'trl>=1.16'")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's and its packages' own warnings are not ours
G, STEPS = 4, 3


class Seen(ConfidenceReward):
    """Keeps what TRL asks and what it is answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any
    ) -> list[float | None]:
        extra: dict[str, list[Any]] = {}
        made = super().__call__(
            prompts, completions, completion_ids, **{**columns, "log_extra": extra.__setitem__}
        )
        if "log_extra" in columns:
            for name, values in extra.items():
                columns["log_extra"](name, values)
        self.calls.append({"prompts": prompts, "ids": completion_ids, "made": made, **columns, **extra})
        return made


def text_policy() -> Any:
    torch.manual_seed(1)
    model = text_model("Qwen2")
    model.get_output_embeddings().weight.data.mul_(0.1)  # so that all words are drawn
    return model


def rows(conversational: bool = True, count: int = 4) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        solution, kind = list(KINDS.items())[i % 2]
        said = f"Question {i}?"
        prompt: Any = [{"role": "user", "content": said}] if conversational else said
        made.append({"prompt": prompt, "solution": solution, "problem_type": kind})
    return made


def train(
    folder: Path, model: Any, reward: Any, data: list[dict[str, Any]], *, kind: Any = None,
    steps: int = STEPS, processing: Any = None, attach: dict[str, Any] | None = None, resume: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    peft = more.pop("peft_config", None)
    unwanted = [i for i in range(VOCAB) if i not in word_ids()]
    args = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        max_steps=steps, per_device_train_batch_size=2 * G, num_generations=G, max_completion_length=24,
        logging_steps=1, generation_kwargs={"suppress_tokens": unwanted},
        **{"save_strategy": "no", "learning_rate": 1e-3, **more},
    )  # fmt: skip
    trainer = (kind or GRPOTrainer)(
        model=model, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(data),
        processing_class=processing or tokenizer(), peft_config=peft,
    )  # fmt: skip
    if attach is not None:
        reward.attach(trainer, **attach)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def ours(model: Any, call: dict[str, Any], encode: Any, what: str = "reward") -> tuple[list[float], int]:
    """The rewards (or confidence) of a call straight from the Scorer, and how many completions answer."""
    prompts = [encode(p) for p in call["prompts"][::G]]
    ids = [call["ids"][i : i + G] for i in range(0, len(call["ids"]), G)]
    kinds = [k.replace(" ", "_").replace("-", "_") for k in call["problem_type"]]
    flat = [tokenizer().decode(c) for c in call["ids"]]
    score = [rc.verify(k, t, s) for k, t, s in zip(kinds, flat, call["solution"], strict=True)]
    strict = [k == "multiple_choice" for k in kinds]
    got = rc.Scorer(model).rewards(prompts, ids, score, strict, tokenizer())
    return getattr(got, what).tolist(), sum(
        f.reason is None for f in rc.find_answer_spans(call["ids"], tokenizer())
    )


def by_template(prompt: Any) -> Any:
    return tokenizer().apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def test_stock_trainer_with_a_model_of_its_own(tmp_path: Path) -> None:
    policy = text_policy()
    reference = copy.deepcopy(policy)
    reward = Seen(reference, tokenizer(), group_size=G)
    trainer = train(tmp_path, policy, reward, rows())
    assert len(reward.calls) == STEPS
    answered = positive = 0
    for call in reward.calls:
        want, count = ours(reference, call, by_template)
        assert_exact(torch.tensor(call["made"]), torch.tensor(want), name="reward")
        answered, positive = answered + count, positive + sum(r > 0 for r in want)
    assert answered > G and positive > 1
    logged = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logged) == STEPS and "rewards/confidence/mean" in logged[0]
    assert {"confidence/mean", "confidence/answer_missing_share"} <= logged[0].keys()
    assert not any(
        torch.equal(a, b)
        for a, b in zip(policy.parameters(), reference.parameters(), strict=True)
        if a.ndim > 1
    )


def test_standard_prompts_and_a_share(tmp_path: Path) -> None:
    policy = text_policy()
    reference = copy.deepcopy(policy)
    reward = Seen(reference, tokenizer(), confidence_share=0.5)  # groups by equal prompts
    train(tmp_path, policy, reward, rows(conversational=False), steps=1)
    (call,) = reward.calls
    whole, _ = ours(reference, call, lambda p: tokenizer()(text=[p], return_tensors="pt"))
    full = Seen(reference, tokenizer(), confidence_share=0.0)
    text = full(**{k: call[k] for k in ("prompts", "solution", "problem_type")}, completions=None,
                completion_ids=call["ids"])  # fmt: skip
    want = [0.5 * t + 0.5 * w for t, w in zip(text, whole, strict=True) if t is not None]
    assert_exact(torch.tensor(call["made"]), torch.tensor(want), name="half text, half confidence")


@pytest.mark.parametrize("reference", ["ema", "frozen", "policy"])
def test_the_trainers_own_model(reference: str, tmp_path: Path) -> None:
    """Attached: the reference is scored inside the trainer's model and follows it as told."""
    policy = text_policy()
    start = copy.deepcopy(policy)
    ema = {"decay": 0.5, "every": 1} if reference == "ema" else {}
    reward = Seen(reference)
    train(tmp_path, policy, reward, rows(), attach=ema)
    first, later = reward.calls[0], reward.calls[1:]
    want, _ = ours(start, first, by_template)
    assert_exact(torch.tensor(first["made"]), torch.tensor(want), name="before the first step")
    unmoved = [ours(start, call, by_template, "confidence") for call in later]
    assert sum(answered for _, answered in unmoved) > 0
    same = [values for values, _ in unmoved] == [call["confidence"] for call in later]
    assert same == (reference == "frozen")
    assert isinstance(reward.reference, rc.Reference)
    assert reward.reference.step == STEPS
    with reward.reference.active() as model:
        moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert any(moved) == (reference != "frozen")


def test_the_reference_is_resumed(tmp_path: Path) -> None:
    def once(folder: Path, steps: int, resume: bool) -> Any:
        reward = ConfidenceReward("ema")
        train(folder, text_policy(), reward, rows(), steps=steps, resume=resume,
              attach={"decay": 0.5, "every": 1}, save_strategy="steps", save_steps=1,
              lr_scheduler_type="constant")  # fmt: skip
        return reward.reference.state_dict()

    through = once(tmp_path / "a", 3, False)
    once(tmp_path / "b", 2, False)
    assert (tmp_path / "b" / "checkpoint-2" / FILE).is_file()
    resumed = once(tmp_path / "b", 3, True)
    assert through.keys() == resumed.keys() and int(resumed["step"]) == 3
    for name, tensor in through.items():
        assert_exact(resumed[name], tensor, name=name)


def test_lora(tmp_path: Path) -> None:
    """The second adapter is the reference; the trainer's own KL runs beside it."""
    from peft import LoraConfig

    policy = text_policy()
    start = copy.deepcopy(policy)
    reward = Seen("ema")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    train(tmp_path, policy, reward, rows(), peft_config=config, attach={"decay": 0.5, "every": 1}, beta=0.1)
    want, _ = ours(start, reward.calls[0], by_template)
    assert_within_error_budget(
        torch.tensor(reward.calls[0]["made"]),
        torch.tensor(
            ours(copy.deepcopy(start).double(), reward.calls[0], by_template)[0], dtype=torch.float64
        ),
        torch.tensor(want),
        name="a new adapter is the base model",
    )


def mixed_trainer() -> Any:
    from trl import GRPOTrainer

    class Trainer(ConfidenceMixin, GRPOTrainer):
        pass

    return Trainer


@pytest.mark.parametrize("lora", [False, True])
def test_mixin_lends_the_reference(lora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig

    start = text_policy()
    start.save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    reward = Seen(processing_class=tokenizer(), group_size=G)
    train(
        tmp_path / "out",
        str(tmp_path / "model"),
        reward,
        rows(),
        kind=mixed_trainer(),
        beta=0.1,
        peft_config=config,
    )
    for call in reward.calls:
        peer, _ = ours(start, call, by_template)
        exact, _ = ours(copy.deepcopy(start).double(), call, by_template)
        assert_within_error_budget(
            torch.tensor(call["made"]),
            torch.tensor(exact, dtype=torch.float64),
            torch.tensor(peer),
            name="reward",
        )
        assert [len(row) for row in call["ref_logps"]] == [len(ids) for ids in call["ids"]]


def test_mixin_leaves_out_completions_that_trl_masks(tmp_path: Path) -> None:
    text_policy().save_pretrained(tmp_path / "model")
    reward = Seen(processing_class=tokenizer(), group_size=G)
    train(tmp_path / "out", str(tmp_path / "model"), reward, rows(), kind=mixed_trainer(), beta=0.1,
          mask_truncated_completions=True, steps=2)  # fmt: skip
    ends = [ids[-1] == tokenizer().eos_token_id for call in reward.calls for ids in call["ids"]]
    given = [made is not None for call in reward.calls for made in call["made"]]
    assert given == ends and set(ends) == {True, False}


@pytest.mark.parametrize(("change", "wanted"), [({"beta": 0.0}, "beta: got 0"),
                                                 ({"temperature": 0.7}, "logits / 0.7")])  # fmt: skip
def test_mixin_refuses(change: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    text_policy().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=wanted):
        reward = ConfidenceReward(processing_class=tokenizer())
        train(tmp_path / "out", str(tmp_path / "model"), reward, rows(),
              kind=mixed_trainer(), **{"beta": 0.1, **change})  # fmt: skip


@pytest.mark.parametrize("images", ["column", "inside"])
def test_vision_language(images: str, tmp_path: Path) -> None:
    """Images from a column or inside the messages, and rows of text alone."""
    from PIL import Image

    torch.manual_seed(3)
    policy = vision_model("Qwen2_5_VL")
    policy.get_output_embeddings().weight.data.mul_(0.1)
    reference = copy.deepcopy(policy)
    data = rows()
    for i, row in enumerate(data):
        image = Image.effect_noise((16, 16), 60.0 + i).convert("RGB")
        if images == "column":
            row["images"] = [image]
    reward = Seen(reference, processor(), group_size=G)
    train(tmp_path, policy, reward, data, processing=processor(), steps=2)
    for call in reward.calls:
        want, answered = ours(
            reference, call,
            lambda p: processor().apply_chat_template(
                conversation=[[m if not isinstance(m["content"], str) else
                               {**m, "content": [{"type": "text", "text": m["content"]}]} for m in p]],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            ),
        )  # fmt: skip
        assert answered > 0
        assert_exact(torch.tensor(call["made"]), torch.tensor(want), name="reward")
