"""The prompts of each step: rows in the sampler's order, decoded ahead, unusable ones left out by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import ranks
from .errors import BadMedia, BadRow
from .logbook import Logbook
from .media.cache import FrameCache
from .media.loader import MediaLoader
from .media.quarantine import Quarantine
from .media.video import Request
from .models import Policy
from .prompts import Prompt, PromptBuilder
from .row_files import RowSource
from .rows import Row
from .sampler import RowSampler
from .train_config import TrainConfig

CACHE_BYTES = 1 << 36  # 64 GiB of decoded frames
Check = Callable[[Row], object]


class Feed:
    """Rows to prompts. sampler: where the run is in its data; fingerprint: of the data files.

    check: called with each row; a BadRow that it raises leaves the row out like any other.
    """

    def __init__(
        self,
        source: RowSource,
        sampler: RowSampler,
        builder: PromptBuilder,
        loader: MediaLoader,
        quarantine: Quarantine,
        check: Check,
    ) -> None:
        self.source, self.sampler, self.builder = source, sampler, builder
        self.loader, self.quarantine, self.check = loader, quarantine, check
        self._taken: tuple[list[int], list[int]] = [], []

    @classmethod
    @contextmanager
    def open(
        cls, config: TrainConfig, policy: Policy, log: Logbook, check: Check = lambda row: None
    ) -> Iterator["Feed"]:
        """The feed of a run; its decoding processes end with it."""
        source = RowSource.open(config.data, config.sampling)
        sampler = RowSampler(
            len(source), per_step=config.prompts, seed=config.seed, rank=ranks.rank(), world=ranks.size()
        )
        room = policy.context - config.max_new_tokens
        builder = PromptBuilder.configured(policy.processor, config, max_length=room)
        cache = None
        if config.frame_cache is not None:
            cache = FrameCache(config.frame_cache, max_bytes=CACHE_BYTES)
        name = f"quarantine-{ranks.rank()}.jsonl" if ranks.rank() else "quarantine.jsonl"
        quarantine = Quarantine(log.out / name, on_bad_media=config.on_bad_media)
        with MediaLoader(workers=config.workers, cache=cache, quarantine=quarantine) as loader:
            yield cls(source, sampler, builder, loader, quarantine, check)

    @property
    def fingerprint(self) -> str:
        """Of the data files' bytes."""
        return self.source.fingerprint

    def take(
        self, step: int, count: int | None = None, *, first: int = 0
    ) -> tuple[list[tuple[int, int]], list[Prompt]]:
        """This process's prompts of a step, each with its place (step, index among the step's prompts).

        count: rows over all processes, which take the same; a step's worth when not given. first: how many
        the step has had before, so that no two of its prompts have one place. What cannot be used is listed
        in the quarantine file with its id and reason, or stops the run; nothing takes its place. Raises
        UserError beyond the error budget.
        """
        numbers = self.sampler.take(count)
        rows = [self._row(number) for number in numbers]
        ids = [self._id(number, row) for number, row in zip(numbers, rows, strict=True)]
        self.quarantine.saw(ids)
        made = iter(self.builder.build([r for r in rows if isinstance(r, Row)], self.loader))
        places, prompts = list[tuple[int, int]](), list[Prompt]()
        for i, (name, row) in enumerate(zip(ids, rows, strict=True)):
            found = next(made) if isinstance(row, Row) else row
            self._taken[not isinstance(found, Prompt)].append(numbers[i])
            if isinstance(found, Prompt):
                places.append((step, first + i * ranks.size() + ranks.rank()))
                prompts.append(found)
            else:
                bad_file = row.path if isinstance(row, Row) and isinstance(found, BadMedia) else None
                self.quarantine.add(name, bad_file, found)
        self.loader.prefetch(self._requests())
        return places, prompts

    @property
    def used(self) -> list[int]:
        """Row numbers of this process's prompts since the last `drain`, in their order."""
        return list(self._taken[0])

    def drain(self) -> tuple[list[int], list[int]]:
        """Numbers of the rows taken since the last call, in this process: those used, those left out."""
        taken, self._taken = self._taken, ([], [])
        return taken

    def _row(self, number: int) -> Row | BadRow:
        try:
            row = self.source[number]
            self.check(row)
            return row
        except BadRow as error:
            return error

    def _id(self, number: int, row: Row | BadRow) -> int | str:
        """The row's own id, or its file and number there when it cannot be read."""
        if isinstance(row, Row):
            return row.problem_id
        file, within = self.source.where(number)
        return f"{file.file.name}:{within}"

    def _requests(self) -> Iterator[Request]:
        """The files of the next step."""
        for number in self.sampler.peek():
            row = self._row(number)
            if isinstance(row, Row):
                try:
                    request = self.builder.request(row)
                except BadRow:
                    continue
                if request is not None:
                    yield request
