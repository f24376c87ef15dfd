//! A directory as an object store, with the promises of S3: whole objects or none, atomic conditional writes among
//! all servers that share the directory, and durability before the answer.
//!
//! An object is the plain file `<root>/<key>`, so any tool can read and copy the store. Names at the root that start
//! with a dot are the store's own (`.tmp`, `.lock`) and never objects. What differs from S3: `a` and `a/b` cannot both
//! be objects, and a segment of a key is 255 bytes at most. The directory must be one file system. Its path may go through
//! links; nothing below it may. Files and folders are made for their owner alone.
//!
//! A write goes tmp file → fsync → lock, compare, rename, fsync of the directory → answer; `local/folder.rs` has the details.
//! Everything here blocks, so everything runs on the blocking threads; calls are bounded by the kernel's own patience
//! with the disk, waiting for the lock by [`LOCK_PATIENCE`].

mod beneath;
mod folder;
mod tmp;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::task::JoinError;

use super::retry::Request;
use super::{Body, Condition, Key, Object, Store, StoreError, Version};
use crate::background::Background;
use crate::clock::Clock;
use crate::units::ByteRange;
pub use folder::LOCK_PATIENCE;
use folder::{Fault, Folder};
use tmp::Tmp;

/// How many bytes of an upload are gathered for one trip to a blocking thread.
const WRITE_BATCH_BYTES: u64 = 1 << 20;

/// An object store in a local directory.
#[derive(Debug, Clone)]
pub struct LocalStore {
    folder: Arc<Folder>,
    background: Background,
}

impl LocalStore {
    /// Opens the store at `root`, creating the directory if it is not there, and removes what dead writers left.
    ///
    /// # Errors
    /// The I/O error, with the path it is about, if the directory cannot be created, read or written.
    pub fn open(root: PathBuf, clock: Arc<dyn Clock>) -> io::Result<Self> {
        let folder = Folder::open(root.clone(), clock).map_err(|fault| {
            let e = match fault {
                Fault::Io(e) => e,
                Fault::Forbidden(reason) => io::Error::new(io::ErrorKind::InvalidInput, reason),
                other => io::Error::other(format!("{other:?}")),
            };
            io::Error::new(e.kind(), format!("cannot use {} as an object store: {e}", root.display()))
        })?;
        Ok(Self { folder: Arc::new(folder), background: Background::default() })
    }

    /// The same with threads of their own for uploads.
    #[must_use]
    pub fn with_background(self, background: Background) -> Self {
        Self { background, ..self }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        request: Request<'_>,
        work: impl FnOnce(&Folder) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let folder = Arc::clone(&self.folder);
        answer(request, tokio::task::spawn_blocking(move || work(&folder)).await)
    }

    /// Moves the pieces of a body into a tmp file.
    async fn receive(&self, request: Request<'_>, max_bytes: u64, mut body: Body<'_>) -> Result<Tmp, StoreError> {
        let mut tmp = self.blocking(request, |folder| folder.tmp().map(Tmp::for_blob)).await?;
        let mut total = 0;
        let mut batch = Vec::new();
        let mut batch_bytes = 0;
        loop {
            let piece = body.next().await;
            let ended = piece.is_none();
            if let Some(piece) = piece {
                let piece = piece.map_err(|source| StoreError::Body { key: request.key.clone(), source })?;
                batch_bytes += piece.len() as u64;
                total += piece.len() as u64;
                if total > max_bytes {
                    return Err(StoreError::TooLarge { key: request.key.clone(), max_bytes });
                }
                batch.push(piece);
            }
            if ended || batch_bytes >= WRITE_BATCH_BYTES {
                let pieces = std::mem::take(&mut batch);
                batch_bytes = 0;
                tmp = answer(request, self.background.spawn(move || tmp.append(&pieces)).await)?;
            }
            if ended {
                return Ok(tmp);
            }
        }
    }
}

/// What the caller of the store is told of work that has ended.
fn answer<T>(request: Request<'_>, ended: Result<Result<T, Fault>, JoinError>) -> Result<T, StoreError> {
    match ended {
        Ok(outcome) => outcome.map_err(|fault| translate(fault, request)),
        Err(lost) => Err(request.unavailable(lost)),
    }
}

/// What a fault of the folder means to the caller of the store.
fn translate(fault: Fault, request: Request<'_>) -> StoreError {
    match fault {
        Fault::Missing => StoreError::NotFound { key: request.key.clone() },
        Fault::Changed => StoreError::Conflict { key: request.key.clone() },
        Fault::TooLarge { max_bytes } => StoreError::TooLarge { key: request.key.clone(), max_bytes },
        Fault::Short(reason) => request.short(reason),
        Fault::Forbidden(reason) => request.refused(reason),
        Fault::Io(e) => match e.kind() {
            // What no later attempt will find changed. A full or failing disk is not among these.
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::InvalidFilename
            | io::ErrorKind::CrossesDevices => request.refused(e),
            _ => request.unavailable(e),
        },
    }
}

#[async_trait::async_trait]
impl Store for LocalStore {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        let at = key.clone();
        self.blocking(Request { operation: "get", key }, move |folder| folder.read(&at, max_bytes)).await
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        let at = key.clone();
        self.blocking(Request { operation: "get", key }, move |folder| folder.read_range(&at, range)).await
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        let at = key.clone();
        self.blocking(Request { operation: "head", key }, move |folder| folder.len(&at)).await
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        let at = key.clone();
        self.blocking(Request { operation: "put", key }, move |folder| {
            let tmp = folder.tmp()?.append(&[bytes])?;
            folder.commit(tmp, &at, &condition)
        })
        .await
    }

    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
        let request = Request { operation: "upload", key };
        let tmp = self.receive(request, max_bytes, body).await?;
        // Synced once before the lock is taken, so that nobody waits for a gigabyte.
        let tmp = answer(request, self.background.spawn(move || tmp.sync()).await)?;
        let at = key.clone();
        self.blocking(request, move |folder| folder.commit(tmp, &at, &Condition::Always).map(drop)).await
    }

    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        let at = prefix.clone();
        self.blocking(Request { operation: "list", key: prefix }, move |folder| folder.list(&at)).await
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        let at = prefix.clone();
        self.blocking(Request { operation: "list", key: prefix }, move |folder| folder.list_folders(&at)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let at = key.clone();
        self.blocking(Request { operation: "delete", key }, move |folder| folder.remove(&at)).await
    }
}

#[cfg(test)]
mod tests;
