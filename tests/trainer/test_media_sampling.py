"""Which frames are taken, and the time between temporal patches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raise_trainer import tiny
from raise_trainer.errors import UserError
from raise_trainer.media.sampling import Sampling, seconds_per_patch
from tests.budget import assert_as_exact_as_a_double

counts = st.integers(2, 200)
samplings = st.one_of(
    st.builds(lambda n: Sampling(frames=n), st.integers(2, 900)),
    st.builds(
        lambda fps, low, more: Sampling(fps=fps, min_frames=low, max_frames=low + more),
        st.floats(1e-3, 240),
        counts,
        counts,
    ),
)


@given(samplings, st.integers(2, 100_000), st.floats(0.1, 240))
def test_an_even_number_of_different_frames_from_first_to_last(
    sampling: Sampling, total: int, rate: float
) -> None:
    indices = sampling.indices(total, rate)
    assert len(indices) % 2 == 0 and 2 <= len(indices) <= total
    assert indices[0] == 0 and indices[-1] == total - 1
    assert all(a < b for a, b in pairwise(indices))
    steps = [b - a for a, b in pairwise(indices)]
    assert max(steps) - min(steps) <= 1 + (max(steps) > 1)  # evenly, but for rounding
    assert sampling.indices(total, rate) == indices


@given(samplings, st.integers(2, 100_000), st.floats(0.1, 240))
def test_the_number_of_frames(sampling: Sampling, total: int, rate: float) -> None:
    count = sampling.count(total, rate)
    if sampling.frames is not None:
        assert count == min(sampling.frames, total) // 2 * 2
    else:
        assert count <= sampling.max_frames
        assert count >= min(sampling.min_frames, total) // 2 * 2
        unbounded = total / rate * (sampling.fps or 0)
        if sampling.min_frames <= unbounded <= min(sampling.max_frames, total):
            assert unbounded - 2 < count <= unbounded


@pytest.mark.parametrize(
    "sampling, total, rate, count",
    [
        (Sampling(frames=16), 300, 30, 16),
        (Sampling(frames=16), 9, 30, 8),
        (Sampling(frames=7), 300, 30, 6),
        (Sampling(fps=2), 300, 30, 20),
        (Sampling(fps=2), 30, 30, 4),  # min_frames
        (Sampling(fps=2, max_frames=64), 30 * 3600, 30, 64),
        (Sampling(fps=60), 100, 30, 100),  # no frame twice
        (Sampling(fps=2), 3, 30, 2),
    ],
)
def test_known_counts(sampling: Sampling, total: int, rate: float, count: int) -> None:
    assert sampling.count(total, rate) == count


def test_the_rule_that_recorded_runs_were_made_with() -> None:
    for total, frames in [(8, 8), (100, 16), (7, 16), (1000, 31)]:
        kept = min(frames, total) // 2 * 2
        old = tuple(int(i) for i in np.linspace(0, total - 1, kept).round())
        assert Sampling(frames=frames).indices(total, 5.0) == old


@pytest.mark.parametrize("total", [0, 1])
def test_no_pair_of_frames_no_sample(total: int) -> None:
    with pytest.raises(ValueError, match=f"total={total}"):
        Sampling(frames=8).indices(total, 30)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_sampling_by_rate_needs_the_rate_of_the_video(rate: float) -> None:
    with pytest.raises(ValueError, match="source_fps"):
        Sampling(fps=2).indices(100, rate)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({}, "frames=None, fps=None"),
        ({"frames": 8, "fps": 2.0}, "give one"),
        ({"frames": 1}, "frames=1"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": 2.0, "min_frames": 1}, "min_frames=1"),
        ({"fps": 2.0, "min_frames": 9, "max_frames": 8}, "max_frames=8"),
        ({"frames": 8, "min_pixels": 100}, "both or neither"),
        ({"frames": 8, "min_pixels": 100, "max_pixels": 50}, "min_pixels=100"),
        ({"frames": 8, "min_pixels": 0, "max_pixels": 50}, "min_pixels=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match="sampling") as error:
        Sampling(**fields)
    assert named in str(error.value)


def test_size_for_the_video_processor() -> None:
    assert Sampling(frames=8).size() is None
    bounded = Sampling(frames=8, min_pixels=56 * 56, max_pixels=112 * 112)
    assert bounded.size() == {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    assert bounded.size(8) == {"shortest_edge": 8 * 56 * 56, "longest_edge": 8 * 112 * 112}


def test_the_processor_obeys_the_size() -> None:
    processor = tiny.build_processor().video_processor
    video = torch.zeros(4, 3, 280, 280, dtype=torch.uint8)
    for low, high in [(28 * 28, 56 * 56), (112 * 112, 168 * 168)]:
        size = Sampling(frames=4, min_pixels=low, max_pixels=high).size()
        made = processor(videos=[video], size=size, do_sample_frames=False, return_tensors="pt")
        _, high_patches, wide_patches = made["video_grid_thw"][0].tolist()
        assert low <= high_patches * wide_patches * processor.patch_size**2 <= high


@given(st.integers(2, 10_000), st.floats(1.0, 240), samplings)
def test_seconds_per_patch_spans_the_video(total: int, rate: float, sampling: Sampling) -> None:
    count = sampling.count(total, rate)
    seconds = seconds_per_patch(total, rate, count)
    assert_as_exact_as_a_double(seconds * count / 2, total / rate, name="seconds")


def test_above_two_frames_per_second_time_goes_on() -> None:
    """A whole number of seconds per patch would be 0 here, and every temporal position with it."""
    model = tiny.build_model(tiny.build_processor(), seed=0)
    seconds = seconds_per_patch(300, 30.0, Sampling(fps=8).count(300, 30.0))
    assert 0 < seconds < 1
    kinds = torch.full((1, 8), 2)
    found, _ = model.model.get_rope_index(
        torch.zeros(1, 8, dtype=torch.long),
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor([[8, 2, 2]]),
        second_per_grid_ts=[seconds],
    )
    step = model.config.vision_config.tokens_per_second * seconds
    assert found[0, 0].tolist() == [int(i * step) for i in range(8)]
    assert len(set(found[0, 0].tolist())) > 1
