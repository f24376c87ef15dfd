#!/usr/bin/env python3
"""Writes the licence notices of everything that is linked into the program: licenses.py FILE

The crates are those that Cargo.lock has for this platform, without what only builds or tests them. Each is named with
its version, its licence and the texts that came with its source, those of C code in it too. Equal texts stand once.
A crate without a text fails.
"""

import html
import json
import os
import re
import subprocess
import sys

NAMES = ("license", "licence", "copying", "copyright", "notice", "unlicense")


def said(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def linked(metadata):
    """The packages that the root package is linked with, itself left out."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    found, left = set(), [root]
    while left:
        for dependency in nodes[left.pop()]["deps"]:
            is_normal = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_normal and dependency["pkg"] not in found:
                found.add(dependency["pkg"])
                left.append(dependency["pkg"])
    packages = [package for package in metadata["packages"] if package["id"] in found]
    is_macro = lambda package: any("proc-macro" in target["kind"] for target in package["targets"])
    return sorted((p for p in packages if not is_macro(p)), key=lambda p: (p["name"], p["version"]))


def texts(folder):
    for path, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if file.lower().startswith(NAMES) and not file.endswith((".rs", ".py", ".html", ".spdx")):
                with open(os.path.join(path, file), encoding="utf-8", errors="replace") as text:
                    yield text.read().strip()


def standard_library():
    """The notices of Rust's own library, as they come with the compiler."""
    notices = os.path.join(said("rustc", "--print", "sysroot").strip(), "share/doc/rust/COPYRIGHT-library.html")
    if not os.path.exists(notices):
        return "The Rust Standard Library, by The Rust Project Developers: see https://www.rust-lang.org/policies/licenses"
    with open(notices, encoding="utf-8") as page:
        page = re.sub(r"<style.*?</style>|<head.*?</head>|<[^>]*>", "", page.read(), flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(page)).strip()


def main():
    (target,) = sys.argv[1:]
    host = next(line.split()[1] for line in said("rustc", "-vV").splitlines() if line.startswith("host:"))
    # What was built is there: nothing is fetched.
    offline = ("--locked", "--offline", "--format-version", "1", "--filter-platform", host)
    metadata = json.loads(said("cargo", "metadata", *offline))
    by_text = {}
    for package in linked(metadata):
        name = f"{package['name']} {package['version']} ({package['license'] or 'see below'})"
        found = set(texts(os.path.dirname(package["manifest_path"])))
        if not found:
            sys.exit(f"licenses: {name} has no licence text in its source")
        for text in found:
            by_text.setdefault(text, []).append(name)
    release = said("rustc", "--version").split()[1]
    by_text.setdefault(standard_library(), []).append(f"std {release} (MIT OR Apache-2.0)")
    with open(target, "w", encoding="utf-8") as out:
        out.write("nbd-server is linked with the following, each under the licences named and the texts below it.\n")
        for text, names in sorted(by_text.items(), key=lambda item: sorted(item[1])):
            out.write("\n" + "=" * 78 + "\n")
            out.writelines(f"{name}\n" for name in sorted(names))
            out.write("-" * 78 + "\n" + text + "\n")


main()
