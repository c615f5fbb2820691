"""The notebooks under scripts/notebooks: committed bare, and run from top to bottom as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "scripts" / "notebooks").rglob("*.ipynb"))
NAMES = ["1_quickstart.ipynb", "2_sweep_and_compare.ipynb"]
TINY = ["scale=rehearsal", "train.max_steps=2", "evaluate.rows=4", "evaluate.samples=1", "export.ask=false"]
"""A tiny random model on the card's own sample rows, offline."""
BRIEF = ["evaluate.rows=16", "evaluate.samples=1", "evaluate.max_new_tokens=8"]
FEW = [*BRIEF, "data.train_rows=64", "train.max_steps=4", "train.batch_size=4", "export.parity_prompts=2"]
FEW += ["evaluate.general=[]", "evaluate.drift=false"]
"""The quickstart's real base and rows, a few of them: enough for a sweep that is scored."""
LEARNT = [*BRIEF, "data.train_rows=208", "train.max_steps=26"]
"""So many updates that rounding leaves them in the merged weights, which the export asks for."""


def read(name: str) -> Any:
    return nbformat.read(ROOT / "scripts" / "notebooks" / name, as_version=4)


def execute(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **chosen: Any) -> dict[str, Any]:
    """Source of a cell -> its outputs, after all cells have run in order with some names of the first one chosen.

    A cell with the choices follows the one tagged `parameters`, as papermill does it. Raises CellExecutionError.
    """
    from nbclient import NotebookClient

    book = read(name)
    place = next(i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = "\n".join(f"{key} = {value!r}" for key, value in chosen.items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    place_of_kernel = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=None, kernel_name="python3", resources=place_of_kernel).execute()
    return {cell.source: cell.outputs for cell in book.cells if cell.cell_type == "code"}


def shown(outputs: Any) -> str:
    """All text and HTML of a cell's outputs."""
    parts = [
        out.text if "text" in out else "".join(out.data.get("text/html", out.data["text/plain"])) for out in outputs
    ]
    return "\n".join(parts)


def by_word(cells: dict[str, Any], word: str) -> str:
    """What the one cell that ends with this word has shown."""
    (found,) = [outputs for source, outputs in cells.items() if source.endswith(word)]
    return shown(found)


def test_there_are_two_notebooks_and_they_are_committed_without_outputs() -> None:
    assert [path.name for path in NOTEBOOKS] == NAMES
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        assert len(code) >= 6
        assert [cell.source for cell in code if cell.outputs or cell.execution_count is not None] == []
        assert set(book.metadata) == {"kernelspec", "language_info"}
        tagged = [cell.metadata for cell in book.cells if cell.metadata]
        assert tagged == [{"tags": ["parameters"]}] and code[0].metadata == tagged[0]


def test_the_recipes_and_settings_that_notebooks_name_exist() -> None:
    from finetune.compose import expand_sweep, load_recipe

    for name in NAMES:
        chosen: dict[str, Any] = {}
        (first,) = [cell.source for cell in read(name).cells if cell.metadata]
        for key, value in re.findall(r'^(\w+) = (".*?"|\[.*?\])(?:  #.*)?$', first, re.MULTILINE):
            chosen[key] = re.findall(r'"([^"]+)"', value)
        words = [*chosen["settings"], *(chosen["swept"] if "swept" in chosen else [])]
        for job in expand_sweep(words):
            assert load_recipe(chosen["recipe_name"][0], *job).network


def check_quickstart(cells: dict[str, Any], folder: Path, steps: int) -> None:
    """The cells of the first notebook show what they promise."""
    assert "memory of one device while training" in by_word(cells, "plan(recipe)")
    assert re.search(r"<td[^>]*>train</td>", by_word(cells, "job.rows"))
    assert "routed experts" in by_word(cells, "job.coverage") and "4-bit" in by_word(cells, "job.coverage")
    assert f"last of {steps}" in by_word(cells, "job.losses")
    assert "data:image/png;base64," in by_word(cells, "job.losses")
    assert "held-out rows" in by_word(cells, "scores") and "McNemar" in by_word(cells, "scores")
    assert "Copyleft" in by_word(cells, "max_new_tokens=12)")
    assert "hf/config.json" in by_word(cells, "job.exported")
    last = by_word(cells, "str(job.path))")
    assert "files are as the record says" in last
    (report,) = folder.rglob("report.html")
    assert str(report) in last


def check_sweep(cells: dict[str, Any], folder: Path) -> None:
    """The cells of the second notebook show what they promise."""
    assert len(list(folder.rglob("scores.json"))) == 2
    table = by_word(cells, "sweep")
    assert "adapter.rank=4" in table and "adapter.rank=16" in table and "data:image/png;base64," in table
    compared = by_word(cells, "compare(*sweep.runs)")
    assert "adapter.rank" in compared and "train.lr" not in compared
    assert "McNemar" in by_word(cells, "sweep.best.scores")
    (best,) = re.findall(r"the best run: (\S+)", by_word(cells, "again.as_rows()"))
    assert (Path(best) / "scores.json").is_file()


@pytest.mark.slow
def test_the_first_notebook_runs_from_top_to_bottom_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    check_quickstart(execute(NAMES[0], monkeypatch, tmp_path, settings=words), tmp_path / "runs", 2)


@pytest.mark.slow
def test_the_second_notebook_runs_from_top_to_bottom_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    check_sweep(execute(NAMES[1], monkeypatch, tmp_path, settings=words), tmp_path / "runs")


@pytest.mark.data
@pytest.mark.timeout(3600)
def test_the_first_notebook_runs_on_the_quickstarts_real_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*LEARNT, f"runs_dir={tmp_path / 'runs'}"]
    check_quickstart(execute(NAMES[0], monkeypatch, tmp_path, settings=words), tmp_path / "runs", 26)


@pytest.mark.data
@pytest.mark.timeout(3600)
def test_the_second_notebook_runs_on_the_quickstarts_real_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*FEW, f"runs_dir={tmp_path / 'runs'}"]
    check_sweep(execute(NAMES[1], monkeypatch, tmp_path, settings=words), tmp_path / "runs")
