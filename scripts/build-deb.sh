#!/usr/bin/env bash
# Builds a Debian package: scripts/build-deb.sh [OUTPUT.deb]. With NBD_DEB_BINARY it packs that program instead of
# building one. Only dpkg-deb is needed: what the package holds is a page, and nothing has to be installed to build it.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
arch=$(dpkg --print-architecture)
output=${1:-target/nbd-server_${version}_${arch}.deb}
binary=${NBD_DEB_BINARY:-}
if [ -z "$binary" ]; then
    cargo build --release --locked --bin nbd-server
    binary=target/release/nbd-server
fi

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"
put() { # put MODE SOURCE TARGET
    install -D -m "$1" "$2" "$root/$3"
}
put 0755 "$binary" usr/bin/nbd-server
put 0644 contrib/systemd/nbd-server.service lib/systemd/system/nbd-server.service
put 0644 contrib/systemd/nbd-server.socket lib/systemd/system/nbd-server.socket
put 0644 contrib/systemd/sysusers.conf usr/lib/sysusers.d/nbd-server.conf
put 0644 contrib/systemd/config.toml etc/nbd-server/config.toml
put 0644 contrib/nbdtab usr/share/doc/nbd-server/examples/nbdtab
put 0644 contrib/prometheus/alerts.yml usr/share/doc/nbd-server/examples/alerts.yml
put 0644 contrib/grafana/nbd-server.json usr/share/doc/nbd-server/examples/grafana.json
for doc in README.md CHANGELOG.md docs/operations.md LICENSE-MIT LICENSE-APACHE; do
    put 0644 "$doc" "usr/share/doc/nbd-server/$(basename "$doc")"
done

mkdir "$root/DEBIAN"
echo /etc/nbd-server/config.toml >"$root/DEBIAN/conffiles"
cat >"$root/DEBIAN/control" <<CONTROL
Package: nbd-server-objects
Version: $version
Architecture: $arch
Maintainer: nbd-server developers <root@localhost>
Depends: libc6, ca-certificates, systemd
Conflicts: nbd-server
Section: admin
Priority: optional
Installed-Size: $(du -sk "$root" | cut -f1)
Description: network block devices that live in object storage
 Serves writable block devices over NBD from a lazy local cache, with
 published snapshots in object storage.
CONTROL
# Where no systemd runs (a container), there is nothing to start.
cat >"$root/DEBIAN/postinst" <<'SCRIPT'
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
systemd-sysusers nbd-server.conf
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable nbd-server.service
    systemctl restart nbd-server.service
fi
SCRIPT
cat >"$root/DEBIAN/prerm" <<'SCRIPT'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now nbd-server.service nbd-server.socket
fi
SCRIPT
chmod 0755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm"
mkdir -p "$(dirname "$output")"
dpkg-deb --root-owner-group --build "$root" "$output" >/dev/null
echo "$output"
