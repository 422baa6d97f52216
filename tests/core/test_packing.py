"""Trees, rows, splitting, masks: the packing by itself, without a model."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from raise_core.scoring.packing import Branch, Pack, Part, Tree, choose, chunks, fill, lay_out
from raise_core.scoring.tree_attention import Layout, MaskRead, TreeMask, attend, dense_mask
from tests.budget import assert_equal_but_for_roundings

Draw = Any


@st.composite
def trees(draw: Draw, index: int = 0) -> Tree:
    """A prompt and up to six branches, some after others, with wanted tokens anywhere in them."""
    branches: list[Branch] = []
    line = [-1]  # what the next branch may follow in depth-first order
    for i in range(draw(st.integers(0, 6))):
        ids = [1000 * index + 100 * i + j for j in range(draw(st.integers(0, 5)))]
        start = draw(st.integers(0, len(ids)))
        stop = draw(st.integers(start, len(ids)))
        depth = draw(st.integers(0, len(line) - 1))
        branches.append(Branch(ids, start, stop, line[depth]))
        line = [*line[: depth + 1], i]
    return Tree(index, draw(st.integers(1, 6)), branches)


forests = st.integers(1, 4).flatmap(lambda n: st.tuples(*(trees(i) for i in range(n))))


def history(tree: Tree, branch: int, token: int) -> list[tuple[int, int]]:
    """What token `token` of a branch is predicted from, by definition: (branch or -1, token) pairs."""
    own = [(branch, j) for j in range(token)]
    parent = tree.branches[branch].parent
    if parent < 0:
        return [(-1, j) for j in range(tree.length)] + own
    return history(tree, parent, len(tree.branches[parent].ids)) + own


def wanted(parts: list[Part]) -> list[tuple[int, int, int]]:
    """(prompt, branch, token) of everything wanted, in order."""
    return [
        (tree.index, b, j)
        for tree, chosen in parts
        for b in chosen
        for j in range(tree.branches[b].start, tree.branches[b].stop)
    ]


def seen(pack: Pack, forest: tuple[Tree, ...], row: int) -> list[tuple[int, int]]:
    """What a row of the pack sees, read off the dense mask: (branch or -1, token), in order."""
    labels = []
    for node in pack.nodes:
        if node.ids is None:
            labels += [(node.prompt, -1, j) for j in range(node.length)]
        else:
            branch = node.ids[0] // 100 % 10
            assert node.first == forest[node.prompt].first(branch)
            labels += [(node.prompt, branch, i % 100) for i in node.ids]
    query = pack.layout.keys - pack.layout.queries + row
    if pack.layout.cached:
        query = pack.layout.lengths[0] - 1 + row  # row 0 is the cached prompt's last token
    whole = Layout(pack.layout.lengths, pack.layout.parents)
    allowed = (dense_mask(whole, torch.float32, "cpu")[0, 0, query] == 0).nonzero()[:, 0].tolist()
    assert len({labels[k][0] for k in allowed}) == 1, "a row sees another prompt"
    return [labels[k][1:] for k in allowed]


@given(forests, st.integers(1, 30), st.booleans())
def test_each_wanted_token_is_predicted_from_its_own_history(
    forest: tuple[Tree, ...], room: int, several: bool
) -> None:
    """Whatever the splitting, every wanted token comes once, in order, from a row that sees just its past."""
    found = []
    for parts in fill(forest, room, several=several):
        pack = lay_out(parts)
        assert several or len(parts) == 1
        limbs = sum(members[0] in chosen for tree, chosen in parts for members, _ in tree.limbs())
        assert pack.layout.keys <= room or limbs == 1
        here = wanted(parts)
        assert len(here) == len(pack.rows)
        for (p, b, j), row in zip(here, pack.rows, strict=True):
            assert seen(pack, forest, row) == history(forest[p], b, j)
        found += here
    assert found == wanted([(tree, list(range(len(tree.branches)))) for tree in forest])


@given(trees(), st.integers(1, 12))
def test_chunks_over_a_cached_prompt(tree: Tree, room: int) -> None:
    found = []
    for members in chunks(tree, room):
        pack = lay_out([(tree, members)], cached=True)
        assert pack.layout.queries <= room or sum(m[0] in members for m, _ in tree.limbs()) == 1
        for (_, b, j), row in zip(wanted([(tree, members)]), pack.rows, strict=True):
            assert row <= pack.layout.queries
            assert seen(pack, (tree,), row) == history(tree, b, j)
            found.append((0, b, j))
    assert found == wanted([(tree, list(range(len(tree.branches))))])


def test_a_last_token_is_never_fed() -> None:
    tree = Tree(0, 4, [Branch([5, 6, 7], 0, 3), Branch([5], 0, 1), Branch([], 0, 0), Branch([5, 6, 7], 0, 2)])
    assert tree.used == [2, 0, 0, 1] and tree.longest == 6 and tree.wanted == 6
    (parts,) = fill([tree], 100, several=True)
    pack = lay_out(parts)
    assert pack.layout.lengths == (4, 2, 1)
    assert pack.rows == (3, 4, 5, 3, 3, 6)


def test_branches_out_of_order_are_refused() -> None:
    first, second = Branch([5], 0, 1), Branch([6], 0, 1)
    with pytest.raises(ValueError, match="depth-first"):
        Tree(0, 1, [first, second, Branch([7], 0, 1, parent=0)])
    with pytest.raises(ValueError, match="depth-first"):
        Tree(0, 1, [Branch([7], 0, 1, parent=0)])
    with pytest.raises(ValueError, match=r"branches\[3\]: got parent 1"):
        Tree(0, 5, [first, *(Branch([6], 0, 1, parent=p) for p in (0, 0, 1))])


LAYOUTS = {
    "prompt": Layout((5,), (-1,)),
    "chain": Layout((4, 3), (-1, 0)),
    "group": Layout((5, 3, 1, 4), (-1, 0, 0, 0)),
    "two prompts, options": Layout((3, 2, 1, 4, 2, 2), (-1, 0, 1, -1, 3, 3)),
    "cached": Layout((5, 3, 1, 4), (-1, 0, 0, 0), cached=1),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gqa", [False, True])
def test_attention_of_a_tree_is_dense_attention_under_its_mask(name: str, gqa: bool) -> None:
    """Values and gradients; through the mask itself, as a model's attention would call it."""
    layout = LAYOUTS[name]
    shapes = [(1, 4, layout.queries, 8), *[(1, 2 if gqa else 4, layout.keys, 8)] * 2]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)

    def run(tree: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        mask = TreeMask.of(layout, "cpu") if tree else dense_mask(layout, torch.float64, "cpu")
        out = sdpa(*leaves, attn_mask=mask, scale=0.7, enable_gqa=gqa)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    for what, got, want in zip(("out", "dq", "dk", "dv"), run(True), run(False), strict=True):
        assert_equal_but_for_roundings(got, want, name=f"{name} {what}")


def test_a_tree_mask_is_no_matrix() -> None:
    """What an attention may ask of a mask it gets; reading it as numbers is an error, not a wrong result."""
    mask = TreeMask.of(LAYOUTS["group"], "cpu")
    assert mask.shape == (1, 1, 13, 13) and mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.ndim == mask.dim() == 4 and mask.size(3) == 13 and len(mask) == 1
    assert mask.to("cpu") is mask and mask.to(torch.device("cpu"), torch.float32) is mask
    moved = mask.to("meta")
    assert isinstance(moved, TreeMask) and moved.tree == mask.tree and moved.device.type == "meta"
    scores = torch.zeros(1, 4, 13, 13)
    for read in (lambda: scores + mask, lambda: mask[..., :3], lambda: mask.all(), lambda: mask.bool()):
        with pytest.raises(MaskRead, match="attn_implementation"):
            read()
    q = torch.zeros(1, 4, 13, 8)
    with pytest.raises(ValueError, match="is_causal"):
        sdpa(q, q, q, attn_mask=mask, is_causal=True)


def test_dropout_reaches_the_branches() -> None:
    layout = LAYOUTS["group"]
    q, v = torch.randn(1, 4, 13, 8), torch.ones(1, 4, 13, 8)
    kept = attend(layout, q, q, v)
    assert not torch.equal(attend(layout, q, q, v, dropout_p=0.5), kept)


def group(prompt: int, lengths: list[int]) -> Tree:
    return Tree(0, prompt, [Branch([1] * n, 0, n) for n in lengths])


def test_the_choice() -> None:
    """Packed while it fits; beyond that the prompt is cached; a dense mask does not pay for short prompts."""
    video, chat = group(16_000, [512] * 8), group(10, [1000] * 8)

    def chosen(tree: Tree, room: int = 32_768, dense: bool = False, cacheable: bool = True) -> str:
        return choose(tree, room, dense=dense, cacheable=cacheable, width=600)

    assert chosen(video) == "packed" and chosen(chat) == "packed"
    assert chosen(video, room=17_000) == "suffix"
    assert chosen(video, room=17_000, cacheable=False) == "packed"
    assert chosen(group(16_000, [512]), room=100) == "packed"
    assert chosen(video, dense=True) == "packed" and chosen(chat, dense=True) == "plain"
