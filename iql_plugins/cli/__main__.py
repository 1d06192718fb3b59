"""``python -m iql_plugins.cli``."""

import sys

from iql_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
