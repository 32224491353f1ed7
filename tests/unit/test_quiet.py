"""What native code prints while a solver runs must not mix with the program's answer on stdout."""

import os
import subprocess
import sys

PROGRAM = """
import os
from deploypipe.allocation.quiet import stdout_to_stderr
print("before")
try:
    with stdout_to_stderr():
        os.write(1, b"chatter")
        raise ValueError
except ValueError:
    print("after")
"""


def test_native_output_goes_to_stderr_and_stdout_comes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.split() == ["before", "after"]
    assert done.stderr == "chatter"
