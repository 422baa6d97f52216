"""What the arms of a seed of `raise-core study --steps` share: its data, its warm start and its PRM."""

import copy
import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import raise_core as rc

from .. import tiny
from ..chain_judge import ChainJudge
from ..chain_tokens import add_chain_tokens
from ..config import DemoConfig
from ..data import Refused, load_rows
from ..demo_steps import ROOM, learned, prepare, prm_figures
from ..evaluate import judge
from ..prompts import Prompt, PromptBuilder
from ..rows import Row
from ..steps_config import SMOKE as DEMO_SMOKE
from ..steps_config import StepsConfig
from .one import quiet_log


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """How large the runs are, the same for every arm.

    Down to `lr` fields and defaults of `StepsConfig`, for what the arms of a seed share; the others, of
    `DemoConfig`, for what each does.
    """

    frames: int = StepsConfig.frames
    train_videos: int = StepsConfig.train_videos
    test_videos: int = StepsConfig.test_videos
    look_steps: int = StepsConfig.look_steps
    look_batch: int = StepsConfig.look_batch
    warm_steps: int = StepsConfig.warm_steps
    own_chains: int = StepsConfig.own_chains
    prm_steps: int = StepsConfig.prm_steps
    batch: int = StepsConfig.batch
    lr: float = StepsConfig.lr
    grpo_steps: int = 32
    prompts: int = 8
    group_size: int = 8
    grpo_lr: float = 2e-4
    eval_samples: int = 4

    def shared(self, seed: int, out: Path) -> StepsConfig:
        """Settings of the data, the warm start and the PRM of a seed."""
        return StepsConfig(out=out, seed=seed, **self._of(StepsConfig))

    def grpo(self, seed: int, out: Path) -> DemoConfig:
        """Settings of an arm's GRPO."""
        return DemoConfig(out=out, seed=seed, max_new_tokens=ROOM, **self._of(DemoConfig))

    def _of(self, config: Any) -> dict[str, Any]:
        known = {f.name for f in fields(config)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in known}


FULL_STEPS = StepSizes()
SMOKE_STEPS = StepSizes(
    **{f.name: DEMO_SMOKE[f.name] for f in fields(StepSizes) if f.name in DEMO_SMOKE},
    grpo_steps=2, prompts=2, group_size=4, eval_samples=2,
)  # fmt: skip


class Described(Row):
    """A question whose text score is the outcome: 1 for a description right in all three words, else 0."""

    def verdict(self, completion: str) -> rc.Verdict:
        """The rule's verdict, with 0 or 1 for its score."""
        return replace(super().verdict(completion), score=float(judge(self, completion)[0]))


@dataclass(frozen=True)
class StepSeed:
    """What the arms of a seed share; `policy` is the warm start, and stays as it is."""

    processor: Any
    policy: Any
    prm: Any
    train: list[Prompt]
    test: list[Prompt]
    figures: dict[str, float]  # of the PRM, on the warm start's own chains of unseen videos

    @property
    def sampling(self) -> dict[str, Any]:
        """How completions are sampled, whatever the temperature."""
        tokenizer = self.processor.tokenizer
        never = tokenizer.convert_tokens_to_ids(list(tiny.MEDIA))
        return {"max_new_tokens": ROOM, "eos": [tokenizer.eos_token_id], "suppress": never}


def made_folder(work: Path, seed: int) -> Path:
    """Where what the arms of a seed share is kept."""
    return work / f"seed-{seed}" / "made"


def make_seed(folder: Path, seed: int, sizes: StepSizes) -> None:
    """The seed's data, its policy (`sft`) and its PRM (`prm`), as the demo in steps makes them."""
    with quiet_log(folder) as log:
        config = sizes.shared(seed, folder)
        data = prepare(config, log)
        policy, prm = learned(data, config, log)
        prm.eval().requires_grad_(False)
        figures = prm_figures(ChainJudge(prm, data.processor.tokenizer), data, policy, config, log)
        (folder / "prm.json").write_text(json.dumps(figures), encoding="utf-8")


@functools.lru_cache(maxsize=1)
def open_seed(work: Path, seed: int, sizes: StepSizes) -> StepSeed:
    """What is made of a seed, every video decoded. A process does the arms of a seed one after the other."""
    made, processor = made_folder(work, seed), tiny.build_processor()
    model = tiny.build_model(processor, seed=seed)
    add_chain_tokens(model, processor.tokenizer)
    builder = PromptBuilder(processor, frames=sizes.frames, max_length=tiny.CONTEXT - 2 * ROOM)

    def prompts(name: str) -> list[Prompt]:
        rows = load_rows(made / "data" / f"{name}.json", made / "data", on_bad="fail", refused=Refused())
        return [builder(Described(**vars(row))) for row in rows]

    return StepSeed(
        processor,
        _weights(made / "sft", model),
        _weights(made / "prm", model).eval().requires_grad_(False),
        prompts("train"),
        prompts("test"),
        json.loads((made / "prm.json").read_text(encoding="utf-8")),
    )


def _weights(folder: Path, like: Any) -> Any:
    """A model of `like`'s kind with the weights of a folder, in memory of its own: a mapped file's place
    moves last bits."""
    model = copy.deepcopy(like)
    model.load_state_dict(type(like).from_pretrained(folder).state_dict())
    return model
