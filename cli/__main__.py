"""`python -m cli` is `plumbline`, where that is not installed as a command."""

import sys

from cli.main import main

sys.exit(main())
