#!/usr/bin/env bash
# Runs a script as a unit of a systemd of its own, on a copy of this machine that is gone afterwards:
# boot.sh SHARED, where SHARED is a folder with what the script `checks.sh` in it needs; it is /shared there, and what the
# script says comes into SHARED/said. Nothing of this machine is changed: its files lie under an overlay, and processes,
# mounts, network and control groups are new ones. Has to be root, to be it in there.
# Ends with 77 where a machine does not let anybody do that, as some sandboxes do not.
set -euo pipefail
shared=$1
cannot() {
    echo "this machine cannot run a systemd of its own: $1" >&2
    exit 77
}

if [ -z "${INSIDE:-}" ]; then
    # systemd wants to own the control group that it finds itself in.
    groups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [ -n "$groups" ] || cannot "no cgroup2 is mounted"
    unshare --mount --pid --fork --cgroup --uts --ipc --net true || cannot "no namespaces"
    group=$groups/nbd-server-package-$$
    mkdir "$group" || cannot "no control groups"
    trap 'find "$group" -depth -type d -exec rmdir {} \;' EXIT
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        INSIDE=1 exec unshare --mount --pid --fork --kill-child --cgroup --uts --ipc --net --propagation private \
            "$0" "$shared" </dev/null
    )
    exit
fi

world=$shared/world
mkdir "$world"
mount -t tmpfs none "$world"
mkdir "$world"/{changes,work,root}
root=$world/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$world/changes,workdir=$world/work" "$root" || cannot "no overlay"
mkdir -p "$root/shared"
mount --bind "$shared" "$root/shared"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 none "$root/sys/fs/cgroup"
for folder in run tmp dev; do
    mount -t tmpfs none "$root/$folder"
done
chmod 1777 "$root/tmp"
mkdir "$root"/dev/{pts,shm}
mount -t devpts -o newinstance,ptmxmode=0666 none "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
touch "$shared"/{said,console}
touch "$root/dev/console"
mount --bind "$shared/console" "$root/dev/console"

# What this machine would start is not started, and what was left of a service of ours is not there.
rm -rf "$root/etc/systemd/system" "$root"/{etc,var/lib}/nbd-server "$root/usr/sbin/policy-rc.d"
mkdir "$root/etc/systemd/system"
cat >"$root/etc/systemd/system/checks.service" <<'UNIT'
[Unit]
After=basic.target
[Service]
Type=oneshot
ExecStart=/bin/bash -euxo pipefail /shared/checks.sh
ExecStopPost=/bin/systemctl exit
StandardOutput=append:/shared/said
StandardError=append:/shared/said
UNIT
cd "$root"
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /lib/systemd/systemd --system --unit=checks.service
