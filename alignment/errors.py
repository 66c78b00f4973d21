"""Errors that the user can act on."""


class UserError(ValueError):
    """Something that the user can mend: what is wrong, what is allowed and the remedy. Shown without a traceback."""
