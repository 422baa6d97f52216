"""The loop bench: both sides do the same work; a slow or wrong side fails --check."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench import loop, loop_trl
from bench.loop_sides import END, PHASES, Ours, build_tokenizer, reward, save_model, texts
from bench.peers import EXTRA, NotHere
from raise_trainer.engines.base import Generate, Sampling
from raise_trainer.update import policy_step

SHAPE = replace(loop.QUICK[0], group=2, length=5)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(SHAPE.vocabulary)


def test_prompts_have_their_length_as_text_too(tokenizer: Any) -> None:
    said = texts(tokenizer, SHAPE, 6)
    assert [len(tokenizer(text)["input_ids"]) for text in said] == [SHAPE.prompt] * 6
    assert len(set(said)) == 6 and said == texts(build_tokenizer(SHAPE.vocabulary), SHAPE, 6)
    assert len(tokenizer) == SHAPE.vocabulary and tokenizer.convert_tokens_to_ids(END) == 0


def test_our_side_steps(tokenizer: Any, tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer, SHAPE)
    ours = Ours(tmp_path, tokenizer, SHAPE, texts(tokenizer, SHAPE, 2 * SHAPE.prompts))
    model, seen = ours.grpo.model, []
    real = ours.grpo.step
    ours.grpo.step = lambda *given: seen.append(real(*given)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps = [ours.step(), ours.step()]
    assert [list(made.rollout.prompts) for made in seen] == [ours.prompts[:2], ours.prompts[2:]]
    for step, made in zip(steps, seen, strict=True):
        assert set(step.phases) == set(PHASES) and min(step.phases.values()) > 0
        assert sum(step.phases.values()) == pytest.approx(step.seconds)
        ids = made.rollout.completions
        assert [len(c) for c in ids] == [SHAPE.length] * 4 and 0 not in set().union(*ids)
        assert made.scored.reward.tolist() == pytest.approx([reward(tokenizer.decode(c)) for c in ids])
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    frozen = ours.grpo.reference.model.state_dict()
    assert all(torch.equal(frozen[k], v) for k, v in before.items())
    assert seen[1].figures["kl"] > 0


def test_a_completion_that_ends_early_stops_the_run(tokenizer: Any, tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer, SHAPE)
    ours = Ours(tmp_path, tokenizer, SHAPE, texts(tokenizer, SHAPE, SHAPE.prompts))
    ends = Sampling.of(ours.grpo.method, eos=range(SHAPE.vocabulary), suppress=[])
    ours.grpo.engine = Generate(ours.grpo.model, ends)
    with pytest.raises(RuntimeError, match="ended early"):
        ours.step()


def test_phases_of_trl_are_read_off_its_timers() -> None:
    spent = {"transformers.generate": 2.0, "_prepare_inputs": 3.0, "compute_loss": 0.5}
    step = loop_trl.step_of(4.5, spent)
    assert step.phases == {"rollout": 2.0, "score": 1.0, "update": 1.5, "other": 0.0}
    with pytest.raises(RuntimeError, match="_prepare_inputs"):
        loop_trl.step_of(1.0, {"transformers.generate": 1.0})


def records(ours_s: float, *, quick: bool = False, **error: float) -> list[dict[str, Any]]:
    common = {
        "case": "prompt of 512 tokens", "shape": vars(loop.FULL[0]), "quick": quick, "low_s": 0.1,
        "high_s": 9.0, "phases_s": dict.fromkeys(PHASES, 0.25),
    }  # fmt: skip
    errors = dict.fromkeys(loop.BUDGETS, 0.0) | error
    return [
        common
        | {"implementation": "raise_core", "median_s": ours_s, "error": errors, "budget": loop.BUDGETS},
        common | {"implementation": "TRL", "median_s": 5.0},
    ]


@pytest.mark.parametrize(
    ("made", "short"),
    [
        (records(1.9), []),
        (records(2.1), ["step"]),
        (records(2.1, quick=True), []),
        (records(1.0, gradient=1.0), ["gradient against TRL", "step"]),
        (records(1.0, logp_ref=float("nan")), ["logp_ref against TRL", "step"]),
    ],
)
def test_limits(made: list[dict[str, Any]], short: list[str]) -> None:
    assert [v.what for v in loop.verdicts(made) if not v.ok] == short
    text = loop.table(made)
    assert text.count("SHORT") == len(short) and "| TRL | 5.000 |" in text


def test_the_figure_is_of_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, figure = tmp_path / "loop.jsonl", tmp_path / "figures" / "loop.svg"
    runs = [r | {"begun": f"2026-0{month}"} for month in (2, 1) for r in records(float(month))]
    file.write_text("".join(json.dumps(r) + "\n" for r in runs))
    monkeypatch.setattr(loop, "FIGURE", figure)
    assert loop.main(["--report", "--out", str(file)]) == 0
    printed, drawn = capsys.readouterr().out, figure.read_bytes()
    assert "| raise_core | 2.000 |" in printed and "| raise_core | 1.000 |" not in printed
    assert loop.main(["--report", "--out", str(file)]) == 0 and figure.read_bytes() == drawn
    assert drawn.count(b"<svg") == 1


def test_without_trl_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(module: str, name: str) -> Any:
        raise NotHere(EXTRA)

    monkeypatch.setattr(loop, "load", absent)
    assert loop.main(["--quick", "--threads", "1"]) == 1
    assert "pip install" in capsys.readouterr().out


@pytest.mark.slow
def test_both_sides_agree_and_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "records.jsonl"
    assert loop.main(["--quick", "--check", "--threads", "1", "--out", str(out)]) == 0
    ours, theirs = (json.loads(line) for line in out.read_text().splitlines())
    assert (ours["implementation"], theirs["implementation"]) == ("raise_core", "TRL")
    for record in (ours, theirs):
        assert record["samples"] == 2 and record["commit"] and record["packages"]["trl"]
        assert sum(record["phases_s"].values()) == pytest.approx(record["median_s"])
    assert set(ours["error"]) == set(ours["budget"]) == set(loop.BUDGETS)

    def without_kl(scorer: Any, optimizer: Any, groups: Any, method: Any) -> Any:
        return policy_step(scorer, optimizer, groups, replace(method, kl=0.0))

    monkeypatch.setattr(loop_trl, "policy_step", without_kl)
    assert loop.main(["--quick", "--check", "--threads", "1"]) == 1
    assert "gradient against TRL" in capsys.readouterr().out.rpartition("SHORT")[0].splitlines()[-1]
