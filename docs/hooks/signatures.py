"""Signatures in the API reference as the source writes them: shapes are comments there."""

import ast
import textwrap
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Puts the source of a function's signature before its docstring."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        source = textwrap.dedent(func.source)
        if not source or func.name.startswith("_"):
            return
        body = ast.parse(source).body[0].body[0]  # type: ignore[attr-defined]
        shown = source.splitlines()[: max(body.lineno - 1, 1)]
        text = "\n".join(["```python", *shown, "```", "", ""])
        if func.docstring is None:
            func.docstring = griffe.Docstring(text, parent=func)
        else:
            func.docstring.value = text + func.docstring.value
