#!/usr/bin/env bash
# Fetches what the test of the kernel's own client (tests/kernel_client.rs) runs: a machine emulator, a kernel and the
# guest's programs, all as Debian's packages, unpacked in .vm. Nothing is installed and no root is needed: apt works on
# lists and a package state of its own, which says that nothing is there, so it resolves every library too and neither
# depends on nor changes what this machine has. Prints what it fetches, and nothing if all is there.
#
# It leaves:
#   .vm/root      the unpacked packages, in the folder layout of a merged /usr
#   .vm/vmlinuz   the kernel
#   .vm/modules   the kernel modules of the guest, and `order`: their names, each after those it needs
#   .vm/made-by   a copy of this script, written last: what was cut short or made by another version is made anew
set -euo pipefail
cd "$(dirname "$0")/.."

vm=.vm
self=scripts/setup-vm.sh
root=$vm/root
packages=(qemu-system-x86 kmod busybox-static dash nbd-client e2fsprogs xfsprogs util-linux)
modules=(virtio_pci virtio_net nbd ext4 xfs)

if cmp -s "$self" "$vm/made-by"; then
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(dpkg --print-architecture)" != amd64 ]; then
    echo "setup: the test of the kernel's client needs Debian's packages: run it on Debian for amd64" >&2
    exit 1
fi
echo "setup: fetching into $vm a machine emulator and a kernel: ${packages[*]} linux-image-amd64"

rm -rf "$vm"
mkdir -p "$vm"/{apt/state/lists/partial,apt/cache/archives/partial,kernel,modules} "$root"/usr/{bin,sbin,lib,lib64}
: >"$vm/apt/status"
for folder in bin sbin lib lib64; do
    ln -s "usr/$folder" "$root/$folder"
done
# The hooks of this machine's apt are for its own packages.
cat >"$vm/apt/apt.conf" <<END
Dir::State "$PWD/$vm/apt/state";
Dir::State::status "$PWD/$vm/apt/status";
Dir::Cache "$PWD/$vm/apt/cache";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
APT::Sandbox::User "";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
END
own=(-qq --config-file "$PWD/$vm/apt/apt.conf")

unpack() { # unpack PACKAGE-FILE FOLDER
    dpkg-deb --fsys-tarfile "$1" | tar --extract --keep-directory-symlink --no-same-owner --directory "$2" \
        --exclude './usr/share/doc' --exclude './usr/share/locale' --exclude './usr/share/man'
}

apt-get "${own[@]}" update
apt-get "${own[@]}" --download-only --yes install "${packages[@]}" >/dev/null
for package in "$vm"/apt/cache/archives/*.deb; do
    unpack "$package" "$root"
done

# linux-image-amd64 only names the newest kernel. That one's own dependencies are for a machine that installs it.
kernel=$(apt-cache "${own[@]}" depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
(cd "$vm/kernel" && apt-get "${own[@]}" download "$kernel")
unpack "$vm/kernel/$kernel"_*.deb "$vm/kernel"
version=${kernel#linux-image-}
mv "$vm/kernel/boot/vmlinuz-$version" "$vm/vmlinuz"

# Programs of another Debian run with their own libraries and their own loader.
loader=$root/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2
kmod() { # kmod NAME ARGUMENT...: the program of many names, under this one
    "$loader" --argv0 "$1" --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/kmod" "${@:2}"
}
[ -d "$vm/kernel/lib" ] || ln -s usr/lib "$vm/kernel/lib"
kmod depmod --basedir "$PWD/$vm/kernel" "$version"
for module in "${modules[@]}"; do
    kmod modprobe --dirname "$PWD/$vm/kernel" --set-version "$version" --show-depends "$module"
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
    name=$(basename "$file")
    case $name in
        *.xz) name=${name%.xz} && "$root/usr/bin/busybox" unxz -c "$file" >"$vm/modules/$name" ;;
        *) cp "$file" "$vm/modules/$name" ;;
    esac
    echo "$name" >>"$vm/modules/order"
done

rm -rf "$vm/apt" "$vm/kernel"
cp "$self" "$vm/made-by"
