//! `import`: a disk image becomes a new export, straight in the store; no server and no cache take part.
//!
//! The file is read once, its holes are skipped, and runs of zeros of a whole chunk are not stored. What cannot be read
//! twice or is not raw becomes a temporary sparse file first; what is no disk (`recognize.rs`) is refused. Nothing is left of an import that fails or is cancelled,
//! neither in the store nor of the temporary file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream;
use rustix::io::Errno;
use serde_json::json;
use tempfile::NamedTempFile;

use super::interrupt::Interrupts;
use super::progress::Progress;
use super::recognize::{HEAD_BYTES, Kind, TAIL_BYTES, recognize};
use super::{CliError, convert, size};
use crate::cache;
use crate::config::{Storage, Surroundings, chunk_bytes};
use crate::server::Offline;
use crate::units::{ChunkIndex, DEFAULT_CHUNK_BYTES, ExportId, Geometry};
use crate::volume::registry::{ExportError, Published};

/// How much of a stream is looked at for zeros at a time.
const SPOOL_BYTES: usize = 64 << 10;

/// The flags of `import`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "The export must not exist yet. A running server does not notice it by itself: `nbd-server export open NAME` loads it there.

Examples:
  nbd-server import disk.img vm-3
  nbd-server export open vm-3
  nbd-server import disk.qcow2 vm-4
  gzip -dc disk.img.gz | nbd-server import - vm-5"
)]
pub struct Import {
    /// The image, a file or a block device; - or a FIFO is read to its end, and must be raw
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Name of the new export
    #[arg(value_name = "NAME")]
    name: ExportId,
    /// Format of the image, such as raw, qcow2, vmdk, vdi, vhdx; all but raw need qemu-img [default: what its content says]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Unit of fetching and publishing: a power of two from 4KiB to 64MiB
    #[arg(long, value_name = "BYTES", env = "NBD_SERVER_CHUNK_SIZE", value_parser = chunk_bytes,
          default_value_t = DEFAULT_CHUNK_BYTES)]
    chunk_size: u64,
    /// Directory for the temporary raw file that stdin and other formats need
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/var/tmp")]
    temp_dir: PathBuf,
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

