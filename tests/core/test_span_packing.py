"""What `build_spans` packs and what `Spans` refuses."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from raise_core.spans import Found, Spans, build_spans, find_answer_spans
from tests.small_tokenizers import byte_level


def test_build_spans_packs_rows_targets_and_owners() -> None:
    completions = [[5, 6, 7, 8], [9], [1, 2, 3]]
    found = [Found(1, 3, "a"), Found(0, 0, reason="missing"), Found(2, 3, "b")]
    spans = build_spans(found, completions, first_rows=[10, 20, 30], group=[0, 0, 4])
    assert spans.rows.tolist() == [11, 12, 32]
    assert spans.targets.tolist() == [6, 7, 3]
    assert spans.offsets.tolist() == [0, 2, 2, 3]
    assert spans.lengths.tolist() == [2, 0, 1]
    assert spans.group.tolist() == [0, 0, 4]
    assert spans.owner.tolist() == [0, 1, 2]
    assert len(spans) == 3
    assert all(
        getattr(spans, name).dtype == torch.int64 for name in ("rows", "targets", "offsets", "group", "owner")
    )


def test_build_spans_of_steps_keeps_their_owner() -> None:
    found = [[Found(0, 1, "a"), Found(2, 3, "b")], [], [Found(1, 2, "c")]]
    spans = build_spans(found, [[5, 6, 7], [], [8, 9]], torch.tensor([0, 3, 3]), torch.tensor([7, 9, 8]))
    assert spans.owner.tolist() == [0, 0, 2]
    assert spans.group.tolist() == [7, 7, 8]
    assert spans.rows.tolist() == [0, 2, 4]
    assert spans.targets.tolist() == [5, 7, 9]


def test_no_completions_and_only_empty_spans() -> None:
    assert len(build_spans([], [], [], [])) == 0
    spans = build_spans([Found(0, 0, reason="missing")] * 2, [[], [1]], [0, 0], [0, 0])
    assert spans.rows.shape == (0,) and spans.lengths.tolist() == [0, 0]


def test_spans_score_the_sampled_tokens() -> None:
    """Row j of the logits predicts token j: `rows` picked out of all rows are those of the targets."""
    tokenizer = byte_level()
    texts = ["<answer>blue</answer>", "x<answer>你</answer>", "none"]
    completions = [tokenizer.encode(text).ids for text in texts]
    prompt, predicted, first_rows = 3, [], []
    for ids in completions:
        row = [-1] * prompt + ids
        first_rows.append(len(predicted) + prompt - 1)
        predicted += [*row[1:], -1]
    found = find_answer_spans(completions, tokenizer)
    spans = build_spans(found, completions, first_rows, [0, 0, 1])
    assert torch.tensor(predicted)[spans.rows].equal(spans.targets)
    assert "blue" in tokenizer.decode(spans.targets[: spans.offsets[1]].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([Found(0, 1, "a")], [[1], [2]], [0, 1], [0, 0]), "found: got 1 entries, wanted one for each of 2"),
        (([Found(0, 1, "a")], [[1]], [0, 1], [0]), "first_rows: got 2"),
        (([Found(0, 1, "a")], [[1]], [0], []), "group: got 0"),
        (([Found(0, 3, "a")], [[1]], [0], [0]), r"found\[0\]: got tokens 0..3"),
        (([Found(0, 1, "a")], [[-100]], [0], [0]), r"targets\[0\]: got -100"),
        (([Found(0, 1, "a")], [[1]], [-2], [0]), r"rows\[0\]: got -2"),
    ],
)
def test_build_spans_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_spans(*arguments)


def test_flat_ids_and_float_rows_are_refused() -> None:
    for flat in ([1, 2, 3], torch.tensor([1, 2, 3]), "text"):
        with pytest.raises(TypeError, match=r"completion_ids\[0\].*wrap a single completion"):
            find_answer_spans(flat, byte_level())
    with pytest.raises(TypeError, match=r"first_rows: got torch\.float32"):
        build_spans([Found(0, 0)], [[1]], torch.tensor([0.0]), [0])


GOOD = {"rows": [3, 4], "targets": [1, 2], "offsets": [0, 2], "group": [0], "owner": [0]}


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("offsets", [], "offsets: got "),
        ("offsets", [1, 2], r"offsets: got .1, 2., wanted"),
        ("offsets", [0, 2, 1], "offsets: got .0, 2, 1."),
        ("offsets", [0, 3], "rows: got 2 entries, wanted 3"),
        ("targets", [1], "targets: got 1 entries, wanted 2"),
        ("group", [0, 0], "group: got 2 entries, wanted 1"),
        ("owner", [], "owner: got 0 entries"),
        ("targets", [1, -100], r"targets\[1\]: got -100.*leave an ignored token"),
        ("owner", [-1], r"owner\[0\]: got -1"),
    ],
)
def test_spans_are_validated(field: str, values: list[int], message: str) -> None:
    given_fields = {name: torch.tensor(v, dtype=torch.int64) for name, v in (GOOD | {field: values}).items()}
    with pytest.raises(ValueError, match=message):
        Spans(**given_fields)


def test_spans_refuse_other_types() -> None:
    good = {name: torch.tensor(v) for name, v in GOOD.items()}
    with pytest.raises(TypeError, match="rows: got list"):
        Spans(**(good | {"rows": [3, 4]}))
    with pytest.raises(TypeError, match=r"rows: got torch.int32 of shape \[2\]"):
        Spans(**(good | {"rows": good["rows"].int()}))
    with pytest.raises(ValueError, match="group: got a tensor on meta, wanted the CPU"):
        Spans(**(good | {"group": good["group"].to("meta")}))


def test_spans_are_frozen_and_move_without_validation() -> None:
    spans = Spans(**{name: torch.tensor(v) for name, v in GOOD.items()})
    with pytest.raises(FrozenInstanceError):
        spans.rows = torch.tensor([0])
    moved = spans.to("meta")  # a device on which no value could be read
    assert moved.rows.device.type == "meta" and len(moved) == 1 and moved.lengths.shape == (1,)
    assert spans.rows.device.type == "cpu"


def test_inputs_are_not_written() -> None:
    tokenizer = byte_level()
    completions = [tokenizer.encode("<answer>B</answer>").ids, []]
    first_rows, group = torch.tensor([0, 9]), torch.tensor([0, 0])
    copies = json.dumps(completions), first_rows.clone(), group.clone()
    build_spans(find_answer_spans(completions, tokenizer), completions, first_rows, group)
    assert json.dumps(completions) == copies[0]
    assert first_rows.equal(copies[1]) and group.equal(copies[2])
