"""The card of an export: what it is, where it came from, under which licence, how it did, and how to start it.

Everything it says is taken from what the record will say. Its metadata block is the one that model hubs read.
"""

from __future__ import annotations

from typing import Any

from finetune import terms
from finetune.check import source_kind
from finetune.licences import find_licence
from finetune.parity import Parity
from finetune.recipe import Recipe
from finetune.rundir import RunDir

Facts = dict[str, Any]
"""What `record.derived` gives."""


def card(name: str, recipe: Recipe, facts: Facts) -> str:
    """README.md of an export, as Markdown with the metadata block that model hubs read."""
    from huggingface_hub import ModelCard

    text = "\n".join(
        [*_what(name, recipe, facts), *_result(facts), *_proof(facts), *_licence(recipe, facts), *_start(recipe)]
    )
    return str(ModelCard(f"---\n{metadata(name, recipe, facts).to_yaml()}\n---\n\n{text}")).rstrip() + "\n"


def metadata(name: str, recipe: Recipe, facts: Facts) -> Any:
    """The metadata of the card, as huggingface_hub's ModelCardData."""
    from huggingface_hub import ModelCardData

    licence, rows = find_licence(terms.key_of(recipe)), facts["licences"]["rows"]
    told: dict[str, Any] = {"license": licence.hub if licence else "other"}
    if told["license"] == "other":
        told["license_name"] = terms.key_of(recipe) or "unknown"
        told["license_link"] = facts["licences"]["url"] or "LICENSE"
    if not recipe.model.tiny:
        told["base_model"] = base_model(recipe)
    if "card" in rows:
        told["datasets"] = [rows["card"]]
    results = evaluation_results(facts)
    if results:
        told |= {"model_name": name, "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["finetune", recipe.adapter.method, *(["rehearsal"] if recipe.model.tiny else [])],
        **told,
    )


def evaluation_results(facts: Facts) -> list[Any]:
    """The tuned model's scores on the held-out rows, as the hub's model index wants them."""
    from huggingface_hub import EvalResult

    scores, rows = facts["metrics"], facts["licences"]["rows"]
    if scores is None:
        return []
    dataset = rows["card"] if "card" in rows else "own-rows"
    title = rows["title"] if "title" in rows else "rows of the user's own"
    values = {"loss": scores["tuned"]["loss"], "accuracy": scores["tuned"]["accuracy"]}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=title,
            dataset_split="heldout",
            metric_type=kind,
            metric_value=value,
        )
        for kind, value in values.items()
        if value is not None
    ]


def base_model(recipe: Recipe) -> str:
    """What the base is called: its hub id where it has one, else its publisher's name for it."""
    model = recipe.model
    return model.source if source_kind(model.source) == "hub" else model.title or model.name


def export_name(run_dir: RunDir, recipe: Recipe) -> str:
    """The name the export goes by."""
    return recipe.export.name or f"{recipe.name}-{run_dir.path.name}"


def method_name(recipe: Recipe) -> str:
    """How the base was tuned, as people call it."""
    return {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[recipe.adapter.method]


def _what(name: str, recipe: Recipe, facts: Facts) -> list[str]:
    base = f"{recipe.model.title or recipe.model.name}, fine-tuned with {method_name(recipe)}"
    rehearsal = " in rehearsal: a tiny random model, of no use but to try the chain." if recipe.model.tiny else "."
    rows, source = facts["rows"], facts["licences"]["rows"]
    title = source["title"] if "title" in source else "rows of the user's own"
    lines = [f"# {name}", "", f"{base} by the recipe `{recipe.name}`{rehearsal}", ""]
    if rows:
        dropped = sum(rows["dropped"].values())
        counts = ", ".join(f"{count:,} {split}" for split, count in rows["splits"].items())
        lines.append(f"- rows: {title}; {rows['read']:,} read, {dropped:,} dropped, {counts}")
    if facts["training"] and facts["compute"]:
        training, flop = facts["training"], facts["compute"]["by_parameters"]["flop"]
        took = f"{training['seconds']:,.0f} s on {training['device']}, {flop:.3g} FLOP"
        lines.append(f"- training: {training['steps']:,} updates, {training['tokens']:,} tokens, {took}")
    if facts["energy"]["kwh"] is not None:
        lines.append(f"- energy of the GPUs: {facts['energy']['kwh']:.3g} kWh")
    return lines


def _result(facts: Facts) -> list[str]:
    scores = facts["metrics"]
    if scores is None:
        return []
    base, tuned = scores["base"], scores["tuned"]
    lines = ["", "## Result", "", scores["verdict"], "", f"| {scores['rows']:,} held-out rows | base | tuned |"]
    lines += ["|---|---|---|", f"| loss per answer token | {base['loss']:.3f} | {tuned['loss']:.3f} |"]
    if tuned["accuracy"] is not None and base["accuracy"] is not None:
        lines.append(f"| right answers | {_share(base)} | {_share(tuned)} |")
    lines += [line for name in ("forgetting", "safety") if scores[name] for line in ("", scores[name])]
    return lines


def _share(side: dict[str, Any]) -> str:
    text = f"{side['accuracy']:.1%}"
    interval = "low" in side and side["low"] is not None and side["high"] is not None
    return f"{text} ({side['low']:.1%} to {side['high']:.1%})" if interval else text


def _proof(facts: Facts) -> list[str]:
    proof = facts["parity"]
    if proof is None:
        return []
    said = Parity(**{name: value for name, value in proof.items() if name != "schema"}).sentence()
    return ["", "## Is it what was trained?", "", f"{said}."]


def _licence(recipe: Recipe, facts: Facts) -> list[str]:
    told, rows = facts["licences"], facts["licences"]["rows"]
    lines = ["", "## Licence", ""]
    if told["applies"]:
        lines.append(f"- base: {told['title'] or told['base'] or 'unknown'} {told['url']}".rstrip())
    else:
        lines.append(f"- base: none, its random weights were made here; at full scale: {told['title'] or told['base']}")
    if "licence" in rows:
        lines.append(f"- rows: {rows['licence']}. {rows['attribution']}".rstrip())
    lines += [f"- {duty}" for duty in told["duties"]]
    lines += [f"- {v['what']}: see NOTICE" for v in told["verdicts"] if v["rule"] == "LIC-009" and not v["passed"]]
    rows_too = ", `croissant.json` the rows without their words" if recipe.export.croissant else ""
    last = f"NOTICE has all of it, `bom.cdx.json` every file by hash{rows_too}. Information, not legal advice."
    return [*lines, "", last]


def _start(recipe: Recipe) -> list[str]:
    lines = ["", "## Start it", ""]
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
    others = {
        "peft": "`peft/` is an ordinary PEFT adapter for the base above (`PeftModel.from_pretrained(base, 'peft')`).",
        "peft_per_expert": "`peft_per_expert/` is the same adapter in the layout that servers read, a pair per expert.",
        "gguf": "`gguf/` is for llama.cpp: `llama-server -m gguf/NAME.gguf --jinja`.",
        "ollama": "`ollama/` makes it known to Ollama: `cd ollama && ollama create NAME -f Modelfile`.",
        "vllm": "`vllm/start.sh` starts vLLM with `hf/` on the loopback address.",
    }
    for name, sentence in others.items():
        if name in recipe.export.formats:
            lines += [sentence, ""]
    return lines
