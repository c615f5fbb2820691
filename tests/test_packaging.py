"""What is installed: the wheel, the locks, the scripts that set up."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RECIPES = sorted(p.stem for p in (ROOT / "recipes" / "recipe").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_the_recipes_and_the_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = {name for name in listed if (ROOT / name).is_file()}
    places = {"finetune/": "finetune/", "recipes/": "finetune/_recipes/", "data/": "finetune/_data/"}
    expected = {places[room] + name.removeprefix(room) for name in files for room in places if name.startswith(room)}
    assert len(expected) > 50
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_an_installed_wheel_finds_its_recipes(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    words = [sys.executable, "-m", "finetune", "recipes"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [name for name in RECIPES if name not in done.stdout] == []


def read_lock(name: str) -> dict[str, tuple[str, int]]:
    """Package -> version and number of hashes."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[A-Za-z0-9])", "\n" + text)[1:]
    found = {}
    for block in blocks:
        package, version = re.match(r"([A-Za-z0-9._-]+)==(\S+)", block).groups()  # type: ignore[union-attr]
        assert package not in found
        found[package] = version, block.count("--hash=sha256:")
    return found


LOCKS = ["requirements.lock", "scripts/build.lock", "tests/requirements.lock"]


@pytest.mark.parametrize("name", [*LOCKS, "tests/deepspeed.lock", "tests/croissant.lock"])
def test_a_lock_has_hashes_for_every_version_and_names_no_place(name: str) -> None:
    assert all(hashes > 0 for _, hashes in read_lock(name).values())
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|--extra|--trusted|file:| /", text)


def test_the_locks_hold_every_dependency_in_a_version_that_the_project_allows() -> None:
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    locked = {package: version for name in reversed(LOCKS) for package, (version, _) in read_lock(name).items()}
    torch = re.search(r"^TORCH=(\S+)$", (ROOT / "scripts" / "setup_venv.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch and "torch" not in locked
    locked["torch"] = torch.group(1)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_every_package_that_we_import_is_a_dependency_and_the_other_way_round() -> None:
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "finetune").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    # unsloth is an extra, and imported by one file after `machine` has found it (finetune/train/with_unsloth.py).
    # triton is a part of torch's builds for GPUs, and asked for before it is imported (finetune/experts/fused.py).
    # The extras [sign], [energy], [gguf] and [prices] are asked for before they are imported (signing.py, energy.py,
    # machine.py, api_prices.py). llama.cpp's server and its converter are programs of their own, imported by the child
    # process that runs them (llama_cpp_runner.py, export/converter_child.py).
    extras = {"triton", "unsloth", "model_signing", "cryptography", "pynvml", "llama_cpp", "genai_prices"}
    extras |= {"xllamacpp", "conversion", "convert_hf_to_gguf", "convert_lora_to_gguf"}
    # [tasks], and what comes with it: `tasks` and `judging` look for them before anything is written.
    extras |= {"lm_eval", "rouge_score"}
    extras |= {"deepspeed"}  # its extra: `machine` looks for it, and one file imports it (finetune/train/zero.py)
    modules = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"finetune"} - extras
    names = packages_distributions()
    ours = {canonicalize_name(names[module][0]) for module in modules}
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    # Not imported by name: accelerate carries TRL's trainer, transformers asks for tensorboard when it logs, and
    # huggingface-hub is imported in the text of a child process (finetune/fetch/hub.py), and detectors of secrets and
    # of identity numbers by the name of what was seen (finetune/data/credentials.py, privacy.py).
    by_others = {"accelerate", "tensorboard", "huggingface-hub", "detect-secrets", "python-stdnum"}
    assert ours <= declared, f"not declared: {ours - declared}"
    assert declared <= ours | by_others, f"not used: {declared - ours - by_others}"


def test_the_locks_are_above_the_security_floors() -> None:
    floors = {"transformers": "5.3.0", "hydra-core": "1.3.8", "jinja2": "3.1.6"}
    locked = read_lock("requirements.lock")
    for package, floor in floors.items():
        assert Requirement(f"{package}>={floor}").specifier.contains(locked[package][0])
    assert "kernels" not in locked, "with it, libraries fetch and run code from a hub"
    analytics = {"posthog", "sentry-sdk", "segment-analytics-python", "analytics-python", "wandb", "scarf"}
    assert analytics.isdisjoint(locked)


@pytest.mark.parametrize(
    "name",
    [
        "scripts/quickstart.sh",
        "scripts/test.sh",
        "scripts/lock.sh",
        "scripts/setup_venv.sh",
        "scripts/egress_check.sh",
        ".ci/run",
    ],
)
def test_a_script_parses_and_may_be_executed(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    done = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_same_script_as_people_do() -> None:
    assert re.search(r"^bash scripts/test\.sh$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert "run: bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
