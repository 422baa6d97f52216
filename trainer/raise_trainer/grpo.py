"""One GRPO step, the same for the demo and for a training run.

sample G completions each                           rollout.sample, or another of engines
text score, confidence under the reference,
SCRE / IGSR reward                                  scoring.score
reward minus its group's mean                       raise_core.group_advantages
policy-gradient steps                               update.policy_step
the reference follows slowly                        raise_core.EmaReference
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import raise_core as rc

from . import ranks
from .chain_judge import ChainJudge
from .chain_reward import with_chain_reward
from .checkpoints import StepGuard
from .engines.base import Engine, Generate, Sampling, rescored
from .method import Method
from .models import vision_tower
from .passes import Group
from .prompts import Prompt
from .rollout import Rollout
from .rounds import Round, joined
from .scoring import Scored, score
from .sharded import gathered
from .temporal import Shuffled, with_bonus
from .update import policy_step

More = Callable[[int], tuple[Sequence[Prompt], Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What a step saw and did; figures are means or sums over all processes, the rest is this one's.

    All rounds of the step are in it, groups that were replaced too; their advantage is 0.
    """

    rollout: Rollout
    scored: Scored | None
    advantage: Tensor
    figures: dict[str, float]


@dataclass
class Phases:
    """Seconds spent in each phase since the last `take`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """`with phases("score"):` counts what runs inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def take(self) -> dict[str, float]:
        """What was spent; counting begins anew."""
        spent, self.seconds = self.seconds, {}
        return spent


