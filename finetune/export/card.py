"""The card of an export: what it is, where it came from, under which licence, how it did, and how to start it."""

from __future__ import annotations

from finetune.export.parity import Parity
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json


def card(run_dir: RunDir, recipe: Recipe, parity: Parity | None) -> str:
    """README.md of an export, as Markdown with the metadata block that model hubs read."""
    name = export_name(run_dir, recipe)
    data = read_json(run_dir.data / "report.json")["source"]
    title = data["title"] if "title" in data else data["kind"]
    method = {"dora": "DoRA", "lora": "LoRA", "full": "all weights trained"}[recipe.adapter.method]
    lines = [
        "---",
        f"license: {recipe.model.licence or 'other'}",
        f"base_model: {recipe.model.title or recipe.model.name}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {name}",
        "",
        f"{recipe.model.title or recipe.model.name}, fine-tuned with {method} by the recipe `{recipe.name}`"
        + (" in rehearsal: a tiny random model, of no use but to try the chain." if recipe.model.tiny else "."),
        "",
        f"- base licence: {recipe.model.licence or 'unknown'} {recipe.model.licence_url}".rstrip(),
        f"- data: {title}, licence {data['licence']}. {data['attribution']}".rstrip(),
    ]
    if run_dir.scores.exists():
        lines += ["", "## Result", "", read_json(run_dir.scores)["verdict"]]
    if parity is not None:
        lines += ["", "## Is it what was trained?", "", parity.sentence() + "."]
    lines += ["", "## Start it", ""]
    if "hf" in recipe.export.formats:
        lines += [
            "`hf/` is an ordinary transformers folder:",
            "",
            "```python",
            "from transformers import AutoTokenizer, pipeline",
            "",
            'answer = pipeline("text-generation", model="hf", tokenizer=AutoTokenizer.from_pretrained("hf"))',
            'print(answer([{"role": "user", "content": "..."}], max_new_tokens=48))',
            "```",
            "",
        ]
    if "peft" in recipe.export.formats:
        lines += [
            "`peft/` is an ordinary PEFT adapter for the base above (`PeftModel.from_pretrained(base, 'peft')`).",
            "",
        ]
    return "\n".join(lines)


def export_name(run_dir: RunDir, recipe: Recipe) -> str:
    """The name the export goes by."""
    return recipe.export.name or f"{recipe.name}-{run_dir.path.name}"