impl Import {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        let store = Offline::connect(&self.storage.check(surroundings)?)?;
        let mut interrupts = Interrupts::listen()?;
        // Lives until the image is stored.
        let (path, _temporary) = tokio::select! {
            biased;
            () = interrupts.next() => return Err(self.cancelled()),
            raw = self.raw(&store) => raw?,
        };
        let read = |what: &str| format!("{} cannot be {what}", path.display());
        let file = File::open(&path).map_err(|source| CliError::Io { what: read("opened"), source })?;
        let len = (&file).seek(SeekFrom::End(0)).map_err(|source| CliError::Io { what: read("measured"), source })?;
        let geometry = Geometry::new(len, self.chunk_size)
            .map_err(|e| CliError::Image(format!("{} cannot become an export: {e}", self.file.display())))?;
        let published = self.store(&store, file, geometry, interrupts.next()).await.map_err(|e| match e {
            ExportError::Cancelled(_) => self.cancelled(),
            e => e.into(),
        })?;
        let snapshot = published.snapshot_id.map(|id| id.to_string()).unwrap_or_default();
        Ok(if self.json {
            let answer = json!({
                "export_id": self.name, "image_size": len, "chunk_size": self.chunk_size, "snapshot_id": snapshot,
                "generation": published.generation,
            });
            format!("{answer}\n")
        } else if self.quiet {
            format!("{snapshot}\n")
        } else {
            let name = &self.name;
            let size = size::shown(len);
            format!("imported {name}, {size}, as snapshot {snapshot}; `nbd-server export open {name}` loads it\n")
        })
    }

    async fn store(
        &self,
        store: &Offline,
        file: File,
        geometry: Geometry,
        cancelled: impl Future<Output = ()> + Send,
    ) -> Result<Published, ExportError> {
        let progress = self.progress("importing", geometry.image_size());
        let file = Arc::new(file);
        let chunks = stream::unfold(Some(0), |from| {
            let (file, progress) = (Arc::clone(&file), &progress);
            async move {
                let from = from?;
                progress.reach(from);
                let read = cache::blocking_io(move || next_chunk(&file, geometry, from)).await;
                match read {
                    Ok(None) => None,
                    Ok(Some((chunk, bytes))) => {
                        let next = geometry.chunk_range(chunk).end();
                        Some((Ok((chunk, bytes)), Some(next)))
                    }
                    Err(e) => Some((Err(e), None)),
                }
            }
        });
        let services = store.services();
        let import = services.import(&self.name, geometry, chunks.boxed(), cancelled);
        progress.during_on(|| services.store.outage(), import).await
    }

    fn progress(&self, what: &'static str, total_bytes: u64) -> Progress {
        Progress::new(what, total_bytes, self.quiet || self.json)
    }

    fn cancelled(&self) -> CliError {
        CliError::Cancelled(format!("there is no export {}, as before", self.name))
    }

    /// The raw file to read, and the temporary one behind it, if there is one. The store is tried out first: before hours
    /// of reading.
    async fn raw(&self, store: &Offline) -> Result<(PathBuf, Option<NamedTempFile>), CliError> {
        if self.is_stream()? {
            if let Some(format) = self.format.as_ref().filter(|format| *format != "raw") {
                let file = self.shown();
                let text = format!("{file} can only be raw, not {format}: name a file instead");
                return Err(CliError::Unconfirmed(text));
            }
            store.probe().await?;
            let temporary = self.spooled().await?;
            return Ok((temporary.path().to_owned(), Some(temporary)));
        }
        let format = match (&self.format, self.kind()?) {
            (Some(format), _) => format.as_str(),
            (None, Kind::Raw) => "raw",
            (None, Kind::Image(format)) => format,
            (None, Kind::Foreign { what, remedy }) => return Err(self.foreign(what, remedy)),
        };
        store.probe().await?;
        if format == "raw" {
            return Ok((self.file.clone(), None));
        }
        let info = convert::info(&self.file, format).await?;
        if self.format.is_none() {
            convert::refuse_references(&self.file, format, &info)?;
        }
        let temporary = self.temporary()?;
        let progress = self.progress("converting", convert::virtual_bytes(&info));
        convert::to_raw(&self.file, format, temporary.path(), &progress).await?;
        Ok((temporary.path().to_owned(), Some(temporary)))
    }

    /// Whether the image can be read only once, from its start to its end.
    fn is_stream(&self) -> Result<bool, CliError> {
        if self.file == Path::new("-") {
            return Ok(true);
        }
        let found = self.file.metadata().map_err(|source| self.unreadable(source))?.file_type();
        if found.is_file() || found.is_block_device() || found.is_fifo() {
            return Ok(found.is_fifo());
        }
        let text = format!("{} is neither a file nor a block device: name one; - reads from stdin", self.shown());
        Err(CliError::Unconfirmed(text))
    }

    /// What a file is.
    fn kind(&self) -> Result<Kind, CliError> {
        File::open(&self.file).and_then(|file| kind_of(&file)).map_err(|source| self.unreadable(source))
    }

    /// A stream as a sparse file. One that is not raw is refused as early as its bytes say so.
    async fn spooled(&self) -> Result<NamedTempFile, CliError> {
        let temporary = self.temporary()?;
        let what = || format!("{} could not be copied into {}", self.shown(), self.temp_dir.display());
        let failed = |source| CliError::Io { what: what(), source };
        let to = temporary.as_file().try_clone().map_err(failed)?;
        let is_stdin = self.file == Path::new("-");
        let progress = self.progress(if is_stdin { "reading stdin" } else { "reading" }, 0);
        let path = self.file.clone();
        let begun = cache::blocking_io(move || {
            let mut from: Box<dyn Read + Send> =
                if is_stdin { Box::new(io::stdin()) } else { Box::new(File::open(path)?) };
            let mut head = Vec::new();
            from.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
            Ok::<_, io::Error>((head, from))
        });
        let (head, rest) = progress.during(begun).await.map_err(failed)?;
        self.must_be_raw(recognize(&head, &[]))?;
        progress.during(spool(io::Cursor::new(head).chain(rest), to, &progress)).await.map_err(failed)?;
        self.must_be_raw(kind_of(temporary.as_file()).map_err(failed)?)?;
        Ok(temporary)
    }

    /// Refuses a stream that is known to be no raw disk, unless its bytes are to be taken as they are.
    fn must_be_raw(&self, kind: Kind) -> Result<(), CliError> {
        match kind {
            _ if self.format.is_some() => Ok(()),
            Kind::Raw => Ok(()),
            Kind::Image(format) => Err(CliError::Unconfirmed(format!(
                "{} is an image in the format {format}, but can only be raw: save it to a file and name a file instead; \
                 or add --format raw if these very bytes are the disk",
                self.shown()
            ))),
            Kind::Foreign { what, remedy } => Err(self.foreign(what, remedy)),
        }
    }

    fn foreign(&self, what: &str, remedy: &str) -> CliError {
        let file = self.shown();
        let text =
            format!("{file} is {what}, no disk image: {remedy}; or add --format raw if these very bytes are the disk");
        CliError::Unconfirmed(text)
    }

    fn unreadable(&self, source: io::Error) -> CliError {
        CliError::Io { what: format!("{} cannot be read", self.shown()), source }
    }

    fn shown(&self) -> String {
        if self.file == Path::new("-") { "stdin".into() } else { self.file.display().to_string() }
    }

    fn temporary(&self) -> Result<NamedTempFile, CliError> {
        let what = format!("no temporary file can be made in --temp-dir {}", self.temp_dir.display());
        NamedTempFile::with_prefix_in("nbd-server-", &self.temp_dir).map_err(|source| CliError::Io { what, source })
    }
}

