"""Benchmarks by name: their files in a local folder to questions, in order; nothing is left out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadRow, UserError
from . import mmvu, mvbench, temp_compass, video_mme, video_mmmu, video_r1, vsi_bench
from .questions import Draft, Question, Refused, question
from .records import find, fingerprint, read
from .settings import Source

Item = Question | Refused
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Benchmark:
    """How one is read. files: for each label (a task, or "") the names its annotation file may have.

    task_key: the field that names a row's task, or with a label the part of it behind that; "" where the
    label is the task. group: the line of the macro mean that a task belongs to. videos: folder of the videos,
    where another folder of the published release has the benchmark's name.
    """

    title: str
    files: Mapping[str, tuple[str, ...]]
    draft: Callable[[Mapping[str, Any], str, int, Path], Draft]
    task_key: str = ""
    group: Callable[[str], str] = str
    videos: str = ""

    def root(self, name: str, folder: Path) -> Path:
        """The benchmark's own folder: `name` in the one given, or that itself."""
        own = folder / name
        if self.videos and (folder / self.videos).is_dir() and not (own / self.videos).is_dir():
            return folder
        return own if own.is_dir() else folder

    def task_of(self, raw: Mapping[str, Any], label: str, *, is_r1: bool = False) -> str:
        """The task of a row that cannot be asked, as far as the row says it; is_r1: one of Video-R1's."""
        keys = video_r1.TASK_KEYS if is_r1 else (self.task_key,)
        said = (raw[key].strip() for key in keys if isinstance(raw.get(key), str))
        parts = (label, next(filter(None, said), ""))
        return ", ".join(filter(None, parts)) or "unreadable rows"


