"""The house rules: what a reader may rely on in every file.

Each rule is a function from a file's text to complaints, and each is shown a small offence first, so that a rule that
sees nothing is itself found out.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from finetune.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)

Rule = Callable[[str], list[str]]


def complaints(rule: Rule, paths: list[Path]) -> list[str]:
    """`path:complaint` for everything that a rule finds in some files. There must be files."""
    assert paths
    return [f"{p.relative_to(ROOT)}:{found}" for p in paths for found in rule(p.read_text(encoding="utf-8"))]


def no(found: list[str]) -> None:
    """Fails with every complaint on a line of its own."""
    assert not found, "\n" + "\n".join(found)


def repository_files() -> list[str]:
    """Paths of every file that is, or would be, committed."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in listed if name and (ROOT / name).is_file()})


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; only PATH, HOME and what is given are in its environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- rules on one file's text ---------------------------------------------------------------------------------------


def undocumented_fields(source: str) -> list[str]:
    """Fields of dataclasses that lack a sentence under them, ending with a full stop."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not (_text(below) or "").rstrip().endswith((".", "?", "!")):
                found.append(f"{field.lineno} {node.name}.{ast.unparse(field.target)} has no sentence under it")
    return found


def bad_docstrings(source: str) -> list[str]:
    """Modules, public classes and public functions whose docstring does not begin with a sentence, or is missing."""
    tree = ast.parse(source)
    found = []
    for name, line, node in [("the module", 1, tree), *_public(tree)]:
        first = (ast.get_docstring(node) or "").split("\n")[0]
        if not first.rstrip("`\"')").endswith((".", "?", "!", ":")):
            found.append(f"{line} {name}: the first line of the docstring is {first!r}, not a sentence")
    return found


def dangerous_calls(source: str) -> list[str]:
    """Pickles, code from strings, shells and remote code: nothing that can run what a file or a user brings."""
    imports = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "imp"}
    imports |= {"posthog", "sentry_sdk", "segment", "analytics", "scarf", "wandb", "mlflow", "trackio"}  # who send
    calls = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec"}
    calls |= {"tempfile.mktemp", "mktemp", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
    calls |= {"torch.serialization.load", "runpy.run_path", "runpy.run_module", "__import__", "compile"}
    calls |= {"hydra.utils.instantiate", "instantiate", "hydra.utils.get_class", "hydra.utils.get_method"}
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    arguments = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            bad = {name for name in names if name.split(".")[0] in imports or name in calls}
            found += [f"{node.lineno} imports {name}" for name in sorted(bad)]
        if isinstance(node, ast.Call):
            safe = any(k.arg == "Loader" and ast.unparse(k.value) in safe_loaders for k in node.keywords)
            if ast.unparse(node.func) in calls and not safe:
                found.append(f"{node.lineno} calls {ast.unparse(node.func)}")
            if ast.unparse(node.func) in ("np.load", "numpy.load") and not any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) == "False" for keyword in node.keywords
            ):
                found.append(f"{node.lineno} calls np.load without allow_pickle=False")
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in arguments:
                    found.append(f"{node.lineno} passes {keyword.arg}={keyword.value.value}")
    return found


SETTINGS = {
    "recipe",
    "settings",
    "cfg",
    "config",
    "adapter",
    "train",
    "data",
    "launch",
    "evaluate",
    "merge",
    "export",
    "costs",
    "model",
}


def defaults_behind_keys(source: str) -> list[str]:
    """`settings.get("key", default)` and `getattr(settings, "key", default)`: a default stands once, in recipe.py."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and len(node.args) + len(node.keywords) == 2
        ):
            receiver, key = node.func.value, node.args[0]
        elif isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
            receiver, key = node.args[0], node.args[1]
        else:
            continue
        words = set(re.findall(r"\w+", ast.unparse(receiver)))
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and words & SETTINGS:
            found.append(f"{node.lineno} {ast.unparse(node)}")
    return found


def long_module(source: str) -> list[str]:
    """A module of more than 400 lines wants a wall."""
    lines = source.count("\n")
    return [f"1 {lines} lines"] if lines > 400 else []


RECIPES = sorted(p.stem for p in (ROOT / "recipes" / "recipe").glob("*.yaml"))
KEYS = {key for family in FAMILIES.values() for key in (family.key, *family.model_types)}
BRANDS = {re.match("[a-z]+", key).group() for key in KEYS} - {"gpt", "glm"}  # type: ignore[union-attr]
BRANDS |= {
    "llama",
    "mistral",
    "ministral",
    "deepseek",
    "qwen",
    "gpt.?oss",
    "chatglm",
    "internlm",
    r"glm[\W_]?\d",
    "kimi",
    "granite",
    "olmoe",
}
# Longest first; not inside a word (ollama), and not the programs that begin with a brand (llama.cpp and its variables).
PROGRAMS = r".?cpp|-server|-quantize|_model_quantize|_backend_init|_ftype|_ARG_|_OFFLINE|_API_KEY|\.h\b"
NAMES = re.compile(rf"(?<![a-z])(?:{'|'.join(sorted(BRANDS, key=len, reverse=True))})(?!{PROGRAMS})", re.IGNORECASE)


