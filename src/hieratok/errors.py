"""Errors that the command line reports in one line."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says where it stands and what to do."""


class Stopped(Exception):
    """A run that was asked to stop (SIGTERM) and has saved; the same command goes on."""
