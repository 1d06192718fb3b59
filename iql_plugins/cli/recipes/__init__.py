"""How datasets are made again: each recipe is a seeded function of installed packages alone."""

from iql_plugins.cli.recipes import classic, locomotion, mazes
from iql_plugins.cli.recipes.recipe import Recipe

__all__ = ["RECIPES"]

#: By name.
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*classic.RECIPES, *mazes.RECIPES, *locomotion.RECIPES)}