BENCHMARKS: dict[str, Benchmark] = {
    "vsibench": Benchmark("VSI-Bench", vsi_bench.FILES, vsi_bench.draft, "question_type", vsi_bench.group),
    "videommmu": Benchmark("VideoMMMU", video_mmmu.FILES, video_mmmu.draft),
    "mmvu": Benchmark("MMVU (validation)", mmvu.FILES, mmvu.draft, "question_type"),
    "mvbench": Benchmark("MVBench", mvbench.FILES, mvbench.draft),
    "tempcompass": Benchmark(
        "TempCompass (without captioning)", temp_compass.FILES, temp_compass.draft, "dim"
    ),
    "videomme": Benchmark(
        "Video-MME (without subtitles)", video_mme.FILES, video_mme.draft, "duration", videos="data"
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A benchmark's items in the order of its files. source: which form they came in.

    fingerprint: of the files' bytes. missing: labels without a file.
    """

    name: str
    source: str
    files: tuple[Path, ...]
    fingerprint: str
    items: tuple[Item, ...]
    missing: tuple[str, ...] = ()

    @property
    def benchmark(self) -> Benchmark:
        """How it is read and grouped."""
        return BENCHMARKS[self.name]


def load(name: str, folder: Path, *, source: Source = "auto", limit: int | None = None) -> Loaded:
    """The questions of a benchmark. Rows that cannot be used are among them, as Refused.

    folder: holds a folder called `name`, or is it. source: "published", "video_r1" (eval_NAME.json), or what
    is there. limit: the first so many rows. UserError for an unknown name, a missing file, and when both
    forms are there and none is chosen.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench {name!r}: expected one of {', '.join(BENCHMARKS)}")
    if not folder.is_dir():
        raise UserError(f"--data {folder}: is no folder; name the one the benchmarks lie in")
    bench = BENCHMARKS[name]
    root = bench.root(name, folder)
    published = _published(root, bench) if source != "video_r1" else {}
    r1_root, r1 = _video_r1(root, folder, name) if source != "published" else (root, [])
    if published and r1:
        raise UserError(
            f"{name}: {root} holds its published files, but {r1[0]} is there; say which with --source"
        )
    if not published and not r1:
        wanted = ", ".join(f"{n[0]}.json[l] or .parquet" for n in list(bench.files.values())[:3])
        raise UserError(
            f"{name}: no annotation file in {root}; expected {wanted}, or Video-R1's eval_{name}.json"
        )
    if r1:
        root = r1_root
        drafts = ((number, raw, "") for number, raw in enumerate(_records(r1)))
        files = r1
    else:
        files = [file for some in published.values() for file in some]
        drafts = (
            (number, raw, label)
            for label, some in published.items()
            for number, raw in enumerate(_records(some))
        )
    items = _items(name, drafts, root, bool(r1), limit)
    if not items:
        raise UserError(f"{name}: no row in {', '.join(map(str, files))}; download the file again")
    missing = () if r1 else tuple(label for label in bench.files if label not in published)
    form = "video_r1" if r1 else "published"
    return Loaded(name, form, tuple(files), fingerprint(files), tuple(items), missing)


def _video_r1(root: Path, folder: Path, name: str) -> tuple[Path, list[Path]]:
    """Video-R1's file and the folder that its paths begin in: the benchmark's own, else the one given."""
    files = ((place, find(place, f"eval_{name}")) for place in (root, folder))
    return next((found for found in files if found[1]), (root, []))


def _published(root: Path, bench: Benchmark) -> dict[str, list[Path]]:
    found = {}
    for label, stems in bench.files.items():
        if files := next((some for stem in stems if (some := find(root, stem))), []):
            found[label] = files
    return found


def _records(files: Sequence[Path]) -> Iterator[Mapping[str, Any] | BadRow]:
    for file in files:
        yield from read(file)


def _items(
    name: str,
    drafts: Iterator[tuple[int, Mapping[str, Any] | BadRow, str]],
    root: Path,
    is_r1: bool,
    limit: int | None,
) -> list[Item]:
    items, seen = list[Item](), dict[str, int]()
    bench = BENCHMARKS[name]
    for place, (number, raw, label) in enumerate(drafts):
        if limit is not None and place >= limit:
            break
        item = _item(name, bench, raw, label, number, place, root, is_r1)
        new_id = _unique(item.id, seen)
        if isinstance(item, Refused):
            item = replace(item, id=new_id)
        elif new_id != item.id:
            item = replace(item, problem_id=new_id)
        items.append(item)
    return items


def _unique(row_id: str, seen: dict[str, int]) -> str:
    """The id, with a number behind it where it is taken: answers would be taken for those of the first row.

    seen: of each id that is taken, its last such number.
    """
    number = seen.get(row_id, 0) + 1
    while (found := row_id if number == 1 else f"{row_id}#{number}") in seen:
        number += 1
    seen[row_id] = number
    seen.setdefault(found, 1)
    return found


def _item(
    name: str,
    bench: Benchmark,
    raw: Mapping[str, Any] | BadRow,
    label: str,
    number: int,
    place: int,
    root: Path,
    is_r1: bool,
) -> Item:
    if not isinstance(raw, BadRow) and not _is_text(raw):
        raw = BadRow(f"row {number}: holds half of a surrogate pair, which is no text; mend it")
    try:
        if isinstance(raw, BadRow):
            raise raw
        made = video_r1.draft(raw, name, number) if is_r1 else bench.draft(raw, label, number, root)
    except BadRow as error:
        return _refused(name, label, number, place, raw, error, is_r1)
    try:
        return question(made, root, place, name)
    except BadRow as error:
        row_id, video = str(made.row["problem_id"]), str(made.row.get("path", ""))
        return Refused(row_id, name, place, made.task, video or f"row {place}", str(error))


def _is_text(value: Any) -> bool:
    """Whether every string in a row can be written; JSON can name characters that cannot."""
    if isinstance(value, Mapping):
        return all(map(_is_text, (*value, *value.values())))
    if isinstance(value, list):
        return all(map(_is_text, value))
    return not isinstance(value, str) or _HALF.search(value) is None


def _refused(
    name: str,
    label: str,
    number: int,
    place: int,
    raw: Mapping[str, Any] | BadRow,
    error: BadRow,
    is_r1: bool,
) -> Refused:
    """A row of which little can be read: its id and task where it says them, else its place."""
    said: Mapping[str, Any] = {} if isinstance(raw, BadRow) else raw
    given = next(
        (said[k] for k in ("problem_id", "id", "question_id") if isinstance(said.get(k), (str, int))), ""
    )
    row_id = "/".join(str(part) for part in (label, given or f"row {number}") if part)
    task = BENCHMARKS[name].task_of(said, label, is_r1=is_r1)
    return Refused(row_id, name, place, task, f"row {place}", str(error))
