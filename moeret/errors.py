"""Every error that moeret raises on purpose.

MoeretError
  ConfigError          an argument that cannot work
  DataError            a corpus, query or judgment that cannot be used
  ArtifactError        a model or index on disk that is missing, unfinished, damaged or foreign
    BusyError          another process is writing it
  BaseEncoderError     a pretrained encoder that cannot be found or loaded
  CheckpointError      a training run that cannot be continued
  HubError             the Hugging Face hub does not answer, or refuses

Each message says what was wrong, where, and what to do.
"""


class MoeretError(Exception):
    """Base of all of moeret's errors."""


class ConfigError(MoeretError, ValueError):
    """An argument that cannot work."""


class DataError(MoeretError, ValueError):
    """A corpus, query or judgment that cannot be used."""


class ArtifactError(MoeretError):
    """A model or index on disk that is missing, unfinished, damaged or foreign."""


class BusyError(ArtifactError):
    """Another process is writing the same artifact."""


class BaseEncoderError(MoeretError):
    """A pretrained encoder that cannot be found or loaded."""


class CheckpointError(MoeretError):
    """A training run that cannot be continued."""


class HubError(MoeretError):
    """The Hugging Face hub does not answer, or refuses."""
