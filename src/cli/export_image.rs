//! `export-image`: a published image becomes a file, straight from the store; no server takes part.
//!
//! Every chunk is checked against its hash. A file appears under its name only when it is whole and on the disk; what a
//! failure leaves is a temporary file that is removed.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tempfile::NamedTempFile;

use super::progress::Progress;
use super::{CliError, convert, size};
use crate::cache;
use crate::config::{Storage, Surroundings};
use crate::server::Offline;
use crate::units::{ChunkIndex, ExportId, SnapshotId};
use crate::volume::image::Image;
use crate::volume::registry::ExportError;

/// The most bytes of chunks that are fetched ahead, unless a single chunk is larger.
const READ_AHEAD_BYTES: u64 = 64 << 20;
/// The most chunks that are fetched at a time.
const MAX_AHEAD: u64 = 16;

/// The flags of `export-image`.
#[derive(Debug, Args)]
pub struct ExportImage {
    /// The export, or one snapshot of it as NAME@SNAPSHOT [default: its newest snapshot]
    #[arg(value_name = "NAME[@SNAPSHOT]")]
    source: Source,
    /// The file to write; - writes a raw image to stdout
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Format of the file, such as raw, qcow2, vmdk, vhdx; all but raw need qemu-img
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    format: String,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The store.
    #[command(flatten)]
    pub(crate) storage: Storage,
}

/// A published image, by name.
#[derive(Debug, Clone)]
struct Source {
    name: ExportId,
    snapshot: Option<SnapshotId>,
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, snapshot) = match text.split_once('@') {
            Some((name, snapshot)) => (name, Some(snapshot.parse().map_err(|e| format!("{e}"))?)),
            None => (text, None),
        };
        Ok(Self { name: name.parse().map_err(|e| format!("{e}"))?, snapshot })
    }
}

impl ExportImage {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        let to_stdout = self.file == Path::new("-");
        if to_stdout && self.format != "raw" {
            let text = format!("stdout can only be raw, not {}: name a file instead", self.format);
            return Err(CliError::Unconfirmed(text));
        }
        let exists = !to_stdout && self.file.symlink_metadata().is_ok();
        let device = exists && self.file.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
        if exists && !self.force {
            let text = format!("{} exists: add --force to replace it, or choose another name", self.file.display());
            return Err(CliError::Unconfirmed(text));
        }
        if device && self.format != "raw" {
            return Err(CliError::Unconfirmed("a block device can only become raw: name a file instead".into()));
        }
        // Nothing is written to the store, so it is not probed: credentials that may only read are enough.
        let store = Offline::connect(&self.storage.check(surroundings)?)?;
        let image = Arc::new(Image::find(store.services(), &self.source.name, self.source.snapshot).await?);
        tokio::select! {
            done = self.copy(&image, to_stdout, device) => done?,
            Ok(()) = tokio::signal::ctrl_c() => return Err(ExportError::Cancelled(self.source.name.clone()).into()),
        }
        Ok(if self.quiet || to_stdout {
            String::new()
        } else {
            let size = size::shown(image.geometry().image_size());
            format!("wrote {} of {size} from {}\n", self.file.display(), self.source.name)
        })
    }

    async fn copy(&self, image: &Arc<Image>, to_stdout: bool, device: bool) -> Result<(), CliError> {
        let quiet = self.quiet;
        if to_stdout {
            return stream_out(image, io::stdout(), quiet).await.map_err(|e| self.failed(e));
        }
        if device {
            let opened = File::options().write(true).open(&self.file);
            let file = opened.map_err(|e| self.io(e))?;
            let written = file.try_clone().map_err(|e| self.io(e))?;
            stream_out(image, written, quiet).await.map_err(|e| self.failed(e))?;
            return file.sync_all().map_err(|e| self.io(e));
        }
        let raw = self.temporary()?;
        sparse(image, raw.as_file(), quiet).await.map_err(|e| self.failed(e))?;
        let whole = if self.format == "raw" {
            raw
        } else {
            let converted = self.temporary()?;
            convert::from_raw(raw.path(), &self.format, converted.path()).await?;
            converted
        };
        // Reopened by name: another program may have put a new file there.
        File::open(whole.path()).and_then(|file| file.sync_all()).map_err(|e| self.io(e))?;
        let kept = if self.force { whole.persist(&self.file) } else { whole.persist_noclobber(&self.file) };
        kept.map_err(|e| self.io(e.error))?;
        File::open(self.folder()).and_then(|folder| folder.sync_all()).map_err(|e| self.io(e))
    }

    fn folder(&self) -> &Path {
        self.file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Beside the file, so that it can take its name.
    fn temporary(&self) -> Result<NamedTempFile, CliError> {
        NamedTempFile::with_prefix_in(".nbd-server-", self.folder()).map_err(|e| self.io(e))
    }

    fn io(&self, source: io::Error) -> CliError {
        CliError::Io { what: format!("{} cannot be written", self.file.display()), source }
    }

    fn failed(&self, failure: Failure) -> CliError {
        match failure {
            Failure::Export(e) => e.into(),
            Failure::Io(e) => self.io(e),
        }
    }
}

