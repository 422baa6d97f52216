"""The reference of a policy under FSDP2, 2 processes: by shard, no collective, equal to the unsharded."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from raise_core.reference_store import local, reshard
from tests.budget import assert_exact

WORLD = 2
IDS = torch.tensor([[1, 5, 2, 0]])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HELD: dict[str, dict[str, Any]] = {"device": {}, "host": {"offload": "cpu"}}


class Net(nn.Module):
    """Shards of unlike size (7 and 5 rows on 2 processes), one of a single row, a buffer, a frozen tower."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, dtype=dtype)
        self.tower = nn.Linear(5, 5, dtype=dtype).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.head = nn.Linear(5, 1, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.tower(self.embed(ids)).tanh()))


def model(dtype: torch.dtype, sharded: bool) -> Any:
    torch.manual_seed(0)
    net = Net(dtype)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for part in (net.tower, net.norm, net.head, net):
            fully_shard(part)
    return net


def change(net: Any, seed: int) -> None:
    """What an optimiser step would, the same with and without shards."""
    generator = torch.Generator().manual_seed(seed)
    reshard(net)
    with torch.no_grad():
        for weight in net.parameters():
            step = (0.1 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
            if weight.requires_grad:
                local(weight).add_(part_of(step) if hasattr(weight, "to_local") else step)
        net.norm.running_mean += seed


def part_of(tensor: Tensor) -> Tensor:
    """This process's rows, as `fully_shard` cuts them."""
    parts = tensor.chunk(WORLD)
    rank = dist.get_rank()
    return parts[rank] if rank < len(parts) else tensor[:0]


def follow(reference: rc.Reference, net: Any, steps: range, gathered: bool = False) -> None:
    for step in steps:
        change(net, step)
        if gathered:
            gather(net)
        reference.update(net, step)


def gather(net: Any) -> None:
    """A forward pass without a backward leaves the root's weights gathered: they are no shards then."""
    mode = net.training
    with torch.no_grad():
        net.eval()(IDS)
    assert not hasattr(net.embed.weight, "to_local")
    net.train(mode)


def check(dtype: torch.dtype, held: dict[str, Any], folder: Path) -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    options = {"decay": 0.9, "every": 1, **held}
    whole, net = model(dtype, False).train(), model(dtype, True).train()
    gather(net)
    plain, reference = rc.EmaReference(whole, **options), rc.EmaReference(net, **options)
    with CommDebugMode() as counted:
        follow(reference, net, range(1, 4))
        state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    assert counted.get_total_counts() == 0
    follow(plain, whole, range(1, 4))
    for name, tensor in plain.state_dict().items():
        assert_exact(state[name], part_of(tensor) if name.startswith("weight.") else tensor, name=name)
    assert not any("tower" in name for name in state)
    assert not any(hasattr(tensor, "to_local") for tensor in state.values())

    before = {name: local(tensor).clone() for name, tensor in net.state_dict().items()}
    with CommDebugMode() as counted, torch.no_grad():
        policy = net.eval()(IDS)
    assert counted.get_total_counts() > 0
    net.train()
    with plain.active() as it:
        wanted = it(IDS)
    with CommDebugMode() as counted, reference.active():
        pass
    assert counted.get_total_counts() == 0
    with pytest.raises(KeyError), reference.active() as it:
        assert_exact(it(IDS), wanted, name="scores")
        raise KeyError("in the reward")
    assert net.training and not policy.equal(wanted)
    with torch.no_grad():
        assert_exact(net.eval()(IDS), policy, name="the policy's scores again")
    reshard(net)
    for name, tensor in net.state_dict().items():
        assert_exact(local(tensor), before[name], name=f"{name} put back")
    net.eval()(IDS).sum().backward()
    restore(reference, net, whole, dtype, options, folder)


def restore(
    reference: rc.Reference, net: Any, whole: Any, dtype: torch.dtype, options: dict[str, Any], folder: Path
) -> None:
    """Each process saves and loads its own part, and no other's."""
    file = reference.save(folder / "reference.safetensors")
    rank = dist.get_rank()
    assert file.name == f"reference-{rank + 1:05}-of-00002.safetensors"
    twin = model(dtype, True)
    resumed = rc.EmaReference(twin, **options)
    for step in range(1, 4):
        change(twin, step)
    resumed.load(folder / "reference.safetensors")
    follow(reference, net, range(4, 6), gathered=True)
    follow(resumed, twin, range(4, 6))
    for name, tensor in reference.state_dict().items():
        assert_exact(resumed.state_dict()[name], tensor, name=f"{name} restored")
    foreign = {**reference.state_dict(), "shard": torch.tensor([1 - rank, WORLD])}
    with pytest.raises(ValueError, match="each process loads its own part, on as many processes"):
        resumed.load_state_dict(foreign)
    with pytest.raises(ValueError, match=r'how: got "copy" for a model under fully_shard.*wanted "swap"'):
        rc.EmaReference(net, how="copy")
    alone = rc.EmaReference(whole)
    with pytest.raises(ValueError, match=r"1 unknown \(first \['shard'\]\)"):
        alone.load_state_dict(reference.state_dict())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        for dtype in DTYPES:
            for held in HELD:
                place = Path(folder) / f"{dtype} {held}"
                place.mkdir(exist_ok=True)
                check(DTYPES[dtype], HELD[held], place)
        wrapped = nn.parallel.DistributedDataParallel(model(torch.float32, False))
        reference = rc.EmaReference(wrapped, every=1)
        assert reference.update(wrapped, 1) and type(reference.model) is Net
        dist.barrier()  # a process that closes while another still connects takes it down
    finally:
        dist.destroy_process_group()


def test_by_shard_and_equal_to_the_unsharded_reference(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == WORLD * len(DTYPES) * len(HELD)
