"""The command ``resnet-fused``: calls the module of a subcommand, turns errors into a line and a status."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

#  subcommand -> module with ``main(argv)``, what it does. A module is imported only when its command is
# called.
COMMANDS = {
    "doctor": ("resnet_fused.doctor", "tell what is installed, what was built and what this machine can run"),
    "demo": ("resnet_fused.training.demo", "train a small net with plain and with fused units, side by side"),
    "train": ("resnet_fused.training.train", "train a net on digits, CIFAR-10 or CIFAR-100"),
    "eval": ("resnet_fused.training.evaluate", "evaluate a checkpoint"),
    "reproduce": (
        "resnet_fused.training.reproduce.command",
        "train rows of the papers' tables and report on them",
    ),
    "explain": ("resnet_fused.analysis.explain", "tell what fuse(model) does with a net, and why not more"),
    "verify": ("resnet_fused.analysis.verify", "compare a net, fused, with itself and with float64"),
    "analyze": ("resnet_fused.analysis.analyze", "measure signals and gradients by depth in residual nets"),
    "bench": ("resnet_fused.analysis.bench", "measure training steps against their bare convolutions"),
}


def _usage() -> str:
    lines = [f"  {name:9} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: resnet-fused COMMAND [OPTION ...]",
            "",
            *lines,
            "",
            "resnet-fused COMMAND --help lists the options of a command; --version tells the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        0; 2 after an error that the user can put right (one line on stderr); 130 after Ctrl-C; or what the
        command says.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .version import __version__

        print(f"resnet-fused {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(
            f"resnet-fused: error: unknown command {command!r}: expected one of {', '.join(COMMANDS)}"
        )

    from .training.errors import UserError

    try:
        return importlib.import_module(COMMANDS[command][0]).main(rest) or 0
    except UserError as error:
        return _fail(f"resnet-fused {command}: error: {error}")
    except KeyboardInterrupt as interrupt:
        _fail(f"\nresnet-fused {command}: interrupted{': ' if str(interrupt) else ''}{interrupt}")
        return 130
    except BrokenPipeError:  # the reader of the output, for example head, is gone: as if killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