def family_names(source: str) -> list[str]:
    """Names of families in code, texts or comments. The name of a recipe file is not one."""
    for recipe in RECIPES:
        source = source.replace(recipe, "")
    return [f"{n} {line.strip()[:100]}" for n, line in enumerate(source.splitlines(), 1) if NAMES.search(line)]


def machine_folders(source: str) -> list[str]:
    """Absolute paths of somebody's machine."""
    pattern = re.compile(r"(?<![\w.~])/(?:root|home/[a-z]+|work|Users/\w+)/")
    return [f"{n} {line.strip()[:100]}" for n, line in enumerate(source.splitlines(), 1) if pattern.search(line)]


def missing_header(source: str) -> list[str]:
    """A YAML file that does not begin with a comment which says what it is for."""
    first = [line for line in source.splitlines() if not line.startswith("# @package")][:1]
    return [] if first and re.match(r"# \w.{15,}", first[0]) else ["1 no comment at the top says what it is for"]


def unfinished(source: str) -> list[str]:
    """Marks of work left for later in comments."""
    comments = (t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT)
    return [f"{t.start[0]} {t.string}" for t in comments if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", t.string)]


def speechless_errors(source: str) -> list[str]:
    """Errors with an id that do not say what to type: `...Error("ABC-001", what, why, fix)` without the last."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        first, *rest = node.exc.args
        if not isinstance(first, ast.Constant) or not re.fullmatch(r"[A-Z]{3,4}-\d{3}", str(first.value)):
            continue
        if not any(k.arg == "fix" for k in node.exc.keywords) and (len(rest) < 3 or ast.unparse(rest[2]) == "''"):
            found.append(f"{node.lineno} {first.value} does not say what to type")
    return found


def _text(node: ast.stmt | None) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


def _public(
    node: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, int, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield prefix + child.name, child.lineno, child
            # torch fixes the names and meaning of forward and backward: the class says what both do.
            if isinstance(child, ast.ClassDef) and "torch.autograd.Function" not in map(ast.unparse, child.bases):
                yield from _public(child, f"{child.name}.")


OFFENCES: list[tuple[Rule, str]] = [
    (
        undocumented_fields,
        "@dataclass(slots=True)\nclass A:\n    'A thing.'\n    rank: int = 1\n    alpha: int = 2\n    'Why.'\n",
    ),
    (undocumented_fields, "@dataclass\nclass A:\n    'A thing.'\n    rank: int = 1\n    'no full stop'\n"),
    (bad_docstrings, "'A module.'\ndef f():\n    pass\n"),
    (bad_docstrings, "'A module.'\nclass A:\n    'A thing.'\n    def f(self):\n        'no sentence'\n"),
    (bad_docstrings, "def _f():\n    pass\n"),
    (dangerous_calls, "import pickle\n"),
    (dangerous_calls, "from pickle import loads\n"),
    (dangerous_calls, "from torch import load\n"),
    (dangerous_calls, "import torch\nx = torch.load('a')\n"),
    (dangerous_calls, "import yaml\nx = yaml.load('a', Loader=yaml.Loader)\n"),
    (dangerous_calls, "x = eval('1')\n"),
    (dangerous_calls, "exec('1')\n"),
    (dangerous_calls, "import subprocess\nsubprocess.run('ls', shell=True)\n"),
    (dangerous_calls, "m = A.from_pretrained('a', trust_remote_code=True)\n"),
    (dangerous_calls, "from hydra.utils import instantiate\n"),
    (dangerous_calls, "import cloudpickle\n"),
    (dangerous_calls, "import os\nos.system('ls')\n"),
    (dangerous_calls, "import subprocess\nsubprocess.getoutput('ls')\n"),
    (dangerous_calls, "import tempfile\nx = tempfile.mktemp()\n"),
    (dangerous_calls, "from tempfile import mktemp\n"),
    (dangerous_calls, "x = np.load('a')\n"),
    (dangerous_calls, "x = np.load('a', allow_pickle=True)\n"),
    (dangerous_calls, "x = yaml.unsafe_load('a')\n"),
    (dangerous_calls, "x = torch.load('a', weights_only=False)\n"),
    (dangerous_calls, "def f():\n    import wandb\n"),
    (dangerous_calls, "from posthog import Posthog\n"),
    (dangerous_calls, "import sentry_sdk\n"),
    (defaults_behind_keys, "x = cfg.get('rank', 16)\n"),
    (defaults_behind_keys, "x = recipe.model.config.get('hidden_size', default=0)\n"),
    (defaults_behind_keys, "x = getattr(recipe.train, 'lr', 1e-4)\n"),
    (long_module, "x = 1\n" * 401),
    (family_names, "# as in Llama 4\n"),
    (family_names, "if model_type == 'qwen3_moe':\n    pass\n"),
    (family_names, "from transformers import MixtralConfig\n"),
    (family_names, "x = 'gpt-oss'\n"),
    (machine_folders, "path = '/home" + "/ann/models'\n"),
    (missing_header, "# @package _global_\ndefaults:\n  - _self_\n"),
    (missing_header, ""),
    (unfinished, "x = 1  # TO" + "DO\n"),
    (speechless_errors, "raise DataError('DATA-001', 'it is wrong', 'because')\n"),
    (speechless_errors, "raise RunError('RUN-001', 'it is wrong', '', '') from None\n"),
]


@pytest.mark.parametrize(("rule", "offence"), OFFENCES, ids=[f"{r.__name__}-{n}" for n, (r, _) in enumerate(OFFENCES)])
def test_a_rule_sees_an_offence(rule: Rule, offence: str) -> None:
    assert rule(offence)


@pytest.mark.parametrize(
    ("rule", "fine"),
    [
        (undocumented_fields, "class A:\n    'A thing.'\n    rank: int = 1\n"),
        (dangerous_calls, "x = np.load('a', allow_pickle=False)\ny = re.compile('a')\n"),
        (dangerous_calls, "model.eval()\nsubprocess.run(['ls'], shell=False)\n"),
        (dangerous_calls, "x = yaml.safe_load('a')\ny = yaml.load('a', Loader=yaml.CSafeLoader)\n"),
        (defaults_behind_keys, "x = counts.get(name, 0) + message.get('role', '')\ny = config.get('model_type')\n"),
        (speechless_errors, "raise DataError('DATA-001', 'it is wrong', '', 'data=NAME')\nraise ValueError('no')\n"),
        (family_names, "x = 'ollama and llama.cpp, recipe=llama4_70b_legal'\n"),
    ],
)
def test_a_rule_lets_honest_code_pass(rule: Rule, fine: str) -> None:
    assert rule(fine) == []


def test_every_rule_has_been_shown_an_offence() -> None:
    used = {undocumented_fields, bad_docstrings, dangerous_calls, defaults_behind_keys, long_module, unfinished}
    assert used | {family_names, machine_folders, missing_header, speechless_errors} == {rule for rule, _ in OFFENCES}


# --- the rules, on our files ----------------------------------------------------------------------------------------


def test_every_field_of_every_dataclass_has_a_sentence_under_it() -> None:
    assert {PACKAGE / "recipe.py", PACKAGE / "families" / "family.py"} <= set(MODULES)
    no(complaints(undocumented_fields, MODULES))


def test_every_public_name_has_a_docstring_that_begins_with_a_sentence() -> None:
    no(complaints(bad_docstrings, MODULES))


def test_nothing_reads_a_pickle_runs_a_text_or_opens_a_shell() -> None:
    scripts = sorted((ROOT / "scripts").rglob("*.py"))
    assert len(scripts) > 8
    no(complaints(dangerous_calls, [*MODULES, *scripts]))


def test_no_setting_has_a_second_default_behind_its_key() -> None:
    no(complaints(defaults_behind_keys, MODULES))


def test_no_module_is_longer_than_400_lines() -> None:
    no(complaints(long_module, MODULES))


def test_every_error_that_is_raised_says_what_to_type() -> None:
    no(complaints(speechless_errors, MODULES))


def test_nothing_in_the_package_is_left_for_later() -> None:
    no(complaints(unfinished, MODULES))


# Files outside families/ that may name a family, and why.
MAY_NAME_A_FAMILY = {
    "upcycle.py": "it is the conversion of one known architecture into another",
}


def test_no_family_is_named_outside_the_room_of_families() -> None:
    assert len(BRANDS) > 8
    elsewhere = [p for p in MODULES if p.parent.name != "families" and p.name not in MAY_NAME_A_FAMILY]
    no(complaints(family_names, elsewhere))
    for name in MAY_NAME_A_FAMILY:  # an exception that nothing needs any more must go
        assert complaints(family_names, [PACKAGE / name])


def test_every_recipe_file_says_at_its_top_what_it_is_for() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len([p for p in recipes if p.parent.name == "recipe"]) >= 8
    no(complaints(missing_header, recipes))


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    texts = [ROOT / name for name in repository_files() if not name.endswith((".lock", ".png"))]
    no(complaints(machine_folders, texts))


def test_the_repository_stays_small() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in repository_files()}
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}
    assert sum(sizes.values()) < 10_000_000


# --- import layers --------------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_rooms_import_downwards_only() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("rundir.py", "from finetune import run"),
        ("chat.py", "from finetune import train"),
        ("utils.py", "import json"),
    ],
    ids=["upwards", "from stage to stage", "a room with no place"],
)
def test_the_layers_contract_sees_a_wrong_import(tmp_path: Path, module: str, line: str) -> None:
    for source in MODULES:
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    with (tmp_path / "finetune" / module).open("a", encoding="utf-8") as handle:
        handle.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert module.removesuffix(".py") in done.stdout


# --- the README -----------------------------------------------------------------------------------------------------


def read_tree(readme: str) -> dict[str, str]:
    """Path or pattern -> phrase, from the block under `## The tree`. Two spaces of indentation are one folder."""
    block = readme.split("\n## The tree\n")[1].split("```")[1]
    folders: list[str] = []
    entries = {}
    for line in filter(str.strip, block.splitlines()[1:]):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition("  ")
        path = "".join([*folders[:depth], name])
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            assert path not in entries, f"{path} stands twice in the tree"
            entries[path] = phrase.strip()
    return entries


def tree_differences(entries: dict[str, str], files: list[str]) -> list[str]:
    """What the tree lacks, what only the tree has, and entries without a phrase. `*` stays within a folder."""

    def matches(name: str, pattern: str) -> bool:
        return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)

    return [
        *(f"{name} is not in the tree" for name in files if not any(matches(name, p) for p in entries)),
        *(f"{p} is in the tree only" for p in entries if not any(matches(name, p) for name in files)),
        *(f"{p} has no phrase" for p, phrase in entries.items() if not phrase),
    ]


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    entries = read_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    no(tree_differences(entries, repository_files()))


def test_a_tree_that_lacks_a_file_or_invents_one_is_seen() -> None:
    tree = read_tree("\n## The tree\n\n```\na/\n  b.py     the first room\n  *.yaml   all the settings\nc.md\n```\n")
    assert tree == {"a/b.py": "the first room", "a/*.yaml": "all the settings", "c.md": ""}
    found = tree_differences(tree, ["a/b.py", "a/new.py", "a/deep/x.yaml"])
    assert found == [
        "a/new.py is not in the tree",
        "a/deep/x.yaml is not in the tree",
        "a/*.yaml is in the tree only",
        "c.md is in the tree only",
        "c.md has no phrase",
    ]


def test_every_path_and_recipe_that_the_readme_links_or_types_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash scripts/quickstart.sh" in readme[:2500] and "bash scripts/test.sh" in readme[:2500]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", readme)
    assert [link for link in links if not (ROOT / link).exists()] == []
    recipes = set(re.findall(r"recipe=(\w+)", readme)) - {"NAME"}
    assert recipes and recipes <= set(RECIPES)
    assert set(RECIPES) <= set(re.findall(r"`(\w+)`", readme)), "a recipe is missing in the table of recipes"


# --- imports and the network ----------------------------------------------------------------------------------------

HEAVY = ["torch", "transformers", "datasets", "peft", "trl", "hydra", "omegaconf", "numpy", "scipy"]
IMPORTED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
COMMAND = """
import contextlib, io, runpy, sys
sys.argv, code = ["finetune", *{words}], 0
try:
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module("finetune", run_name="__main__")
except SystemExit as end:
    code = end.code
assert not code, code
"""


@pytest.mark.parametrize("words", [["--help"], [], ["--version"]], ids=["help", "bare", "version"])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert python(COMMAND.format(words=words) + IMPORTED) == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert python("import finetune\n" + IMPORTED) == "[]"


def test_plan_does_not_import_torch() -> None:
    imported = python(COMMAND.format(words=["plan", "recipe=qwen3_30b_legal"]) + IMPORTED)
    assert "'hydra'" in imported, "the list does not show what is imported"
    assert "'torch'" not in imported and "'transformers'" not in imported


def test_the_offline_switches_stand_before_a_hugging_face_library_reads_them() -> None:
    code = """
import sys, finetune
assert "huggingface_hub" not in sys.modules
import huggingface_hub.constants as hub, datasets.config as data
print(hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_TELEMETRY, data.HF_DATASETS_OFFLINE)
"""
    assert python(code, HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="0") == "True True True"
    assert python(code.replace("sys, finetune", "sys")) != "True True True", "the switches are not what does it"


def test_no_heading_and_no_table_stands_twice_in_the_readme():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("## ") or (line.startswith("| ") and len(line) > 30)]
    assert len(found) > 50
    assert [line for line, count in Counter(found).items() if count > 1] == []
