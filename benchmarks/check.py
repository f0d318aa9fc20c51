"""How long the main job takes: `check resnet50` with its defaults, and all five depths in one command.

python benchmarks/check.py
"""

import subprocess
import sys
import time

COMMANDS = (
    (["check", "resnet50", "--timings"], 120),
    (["check", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "--timings"], 480),
)


def main() -> None:
    for arguments, limit in COMMANDS:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "common.commands", *arguments], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        shown = [line for line in done.stdout.splitlines() if "FUNCTION" in line or "NOT SHOWN" in line]
        print("\n".join(shown))
        print(done.stdout[done.stdout.index("seconds") :].rstrip() if "seconds" in done.stdout else done.stderr)
        print(f"resnet-parity {' '.join(arguments)}: {seconds:.0f} s of {limit} s, exit {done.returncode}\n")


if __name__ == "__main__":
    main()
