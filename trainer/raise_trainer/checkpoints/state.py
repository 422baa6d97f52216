"""Everything a training run is, at the end of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import raise_core as rc

from . import ranks
from .changes import changed_fields, check_unchanged, plain_config
from .errors import ResumeRefused
from .files import Reader, Writer
from .model_state import load_model, model_bytes, save_model
from .optimizer_state import load_optimizer, load_reference, optimizer_tree, reference_tree
from .random_state import Generator, random_tree, restore_random
from .trees import digest_of, flatten, size_of

FORMAT = 1
OPTIMIZER, REFERENCE, RANDOM, REST = "optimizer", "reference", "random", "state"


class Stateful(Protocol):
    """A scheduler, a sampler, a counter: anything that can say where it is and be put there."""

    def state_dict(self) -> Any:
        """None, bool, int, float, str, tensors, arrays, and lists, tuples and dicts of these."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Go on from there."""
        ...


@dataclass
class TrainingState:
    """What is saved and restored. The objects are the run's own; `step` and `counters` belong here.

    model: any `nn.Module`, a Hugging Face model, a `peft.PeftModel`, a model under `fully_shard`; DDP and
        `torch.compile` wrappers are looked through. A PEFT model's frozen base is not saved.
    optimizer: a torch optimizer, or accelerate's wrapper of one. scheduler, sampler, others: see `Stateful`.
    reference: any `raise_core` reference.
    generators: random streams that are not the global ones, by name.
    processor: tokenizer or processor to lie beside the model; not restored.
    config: the run's settings, JSON or nearly. data: a fingerprint of the data.
    step: finished steps. counters: figures that go on, such as tokens seen; restored in place.

    With several processes all of them save and load, in the same order, and rank 0 touches the disk. Step,
    counters and the state of scheduler, sampler and others must be the same on all; ValueError if not.
    """

    model: nn.Module
    optimizer: Any = None
    scheduler: Stateful | None = None
    reference: rc.Reference | None = None
    sampler: Stateful | None = None
    generators: Mapping[str, Generator] = field(default_factory=dict)
    others: Mapping[str, Stateful] = field(default_factory=dict)
    processor: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    step: int = 0
    counters: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write into `folder`, not atomically: `Checkpoints.save` does that. Raises what writing raised."""
        writer = Writer(folder)
        self.write(writer)
        failure = ranks.share(lambda: writer.error)
        if failure is not None:
            raise failure

    def write(self, writer: Writer) -> None:
        """The same; a failure to write is kept in `writer.error`, while the collectives go on."""
        shared = {"step": self.step, "counters": self.counters}
        shared |= {name: part.state_dict() for name, part in self._parts().items()}
        _check_one(shared)
        rest = {
            "format": FORMAT,
            "processes": ranks.size(),
            "versions": {"torch": torch.__version__},
            "config": plain_config(self.config),
            "data": self.data,
            **shared,
        }
        writer.tree(REST, rest)
        save_model(writer, self.model, self.processor)
        if self.optimizer is not None:
            writer.tree(OPTIMIZER, optimizer_tree(self.model, self.optimizer))
        if self.reference is not None:
            writer.tree(REFERENCE, reference_tree(self.reference))
        writer.tree(RANDOM, random_tree(self.generators))

    def load(self, folder: Path, *, on_change: str = "refuse", may_change: Sequence[str] = ()) -> list[str]:
        """Restore what `save` wrote and return the accepted changes, `name: saved -> now`.

        on_change: "refuse" raises ResumeRefused if a config field or the data's fingerprint differs, before
            anything is written; "accept" goes on. may_change: fields that are not looked at, such as `out`
            or `steps`; one with dots names a nested field.
        The number of processes, the shards and the device may differ. ValueError if the model, the
        optimizer's groups, the reference, the generators or the parts are not those that were saved.
        """
        reader = Reader(folder)
        rest = reader.tree(REST)
        if rest["format"] != FORMAT:
            raise ResumeRefused(
                f"{folder} has format {rest['format']}, this version reads format {FORMAT}; "
                "resume with the version that wrote it"
            )
        changed = changed_fields(rest["config"], self.config, may_change)
        if rest["data"] != self.data:
            changed.append(f"data fingerprint: {rest['data'] or '(none)'} -> {self.data or '(none)'}")
        check_unchanged(str(folder), changed, on_change)
        parts = self._parts()
        self._check_parts(reader, rest, parts)
        load_model(reader, self.model)
        if self.optimizer is not None:
            load_optimizer(reader, OPTIMIZER, self.model, self.optimizer)
        if self.reference is not None:
            load_reference(reader, REFERENCE, self.reference)
        for name, part in parts.items():
            part.load_state_dict(rest[name])
        self.step = rest["step"]
        self.counters.clear()
        self.counters.update(rest["counters"])
        restore_random(reader.tree(RANDOM), self.generators)
        return changed

    def bytes(self) -> int:
        """About what a checkpoint takes on disk: its tensors, and a little."""
        total = model_bytes(self.model)
        trees: list[Any] = [part.state_dict() for part in self._parts().values()]
        if self.optimizer is not None:
            trees.append(optimizer_tree(self.model, self.optimizer))
        if self.reference is not None:
            trees.append(reference_tree(self.reference))
        return total + sum(size_of(t) for tree in trees for t in flatten(tree)[1].values()) + 2**16

    def _parts(self) -> dict[str, Stateful]:
        own = {"scheduler": self.scheduler, "sampler": self.sampler}
        own |= {f"other {name}": part for name, part in self.others.items()}
        return {name: part for name, part in own.items() if part is not None}

    def _check_parts(self, reader: Reader, rest: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
        saved = {name for name in rest if name in ("scheduler", "sampler") or name.startswith("other ")}
        saved |= {name for name in (OPTIMIZER, REFERENCE) if reader.has(f"{name}.json")}
        own = set(parts)
        own |= {OPTIMIZER} if self.optimizer is not None else set()
        own |= {REFERENCE} if self.reference is not None else set()
        if saved != own:
            raise ValueError(
                f"state: has {sorted(own - saved)} that the checkpoint lacks, and lacks "
                f"{sorted(saved - own)} of it; build the run as it was"
            )


def _check_one(shared: Mapping[str, Any]) -> None:
    """ValueError, on every rank, unless all have the same: only rank 0's would be saved."""
    told = ranks.gather({name: digest_of(value) for name, value in shared.items()})
    differing = [name for name in told[0] if any(one.get(name) != told[0][name] for one in told)]
    if differing:
        raise ValueError(
            f"state: {', '.join(differing)} differ between the processes; wanted one state for all, with "
            "what is a rank's own computed from it and the rank"
        )
