"""Pages of HTML from templates. Names and prompts are anyone's text: nothing in them may become part of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def templates(package: str, folder: str = "", *others: str) -> Environment:
    """The templates in a folder of a package, and those of other packages that they import."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, folder), *(PackageLoader(other, "") for other in others)])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
