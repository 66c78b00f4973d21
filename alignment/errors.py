"""Errors that the user can act on."""


class UserError(ValueError):
    """Something that the user can mend: what is wrong, what is allowed and the remedy. Shown without a traceback."""


class EngineFailed(UserError):
    """An engine in another process died, hung or could not be started; the message names it and how it ended.

    What was completed before is in the run's checkpoints, and the same command goes on from there.
    """
