//! `export-image`: a published image becomes a file, straight from the store; no server takes part.
//!
//! Every chunk is checked against its hash. A file appears under its name only when it is whole and on the disk; what a
//! failure or a cancellation leaves is a temporary file that is removed. A block device is written over if the image fits;
//! nothing else that is no file is touched.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::json;
use tempfile::NamedTempFile;

use super::interrupt::Interrupts;
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
#[command(after_long_help = "Examples:
  # a backup of the newest snapshot, with holes where there are zeros
  nbd-server export-image vm-1 backup.img
  # one snapshot, for another hypervisor
  nbd-server export-image vm-1@$(nbd-server snapshot list vm-1 -q | tail -n 1) old.qcow2 --format qcow2
  nbd-server export-image vm-1 - | gzip > backup.img.gz")]
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
    /// Replace a file that exists, or write over a block device
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print the snapshot's id alone, and no progress
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
        let target = self.target()?;
        // Nothing is written to the store, so it is not probed: credentials that may only read are enough.
        let store = Offline::connect(&self.storage.check(surroundings)?)?;
        let mut interrupts = Interrupts::listen()?;
        let image = tokio::select! {
            biased;
            () = interrupts.next() => return Err(self.cancelled(target)),
            copied = self.copy(&store, target) => copied?,
        };
        let (snapshot, bytes) = (image.snapshot(), image.geometry().image_size());
        let (name, file) = (&self.source.name, self.file.display());
        Ok(if target == Target::Stdout {
            String::new()
        } else if self.json {
            let answer = json!({
                "export_id": name, "snapshot_id": snapshot.to_string(), "image_size": bytes, "format": self.format,
                "file": self.file.to_string_lossy(),
            });
            format!("{answer}\n")
        } else if self.quiet {
            format!("{snapshot}\n")
        } else {
            format!("wrote {file}, {} of {name} as of snapshot {snapshot}\n", size::shown(bytes))
        })
    }

    /// Where it goes, if it may.
    fn target(&self) -> Result<Target, CliError> {
        let refused = |text: String| Err(CliError::Unconfirmed(text));
        if self.file == Path::new("-") {
            return match (self.format.as_str(), self.json) {
                ("raw", false) => Ok(Target::Stdout),
                ("raw", true) => refused("stdout carries the image, so there is no place for --json: drop it".into()),
                (format, _) => refused(format!("stdout can only be raw, not {format}: name a file instead")),
            };
        }
        let file = self.file.display();
        // Links are followed: what counts is what they lead to.
        let target = match self.file.metadata().map(|found| found.file_type()) {
            Ok(kind) if kind.is_block_device() && self.format != "raw" => {
                return refused("a block device can only become raw: name a file instead".into());
            }
            Ok(kind) if kind.is_block_device() => Target::Device,
            Ok(kind) if !kind.is_file() => {
                return refused(format!("{file} is neither a file nor a block device: name one; - writes to stdout"));
            }
            _ => Target::File,
        };
        if !self.force && self.file.symlink_metadata().is_ok() {
            return refused(format!("{file} exists: add --force to replace it, or choose another name"));
        }
        Ok(target)
    }

    fn cancelled(&self, target: Target) -> CliError {
        let file = self.file.display();
        CliError::Cancelled(match target {
            Target::Stdout => "what went to stdout is not the whole image".into(),
            Target::Device => format!("{file} holds a part of the image"),
            Target::File => format!("{file} is as it was before"),
        })
    }

    async fn copy(&self, store: &Offline, target: Target) -> Result<Arc<Image>, CliError> {
        let image = Arc::new(Image::find(store.services(), &self.source.name, self.source.snapshot).await?);
        match target {
            Target::Stdout => self.stream_out(&image, io::stdout()).await?,
            Target::Device => {
                let device = self.device(image.geometry().image_size())?;
                let written = device.try_clone().map_err(|e| self.io(e))?;
                self.stream_out(&image, written).await?;
                device.sync_all().map_err(|e| self.io(e))?;
            }
            Target::File => self.write_file(&image).await?,
        }
        Ok(image)
    }

    /// The device, if so much fits: half an image in place of what was there would help nobody.
    fn device(&self, image_bytes: u64) -> Result<File, CliError> {
        let mut device = File::options().write(true).open(&self.file).map_err(|e| self.io(e))?;
        let device_bytes = device.seek(SeekFrom::End(0)).map_err(|e| self.io(e))?;
        device.rewind().map_err(|e| self.io(e))?;
        if device_bytes < image_bytes {
            let (file, sizes) = (self.file.display(), format!("{device_bytes} bytes, the image {image_bytes}"));
            return Err(CliError::Image(format!("{file} has {sizes}: choose a larger device; nothing was written")));
        }
        Ok(device)
    }

    async fn write_file(&self, image: &Arc<Image>) -> Result<(), CliError> {
        let raw = self.temporary()?;
        let file = raw.as_file().try_clone().map_err(|e| self.io(e))?;
        let progress = self.progress("exporting", image);
        progress.during(sparse(image, file, &progress)).await.map_err(|e| self.failed(e))?;
        drop(progress);
        let whole = if self.format == "raw" {
            raw
        } else {
            let converted = self.temporary()?;
            let progress = self.progress("converting", image);
            convert::from_raw(raw.path(), &self.format, converted.path(), &progress).await?;
            converted
        };
        // Reopened by name: another program may have put a new file there.
        File::open(whole.path()).and_then(|file| file.sync_all()).map_err(|e| self.io(e))?;
        let kept = if self.force { whole.persist(&self.file) } else { whole.persist_noclobber(&self.file) };
        kept.map_err(|e| self.io(e.error))?;
        File::open(self.folder()).and_then(|folder| folder.sync_all()).map_err(|e| self.io(e))
    }

    fn progress(&self, what: &'static str, image: &Image) -> Progress {
        Progress::new(what, image.geometry().image_size(), self.quiet || self.json)
    }

    /// Every byte from first to last.
    async fn stream_out(&self, image: &Arc<Image>, to: impl Write + Send + 'static) -> Result<(), CliError> {
        let progress = self.progress("exporting", image);
        progress.during(stream_out(image, to, &progress)).await.map_err(|e| self.failed(e))
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

/// Where an image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A new file, or one in place of another.
    File,
    /// A device that is written over.
    Device,
    /// Whoever reads it.
    Stdout,
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
async fn sparse(image: &Arc<Image>, file: File, progress: &Progress) -> Result<(), Failure> {
    let geometry = image.geometry();
    file.set_len(geometry.image_size())?;
    let file = Arc::new(file);
    let mut chunks = std::pin::pin!(data(image));
    while let Some((chunk, bytes)) = chunks.try_next().await? {
        let (file, range) = (Arc::clone(&file), geometry.chunk_range(chunk));
        cache::blocking_io(move || file.write_all_at(&bytes, range.offset())).await?;
        progress.reach(range.end());
    }
    Ok(())
}

async fn stream_out(image: &Arc<Image>, to: impl Write + Send + 'static, progress: &Progress) -> Result<(), Failure> {
    let geometry = image.geometry();
    let zeros = Bytes::from(vec![0; usize::try_from(geometry.chunk_size()).map_err(io::Error::other)?]);
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
