"""Keys of a checkpoint -> the parameters that transformers makes of them: `Renamer`."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.base import read_config


class Renamer:
    """The names of one base folder, by transformers' own tables."""

    def __init__(self, base: Path) -> None:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.family, config = read_config(base)
        self.model_type = config.model_type
        with torch.device("meta"):
            model = getattr(transformers, self.family.auto_class).from_config(config)
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.state = model.state_dict()
        self.skeleton = model
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        """Parameter -> the parameter whose numbers it shares."""

    def is_transposed(self, name: str) -> bool:
        """Whether the module of a stack says that its stacks are (E, in, out); PEFT goes by this mark alone."""
        return bool(getattr(self.skeleton.get_submodule(name.rpartition(".")[0]), "is_transposed", False))

    def runtime(self, key: str) -> tuple[str, str | None]:
        """(parameter name, source pattern of the converter or None) of a checkpoint key."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if renamed not in self.state and key in self.state:
            return key, None
        return renamed, pattern

    def part(self, pattern: str | None) -> tuple[int, int] | None:
        """(index, count) of a source pattern among those its converter joins; None for a tensor kept as it is."""
        if pattern is None:
            return None
        converter = next(entry for entry in self.converters if pattern in entry.source_patterns)
        return converter.source_patterns.index(pattern), len(converter.source_patterns)
