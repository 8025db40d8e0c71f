"""`hieratok bench`: speed of each part on this machine, as a share of the machine's limits."""
