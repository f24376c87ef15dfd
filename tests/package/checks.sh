# A machine on which somebody installs the package, uses the service, and removes it again. Every line must succeed.
export DEBIAN_FRONTEND=noninteractive HOME=/root
install() { apt-get install --yes "$@" /shared/nbd-server.deb; }
not() { ! "$@"; } # A line that begins with `!` never fails.
active() { [ "$(systemctl is-active nbd-server.service)" = active ]; }
eventually() { for _ in $(seq 100); do ! "$@" || return 0; sleep 0.1; done; "$@"; }
main_pid() { systemctl show --property MainPID --value nbd-server.service; }

install
# The service runs: systemd was told that it is ready, and it is nobody's root.
active
[ "$(stat --format %U "/proc/$(main_pid)")" = nbd-server ]
[ "$(systemctl is-enabled nbd-server.service)" = enabled ]
nbd-server status
[ "$(stat --format '%U %G %a' /run/nbd-server/nbd-server.sock)" = 'nbd-server nbd-server 660' ]
[ "$(stat --format '%U %a' /var/lib/nbd-server)" = 'nbd-server 700' ]
ls /usr/share/man/man1/nbd-server-export-create.1*
bash -n /usr/share/bash-completion/completions/nbd-server
grep '^ring .*(' /usr/share/doc/nbd-server-objects/THIRD-PARTY-LICENSES

# A device, and a snapshot of it.
nbd-server export create vm-1 16MiB
qemu-io -f raw -c 'write -P 7 0 64k' -c flush nbd://127.0.0.1:10809/vm-1
nbd-server snapshot create vm-1
qemu-io -f raw -c 'write -P 8 64k 64k' -c flush nbd://127.0.0.1:10809/vm-1
holds() { qemu-io -f raw -r -c 'read -P 7 0 64k' -c 'read -P 8 64k 64k' nbd://127.0.0.1:10809/vm-1; }

# A member of the group is let in, others are not.
useradd --groups nbd-server admin-of-disks
useradd stranger-to-disks
runuser -u admin-of-disks -- nbd-server export list
not runuser -u stranger-to-disks -- nbd-server export list

# Reload, restart, crash: the service is there again, with what was written.
systemctl reload nbd-server.service
active
systemctl restart nbd-server.service
holds
before=$(main_pid)
kill -KILL "$before"
restarted() { active && [ "$(main_pid)" != "$before" ]; }
eventually restarted
holds

# A start that the configuration forbids is not tried again and again.
cp /etc/nbd-server/config.toml /tmp/config.toml
echo 'frobnicate = 1' >>/etc/nbd-server/config.toml
not systemctl restart nbd-server.service
sleep 6
[ "$(systemctl show --property NRestarts --value nbd-server.service)" = 0 ]
cp /tmp/config.toml /etc/nbd-server/config.toml
systemctl reset-failed nbd-server.service

# Clients that come while there is no server wait for it, if systemd holds the socket.
systemctl start nbd-server.socket
holds
systemctl stop nbd-server.socket nbd-server.service

# A new version keeps what the user decided: settings, and that the service is not to run.
echo 'log-level = "debug"' >>/etc/nbd-server/config.toml
systemctl disable nbd-server.service
install --reinstall
not active
grep debug /etc/nbd-server/config.toml
systemctl enable --now nbd-server.service
install --reinstall
active
holds

apt-get remove --yes nbd-server-objects
not active
[ ! -e /usr/bin/nbd-server ]
apt-get purge --yes nbd-server-objects
[ ! -e /etc/nbd-server/config.toml ]
# What was not published is nowhere else.
[ -e /var/lib/nbd-server/cache/vm-1/cache.raw ]
echo PASSED
