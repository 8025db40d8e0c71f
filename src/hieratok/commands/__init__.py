"""The commands, one file each: its options and a thin call. None imports another, and none torch before it runs."""
