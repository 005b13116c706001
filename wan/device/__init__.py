"""Where models live and what they take of its memory."""
