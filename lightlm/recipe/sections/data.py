"""The section `data`: what to train on."""

from pydantic import Field

from lightlm.recipe.sections.section import Section


class DataSection(Section):
    dataset: str = Field(min_length=1)
    """Name of a folder under data/, or the path of a prepared folder."""