/// What a file is by its first and last bytes, as many of them as there are.
fn kind_of(mut file: &File) -> io::Result<Kind> {
    let len = file.seek(SeekFrom::End(0))?;
    let part = |from: u64, most: usize| {
        let mut part = vec![0; usize::try_from(len - from).map_or(most, |left| left.min(most))];
        file.read_exact_at(&mut part, from).map(|()| part)
    };
    Ok(recognize(&part(0, HEAD_BYTES)?, &part(len.saturating_sub(TAIL_BYTES as u64), TAIL_BYTES)?))
}

/// A stream as a sparse file. Whoever writes it may take its time, so this can be given up in the middle: the thread that
/// waits then holds nothing but the two.
async fn spool(from: impl Read + Send + 'static, to: File, progress: &Progress) -> io::Result<()> {
    let mut spool = Spool { from, to, buf: vec![0; SPOOL_BYTES], len: 0 };
    loop {
        let (same, more) = cache::blocking_io(move || spool.step().map(|more| (spool, more))).await?;
        progress.reach(same.len);
        if !more {
            return Ok(());
        }
        spool = same;
    }
}

/// A stream on its way into a file.
struct Spool<R> {
    from: R,
    to: File,
    buf: Vec<u8>,
    len: u64,
}

impl<R: Read> Spool<R> {
    /// Copies the next bytes; whether there may be more.
    fn step(&mut self) -> io::Result<bool> {
        let mut filled = 0;
        while filled < self.buf.len() {
            match self.from.read(&mut self.buf[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        let piece = &self.buf[..filled];
        if piece.iter().any(|byte| *byte != 0) {
            self.to.write_all_at(piece, self.len)?;
        }
        self.len += filled as u64;
        if filled < self.buf.len() {
            self.to.set_len(self.len)?;
        }
        Ok(filled == self.buf.len())
    }
}

/// The first chunk at or after a boundary of chunks that holds data, with its bytes.
fn next_chunk(file: &File, geometry: Geometry, from: u64) -> io::Result<Option<(ChunkIndex, Bytes)>> {
    if from >= geometry.image_size() {
        return Ok(None);
    }
    let data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(from)) {
        Ok(data) => data,
        Err(Errno::NXIO) => return Ok(None),
        // The file system knows nothing of holes: all is data.
        Err(_) => from,
    };
    // What a file that grows got since it was measured is not of the image.
    if data >= geometry.image_size() {
        return Ok(None);
    }
    let index = u32::try_from(data / geometry.chunk_size()).map_err(io::Error::other)?;
    let range = geometry.chunk_range(ChunkIndex(index));
    let mut buf = vec![0; usize::try_from(range.len()).map_err(io::Error::other)?];
    file.read_exact_at(&mut buf, range.offset())?;
    Ok(Some((ChunkIndex(index), buf.into())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_stream_becomes_the_same_file_with_its_zeros_as_holes() {
        let mut image = vec![0; 3 * SPOOL_BYTES + 5];
        image[SPOOL_BYTES + 1] = 7;
        let mut file = tempfile::tempfile().unwrap();
        let from = io::Cursor::new(image.clone());
        spool(from, file.try_clone().unwrap(), &Progress::new("", 0, true)).await.unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 <= 2 * SPOOL_BYTES as u64);
        file.rewind().unwrap();
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert!(read == image);
    }

    #[test]
    fn holes_are_skipped_and_every_chunk_with_data_is_found() {
        let file = tempfile::tempfile().unwrap();
        let geometry = Geometry::new((1 << 20) + 100, 65_536).unwrap();
        file.set_len(geometry.image_size()).unwrap();
        file.write_all_at(b"x", 3 * 65_536 + 9).unwrap();
        file.write_all_at(b"y", (1 << 20) + 99).unwrap();
        let (mut from, mut found) = (0, Vec::new());
        while let Some((chunk, bytes)) = next_chunk(&file, geometry, from).unwrap() {
            from = geometry.chunk_range(chunk).end();
            if bytes.iter().any(|byte| *byte != 0) {
                found.push((chunk.0, bytes.len()));
            }
        }
        assert_eq!(found, [(3, 65_536), (16, 100)]);
    }

    #[test]
    fn what_a_file_grew_by_since_it_was_measured_is_not_of_the_image() {
        let file = tempfile::tempfile().unwrap();
        let geometry = Geometry::new(2 * 65_536 + 100, 65_536).unwrap();
        for grown in [2 * 65_536 + 4096, 7 * 65_536] {
            file.set_len(geometry.image_size()).unwrap();
            file.write_all_at(b"x", grown).unwrap();
            let mut from = 0;
            while let Some((chunk, bytes)) = next_chunk(&file, geometry, from).unwrap() {
                assert!(geometry.chunk_range(chunk).end() <= geometry.image_size());
                assert!(bytes.iter().all(|byte| *byte == 0));
                from = geometry.chunk_range(chunk).end();
            }
            file.set_len(0).unwrap();
        }
    }
}
