"""What is installed: the three packages and nothing else, by copy and editable, without a network.

Also what the Makefile says on a machine that lacks something, and that it installs once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "raise_core": "raise_core",
    "raise_kernels": "kernels/raise_kernels",
    "raise_trainer": "trainer/raise_trainer",
}
IMPORT = "import raise_core, raise_kernels; print(raise_core.__file__); print(raise_kernels.__file__)"


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git would carry, without what was built or installed beside them."""
    listed = output("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    target = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as for publishing: from the source archive, so what the archive lacks the wheel lacks."""
    out = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=clone)
    (built,) = out.glob("*.whl")
    return built


def environment(folder: Path) -> Path:
    """A fresh virtual environment's interpreter, which also sees what is installed for this one.

    Not this one's install of the project, though: a .pth file found through a .pth file is not followed.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    """--ignore-installed, since pip would take the outer environment's metadata for an install."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    output(python, "-m", "pip", "install", *options, *what, cwd=cwd)


@pytest.fixture(scope="module")
def copied(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = environment(tmp_path_factory.mktemp("copied"))
    install(python, wheel, cwd=wheel.parent)
    return python


@pytest.fixture(scope="module")
def editable(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = environment(tmp_path_factory.mktemp("editable"))
    install(python, "--editable", clone, cwd=clone)
    return python


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path, clone: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    expected = set()
    for package, folder in PACKAGES.items():
        kept = [path for name in ("templates", "csrc") for path in (clone / folder / name).rglob("*")]
        extra = [path for path in kept if path.is_file()]
        data = [clone / folder / "py.typed", *extra]
        for path in [*(clone / folder).rglob("*.py"), *data]:
            expected.add(f"{package}/{path.relative_to(clone / folder).as_posix()}")
        assert f"{package}/__init__.py" in expected
    assert {name for name in names if not name.startswith(f"{info}/")} == expected
    assert f"{info}/licenses/LICENSE" in names
    assert entry_points.split() == ["[console_scripts]", "raise-core", "=", "raise_trainer.cli:main"]
    base = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra" not in line
    ]
    assert len(base) == 1
    assert base[0].startswith("Requires-Dist: torch>=")
    assert "Requires-Python: >=3.10" in metadata


def test_copy_install_imports_from_anywhere(copied: Path, clone: Path, tmp_path: Path) -> None:
    site = copied.parents[1]
    elsewhere = output(copied, "-c", IMPORT, cwd=tmp_path).splitlines()
    assert all(Path(file).is_relative_to(site) for file in elsewhere)
    core, kernels = output(copied, "-c", IMPORT, cwd=clone).splitlines()
    assert Path(core).is_relative_to(clone)
    assert Path(kernels).is_relative_to(site)


def test_editable_install_imports_from_anywhere(editable: Path, clone: Path, tmp_path: Path) -> None:
    wanted = [
        str(clone / folder / "__init__.py") for name, folder in PACKAGES.items() if name != "raise_trainer"
    ]
    assert output(editable, "-c", IMPORT, cwd=tmp_path).splitlines() == wanted
    assert output(editable, "-c", IMPORT, cwd=clone).splitlines() == wanted


def test_command_is_installed(copied: Path, editable: Path, tmp_path: Path) -> None:
    assert "demo" in output(copied.with_name("raise-core"), "--help", cwd=tmp_path)
    assert os.access(editable.with_name("raise-core"), os.X_OK)


@pytest.mark.parametrize("how", ["copied", "editable"])
def test_folder_name_is_refused(how: str, request: pytest.FixtureRequest, clone: Path) -> None:
    done = run(request.getfixturevalue(how), "-c", "import kernels.raise_kernels", cwd=clone)
    assert done.returncode != 0
    assert "imported as 'kernels.raise_kernels'; the package is called 'raise_kernels'" in done.stderr


# A Python that cannot do one thing, for the Makefile to meet.
LACKING = """#!/bin/sh
case "$*" in
  *"{what}"*) exit 1;;
  -V) echo "Python 3.9.18";;
esac
"""
# A Python whose `-m venv` makes an interpreter that notes what pip was asked for.
NOTING = """#!/bin/sh
case "$*" in
  "-m venv"*) mkdir -p "$4/bin"
    printf '#!/bin/sh\\necho "$@" >> {log}\\n' > "$4/bin/python"
    cp "$4/bin/python" "$4/bin/raise-core"
    chmod +x "$4/bin/python" "$4/bin/raise-core";;
esac
"""


def make(folder: Path, python: Path, *goals: str) -> subprocess.CompletedProcess[str]:
    return run("make", f"PYTHON={python}", *goals, cwd=folder)


def script(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("goal", ["test", "demo"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("version_info", "is Python 3.9.18, wanted Python 3.10 or newer"),
        ("ensurepip", "apt install python3-venv"),
    ],
)
def test_make_names_what_is_missing(goal: str, what: str, said: str, machine: Path) -> None:
    python = script(machine / "python-without", LACKING.format(what=what))
    done = make(machine, python, goal)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (machine / ".venv").exists()


def test_make_without_any_python(machine: Path) -> None:
    done = make(machine, machine / "absent", "test")
    assert done.returncode != 0
    assert "absent' here; install Python 3.10 or newer" in done.stderr


def test_make_installs_once_until_setup_changes(machine: Path) -> None:
    log = machine / "log"
    python = script(machine / "python-noting", NOTING.format(log=log))

    def installs(*goals: str) -> list[str]:
        log.write_text("", encoding="utf-8")
        done = make(machine, python, *goals)
        assert done.returncode == 0, done.stderr
        return [line.split()[-1] for line in log.read_text().splitlines() if "pip install" in line]

    assert installs("demo") == [".[train]"]
    assert installs("test") == [".[test]"]
    (machine / "setup.py").touch()
    assert installs("test") == installs("demo") == []
    (machine / "setup.py").write_text("changed", encoding="utf-8")
    assert installs("test") == [".[test]"]
    assert installs("demo") == []


KERNELS = "python -m raise_kernels.aot --quick --jobs 2"
DEMO, STUDY = "raise-core demo --smoke --out", "raise-core study --quick --processes 2"


@pytest.mark.parametrize(
    ("failing", "ran"),
    [
        ("", ["make test", "make lint", KERNELS, DEMO, STUDY]),
        ("make test", ["make test"]),
        ("make lint", ["make test", "make lint"]),
        ("python", ["make test", "make lint", KERNELS]),
        ("raise-core demo", ["make test", "make lint", KERNELS, DEMO]),
        ("raise-core study", ["make test", "make lint", KERNELS, DEMO, STUDY]),
    ],
)
def test_ci_runs_in_order_and_stops_at_a_failure(failing: str, ran: list[str], tmp_path: Path) -> None:
    installed = tmp_path / ".venv" / "bin"
    steps = {name: installed / name for name in ("raise-core", "python")}
    steps["make"] = tmp_path / "bin" / "make"
    for name, path in steps.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        fail = f'case "{name} $*" in "{failing}"*) exit 1;; esac' if failing else ""
        script(path, f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/log\n{fail}\n')
    (tmp_path / ".ci").mkdir()
    shutil.copyfile(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    done = run("bash", ".ci/run", cwd=tmp_path, PATH=f"{steps['make'].parent}:{os.environ['PATH']}")
    assert (done.returncode != 0) == bool(failing)
    log = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert len(log) == len(ran)
    assert all(line.startswith(step) for line, step in zip(log, ran, strict=True))
