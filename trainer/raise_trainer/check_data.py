"""`raise-core check-data`: reads every row as training would, and says what there is and what is refused."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .errors import BadMedia, BadRow, UserError
from .media.loader import MediaLoader
from .media.probe import check_file
from .media.video import Request
from .prompt_template import load_template
from .row_files import RowSource
from .rows import Row
from .train_config import TrainConfig

Media = Literal["none", "exists", "decode", "prompts"]
BATCH = 64  # rows whose media are looked at together
SHOWN = 5  # refused rows named on the console


class _Check:
    """Looks at the media of rows; None for a row that is good."""

    def __init__(self, config: TrainConfig, media: Media, stack: ExitStack) -> None:
        self.sampling, self.media = config.sampling(), media
        self._known: dict[Path, BadMedia | None] = {}
        if media in ("decode", "prompts"):
            self.loader = stack.enter_context(MediaLoader(workers=config.workers))
        if media == "prompts":
            from .prompts import PromptBuilder, load_processor  # slow to import, and seldom needed

            processor, context = load_processor(config.model)
            self.builder = PromptBuilder.configured(
                processor, config, max_length=context - config.max_new_tokens
            )

    def __call__(self, rows: Sequence[Row]) -> Sequence[UserError | None]:
        if self.media == "prompts":
            made = self.builder.build(rows, self.loader)
            return [error if isinstance(error, UserError) else None for error in made]
        if self.media != "none":
            new = {r.path: r for r in rows if r.path is not None and r.path not in self._known}
            self._known.update(zip(new, self._look(list(new.values())), strict=True))
        return [self._known.get(row.path) if row.path is not None else None for row in rows]

    def _look(self, rows: Sequence[Row]) -> Iterator[BadMedia | None]:
        if self.media == "exists":
            for row in rows:
                yield _missing(row.path)
            return
        requests = [
            Request(row.path, row.sampling or self.sampling, "video" if row.data_type == "video" else "image")
            for row in rows
            if row.path is not None
        ]
        for found in self.loader.load(requests):
            yield found if isinstance(found, BadMedia) else None


def _missing(path: Path | None) -> BadMedia | None:
    try:
        if path is not None:
            check_file(path)
    except BadMedia as error:
        return error
    return None


def check_data(config: TrainConfig, *, media: Media, refused: Path, console: Console | None = None) -> int:
    """Read every row of `data` and `eval_data`; print counts; return how many rows are refused.

    media: "none" looks at the rows alone, "exists" also for their files, "decode" decodes each file once,
    "prompts" also builds every prompt with the model's processor, which shows those that are too long.
    refused: JSON file that gets file, row (from 0), id and reason of each refused row, else an empty list.
    Raises UserError for a file that cannot be read at all.
    """
    console = console or Console(highlight=False)
    load_template(config.template)
    sources = {"data": RowSource.open(config.data, config.sampling)}
    if config.eval_data:
        sources["eval_data"] = RowSource.open(config.eval_data, config.sampling)
    counts: Counter[tuple[str, ...]] = Counter()
    bad: list[dict[str, Any]] = []
    with ExitStack() as stack:
        check = _Check(config, media, stack)
        bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        for name, source in sources.items():
            task = bar.add_task(name, total=len(source))
            for numbers in _batches(len(source)):
                _check_rows(name, source, numbers, check, counts, bad)
                bar.advance(task, len(numbers))
    try:
        refused.write_text(json.dumps(bad, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--refused {refused}: {error.strerror}; name a file that can be written") from None
    _show(console, counts, bad, refused)
    return len(bad)


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH):
        yield range(start, min(start + BATCH, count))


def _check_rows(
    name: str,
    source: RowSource,
    numbers: Sequence[int],
    check: _Check,
    counts: "Counter[tuple[str, ...]]",
    bad: list[dict[str, Any]],
) -> None:
    """Count the good rows of a batch and list the others."""
    rows: dict[int, Row] = {}
    errors: dict[int, UserError] = {}
    for number in numbers:
        try:
            rows[number] = source[number]
        except BadRow as error:
            errors[number] = error
    for number, found in zip(rows, check(list(rows.values())), strict=True):
        row = rows[number]
        if found is None:
            chain = "yes" if row.process else ""
            counts[(name, row.data_type, row.problem_type, row.route, chain)] += 1
        else:
            errors[number] = found
    for number in sorted(errors):
        file, within = source.where(number)
        row_id = rows[number].problem_id if number in rows else _id(file.raw, within)
        bad.append({"file": str(file.file), "row": within, "id": row_id, "reason": str(errors[number])})


def _id(raw: Any, number: int) -> Any:
    """The id of a row that is refused; None where it has none."""
    try:
        value = raw(number)
    except BadRow:
        return None
    return value.get("problem_id") if isinstance(value, dict) else None


def _show(
    console: Console, counts: "Counter[tuple[str, ...]]", bad: list[dict[str, Any]], refused: Path
) -> None:
    table = Table("setting", "data type", "problem type", "reward", "chain", "rows")
    for key, count in sorted(counts.items()):
        table.add_row(*key, f"{count:,}")
    console.print(table)
    where = f"; reasons in {refused}" if bad else ""
    console.print(f"{sum(counts.values()):,} rows can be used, {len(bad):,} are refused{where}")
    for entry in bad[:SHOWN]:
        console.print(f"  {entry['file']}, row {entry['row']}: {entry['reason']}", markup=False)
    if len(bad) > SHOWN:
        console.print("  …")
