"""A module that is also its own function: `finetune.plan` is a module, and `finetune.plan(recipe)` calls plan in it.

Python binds a submodule to its name in the package as soon as anybody imports it, so `from finetune import plan` would
give now the function, now the module. With this it gives the module, which is as good.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module whose call is a call of the function in it that has its name."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """What the function gives."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **settings)


def call_by_name(module: str) -> None:
    """From now on the module of this name, an imported one, can be called as the function in it that has its name."""
    # A documented way to give a module methods: Python's data model, "Customizing module attribute access".
    found: Any = sys.modules[module]
    found.__class__ = CallableModule
    found.__signature__ = inspect.signature(getattr(found, module.rpartition(".")[2]))  # what help and Shift-Tab show
