"""MVBench (OpenGVLab/MVBench): json/TASK.json for 20 tasks; videos below `video/` or beside `json/`.

Row: video, question, candidates, answer (a text), and for some tasks start and end [s]. Two releases
differ in the folders: one holds whole videos and folders of pictures, of which a part is shown; the other
(revision `video`) the parts themselves.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadRow
from .clips import Clip
from .questions import Draft, choice_row, is_there, lettered, text_of

PICTURE_RATE = 3.0  # pictures per second of TVQA's folders
_STAR = (("star/Charades_segment", False), ("star/Charades_v1_480", True))
_CLEVRER = (("clevrer/video_validation", False),)
_PERCEPTION = (("perception/videos", False),)
# Of each task the folders its videos may be in, and whether the row's times apply there.
VIDEOS: dict[str, tuple[tuple[str, bool], ...]] = {
    "action_sequence": _STAR,
    "action_prediction": _STAR,
    "action_antonym": (("ssv2_video_mp4", False), ("ssv2_video", False)),
    "fine_grained_action": (("Moments_in_Time_Raw/videos", False),),
    "unexpected_action": (("FunQA_test/test", False),),
    "object_existence": _CLEVRER,
    "object_interaction": _STAR,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": (("sta/sta_video_segment", False), ("sta/sta_video", True)),
    "scene_transition": (("scene_qa/video", False),),
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": (("nturgbd_convert", False), ("nturgbd", False)),
    "character_order": _PERCEPTION,
    "egocentric_navigation": (("vlnqa", False),),
    "episodic_reasoning": (("tvqa/video_fps3_hq_segment", False), ("tvqa/frames_fps3_hq", True)),
    "counterfactual_inference": _CLEVRER,
}
FILES = {task: (task,) for task in VIDEOS}


def draft(raw: Mapping[str, Any], label: str, number: int, root: Path) -> Draft:
    """The answer is the candidate with its text."""
    options, answer = lettered(raw.get("candidates")), text_of(raw, "answer")
    candidates = [str(c).strip() for c in raw["candidates"]]
    if answer not in candidates:
        raise BadRow(f"answer {answer[:60]!r} is none of the candidates; mend the row")
    path, timed = _video(root, label, text_of(raw, "video"))
    row = choice_row(
        f"{label}/{number}", text_of(raw, "question"), options, chr(ord("A") + candidates.index(answer)),
        path, "mvbench",
    )  # fmt: skip
    return Draft(row, label, "choice", clip=_clip(raw) if timed else None)


def _video(root: Path, task: str, name: str) -> tuple[str, bool]:
    """The file or folder of a video, where it is there, and whether the row's times apply to it."""
    places = [
        (f"{above}{folder}/{name}", timed) for folder, timed in VIDEOS[task] for above in ("video/", "")
    ]
    return next((place for place in places if is_there(root / place[0])), places[0])


def _clip(raw: Mapping[str, Any]) -> Clip:
    """The part that a row names; all of the video where it names none."""
    start, end, rate = raw.get("start"), raw.get("end"), raw.get("fps") or PICTURE_RATE
    if start is None or end is None:
        start, end = 0.0, math.inf
    elif not (_is_time(start) and _is_time(end) and start <= end):
        raise BadRow(f"start {start!r}, end {end!r}: expected finite numbers, start <= end; mend the row")
    if not (_is_time(rate) and rate > 0):
        raise BadRow(f"fps {rate!r}: expected a number above 0; mend the row")
    return Clip(float(start), float(end), float(rate))


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
