"""examples/lmms_eval against what lmms-eval 0.7.2 (75571cf) calls, and with which arguments."""

import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from raise_trainer.benchmarks.load import load
from raise_trainer.benchmarks.questions import Question
from raise_trainer.benchmarks.results import means_of
from raise_trainer.benchmarks.scoring import grade
from tests.budget import assert_as_exact_as_a_double

FOLDER = Path(__file__).resolve().parents[2] / "examples/lmms_eval"
ROWS = Path(__file__).with_name("benchmark_rows")
TASKS = sorted(FOLDER.glob("*.yaml"))
# Functions of lmms-eval 0.7.2 that take a row and return a list with its video's path.
VISUAL = {
    "lmms_eval.tasks.vsibench.utils.vsibench_doc_to_visual",
    "lmms_eval.tasks.videomme.utils.videomme_doc_to_visual",
    "lmms_eval.tasks.mmvu.utils.mmvu_doc_to_visual_val",
    "lmms_eval.tasks.videommmu.utils.videommmu_doc_to_visual",
    "lmms_eval.tasks.tempcompass.utils.tempcompass_doc_to_visual",
}
# Fields of its TaskConfig that the files use.
FIELDS = {
    "task", "dataset_path", "dataset_name", "dataset_kwargs", "test_split", "doc_to_visual", "doc_to_text",
    "doc_to_target", "process_results", "output_type", "reasoning_tags", "cluster_key", "generation_kwargs",
    "lmms_eval_specific_kwargs", "metric_list",
}  # fmt: skip
DATA = {
    "raise_vsibench": "vsibench/test.jsonl",
    "raise_videomme": "videomme/test.jsonl",
    "raise_mmvu": "mmvu/validation.json",
    "raise_videommmu_perception": "videommmu/Perception.jsonl",
    "raise_videommmu_comprehension": "videommmu/Comprehension.jsonl",
    "raise_videommmu_adaptation": "videommmu/Adaptation.jsonl",
    "raise_tempcompass_multi_choice": "tempcompass/multi-choice.jsonl",
    "raise_tempcompass_yes_no": "tempcompass/yes_no.jsonl",
    "raise_tempcompass_caption_matching": "tempcompass/caption_matching.jsonl",
}


def loaded_as_lmms_eval_does() -> ModuleType:
    """From the file, and not in sys.modules."""
    spec = importlib.util.spec_from_file_location("utils", FOLDER / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UTILS = loaded_as_lmms_eval_does()


class Loader(yaml.SafeLoader):
    """`!function utils.name` is that function; a dotted module's stays a name."""


def _function(loader: Loader, node: yaml.ScalarNode) -> Any:
    name = str(loader.construct_scalar(node))
    module, _, function = name.rpartition(".")
    return getattr(UTILS, function) if module == "utils" else name


Loader.add_constructor("!function", _function)


def config(file: Path) -> dict[str, Any]:
    """With its include, which the file's own fields stand above."""
    own = yaml.load(file.read_text(), Loader)
    return yaml.load((FOLDER / own.pop("include")).read_text(), Loader) | own  # type: ignore[no-any-return]


def docs(name: str) -> list[dict[str, Any]]:
    text = (ROWS / DATA[name]).read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def test_every_task_has_a_case() -> None:
    assert {file.stem for file in TASKS} == set(DATA)


@pytest.mark.parametrize("file", TASKS, ids=lambda f: f.stem)
def test_a_task_file_is_what_lmms_eval_reads(file: Path) -> None:
    task = config(file)
    assert set(task) <= FIELDS and task["task"] == file.stem
    assert task["doc_to_visual"] in VISUAL
    assert task["doc_to_target"] in docs(file.stem)[0]
    assert task["generation_kwargs"]["until"] == [] and task["generation_kwargs"]["max_new_tokens"] > 16
    assert task["reasoning_tags"] == "none"  # a string: its value for "leave the output as it is"
    assert list(inspect.signature(task["process_results"]).parameters) == ["doc", "results"]
    assert list(inspect.signature(task["doc_to_text"]).parameters) == ["doc", "lmms_eval_specific_kwargs"]
    for metric in task["metric_list"]:
        # with a parameter called `args` it would be given those of the command
        assert list(inspect.signature(metric["aggregation"]).parameters) == ["results"]


@pytest.mark.parametrize("file", TASKS, ids=lambda f: f.stem)
def test_scores_are_those_of_the_evaluator(file: Path) -> None:
    task, bench = config(file), DATA[file.stem].partition("/")[0]
    benchmark = load(bench, ROWS).benchmark
    label = file.stem.partition(f"raise_{bench}_")[2]
    items = [i for i in load(bench, ROWS).items if i.task.replace("-", "_").startswith(label)]
    outputs = [f"<think>hm</think><answer>{word}</answer>" for word in ("B", "A", "yes", "4", "12.5", "C")]
    values: dict[str, list[Any]] = {metric["metric"]: [] for metric in task["metric_list"]}
    wanted: dict[str, list[float]] = {"official": [], "video_r1": []}
    for n, (doc, item) in enumerate(zip(docs(file.stem), items, strict=True)):
        assert isinstance(item, Question)
        said = outputs[n % len(outputs)]
        text = task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["default"])
        assert item.problem in text and all(option in text for option in item.options)
        for name, score in grade(item, said).scores.items():
            wanted[name].append(score)
        for metric, value in task["process_results"](doc, [said]).items():
            values[metric].append(value)
            assert value[task["cluster_key"]] and isinstance(value["score"], float)
    for metric in task["metric_list"]:
        scorer = metric["metric"].removesuffix("_sample_mean").removesuffix("_macro_mean")
        means = means_of(wanted[scorer], [i.task for i in items], [i.video for i in items], benchmark.group)
        mean = means.macro if metric["metric"].endswith("macro_mean") else means.sample
        got = metric["aggregation"](values[metric["metric"]])
        assert_as_exact_as_a_double(got, mean.mean, name=metric["metric"])


def test_a_row_that_cannot_be_used_scores_0_and_counts() -> None:
    doc = docs("raise_vsibench")[0] | {"ground_truth": "many"}
    found = UTILS.vsibench_results(doc, ["<answer>4</answer>"])
    assert set(found) == {m["metric"] for m in config(FOLDER / "raise_vsibench.yaml")["metric_list"]}
    assert all((value["score"], value["reason"]) == (0.0, "bad_row") for value in found.values())
    assert all(value["task"] == "object_counting" for value in found.values())
    assert UTILS.vsibench_text(doc) == doc["question"]  # the run goes on
