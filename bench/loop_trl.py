"""TRL's GRPOTrainer and our trainer in turns, in one process; and whether both compute the same.

TRL's own loop runs. When one of its steps is finished, one of ours is run before it goes on, so that a change
of the machine's load meets both. A step of TRL is timed from `on_step_begin` to `on_step_end`: sampling,
reference, reward, loss, gradient, optimiser; not what it does between steps (fetching data, logging).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import raise_core as rc
from bench.loop_sides import KL, LEARNING_RATE, SEED, Ours, Shape, Step, load_model, method_of, prompt, reward
from bench.peers import load
from raise_trainer.passes import Group
from raise_trainer.update import MAX_GRAD_NORM, policy_step

BUDGETS = {"logp_ref": 1e-4, "gradient": 1e-4, "advantage": 1e-2}  # TRL adds 1e-4 to a group's std of rewards
GENERATE, PREPARE = "transformers.generate", "_prepare_inputs"  # what TRL's own timers call its phases


@dataclass
class Seen:
    """TRL's last step: the weights before it, what went into the loss, the clipped gradient."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Both:
    """Steps of both sides in the order they ran, and how far TRL's last one is from ours, by what."""

    ours: list[Step]
    theirs: list[Step]
    error: dict[str, float]


def alternate(folder: Path, tokenizer: Any, shape: Shape, said: list[str], steps: int) -> Both:
    """`steps` steps of each in turns, then one more of TRL, which is compared and not timed.

    said: prompts of `steps + 1` steps. Raises `bench.peers.NotHere` without TRL.
    """
    side = Ours(folder, tokenizer, shape, said)
    ours, theirs, seen = list[Step](), list[Step](), Seen()

    def finished(step: Step) -> None:
        if len(theirs) < steps:
            theirs.append(step)
            ours.append(side.step())

    with _timers() as spent:
        trainer = _trainer(folder, tokenizer, shape, said, steps, seen)
        trainer.remove_callback(load("transformers", "PrinterCallback"))
        trainer.add_callback(_turns(spent, finished, seen, steps))
        trainer.train()
    return Both(ours, theirs, compare(folder, tokenizer, shape, said[-shape.prompts :], seen))