/// Which of the two sides of a copy failed.
enum Failure {
    Export(ExportError),
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

fn ahead(image: &Image) -> usize {
    usize::try_from((READ_AHEAD_BYTES / image.geometry().chunk_size()).clamp(1, MAX_AHEAD)).unwrap_or(1)
}

/// The chunks that are not zeros, checked, in order. Each is fetched in a task of its own, so that one that has begun goes
/// on while the other side is slow to take what came before it: else it would run into the limits of the store.
fn data(image: &Arc<Image>) -> impl stream::Stream<Item = Result<(ChunkIndex, Bytes), Failure>> + '_ {
    stream::iter(image.data_chunks())
        .map(|chunk| {
            let image = Arc::clone(image);
            tokio::spawn(async move { (chunk, image.chunk(chunk).await) })
        })
        .buffered(ahead(image))
        .map(|joined| {
            let (chunk, fetched) = joined.map_err(io::Error::other)?;
            Ok((chunk, fetched.map_err(Failure::Export)?))
        })
}

/// A file with a hole wherever the image has zeros.
async fn sparse(image: &Arc<Image>, file: &File, quiet: bool) -> Result<(), Failure> {
    let geometry = image.geometry();
    file.set_len(geometry.image_size())?;
    let file = Arc::new(file.try_clone()?);
    let mut progress = Progress::new("exporting", geometry.image_size(), quiet);
    let mut chunks = std::pin::pin!(data(image));
    while let Some((chunk, bytes)) = chunks.try_next().await? {
        let (file, range) = (Arc::clone(&file), geometry.chunk_range(chunk));
        cache::blocking_io(move || file.write_all_at(&bytes, range.offset())).await?;
        progress.reach(range.end());
    }
    Ok(())
}

/// Every byte from first to last.
async fn stream_out(image: &Arc<Image>, to: impl Write + Send + 'static, quiet: bool) -> Result<(), Failure> {
    let geometry = image.geometry();
    let zeros = Bytes::from(vec![0; usize::try_from(geometry.chunk_size()).map_err(io::Error::other)?]);
    let mut progress = Progress::new("exporting", geometry.image_size(), quiet);
    let (mut at, mut to) = (0, to);
    let mut chunks = std::pin::pin!(data(image));
    loop {
        let next = chunks.try_next().await?;
        let until = next.as_ref().map_or(geometry.image_size(), |(chunk, _)| geometry.chunk_range(*chunk).offset());
        while at < until {
            let len = (until - at).min(geometry.chunk_size());
            to = write(to, zeros.slice(..usize::try_from(len).map_err(io::Error::other)?)).await?;
            at += len;
            progress.reach(at);
        }
        let Some((chunk, bytes)) = next else { break };
        to = write(to, bytes).await?;
        at = geometry.chunk_range(chunk).end();
        progress.reach(at);
    }
    Ok(cache::blocking_io(move || to.flush()).await?)
}

/// Whoever reads may take its time.
async fn write<W: Write + Send + 'static>(mut to: W, bytes: Bytes) -> io::Result<W> {
    cache::blocking_io(move || to.write_all(&bytes).map(|()| to)).await
}
