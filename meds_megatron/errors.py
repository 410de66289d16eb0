class UserError(Exception):
    """A mistake of the user, told in one sentence: the command line prints it without a traceback."""