def quieten() -> None:
    """No progress bars and no advice from transformers."""
    logging = load("transformers.utils", "logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _timers() -> Iterator[dict[str, float]]:
    """Seconds by name from TRL's own timers, which it hands to experiment trackers alone."""
    spent = dict[str, float]()

    def note(timer: Any, seconds: float) -> None:
        name = timer.name.partition(".")[2]
        spent[name] = spent.get(name, 0.0) + seconds

    with mock.patch.object(load("trl.extras.profiling", "ProfilingContext"), "_log_metrics", note):
        yield spent


def _trainer(folder: Path, tokenizer: Any, shape: Shape, said: list[str], last: int, seen: Seen) -> Any:
    """TRL set to the same work: fp32, no recomputation, one pass and one update a step, nothing logged.

    last: the step, from 0, that is watched.
    """
    base, config = load("trl", "GRPOTrainer"), load("trl", "GRPOConfig")
    dataset = load("datasets", "Dataset")

    class Watched(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            if self.state.global_step == last:
                seen.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
                seen.inputs = dict(inputs)
            return super().compute_loss(model, inputs, *rest, **more)

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [reward(text) for text in completions]

    return Watched(
        model=str(folder),
        reward_funcs=rewards,
        processing_class=tokenizer,
        train_dataset=dataset.from_dict({"prompt": said}),
        args=config(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            per_device_train_batch_size=shape.prompts * shape.group, num_generations=shape.group,
            max_completion_length=shape.length, generation_kwargs={"min_new_tokens": shape.length},
            max_steps=last + 1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM, beta=KL, use_bias_correction_kl=False, loss_type="dapo",
            shuffle_dataset=False, seed=SEED, report_to="none", logging_strategy="no", save_strategy="no",
            disable_tqdm=True,
        ),
    )  # fmt: skip


def _turns(spent: dict[str, float], finished: Callable[[Step], None], seen: Seen, last: int) -> Any:
    """The callback that times TRL's steps and hands each to `finished`, in TRL's loop."""
    base = load("transformers", "TrainerCallback")

    class Turns(base):  # type: ignore[misc, valid-type]
        begun = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spent.clear()
            self.begun = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == last:
                seen.gradient = {k: w.grad.clone() for k, w in model.named_parameters()}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finished(step_of(time.perf_counter() - self.begun, spent))

    return Turns()


def step_of(seconds: float, spent: dict[str, float]) -> Step:
    """A step of TRL by its timers: scoring is what precedes the loss and is not sampling."""
    if not {GENERATE, PREPARE} <= spent.keys():
        raise RuntimeError(
            f"this TRL has other timers ({', '.join(spent) or 'none'}), wanted {GENERATE} and {PREPARE}; "
            "use trl 1.16"
        )
    rollout, prepared = spent[GENERATE], spent[PREPARE]
    phases = {"rollout": rollout, "score": prepared - rollout, "update": seconds - prepared, "other": 0.0}
    return Step(seconds, phases)


def compare(folder: Path, tokenizer: Any, shape: Shape, said: list[str], seen: Seen) -> dict[str, float]:
    """Our log-probabilities, advantages and clipped gradient of what TRL sampled, at TRL's weights.

    logp_ref: largest difference [nats]. advantage, gradient: norm of the difference over the norm.
    """
    model, reference = load_model(folder), load_model(folder)
    model.load_state_dict(seen.weights)
    prompts = [prompt(tokenizer, text).inputs for text in said]
    asked, rows = [p["input_ids"][0].tolist() for p in prompts], seen.inputs["prompt_ids"].tolist()
    # TRL shuffles a batch after rewarding it.
    members = [[b for b, ids in enumerate(rows) if ids == one] for one in asked]
    if [len(some) for some in members] != [shape.group] * shape.prompts:
        raise RuntimeError("TRL's prompts are not ours: the two sides do not do the same work")
    sampled = seen.inputs["completion_ids"].tolist()
    completions = [[sampled[b] for b in some] for some in members]
    if {len(ids) for ids in sampled} != {shape.length} or tokenizer.eos_token_id in set().union(*sampled):
        raise RuntimeError("a completion of TRL ended early: the two sides do not do the same work")
    order = [b for some in members for b in some]
    with torch.no_grad():
        stats = rc.Scorer(reference).token_stats(prompts, completions)
    logp_ref = torch.cat([s.logp for some in stats for s in some if s.logp is not None])
    rewards = torch.tensor([reward(tokenizer.decode(sampled[b])) for b in order])
    method = method_of(shape)
    owner = torch.arange(shape.prompts).repeat_interleave(shape.group)
    advantage = rc.group_advantages(rewards, owner, min_std=method.min_std)
    theirs = seen.inputs["advantages"][order]
    parts = (theirs.split(shape.group), logp_ref.split(shape.group * shape.length))
    groups = [Group(p, ids, a, r) for p, ids, a, r in zip(prompts, completions, *parts, strict=True)]
    model.train()
    policy_step(rc.Scorer(model), torch.optim.SGD(model.parameters(), lr=0.0), groups, method)
    gradient = {k: w.grad for k, w in model.named_parameters()}
    return {
        "logp_ref": float((logp_ref - seen.inputs["ref_per_token_logps"][order].flatten()).abs().max()),
        "advantage": _relative([advantage], [theirs]),
        "gradient": _relative([gradient[k] for k in seen.gradient], list(seen.gradient.values())),
    }


def _relative(got: Sequence[Any], want: Sequence[Tensor]) -> float:
    one, other = (torch.cat([x.double().flatten() for x in some]) for some in (got, want))
    return float((one - other).norm() / other.norm())
