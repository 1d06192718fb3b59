"""``iql-plugins completion``: what a shell completes."""

from iql_plugins.cli.arguments import Completion, Shell, completion_script
from iql_plugins.cli.output import Result

__all__ = ["completion"]

#: tyro's scripts offer files as the value of an option alone, and shells none beside a script: these do.
_FILES: dict[Shell, str] = {
    "bash": """
_iql_plugins() {
  _tyro_iql_plugins "$@"
  # Nothing to offer is an empty word in tyro's script, which readline would take for the only candidate.
  [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
}
complete -o default -F _iql_plugins iql-plugins
""",
    "zsh": """
(( compstate[nmatches] )) || _files
""",
    "fish": """
complete --command iql-plugins --force-files --condition \
    'not __fish_use_subcommand; and not string match --quiet -- "-*" (commandline -opc)[-1]'
""",
}


def completion(arguments: Completion) -> Result:
    """The script of a shell."""
    script = completion_script(arguments.shell) + _FILES[arguments.shell]
    return Result({"shell": arguments.shell, "script": script}, [script.rstrip("\n")])
