"""What all ranks raise together."""


class RankError(RuntimeError):
    """An error that all ranks found together; ``ranks`` are those that caused it."""

    def __init__(self, message, ranks):
        super().__init__(message)
        self.ranks = ranks
