#!/usr/bin/env bash
# Installs what the tests need and this machine lacks; prints what it installs, and nothing if all is there.
# `setup.sh bench` installs what the benchmarks compare with, too.
# It asks for the programs, not for their packages, so it never replaces a version that is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin"

# Debian's Python: its package python3-libnbd holds the nbd module, and other Pythons do not see it.
python=/usr/bin/python3
venv=.venv
requirements=scripts/requirements.txt

missing=()
need() { # need PACKAGE PROGRAM...: the package that brings these programs
    local package=$1 program
    shift
    for program in "$@"; do
        command -v "$program" >/dev/null || { missing+=("$package"); return; }
    done
}

need make make
need gcc cc
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
need libnbd-bin nbdinfo nbdcopy nbddump
need qemu-utils qemu-img qemu-io
need fio fio
need strace strace
need nbd-client nbd-client
need curl curl
need openssl openssl
need jq jq
need groff-base groff
need iproute2 ip
if [ "${1:-}" = bench ]; then
    need nbdkit nbdkit
    # Debian's server of the same name as ours; its service needs a configuration, and has none.
    need nbd-server nbd-server
fi
need prometheus promtool
need systemd systemd-analyze
need dpkg dpkg-deb
need dpkg-dev dpkg-shlibdeps
need util-linux unshare runuser
need util-linux-extra fincore
need python3 $python
$python -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
$python -c 'import nbd' 2>/dev/null || missing+=(python3-libnbd)

if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || {
        echo "setup: there is no apt-get here: install what brings these Debian packages' programs: ${missing[*]}" >&2
        exit 1
    }
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || {
            echo "setup: run this as root, or install sudo: apt-get install ${missing[*]}" >&2
            exit 1
        }
        as_root=(sudo)
    fi
    echo "setup: installing with apt-get: ${missing[*]}"
    "${as_root[@]}" apt-get -qq update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"
fi

# The copy of the list is written last: a venv that was cut short is made anew.
if ! cmp -s "$requirements" "$venv/installed.txt"; then
    echo "setup: installing into $venv: $requirements"
    rm -rf "$venv"
    $python -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi

# The virtual machine with the kernel's own client.
scripts/setup-vm.sh

command -v cargo >/dev/null || {
    echo "setup: there is no cargo here: install Rust (https://rustup.rs), then repeat" >&2
    exit 1
}

# Makes the Debian package.
cargo_deb=3.8.0
if [ "$(.tools/bin/cargo-deb --version 2>/dev/null)" != "cargo-deb $cargo_deb" ]; then
    echo "setup: installing into .tools: cargo-deb $cargo_deb"
    cargo install --quiet --locked --root .tools "cargo-deb@$cargo_deb"
fi
