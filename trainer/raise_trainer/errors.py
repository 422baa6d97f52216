"""Errors a user can act on: the command line prints each as one line, without a traceback."""


class UserError(Exception):
    """Something asked for cannot be done; the message names the thing and the way out."""


class BadRow(UserError):
    """A data row that cannot be used, with its id."""


class BadMedia(UserError):
    """A media file that cannot be decoded, with its path."""
