"""CPU time of each command's help, against the bound of 0.6 s: `python benchmarks/help.py`.

User and system time of the child process, the least of several runs: other programs only add to it.
"""

import resource
import subprocess
import sys

from hieratok.cli import COMMANDS

LIMIT = 0.6
"""Seconds."""
RUNS = 3


def lines() -> list[list[str]]:
    """Every command line that asks for help, and `recipes`."""
    words = [[name] for name in COMMANDS] + [["evaluate", kind] for kind in COMMANDS["evaluate"].kinds]
    words += [["train", "f16d16-multi"], ["train", "dit-xl"]]
    return [["--help"], *([*line, "--help"] for line in words), ["recipes"]]


def seconds(arguments: list[str]) -> float:
    """CPU time of `python ARGUMENTS`."""
    found = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> int:
    """Print a line for each; 1 if one takes longer than the bound."""
    slow = 0
    print(f"{seconds(['-c', 'pass']):.2f} s  python itself")
    for line in lines():
        time = seconds(["-m", "hieratok", *line])
        slow += time > LIMIT
        print(f"{time:.2f} s  hieratok {' '.join(line)}{'  more than the bound' * (time > LIMIT)}")
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
