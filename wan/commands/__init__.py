"""What the two commands do."""
