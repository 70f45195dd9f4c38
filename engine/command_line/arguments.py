"""The arguments of train.py, and what it does with them before any training."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.command_line.translation import options_of, refuse_unknown
from errors import ArgumentParser, UserError


def parse_train_arguments(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """The parsed arguments, `config` None where only overrides are given. UserError for flags of other projects."""
    parser = ArgumentParser("train.py", description)
    parser.add_argument("config", nargs="?", help="a YAML file; not needed with --resume")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the config")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="this key may differ when resuming"
    )
    parser.add_argument("--row", metavar="NAME", help="train this row of a study, in the folder of compare.py")
    parser.add_argument("--dry-run", action="store_true", help="print every loss term of one batch and exit")
    parser.add_argument("--init", metavar="FILE", type=Path, help="write a new config for the pictures in --data")
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="with --init: a set of pictures")
    parser.add_argument("--teacher", metavar="ARCH", help="with --init: a larger detector that is to teach the student")
    parser.add_argument("--keys", metavar="WORD", nargs="?", const="", help="print the keys of a config (all of them)")
    parser.add_argument("--list", action="store_true", help="print architectures, teachers and losses")
    known = options_of(parser)
    if "--init" not in argv:
        known = [option for option in known if option not in ("--data", "--teacher")]  # flags of other projects
    refuse_unknown("train.py", argv, known)
    arguments = parser.parse_intermixed_args(argv)
    source = arguments.config
    if source and "=" in source and not Path(source).exists():
        arguments.config, arguments.overrides = None, [source, *arguments.overrides]
    return arguments


def answer_at_once(arguments: argparse.Namespace) -> bool:
    """Print what --keys, --list or --init ask for; False where there is a config to train."""
    if arguments.keys is not None:
        from engine.command_line.keys import listing

        print(listing(arguments.keys))
    elif arguments.list:
        from engine.command_line import models_list

        print(models_list.listing())
    elif arguments.init is not None:
        from engine.command_line.first_config import write_first_config

        if arguments.data is None or arguments.config is not None:
            raise UserError("argument --init: expected --init FILE.yaml --data FOLDER [key=value ...]")
        write_first_config(arguments.init, arguments.data, arguments.overrides, arguments.teacher)
    else:
        return False
    return True
