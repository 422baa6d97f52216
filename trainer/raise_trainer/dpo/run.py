"""`raise-core dpo`: rounds of paths, pairs and preference steps; killed at any point, it goes on there."""

import gc
from pathlib import Path
from typing import Any

import raise_core as rc

from .. import ranks
from ..checkpoints import Checkpoints
from ..checkpoints.manifest import read as about
from ..checkpoints.ranks import share
from ..errors import UserError
from ..grpo import Phases
from ..logbook import Logbook
from ..row_files import RowSource
from ..train import opened, report_step
from ..train_config import FREE as TRAINING_FREE
from ..train_config import TrainConfig, as_yaml, read_settings
from .config import FREE, DpoConfig
from .paths import pairs_of_round, replace_text
from .step import Pair, dpo_step


def run_dpo(config: DpoConfig) -> Path | None:
    """All rounds; returns the folder of the last policy, None when a signal stopped it.

    Each round samples the last policy, pairs the best path of each question with the worst by the PRM, and
    trains on the pairs from `start`, which is the reference too. A round's folder has its paths, pairs and
    training run (`dpo.paths`); what is there is not done again. UserError where `out` holds a run with other
    settings, or a round finds no pair.
    """
    from accelerate import PartialState

    device = PartialState().device
    share(lambda: _open(config))
    log = Logbook(config.out, silent=ranks.rank() > 0)
    model = config.model
    for number in range(1, config.rounds + 1):
        folder = config.out / f"round-{number}"
        counts = pairs_of_round(config, number, model, folder, log, device)
        log.say(
            f"round {number}: {counts['pairs']} pairs of {counts['questions']} questions; "
            f"{counts['close']} closer than {config.min_gap}, {counts['no_answer']} without an answer, "
            f"{counts['left_out']} left out; mean reward {counts['reward_mean']:.3f}"
        )
        if not counts["pairs"]:
            raise UserError(f"round {number}: no pair to learn from; {_way_out(counts)}, in another `out`")
        gc.collect()  # the models that sampled and judged
        begin = model if config.start == "last" else config.model
        found = _train(config, number, begin, folder, counts["pairs"])
        if found is None:
            return None
        model = str(found)
    log.say(f"Policy: {model}")
    return Path(model)


def _way_out(counts: dict[str, Any]) -> str:
    """What to do where no question has a pair, by what most of them lack."""
    most = max(("close", "no_answer", "left_out"), key=lambda kind: counts[kind])
    if most == "left_out":
        return f"{counts['left_out']} questions cannot be used (first {counts['why']}); mend the data"
    if most == "no_answer":
        return "no path has an answer that the PRM can read; raise max_new_tokens, or warm the model up"
    return "lower min_gap, or sample more paths"


def _open(config: DpoConfig) -> None:
    """Make the folder, or find that the run in it is the same."""
    file = config.out / "config.yaml"
    try:
        if file.is_file():
            before = read_settings(file)
            for name, value in config.model_dump(mode="json").items():
                # A run of a version without a setting had what is now its default.
                had = before.get(name, DpoConfig.model_fields[name].default)
                if name not in FREE and had != value:
                    raise UserError(
                        f"out {config.out}: its run has {name}={had!r}, this one {value!r}; "
                        "name another folder, or go on with the same settings"
                    )
        elif config.out.is_dir() and any(one.name != "config.part" for one in config.out.iterdir()):
            raise UserError(f"out {config.out}: holds something that is no run; name another folder")
        config.out.mkdir(parents=True, exist_ok=True)
        replace_text(file, f"# raise-core dpo\n{as_yaml(config)}")
    except OSError as error:
        raise UserError(
            f"out {config.out}: cannot be written ({error.strerror}); name another folder"
        ) from None


def training_of(config: DpoConfig, model: str, folder: Path, pairs: int) -> TrainConfig:
    """The training run of a round: the rows that have a pair, each with the settings of its data file.

    A step has no more pairs than there are; the last one is filled up with pairs of the next epoch.
    """
    files = [
        file.model_copy(
            update={"path": folder / f"pairs-{i}.jsonl", "root": (file.root or file.path.parent).resolve()}
        )
        for i, file in enumerate(config.data)
        if (folder / f"pairs-{i}.jsonl").is_file()
    ]
    used = pairs * config.epochs
    a_step = max(min(config.pairs, used), ranks.size())
    return config.training(
        model=model, out=str(folder / "train"), prompts=a_step, steps=-(-used // a_step),
        data=[file.model_dump(mode="json") for file in files],
    )  # fmt: skip


def _train(config: DpoConfig, number: int, model: str, folder: Path, pairs: int) -> Path | None:
    """The policy after a round's preference steps; None when a signal stopped them."""
    training = training_of(config, model, folder, pairs)
    kept = Checkpoints(training.out / "checkpoints")
    if (latest := kept.latest()) is not None and about(latest)["step"] >= training.steps:
        return latest / "model"
    # `out` may have moved with all that is in it; the bytes of the data are compared all the same.
    moved = (*TRAINING_FREE, "data", "model")
    with opened(training, "dpo", with_reference=True, may_change=moved) as (run, reference):
        policy, phases = run.policy, Phases()
        scorer = rc.Scorer(policy.model, max_tokens=config.micro_tokens)
        confidant = rc.Scorer(reference.model, max_tokens=config.micro_tokens)
        policy.model.train()
        with run.log.stage(f"dpo, round {number}", training.steps, done=run.state.step) as stage:
            for step in run.steps(stage, 1):
                with phases("decode"):
                    _, prompts = run.feed.take(step)
                numbers = zip(run.feed.used, prompts, strict=True)
                some = [pair_of(run.feed.source, number, p.inputs) for number, p in numbers]
                with phases("update"):
                    figures = dpo_step(
                        scorer, confidant, reference, run.optimizer, some, beta=config.beta,
                        nll_weight=config.nll_weight, micro_tokens=config.micro_tokens, guard=run.guard,
                        step=step,
                    )  # fmt: skip
                tokens = sum(len(ids) for pair in some for ids in pair.completions)
                report_step(run, stage, phases, step, figures, 1, tokens)
        if run.state.step < training.steps:
            return None
    latest = kept.latest()
    assert latest is not None
    return latest / "model"


def pair_of(source: RowSource, number: int, inputs: dict[str, Any]) -> Pair:
    """The pair of a row of a round's files, with its prompt's inputs. Rows of two files may share an id."""
    file, within = source.where(number)
    row = file.raw(within)
    return Pair(inputs, list(row["chosen"]), list(row["rejected"]))
