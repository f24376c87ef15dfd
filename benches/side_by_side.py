#!/usr/bin/python3
"""Runs the same work against this server and others, side by side, and writes docs/benchmarks.md with its plots.

Every server runs from the start to the end of the benchmark; each round measures every job on every server in turn, so
that what else the machine does hits all alike. The figures are medians over the rounds. CPU is what the server's
processes used, user and system, divided by the requests of the run. See docs/benchmarks.md for what is compared.
"""

import argparse
import http.client
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS, CEILING, FILE_CEILING = "nbd-server (ours)", "ceiling", "ceiling of a file"
OURS_IN_MEMORY = "the same, in memory"
TICKS = os.sysconf("SC_CLK_TCK")
PEERS = ["nbdkit file", "qemu-nbd", "nbd-server (Debian)"]
# In the order in which tables and plots show them.
ORDER = [CEILING, FILE_CEILING, OURS, OURS_IN_MEMORY, *PEERS]
COLOURS = {CEILING: "#bbbbbb", FILE_CEILING: "#888888", OURS: "#1f6feb", OURS_IN_MEMORY: "#79b8ff",
           "nbdkit file": "#e07b39", "qemu-nbd": "#8250df", "nbd-server (Debian)": "#5c8a3a"}

# Of the export that is published while its client writes: enough to take longer than the client does.
SNAPSHOT_BYTES = 2 << 30

# name, what fio is told, the unit of the figure
JOBS = [
    *[(f"4 KiB random {kind}, depth {depth}, {conns} connection{'s' if conns > 1 else ''}",
       dict(rw=f"rand{kind}", bs="4k", iodepth=depth, numjobs=conns), "IOPS")
      for kind in ("read", "write") for depth in (1, 32) for conns in (1, 4)],
    *[(f"1 MiB sequential {kind}, depth 4", dict(rw=kind, bs="1m", iodepth=4), "MiB/s") for kind in ("read", "write")],
    ("4 KiB random write, a flush after each", dict(rw="randwrite", bs="4k", iodepth=1, fsync=1), "IOPS"),
]


class Server:
    """A server that was started, and is ended by its process id."""

    def __init__(self, name, command, uri, pid_file=None):
        self.name, self.uri = name, uri
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.pid = self.process.pid
        if pid_file:
            # It goes to the background by itself.
            self.process.wait()
            while not (pid_file.exists() and pid_file.read_text().strip()):
                time.sleep(0.01)
            self.pid = int(pid_file.read_text())

    def cpu_seconds(self):
        """What it and its children, living and dead, have used."""
        children = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                # Fields after the name: parent 1, utime 11, stime 12, cutime 13, cstime 14.
                children.setdefault(int(stat[1]), []).append((int(entry), stat))
                if int(entry) == self.pid:
                    own = stat
        total, todo = sum(map(int, own[11:15])), [self.pid]
        while todo:
            for pid, stat in children.get(todo.pop(), []):
                total += sum(map(int, stat[11:15]))
                todo.append(pid)
        return total / TICKS

    def stop(self):
        os.kill(self.pid, signal.SIGTERM)
        self.process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit(f"bench: nothing listens on 127.0.0.1:{port}")


def start_ours(folder, size, binary, name=OURS):
    port, admin = free_port(), folder / "admin.sock"
    command = [binary, "serve", "--cache-root", folder / "cache", "--local-root", folder / "store",
               "--admin-sock", admin, "--listen", f"127.0.0.1:{port}"]
    server = Server(name, command, f"nbd://127.0.0.1:{port}/bench")
    wait_for(port)
    ask(folder, "create", {"export_id": "bench", "size": size})
    return server


def ask(folder, what, body):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(folder / "admin.sock"))
    connection.request("POST", f"/v1/exports/{what}", json.dumps(body))
    answer = connection.getresponse()
    if answer.status >= 300:
        sys.exit(f"bench: {what} failed: {answer.read()}")
    answer.read()


def start_ceiling(name, size, *file):
    server = Server(name, [ROOT / "target" / "release" / "examples" / "ceiling", str(size), *file], "")
    server.uri = f"nbd://127.0.0.1:{int(server.process.stdout.readline())}"
    return server


def image(folder, size):
    path = folder / "image.raw"
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def start_nbdkit(folder, size):
    port = free_port()
    command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-t", "16", "file", str(image(folder, size))]
    return Server("nbdkit file", command, f"nbd://127.0.0.1:{port}")


def start_qemu(folder, size):
    port = free_port()
    command = ["qemu-nbd", "-t", "-f", "raw", "-e", "8", "-b", "127.0.0.1", "-p", str(port), str(image(folder, size))]
    return Server("qemu-nbd", command, f"nbd://127.0.0.1:{port}")


