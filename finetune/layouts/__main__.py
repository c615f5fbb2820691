"""The command that makes an adapter folder a standard one: `python -m finetune.layouts FOLDER TARGET --from LAYOUT`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from finetune.failures import explain
from finetune.layouts import AdapterError, Layout, convert
from finetune.layouts.plain import read_adapter_config


def main(words: list[str] | None = None) -> int:
    """Converts a folder from the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.layouts", description="An adapter folder becomes a standard PEFT folder."
    )
    parser.add_argument("folder", type=Path, help="the adapter's folder")
    parser.add_argument("target", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--from", dest="layout", choices=get_args(Layout), required=True, help="its layout")
    parser.add_argument(
        "--base", type=Path, help="folder of its base, where adapter_config.json names none that is here"
    )
    given = parser.parse_args(words)
    try:
        base = given.base or Path(str(read_adapter_config(given.folder).get("base_model_name_or_path")))
        if not base.is_dir():
            what = f"the base {base} is not a folder here"
            raise AdapterError("ADP-015", what, "shapes of the base's weights are needed", "--base FOLDER_OF_THE_BASE")
        adapter = convert(given.folder, given.target, given.layout, base)
    except Exception as error:
        return explain(error, None)
    print(
        f"{given.target}: {len(adapter.updates)} pairs; {'; '.join(adapter.converted) or 'they were in order already'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
