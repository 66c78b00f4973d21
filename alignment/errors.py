"""Errors that the user can act on."""


class UserError(ValueError):
    """A mistake or a lack on the user's side: says what is wrong, what is allowed and the remedy. Shown without a traceback."""
