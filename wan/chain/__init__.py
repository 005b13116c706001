"""A chain of clips: what each is made from, what is in its folder, and what is told about it."""
