"""The commands: settings from a file and pairs, what is dispatched where, one line for what can be mended."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raise_trainer import cli
from raise_trainer.train_config import TrainConfig, load


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text("model: m\ndata: [a.json]\nout: runs/x\nsteps: 5\n")
    return file


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["raise-core", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, TrainConfig]]:
    """What the training module was called with, in its place."""
    calls: list[tuple[str, TrainConfig]] = []
    fake = SimpleNamespace(
        run_train=lambda config, accept_changes: calls.append(("train" + "!" * accept_changes, config)),
        run_sft=lambda config, accept_changes: calls.append(("sft" + "!" * accept_changes, config)),
    )
    monkeypatch.setitem(sys.modules, "raise_trainer.train", fake)
    import raise_trainer

    monkeypatch.setattr(raise_trainer, "train", fake, raising=False)
    return calls


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_file_and_pairs_in_any_order_are_one_configuration(
    monkeypatch: pytest.MonkeyPatch, settings: Path, trained: list[Any], command: str
) -> None:
    assert call(monkeypatch, command, "lr=1e-5", settings, "steps=7", "clip=[0.2, 0.28]") == 0
    ((name, config),) = trained
    assert name == command
    assert (config.steps, config.lr, config.clip) == (7, 1e-5, (0.2, 0.28))
    assert call(monkeypatch, command, settings, "--accept-changes") == 0
    assert trained[1][0] == f"{command}!"


def test_pairs_alone_are_enough(monkeypatch: pytest.MonkeyPatch, trained: list[Any]) -> None:
    assert call(monkeypatch, "train", "model=m", "data=a.json", "out=o") == 0
    assert trained[0][1].data[0].path == Path("a.json")


def test_the_printed_configuration_is_a_file_that_gives_it_again(
    monkeypatch: pytest.MonkeyPatch,
    settings: Path,
    trained: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    data = "data=[{path: a.json, root: media, reward: scre}, b.json]"
    assert call(monkeypatch, "train", settings, "--print-config", data, "frames={fps: 2}") == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    config = load(again)
    assert config == load(settings, [data, "frames={fps: 2}"]) and not trained
    assert [f.reward for f in config.data] == ["scre", None] and config.data[0].root == Path("media")
    assert yaml.safe_load(printed)["data"][1] == "b.json"
    for name, field in TrainConfig.model_fields.items():
        assert f"\n{name}: " in printed and field.description and field.description[:30] in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "steps"], "steps: No such file or directory; name a YAML file of settings"),
        (["train", "stepz=3"], "unknown setting 'stepz'; did you mean 'steps'?"),
        (["train", "model=m", "out=o"], "data: got nothing; field required"),
        (["train", "model=m", "out=o", "data=a", "steps=many"], "steps: got 'many'; input should be"),
        (["train", "model=m", "out=o", "data={path: a, reward: best}"], "data: got 'best'; input should"),
        (["train", "model=m", "out=o", "data=a", "bonus=format"],
         "bonus: got 'format'; wanted weights by name, as in {format: 0.1"),
        (["train", "a.yaml", "b.yaml"], "'b.yaml': a second file; give one YAML file"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["x"], "unknown command 'x'; known are demo, "),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"raise-core: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["raise-core", *arguments])
    cli.main()
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert f"usage: raise-core {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, message",
    [
        (ModuleNotFoundError("", name="a"), "the package a is not installed; run: pip install -e '.[train]'"),
        (ImportError("kind 'ocr' needs jiwer: pip install -e '.[train]'"), "kind 'ocr' needs jiwer"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: ImportError,
    message: str,
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    assert call(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err.startswith(f"raise-core: error: {message}")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> int:
        raise ImportError("cannot import name 'x'")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    monkeypatch.setattr(sys, "argv", ["raise-core", "doctor"])
    with pytest.raises(ImportError, match="cannot import name"):
        cli.main()


def test_an_interrupt_is_said_and_has_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", stop)
    assert call(monkeypatch, "doctor") == 130
    assert capsys.readouterr().err == "raise-core: stopped\n"


def test_the_command_line_itself_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'tyro', 'pydantic'}"
    code = f"import sys, raise_trainer.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
