"""What a job needs, takes and costs, before anything is downloaded: `plan(recipe)`. Arithmetic only, no torch.

Every figure says whether it was given (in the recipe or its model card), is computed from given ones, rests on an
assumption, or was measured: by `plan probe=3`, by this machine's GPUs about themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import memory, sizes, terms
from finetune.callable_module import call_by_name
from finetune.cost import Probe, cost
from finetune.disk import disk
from finetune.errors import RunError
from finetune.figure import Figure, computed
from finetune.gpus import Gpu, compared
from finetune.host import host
from finetune.licences import find_licence
from finetune.recipe import Recipe
from finetune.rundir import read_json
from finetune.views import Cell, Panel, Table
from finetune.work import heldout_rows, longest_row, work

NODE = 8
"""Devices of one machine that a sentence about several machines assumes."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan:
    """What a job is expected to need, shown as tables. `plan.json` of a run folder holds `Plan.as_json()`."""

    recipe: str
    """Name of the recipe."""
    scale: str
    """`full`, or `rehearsal` for a tiny random model."""
    model: str
    """Title of the base."""
    note: str
    """What a user must know before using this base."""
    facts: str
    """Where and when the facts about the base were read."""
    licence: str
    """Licence of the base, and whether it allows commercial use."""
    duties: tuple[str, ...]
    """What the licence asks for, and what it depends on that was not said."""
    parameters: tuple[Figure, ...]
    """Parameters of the base, per token, and of the adapter."""
    memory: tuple[Figure, ...]
    """Memory of one device, by part; the last is the sum."""
    ways: tuple[Figure, ...]
    """Activations with and without checkpointing, and how many layers would recompute theirs."""
    host: tuple[Figure, ...]
    """Memory of one machine's host, by part."""
    here: tuple[Figure, ...]
    """Memory of this machine's GPUs; empty where none was looked for or found."""
    disk: tuple[Figure, ...]
    """What is written, and where."""
    work: tuple[Figure, ...]
    """Rows, tokens, steps, FLOPs."""
    cost: tuple[Figure, ...]
    """Hours, energy, money."""
    fits: bool
    """Whether the memory is enough."""
    change: tuple[str, ...]
    """The smallest change of settings that makes it fit; empty when it fits, or when none does."""
    verdict: str
    """The same in a sentence."""

    def figure(self, name: str) -> Figure:
        """The figure of this name. Raises KeyError when there is none."""
        for group in self.groups().values():
            for figure in group:
                if figure.name == name:
                    return figure
        raise KeyError(name)

    def groups(self) -> dict[str, tuple[Figure, ...]]:
        """All figures, by a title for each group."""
        return {
            "parameters": self.parameters,
            "memory of one device while training": self.memory,
            "activations, with and without checkpointing": self.ways,
            "memory of the host": self.host,
            "GPUs of this machine": self.here,
            "disk": self.disk,
            "work": self.work,
            "time and money": self.cost,
        }

    def as_json(self) -> dict[str, Any]:
        """The plan as plain dicts, lists and numbers."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        return plain

    def as_rows(self) -> list[dict[str, Cell]]:
        """A dict per figure: group, name, value, unit, basis, and where it comes from."""
        groups = self.groups().items()
        return [{"group": name} | dataclasses.asdict(figure) for name, group in groups for figure in group]

    def __repr__(self) -> str:
        return repr(self._panel())

    def _repr_html_(self) -> str:
        return self._panel()._repr_html_()

    def _panel(self) -> Panel:
        said = [("recipe", f"{self.recipe} ({self.scale})"), ("base", self.model), ("note", self.note)]
        said += [("licence", self.licence), ("duties", "\n".join(self.duties)), ("facts", self.facts)]
        head = Table("", ("what", "it is"), tuple(row for row in said if row[1]))
        columns = ("figure", "value", "unit", "basis", "how")
        tables = [
            Table(name, columns, tuple((f.name, f.value, f.unit, f.basis, f.how) for f in group))
            for name, group in self.groups().items()
            if group
        ]
        return Panel(sentence=self.verdict, tables=(head, *tables))


def plan(recipe: Recipe, *, prepared: Path | None = None, probe: Probe | None = None, gpus: Sequence[Gpu] = ()) -> Plan:
    """The plan of a recipe.

    `prepared` is the data folder of a run: rows and tokens are then counted, not assumed, and memory is that of its
    longest row. With `probe` hours rest on what steps took here; `gpus` are compared with what a device needs. Raises
    RecipeError when the model card cannot be computed with, and DataError for a data card that is none.
    """
    model, licence = recipe.model, find_licence(recipe.model.licence)
    effort = work(recipe, prepared)
    fitted = replace(recipe, data=replace(recipe.data, max_length=longest_row(recipe, prepared)))
    parts = memory.memory(fitted)
    need = sum(part.value for part in parts)
    change = tuple(memory.smallest_change(fitted))
    under = f"{licence.title}; commercial use: {licence.commercial}" if licence else model.licence or "not stated"
    return Plan(
        recipe=recipe.name,
        scale=recipe.scale,
        model=f"a tiny random model of the family {model.family}" if model.tiny else model.title or model.name,
        note=model.note,
        facts=f"{model.facts_source} ({model.facts_date})" if model.facts_source else "not stated",
        licence=under,
        duties=(
            *(licence.duties if licence else ("Read the licence: its duties are not known here.",)),
            *terms.open_questions(recipe),
        ),
        parameters=_parameters(recipe),
        memory=(*parts, computed("memory", need, "GiB", "sum of the parts above")),
        ways=memory.with_and_without_recomputing(fitted),
        host=host(recipe),
        here=compared(gpus, need),
        disk=disk(recipe),
        work=effort,
        cost=cost(recipe, effort, heldout_rows(recipe, prepared), effort[1], probe),
        fits=need <= recipe.costs.device_gib,
        change=change,
        verdict=_verdict(recipe, need, change),
    )


def read_plan(path: Path) -> Plan:
    """The plan in a run folder's plan.json. Raises RunError when another version has written it."""
    values = read_json(path)
    if set(values) != {f.name for f in dataclasses.fields(Plan)}:
        what, why = f"{path} is not a plan that this version can read", "another version has written it"
        raise RunError("RUN-010", what, why, "plan(recipe) makes one anew")
    read: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            read[name] = tuple(Figure(**entry) if isinstance(entry, dict) else entry for entry in value)
        else:
            read[name] = value
    return Plan(**read)


