"""What the verbs around a site without a network do: fetch, bundle, bundle verify, sbom, audit."""

from __future__ import annotations

from finetune.commands import Request, recipe_of


def fetch(request: Request) -> int:
    """Brings what a job needs into the cache, and prepares and trains nothing."""
    from finetune.fetch import cache_folder
    from finetune.outside import bring

    recipe = recipe_of(request)
    for what, path in bring(recipe).items():
        print(f"{what}: {path}")
    print(f"cache: {cache_folder(recipe)}", flush=True)
    return 0
