"""Errors that the command line reports in one line."""


class TrainingError(RuntimeError):
    """A run that cannot continue; the message says how far it got and what to do."""


class Stopped(Exception):
    """A run that was asked to stop (SIGTERM) and has saved; the same command resumes."""


class NotFinite(ValueError):
    """NaN or infinite values where numbers are needed; while a model trains, that it has diverged."""
