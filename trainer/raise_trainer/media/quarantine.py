"""Media that cannot be used: a list with reasons, and how much of it a run accepts."""

import json
from collections.abc import Hashable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from ..config import OnBad
from ..errors import BadMedia, BadRow, UserError
from ..json_lines import drop_torn_line

GRACE = 10  # bad rows before their share is judged: one bad file among the first three is no bad data set


class Quarantine:
    """Bad media of a run, one JSON line each: id, path, reason, time (UTC).

    file: appended to and kept; what it lists already (an earlier part of this run) is not tried again.
    carry_over: another run's list, whose paths are not tried either.
    on_bad_media: "fail" raises BadMedia at the first; "skip" leaves the row out.
    max_share, max_count: when more than this share of the rows seen so far is bad (and more than 10 rows), or
    more than this many rows, `add` raises UserError with the counts and the file. None is no limit.

    The share is of rows, not of files: a bad video with ten questions loses ten rows. A row counts once,
    however often later epochs bring it back. Nothing takes the place of what is left out.
    """

    def __init__(
        self,
        file: Path,
        *,
        on_bad_media: OnBad = "skip",
        max_share: float | None = 0.05,
        max_count: int | None = None,
        carry_over: Path | None = None,
    ) -> None:
        self.file = file
        self.on_bad_media = on_bad_media
        self.max_share = max_share
        self.max_count = max_count
        self._reasons: dict[str, str] = {}
        self._listed: set[tuple[str, str]] = set()
        self._seen: set[Hashable] = set()
        self._bad: set[Hashable] = set()
        if carry_over is not None:
            if not carry_over.is_file():
                raise UserError(
                    f"{carry_over}: no such quarantine list; give quarantine.jsonl of a run, or none"
                )
            self._load(carry_over)
        if file.is_file():
            drop_torn_line(file)
            self._load(file, listed=True)

    def __len__(self) -> int:
        """Bad rows met in this run."""
        return len(self._bad)

    def reason(self, path: Path) -> str | None:
        """Why a path is not to be tried again; None when it may be."""
        return self._reasons.get(str(path))

    def saw(self, ids: Iterable[Hashable]) -> None:
        """Count rows as looked at, good and bad: the share is of these."""
        self._seen.update(ids)

    def add(self, row_id: int | str, path: Path | None, error: UserError) -> None:
        """List a row with its bad file, or a row that is bad itself (path None), then stop if it is to stop.

        Raises BadMedia (or BadRow) under "fail", UserError beyond the error budget.
        """
        reason = str(error) if path is None else self._reasons.setdefault(str(path), str(error))
        self._seen.add(row_id)
        self._bad.add(row_id)
        self._write(row_id, "" if path is None else str(path), reason)
        if self.on_bad_media == "fail":
            raise BadRow(reason) if path is None else BadMedia(f"row {row_id}: {reason}")
        bad, seen = len(self._bad), len(self._seen)
        if self.max_count is not None and bad > self.max_count:
            raise UserError(self._over(f"{self.max_count} rows", bad, seen))
        if self.max_share is not None and bad > GRACE and bad > self.max_share * seen:
            raise UserError(self._over(f"{self.max_share:.1%}", bad, seen))

    def _over(self, limit: str, bad: int, seen: int) -> str:
        return (
            f"{bad} of {seen} rows seen could not be used ({bad / seen:.1%}), over the budget of {limit}; "
            f"the reasons are in {self.file}: mend the data or raise the budget"
        )

    def _write(self, row_id: int | str, path: str, reason: str) -> None:
        if (str(row_id), path) in self._listed:
            return
        self._listed.add((str(row_id), path))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": row_id, "path": path, "reason": reason, "time": now}) + "\n")

    def _load(self, file: Path, *, listed: bool = False) -> None:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                path, reason, row_id = str(entry["path"]), str(entry["reason"]), str(entry["id"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}: line {number} is no quarantine entry; mend it or drop it") from None
            if path:
                self._reasons.setdefault(path, reason)
            if listed:
                self._listed.add((row_id, path))
