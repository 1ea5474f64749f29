"""``python -m bertops finetune``, ``distill`` and ``eval``: options by flags or from a YAML file."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from bertops.distill.settings import FinetuneSettings, Settings
from bertops.pretraining.command import CPU, FSDP, SEVERAL

SYSTEMS = ("bilstm", "distilbert", "fastbert", "minilm", "mobilebert", "pkd", "tinybert")
NEEDS = ("accelerate", "tqdm", "matplotlib", "tokenizers", "safetensors")
EVAL_NEEDS = ("tokenizers", "safetensors")
DATA = "folder with train.tsv, dev.tsv and labels.txt, or a data set of the hub such as glue/sst2"
TEACHER = "folder or hub id: on a task a fine-tuned classifier, on plain text a pretrained model"
TEXT = "in place of --data: a file or a folder of *.txt, a sentence a line, an empty line between documents"
OUT = "folder of the run; the same command goes on with it"


def add_finetune(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="a pretrained encoder, or some of its layers, learns a task from its labels",
        epilog=SEVERAL,
    )
    parser.add_argument("--model", default=argparse.SUPPRESS, help="folder or hub id of the encoder")
    add_run_options(parser, FinetuneSettings)
    parser.set_defaults(run=finetune)


def add_distill(commands: Any) -> None:
    parser = commands.add_parser(
        "distill",
        help="a small student learns a task, or plain text, from its teacher, by the recipe of a paper",
        epilog="python -m bertops distill SYSTEM --help lists a recipe's options on a task, "
        f"distill SYSTEM --text FILE --help those on plain text. {SEVERAL}",
    )
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the recipe")
    parser.set_defaults(run=distill)


def add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy, each class, latency and throughput of a classifier",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or hub id of a classifier")
    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--batch-size", type=int, default=32, help="texts of a batch")
    parser.add_argument("--max-length", type=int, default=128, help="longer texts are cut")
    parser.add_argument("--latency-texts", type=int, default=100, help="texts that run alone, for the median")
    parser.add_argument("--speed", type=float, help="of a FastBERT: entropy below which a text leaves")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(run=evaluate)


def add_run_options(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Flags of a run; those that are not given stay out of the namespace, for the file to say."""
    add_places(parser)
    add_settings(parser, settings)


def add_places(parser: argparse.ArgumentParser) -> None:
    unset: Any = argparse.SUPPRESS
    parser.add_argument("--data", default=unset, help=DATA)
    parser.add_argument("--out", default=unset, help=OUT)
    parser.add_argument("--config", metavar="FILE.yaml", type=Path, help="options by name; flags win")
    for flag, text in (("--cpu", CPU), ("--fsdp", FSDP), ("--quiet", "show no progress")):
        parser.add_argument(flag, action="store_true", default=unset, help=text)


