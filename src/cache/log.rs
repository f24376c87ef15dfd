//! Writing `cache.meta`: marks appended to the log, seals, and whole-file checkpoints.
//!
//! A file that another life of the server wrote is never appended to: the first change after opening writes a fresh
//! checkpoint, which also clears the clean-stop seal and cuts off a torn tail. A checkpoint is written to the spare file,
//! synced, and changes places with `cache.meta` in one step, so that a crash finds the old file or the new one.
//!
//! **What is marked can be sealed, checkpointed and recovered on a full disk** (L7). Space is taken ahead: a mark is
//! appended only if there is room for what must follow it ([`TAIL_BYTES`]) and if the spare file can hold the checkpoint
//! of all that the log may say. So it is the write that is refused, while nothing depends on it yet. The two files swap
//! their names rather than replace each other, for space once given up may not come back.
//!
//! **What is written can be read.** Neither file becomes longer than [`MAX_META_BYTES`], beyond which none is opened: the log is
//! folded long before, whoever adds to it waits for a checkpoint that takes too long, and at last a mark is refused.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::meta::{self, HEADER_BYTES, Header, RECORD_BYTES, RUN_BYTES, Record};
use super::states::{ChunkState, Content};
use crate::disk::{Disk, DiskFile};
use crate::sabotage::{Rule, breaks};
use crate::units::{ByteRange, ChunkIndex, MAX_CHUNKS};

/// The file's name in the export's cache folder.
pub const META_FILE: &str = "cache.meta";
/// Where the next checkpoint is written. What it holds means nothing until it changes places with `cache.meta`.
pub const SPARE_FILE: &str = "cache.meta.spare";
/// Is there once a sync failed: this boot's page cache is no longer what was written.
pub const FAILED_FILE: &str = "cache.failed";
/// The log is folded into a new checkpoint when it has grown beyond this and beyond the checkpoint itself.
pub const LOG_FOLD_BYTES: u64 = 1 << 20;

const RECORD: u64 = RECORD_BYTES as u64;
/// Space for the log is taken this much at a time, in bytes: room for 512 marks.
const STEP_BYTES: u64 = 16 << 10;
/// What a mark leaves free behind it, in bytes: seals, the records of publishes, the clean stop.
const TAIL_BYTES: u64 = 4 << 10;
/// The longest checkpoint, in bytes: every chunk is a run of its own.
const MAX_CHECKPOINT_BYTES: u64 = HEADER_BYTES as u64 + MAX_CHUNKS * RUN_BYTES as u64;
/// The longest log with which a mark is taken, in bytes: as many marks as there may be chunks.
const MAX_LOG_BYTES: u64 = MAX_CHUNKS * RECORD;
/// The longest that `cache.meta` and its spare become, room included, in bytes.
pub const MAX_META_BYTES: u64 = (MAX_CHECKPOINT_BYTES + 2 * MAX_LOG_BYTES + TAIL_BYTES).next_multiple_of(STEP_BYTES);
// The log wants to be folded before it is near its limit.
const _: () = assert!(LOG_FOLD_BYTES < MAX_LOG_BYTES / 2 && MAX_CHECKPOINT_BYTES < MAX_LOG_BYTES / 2);
/// What the record of a cut needs, in bytes: itself, the one that takes it back, a seal of the last mark, the clean stop.
const CUT_ROOM: u64 = 4 * RECORD;

/// A file, and how much of it is sure to find room on the disk, in bytes from its start.
#[derive(Debug, Clone)]
pub struct Roomy {
    file: Arc<dyn DiskFile>,
    room: u64,
}

impl Roomy {
    /// A file of an earlier life: all of its length was allocated.
    pub fn found(file: Arc<dyn DiskFile>) -> io::Result<Self> {
        let room = file.len()?;
        Ok(Self { file, room })
    }

    fn spare(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        match disk.open(&dir.join(SPARE_FILE)) {
            Ok(file) => Self::found(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Ok(Self { file: disk.create(&dir.join(SPARE_FILE))?, room: 0 })
            }
            Err(e) => Err(e),
        }
    }

