"""Which tokens of which completions go into which forward pass, and where their rows come out.

A branch is a run of tokens after a prompt, or after another branch of the same prompt (an answer option after
a chain of thought). The token at j of a branch is predicted by the row before it: its own row j - 1, or for
j = 0 the last row of what it follows. So a branch's last wanted token is never fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from raise_core.scoring.tree_attention import Layout


@dataclass(frozen=True)
class Branch:
    """Token ids after a prompt (parent -1) or after branch `parent` of the same prompt, an earlier one.

    Statistics are wanted of the tokens start..stop (half open).
    """

    ids: Sequence[int]
    start: int
    stop: int
    parent: int = -1


@dataclass(frozen=True)
class Node:
    """A run of tokens in a pack: ids of a branch, or the prompt itself (ids None).

    prompt: its prompt's index. first: distance of its first token from the prompt's first one, so that its
    positions are those of [prompt | … | ids] there. length: tokens.
    """

    prompt: int
    ids: Sequence[int] | None
    first: int
    length: int


@dataclass(frozen=True)
class Pack:
    """One forward pass: nodes in order with their layout, and the rows that predict the wanted tokens.

    rows [T]: row of the pass's hidden states for each wanted token, branch by branch. When the prompt is
    cached, row 0 stands for its last hidden state and the pass's own rows follow.
    """

    nodes: tuple[Node, ...]
    layout: Layout
    rows: tuple[int, ...]


class Tree:
    """One prompt of `length` tokens and its branches; `index` is the prompt's place in the call.

    Only what predicts a wanted token is ever fed: see `used`. What follows a branch must come right after
    it, before the prompt's next branch; else ValueError.
    """

    def __init__(self, index: int, length: int, branches: Sequence[Branch]) -> None:
        line = [-1]  # what the next branch may follow: the one before it, or any that this one follows
        for i, branch in enumerate(branches):
            if branch.parent not in line:
                raise ValueError(f"branches[{i}]: got parent {branch.parent}, wanted depth-first order")
            line = [*line[: line.index(branch.parent) + 1], i]
        self.index = index
        self.length = length
        self.branches = branches

    @staticmethod
    def _top(branches: Sequence[Branch], branch: int) -> int:
        """The branch right after the prompt that this one belongs to; -1 for the prompt."""
        while branch >= 0 and branches[branch].parent >= 0:
            branch = branches[branch].parent
        return branch

    @cached_property
    def used(self) -> list[int]:
        """Tokens of each branch that must be fed: all of a branch that others follow."""
        followed = {b.parent for i, b in enumerate(self.branches) if b.stop > b.start or self._is_followed(i)}
        return [
            len(b.ids) if i in followed else max(b.stop - 1, 0) if b.stop > b.start else 0
            for i, b in enumerate(self.branches)
        ]

    def _is_followed(self, branch: int) -> bool:
        return any(
            b.parent == branch and (b.stop > b.start or self._is_followed(i))
            for i, b in enumerate(self.branches)
            if i > branch
        )

    @property
    def wanted(self) -> int:
        """Tokens whose statistics are wanted."""
        return sum(max(b.stop - b.start, 0) for b in self.branches)

    def first(self, branch: int) -> int:
        """Tokens from the prompt's first one to the branch's first one."""
        parent = self.branches[branch].parent
        return self.length if parent < 0 else self.first(parent) + self.used[parent]

    @property
    def longest(self) -> int:
        """Tokens of the longest path that is fed, the prompt included."""
        return max((self.first(b) + n for b, n in enumerate(self.used)), default=self.length)

    def limbs(self) -> Iterator[tuple[list[int], int]]:
        """Branches that must stay together (one after the prompt and all that follow it), tokens fed."""
        tops = [self._top(self.branches, i) for i in range(len(self.branches))]
        for _, run in groupby(range(len(tops)), key=tops.__getitem__):
            members = list(run)
            if any(self.branches[i].stop > self.branches[i].start for i in members):
                yield members, sum(self.used[i] for i in members)


Part = tuple[Tree, list[int]]  # a prompt and those of its branches that share a pass


def lay_out(parts: Sequence[Part], *, cached: bool = False) -> Pack:
    """The pack of some prompts with some of their branches; cached: the one prompt's keys exist already."""
    nodes, parents, rows = list[Node](), list[int](), list[int]()
    end = 0  # rows so far
    for tree, chosen in parts:
        root = len(nodes)
        nodes.append(Node(tree.index, None, 0, tree.length))
        parents.append(-1)
        end += 1 if cached else tree.length
        last_row, node_of = {-1: end - 1}, {-1: root}
        for b in chosen:
            branch, n = tree.branches[b], tree.used[b]
            if branch.start < branch.stop:
                before = [last_row[branch.parent], *range(end, end + branch.stop - 1)]
                rows.extend(before[branch.start : branch.stop])
            node_of[b], last_row[b] = node_of[branch.parent], last_row[branch.parent]
            if n:
                node_of[b] = len(nodes)
                nodes.append(Node(tree.index, branch.ids[:n], tree.first(b), n))
                parents.append(node_of[branch.parent])
                end += n
                last_row[b] = end - 1
    layout = Layout(tuple(node.length for node in nodes), tuple(parents), int(cached))
    return Pack(tuple(nodes), layout, tuple(rows))


def fill(trees: Sequence[Tree], max_tokens: int, *, several: bool) -> list[list[Part]]:
    """Whole passes of at most max_tokens tokens each, in order; a prompt is repeated where it must be.

    several: prompts may share a pass. A prompt with a single limb that is longer than max_tokens has a pass
    of its own all the same.
    """
    passes, room = list[list[Part]](), 0
    for tree in trees:
        fresh = True
        for members, tokens in tree.limbs():
            cost = tokens + (tree.length if fresh else 0)
            if not passes or cost > room or (fresh and not several):
                passes.append([])
                room, cost, fresh = max_tokens, tokens + tree.length, True
            if fresh:
                passes[-1].append((tree, []))
            passes[-1][-1][1].extend(members)
            room -= cost
            fresh = False
    return passes


def chunks(tree: Tree, max_tokens: int) -> list[list[int]]:
    """The prompt's branches in runs of at most max_tokens fed tokens, for passes over its cached keys."""
    found, room = list[list[int]](), 0
    for members, tokens in tree.limbs():
        if not found or tokens > room:
            found.append([])
            room = max_tokens
        found[-1].extend(members)
        room -= tokens
    return found


def choose(tree: Tree, max_tokens: int, *, dense: bool, cacheable: bool, width: int) -> str:
    """How to run one prompt: "packed", "suffix" (prompt cached, branches in chunks) or "plain".

    Packed while the group fits. Beyond that the prompt is run once and cached, where a cache may be kept.
    With a dense mask attention grows with the square of the whole group, so that for a short prompt with many
    long completions separate passes cost less. width: cost of a token in units of a query-key pair's.
    """
    limbs = [tokens for _, tokens in tree.limbs()]
    total = tree.length + sum(limbs)
    if total > max_tokens and cacheable and len(limbs) > 1:
        return "suffix"
    if not dense:
        return "packed"
    separate = [tree.length + n for n in limbs]
    packed_cost = total * width + total * total
    plain_cost = sum(n * width + n * n for n in separate)
    return "packed" if packed_cost <= plain_cost else "plain"
