"""How near each export of a finished run came, asked by its own client: the figures of export/clients.json.

    bash scripts/setup_serving.sh
    bash scripts/quickstart.sh export=servers export.parity_prompts=60
    .venv/bin/python scripts/bench_export.py runs/legal_quickstart/0001

Writes scripts/bench_results/export_<recipe>_<machine>.json and prints a line per export. Says nothing about speed: the
machine may be busy.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench_quickstart import RESULTS, machine

from finetune.compose import read_recipe
from finetune.rundir import open_run, read_json, write_json


def main(path: str) -> Path:
    """The file with the figures of the run at `path`. Raises RunError when it has no export."""
    run_dir = open_run(path)
    export = run_dir.require(run_dir.export, "export")
    record, recipe = read_json(run_dir.record), read_recipe(run_dir.recipe)
    told = read_json(export / "clients.json")
    figures = {
        "recipe": recipe.name,
        "prompts": recipe.export.parity_prompts,
        "parity": read_json(export / "parity.json"),
        "clients": told["clients"],
        "machine": machine(),
        "date": record["written"][:10],
        "versions": record["versions"],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    target = RESULTS / f"export_{recipe.name}_{slug}.json"
    write_json(target, figures)
    for client in told["clients"]:
        if client["asked"]:
            gap = client["mean_gap"]
            apart = "no log-probabilities" if gap is None else f"{gap:.5f} nats apart on {client['tokens']} tokens"
            print(
                f"{client['format']:24} {client['client']} {client['version']}: same first token "
                f"{client['same_first']:.1%} of {client['prompts']} ({client['ties']} ties), same text "
                f"{client['same_text']:.1%}, {apart}"
            )
        else:
            print(f"{client['format']:24} not asked: {client['why']}")
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.partition("\n")[2].strip())
    main(sys.argv[1])
