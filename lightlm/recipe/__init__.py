"""Recipes: YAML files that describe runs, their schema, and overrides such as `optimizer.lr=1e-3`."""

from lightlm.quantities.types import span_tokens
from lightlm.recipe.loading import (
    find_recipe,
    load_recipe,
    load_run_recipe,
    recipe_name,
    recipes_folder,
    shipped_recipes,
)
from lightlm.recipe.mistakes import parse_recipe
from lightlm.recipe.renamed import with_new_names
from lightlm.recipe.schema import Recipe, by_dotted_key
from lightlm.recipe.sections.checkpoint import CheckpointSection
from lightlm.recipe.sections.distill import STORED, DistillSection
from lightlm.recipe.sections.evaluation import EvalSection
from lightlm.recipe.sections.schedule import ScheduleSection
from lightlm.recipe.sections.section import NAME_PATTERN
from lightlm.recipe.sections.tracking import TrackingSection
from lightlm.recipe.sections.train import TrainSection
from lightlm.recipe.start import Start

__all__ = [
    "NAME_PATTERN",
    "STORED",
    "CheckpointSection",
    "DistillSection",
    "EvalSection",
    "Recipe",
    "ScheduleSection",
    "Start",
    "TrackingSection",
    "TrainSection",
    "by_dotted_key",
    "find_recipe",
    "load_recipe",
    "load_run_recipe",
    "parse_recipe",
    "recipe_name",
    "recipes_folder",
    "shipped_recipes",
    "span_tokens",
    "with_new_names",
]
