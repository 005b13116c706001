"""Train the tiny Wan family on clips that are drawn as they are needed."""
