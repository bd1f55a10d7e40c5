"""The offline preference objectives as one algebra of five slots; see `recipe.Recipe` for the slots."""

from invdpo.objectives.loss import LossOutput, preference_loss
from invdpo.objectives.recipe import Recipe, load_recipe, make_recipe
from invdpo.objectives.streaming import backward

__all__ = ["LossOutput", "Recipe", "backward", "load_recipe", "make_recipe", "preference_loss"]
