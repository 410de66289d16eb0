class UserError(Exception):
    """A mistake of the user, described in one sentence: the command line prints it without a traceback."""