    /// Takes space up to byte `end`, and a step more since it will be asked for again.
    fn take_room(&mut self, end: u64) -> io::Result<()> {
        if end <= self.room {
            return Ok(());
        }
        let end = end.next_multiple_of(STEP_BYTES);
        if end > MAX_META_BYTES {
            let text = "it is as long as it may become, and was not folded";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        if let Some(more) = ByteRange::new(self.room, end - self.room) {
            self.file.allocate(more)?;
        }
        self.room = end;
        Ok(())
    }
}

/// The open `cache.meta` of a running server.
#[derive(Debug)]
pub struct MetaLog {
    here: Roomy,
    /// `None` where file names cannot be exchanged, from a checkpoint to the next mark.
    spare: Option<Roomy>,
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

/// A checkpoint that stands in the spare file, not yet in place.
#[derive(Debug)]
pub struct Staged {
    spare: Roomy,
    epoch: u64,
    len: u64,
    first_seq: u64,
}

/// Writes and syncs a checkpoint beside the current file.
pub fn stage(disk: &dyn Disk, dir: &Path, header: &Header, states: &[ChunkState]) -> io::Result<Staged> {
    let (bytes, epoch) = meta::encode_checkpoint(header, states);
    let len = bytes.len() as u64;
    let mut spare = Roomy::spare(disk, dir)?;
    spare.take_room(len + TAIL_BYTES)?;
    spare.file.write_at(&bytes, 0)?;
    if !breaks(Rule::SkipCheckpointSync) {
        spare.file.sync()?;
    }
    Ok(Staged { spare, epoch, len, first_seq: header.first_seq })
}

impl Staged {
    /// Puts the checkpoint in place, durably; the log goes on behind it. `old` is the `cache.meta` of now, if there is
    /// one: it becomes the spare file.
    pub fn install(self, disk: &dyn Disk, dir: &Path, old: Option<Roomy>) -> io::Result<MetaLog> {
        let (spare, meta) = (dir.join(SPARE_FILE), dir.join(META_FILE));
        let exchanged = old.as_ref().map(|_| disk.exchange(&spare, &meta));
        let old = match exchanged {
            Some(Err(e)) if e.kind() != io::ErrorKind::Unsupported => return Err(e),
            Some(Ok(())) => old,
            _ => {
                disk.rename(&spare, &meta)?;
                None
            }
        };
        if !breaks(Rule::SkipDirSync) {
            disk.sync_dir(dir)?;
        }
        let before_first = self.first_seq.saturating_sub(1);
        Ok(MetaLog {
            here: self.spare,
            spare: old,
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
        self.here.take_room(self.end + RECORD)?;
        self.here.file.write_at(&bytes, self.end)?;
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

    /// Appends a chunk's mark. Without room for all that depends on it, it is refused.
    pub fn mark(&mut self, disk: &dyn Disk, dir: &Path, chunk: ChunkIndex, content: Content) -> io::Result<()> {
        if !breaks(Rule::MarkWithoutRoom) {
            self.take_room_for_a_mark(disk, dir)?;
        }
        self.append(Record::Mark(chunk, content))
    }

    /// Whether a mark costs no more than a write of its record.
    pub fn takes_a_mark_at_once(&self) -> bool {
        let (log, checkpoint) = self.room_for_a_mark();
        let spare = self.spare.as_ref().is_some_and(|spare| checkpoint <= spare.room);
        log <= self.here.room && spare && !self.wants_folding()
    }

    /// How long this file and the spare one must be able to get for a mark and whatever depends on it.
    fn room_for_a_mark(&self) -> (u64, u64) {
        // A mark splits one run of equal states into three at most: 16 bytes more of a checkpoint, half of a record. Twice
        // the log is room for that and for what is appended while the checkpoint is written.
        let checkpoint = self.log_start + 2 * (self.end + RECORD - self.log_start) + TAIL_BYTES;
        (self.end + RECORD + TAIL_BYTES, checkpoint)
    }

    /// Makes sure of the space that a mark and whatever depends on it need.
    pub fn take_room_for_a_mark(&mut self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let (log, checkpoint) = self.room_for_a_mark();
        self.here.take_room(log)?;
        match &mut self.spare {
            Some(spare) => spare.take_room(checkpoint),
            none => none.insert(Roomy::spare(disk, dir)?).take_room(checkpoint),
        }
    }

    /// Takes the room that the record of a publish's beginning needs, and the one that gives it up.
    pub fn reserve_cut(&mut self) -> io::Result<()> {
        self.here.take_room(self.end + CUT_ROOM)
    }

    /// Appends the record of a publish's beginning. It is refused unless the publish can be given up, too.
    pub fn cut(&mut self) -> io::Result<()> {
        self.reserve_cut()?;
        self.append(Record::Cut)
    }

    /// The number that a seal covering every mark so far would name, if one is needed.
    pub fn unsealed(&self) -> Option<u64> {
        (self.last_mark > self.sealed).then_some(self.last_mark)
    }

    /// Vouches for all marks through `through`: their bytes are synced. It counts once it is [synced](Self::synced).
    pub fn seal(&mut self, through: u64) -> io::Result<(Arc<dyn DiskFile>, Unsynced)> {
        self.append(Record::Seal(through))?;
        let (file, all) = self.to_sync();
        Ok((file, Unsynced { sealed: through, ..all }))
    }

    /// What must be synced for everything appended so far to be durable, and what to call [`synced`](Self::synced) with.
    pub fn to_sync(&self) -> (Arc<dyn DiskFile>, Unsynced) {
        (Arc::clone(&self.here.file), Unsynced { epoch: self.epoch, sealed: 0, seq: self.next_seq - 1 })
    }

    /// It was synced. A file that has since been replaced says nothing of this one.
    pub fn synced(&mut self, of: Unsynced) {
        if of.epoch == self.epoch {
            self.sealed = self.sealed.max(of.sealed);
            self.durable = self.durable.max(of.seq);
        }
    }

    /// Whether the log has outgrown its checkpoint.
    pub fn wants_folding(&self) -> bool {
        let log = self.end - self.log_start;
        log > LOG_FOLD_BYTES && log > self.log_start
    }

    /// Whether half of the longest log is there, although it wanted folding long ago.
    pub fn is_near_limit(&self) -> bool {
        self.end - self.log_start > MAX_LOG_BYTES / 2
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
        let mut bytes = Vec::with_capacity(carried.len() * RECORD_BYTES);
        for (seq, record) in (staged.first_seq..).zip(carried) {
            bytes.extend_from_slice(&record.encode(seq, staged.first_seq.saturating_sub(1), staged.epoch));
        }
        staged.spare.file.write_at(&bytes, staged.len)?;
        // A flush may have vouched for these in the old file: they must be as durable in the new one.
        staged.spare.file.sync()
    }

    /// Replaces this file by the staged checkpoint, to which all since was [carried over](Self::carry_over).
    pub fn replace(&mut self, staged: Staged, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let carried = self.carry.take().unwrap_or_default();
        let marks = (staged.first_seq..).zip(&carried).filter(|(_, r)| matches!(r, Record::Mark(..)));
        let last_mark = marks.map(|(seq, _)| seq).last();
        let next_seq = staged.first_seq + carried.len() as u64;
        let mut new = staged.install(disk, dir, Some(self.here.clone()))?;
        new.end += (carried.len() * RECORD_BYTES) as u64;
        new.next_seq = next_seq;
        new.last_mark = last_mark.unwrap_or(new.last_mark);
        *self = new;
        Ok(())
    }

    /// The number the next record gets.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The file itself.
    pub fn file(&self) -> Roomy {
        self.here.clone()
    }
}

/// A part of the log on its way to the disk.
#[derive(Debug, Clone, Copy)]
pub struct Unsynced {
    epoch: u64,
    /// The newest mark that a seal in it covers.
    sealed: u64,
    /// Its last record.
    seq: u64,
}

#[cfg(test)]
mod tests;
