"""What a launch raises beside ValueError."""


class MegakernelStall(RuntimeError):  # noqa: N818  (the public name is agreed)
    """A wait inside the launch ran past its bound; the outputs of that call are not valid."""