def add_settings(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    unset: Any = argparse.SUPPRESS
    for entry in fields(settings):
        flag, text = (
            "--" + entry.name.replace("_", "-"),
            f"{entry.metadata['help']} (default: {entry.default})",
        )
        if isinstance(entry.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=unset, help=entry.metadata["help"])
        else:
            parser.add_argument(flag, type=type(entry.default), default=unset, help=text)


def finetune(options: argparse.Namespace) -> int:
    def start(given: dict[str, Any]) -> None:
        from bertops.distill.finetune import finetune
        from bertops.distill.work import Work

        settings = settings_of(FinetuneSettings, given, ("model", "data", "out"))
        with Work("finetune", given["model"], given["data"], given["out"], settings, **shown(given)) as work:
            finetune(work, settings)

    return attempt("finetune", NEEDS, lambda: start(given_options(options)))


def distill(options: argparse.Namespace) -> int:
    system = options.system

    def start() -> None:
        from bertops.distill.text import TextWork
        from bertops.distill.work import Work

        recipe = import_module(f"bertops.distill.recipes.{system}")
        places = argparse.ArgumentParser(add_help=False)
        places.add_argument("--teacher", default=argparse.SUPPRESS, help=TEACHER)
        places.add_argument("--text", default=argparse.SUPPRESS, help=TEXT)
        add_places(places)
        on_text = "text" in given_options(places.parse_known_args(options.options)[0])
        if on_text and not hasattr(recipe, "TextOptions"):
            raise ValueError(f"{system} learns a task, not plain text: give --data in place of --text")
        kind = recipe.TextOptions if on_text else recipe.Options
        description = (recipe.__doc__ or "").partition("\n")[0]
        parser = argparse.ArgumentParser(
            prog=f"python -m bertops distill {system}",
            description=description,
            epilog=SEVERAL,
            parents=[places],
        )
        add_settings(parser, kind)
        given = given_options(parser.parse_args(options.options))
        if ("data" in given) == on_text:
            came = "both" if on_text else "neither"
            raise ValueError(f"give --data, a task, or --text, plain text: one of them, got {came}")
        settings = settings_of(kind, given, ("teacher", "text" if on_text else "data", "out"))
        if on_text:
            with TextWork(
                system, given["teacher"], given["text"], given["out"], settings, **shown(given)
            ) as work:
                recipe.distill_text(work, settings)
        else:
            with Work(
                system, given["teacher"], given["data"], given["out"], settings, **shown(given)
            ) as work:
                recipe.distill(work, settings)

    return attempt(f"distill {system}", NEEDS, start)


def evaluate(options: argparse.Namespace) -> int:
    def start() -> None:
        from bertops.distill.evaluate import evaluate

        found = evaluate(
            options.model,
            options.data,
            batch_size=options.batch_size,
            max_length=options.max_length,
            latency_texts=options.latency_texts,
            speed=options.speed,
            device=options.device,
        )
        print(json.dumps(found, indent=2) if options.json else table(found))

    return attempt("eval", EVAL_NEEDS, start)


def attempt(command: str, needs: tuple[str, ...], start: Callable[[], None]) -> int:
    """The exit status: 0 finished, 1 stopped by a signal, 2 an error, which it says."""
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        print(f"{command} needs {', '.join(missing)}: pip install bertops[train]", file=sys.stderr)
        return 2
    from bertops.distill.stopped import Stopped

    try:
        start()
    except Stopped as stopped:
        print(f"{command}: {stopped}", file=sys.stderr)
        return 1
    except (OSError, ValueError, TypeError, ImportError, NotImplementedError, FloatingPointError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    return 0


def given_options(flags: argparse.Namespace) -> dict[str, Any]:
    """What the file says, and what the flags say in its place."""
    given = {} if flags.config is None else read_yaml(flags.config)
    return {**given, **vars(flags)}


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError where the file holds no options; says what is wrong."""
    import yaml  # comes with accelerate

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must hold options by name, such as 'batch_size: 32'")
    return {key.replace("-", "_"): value for key, value in content.items()}


def settings_of(kind: type[Settings], given: dict[str, Any], places: tuple[str, ...]) -> Any:
    """Raises ValueError where one of ``places`` is not given, or an option is unknown; names it."""
    missing = [name for name in places if given.get(name) is None]
    if missing:
        raise ValueError(f"--{missing[0]} must be given, as a flag or in the file of --config")
    names = {entry.name for entry in fields(kind)}
    unknown = sorted(given.keys() - names - {*places, "cpu", "fsdp", "quiet", "command", "run", "config"})
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; there are {', '.join(sorted(names))}")
    return kind(**{name: value for name, value in given.items() if name in names})


def shown(given: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(given.get(name, False)) for name in ("cpu", "fsdp", "quiet")}


def table(found: dict[str, Any]) -> str:
    lines = [
        f"accuracy    {found['accuracy']:.4f} on {found['texts']:,} texts",
        f"parameters  {found['parameters']:,}",
        f"latency     {found['latency_ms']:.2f} ms, the median of one text alone",
        f"throughput  {found['texts_per_second']:.1f} texts a second",
        "",
        f"{'class':16} {'precision':>9} {'recall':>9} {'f1':>9} {'texts':>9}",
    ]
    for label, row in found["classes"].items():
        numbers = " ".join(f"{row[name]:9.4f}" for name in ("precision", "recall", "f1"))
        lines.append(f"{label:16} {numbers} {row['texts']:9,}")
    return "\n".join(lines)
