//! TLS for NBD clients: from PEM files to sessions.
//!
//! Promises: TLS 1.2 and 1.3, nothing older; with a client CA only clients with a certificate of it get in; a reload takes
//! all files or none, so that a broken or half-copied one leaves the certificates as they were; sessions that are under
//! way keep theirs, and a session that began under the old files is not resumed under the new ones.
//! Must never: log a key or hand it on, or decide what a client may do in plaintext: that is the handshake's.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsAcceptor;

use super::handshake::TlsState;

/// The largest file that is read, in bytes: a chain of a hundred certificates has a fifth of it.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// Where certificates and keys are, and what is asked of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Whether clients without TLS are turned away.
    pub required: bool,
    /// The server's certificate, followed by those between it and its CA.
    pub cert: PathBuf,
    /// The key of that certificate.
    pub key: PathBuf,
    /// The CAs of which a client must present a certificate; `None`: clients need none.
    pub client_ca: Option<PathBuf>,
}

/// Why there is no TLS; each text names flag, file and remedy.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("{flag} {path} cannot be read ({source}): give a PEM file this user may read", path = .path.display())]
    Unreadable {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not hold what it should.
    #[error("{flag} {path} {reason}", path = .path.display())]
    Unfit {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Certificate and key do not make a pair.
    #[error("--tls-cert {cert} does not go with --tls-key {key} ({reason}): give a certificate and its own key", cert = .cert.display(), key = .key.display())]
    Unpaired {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What the TLS library said.
        reason: String,
    },
}

/// The TLS side of a server; shared by its listeners.
pub struct Tls {
    config: TlsConfig,
    current: RwLock<Arc<ServerConfig>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.config.fmt(f)
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`], naming the file that does not serve.
    pub async fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let current = RwLock::new(Arc::new(server_config(&config).await?));
        Ok(Self { config, current })
    }

    /// Reads the files again; clients that connect from now on get what is in them.
    ///
    /// # Errors
    /// [`TlsError`]; everything stays as it was.
    pub async fn reload(&self) -> Result<(), TlsError> {
        let fresh = Arc::new(server_config(&self.config).await?);
        *self.current.write() = fresh;
        Ok(())
    }

    /// The files it works with.
    #[must_use]
    pub fn config(&self) -> &TlsConfig {
        &self.config
    }

    /// What a new connection starts with.
    pub(super) fn state(&self) -> TlsState {
        if self.config.required { TlsState::Required } else { TlsState::Offered }
    }

    /// For one TLS handshake.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.current.read()).into()
    }
}

/// Sessions can be resumed within the lifetime of this configuration alone: their secrets are in its memory.
async fn server_config(files: &TlsConfig) -> Result<ServerConfig, TlsError> {
    let chain = certificates("--tls-cert", &files.cert).await?;
    let key = private_key("--tls-key", &files.key).await?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unpaired = |error: rustls::Error| TlsError::Unpaired {
        cert: files.cert.clone(),
        key: files.key.clone(),
        reason: error.to_string(),
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(unpaired)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let unfit =
                |reason: &dyn fmt::Display| unfit(CLIENT_CA, path, format!("{reason}: give the PEM file of a CA"));
            let mut roots = RootCertStore::empty();
            for ca in certificates(CLIENT_CA, path).await? {
                roots
                    .add(ca)
                    .map_err(|error| unfit(&format_args!("holds a certificate that cannot be a CA's ({error})")))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder
                .with_client_cert_verifier(verifier.map_err(|error| unfit(&format_args!("cannot be used ({error})")))?)
        }
    };
    builder.with_single_cert(chain, key).map_err(unpaired)
}

const CLIENT_CA: &str = "--tls-client-ca";

async fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(flag, path).await?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|error| unfit(flag, path, format!("is damaged ({error}): give a PEM file")))?;
    if found.is_empty() {
        return Err(unfit(flag, path, "holds no certificate: give a PEM file with BEGIN CERTIFICATE in it".to_owned()));
    }
    Ok(found)
}

async fn private_key(flag: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let pem = read(flag, path).await?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        let remedy = "give an unencrypted PEM file with BEGIN PRIVATE KEY in it";
        unfit(flag, path, format!("holds no key ({error}): {remedy}"))
    })
}

async fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Unreadable { flag, path: path.to_owned(), source };
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    let mut pem = Vec::new();
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut pem).await.map_err(unreadable)?;
    if pem.len() as u64 > MAX_PEM_BYTES {
        return Err(unfit(flag, path, format!("has more than {MAX_PEM_BYTES} bytes: give a PEM file")));
    }
    Ok(pem)
}

fn unfit(flag: &'static str, path: &Path, reason: String) -> TlsError {
    TlsError::Unfit { flag, path: path.to_owned(), reason }
}
