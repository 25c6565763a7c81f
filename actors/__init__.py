"""Long-lived processes: plain classes, one a module. They become Ray actors in `spawn` and nowhere else."""

import os

# Several learners on a small machine are more processes than Ray expects there, and it would say so on the user's
# screen, again and again. Ray reads this when it is imported, hence its place.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
