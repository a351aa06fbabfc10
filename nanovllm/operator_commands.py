"""Commands for who runs a core for others: keys, watching it, and running a recording again.

`cli` adds them to its own.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from nanovllm.keys import make_keys
from nanovllm.watch.top.command import add_top_command

Run = Callable[[argparse.Namespace], int]


def add_operator_commands(add: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """add: makes a command of a name, a function and a line of help."""
    keys = add("keys", run_keys, "make keys that let clients reach a core over a network")
    keys.add_argument("what", choices=["new"])
    keys.add_argument("directory", type=Path, help="the core's: nanovllm-core --keys DIRECTORY")
    names_help = "one or more clients; each gets its file: --keys DIRECTORY/NAME.json"
    keys.add_argument("--client", nargs="+", default=["client"], metavar="NAME", help=names_help)

    rights_help = "those of the clients who may look at everybody's requests, as `top` does"
    keys.add_argument("--operator", nargs="+", default=[], metavar="NAME", help=rights_help)

    add_top_command(add)

    replay = add("replay", run_replay, "run a recorded core's scheduler again, and compare plans")
    replay.add_argument("file", type=Path, help="of nanovllm-core --record FILE; or FILE.old")
    replay.add_argument("--show", type=int, metavar="STEP", help="print the plan of this step")


def run_keys(arguments: argparse.Namespace) -> int:
    for path in make_keys(arguments.directory, arguments.client, arguments.operator):
        print(path)
    return 0


def run_replay(arguments: argparse.Namespace) -> int:
    from nanovllm.replay.replay import DivergedError, Replay

    num_steps = 0
    try:
        for plan in Replay(arguments.file):
            num_steps += 1
            if plan.step == arguments.show:
                print(plan)
    except DivergedError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{num_steps} steps planned as they were then")
    return 0