class Grpo:
    """A policy, its reference and its optimiser.

    tokenizer: of the model. eos, suppress: token ids that end a completion, and that are never sampled.
    judge: the PRM of method.chain, where there is one.
    guard: what to do with a step that is not finite; without one it is an error. phases: its clock.
    """

    def __init__(
        self,
        model: Any,
        reference: rc.Reference,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any,
        method: Method,
        *,
        eos: Sequence[int],
        suppress: Sequence[int],
        guard: StepGuard | None = None,
        phases: Phases | None = None,
        engine: Engine | None = None,
        judge: ChainJudge | None = None,
    ) -> None:
        self.model, self.reference, self.optimizer = model, reference, optimizer
        self.tokenizer, self.method = tokenizer, method
        self.eos, self.guard = list(eos), guard
        self.policy = rc.Scorer(model, max_tokens=method.micro_tokens)
        # A reference that is swapped in, or is an adapter, lives in the policy's own modules.
        self.confidant = rc.Scorer(reference.model, max_tokens=method.micro_tokens)
        self.phases = phases or Phases()
        self.engine = engine or Generate(model, Sampling.of(method, eos=eos, suppress=suppress))
        self.judge = judge
        self._gap = 0.0  # nats, summed over the step's tokens
        self._sampler_checked = False

    def step(
        self, prompts: Sequence[Prompt], draws: Tensor, step: int, *, more: More | None = None
    ) -> Outcome:
        """Sample, reward, update; `step` counts finished optimiser steps. All processes call it.

        draws: see `rollout.sample`. A process may have no prompts at all. more: this process's share of the
        next n prompts, with their draws; wanted where method.resample is above 0.
        """
        method = self.method
        self.model.eval()
        with self.phases("rollout"):
            self.engine.sync(self.model, step)
        self._gap = 0.0
        rounds, drawn = [self._round(prompts, draws)], 0
        while len(rounds) <= method.resample:
            equal = int(ranks.totals(rounds[-1].differs.count(False))[0])
            if not equal:
                break
            if more is None:
                raise ValueError(f"more: got None with resample={method.resample}, wanted where prompts are")
            drawn += equal
            rounds.append(self._round(*more(equal)))
        whole = joined(rounds)
        rollout, scored = whole.rollout, whole.scored
        learned = whole.differs if method.resample else [True] * len(rollout.prompts)
        advantage = self._advantages(scored, rollout, learned)
        groups = _groups(rollout, scored, advantage, learned, mask_truncated=method.mask_truncated)
        self.model.train()
        figures = dict[str, float]()
        with self.phases("update"):
            for update in range(method.updates):
                figures |= policy_step(
                    self.policy, self.optimizer, groups, method, guard=self.guard, step=step + update
                )
                self.reference.update(self.model, step + update + 1)
        figures |= ranks.mean(_own_figures(rollout, scored), len(rollout.completions))
        entropy, tokens = ranks.totals(
            sum(float(h.sum()) for h in rollout.entropy), sum(map(len, rollout.completions))
        )
        figures["entropy"] = entropy / max(tokens, 1)
        if rollout.sampled_logp is not None:
            figures["sampler_gap"] = ranks.totals(self._gap)[0] / max(tokens, 1)
        if method.resample:
            figures |= {"rounds": float(len(rounds)), "resampled_groups": float(drawn)}
            figures["learned_groups"] = ranks.totals(sum(learned))[0]
        return Outcome(rollout, scored, advantage, figures)

    def _round(self, prompts: Sequence[Prompt], draws: Tensor) -> Round:
        """Completions of these prompts and their rewards; on shuffled frames too where a bonus wants that."""
        method, other = self.method, None
        with self.phases("rollout"), gathered(self.model):
            rollout = self._sample(prompts, draws, method.group_size)
            if weight := method.bonus.get("t-grpo"):
                shuffled = Shuffled.of(prompts, draws, method.group_size, self.model)
                other = self._sample(shuffled.prompts, shuffled.draws, method.group_size // 2)
            if rollout.sampled_logp is not None:
                rollout, gap = rescored(rollout, self.policy, method.temperature)
                self._gap += gap
            self._check_sampler(rollout)
        with self.phases("score"), self.reference.active(), gathered(self.confidant.model):
            scored = score(rollout, self.confidant, self.tokenizer, method, eos=self.eos) if prompts else None
        if self.judge is not None and scored is not None:
            with self.phases("judge"):
                scored = with_chain_reward(scored, rollout, self.judge, method, self.tokenizer)
        if weight and scored is not None and other is not None:
            scored = with_bonus(scored, rollout, shuffled.index, other, self.tokenizer, weight)
        made = Round(rollout, scored)
        return made.without_features() if method.resample else made

    def _sample(self, prompts: Sequence[Prompt], draws: Tensor, group_size: int) -> Rollout:
        return self.engine.sample(prompts, draws, features=self._features(prompts), group_size=group_size)

    def _check_sampler(self, rollout: Rollout) -> None:
        """Once, on the first group: warns when what samples is not the model that is trained."""
        if self._sampler_checked or not rollout.prompts:
            return
        self._sampler_checked = True
        first, said, at = rollout.groups[0], rollout.logp, 1.0
        if rollout.sampled_logp is not None:
            said, at = rollout.sampled_logp, self.method.temperature or 1.0
        self.policy.check_sampler(rollout.inputs[:1], [first], [said[: len(first)]], temperature=at)

    @torch.no_grad()
    def _features(self, prompts: Sequence[Prompt]) -> Any:
        """Of the prompts' media, once for all passes of the step; None where the vision tower is trained."""
        tower = vision_tower(self.model)
        if not prompts or tower is None or any(p.requires_grad for p in tower.parameters()):
            return None
        return self.policy.vision_features([p.inputs for p in prompts])

    def _advantages(self, scored: Scored | None, rollout: Rollout, learned: Sequence[bool]) -> Tensor:
        """[B], 0 where not learned from; a batch-wide standard deviation is that of all processes."""
        kept = torch.tensor([learned[p] for p in rollout.owner], dtype=torch.bool)
        rewards = scored.reward[kept].tolist() if scored else []
        every = ranks.gather((rewards, [p for p in rollout.owner if learned[p]]))
        places = [(r, p) for r, (_, owners) in enumerate(every) for p in owners]
        number = {place: i for i, place in enumerate(dict.fromkeys(places))}
        advantage = torch.zeros(len(rollout.owner))
        if not places:
            return advantage
        whole = rc.group_advantages(
            torch.tensor([x for own, _ in every for x in own]),
            torch.tensor([number[place] for place in places]),
            scale=self.method.scale,
            min_std=self.method.min_std,
        )
        advantage[kept] = whole.split([len(own) for own, _ in every])[ranks.rank()]
        return advantage


def _groups(
    rollout: Rollout,
    scored: Scored | None,
    advantage: Tensor,
    learned: Sequence[bool] | None = None,
    *,
    mask_truncated: bool,
) -> list[Group]:
    """What is learned from, by prompt; a completion that is left out still counted in its group's mean.

    learned: of each prompt, whether its group is kept; all are when not given. Where another engine sampled,
    the ratio is to what it says it drew from: the loss clips it, which truncates the importance correction.
    """
    if scored is None:
        return []
    lengths = [len(ids) for ids in rollout.completions]
    logp_ref = None if scored.logp_ref is None else scored.logp_ref.split(lengths)
    own = scored.step_advantage
    per_token = None if own is None else own.split(lengths)
    features = rollout.features or [None] * len(rollout.prompts)
    groups = []
    for p, inputs in enumerate(rollout.inputs):
        if learned is not None and not learned[p]:
            continue
        kept = [
            b
            for b, owner in enumerate(rollout.owner)
            if owner == p and not (mask_truncated and bool(scored.truncated[b]))
        ]
        if kept:
            completions = [rollout.completions[b] for b in kept]
            reference = None if logp_ref is None else torch.cat([logp_ref[b] for b in kept])
            said = rollout.sampled_logp
            sampled = None if said is None else torch.cat([said[b] for b in kept])
            steps = None if per_token is None else torch.cat([per_token[b] for b in kept])
            groups.append(Group(inputs, completions, advantage[kept], reference, sampled, features[p], steps))
    return groups


def _own_figures(rollout: Rollout, scored: Scored | None) -> dict[str, float]:
    if scored is None:
        return {}
    differs = Round(rollout, scored).differs
    return scored.metrics | {"equal_groups_share": differs.count(False) / len(differs)}
