"""Which rows a step uses: endless seeded epochs, every row once in each, shared out over the processes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import UserError


class RowSampler:
    """Row numbers, a step's worth at a time; equal on every process but for the share it gives.

    rows: how many there are. per_step: prompts in a step, over all processes. seed: of the order, with the
    epoch's number. rank, world: this process and how many there are; rank r has the prompts r, r + world, …
    of a step, so that a prompt's whole group lies in one process.

    The order does not depend on `world` or on how many prompts a step takes: a run may go on with others. The
    last step of an epoch goes on into the next one. Raises UserError for fewer prompts than processes, which
    would leave some without work, and ValueError for other senseless counts.
    """

    def __init__(self, rows: int, *, per_step: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if rows < 1 or per_step < 1 or seed < 0 or not 0 <= rank < world:
            raise ValueError(
                f"rows={rows}, per_step={per_step}, seed={seed}, rank={rank}, world={world}; "
                "expected rows, per_step >= 1, seed >= 0 and 0 <= rank < world"
            )
        if per_step < world:
            raise UserError(
                f"prompts={per_step}: fewer than the {world} processes; give prompts={world} or more"
            )
        self.rows, self.per_step, self.seed = rows, per_step, seed
        self.rank, self.world = rank, world
        self.position = 0  # rows given so far, over all epochs and processes
        self._orders: dict[int, np.ndarray] = {}

    @property
    def epoch(self) -> float:
        """Epochs done, with the part of the one that is under way."""
        return self.position / self.rows

    def peek(self, count: int | None = None) -> list[int]:
        """This process's rows of the next step, or of the next `count` rows, without taking them."""
        places = range(self.position, self.position + (self.per_step if count is None else count))
        return [self._row(place) for place in places[self.rank :: self.world]]

    def take(self, count: int | None = None) -> list[int]:
        """The same rows, taken: the next call gives those after them. Every process takes the same count."""
        taken = self.peek(count)
        self.position += self.per_step if count is None else count
        return taken

    def state_dict(self) -> dict[str, int]:
        """Where it stands; the same on every process."""
        return {"position": self.position, "seed": self.seed, "rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, on any number of processes. UserError for another seed or number of rows."""
        for name in ("seed", "rows"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the checkpoint's run had {name}={state[name]}, this one has {getattr(self, name)}; "
                    "go on with the same data and seed, or start a new run"
                )
        self.position = int(state["position"])

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, self.rows)
        if epoch not in self._orders:
            # of NumPy's generators the one whose stream is promised never to change
            order = np.random.RandomState([self.seed % 2**32, (self.seed >> 32) % 2**32, epoch]).permutation(
                self.rows
            )
            kept = {n: o for n, o in self._orders.items() if n == epoch - 1}
            self._orders = {**kept, epoch: order}
        return int(self._orders[epoch][within])
