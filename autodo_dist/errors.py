"""The one exception that a user is meant to read."""


class AutodoError(Exception):
    """What is wrong, where, and how to mend it, in one line.

    Command line and launcher print it without a traceback and exit with status 1; any other exception is a bug of
    ours and keeps its traceback in the rank's log.
    """


class OutageError(AutodoError):
    """Another start may do better: a rank, a node or the network was not there. The launcher starts the run again."""


class DecodeError(AutodoError):
    """A picture does not decode, or one of several; which one is not known then."""


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
