"""The one error a person can mend: its message names the file or option and says how."""


class RefineError(ValueError):
    """Stops a command with exit status 2; whatever was finished before it is kept."""
