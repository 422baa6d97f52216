"""Every example loads, is used by a command of the README that parses, and its parts can be made."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from raise_trainer import tiny
from raise_trainer.check_data import check_data
from raise_trainer.dataset import write_dataset
from raise_trainer.prompt_template import load_template
from raise_trainer.row_files import RowSource
from raise_trainer.sampler import RowSampler
from raise_trainer.train_config import TrainConfig, load

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SETTINGS = sorted(EXAMPLES.glob("*.yaml"))
LAUNCH = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
COMMANDS = re.findall(
    r"`((?:raise-core|accelerate) [^`]*examples/[^`]*)`", (EXAMPLES / "README.md").read_text()
)


def names(files: list[Path]) -> set[str]:
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_the_examples_of_the_project_are_there() -> None:
    assert {file.stem for file in SETTINGS} == {
        "qwen2_5_vl_7b_lora", "qwen2_5_vl_7b_full_8gpu", "qwen3_vl", "text_only", "tiny_cpu",
    }  # fmt: skip
    assert {file.stem for file in LAUNCH} == {"fsdp2_8gpu", "two_nodes"}


@pytest.mark.parametrize("file", SETTINGS, ids=lambda f: f.stem)
def test_an_example_loads_and_every_part_of_it_can_be_made(file: Path) -> None:
    config = load(file)
    written = yaml.safe_load(file.read_text())
    assert load(None, [f"{k}={json.dumps(v)}" for k, v in written.items()]) == config
    for name, value in written.items():
        assert name in (
            "model",
            "data",
            "out",
            "prompts",
            "group_size",
            "max_new_tokens",
            "frames",
            "lr",
        ) or (value != TrainConfig.model_fields[name].default), f"{name} says what is the default anyway"
    assert load_template(config.template).text and 2 <= config.sampling().count(1000, 30.0) <= 64
    assert len(RowSampler(100, per_step=config.prompts, seed=config.seed).take()) == config.prompts


@pytest.mark.parametrize("file", LAUNCH, ids=lambda f: f.stem)
def test_a_launch_file_is_one_that_accelerate_reads(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 8 * config.num_machines
    assert {"two_nodes": "MULTI_GPU", "fsdp2_8gpu": "FSDP"}[file.stem] == config.distributed_type
    if file.stem == "fsdp2_8gpu":
        from accelerate.commands.launch import launch_command_parser

        flags = launch_command_parser().parse_args(["x.py"])
        assert (
            all(hasattr(flags, name) for name in config.fsdp_config)
            and config.fsdp_config["fsdp_version"] == 2
        )


def test_the_readme_runs_every_example() -> None:
    used = {word for command in COMMANDS for word in shlex.split(command) if word.startswith("examples/")}
    assert used == names(SETTINGS) | names(LAUNCH)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_gives_each_process_work(command: str) -> None:
    words = shlex.split(command)
    after = words[words.index("train") + 1 :]
    config = load(ROOT / after[0], after[1:])
    world = 1
    if "--config_file" in words:
        from accelerate.commands.config.config_args import load_config_from_file

        world = load_config_from_file(str(ROOT / words[words.index("--config_file") + 1])).num_processes
        assert words[words.index("-m") + 1] == "raise_trainer.cli"
    assert config.prompts % world == 0 and RowSampler(9, per_step=config.prompts, seed=0, world=world).take()


def test_the_text_rows_are_good_and_show_every_field() -> None:
    source = RowSource.open(load(EXAMPLES / "text_only.yaml", [f"data={EXAMPLES / 'text.jsonl'}"]).data)
    rows = [source[i] for i in range(len(source))]
    assert [row.route for row in rows] == ["scre", "scre", "igsr", "scre"] and rows[2].references
    assert all(row.text_score(row.solution) > 0.5 for row in rows)


def test_the_tiny_example_finds_nothing_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make demo` writes, as far as settings, rows and prompts go."""
    write_dataset(tmp_path / "data", train_videos=3, test_questions=2, seed=0, advance=lambda _: None)
    processor = tiny.build_processor()
    processor.save_pretrained(tmp_path / "model")
    tiny.build_model(processor, seed=0).config.save_pretrained(tmp_path / "model")
    here = [f"model={tmp_path / 'model'}", f"data={tmp_path / 'data/train.json'}"]
    config = load(EXAMPLES / "tiny_cpu.yaml", [*here, f"eval_data={tmp_path / 'data/test.json'}"])
    assert check_data(config, media="prompts", refused=tmp_path / "refused.json") == 0
