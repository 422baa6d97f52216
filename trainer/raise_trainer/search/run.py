"""`raise-core search`: records of questions in a file that can be gone on with, a table and a figure."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raise_core.spans import STEP_CLOSE

from ..chain_judge import ChainJudge
from ..errors import BadMedia, BadRow, UserError
from ..feed import CACHE_BYTES
from ..json_lines import append_json_lines, drop_torn_line, read_json_lines
from ..media.cache import FrameCache
from ..media.loader import MediaLoader
from ..models import Policy, load_policy
from ..prompts import Prompt, PromptBuilder
from ..row_files import RowSource
from ..train_config import TrainConfig, check, read_settings
from .beam import Generation
from .figure import draw_curves
from .questions import search_questions
from .votes import TITLES, curves

NOT_OF_THE_ANSWERS = ("out", "workers", "frame_cache", "prompts", "micro_tokens", "on_bad_media")


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    counts: numbers of samples, ascending. keep: beams kept. settings: a YAML file and `key=value` pairs of
    `TrainConfig`: temperature, max_new_tokens, seed, template, frames, frame_cache, dtype; `prompts`
    questions at a time. root: folder of the media, None for the data file's own.
    """

    model: str
    prm: str
    data: str
    out: Path
    counts: tuple[int, ...]
    keep: int = 1
    step_share: float = 0.2
    settings: tuple[str, ...] = ()
    root: Path | None = None

    def training(self) -> TrainConfig:
        """The same in the words of a training run."""
        files = [one for one in self.settings if "=" not in one]
        if len(files) > 1:
            raise UserError(
                f"{files[1]!r}: a second file; give one YAML file, and changes to it as key=value"
            )
        pairs = [one for one in self.settings if "=" in one]
        given = {"template": "chain_of_step", "gradient_checkpointing": False}
        given |= read_settings(Path(files[0]) if files else None, pairs)
        data = {"path": self.data} | ({} if self.root is None else {"root": str(self.root)})
        fixed = {"model": self.model, "data": [data], "out": str(self.out.parent)}
        return check(given | fixed | {"group_size": max(self.counts)})


def run_search(
    search: Search, *, figure: Path | None = None, console: Console | None = None
) -> list[dict[str, Any]]:
    """Search all questions that the file of answers does not have yet; returns the points of the curves.

    A line of the file is a question's record (`search.questions`) with its row and its problem_id; a row or
    medium that cannot be used is named and has none. The draws of a question depend on seed and row alone.
    UserError where the file holds answers of other data or settings.
    """
    console = console or Console(highlight=False)
    config = search.training()
    source = RowSource.open(config.data, config.sampling)
    key = _key(search, config, source.fingerprint)
    search.out.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(search.out)
    records = _known(search.out, key)
    left = [n for n in range(len(source)) if n not in records]
    refused = list[str]()
    if left:
        _search_rest(search, config, source, left, records, key, refused, console)
    for text in refused:
        console.print(f"left out: {text}", markup=False, soft_wrap=True)
    points = curves(list(records.values()), search.counts)
    _show(console, points, search.counts)
    if figure is not None and points:
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(points, figure)
        console.print(f"Figure: {figure}", markup=False, soft_wrap=True)
    console.print(f"{search.out}: {len(records)} of {len(source)} questions", markup=False, soft_wrap=True)
    return points


def _key(search: Search, config: TrainConfig, fingerprint: str) -> str:
    """Of everything that the answers depend on."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in NOT_OF_THE_ANSWERS}
    del settings["data"]
    about = [search.prm, search.counts, search.keep, search.step_share, settings, fingerprint]
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


def _known(file: Path, key: str) -> dict[int, dict[str, Any]]:
    found = dict[int, dict[str, Any]]()
    if not file.exists():
        return found
    for line, record in read_json_lines(file):
        if record.get("of") != key:
            raise UserError(
                f"--out {file}: line {line} is of other data, models or settings; name another file"
            )
        found[int(record["row"])] = record
    return found


def _search_rest(
    search: Search, config: TrainConfig, source: RowSource, left: list[int],
    records: dict[int, dict[str, Any]], key: str, refused: list[str], console: Console,
) -> None:  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config, device)
    policy.model.eval()
    judge = ChainJudge.load(
        search.prm, policy.tokenizer, share=search.step_share, device=device, dtype=config.dtype,
        attention=config.attention, micro_tokens=config.micro_tokens,
    )  # fmt: skip
    how = generation(policy, config)
    room = policy.context - config.max_new_tokens
    builder = PromptBuilder.configured(policy.processor, config, max_length=room)
    cache = None if config.frame_cache is None else FrameCache(config.frame_cache, max_bytes=CACHE_BYTES)
    with MediaLoader(workers=config.workers, cache=cache) as loader:
        for first in range(0, len(left), config.prompts):
            kept = _prompts(source, left[first : first + config.prompts], builder, loader, config, refused)
            if not kept:
                continue
            found = search_questions(
                how, judge, [p for _, p in kept], [n for n, _ in kept], search.counts, keep=search.keep
            )
            lines = [
                {"row": n, "problem_id": p.row.problem_id, "of": key, **record}
                for (n, p), record in zip(kept, found, strict=True)
            ]
            append_json_lines(search.out, lines)
            records |= {line["row"]: line for line in lines}
            done = min(first + config.prompts, len(left))
            console.print(f"search {done}/{len(left)}", markup=False)


def generation(policy: Policy, config: TrainConfig) -> Generation:
    """How a policy is sampled. UserError where it does not know the token that ends a step."""
    close = policy.tokenizer.get_vocab().get(STEP_CLOSE)
    if close is None:
        raise UserError(
            f"model {config.model!r}: {STEP_CLOSE!r} is no token of it; make a model that has the chain's by "
            "raise-core prm tokens, and warm it up by raise-core sft"
        )
    return Generation(
        policy.model, policy.tokenizer, config.max_new_tokens, policy.eos, policy.suppress, close,
        config.temperature, config.seed,
    )  # fmt: skip


def _prompts(
    source: RowSource, numbers: list[int], builder: PromptBuilder, loader: MediaLoader, config: TrainConfig,
    refused: list[str],
) -> list[tuple[int, Prompt]]:  # fmt: skip
    rows = list[Any]()
    for number in numbers:
        try:
            rows.append(source[number])
        except BadRow as error:
            rows.append(error)
    built = iter(builder.build([row for row in rows if not isinstance(row, BadRow)], loader))
    made = [row if isinstance(row, BadRow) else next(built) for row in rows]
    for one in made:
        if isinstance(one, (BadRow, BadMedia)):
            if config.on_bad_media == "fail":
                raise UserError(str(one))
            refused.append(str(one))
    return [(n, one) for n, one in zip(numbers, made, strict=True) if isinstance(one, Prompt)]


def _show(console: Console, points: list[dict[str, Any]], counts: tuple[int, ...]) -> None:
    found = {(p["method"], p["n"]): p for p in points}
    table = Table(title="mean text score by number of samples", title_justify="left", show_edge=False)
    table.add_column("N", overflow="fold")
    for n in counts:
        table.add_column(str(n), justify="right")
    for method, title in TITLES.items():
        table.add_row(title, *(_cell(found.get((method, n)), "accuracy", ".3f") for n in counts))
    for method, title in (("best", "tokens, best-of-N"), ("beam", "tokens, step beam search")):
        table.add_row(title, *(_cell(found.get((method, n)), "tokens", ".0f") for n in counts))
    console.print(table)


def _cell(point: dict[str, Any] | None, name: str, form: str) -> str:
    return "" if point is None else format(point[name], form)
