"""From a checked call to the one launch; the only folder that touches a stream or the driver."""
