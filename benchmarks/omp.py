"""Import this before anything that loads torch: benchmarks in one process get the engine process's environment."""

import os

from server.engine.environment import engine_environment

os.environ.update(engine_environment())