def start_debian(folder, size):
    port, config, pid_file = free_port(), folder / "config", folder / "pid"
    config.write_text(f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n[bench]\nexportname = {image(folder, size)}\n"
                      "flush = true\nfua = true\n")
    command = ["nbd-server", "-C", str(config), "-p", str(pid_file)]
    return Server("nbd-server (Debian)", command, f"nbd://127.0.0.1:{port}/bench", pid_file)


def fio(server, options, seconds):
    options = {"ioengine": "nbd", "uri": server.uri, "thread": 1, "size": "100%", "group_reporting": 1,
               "refill_buffers": 0, "norandommap": 1, "randrepeat": 0, **options}
    if seconds:
        options |= {"time_based": 1, "runtime": seconds}
    command = ["fio", "--name=job", "--output-format=json"] + [f"--{key}={value}" for key, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench: fio failed against {server.name}: {done.stderr or done.stdout}")
    return json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]


def measure(server, options, unit, seconds):
    before = server.cpu_seconds()
    job = fio(server, options, seconds)
    cpu = server.cpu_seconds() - before
    done = job["read"] if "read" in options["rw"] else job["write"]
    figure = done["iops"] if unit == "IOPS" else done["bw_bytes"] / 2**20
    return figure, cpu * 1e6 / max(done["total_ios"], 1)


def measure_under_snapshots(folder, binary, rounds):
    """How long a client waits for a write, by itself and while all of a large export is published: rows of a table."""
    server, beside = start_ours(folder, SNAPSHOT_BYTES, binary), ThreadPoolExecutor(1)
    rates = {"one after the other": {}, "2,000 a second": {"rate_iops": 2000}}
    times = {(rate, when): [] for rate in rates for when in ("by itself", "during a snapshot")}

    def write_for_a_while(rate, when):
        done = fio(server, dict(rw="randwrite", bs="4k", iodepth=1, **rates[rate]), 1)["write"]
        times[rate, when].append([done["clat_ns"]["percentile"][f"{percent}.000000"] / 1000 for percent in (50, 90, 99)])

    try:
        for rate in list(rates) * rounds:
            fio(server, dict(rw="write", bs="1m", iodepth=4), 0)
            measure_cold("touch")
            write_for_a_while(rate, "by itself")
            snapshot = beside.submit(ask, folder, "bench/snapshot", {})
            write_for_a_while(rate, "during a snapshot")
            # What was measured after its end is no measure of it.
            if snapshot.done():
                times[rate, "during a snapshot"].pop()
            # Ends the benchmark too, if it failed.
            snapshot.result()
    finally:
        server.stop()
    if not all(times.values()):
        print("bench: snapshots ended within a second, so not all writes were measured beside one", file=sys.stderr)
    return [(f"a client's 4 KiB writes, {rate}, {when}",
             "percentiles 50, 90, 99: " + ", ".join(f"{statistics.median(of):.0f} µs" for of in zip(*each)))
            for (rate, when), each in times.items() if each]


def amount(figure):
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}"


def table(results, unit, jobs):
    cpu_of = "request" if unit == "IOPS" else "MiB"
    lines = [f"| work | server | {unit} | of the ceiling | of the best peer | CPU µs per {cpu_of} |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in jobs:
        best = max(figure for server, (figure, _) in results[name].items() if server in PEERS)
        for server in ORDER:
            if server in results[name]:
                figure, cpu = results[name][server]
                label = f"**{server}**" if server in (OURS, OURS_IN_MEMORY) else server
                lines.append(f"| {name} | {label} | {amount(figure)} | {figure / results[name][CEILING][0]:.2f} | "
                             f"{figure / best:.2f} | {cpu:.1f} |")
    return "\n".join(lines)


def plot(results, jobs, index, title, path):
    """Bars, one group per job: plain SVG, since it is all that is needed."""
    row, gap, left, width = 16, 14, 330, 1000
    most = max(results[name][server][index] for name in jobs for server in results[name])
    parts, y = [], 34
    for name in jobs:
        servers = [server for server in ORDER if server in results[name]]
        middle = y + len(servers) * row / 2 + 4
        parts.append(f'<text x="{left - 10}" y="{middle}" text-anchor="end">{name}</text>')
        for server in servers:
            value = results[name][server][index]
            length = (width - left - 90) * value / most
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 3}" fill="{COLOURS[server]}"/>'
                         f'<text x="{left + length + 5:.1f}" y="{y + 11}">{amount(value)}</text>')
            y += row
        y += gap
    x = 10
    for server in ORDER:
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[server]}"/>'
                     f'<text x="{x + 17}" y="{y + 11}">{server}</text>')
        x += 45 + 7 * len(server)
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 24}" font-family="sans-serif" '
           f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
           f'<text x="10" y="20" font-size="14" font-weight="bold">{title}</text>{"".join(parts)}</svg>\n')
    path.write_text(svg)


