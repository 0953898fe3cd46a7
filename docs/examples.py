"""An extension of griffe: the section `Example` of a docstring is shown as code, as its section `Examples` is."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it in one."""
        if obj.docstring:
            obj.docstring.value = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.MULTILINE)
