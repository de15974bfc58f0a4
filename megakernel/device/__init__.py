"""What runs inside the launch; the only folder with ``tl.load``."""
