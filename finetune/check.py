"""Everything that can be wrong with settings, all at once: `problems(recipe)`. No torch, no network, no weights."""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from finetune import context, judging, methods, sbatch, sizes, terms
from finetune.engine import engine_problems
from finetune.errors import RecipeError
from finetune.families import FAMILIES, Family
from finetune.recipe import Data, Recipe
from finetune.tasks import task_problems

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
PACKAGE = re.compile(r"package:[A-Za-z0-9][\w.-]*==[\w.!+-]+/[^\s]+")
EXPORT_FORMATS = ("hf", "peft", "peft_per_expert", "gguf", "ollama", "vllm")
NEEDED_FORMATS = {"ollama": "gguf", "vllm": "hf"}
"""Format -> the one that it starts."""
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types of GGUF files that llama.cpp's converter writes."""
GGUF_SMALL = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
"""Types that llama.cpp's quantiser makes of an f16 file."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "model.upcycle_experts": (0, 1024),
    "model.upcycle_top_k": (1, 1024),
    "model.download_gib": (0, math.inf),
    "adapter.rank": (1, 4096),
    "adapter.expert_rank": (1, 4096),
    "adapter.lora_plus_ratio": (1, 10_000),
    "adapter.eva_rho": (1, 16),
    "data.heldout_fraction": (0, 0.9),
    "data.train_rows": (0, math.inf),
    "data.heldout_rows": (0, math.inf),
    "data.max_length": (8, math.inf),
    "data.excerpt_words": (0, math.inf),
    "data.max_drop_fraction": (0, 1),
    "data.min_words": (0, math.inf),
    "data.near_share": (0.3, 1),
    "data.workers": (0, 1024),
    "train.max_steps": (0, math.inf),
    "train.save_steps": (0, math.inf),
    "train.keep_checkpoints": (1, 1000),
    "train.evaluate_steps": (0, math.inf),
    "train.batch_size": (1, math.inf),
    "train.accumulation": (1, math.inf),
    "train.checkpointed_layers": (0, math.inf),
    "train.warmup_fraction": (0, 1),
    "train.weight_decay": (0, math.inf),
    "train.router_aux_loss_coef": (0, math.inf),
    "train.neftune_alpha": (0, 1000),
    "launch.nodes": (1, 100_000),
    "launch.context_parallel": (1, 100_000),
    "launch.devices": (1, 1024),
    "launch.cpu_threads": (0, 4096),
    "launch.cpus_per_task": (0, 4096),
    "launch.warn_seconds": (10, 65535),
    **judging.RANGES,
    "export.parity_prompts": (1, math.inf),
    "export.min_top1": (0, 1),
    "licence.monthly_users": (0, math.inf),
    "model.pretraining_tokens": (0, math.inf),
    "costs.price_per_hour": (0, math.inf),
    "costs.device_kw": (0, math.inf),
    "tco.gpus": (1, 100_000),
    "tco.node_per_hour": (0, math.inf),
    "tco.capex": (0, math.inf),
    "tco.interest": (0, 10),
    "tco.residual": (0, 1),
    "tco.node_kw": (0, math.inf),
    "tco.load": (0, 1),
    "tco.pue": (1, 10),
    "tco.kwh_price": (0, math.inf),
    "tco.maintenance": (0, 10),
    "tco.space_per_month": (0, math.inf),
    "tco.staff": (0, math.inf),
    "tco.staff_per_year": (0, math.inf),
    "tco.redundancy": (0, 10),
    "tco.trainings": (0, math.inf),
    "tco.other_costs": (0, math.inf),
    "tco.api_input": (0, math.inf),
    "tco.api_output": (0, math.inf),
    "tco.api_cached": (0, math.inf),
    "tco.cache_share": (0, 1),
    "tco.input_per_output": (0, math.inf),
}
"""Dotted key -> smallest and largest value. Infinity and NaN are never allowed."""

ABOVE_ZERO: dict[str, float] = {
    "adapter.alpha": math.inf,
    "adapter.expert_alpha": math.inf,
    "train.epochs": math.inf,
    "train.lr": math.inf,
    "train.max_grad_norm": math.inf,
    "export.max_kl": math.inf,
    "export.max_single_kl": math.inf,
    "merge.tolerance": math.inf,
    "costs.device_gib": math.inf,
    "costs.device_tflops": math.inf,
    "costs.utilisation": 1.0,
    "tco.tokens_per_second": math.inf,
    "tco.utilisation": 1.0,
    "tco.years": 100.0,
    "tco.months": math.inf,
    "tco.tokens_per_month": math.inf,
}
"""Dotted key -> largest value, for settings that must be above zero."""

CHANGEABLE = ("base", "data", "world_size", "distribution", "precision", "seed", "settings", "versions")
"""What `train.allow_changed` may name."""

BELOW_ONE = ("adapter.dropout", "evaluate.confidence")
"""Settings from 0 up to, but not including, 1."""


def problems(recipe: Recipe) -> list[str]:
    """A sentence for every setting that cannot work: id, `key=value`, why, what to type. Empty when all is well."""
    rules = (
        *(_choices, _ranges, _names, _model, methods.problems, _train, _data, _trackers, _launch, _merge, _export),
        *(terms.problems, engine_problems, _evaluate, task_problems),
    )
    return [sentence for rule in rules for sentence in rule(recipe)]


def source_kind(source: str) -> Literal["none", "package", "hub", "folder"]:
    """What `model.source` is: a packaged file, a hub id (`org/name` that is no folder here), a folder, or nothing."""
    if not source:
        return "none"
    if source.startswith("package:"):
        return "package"
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        return "hub"
    return "folder"


def _settings(value: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, value) of every setting."""
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        if dataclasses.is_dataclass(inner):
            yield from _settings(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, inner


def _choices(recipe: Recipe) -> Iterator[str]:
    for key, f, value in _settings(recipe):
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            yield f"CHK-001 {key}={value} is not one of {', '.join(f.metadata['choices'])}. Choose one of them."


def _ranges(recipe: Recipe) -> Iterator[str]:
    for key, _, value in _settings(recipe):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"CHK-002 {key}={value} is not a finite number. Give a number."
        elif key in RANGES:
            low, high = RANGES[key]
            if value < low:
                yield f"CHK-002 {key}={value} must be at least {low:g}. Set {key}={low:g}."
            elif value > high:
                yield f"CHK-002 {key}={value} must be at most {high:g}. Set {key}={high:g}."
        elif key in ABOVE_ZERO and not 0 < value <= ABOVE_ZERO[key]:
            most = f" and at most {ABOVE_ZERO[key]:g}" if math.isfinite(ABOVE_ZERO[key]) else ""
            yield f"CHK-002 {key}={value} must be above 0{most}. Leave it out for the default."
        elif key in BELOW_ONE and not 0 <= value < 1:
            yield f"CHK-002 {key}={value} must be at least 0 and below 1. Leave it out for the default."


def _names(recipe: Recipe) -> Iterator[str]:
    if not NAME.fullmatch(recipe.name):
        what = f"name={recipe.name}" if recipe.name else "name is empty"
        yield f"CHK-003 {what}: the run folder is named after it. Choose recipe=NAME, or a name=my_job."
    if recipe.export.name and not NAME.fullmatch(recipe.export.name):
        yield f"CHK-003 export.name={recipe.export.name}: a model name has letters, digits, . _ - only. Change it."


def _model(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not model.family:
        yield "MOD-001 there is no base model. Choose a card with model=NAME, or a recipe=NAME that has one."
        return
    try:
        sizes.matrices(model)
    except RecipeError as error:
        yield from error.problems
    kind = source_kind(model.source)
    if kind == "hub" and recipe.network and not model.tiny and not re.fullmatch(r"[0-9a-f]{40}", model.revision):
        yield (
            f"MOD-004 model.revision={model.revision or '(empty)'} must be a commit of 40 hex digits to fetch "
            f"{model.source}: a branch moves. Copy it from the repository's history, or give a folder as model.source."
        )
    if kind == "package" and not PACKAGE.fullmatch(model.source):
        yield f"MOD-005 model.source={model.source} is not of the form package:NAME==VERSION/FILE. Mend it."
    if kind == "package" and not re.fullmatch(r"[0-9a-f]{64}", model.sha256):
        yield (
            f"MOD-006 model.sha256={model.sha256 or '(empty)'} must be the 64 hex digits of the package file's sha256. "
            "Type: sha256sum FILE"
        )
    if model.code != "refuse" and kind in ("hub", "package") and not model.tiny:
        yield (
            f"MOD-009 model.code={model.code} has no effect with {model.source}: code is not fetched. Leave it out, or "
            "give a folder as model.source."
        )
    if model.source.endswith(".gguf") and model.upcycle_experts == 0 and not model.tiny:
        yield (
            f"MOD-008 model.upcycle_experts=0 with {model.source}: a dense GGUF file is only made into a "
            "Mixture-of-Experts model here. Set model.upcycle_experts=4."
        )
    if 0 < model.upcycle_experts < model.upcycle_top_k:
        yield (
            f"MOD-007 model.upcycle_top_k={model.upcycle_top_k} is larger than "
            f"model.upcycle_experts={model.upcycle_experts}. Set model.upcycle_top_k={model.upcycle_experts}."
        )
    limit = model.config["max_position_embeddings"] if "max_position_embeddings" in model.config else 0
    if isinstance(limit, int) and 0 < limit < recipe.data.max_length and not model.tiny:
        yield (
            f"DAT-005 data.max_length={recipe.data.max_length} is more than the base can read. "
            f"Set data.max_length={limit}."
        )


def _train(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.adapter_of == "best" and not train.evaluate_steps:
        yield "TRN-007 train.adapter_of=best needs held-out losses. Set train.evaluate_steps=50, or leave it out."
    wrong = sorted(set(train.allow_changed) - set(CHANGEABLE))
    if wrong:
        yield f"LCH-003 train.allow_changed: {', '.join(wrong)} is none of {', '.join(CHANGEABLE)}. Choose of them."


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not data.card and not data.train_files:
        yield "DAT-001 there are no training rows. Choose a card with data=NAME, or give data.train_files=[my.jsonl]."
    for key, files in (("train_files", data.train_files), ("heldout_files", data.heldout_files)):
        for name in files:
            path = Path(name).expanduser()
            if ADDRESS.match(name):
                yield f"DAT-012 data.{key}: {name} is an address; rows are read from disk only. Give a file or folder."
            elif not path.exists() and not glob.glob(str(path), recursive=True):  # noqa: PTH207  # may be absolute
                yield f"DAT-002 data.{key}: {name} does not exist in {Path.cwd()}. Give the path of a file or folder."
    if data.train_files and not data.heldout_files and data.heldout_fraction == 0:
        yield "DAT-003 there are no held-out rows. Give data.heldout_files=[my.jsonl], or data.heldout_fraction=0.1."
    if not data.train_files and data.heldout_files:
        yield "DAT-003 a data card has its own held-out rows. Leave out data.heldout_files."
    paths = {Path(name).expanduser().resolve() for name in data.train_files}
    for name in data.heldout_files:
        if Path(name).expanduser().resolve() in paths:
            yield f"DAT-004 {name} is both trained on and held out: scores would mean nothing. Give different files."
    yield from _cleaning(data)
    if data.packing:
        try:
            family = sizes.family_of_card(recipe.model)
        except RecipeError:
            return  # said by _model
        if not family.packs:
            yield f"DAT-011 data.packing=true: rows of {family.key} would see each other. Set data.packing=false."


def _cleaning(data: Data) -> Iterator[str]:
    if data.mixture:
        for name in sorted(set(data.mixture) ^ set(data.train_files)):
            yield f"DAT-006 data.mixture and data.train_files differ in {name}. Give every file its share."
        if min(data.mixture.values()) <= 0 or abs(sum(data.mixture.values()) - 1) > 1e-6:
            total = sum(data.mixture.values())
            yield f"DAT-006 data.mixture adds up to {total:g}. Shares must be above 0 and add up to 1."
    for path, policy in data.benchmarks.items():
        if policy not in ("fail", "drop", "report"):
            yield f"DAT-007 data.benchmarks: {policy} is not one of fail, drop, report. Choose one of them."
        if not Path(path).expanduser().is_file():
            yield f"DAT-007 data.benchmarks: {path} does not exist. Make it: python -m finetune data index file=FILE"
    for code in data.languages:
        if not re.fullmatch(r"[a-z]{2}", code):
            yield f"DAT-008 data.languages: {code} is no ISO 639-1 code. Write it as en, de, fr."
    if data.time_by and data.heldout_files:
        yield "DAT-009 data.time_by has no effect beside data.heldout_files. Leave one of them out."
    if data.card:
        beside = {"format": "auto", "columns": {}, "mixture": {}, "group_by": "", "time_by": ""}
        for key, usual in beside.items():
            if getattr(data, key) != usual:
                yield f"DAT-010 data.{key} has no effect with a data card, which says it itself. Leave it out."
    if not data.card and data.excerpt_words:
        yield "DAT-010 data.excerpt_words has no effect without a data card. Leave it out."


def _evaluate(recipe: Recipe) -> Iterator[str]:
    yield from judging.problems(recipe.evaluate)
    for key in ("harmful_file", "benign_file"):
        name = getattr(recipe.evaluate, key)
        if name and not Path(name).expanduser().is_file():
            yield f"EVL-007 evaluate.{key}: {name} does not exist in {Path.cwd()}. Give the path of a file."


def _trackers(recipe: Recipe) -> Iterator[str]:
    for name in recipe.train.report_to:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            yield f"TRK-001 train.report_to: {name} is not one of {known}. Choose among them, or train.report_to=[]."


def _launch(recipe: Recipe) -> Iterator[str]:
    yield from sbatch.problems(recipe)
    if recipe.launch.nodes > 1 and recipe.launch.kind == "local":
        yield (
            f"LCH-009 launch.nodes={recipe.launch.nodes}: launch.kind=local starts processes on this machine only. "
            "Set launch=slurm, or launch.nodes=1."
        )
    yield from context.problems(recipe)


def _merge(recipe: Recipe) -> Iterator[str]:
    if recipe.merge.base == "original":
        return
    if not recipe.adapter.load_in_4bit:
        yield (
            "MRG-007 merge.base=dequantised has no effect with adapter.load_in_4bit=false: training sees the original "
            "weights. Leave it out."
        )
    elif recipe.engine == "unsloth":
        yield (
            "MRG-007 merge.base=dequantised with engine=unsloth: what it packed is not packed again here to the bit. "
            "Set merge.base=original."
        )


def _export(recipe: Recipe) -> Iterator[str]:
    export = recipe.export
    wrong = [name for name in export.formats if name not in EXPORT_FORMATS]
    if wrong or not export.formats:
        yield (
            f"EXP-001 export.formats=[{','.join(export.formats)}] must name some of {', '.join(EXPORT_FORMATS)}."
            f" Set export.formats=[{','.join(EXPORT_FORMATS[:2])}]."
        )
    for name, other in NEEDED_FORMATS.items():
        if name in export.formats and other not in export.formats:
            words = ",".join([*export.formats, other])
            yield f"EXP-002 export.formats: {name} starts what {other} is. Set export.formats=[{words}]."
    if unknown := [kind for kind in export.gguf if kind not in (*GGUF_TYPES, *GGUF_SMALL)]:
        known = ", ".join((*GGUF_TYPES, *GGUF_SMALL))
        yield f"EXP-003 export.gguf names {', '.join(unknown)}. Set export.gguf=[f16], or some of {known}."
    if "gguf" in export.formats and not export.gguf:
        yield "EXP-003 export.gguf=[] leaves the format gguf without a file. Set export.gguf=[f16]."
    if export.gguf_adapter and "peft_per_expert" not in export.formats:
        words = ",".join([*export.formats, "peft_per_expert"])
        yield f"EXP-002 export.gguf_adapter=true is made of peft_per_expert. Set export.formats=[{words}]."
    if recipe.model.family in FAMILIES:
        yield from _exported_family(recipe, FAMILIES[recipe.model.family])


def _shape(recipe: Recipe) -> Mapping[str, Any]:
    try:
        return sizes.shape_config(recipe.model)
    except RecipeError:  # another rule says so
        return {}


def _exported_family(recipe: Recipe, family: Family) -> Iterator[str]:
    """Formats that this family, or this adapter, cannot have."""
    export, tiny = recipe.export, recipe.model.tiny
    weights = "gguf" in export.formats or export.gguf_adapter
    if weights:
        why = family.no_gguf(_shape(recipe))
        why = why or (family.gguf_tiny if tiny else "")
        if why:
            yield f"EXP-004 export.formats: gguf cannot be of {family.key}: {why}. Leave it out."
    if export.gguf_adapter and family.no_gguf_adapter:
        yield f"EXP-005 export.gguf_adapter=true: {family.no_gguf_adapter}. Merge it: export.formats=[gguf]."
    if "peft_per_expert" in export.formats:
        why = family.no_served_adapter
        why = why or ("servers know no DoRA" if recipe.adapter.method == "dora" else "")
        why = why or ("no server takes an adapted router" if recipe.adapter.router else "")
        if why:
            yield f"EXP-006 export.formats: peft_per_expert: {why}. Leave it out; hf has the merged weights."
