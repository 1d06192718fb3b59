"""``python -m iql_plugins``, which is ``iql-plugins``."""

import sys

from iql_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
