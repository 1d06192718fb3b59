"""The command line. Importing it imports no framework."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 2 when no command was given.
    """
    parser = argparse.ArgumentParser(prog="iql-plugins", description="Implicit Q-Learning for RL frameworks.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('iql-plugins')}")
    parser.parse_args(arguments)
    parser.print_help(sys.stderr)
    return 2
