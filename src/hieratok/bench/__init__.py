"""`hieratok bench`: how fast this machine runs each part, as shares of its limits."""
