"""Who can fix it: the user (`UserError`, exit code 2); anything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something only the user can put right. The message is one line: what is wrong and what to do instead."""
