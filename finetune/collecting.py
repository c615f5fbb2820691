"""How often Python looks for garbage: seldom while libraries are imported, as usual once a model is in memory.

Imports make about a million objects, which stay; looking at them again and again takes a quarter of the processor time
of a rehearsal's training. Of a model, tensors may hang on objects that refer to each other and are to go soon.
"""

import gc

IMPORTS = 200_000
"""Objects that come and stay before they are looked at, while libraries are imported; else some hundreds."""

_USUAL = gc.get_threshold()


def seldom() -> None:
    """Until `as_usual`, garbage that refers to itself is looked for seldom. For processes that are this tool's own."""
    gc.set_threshold(IMPORTS, *_USUAL[1:])


def as_usual() -> None:
    """Ends `seldom`; without it, nothing. What there is now stays, and is not looked at again."""
    if gc.get_threshold()[0] == IMPORTS:
        gc.set_threshold(*_USUAL)
        gc.freeze()
