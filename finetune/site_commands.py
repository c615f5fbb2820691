"""What the verbs around a site without a network do: fetch, bundle, bundle verify, sbom, audit."""

from __future__ import annotations

from pathlib import Path

from finetune.commands import Request, recipe_of
from finetune.errors import RecipeError

PACK = "recipe=NAME out=FOLDER or out=FILE.tar [network=true] [bundle.wheels=false] [bundle.lock=FILE]"


def fetch(request: Request) -> int:
    """Brings what a job needs into the cache, and prepares and trains nothing."""
    from finetune.fetch import cache_folder
    from finetune.outside import bring

    recipe = recipe_of(request)
    for what, path in bring(recipe).items():
        print(f"{what}: {path}")
    print(f"cache: {cache_folder(recipe)}", flush=True)
    return 0


def bundle(request: Request) -> int:
    """Packs what a site without a network needs for a recipe."""
    from finetune.bundle.pack import pack

    own = _taken(request, ("out", "bundle.wheels", "bundle.lock"))
    wheels = own["bundle.wheels"] if "bundle.wheels" in own else "true"
    if not own.get("out") or wheels not in ("true", "false") or request.run:
        raise RecipeError([f"CFG-010 bundle takes a recipe and a place. Type: python -m finetune bundle {PACK}"])
    lock = Path(own["bundle.lock"]).expanduser() if "bundle.lock" in own else None
    if lock and not lock.is_file():
        raise RecipeError([f"CFG-010 bundle.lock={lock} is not a file. Type: python -m finetune bundle {PACK}"])
    out = Path(own["out"]).expanduser()
    manifest, sha256 = pack(recipe_of(request), out, _print, wheels=wheels == "true", lock=lock)
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    print(f"{out}: {len(manifest['files'])} files, {size / 2**20:,.1f} MiB; INSTALL.txt in it says what to type there")
    print(f"sha256 of its bundle.json, to be told apart from it: {sha256}", flush=True)
    return 0


def bundle_verify(request: Request) -> int:
    """Says whether a bundle is what was packed. Imports nothing but the standard library and this package."""
    from finetune.bundle.verify import verify

    own = _taken(request, ("path",))
    if list(own) != ["path"] or not own["path"] or request.settings or request.run:
        raise RecipeError(["CFG-010 bundle verify takes one path. Type: python -m finetune bundle verify PATH"])
    manifest = verify(Path(own["path"]).expanduser())
    print(f"{len(manifest['files'])} files are as they were packed for {manifest['recipe']} on {manifest['packed']}")
    return 0


def sbom(request: Request) -> int:
    """Writes the bill of materials of this environment and says what is known of its licences."""
    from finetune import __version__
    from finetune.rundir import write_json
    from finetune.sbom import UNKNOWN, bom, copyleft, licences

    own = _taken(request, ("out",))
    if list(own) != ["out"] or not own["out"] or request.settings or request.run:
        raise RecipeError(["CFG-010 sbom takes one file. Type: python -m finetune sbom out=sbom.json"])
    out, found = Path(own["out"]).expanduser().absolute(), licences()
    write_json(out, bom(__version__))
    for name, licence in found.items():
        if licence == UNKNOWN or copyleft(licence):
            print(f"  {name}: {licence}{' (copyleft)' if copyleft(licence) else ''}")
    strange = sum(licence == UNKNOWN for licence in found.values())
    asking = sum(copyleft(licence) for licence in found.values())
    print(
        f"{len(found)} packages in {out}: {strange} with an unknown licence, {asking} with a copyleft one", flush=True
    )
    return 0


def audit(request: Request) -> int:
    """Looks for the installed packages in local security advisories. 3 when there is one that is not ignored."""
    from finetune.advisories import audit as look

    usage = "Type: python -m finetune audit advisories=FILE.json (or a folder, or a zip) [ignore=ID,ID]"
    own = _taken(request, ("advisories", "ignore"))
    if not own.get("advisories") or request.settings or request.run:
        raise RecipeError([f"CFG-010 audit takes a file of advisories. {usage}"])
    found = look(Path(own["advisories"]).expanduser())
    ignored = set(own["ignore"].split(",")) if "ignore" in own else set()
    counted = [finding for finding in found.findings if not ignored & set(finding.names)]
    for finding in counted:
        print(finding.sentence())
    passed = len(found.findings) - len(counted)
    against = (
        f"{found.packages} packages against {found.advisories} advisories, the newest of {found.newest or 'no date'}"
    )
    print(f"{against}: {len(counted)} findings" + (f", {passed} ignored" if passed else ""), flush=True)
    return 3 if counted else 0


def _taken(request: Request, names: tuple[str, ...]) -> dict[str, str]:
    """The words of a verb's own among the settings, taken out."""
    pairs = [word.partition("=") for word in request.settings]
    request.settings = [key + sign + value for key, sign, value in pairs if key not in names]
    return {key: value for key, _, value in pairs if key in names}


def _print(text: str) -> None:
    print(text, flush=True)
