"""What a chat template may be made of: `syntax_problems(source)` reads it as a program, without running it.

transformers runs templates in Jinja's sandbox, which bounds what they reach, not what they use: no time, no memory.
Here everything is refused that no published template of a supported family needs and that reaches for Python's
insides, for files, or for sizes: a list of what is allowed, not of what is known to be bad. (Jinja sandbox escapes so
far: CVE-2016-10745, CVE-2019-10906, CVE-2024-56326, CVE-2025-27516, by way of `format`, `map` and `attr`.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SOURCE_LIMIT = 1_000_000
"""Characters of a template, at most. The longest published one of TRL's collection has 18,000."""

LARGEST = 100_000
"""The largest number in a template."""

STATEMENTS = {
    *("Template", "Output", "TemplateData", "For", "If", "Assign", "AssignBlock", "Macro", "CallBlock", "FilterBlock"),
    *("Break", "Continue", "With", "Scope", "ScopedEvalContextModifier", "EvalContextModifier"),
}
EXPRESSIONS = {
    *(
        "Name",
        "NSRef",
        "Const",
        "TemplateData",
        "List",
        "Dict",
        "Tuple",
        "Pair",
        "Keyword",
        "Slice",
        "Concat",
        "Compare",
    ),
    *("Operand", "CondExpr", "Filter", "Test", "Call", "Getitem", "Getattr", "And", "Or", "Not", "Add", "Sub", "Div"),
    *("FloorDiv", "Mod", "Neg", "Pos", "ContextReference", "ExtensionAttribute", "EnvironmentAttribute"),
}
"""Parts of a template that it may have. Not among them: import, from, include, extends, block, `*`, `**`."""

FILTERS = {
    *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
    *("indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
    *(
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "slice",
        "sort",
        "string",
        "sum",
        "title",
        "tojson",
    ),
    *("trim", "truncate", "unique", "upper", "wordcount"),
}
"""Filters that a template may use. Not among them: attr, format, center, pprint, random, xmlattr."""

ATTRIBUTE_FILTERS = {"map", "selectattr", "rejectattr", "groupby", "sort", "sum", "max", "min", "unique", "dictsort"}
"""Filters that may be told an attribute: it must stand there as a plain word."""

METHODS = {"format_map", "ljust", "rjust", "center", "zfill", "expandtabs", "encode", "translate", "mro"}
"""Methods of texts that make much out of little, or reach further."""


def syntax_problems(source: str) -> list[str]:
    """A phrase for everything in a template that it may not have; empty when it may be tried out."""
    import jinja2

    if len(source) > SOURCE_LIMIT:
        return [f"it has {len(source):,} characters, of at most {SOURCE_LIMIT:,}"]
    try:
        tree = _environment().parse(source)
        return list(dict.fromkeys(_problems(tree)))
    except jinja2.TemplateError as error:
        return [f"it is no Jinja template: {str(error).splitlines()[0]}"]
    except RecursionError:
        return ["it is nested too deeply"]


def _problems(tree: Any) -> Iterator[str]:
    from jinja2 import nodes

    for node in tree.find_all(nodes.Node):
        kind, line = type(node).__name__, getattr(node, "lineno", 0)
        if kind not in STATEMENTS | EXPRESSIONS:
            yield f"line {line}: {kind.lower()} is not allowed"
        elif isinstance(node, nodes.Getattr):
            if node.attr.startswith("_") or node.attr in METHODS:
                yield f"line {line}: .{node.attr[:40]} is not allowed"
            elif node.attr == "format" and not _plain_format(node.node):
                yield f"line {line}: .format is only allowed of a text that stands there, without widths"
        elif isinstance(node, nodes.Name | nodes.NSRef):
            if "__" in node.name:
                yield f"line {line}: the name {node.name[:40]} is not allowed"
        elif isinstance(node, nodes.Const):
            yield from _constant(node.value, line)
        elif isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Concat | nodes.Add) and _of_words(node.arg):
                yield f"line {line}: a key that is put together is not allowed"
        elif isinstance(node, nodes.Filter):
            if node.name not in FILTERS:
                yield f"line {line}: the filter {node.name[:40]} is not allowed"
            elif node.name in ATTRIBUTE_FILTERS:
                words = [*node.args, *(keyword.value for keyword in node.kwargs)]
                if not all(isinstance(word, nodes.Const | nodes.Name) for word in words):
                    yield f"line {line}: the filter {node.name} takes plain words only"
                yield from _inner_filters(node, words, line)


def _inner_filters(node: Any, words: list[Any], line: int) -> Iterator[str]:
    """`map("attr", ...)` uses a filter by its name."""
    from jinja2 import nodes

    if node.name == "map" and node.args:
        first = words[0]
        if not isinstance(first, nodes.Const) or first.value not in FILTERS:
            yield f"line {line}: map takes the name of a filter that is allowed"


def _constant(value: Any, line: int) -> Iterator[str]:
    if isinstance(value, str) and re.search(r"__[a-z]\w*__", value):
        yield f"line {line}: the word {value[:40]!r} is not allowed"
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGEST:
        yield f"line {line}: the number {value} is larger than {LARGEST:,}"


def _of_words(node: Any) -> bool:
    """Whether texts that stand there are put together."""
    from jinja2 import nodes

    return any(isinstance(inner.value, str) for inner in node.find_all(nodes.Const))


def _plain_format(node: Any) -> bool:
    """Whether a text stands there whose places have no names, widths or attributes: `"<{}>"`."""
    from jinja2 import nodes

    return isinstance(node, nodes.Const) and not re.search(r"\{[^{}]+\}|%\d", str(node.value))


def _environment() -> Any:
    """Jinja as transformers sets it up, as far as reading goes; `generation` is its tag around answers."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  # as Jinja's own extensions have it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_support"), [], [], body).set_lineno(line)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
