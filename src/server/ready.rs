//! The one line that tells a newcomer what to do next.

use std::borrow::Cow;
use std::path::Path;

use crate::nbd::ListenAddr;
use crate::volume::registry::ExportSummary;

/// The name in the examples.
const EXAMPLE: &str = "vm-1";

/// `ready: …`: what was found, where to connect, and how to create and attach an export.
pub(super) fn line(
    exports: &[ExportSummary],
    addresses: &[ListenAddr],
    tls_required: bool,
    admin_sock: &Path,
) -> String {
    let scheme = Scheme::of(tls_required);
    let failed = exports.iter().filter(|export| export.failed.is_some()).count();
    let loaded = exports.len() - failed;
    let socket = quoted(&admin_sock.to_string_lossy()).into_owned();
    let attach = addresses.first().map(|addr| attach(scheme, addr)).unwrap_or_default();
    format!(
        "ready: {loaded} exports, {failed} failed; NBD on {uris}; admin socket {socket}; \
         create an export: curl --unix-socket {socket} http://localhost/v1/exports/create \
         -d '{{\"export_id\":\"{EXAMPLE}\",\"size\":1073741824}}'; {attach}",
        uris = uris(addresses, tls_required).join(" "),
    )
}

/// Where clients connect, as URIs without an export.
pub(super) fn uris(addresses: &[ListenAddr], tls_required: bool) -> Vec<String> {
    addresses.iter().map(|addr| uri(Scheme::of(tls_required), addr, "")).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Nbd,
    Nbds,
}

impl Scheme {
    fn of(tls_required: bool) -> Self {
        if tls_required { Self::Nbds } else { Self::Nbd }
    }
}

/// The standard URI of an export.
fn uri(scheme: Scheme, addr: &ListenAddr, export: &str) -> String {
    let scheme = match scheme {
        Scheme::Nbd => "nbd",
        Scheme::Nbds => "nbds",
    };
    match addr {
        ListenAddr::Tcp(addr) => format!("{scheme}://{addr}/{export}"),
        ListenAddr::Unix(path) => format!("{scheme}+unix:///{export}?socket={}", path.display()),
    }
}

fn attach(scheme: Scheme, addr: &ListenAddr) -> String {
    let uri = uri(scheme, addr, EXAMPLE);
    if scheme == Scheme::Nbds {
        let query = if uri.contains('?') { '&' } else { '?' };
        return format!("copy into it: nbdcopy disk.img {}", quoted(&format!("{uri}{query}tls-certificates=DIR")));
    }
    let client = match addr {
        ListenAddr::Tcp(addr) => {
            let (host, port) = addr.rsplit_once(':').unwrap_or((addr, "10809"));
            format!("{} {port}", host.trim_start_matches('[').trim_end_matches(']'))
        }
        ListenAddr::Unix(path) => format!("-unix {}", quoted(&path.to_string_lossy())),
    };
    format!("attach it: nbd-client -N {EXAMPLE} {client} /dev/nbd0, or copy into it: nbdcopy disk.img {}", quoted(&uri))
}

/// As a shell takes it.
pub(crate) fn quoted(text: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:@%+=,[]".contains(c);
    if text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', r"'\''")).into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_holds_commands_that_can_be_pasted() {
        let addresses = ["[::1]:7".parse().unwrap(), "unix:/run/my nbd.sock".parse().unwrap()];
        let line = line(&[], &addresses, false, Path::new("/run/a'b.sock"));
        for part in [
            "ready: 0 exports, 0 failed; ",
            "NBD on nbd://[::1]:7/ nbd+unix:///?socket=/run/my nbd.sock; ",
            r"curl --unix-socket '/run/a'\''b.sock' http://localhost/v1/exports/create",
            r#"-d '{"export_id":"vm-1","size":1073741824}'"#,
            "nbd-client -N vm-1 ::1 7 /dev/nbd0",
            "nbdcopy disk.img nbd://[::1]:7/vm-1",
        ] {
            assert!(line.contains(part), "{part}\n{line}");
        }
        assert!(!line.contains('\n'));
        assert_eq!(
            attach(Scheme::Nbd, &addresses[1]),
            "attach it: nbd-client -N vm-1 -unix '/run/my nbd.sock' /dev/nbd0, or copy into it: \
             nbdcopy disk.img 'nbd+unix:///vm-1?socket=/run/my nbd.sock'"
        );
    }

    #[test]
    fn where_tls_is_required_the_line_shows_uris_that_ask_for_it() {
        let addresses = ["[::1]:7".parse().unwrap(), "unix:/n.sock".parse().unwrap()];
        let line = line(&[], &addresses, true, Path::new("/a.sock"));
        assert!(line.contains("NBD on nbds://[::1]:7/ nbds+unix:///?socket=/n.sock; "), "{line}");
        assert!(
            line.ends_with("; copy into it: nbdcopy disk.img 'nbds://[::1]:7/vm-1?tls-certificates=DIR'"),
            "{line}"
        );
        assert!(attach(Scheme::Nbds, &addresses[1]).ends_with("?socket=/n.sock&tls-certificates=DIR'"));
    }
}
