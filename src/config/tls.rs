//! The flags of TLS: off unless a certificate and its key are named, and never half on.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::ConfigError;
use crate::nbd::tls::TlsConfig;

/// The flags, as written.
#[derive(Debug, Args)]
pub(super) struct Flags {
    /// TLS for NBD clients
    #[arg(long, value_name = "MODE", env = "NBD_SERVER_TLS", default_value = "off")]
    tls: Mode,

    /// PEM file with the server's certificate, then those between it and its CA; read again on SIGHUP [default: none]
    #[arg(long, value_name = "FILE", env = "NBD_SERVER_TLS_CERT")]
    tls_cert: Option<PathBuf>,

    /// PEM file with the key of that certificate, not encrypted; read again on SIGHUP [default: none]
    #[arg(long, value_name = "FILE", env = "NBD_SERVER_TLS_KEY")]
    tls_key: Option<PathBuf>,

    /// PEM file with the CAs of which a client that uses TLS must present a certificate; read again on SIGHUP
    /// [default: none, clients need no certificate]
    #[arg(long, value_name = "FILE", env = "NBD_SERVER_TLS_CLIENT_CA")]
    tls_client_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// There is none
    Off,
    /// Clients may use it, or connect without
    On,
    /// Clients without it are turned away
    Required,
}

impl Flags {
    pub(super) fn check(self) -> Result<Option<TlsConfig>, ConfigError> {
        let choice = || match self.tls {
            Mode::Off => "--tls off".to_owned(),
            Mode::On => "--tls on".to_owned(),
            Mode::Required => "--tls required".to_owned(),
        };
        let (cert, key, client_ca) = (self.tls_cert, self.tls_key, self.tls_client_ca);
        if self.tls == Mode::Off {
            let flags = [("--tls-cert", cert), ("--tls-key", key), ("--tls-client-ca", client_ca)];
            return match flags.into_iter().find_map(|(flag, path)| Some((flag, path?))) {
                None => Ok(None),
                Some((flag, path)) => Err(ConfigError::Unused {
                    flag,
                    value: path.display().to_string(),
                    choice: choice(),
                    meant: "--tls on or --tls required",
                }),
            };
        }
        let missing = |flag, remedy| ConfigError::Missing { choice: choice(), flag, remedy };
        let cert = cert.ok_or_else(|| missing("--tls-cert FILE", "name a PEM file with the server's certificate"))?;
        let key = key.ok_or_else(|| missing("--tls-key FILE", "name a PEM file with the certificate's key"))?;
        Ok(Some(TlsConfig { required: self.tls == Mode::Required, cert, key, client_ca }))
    }
}