def machine():
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    folder = subprocess.run(["stat", "-f", "-c", "%T", tempfile.gettempdir()], capture_output=True, text=True, check=True)
    return (f"{os.cpu_count()} × {cpu}, {memory:.0f} GiB, Linux {platform.release()}, files on {folder.stdout.strip()}, "
            f"load average {os.getloadavg()[0]:.1f} at the start")


def version(*command):
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return (said.stdout + said.stderr).strip().splitlines()[0]


def write_document(results, cold, options, about):
    jobs = list(results)
    small = [name for name in jobs if name.startswith("4 KiB") and "flush" not in name]
    large = [name for name in jobs if name.startswith("1 MiB")]
    flush = [name for name in jobs if "flush" in name]
    docs = ROOT / "docs"
    plot(results, small, 0, "4 KiB random: requests per second", docs / "benchmarks-small-iops.svg")
    plot(results, small, 1, "4 KiB random: server CPU per request, in µs", docs / "benchmarks-small-cpu.svg")
    plot(results, large, 0, "1 MiB sequential: MiB per second", docs / "benchmarks-large.svg")
    plot(results, flush, 0, "A flush after each write: writes per second", docs / "benchmarks-flush.svg")
    text = (ROOT / "benches" / "benchmarks.md.in").read_text()
    fields = dict(about=about, small=table(results, "IOPS", small), large=table(results, "MiB/s", large),
                  flush=table(results, "IOPS", flush), cold=cold_table(cold), rounds=options.rounds, seconds=options.seconds,
                  size=options.size >> 20)
    (docs / "benchmarks.md").write_text(text.format(**fields))


def measure_cold(*what):
    """What `benches/cold.rs` prints: pairs of what was measured and the result."""
    command = ["cargo", "bench", "--locked", "--bench", "cold", "--", *what]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines() if re.search(r"\S\s{2,}\S", line)]


def cold_table(results):
    return "\n".join(["| work | result |", "| --- | --- |", *(f"| {what} | {result} |" for what, result in results)])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, under five minutes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=int, help="per job, server and round")
    parser.add_argument("--size", type=int, default=512 << 20, help="of the image, in bytes")
    parser.add_argument("--only", default="", help="jobs whose name has this in it; prints and writes no document")
    parser.add_argument("--servers", default="", help="the same, for servers; several parts with commas between")
    parser.add_argument("--binary", default=ROOT / "target" / "release" / "nbd-server")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (2 if options.quick else 5)
    about = machine()
    starts = {CEILING: lambda _, s: start_ceiling(CEILING, s),
              FILE_CEILING: lambda _, s: start_ceiling(FILE_CEILING, s, Path(memory) / "image.raw"),
              OURS: lambda f, s: start_ours(f, s, options.binary),
              OURS_IN_MEMORY: lambda _, s: start_ours(Path(memory), s, options.binary, OURS_IN_MEMORY),
              "nbdkit file": start_nbdkit,
              "qemu-nbd": start_qemu, "nbd-server (Debian)": start_debian}
    wanted = options.servers.split(",")
    jobs = [job for job in JOBS if options.only in job[0]]
    runs = {name: {} for name, _, _ in jobs}
    with (tempfile.TemporaryDirectory(prefix="nbd-bench-") as folder,
          tempfile.TemporaryDirectory(prefix="nbd-bench-", dir="/dev/shm") as memory):
        servers = []
        try:
            for name, start in starts.items():
                if any(part in name for part in wanted):
                    own = Path(folder) / name.replace(" ", "-")
                    own.mkdir()
                    servers.append(start(own, options.size))
            for server in servers:
                wait_for(int(server.uri.removeprefix("nbd://127.0.0.1:").partition("/")[0]))
                # All of the image has data, none of it zeros, and is in memory.
                fio(server, dict(rw="write", bs="1m", iodepth=4), 0)
                fio(server, dict(rw="read", bs="1m", iodepth=4), 0)
            for _ in range(options.rounds):
                for name, work, unit in jobs:
                    for server in servers:
                        runs[name].setdefault(server.name, []).append(measure(server, work, unit, options.seconds))
                        figure, cpu = runs[name][server.name][-1]
                        print(f"{name}: {server.name}: {amount(figure)} {unit}, {cpu:.1f} µs", flush=True)
        finally:
            for server in servers:
                server.stop()
    medians = {name: {server: tuple(statistics.median(values) for values in zip(*of)) for server, of in each.items()}
               for name, each in runs.items()}
    if options.only or options.servers:
        for name, each in medians.items():
            print(name)
            for server, (figure, cpu) in each.items():
                print(f"    {server:22} {amount(figure):>10}  {cpu:8.1f} µs")
        return
    cold = measure_cold(*(["reads", "publishing", "cuts"] if options.quick else []))
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as folder:
        cold += measure_under_snapshots(Path(folder), options.binary, options.rounds)
    write_document(medians, cold, options, about + "; " + "; ".join(
        [version("fio", "--version"), version("nbdkit", "--version"), version("qemu-nbd", "--version")]))


if __name__ == "__main__":
    main()
