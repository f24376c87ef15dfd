#!/usr/bin/env python3
"""Breaks each rule in turn and sees to it that a test catches it.

Each row of the table in docs/testing.md names a switch of src/sabotage.rs and the test that catches it. The server is
built with that switch, the test is run, and must fail; without a switch the same tests must pass (`make test` does that).

    scripts/sabotage.py              all rows
    scripts/sabotage.py NAME ...     some of them
    scripts/sabotage.py --hunt NAME  run the whole suite against a switch, to find what catches it
"""

import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The tests of the rules, in the order in which they are tried by --hunt.
SUITE = ["volume", "interrupted", "disk_faults", "crash", "faults", "two_hosts", "model", "one_field", "formats",
         "store_conformance", "nbd_durability", "interleavings", "lib"]
# A switch that is not caught within this time is not caught.
LIMIT_SECONDS = 600


def rows():
    text = (ROOT / "docs/testing.md").read_text()
    found = re.findall(r"^\| `([a-z-]+)` \| (.+?) \| `(?:tests/)?(\w+)(?:\.rs)?` \| `(\w+)` \|$", text, re.M)
    return {name: (suite, test) for name, _, suite, test in found}


def switches():
    text = (ROOT / "src/sabotage.rs").read_text()
    return re.findall(r'\("([a-z-]+)", Rule::', text)


def run(switch, suite, test=None):
    """Whether the suite, or one test of it, fails in a build with the switch; and what it printed."""
    features = "sabotage,shuttle" if suite == "interleavings" else "sabotage"
    target = ["--lib"] if suite == "lib" else ["--test", suite]
    build = ["cargo", "test", "--locked", "--features", features, *target, "--no-run"]
    env = dict(os.environ, NBD_SABOTAGE=switch, RUST_BACKTRACE="0")
    subprocess.run(build, cwd=ROOT, env=env, check=True, capture_output=True)
    command = ["cargo", "test", "--locked", "--features", features, *target, *([test] if test else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return True, f"no end within {LIMIT_SECONDS} s"
    if done.returncode == 0 and test and not re.search(r"^test .* ok$", done.stdout, re.M):
        sys.exit(f"{switch}: there is no test {test} in {suite}")
    return done.returncode != 0, done.stdout


def hunt(switch):
    for suite in SUITE:
        caught, output = run(switch, suite)
        print(f"{switch}: {suite}: {'caught' if caught else 'not caught'}", flush=True)
        if caught:
            print("\n".join(sorted(set(re.findall(r"^test (\S+) .*FAILED$", output, re.M)))))
            return


def main():
    if sys.argv[1:2] == ["--hunt"]:
        return [hunt(switch) for switch in sys.argv[2:]]
    table = rows()
    missing = set(switches()) ^ set(table)
    if missing:
        sys.exit(f"in src/sabotage.rs or in docs/testing.md alone: {', '.join(sorted(missing))}")
    failed = 0
    for switch in sys.argv[1:] or table:
        suite, test = table[switch]
        began = time.monotonic()
        caught, _ = run(switch, suite, test)
        failed += not caught
        verdict = "caught by" if caught else "NOT CAUGHT by"
        print(f"{switch}: {verdict} {test} ({time.monotonic() - began:.0f} s)", flush=True)
    asked = len(sys.argv[1:]) or len(table)
    print(f"{asked - failed} passed, {failed} failed")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
