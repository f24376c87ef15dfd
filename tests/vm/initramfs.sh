#!/usr/bin/env bash
# Packs the guest's whole world into a cpio archive: initramfs.sh VM OUT, where VM is the folder that
# scripts/setup-vm.sh made. The guest has Debian's own programs for what is tested, and busybox for the rest. Its shell
# is not busybox's, which would run its own applets whatever the path says: it has an nbd-client too.
set -euo pipefail
here=$(dirname "$0")
vm=$1 out=$2
root=$vm/root
programs=(dash nbd-client mke2fs e2fsck mkfs.xfs xfs_repair fstrim)

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{proc,sys,dev,tmp,mnt,etc,modules,applets} "$tree"/usr/{bin,sbin,lib,lib64}
for folder in bin sbin lib lib64; do
    ln -s "usr/$folder" "$tree/$folder"
done

# A folder of their own at the end of the path, so that a real program hides its applet.
cp "$root/usr/bin/busybox" "$tree/usr/bin/"
for applet in $("$root/usr/bin/busybox" --list); do
    ln -s /bin/busybox "$tree/applets/$applet"
done

library_path=usr/lib/x86_64-linux-gnu
mkdir -p "$tree/$library_path"
loader=$root/$library_path/ld-linux-x86-64.so.2
# Programs name the loader by this path.
cp "$loader" "$tree/usr/lib64/"
for program in "${programs[@]}"; do
    for folder in usr/bin usr/sbin; do
        [ ! -e "$root/$folder/$program" ] || file=$folder/$program
    done
    cp --dereference "$root/$file" "$tree/$file"
    "$loader" --library-path "$root/$library_path" --list "$root/$file" | sed -n 's/.* => \([^ ]*\).*/\1/p' |
        xargs cp --dereference --update --target-directory "$tree/$library_path"
done
ln -s dash "$tree/usr/bin/sh"
cp "$root/etc/mke2fs.conf" "$tree/etc/"
cp "$vm"/modules/* "$tree/modules/"
cp "$here/init" "$tree/init"
chmod +x "$tree/init"

cd "$tree"
find . | "$tree/usr/bin/busybox" cpio -o -H newc -R 0:0 2>/dev/null >"$out"
