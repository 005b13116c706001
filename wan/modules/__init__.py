"""The parts of a model under the paths that Wan2.2 has them at."""
