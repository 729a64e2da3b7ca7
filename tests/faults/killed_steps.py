"""A process that kills itself at a given step of replacing files: the beginning of a script for ``python -c``."""

COUNT_STEPS = """
import os, shutil, signal, sys
from pathlib import Path

from featurestore import whole_file

# Which step kills, how many there were, and whether this is the child process that is to die.
at, steps, in_child = 0, 0, False


def counted(module, name):
    usual = getattr(module, name)

    def step(*arguments, **options):
        global steps
        steps += in_child
        if in_child and steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*arguments, **options)

    setattr(module, name, step)


for name in ("rename", "replace", "unlink", "rmdir"):
    counted(os, name)
counted(shutil, "rmtree")
counted(whole_file, "_swap")
"""
