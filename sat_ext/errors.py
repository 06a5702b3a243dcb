"""What a user can do wrong, each as one sentence: what, where, the value, the remedy."""


class SatExtError(ValueError):
    """Base of every error that a user can cause and fix. `str(error)` is one clear sentence."""


class ConfigError(SatExtError):
    """A YAML or command line value that cannot be used."""


class DataError(SatExtError):
    """A data set that cannot be used as a whole (empty, no captions, a table without its path column)."""


class TrainingError(SatExtError):
    """A run that cannot go on, or whose result would be worth nothing."""


class MediaError(SatExtError):
    """One file that cannot be read. `path` names it and `reason` says why, without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> "tuple[type[MediaError], tuple[str, str]]":
        return type(self), (self.path, self.reason)  # crosses the data workers' process boundary
