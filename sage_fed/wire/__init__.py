"""What travels: the codec between core's values and messages, and the bounds of requests."""
