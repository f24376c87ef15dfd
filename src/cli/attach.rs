//! `attach-command`: lines to paste, for the clients that people have.

use clap::Args;
use serde_json::Value;

use super::{CliError, Common};
use crate::config::Surroundings;
use crate::server::quoted;
use crate::units::ExportId;

/// The flags of `attach-command`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server attach-command vm-1
  nbdinfo $(nbd-server attach-command vm-1 -q)")]
pub struct AttachCommand {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

impl AttachCommand {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        let Self { name, common } = self;
        let client = common.client(surroundings)?;
        // An export that cannot be served cannot be attached: its refusal says why.
        client.get(&format!("/v1/exports/{name}/status")).await?;
        let status = client.get("/v1/status").await?;
        let bases = status["listen"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let targets: Vec<Target> = bases.filter_map(|base| Target::parse(base, &name)).collect();
        let uris: Vec<&str> = targets.iter().map(|target| target.uri.as_str()).collect();
        let answer = Value::from(targets.iter().map(Target::json).collect::<Vec<_>>());
        Ok(common.show(&answer, &uris, || targets.iter().map(Target::lines).collect::<Vec<_>>().join("\n")))
    }
}

/// One address of the server, with an export.
#[derive(Debug)]
struct Target {
    uri: String,
    /// How `nbd-client` names the place; it has no URI.
    place: String,
    name: String,
    tls: bool,
}

impl Target {
    /// From the server's own URI, such as `nbd://127.0.0.1:10809/` or `nbd+unix:///?socket=/run/nbd.sock`.
    fn parse(base: &str, name: &ExportId) -> Option<Self> {
        let (scheme, rest) = base.split_once("://")?;
        let tls = scheme.starts_with("nbds");
        let (authority, query) = rest.split_once('/')?;
        let (place, mut uri) = match query.strip_prefix("?socket=") {
            Some(path) => (format!("-unix {}", quoted(path)), format!("{scheme}:///{name}?socket={path}")),
            None => {
                let (host, port) = authority.rsplit_once(':')?;
                let host = host.trim_start_matches('[').trim_end_matches(']');
                (format!("{host} {port}"), format!("{scheme}://{authority}/{name}"))
            }
        };
        if tls {
            uri = format!("{uri}{}tls-certificates=DIR", if uri.contains('?') { '&' } else { '?' });
        }
        Some(Self { uri, place, name: name.to_string(), tls })
    }

    /// `None` where TLS is required: the kernel's client does it through a helper of its own, if it can at all.
    fn nbd_client(&self) -> Option<String> {
        (!self.tls).then(|| format!("nbd-client -N {} {} /dev/nbd0", self.name, self.place))
    }

    fn qemu(&self) -> Option<String> {
        // A comma would end the value of the option.
        let file = self.uri.replace(',', ",,");
        (!self.tls)
            .then(|| format!("qemu-system-x86_64 -drive {}", quoted(&format!("file={file},format=raw,if=virtio"))))
    }

    fn libnbd(&self) -> String {
        format!("nbdinfo {}", quoted(&self.uri))
    }

    fn lines(&self) -> String {
        let lines = [
            self.nbd_client().map(|line| format!("# a kernel device, as root\n{line}\n")),
            self.qemu().map(|line| format!("# a virtual machine\n{line}\n")),
            Some(format!("# libnbd's tools\n{}\n", self.libnbd())),
        ];
        lines.into_iter().flatten().collect()
    }

    fn json(&self) -> Value {
        serde_json::json!({
            "uri": self.uri, "nbd_client": self.nbd_client(), "qemu": self.qemu(), "libnbd": self.libnbd(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(base: &str) -> Target {
        Target::parse(base, &"vm-1".parse().unwrap()).unwrap()
    }

    #[test]
    fn each_kind_of_address_gives_lines_that_can_be_pasted() {
        let tcp = target("nbd://[::1]:10809/");
        assert_eq!(tcp.nbd_client().unwrap(), "nbd-client -N vm-1 ::1 10809 /dev/nbd0");
        assert_eq!(tcp.qemu().unwrap(), "qemu-system-x86_64 -drive file=nbd://[::1]:10809/vm-1,format=raw,if=virtio");
        let unix = target("nbd+unix:///?socket=/run/a b,c.sock");
        assert_eq!(unix.nbd_client().unwrap(), "nbd-client -N vm-1 -unix '/run/a b,c.sock' /dev/nbd0");
        assert_eq!(unix.libnbd(), "nbdinfo 'nbd+unix:///vm-1?socket=/run/a b,c.sock'");
        assert!(unix.qemu().unwrap().contains("a b,,c.sock,format=raw"));
    }

    #[test]
    fn where_tls_is_required_only_lines_with_tls_are_shown() {
        let tls = target("nbds://10.0.0.1:10809/");
        assert_eq!(tls.lines().lines().last(), Some("nbdinfo 'nbds://10.0.0.1:10809/vm-1?tls-certificates=DIR'"));
        assert!(!tls.lines().contains("nbd-client"));
    }
}
