//! Token files without the white space at their ends.
//!
//! The client library sends a token file as it stands, and panics on one that ends in a line break, as an editor or `echo`
//! leaves it. So it gets a copy without, in a file that has no name, renewed before each use: tokens are exchanged while the
//! server runs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use object_store::CredentialProvider;
use parking_lot::Mutex;

/// A copy of the token in a file.
#[derive(Debug)]
pub(super) struct Copy {
    source: String,
    file: File,
    written: Mutex<String>,
    /// Whether the last attempt to renew it failed.
    is_stale: AtomicBool,
}

impl Copy {
    /// Renews it, or keeps it if the file cannot be read or holds no token right now: what was lent for it may still be valid,
    /// and the service that lends says if not.
    fn renew_or_keep(&self) {
        let renewed = self.renew();
        let was_stale = self.is_stale.swap(renewed.is_err(), Ordering::Relaxed);
        if let (Err(reason), false) = (renewed, was_stale) {
            tracing::warn!("{reason}; the token that it held before stays in use");
        }
    }

    fn renew(&self) -> Result<(), String> {
        let token = read_token(&self.source).map_err(|reason| format!("token file {}: {reason}", self.source))?;
        let mut written = self.written.lock();
        if *written != token {
            self.file.write_all_at(token.as_bytes(), 0).map_err(|e| e.to_string())?;
            self.file.set_len(token.len() as u64).map_err(|e| e.to_string())?;
            *written = token;
        }
        Ok(())
    }
}

fn failed(source: impl Into<crate::store::BoxError>) -> object_store::Error {
    object_store::Error::Generic { store: "credentials", source: source.into() }
}

/// The path of a copy of a token file.
pub(super) fn trimmed(source: String, copies: &mut Vec<Copy>) -> object_store::Result<String> {
    let copy = Copy {
        source,
        file: tempfile::tempfile().map_err(failed)?,
        written: Mutex::default(),
        is_stale: AtomicBool::new(false),
    };
    copy.renew().map_err(failed)?;
    let path = format!("/proc/self/fd/{}", copy.file.as_raw_fd());
    copies.push(copy);
    Ok(path)
}

/// Credentials of the client library, which reads the copies.
#[derive(Debug)]
pub(super) struct Trimmed<C> {
    inner: Arc<dyn CredentialProvider<Credential = C>>,
    copies: Vec<Copy>,
}

impl<C> Trimmed<C> {
    pub(super) fn new(inner: Arc<dyn CredentialProvider<Credential = C>>, copies: Vec<Copy>) -> Self {
        Self { inner, copies }
    }
}

#[async_trait::async_trait]
impl<C: std::fmt::Debug + Send + Sync> CredentialProvider for Trimmed<C> {
    type Credential = C;

    async fn get_credential(&self) -> object_store::Result<Arc<C>> {
        self.copies.iter().for_each(Copy::renew_or_keep);
        self.inner.get_credential().await
    }
}

/// The token in a file, without the white space around it.
pub(super) fn read_token(path: &str) -> Result<String, String> {
    let file = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let token = file.trim();
    match token.bytes().all(|c| c.is_ascii_graphic()) && !token.is_empty() {
        true => Ok(token.to_owned()),
        false => Err("it is empty, or holds white space or characters that no token has".to_owned()),
    }
}
