"""What a user is told without a traceback."""


class StudyError(ValueError):
    """What was asked for cannot be done; the message says why."""
