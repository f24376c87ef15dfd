//! Writing `cache.meta`: marks appended to the log, seals, and whole-file checkpoints.
//!
//! A file that another life of the server wrote is never appended to: the first change after opening writes a fresh
//! checkpoint, which also clears the clean-stop seal and cuts off a torn tail. Whole-file replacement is
//! tmp → sync → rename → sync of the directory, so that a crash finds the old file or the new one.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::meta::{self, Header, Record};
use super::states::{ChunkState, Content};
use crate::disk::{Disk, DiskFile};
use crate::units::ChunkIndex;

/// The file's name in the export's cache folder.
pub const META_FILE: &str = "cache.meta";
/// Where a checkpoint is written before it takes the file's place.
pub const META_STAGING: &str = "cache.meta.tmp";
/// Is there once a sync failed: this boot's page cache is no longer what was written.
pub const FAILED_FILE: &str = "cache.failed";
/// The log is folded into a new checkpoint when it has grown beyond this and beyond the checkpoint itself.
pub const LOG_FOLD_BYTES: u64 = 1 << 20;

/// The open `cache.meta` of a running server.
#[derive(Debug)]
pub struct MetaLog {
    file: Arc<dyn DiskFile>,
    epoch: u64,
    log_start: u64,
    end: u64,
    next_seq: u64,
    /// The newest record that a sync is known to have covered.
    durable: u64,
    /// The newest mark.
    last_mark: u64,
    /// The newest mark that a seal covers.
    sealed: u64,
    /// Records appended while a checkpoint is being written, to be carried over into it.
    carry: Option<Vec<Record>>,
}

/// A checkpoint that stands in its staging file, not yet in place.
#[derive(Debug)]
pub struct Staged {
    file: Arc<dyn DiskFile>,
    epoch: u64,
    len: u64,
    first_seq: u64,
}

/// Writes and syncs a checkpoint beside the current file.
pub fn stage(disk: &dyn Disk, dir: &Path, header: &Header, states: &[ChunkState]) -> io::Result<Staged> {
    let (bytes, epoch) = meta::encode_checkpoint(header, states);
    let file = disk.create(&dir.join(META_STAGING))?;
    file.write_at(&bytes, 0)?;
    file.sync()?;
    Ok(Staged { file, epoch, len: bytes.len() as u64, first_seq: header.first_seq })
}

impl Staged {
    /// Puts the checkpoint in place, durably; the log goes on behind it.
    pub fn install(self, disk: &dyn Disk, dir: &Path) -> io::Result<MetaLog> {
        disk.rename(&dir.join(META_STAGING), &dir.join(META_FILE))?;
        disk.sync_dir(dir)?;
        let before_first = self.first_seq.saturating_sub(1);
        Ok(MetaLog {
            file: self.file,
            epoch: self.epoch,
            log_start: self.len,
            end: self.len,
            next_seq: self.first_seq,
            durable: before_first,
            last_mark: before_first,
            sealed: before_first,
            carry: None,
        })
    }
}

impl MetaLog {
    /// Appends a record with a plain write: it survives the process, not yet the host.
    ///
    /// After an error nothing was appended: the place is written again by the next record.
    pub fn append(&mut self, record: Record) -> io::Result<()> {
        let bytes = record.encode(self.next_seq, self.durable, self.epoch);
        self.file.write_at(&bytes, self.end)?;
        if matches!(record, Record::Mark(..)) {
            self.last_mark = self.next_seq;
        }
        self.end += bytes.len() as u64;
        self.next_seq += 1;
        if let Some(carry) = &mut self.carry {
            carry.push(record);
        }
        Ok(())
    }

    /// Appends a chunk's mark.
    pub fn mark(&mut self, chunk: ChunkIndex, content: Content) -> io::Result<()> {
        self.append(Record::Mark(chunk, content))
    }

    /// The number that a seal covering every mark so far would name, if one is needed.
    pub fn unsealed(&self) -> Option<u64> {
        (self.last_mark > self.sealed).then_some(self.last_mark)
    }

    /// Vouches for all marks through `through`: their bytes are synced. Returns what must be synced for it to count
    /// and the token for [`sealed`](Self::sealed).
    pub fn seal(&mut self, through: u64) -> io::Result<(Arc<dyn DiskFile>, Seal)> {
        self.append(Record::Seal(through))?;
        Ok((Arc::clone(&self.file), Seal { epoch: self.epoch, through, seq: self.next_seq - 1 }))
    }

    /// The seal was synced. A seal of a file that has since been replaced says nothing of this one.
    pub fn sealed(&mut self, seal: Seal) {
        if seal.epoch == self.epoch {
            self.sealed = self.sealed.max(seal.through);
            self.durable = self.durable.max(seal.seq);
        }
    }

    /// Makes everything appended so far durable.
    pub fn sync(&mut self) -> io::Result<()> {
        self.file.sync()?;
        self.durable = self.next_seq - 1;
        Ok(())
    }

    /// Whether the log has outgrown its checkpoint.
    pub fn wants_folding(&self) -> bool {
        let log = self.end - self.log_start;
        log > LOG_FOLD_BYTES && log > self.log_start
    }

    /// From here on records go into this file and are kept for the next one; returns that one's first number.
    pub fn begin_carry(&mut self) -> u64 {
        self.carry = Some(Vec::new());
        self.next_seq
    }

    /// The checkpoint did not come about: this file goes on alone.
    pub fn end_carry(&mut self) {
        self.carry = None;
    }

    /// Writes what was appended since the checkpoint was taken behind it. An error changes nothing here.
    pub fn carry_over(&self, staged: &Staged) -> io::Result<()> {
        let carried = self.carry.as_deref().unwrap_or_default();
        if carried.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(carried.len() * meta::RECORD_BYTES);
        for (seq, record) in (staged.first_seq..).zip(carried) {
            bytes.extend_from_slice(&record.encode(seq, staged.first_seq.saturating_sub(1), staged.epoch));
        }
        staged.file.write_at(&bytes, staged.len)?;
        // A flush may have vouched for these in the old file: they must be as durable in the new one.
        staged.file.sync()
    }

    /// Replaces this file by the staged checkpoint, to which all since was [carried over](Self::carry_over).
    pub fn replace(&mut self, staged: Staged, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let carried = self.carry.take().unwrap_or_default();
        let marks = (staged.first_seq..).zip(&carried).filter(|(_, r)| matches!(r, Record::Mark(..)));
        let last_mark = marks.map(|(seq, _)| seq).last();
        let next_seq = staged.first_seq + carried.len() as u64;
        let mut new = staged.install(disk, dir)?;
        new.end += (carried.len() * meta::RECORD_BYTES) as u64;
        new.next_seq = next_seq;
        new.last_mark = last_mark.unwrap_or(new.last_mark);
        *self = new;
        Ok(())
    }

    /// The number the next record gets.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }
}

/// A seal on its way to the disk.
#[derive(Debug, Clone, Copy)]
pub struct Seal {
    epoch: u64,
    through: u64,
    seq: u64,
}
