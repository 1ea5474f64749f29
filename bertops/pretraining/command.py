"""``python -m bertops pretrain``: a RoBERTa or an ALBERT from scratch, on any text."""

import argparse
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertops.pretraining.settings import AlbertSettings, RobertaSettings, Settings

if TYPE_CHECKING:
    from bertops.training import Outcome

NEEDS = ("accelerate", "tqdm", "matplotlib", "tokenizers", "safetensors")
CPU = "stay on the CPU where there is a GPU"
FSDP = "shard what is trained over the processes (fully sharded data parallel)"
SEVERAL = (
    "Several processes: torchrun --nproc-per-node 2 -m bertops ..., or on GPUs accelerate launch "
    "--num_processes 2 -m bertops ...; the batch size is that of one process."
)
SETTINGS: dict[str, type[Settings]] = {"roberta": RobertaSettings, "albert": AlbertSettings}


def add_pretrain(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain", help="a small RoBERTa or ALBERT from scratch, on any text: checkpoints, curves, model"
    )
    recipes = parser.add_subparsers(dest="recipe", required=True)
    for name, settings in SETTINGS.items():
        recipe = recipes.add_parser(name, help=f"a small {name} from scratch", epilog=SEVERAL)
        recipe.add_argument(
            "--text",
            required=True,
            help="a file, or a folder of *.txt: one sentence a line, an empty line between documents",
        )
        recipe.add_argument(
            "--out", type=Path, required=True, help="folder of the run; the same command goes on with it"
        )
        recipe.add_argument(
            "--data", type=Path, help="folder of the split, tokenizer and token ids (default: data in --out)"
        )
        recipe.add_argument("--cpu", action="store_true", help=CPU)
        recipe.add_argument("--fsdp", action="store_true", help=FSDP)
        for field in fields(settings):
            add_setting(recipe, field.name, field.default, field.metadata["help"])
        recipe.set_defaults(run=run_pretrain)


def add_setting(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=text)
    else:
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")


def run_pretrain(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 finished, 1 stopped by a signal, 2 not started."""
    missing = [package for package in NEEDS if find_spec(package) is None]
    if missing:
        print(f"pretrain needs {', '.join(missing)}: pip install bertops[train]", file=sys.stderr)
        return 2
    kind = SETTINGS[options.recipe]
    try:
        settings = kind(**{field.name: getattr(options, field.name) for field in fields(kind)})
        outcome = run(settings, options)
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


def run(settings: Settings, options: argparse.Namespace) -> "Outcome":
    # here and not above: the command line works without these packages
    from bertops.pretraining.albert import Albert
    from bertops.pretraining.recipe import Recipe, pretrain
    from bertops.pretraining.roberta import Roberta

    recipes: dict[str, type[Recipe]] = {"roberta": Roberta, "albert": Albert}
    recipe = recipes[options.recipe](settings)
    processes = {"cpu": options.cpu, "fsdp": options.fsdp}
    return pretrain(recipe, options.text, options.out, data=options.data, **processes)
