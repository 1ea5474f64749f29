"""What the commands say of a run that a signal ended."""


class Stopped(Exception):
    """A signal ended a stage; its state is in a checkpoint, and the same call goes on."""