def run_folder_gib(figures: Plan) -> float:
    """What the run folder will hold, in GiB."""
    return sum(figure.value for figure in figures.disk if figure.name not in ("download", "cache"))


def cache_gib(figures: Plan) -> float:
    """What the cache will hold, in GiB."""
    return figures.figure("cache").value


def _parameters(recipe: Recipe) -> tuple[Figure, ...]:
    weights, family = sizes.matrices(recipe.model), sizes.family_of_card(recipe.model)
    total, active = sizes.total_parameters(weights), sizes.active_parameters(weights)
    routed = sum(m.parameters for m in weights if m.group == "routed")
    trainable = sizes.trained_parameters(weights, family, recipe.adapter)
    how = ("2 x " if sizes.width(recipe.adapter) == 2 else "") + "rank x (in + out)"
    how += " + out" if recipe.adapter.method == "dora" else ""
    how += " per map and expert"
    if recipe.adapter.method == "full":
        how = f"every weight of {', '.join(sizes.WHOLE[recipe.adapter.targets])}"
    return (
        computed("parameters", total, "", "every weight of the text part, from its published shapes"),
        computed("in routed experts", routed, "", f"{routed / total:.1%} of all"),
        computed(
            "active per token", active, "", "what one token is multiplied with: the head counts, the lookup does not"
        ),
        computed("trainable", trainable, "", f"{how}; {trainable / total:.2%} of all"),
    )


def _verdict(recipe: Recipe, need: float, change: tuple[str, ...]) -> str:
    device, limit = recipe.costs.device, recipe.costs.device_gib
    on = f"each of {share} devices" if (share := memory.shards(recipe)) > 1 else "one device"
    of = f"{need:,.1f} GiB of {limit:,.1f} GiB on {'each' if share > 1 else 'one'} {device}"
    if need <= limit:
        return f"Fits: {of}."
    if change:
        return f"Does not fit: {of}. It fits with {' '.join(change)}."
    count = memory.devices_that_fit(recipe)
    nodes, devices = (count // NODE, NODE) if count > NODE else (1, count)
    where = f"launch=slurm launch.distribution=fsdp2 launch.nodes={nodes}" if nodes > 1 else "launch=fsdp2"
    way = f"it fits with {where} launch.devices={devices}" if count else "more devices do not help"
    return f"Does not fit: {of}, and no setting for {on} changes that; {way}. scale=rehearsal runs it on a tiny model."


call_by_name(__name__)  # so that `from finetune import plan` may give the module or the function
