"""For mkdocstrings: the comment behind a field of a dataclass becomes its text in the API reference."""

from __future__ import annotations

from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives each field without a docstring the comment behind it."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called by griffe for each attribute that it finds."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class and attr.endlineno:
            line = attr.lines_collection[attr.filepath][attr.endlineno - 1]
            _, has_comment, comment = line.partition("  # ")
            if has_comment:
                text = f"{comment[:1].upper()}{comment[1:].rstrip('.')}."
                attr.docstring = griffe.Docstring(text, parent=attr)
