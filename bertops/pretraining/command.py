"""``python -m bertops pretrain``: a RoBERTa or an ALBERT from scratch, on any text."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertops.pretraining.settings import AlbertSettings, RobertaSettings, Settings

if TYPE_CHECKING:
    from bertops.training import Outcome

NEEDS = ("accelerate", "tqdm", "matplotlib", "tokenizers", "safetensors")
RECIPES: dict[str, type[Settings]] = {"roberta": RobertaSettings, "albert": AlbertSettings}


def add_pretrain(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain", help="a small RoBERTa or ALBERT from scratch, on any text: checkpoints, curves, model"
    )
    recipes = parser.add_subparsers(dest="recipe", required=True)
    for name, settings in RECIPES.items():
        recipe = recipes.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        recipe.add_argument(
            "--text",
            required=True,
            help="a file, or a folder of *.txt: one sentence a line, an empty line between documents",
        )
        recipe.add_argument(
            "--out", type=Path, required=True, help="folder of the run; the same command goes on with it"
        )
        recipe.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
        for field in fields(settings):
            add_setting(recipe, field.name, field.default, field.metadata["help"])
        recipe.set_defaults(run=pretrain)


def add_setting(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=text)
    else:
        parser.add_argument(flag, type=type(default), default=default, help=text)


def pretrain(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 finished, 1 stopped by a signal, 2 not started."""
    missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        print(f"pretrain needs {', '.join(missing)}: pip install bertops[train]", file=sys.stderr)
        return 2
    kind, recipe = RECIPES[options.recipe], load(options.recipe)
    try:
        settings = kind(**{field.name: getattr(options, field.name) for field in fields(kind)})
        outcome = recipe(options.text, options.out, settings, cpu=options.cpu)
    except (OSError, ValueError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    if not outcome.finished:
        print(
            f"stopped after step {outcome.step} of {settings.steps}: the same command goes on",
            file=sys.stderr,
        )
        return 1
    print(f"{options.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in outcome.evaluation.items()))
    return 0


def load(name: str) -> Callable[..., "Outcome"]:
    """The recipe, which needs packages that the command line does not."""
    if name == "roberta":
        from bertops.pretraining.roberta import pretrain_roberta

        return pretrain_roberta
    from bertops.pretraining.albert import pretrain_albert

    return pretrain_albert
